"""Drop-in: is everything around forward as with the torch.nn class of the same name?"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_ext
from devices import chosen, to_device, without_cudnn
from helpers import (
    ALL_CLASS_NAMES,
    CELL_CLASS_NAMES,
    CLASS_NAMES,
    Call,
    assert_matches_torch,
    flatten,
    normal,
    torch_twin,
)

each_class = pytest.mark.parametrize("name", ALL_CLASS_NAMES)
each_sequence_class = pytest.mark.parametrize("name", CLASS_NAMES)

INPUT, HIDDEN = 5, 6

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "float64": {"dtype": torch.float64},
    "stacked": {"num_layers": 3, "dropout": 0.2},
    "two_ways": {"bidirectional": True, "batch_first": True},
    "relu": {"nonlinearity": "relu"},
    "projection": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
}


def accepts(name: str, options: str) -> bool:
    cell = name in CELL_CLASS_NAMES
    return {
        "stacked": not cell,
        "two_ways": not cell,
        "relu": name.startswith("RNN"),
        "projection": name == "LSTM",
    }.get(options, True)


each_variant = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{key}")
        for name in ALL_CLASS_NAMES
        for key, options in OPTIONS.items()
        if accepts(name, key)
    ],
)


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's, each made from the same seed."""
    modules = []
    for library in (rnn_ext, nn):
        torch.manual_seed(7)
        modules.append(getattr(library, name)(INPUT, HIDDEN, **options))
    return modules[0], modules[1]


def make_input(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (3, INPUT) if name in CELL_CLASS_NAMES else (4, 3, INPUT)
    generator = torch.Generator().manual_seed(3)
    return to_device(torch.randn(shape, generator=generator, dtype=dtype, device="cpu"))


def assert_same_results(actual: object, expected: object) -> None:
    for ours, theirs in zip(flatten(actual), flatten(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------- construction and appearance


@each_variant
def test_same_initial_values_for_the_same_seed(name: str, options: dict) -> None:
    ours, theirs = pair(name, **options)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.manual_seed(8)
    ours.reset_parameters()
    torch.manual_seed(8)
    theirs.reset_parameters()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@each_variant
def test_state_dict_both_ways(name: str, options: dict) -> None:
    ours, theirs = pair(name, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    for source, target in ((ours, theirs), (theirs, ours)):
        source.reset_parameters()
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        torch.testing.assert_close(source.state_dict(), target.state_dict(), rtol=0, atol=0)


@each_variant
def test_appearance(name: str, options: dict) -> None:
    ours, theirs = pair(name, **options)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert vars(ours).keys() == vars(theirs).keys()
    assert isinstance(ours, getattr(nn, name))
    assert type(ours).__name__ == type(ours).__qualname__ == name
    assert inspect.getdoc(type(ours))


@each_class
def test_signatures(name: str) -> None:
    ours, theirs = getattr(rnn_ext, name), getattr(nn, name)
    for method in ("__init__", "forward"):
        actual = inspect.signature(getattr(ours, method)).parameters
        expected = inspect.signature(getattr(theirs, method)).parameters
        extra = [actual[name] for name in actual if name not in expected]
        assert all(p.kind == p.KEYWORD_ONLY and p.default in (None, False) for p in extra)
        assert [(p.name, p.kind, p.default) for p in actual.values() if p not in extra] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ]


def test_constructor_warns_as_torch_does() -> None:
    for library in (nn, rnn_ext):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            library.GRU(3, 4, dropout=0.5)


# -------------------------------------------------------------------------- copies and archives


@each_variant
def test_pickle(name: str, options: dict) -> None:
    ours, _ = pair(name, **options)
    again = pickle.loads(pickle.dumps(ours.eval()))
    assert type(again) is type(ours)
    input = make_input(name, options.get("dtype", torch.float32))
    assert_same_results(again(input), ours(input))


@each_variant
@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
def test_copy(name: str, options: dict, copier: Callable) -> None:
    ours, _ = pair(name, **options)
    again = copier(ours.eval())
    assert type(again) is type(ours)
    input = make_input(name, options.get("dtype", torch.float32))
    expected = ours(input)
    assert_same_results(again(input), expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    shared = copier is copy.copy
    assert torch.equal(flatten(ours(input))[0], flatten(expected)[0]) != shared


@each_variant
def test_saved_state_is_loaded_with_weights_only(name: str, options: dict) -> None:
    ours, theirs = pair(name, **options)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@each_class
def test_whole_module_saved(name: str) -> None:
    """As with torch.nn, loading one with weights_only=True takes the class being declared safe."""
    ours, _ = pair(name)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert_same_results(
        torch.load(file, weights_only=False)(make_input(name)), ours(make_input(name))
    )
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=f"rnn_ext.modules.{name}"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([type(ours), getattr, set]):
        again = torch.load(file, weights_only=True)
    assert_same_results(again(make_input(name)), ours(make_input(name)))


# ---------------------------------------------------------------------------- casts and modes


@each_class
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (nn.Module.half, torch.float16),
        (nn.Module.bfloat16, torch.bfloat16),
        (nn.Module.double, torch.float64),
        (nn.Module.float, torch.float32),
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.to(chosen(), torch.bfloat16), torch.bfloat16),
        (lambda m: m.to(torch.zeros(1, dtype=torch.float16)), torch.float16),
        (lambda m: m.type(torch.float64), torch.float64),
    ],
    ids=["half", "bfloat16", "double", "float", "to", "to_device", "to_like", "type"],
)
def test_casts(name: str, cast: Callable, dtype: torch.dtype) -> None:
    ours, _ = pair(name)
    assert cast(ours) is ours
    assert all(p.dtype == dtype for p in ours.parameters())
    assert_matches_torch(ours, Call({"input": make_input(name, dtype)}))


@each_class
def test_train_and_eval_give_the_same_without_dropout(name: str) -> None:
    ours, _ = pair(name)
    input = make_input(name)
    assert ours.training
    training = flatten(ours(input))
    assert ours.eval() is ours
    assert not ours.training
    for a, b in zip(training, flatten(ours(input)), strict=True):
        assert torch.equal(a, b)
    assert ours.train().training


@each_sequence_class
def test_flatten_parameters(name: str) -> None:
    ours, _ = pair(name)
    before = list(ours.parameters())
    assert ours.flatten_parameters() is None
    assert all(a is b for a, b in zip(ours.parameters(), before, strict=True))
    assert_matches_torch(ours, Call({"input": make_input(name)}))


@each_class
def test_requires_grad_zero_grad_apply(name: str) -> None:
    ours, _ = pair(name)
    flatten(ours(make_input(name)))[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    ours.zero_grad()
    assert all(p.grad is None for p in ours.parameters())
    ours.requires_grad_(False)
    assert not flatten(ours(make_input(name)))[0].requires_grad
    ours.apply(lambda m: [p.data.zero_() for p in m.parameters()])
    assert_matches_torch(ours, Call({"input": make_input(name)}, backward=False))


@each_class
def test_meta_device(name: str) -> None:
    """Shapes and dtypes without memory; then materialized."""
    ours = getattr(rnn_ext, name)(INPUT, HIDDEN, device="meta")
    theirs = getattr(nn, name)(INPUT, HIDDEN, device="meta")
    input = make_input(name).to("meta")
    for actual, expected in zip(flatten(ours(input)), flatten(theirs(input)), strict=True):
        assert actual.is_meta
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
    real = ours.to_empty(device=chosen())
    real.reset_parameters()
    assert_matches_torch(real, Call({"input": make_input(name)}))
    with torch.device("meta"):
        assert next(getattr(rnn_ext, name)(2, 3).parameters()).is_meta


# --------------------------------------------------------------------------------- subclasses


class Doubling:
    """A mixin in front of the module, calling it by keyword as other libraries do."""

    def forward(self, x: Tensor, hx: object = None) -> object:
        return super().forward(2 * x, hx=hx)


class VariableLength(ABC, nn.RNNBase):
    """In the manner of pytorch-forecasting: an abstract class beside the concrete one."""

    @abstractmethod
    def init_hidden_state(self, x: Tensor) -> object:
        """Zeros in the form of the class."""

    def forward(self, x: Tensor, hx: object = None, lengths: Tensor | None = None) -> object:
        if hx is None:
            hx = self.init_hidden_state(x)
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return super().forward(packed, hx=hx)


@each_class
def test_mixin_in_front(name: str) -> None:
    def derive(library: object) -> nn.Module:
        torch.manual_seed(7)
        return type(name, (Doubling, getattr(library, name)), {})(INPUT, HIDDEN)

    ours, theirs = derive(rnn_ext), derive(nn)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    assert_same_results(ours(make_input(name)), theirs(make_input(name)))


@pytest.mark.parametrize("lengths", [None, (2, 4, 1)], ids=["padded", "packed"])
def test_abstract_class_beside_the_concrete_one(lengths: tuple[int, ...] | None) -> None:
    def zeros(self: nn.LSTM, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros(self.num_layers, x.shape[1], self.hidden_size)
        return h, h

    def derive(library: object) -> nn.Module:
        torch.manual_seed(7)
        bases = (VariableLength, library.LSTM)
        return type("LSTM", bases, {"init_hidden_state": zeros})(INPUT, HIDDEN, num_layers=2)

    ours, theirs = derive(rnn_ext), derive(nn)
    arguments = make_input("LSTM"), None, torch.tensor(lengths, device="cpu") if lengths else None
    assert_same_results(ours(*arguments), theirs(*arguments))
    nested = nn.ModuleList([theirs, nn.LSTM(INPUT, HIDDEN)])
    assert [type(m) for m in rnn_ext.convert(nested)] == [type(theirs), rnn_ext.LSTM]


@each_sequence_class
def test_state_passed_by_keyword(name: str) -> None:
    ours, theirs = pair(name)
    h = torch.randn(1, 3, HIDDEN)
    hx = (h, h) if name == "LSTM" else h
    assert_same_results(ours(make_input(name), hx=hx), theirs(input=make_input(name), hx=hx))


@each_class
def test_forward_called_without_hooks(name: str) -> None:
    ours, theirs = pair(name)
    ours.register_forward_hook(lambda *_: pytest.fail("forward() runs no hooks"))
    assert_same_results(ours.forward(make_input(name)), theirs(make_input(name)))


# --------------------------------------------------------------------------------------- hooks


@each_class
def test_hooks_see_and_change_what_they_do_with_torch(name: str) -> None:
    results = []
    for module in pair(name, dtype=torch.float64):
        seen: list[object] = []
        module.register_forward_pre_hook(lambda m, args: (2 * args[0],))
        module.register_forward_pre_hook(
            lambda m, args, kwargs, seen=seen: seen.append(len(args) + len(kwargs)),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda m, args, result: tuple(2 * r for r in flatten(result)))
        module.register_full_backward_pre_hook(
            lambda m, grads, seen=seen: seen.extend(g.clone() for g in grads if g is not None)
        )
        module.register_full_backward_hook(
            lambda m, gin, gout, seen=seen: seen.extend(g.clone() for g in gin if g is not None)
        )
        input = make_input(name, torch.float64).requires_grad_()
        result = module(input)
        sum(part.square().sum() for part in result).backward()
        gradients = [input.grad, *(p.grad for p in module.parameters())]
        results.append([*seen, *(r.detach() for r in result), *gradients])
    assert len(results[0]) > 4
    torch.testing.assert_close(results[0], results[1])


@each_class
def test_gradient_hooks_on_parameters_and_results(name: str) -> None:
    results = []
    for module in pair(name, dtype=torch.float64):
        seen: dict[str, Tensor] = {}
        for key, parameter in module.named_parameters():
            parameter.register_hook(
                lambda g, key=key, seen=seen: seen.__setitem__(f"gradient of {key}", g.clone())
            )
            parameter.register_post_accumulate_grad_hook(
                lambda p, key=key, seen=seen: seen.__setitem__(f"accumulated {key}", p.grad.clone())
            )
        output = flatten(module(make_input(name, torch.float64)))[0]
        output.register_hook(lambda g: 3 * g)
        output.square().sum().backward()
        assert len(seen) == 2 * len(list(module.parameters()))
        results.append(seen)
    torch.testing.assert_close(results[0], results[1])


# ------------------------------------------------------------------ what the kernels do not cover


class Tagged(Tensor):
    """The plainest tensor subclass: results of operators on it are of its class too."""


class Counting(Tensor):
    """A subclass that watches what is called with it."""

    calls: int = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Counting.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@each_class
@pytest.mark.parametrize("kind", [Tagged, Counting])
def test_tensor_subclass(name: str, kind: type[Tensor]) -> None:
    """Left to torch's own implementation, which knows what to do with them; without a warning."""
    ours, theirs = pair(name, dtype=torch.float64)
    data = make_input(name, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Counting.calls = 0
        actual = ours(data.as_subclass(kind))
    if kind is Counting:
        assert Counting.calls > 0
    expected = theirs(data.as_subclass(kind))
    for result, reference in zip(flatten(actual), flatten(expected), strict=True):
        assert type(result) is type(reference)
    assert_same_results(actual, theirs(data))


@each_class
@pytest.mark.parametrize("where", ["hx", "weight"])
def test_tensor_subclass_elsewhere(name: str, where: str) -> None:
    ours, theirs = pair(name, dtype=torch.float64)
    input = make_input(name, torch.float64)
    shape = (3, HIDDEN) if name in CELL_CLASS_NAMES else (1, 3, HIDDEN)
    h = torch.randn(shape, dtype=torch.float64)

    def state(h: Tensor) -> object:
        return (h, h) if name.startswith("LSTM") else h

    expected = theirs(input, state(h))
    if where == "hx":
        h = h.as_subclass(Tagged)
    else:
        attribute = "weight_hh" if name in CELL_CLASS_NAMES else "weight_hh_l0"
        weight = getattr(ours, attribute).detach().as_subclass(Tagged)
        setattr(ours, attribute, nn.Parameter(weight))
        assert isinstance(getattr(ours, attribute), Tagged)
    assert_same_results(ours(input, state(h)), expected)


@each_sequence_class
def test_packed_tensor_subclass(name: str) -> None:
    ours, theirs = pair(name, dtype=torch.float64)
    packed = pack_padded_sequence(
        make_input(name, torch.float64), torch.tensor([4, 2, 1], device="cpu")
    )
    tagged = packed._replace(data=packed.data.as_subclass(Tagged))
    actual, expected = ours(tagged), theirs(tagged)
    assert type(actual[0].data) is type(expected[0].data)
    assert_same_results(actual, theirs(packed))


@each_class
def test_parameter_as_input(name: str) -> None:
    ours, theirs = pair(name)
    input = nn.Parameter(make_input(name))
    actual = ours(input)
    assert type(flatten(actual)[0]) is Tensor
    assert_same_results(actual, theirs(input))


@each_class
def test_a_thousand_calls_warn_of_nothing(name: str) -> None:
    ours, _ = pair(name)
    input = make_input(name)[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1000):
            ours(input)


# ---------------------------------------------------------------------- computed weights


CONSTRAINTS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def train(module: nn.Module, name: str, steps: int = 4) -> list[Tensor]:
    """Some steps of an optimizer, through more than one time step for cells too."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    inputs = to_device(normal(torch.Generator().manual_seed(1), (3, 4, INPUT)))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        if name in CELL_CLASS_NAMES:
            state = None
            for x in inputs:
                state = module(x, state)
            output = flatten(state)[0]
        else:
            output = flatten(module(inputs))[0][-1]
        loss = (output - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@each_class
@pytest.mark.parametrize("constrain", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
@pytest.mark.parametrize("weight", ["weight_ih", "weight_hh"])
def test_parametrized_weights_train(name: str, constrain: Callable, weight: str) -> None:
    weight += "" if name in CELL_CLASS_NAMES else "_l0"
    histories = []
    for module in pair(name, dtype=torch.float64):
        # In eval: training, spectral_norm takes a power iteration whenever its weight is read,
        # and torch.nn reads it more often.
        torch.manual_seed(5)
        constrain(module.eval(), weight)
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        with without_cudnn():  # its backward is for training mode only
            losses = train(module, name)
        assert losses[-1] < losses[0]
        for parameter_name, parameter in module.named_parameters():
            changed = not torch.equal(parameter, before[parameter_name])
            assert changed, f"{parameter_name} does not train"
        histories.append(losses + list(module.parameters()))
    torch.testing.assert_close(*histories)


@each_class
def test_spectral_norm_in_training_mode(name: str) -> None:
    """Power iterations go on in forward, and the weight that is used has norm one in the end."""
    weight = "weight_hh" + ("" if name in CELL_CLASS_NAMES else "_l0")
    ours, _ = pair(name, dtype=torch.float64)
    parametrizations.spectral_norm(ours, weight)
    losses = train(ours, name, steps=60)
    assert losses[-1] < losses[0]
    largest = torch.linalg.matrix_norm(getattr(ours.eval(), weight).detach(), 2)
    # The norm is an estimate by power iteration, one step a forward: it has come close, no more.
    torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-2, atol=0)
    assert_matches_torch(ours, Call({"input": make_input(name, torch.float64)}, backward=False))


@each_class
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_by_hook_trains(name: str) -> None:
    weight = "weight_hh" + ("" if name in CELL_CLASS_NAMES else "_l0")
    histories = []
    for module in pair(name, dtype=torch.float64):
        nn.utils.weight_norm(module, weight)
        losses = train(module, name)
        assert losses[-1] < losses[0]
        histories.append(losses + list(module.parameters()))
    torch.testing.assert_close(*histories)


@each_class
def test_pruned_weights_train(name: str) -> None:
    weight = "weight_hh" + ("" if name in CELL_CLASS_NAMES else "_l0")
    histories = []
    for module in pair(name, dtype=torch.float64):
        prune.l1_unstructured(module, weight, amount=0.4)
        losses = train(module, name)
        prune.remove(module, weight)
        assert (getattr(module, weight) == 0).sum() == round(0.4 * getattr(module, weight).numel())
        histories.append(losses + list(module.parameters()))
    torch.testing.assert_close(*histories)


# ------------------------------------------------------------------------- torch.func


@each_class
def test_functional_call(name: str) -> None:
    ours, theirs = pair(name, dtype=torch.float64)
    input = make_input(name, torch.float64)
    replaced = {n: (1.5 * p.detach()).requires_grad_() for n, p in ours.named_parameters()}

    def gradients(module: nn.Module) -> list[Tensor]:
        output = flatten(torch.func.functional_call(module, replaced, (input,)))[0]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), replaced.values())]

    before = flatten(ours(input))[0]
    torch.testing.assert_close(gradients(ours), gradients(theirs))
    assert torch.equal(flatten(ours(input))[0], before)


@each_class
def test_functional_call_with_some_of_the_weights(name: str) -> None:
    ours, theirs = pair(name, dtype=torch.float64)
    first = next(iter(ours.state_dict()))
    replaced = {first: torch.zeros_like(ours.state_dict()[first])}
    arguments = (replaced, (make_input(name, torch.float64),))
    assert_same_results(
        torch.func.functional_call(ours, *arguments), torch.func.functional_call(theirs, *arguments)
    )


@each_class
def test_vmap_over_examples(name: str) -> None:
    """torch.nn can do this for a few of the classes only, so compare with one call per example."""
    ours, theirs = pair(name, dtype=torch.float64)
    examples = make_input(name, torch.float64)
    dim = 0 if name in CELL_CLASS_NAMES else 1

    def output(example: Tensor) -> Tensor:
        return flatten(ours(example))[0]

    expected = torch.stack([flatten(theirs(e))[0] for e in examples.unbind(dim)])
    torch.testing.assert_close(torch.vmap(output, in_dims=dim)(examples), expected)


@each_class
def test_gradients_per_example(name: str) -> None:
    ours, theirs = pair(name, dtype=torch.float64)
    examples = make_input(name, torch.float64)
    dim = 0 if name in CELL_CLASS_NAMES else 1

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        result = torch.func.functional_call(ours, parameters, (example,))
        return flatten(result)[0].square().sum()

    weights = {n: p.detach() for n, p in ours.named_parameters()}
    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, dim))(weights, examples)
    for i, example in enumerate(examples.unbind(dim)):
        theirs.zero_grad()
        flatten(theirs(example))[0].square().sum().backward()
        for key, parameter in theirs.named_parameters():
            torch.testing.assert_close(actual[key][i], parameter.grad)


@each_sequence_class
def test_twin_of_the_tests_is_faithful(name: str) -> None:
    """torch_twin, on which other tests rely, copies weights and settings."""
    options: dict[str, object] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    ours, theirs = pair(name, **options)
    twin = torch_twin(ours)
    assert type(twin) is type(theirs)
    assert repr(twin) == repr(theirs)
    torch.testing.assert_close(
        twin.state_dict(), theirs.state_dict(), rtol=0, atol=0, check_device=False
    )
