"""A call uses the weights as they are now, however they were changed.

No version counter sees `weight.data.mul_()`, a NumPy view that is written, or another process, so
anything derived from the weights and kept between calls (a packed copy, a cast) could be stale.
Each route of change is followed by a call in each mode, for each class, at a batch of one and at
one large enough for the kernels to rearrange the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

import rnn_ext
from devices import to_device
from helpers import (
    ALL_CLASS_NAMES,
    CELL_CLASS_NAMES,
    CLASS_NAMES,
    Call,
    assert_matches_torch,
    flatten,
    make_cell_call,
)

INPUT, HIDDEN = 9, 24
BATCHES = (1, 32)

Route = Callable[[nn.Module], object]

MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "train": nullcontext,
    "eval": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def make_call(name: str, batch: int) -> Call:
    if name in CELL_CLASS_NAMES:
        return replace(make_cell_call(name, INPUT, HIDDEN, batch=batch), backward=False)
    generator = torch.Generator().manual_seed(batch)
    input = torch.randn(3, batch, INPUT, generator=generator, device="cpu")
    return Call({"input": to_device(input)}, backward=False)


def first_result(module: nn.Module, call: Call) -> Tensor:
    return flatten(module(*call.arrange(call.leaves)))[0]


def first_weights(module: nn.Module) -> list[str]:
    """Names of one matrix for the input, one for the state, and a bias."""
    suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
    return [f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias_hh")]


# ----------------------------------------------------------------------------------- the routes


def optimizer_step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def fused_adam_step(module: nn.Module) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def data_multiplied(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def data_replaced(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.5


def one_element_written(module: nn.Module) -> None:
    for name in first_weights(module):
        getattr(module, name).data.view(-1)[5] = 3.0


def loaded(module: nn.Module) -> None:
    module.load_state_dict({k: 1.5 * v for k, v in module.state_dict().items()})


def loaded_by_assignment(module: nn.Module) -> None:
    state = {k: 1.5 * v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def copied_without_grad(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1.5 * parameter)


def vector_to_all_parameters(module: nn.Module) -> None:
    vector = parameters_to_vector(module.parameters()).detach()
    vector_to_parameters(1.5 * vector, module.parameters())


def numpy_view_written(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 1.5


def dlpack_view_written(module: nn.Module) -> None:
    for parameter in module.parameters():
        torch.from_dlpack(parameter.detach()).mul_(1.5)


def storage_written(module: nn.Module) -> None:
    for parameter in module.parameters():
        # A storage may hold the other weights, too: those of a module on a GPU are made flat.
        view = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        place = parameter.storage_offset(), parameter.shape, parameter.stride()
        view.set_(parameter.untyped_storage(), *place).mul_(1.5)


def storage_set(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.set_(1.5 * parameter)


def attribute_replaced(module: nn.Module) -> None:
    for name in first_weights(module):
        setattr(module, name, nn.Parameter(1.5 * getattr(module, name).detach()))


def cast_to_float64_and_back(module: nn.Module) -> None:
    module.double()
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    module.float()


def reset(module: nn.Module) -> None:
    module.reset_parameters()


def initialized_again(module: nn.Module) -> None:
    for name in first_weights(module)[:2]:
        nn.init.orthogonal_(getattr(module, name))


def changed_inside_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.mul_(1.5)


class Scaled(nn.Module):
    """weight = 2 * original"""

    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, first_weights(module)[1], Scaled())


ROUTES: tuple[Route, ...] = (
    optimizer_step,
    fused_adam_step,
    data_multiplied,
    data_replaced,
    one_element_written,
    loaded,
    loaded_by_assignment,
    copied_without_grad,
    vector_to_all_parameters,
    pytest.param(numpy_view_written, marks=pytest.mark.cpu_only("NumPy's memory")),
    dlpack_view_written,
    storage_written,
    storage_set,
    attribute_replaced,
    cast_to_float64_and_back,
    reset,
    initialized_again,
    changed_inside_inference_mode,
    parametrized,
)


def assert_change_is_seen(module: nn.Module, name: str, mode: str, change: Route) -> None:
    module.train(mode == "train")
    calls = [make_call(name, batch) for batch in BATCHES]
    with MODES[mode]():
        # Twice: something may be kept from the second call on.
        before = [[first_result(module, call).clone() for call in calls] for _ in range(2)][-1]
    change(module)
    with MODES[mode]():
        for call, old in zip(calls, before, strict=True):
            assert not torch.equal(first_result(module, call), old), "the change does not show"
            assert_matches_torch(module, call)


@pytest.mark.parametrize("name", ALL_CLASS_NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ROUTES)
def test_next_call_uses_the_new_weights(name: str, mode: str, change: Route) -> None:
    module = getattr(rnn_ext, name)(INPUT, HIDDEN)
    assert_change_is_seen(module, name, mode, change)


@pytest.mark.parametrize("name", ALL_CLASS_NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_original_of_a_parametrization_written(name: str, mode: str) -> None:
    module = getattr(rnn_ext, name)(INPUT, HIDDEN)
    parametrized(module)

    def change(module: nn.Module) -> None:
        module.parametrizations[first_weights(module)[1]].original.data.mul_(1.5)

    assert_change_is_seen(module, name, mode, change)


# ------------------------------------------------------------------------------ another process


def write_when_told(connection: Connection) -> None:
    """The other process: multiplies each tensor that it is sent, until it is sent None."""
    while (tensors := connection.recv()) is not None:
        for tensor in tensors:
            tensor.mul_(1.5)
        connection.send("done")


@pytest.fixture(scope="module")
def other_process() -> Iterator[Connection]:
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=write_when_told, args=(theirs,))
    process.start()
    theirs.close()  # so that its death ends a recv() here
    yield ours
    ours.send(None)
    process.join()
    assert process.exitcode == 0


@pytest.mark.cpu_only("memory that processes share")
@pytest.mark.parametrize("name", ALL_CLASS_NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_shared_memory_written_by_another_process(
    name: str, mode: str, other_process: Connection
) -> None:
    module = getattr(rnn_ext, name)(INPUT, HIDDEN).share_memory()

    def change(module: nn.Module) -> None:
        other_process.send([p.detach() for p in module.parameters()])
        assert other_process.recv() == "done"

    assert_change_is_seen(module, name, mode, change)


# --------------------------------------------------------------------- between forward and backward


@pytest.mark.parametrize("name", ALL_CLASS_NAMES)
@pytest.mark.parametrize("batch", BATCHES)
def test_weight_changed_before_backward_is_refused(name: str, batch: int) -> None:
    """As in torch.nn: the gradient would belong to no weights at all."""
    call = make_call(name, batch)
    for leaf in call.leaves.values():
        leaf.requires_grad_()
    for library in (nn, rnn_ext):
        module = getattr(library, name)(INPUT, HIDDEN)
        loss = first_result(module, call).sum()
        with torch.no_grad():
            getattr(module, first_weights(module)[0]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_training_follows_torch_step_by_step(name: str) -> None:
    """Twenty steps of an optimizer: a single stale weight would send the two apart."""
    ours = getattr(rnn_ext, name)(INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    theirs = getattr(nn, name)(INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    input, target = torch.randn(2, 5, 16, HIDDEN, dtype=torch.float64).unbind()
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(module(input[..., :INPUT])[0], target)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert losses[0] < 1.2
    torch.testing.assert_close(losses[0], losses[1])
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)
