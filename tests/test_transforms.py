"""torch.func: transforms of the modules, alone and nested, against loops and plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import profile
from torch.utils import _pytree as pytree

import rnn_ext
from devices import without_cudnn
from helpers import threads

CONFIGURATIONS = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bias": False, "bidirectional": True}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm-stack": (nn.LSTM, {"num_layers": 3}),
    "lstm-proj": (nn.LSTM, {"proj_size": 3, "num_layers": 2}),
}
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
EXAMPLES, MODELS = 4, 3

each = pytest.mark.parametrize("name", CONFIGURATIONS)
small = pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])

Weights = dict[str, Tensor]


class Case:
    """A module of one configuration with example data, and functions of its weights."""

    def __init__(self, name: str, unbatched: bool = False, given_state: bool = False) -> None:
        torch.manual_seed(3)
        cls, options = CONFIGURATIONS[name]
        self.models = [rnn_ext.convert(cls(4, 5, **options).double()) for _ in range(MODELS)]
        self.module = self.models[0]
        self.weights = self.weights_of(self.module)
        self.data = torch.randn(EXAMPLES, *((6, 4) if unbatched else (6, 3, 4))).double()
        slots = self.module.num_layers * (2 if self.module.bidirectional else 1)
        rows = () if unbatched else (6 if self.module.batch_first else 3,)
        self.h_0 = torch.randn(EXAMPLES, slots, *rows, self.module.proj_size or 5).double()
        self.c_0 = torch.randn(EXAMPLES, slots, *rows, 5).double()
        self.given_state = given_state

    @staticmethod
    def weights_of(module: nn.Module) -> Weights:
        return {name: p.detach() for name, p in module.named_parameters()}

    def stacked(self) -> Weights:
        return {name: p.detach() for name, p in stack_module_state(self.models)[0].items()}

    def state(self, example: int | slice) -> object:
        if not self.given_state:
            return None
        h_0, c_0 = self.h_0[example], self.c_0[example]
        return (h_0, c_0) if self.module.mode == "LSTM" else h_0

    def call(self, weights: Weights, input: Tensor, hx: object = None) -> list[Tensor]:
        output, state = functional_call(self.module, weights, (input, hx))
        return [output, *(state if isinstance(state, tuple) else (state,))]

    def loss(self, weights: Weights, input: Tensor, hx: object = None) -> Tensor:
        results = self.call(weights, input, hx)
        return sum((r * torch.linspace(-1, 1, r.size(-1))).sin().sum() for r in results)


def stack(items: list) -> object:
    return torch.utils._pytree.tree_map(lambda *tensors: torch.stack(tensors), *items)


def assert_same(found: object, expected: object) -> None:
    # float64, summed in another order; derivatives of derivatives lose some digits.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def operators_called(function: Callable[[], object]) -> dict[str, int]:
    function()
    with profile() as records:
        function()
    return {e.key: e.count for e in records.key_averages()}


# ------------------------------------------------------------------------------------- examples


@each
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("given_state", [False, True])
def test_vmap_over_examples(name: str, unbatched: bool, given_state: bool) -> None:
    case = Case(name, unbatched, given_state)
    mapped = (None, 0, 0 if given_state else None)
    found = vmap(case.call, in_dims=mapped)(case.weights, case.data, case.state(slice(None)))
    loop = [case.call(case.weights, x, case.state(i)) for i, x in enumerate(case.data)]
    assert_same(found, stack(loop))


@each
def test_vmap_over_states_alone_and_over_another_dimension(name: str) -> None:
    case = Case(name, given_state=True)
    found = vmap(lambda hx: case.call(case.weights, case.data[0], hx))(case.state(slice(None)))
    loop = [case.call(case.weights, case.data[0], case.state(i)) for i in range(EXAMPLES)]
    assert_same(found, stack(loop))
    found = vmap(lambda x: case.call(case.weights, x), in_dims=2)(case.data.movedim(0, 2))
    assert_same(found, stack([case.call(case.weights, x) for x in case.data]))


@each
def test_vmap_over_packed_sequences(name: str) -> None:
    case = Case(name)
    sizes = torch.tensor([3, 3, 2, 1], device="cpu")
    data = torch.randn(EXAMPLES, 9, 4).double()

    def call(weights: Weights, rows: Tensor) -> list[Tensor]:
        output, *state = case.call(weights, PackedSequence(rows, sizes))
        return [output.data, *state]

    def loss(weights: Weights, rows: Tensor) -> Tensor:
        return sum(r.square().sum() for r in call(weights, rows))

    loop = [call(case.weights, rows) for rows in data]
    assert_same(vmap(call, in_dims=(None, 0))(case.weights, data), stack(loop))
    loop = [grad(loss)(case.weights, rows) for rows in data]
    assert_same(vmap(grad(loss), in_dims=(None, 0))(case.weights, data), stack(loop))


@each
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("given_state", [False, True])
def test_gradients_per_example(name: str, unbatched: bool, given_state: bool) -> None:
    case = Case(name, unbatched, given_state)
    of_all = grad(case.loss, argnums=(0, 1))
    states = case.state(slice(None))
    mapped = (None, 0, 0 if given_state else None)
    found = vmap(of_all, in_dims=mapped)(case.weights, case.data, states)
    loop = [of_all(case.weights, x, case.state(i)) for i, x in enumerate(case.data)]
    assert_same(found, stack(loop))


@each
def test_gradients_per_example_in_float32(name: str) -> None:
    case = Case(name)
    weights = {n: p.float() for n, p in case.weights.items()}
    found = vmap(grad(case.loss), in_dims=(None, 0))(weights, case.data.float())
    exact = vmap(grad(case.loss), in_dims=(None, 0))(case.weights, case.data)
    torch.testing.assert_close(
        {n: g.double() for n, g in found.items()}, exact, rtol=1e-4, atol=1e-4
    )


@each
def test_gradient_of_the_input_per_example(name: str) -> None:
    case = Case(name)
    of_input = grad(case.loss, argnums=1)
    found = vmap(of_input, in_dims=(None, 0))(case.weights, case.data)
    assert_same(found, torch.stack([of_input(case.weights, x) for x in case.data]))


@each
def test_plain_autograd_through_vmap(name: str) -> None:
    case = Case(name)
    leaves = {n: p.clone().requires_grad_() for n, p in case.weights.items()}
    loss = vmap(case.loss, in_dims=(None, 0))(leaves, case.data).sum()
    expected = sum(case.loss(leaves, x) for x in case.data)
    assert_same(
        torch.autograd.grad(loss, list(leaves.values())),
        torch.autograd.grad(expected, list(leaves.values())),
    )


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm-stack"])
def test_examples_are_one_call(name: str) -> None:
    case = Case(name)
    called = operators_called(lambda: vmap(case.call, in_dims=(None, 0))(case.weights, case.data))
    assert called["rnn_ext::recurrent"] == 2  # above and below the transform
    per_example = vmap(grad(case.loss), in_dims=(None, 0))
    called = operators_called(lambda: per_example(case.weights, case.data))
    by_operator = [
        called.get(f"rnn_ext::recurrent_backward{kind}", 0) for kind in ("", "_per_example")
    ]
    # Above the transform one call; below it the CPU has an operator of its own.
    assert by_operator == ([2, 0] if torch.get_default_device().type == "cuda" else [1, 1])


# --------------------------------------------------------------------------------------- models


@each
@pytest.mark.parametrize("given_state", [False, True])
def test_vmap_over_models(name: str, given_state: bool) -> None:
    case = Case(name, given_state=given_state)
    found = vmap(case.call, in_dims=(0, None, None))(case.stacked(), case.data[0], case.state(0))
    loop = [case.call(case.weights_of(m), case.data[0], case.state(0)) for m in case.models]
    assert_same(found, stack(loop))


@each
def test_vmap_over_models_and_examples(name: str) -> None:
    case = Case(name)
    loop = [case.call(case.weights_of(m), x) for m, x in zip(case.models, case.data, strict=False)]
    assert_same(vmap(case.call)(case.stacked(), case.data[:MODELS]), stack(loop))


@each
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_training_an_ensemble(name: str, threads: int) -> None:
    case = Case(name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights, _ = stack_module_state(case.models)
        vmap(case.loss, in_dims=(0, None))(weights, case.data[0]).sum().backward()
    finally:
        torch.set_num_threads(before)
    for model in case.models:
        case.loss(dict(model.named_parameters()), case.data[0]).backward()
    for key, weight in weights.items():
        assert_same(
            weight.grad, torch.stack([dict(m.named_parameters())[key].grad for m in case.models])
        )


def test_an_ensemble_gives_the_bits_of_its_models() -> None:
    case = Case("lstm")
    found = vmap(case.call, in_dims=(0, None))(case.stacked(), case.data[0])
    loop = stack([case.call(case.weights_of(m), case.data[0]) for m in case.models])
    assert all(torch.equal(a, b) for a, b in zip(found, loop, strict=True))


@each
def test_the_bits_of_models_and_examples_do_not_depend_on_the_threads(name: str) -> None:
    case = Case(name)
    found = {}
    for count in (1, 2):
        with threads(count):
            of_models = vmap(grad(case.loss), in_dims=(0, None))(case.stacked(), case.data[0])
            of_examples = vmap(grad(case.loss), in_dims=(None, 0))(case.weights, case.data)
            found[count] = [*pytree.tree_leaves(of_models), *pytree.tree_leaves(of_examples)]
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


@each
def test_gradients_of_an_ensemble(name: str) -> None:
    case = Case(name)
    found = vmap(grad(case.loss), in_dims=(0, None))(case.stacked(), case.data[0])
    loop = [grad(case.loss)(case.weights_of(m), case.data[0]) for m in case.models]
    assert_same(found, stack(loop))


@small
def test_inference_mode_over_models(name: str) -> None:
    case = Case(name)
    with torch.inference_mode():
        found = vmap(case.call, in_dims=(0, None))(case.stacked(), case.data[0])
        assert_same(
            found, stack([case.call(case.weights_of(m), case.data[0]) for m in case.models])
        )


# -------------------------------------------------------------------------------------- nested


@each
@pytest.mark.parametrize("outer", ["models", "examples"])
def test_gradients_per_model_and_example(name: str, outer: str) -> None:
    case = Case(name)
    loop = [[grad(case.loss)(case.weights_of(m), x) for x in case.data] for m in case.models]
    if outer == "models":
        both = vmap(vmap(grad(case.loss), in_dims=(None, 0)), in_dims=(0, None))
        assert_same(both(case.stacked(), case.data), stack([stack(row) for row in loop]))
    else:
        both = vmap(vmap(grad(case.loss), in_dims=(0, None)), in_dims=(None, 0))
        turned = zip(*loop, strict=True)
        assert_same(both(case.stacked(), case.data), stack([stack(list(row)) for row in turned]))


@small
def test_models_of_models(name: str) -> None:
    case = Case(name)
    twice = {n: torch.stack([p, p / 2]) for n, p in case.stacked().items()}
    found = vmap(vmap(case.call, in_dims=(0, None)), in_dims=(0, None))(twice, case.data[0])
    inner = vmap(case.call, in_dims=(0, None))
    loop = [inner({n: p[i] for n, p in twice.items()}, case.data[0]) for i in range(2)]
    assert_same(found, stack(loop))


@small
def test_examples_of_examples(name: str) -> None:
    case = Case(name)
    data = torch.stack([case.data, -case.data])
    of_weights = vmap(vmap(grad(case.loss), in_dims=(None, 0)), in_dims=(None, 0))
    loop = [stack([grad(case.loss)(case.weights, x) for x in part]) for part in data]
    assert_same(of_weights(case.weights, data), stack(loop))


# ------------------------------------------------------------------------------- derivatives


@each
def test_first_derivatives(name: str) -> None:
    case = Case(name)
    x, tangent = case.data[0], torch.ones_like(case.data[0])

    def output(input: Tensor) -> Tensor:
        return case.call(case.weights, input)[0]

    expected = torch.autograd.functional.jacobian(output, x)
    assert_same(jacrev(output)(x), expected)
    assert_same(jacfwd(output)(x), expected)
    assert_same(
        jvp(output, (x,), (tangent,))[1], torch.einsum("abcxyz,xyz->abc", expected, tangent)
    )
    result, pull = vjp(output, x)
    assert_same(pull(result)[0], torch.einsum("abcxyz,abc->xyz", expected, result))
    of_weights = {n: p.requires_grad_() for n, p in case.weights.items()}
    expected = torch.autograd.grad(case.loss(of_weights, x), list(of_weights.values()))
    found = grad(case.loss)({n: p.detach() for n, p in case.weights.items()}, x)
    assert_same(list(found.values()), list(expected))


@small
def test_jacobians_by_the_weights(name: str) -> None:
    case = Case(name)

    def output(weights: Weights) -> Tensor:
        return case.call(weights, case.data[0])[0]

    assert_same(jacrev(output)(case.weights), jacfwd(output)(case.weights))


@small
def test_second_derivatives(name: str) -> None:
    case = Case(name)
    x = case.data[0][:3, :2].contiguous()

    def loss(input: Tensor) -> Tensor:
        return case.loss(case.weights, input)

    twin = rnn_ext.to_torch(case.module)
    with without_cudnn():  # it has no second derivatives
        expected = torch.autograd.functional.hessian(
            lambda input: sum(
                (r * torch.linspace(-1, 1, r.size(-1))).sin().sum()
                for r in torch.utils._pytree.tree_leaves(twin(input))
            ),
            x,
        )
    assert_same(hessian(loss)(x), expected)
    assert_same(jacrev(jacrev(loss))(x), expected)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm-proj"])
def test_gradient_of_a_penalty_on_gradients_per_example(name: str) -> None:
    case = Case(name)
    data = case.data[:2]

    def penalty(gradients: Weights) -> Tensor:
        return sum(g.square().sum() for g in gradients.values())

    def mapped(weights: Weights) -> Tensor:
        return penalty(vmap(grad(case.loss), in_dims=(None, 0))(weights, data))

    expected = grad(lambda w: sum(penalty(grad(case.loss)(w, x)) for x in data))(case.weights)
    assert_same(grad(mapped)(case.weights), expected)
    leaves = {n: p.clone().requires_grad_() for n, p in case.weights.items()}
    assert_same(
        list(torch.autograd.grad(mapped(leaves), list(leaves.values()))), list(expected.values())
    )
    inner = grad(lambda x: grad(case.loss, argnums=1)(case.weights, x).square().sum())
    assert_same(vmap(inner)(data), torch.stack([inner(x) for x in data]))


# --------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    cell = getattr(rnn_ext, name)(4, 5).double()
    weights = {n: p.detach() for n, p in cell.named_parameters()}
    data = torch.randn(EXAMPLES, 3, 4).double()

    def loss(weights: Weights, input: Tensor) -> Tensor:
        results = functional_call(cell, weights, (input,))
        return sum(r.sin().sum() for r in (results if isinstance(results, tuple) else (results,)))

    loop = stack([grad(loss)(weights, x) for x in data])
    assert_same(vmap(grad(loss), in_dims=(None, 0))(weights, data), loop)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_follows_the_randomness_of_vmap(randomness: str) -> None:
    module = rnn_ext.GRU(4, 5, num_layers=2, dropout=0.5)
    input = torch.ones(EXAMPLES, 6, 3, 4)
    output = vmap(lambda x: module(x)[0], randomness=randomness)(input)
    assert torch.equal(output[0], output[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(input)


def test_gradients_per_example_with_dropout() -> None:
    module = rnn_ext.LSTM(4, 5, num_layers=2, dropout=1.0).double()  # drops everything: no chance
    weights = {n: p.detach() for n, p in module.named_parameters()}
    data = torch.randn(EXAMPLES, 6, 3, 4).double()

    def loss(weights: Weights, input: Tensor) -> Tensor:
        return functional_call(module, weights, (input,))[0].sin().sum()

    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(weights, data)
    assert_same(found, stack([grad(loss)(weights, x) for x in data]))


def test_mapped_batch_sizes_are_an_error() -> None:
    module = rnn_ext.GRU(4, 5)

    def call(sizes: Tensor) -> Tensor:
        return rnn_ext.functional.gru(
            torch.ones(3, 4), None, module._flat_weights, batch_sizes=sizes
        )[0]

    with pytest.raises(NotImplementedError, match="batch_sizes"):
        vmap(call)(torch.tensor([[2, 1], [1, 1]]))


@small
def test_checkpoint_under_a_transform_and_without(name: str) -> None:
    case = Case(name)
    x = case.data[0].requires_grad_()
    expected = torch.autograd.grad(case.module(x)[0].sin().sum(), x)
    saved = torch.utils.checkpoint.checkpoint(case.module, x, use_reentrant=False)[0]
    assert_same(torch.autograd.grad(saved.sin().sum(), x), expected)
