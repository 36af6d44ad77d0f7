"""torch.compile: one graph, few compilations, the results and gradients of eager mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_ext

CELLS = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm-proj": (nn.LSTM, {"proj_size": 3, "num_layers": 2}),
}
CELL_CLASSES = ("RNNCell", "LSTMCell", "GRUCell")

each_cell = pytest.mark.parametrize("name", CELLS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Tagger(nn.Module):
    """A recurrent module in the middle of a model, its final state used too."""

    def __init__(self, cls: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.recurrent = cls(4, 6, **options)
        slots = self.recurrent.num_layers * (2 if self.recurrent.bidirectional else 1)
        width = self.recurrent.proj_size or 6
        self.head = nn.Linear(width * (2 if self.recurrent.bidirectional else 1), 3)
        self.last = nn.Linear(slots * width, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.recurrent(torch.tanh(self.embed(tokens)))
        h_n = state[0] if isinstance(state, tuple) else state
        return torch.relu(self.head(output)), self.last(h_n.transpose(0, 1).flatten(1))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(sum(shape)))


def results_and_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    results = model(*inputs)
    sum(r.square().sum() for r in results).backward()
    return [*(r.detach() for r in results), *(p.grad.clone() for p in model.parameters())]


@each_cell
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_with_the_results_and_gradients_of_eager(name: str, backend: str) -> None:
    cls, options = CELLS[name]
    model = Tagger(cls, **options).double()
    compiled = rnn_ext.compile(model, fullgraph=True, backend=backend)
    assert type(model.recurrent) is cls
    for shape in ((5, 3), (4, 7)):
        expected = results_and_gradients(rnn_ext.convert(model), tokens(*shape))
        torch.testing.assert_close(results_and_gradients(compiled, tokens(*shape)), expected)


def test_the_options_that_make_a_call_cheaper() -> None:
    model = Tagger(nn.LSTM, num_layers=2).double()
    options = {"cpp_wrapper": True, "size_asserts": False}
    compiled = rnn_ext.compile(model, fullgraph=True, options=options)
    expected = results_and_gradients(rnn_ext.convert(model), tokens(5, 3))
    torch.testing.assert_close(results_and_gradients(compiled, tokens(5, 3)), expected)


@each_cell
def test_two_compilations_for_twenty_shapes(name: str) -> None:
    cls, options = CELLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    model = Tagger(cls, **options)
    compiled = rnn_ext.compile(model, fullgraph=True, backend=counter)
    eager = rnn_ext.convert(model)
    shapes = [(2 + i % 7, 2 + (3 * i) % 11) for i in range(20)]
    assert len(set(shapes)) == 20
    for shape in shapes:
        found = results_and_gradients(compiled, tokens(*shape))
        torch.testing.assert_close(found, results_and_gradients(eager, tokens(*shape)))
    assert counter.frame_count == 2


class Affine(nn.Module):
    """What torch.compile does to a model without recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.head(torch.tanh(self.embed(tokens))),)


@each_cell
def test_with_dynamic_shapes_from_the_start_no_more_compilations_than_linear(name: str) -> None:
    cls, options = CELLS[name]
    shapes = [(3 + i % 7, 2 + (3 * i) % 11) for i in range(20)]
    assert len(set(shapes)) == 20

    def compilations(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = rnn_ext.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for shape in shapes:
            results_and_gradients(compiled, tokens(*shape))
        return counter.frame_count

    assert compilations(Tagger(cls, **options)) <= compilations(Affine())


@pytest.mark.parametrize("name", CELL_CLASSES)
def test_cells(name: str) -> None:
    cell = getattr(nn, name)(4, 6)
    counter = CompileCounterWithBackend("inductor")
    compiled = rnn_ext.compile(cell, fullgraph=True, backend=counter)
    eager = rnn_ext.convert(cell)
    for batch in (2, 3, 5, 8):
        input = torch.randn(batch, 4)
        found, expected = compiled(input), eager(input)
        torch.testing.assert_close(compiled(input, found), eager(input, expected))
    assert counter.frame_count <= 4  # with and without a state, one batch size and any


@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize("given_state", [False, True])
def test_packed_sequences(name: str, given_state: bool) -> None:
    module = getattr(nn, name.upper())(4, 6, bidirectional=True)
    fused = rnn_ext.convert(module)

    def run(module: nn.Module, padded: Tensor, lengths: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        h_0 = torch.ones(2, padded.size(1), 6)
        hx = ((h_0, h_0) if name == "lstm" else h_0) if given_state else None
        output, state = module(packed, hx)
        return [output.data, *(state if name == "lstm" else (state,))]

    compiled = rnn_ext.compile(module, backend="aot_eager")
    for lengths in ([3, 5, 1], [2, 2, 4, 4]):
        padded = torch.randn(5, len(lengths), 4)
        found = run(compiled, padded, torch.tensor(lengths))
        torch.testing.assert_close(found, run(fused, padded, torch.tensor(lengths)))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_dropout_draws_again_in_every_call(name: str) -> None:
    model = getattr(nn, name.upper())(4, 6, num_layers=2, dropout=0.5)
    compiled = rnn_ext.compile(model, fullgraph=True)
    input = torch.ones(5, 3, 4)
    assert not torch.equal(compiled(input)[0], compiled(input)[0])
    model.eval()
    compiled.eval()
    assert torch.equal(compiled(input)[0], compiled(input)[0])


@each_cell
def test_compiled_autograd(name: str) -> None:
    cls, options = CELLS[name]
    model = Tagger(cls, **options).double()
    fused = rnn_ext.convert(model)
    expected = results_and_gradients(fused, tokens(5, 3))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = results_and_gradients(rnn_ext.compile(model, backend="aot_eager"), tokens(5, 3))
    torch.testing.assert_close(found, expected)


@each_cell
def test_compiled_autograd_of_an_eager_forward(name: str) -> None:
    cls, options = CELLS[name]
    fused = rnn_ext.convert(Tagger(cls, **options).double())
    expected = results_and_gradients(fused, tokens(5, 3))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        torch.testing.assert_close(results_and_gradients(fused, tokens(5, 3)), expected)


@each_cell
def test_second_derivatives_under_compiled_autograd(name: str) -> None:
    cls, options = CELLS[name]
    module = rnn_ext.convert(cls(4, 6, **options).double())
    input = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    input.requires_grad_()

    def penalty() -> Tensor:
        loss = module(input)[0].square().sum()
        return torch.autograd.grad(loss, input, create_graph=True)[0].square().sum()

    (expected,) = torch.autograd.grad(penalty(), input)
    compiled = torch.compile(backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiled):  # as a whole
        penalty().backward()
    torch.testing.assert_close(input.grad, expected)
    of_eager = penalty()
    with (
        torch._dynamo.compiled_autograd._enable(compiled),
        pytest.raises(NotImplementedError, match="leave it before the backward pass"),
    ):
        of_eager.backward()


def test_weights_are_trained_through_the_compiled_model() -> None:
    model = Tagger(nn.LSTM)
    compiled = rnn_ext.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = sum(r.square().sum() for r in compiled(tokens(5, 3)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized(parametrization: str) -> None:
    gru = nn.GRU(4, 6).eval()
    getattr(nn.utils.parametrizations, parametrization)(gru, "weight_hh_l0")
    compiled = rnn_ext.compile(gru, backend="aot_eager")
    input = torch.randn(5, 3, 4)
    torch.testing.assert_close(compiled(input), rnn_ext.convert(gru)(input))


def test_autocast() -> None:
    model = rnn_ext.convert(Tagger(nn.LSTM))
    compiled = rnn_ext.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = results_and_gradients(model, tokens(5, 3))
        found = results_and_gradients(compiled, tokens(5, 3))
    assert [r.dtype for r in found] == [r.dtype for r in expected]
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_the_flag_of_torch_is_as_it_was() -> None:
    before = torch._dynamo.config.allow_rnn
    compiled = rnn_ext.compile(nn.Sequential(nn.LSTM(4, 6)), fullgraph=True, backend="eager")
    compiled(torch.ones(5, 3, 4))
    assert torch._dynamo.config.allow_rnn is before is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(rnn_ext.LSTM(4, 6), fullgraph=True, backend="eager")(torch.ones(5, 3, 4))


def test_torch_compile_alone_leaves_the_model_out_and_is_right() -> None:
    model = rnn_ext.convert(Tagger(nn.GRU))
    compiled = torch.compile(model, backend="aot_eager")
    expected = results_and_gradients(model, tokens(5, 3))
    torch.testing.assert_close(results_and_gradients(compiled, tokens(5, 3)), expected)


def test_a_model_that_is_compiled_already() -> None:
    with pytest.raises(ValueError, match="is compiled"):
        rnn_ext.compile(torch.compile(nn.GRU(4, 6), backend="eager"))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        rnn_ext.compile(lambda x: x)


def test_importing_the_package_does_not_load_the_compiler() -> None:
    code = "import sys, rnn_ext; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
