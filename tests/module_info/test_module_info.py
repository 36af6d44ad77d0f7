"""torch's own samples for its RNN modules (the ModuleInfo entries it ships), run on both libraries.

`torch.testing._internal.common_modules` has, for each module, constructor arguments, inputs, a
reference function and bad inputs with the error expected. The test program that pytorch runs over
them is not shipped; the checks here are those of it that mean something on one device.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db
from torch.utils import _pytree as pytree

import rnn_ext

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
INFOS = {i.module_cls.__name__: i for i in module_db if i.module_cls.__name__ in NAMES}
LIBRARIES = {"torch": nn, "rnn_ext": rnn_ext}

each = pytest.mark.parametrize("name", NAMES)
each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
each_mode = pytest.mark.parametrize("training", [False, True])

Sample = tuple[nn.Module, tuple, dict, object]


def test_every_module_is_there() -> None:
    assert set(INFOS) == set(NAMES)
    assert all(info.module_cls is getattr(nn, name) for name, info in INFOS.items())


def inputs_of(info: ModuleInfo, dtype: torch.dtype, training: bool, grad: bool = False) -> list:
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=grad, training=training
    )
    assert len(found) > 0
    return found


def samples(
    library: ModuleType, name: str, dtype: torch.dtype, training: bool, grad: bool = False
) -> Iterator[Sample]:
    for sample in inputs_of(INFOS[name], dtype, training, grad):
        constructor, forward = sample.constructor_input, sample.forward_input
        torch.manual_seed(1)
        module = getattr(library, name)(*constructor.args, **constructor.kwargs, dtype=dtype)
        module.train(training)
        yield module, forward.args, forward.kwargs, sample.reference_fn


def tensors(values: object) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)]


def same(found: object, expected: object) -> None:
    torch.testing.assert_close(tensors(found), tensors(expected))


@each
@each_library
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward(name: str, library: ModuleType, training: bool, dtype: torch.dtype) -> None:
    for module, args, kwargs, reference in samples(library, name, dtype, training):
        results = module(*args, **kwargs)
        assert all(t.dtype == dtype for t in tensors(results))
        same(module(*args, **kwargs), results)
        if reference is not None:
            expected = reference(module, *args, **kwargs)
            same(results, expected)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    both = zip(samples(rnn_ext, name, dtype, True), samples(nn, name, dtype, True), strict=True)
    for (mine, args, kwargs, _), (theirs, _, _, _) in both:
        same(mine(*args, **kwargs), theirs(*args, **kwargs))


@each
@each_library
@each_mode
@pytest.mark.parametrize("second", [False, True], ids=["grad", "gradgrad"])
def test_gradients(name: str, library: ModuleType, training: bool, second: bool) -> None:
    for module, args, kwargs, _ in samples(library, name, torch.float64, training, grad=True):
        parameters = tuple(module.parameters())
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(*values: Tensor, places=places, leaves=leaves, structure=structure, module=module):
            filled = list(leaves)
            for place, value in zip(places, values, strict=False):
                filled[place] = value
            arguments, options = pytree.tree_unflatten(filled, structure)
            named = dict(
                zip((n for n, _ in module.named_parameters()), values[len(places) :], strict=True)
            )
            return tuple(tensors(torch.func.functional_call(module, named, arguments, options)))

        values = (*(leaves[i] for i in places), *parameters)
        check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
        assert check(call, values, check_batched_grad=False, fast_mode=True)


@each
@each_library
@each_mode
def test_non_contiguous_arguments(name: str, library: ModuleType, training: bool) -> None:
    def spread(tensor: Tensor) -> Tensor:
        wide = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], dim=-1)
        return wide[..., 0].requires_grad_()

    for module, args, kwargs, _ in samples(library, name, torch.float32, training, grad=True):
        others = pytree.tree_map_only(Tensor, spread, (args, kwargs))
        expected, found = module(*args, **kwargs), module(*others[0], **others[1])
        same(found, expected)
        sources = [*tensors((args, kwargs)), *module.parameters()]
        copies = [*tensors(others), *module.parameters()]
        loss = sum(t.square().sum() for t in tensors(expected))
        other_loss = sum(t.square().sum() for t in tensors(found))
        same(torch.autograd.grad(other_loss, copies), torch.autograd.grad(loss, sources))


@each
@each_library
@each_mode
def test_copies(name: str, library: ModuleType, training: bool) -> None:
    for module, args, kwargs, _ in samples(library, name, torch.float32, training):
        expected = module(*args, **kwargs)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for twin in (
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
            torch.load(file, weights_only=False),
        ):
            assert type(twin) is type(module)
            assert twin.training == training
            same(twin(*args, **kwargs), expected)


@each
@each_library
def test_repr_and_factory_arguments(name: str, library: ModuleType) -> None:
    info = INFOS[name]
    for sample in inputs_of(info, torch.float32, True):
        arguments = sample.constructor_input
        cls = getattr(library, name)
        expected = repr(info.module_cls(*arguments.args, **arguments.kwargs))
        assert repr(cls(*arguments.args, **arguments.kwargs)) == expected
        module = cls(*arguments.args, **arguments.kwargs, dtype=torch.float64, device="meta")
        assert all(p.dtype == torch.float64 and p.is_meta for p in module.parameters())


@each
@each_library
@each_mode
def test_state_dict_and_moves(name: str, library: ModuleType, training: bool) -> None:
    for module, args, kwargs, _ in samples(library, name, torch.float32, training):
        expected = module(*args, **kwargs)
        twin = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin.load_state_dict(module.state_dict()).missing_keys
        same(twin(*args, **kwargs), expected)
        same(twin.double().float()(*args, **kwargs), expected)
        assert all(p.is_meta for p in twin.to("meta").parameters())
        assert not any(p.is_meta for p in twin.to_empty(device="cpu").parameters())


@each
@each_library
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors(name: str, library: ModuleType, training: bool, dtype: torch.dtype) -> None:
    info = INFOS[name]
    bad = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    assert len(bad) > 0
    for error in bad:
        constructor = error.module_error_input.constructor_input
        forward = error.module_error_input.forward_input

        def construct(constructor=constructor) -> nn.Module:
            return getattr(library, name)(*constructor.args, **constructor.kwargs)

        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                construct()
        else:
            module = construct().train(training)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*forward.args, **forward.kwargs)
