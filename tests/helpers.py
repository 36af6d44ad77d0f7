"""How this test-suite makes a module, calls it, and decides whether its results are right.

Every result is compared with torch.nn through `assert_matches_torch`; nothing else in the tests of
the modules holds a tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

import rnn_ext
from devices import chosen, to_device

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
CLASS_NAMES = ("RNN", "LSTM", "GRU")
CELL_CLASS_NAMES = ("RNNCell", "LSTMCell", "GRUCell")
ALL_CLASS_NAMES = CLASS_NAMES + CELL_CLASS_NAMES

# --------------------------------------------------------------------------------- error policy
# An implementation in a given dtype is judged by its distance from the exact result, which is
# torch.nn run in float64 on the same numbers (those of the dtype, so converting them is exact).
# The largest error in a result may be at most
#
#     TORCH_ERRORS x (largest error of torch.nn in the same dtype)  +  ROUNDINGS x (sensitivity)
#
# with both quantities measured at the data and at NEIGHBORS points nearby, where every number is
# itself or one of the two next to it in its dtype:
# - torch's error is its largest at these points, each compared with the exact result there. At a
#   single point torch may be luckily exact, above all in a result of one or two numbers.
# - The sensitivity is the largest change of the exact result from the data to a point nearby, and
#   never less than half an ulp of the result's magnitude. It is the floor for when torch is lucky
#   everywhere: a change of the last bits of the data can be told from no rounding error at all.
#
# The factor of the floor comes from 100,000 results of small random shapes (f32, three instruction
# sets, and torch operators step by step with reversed sums): one in 1,500 needed more than 1, none
# with two or more hidden units needed 4. A floor that lets through no unlucky result lets through
# an implementation that is a little worse everywhere; that is what `error_ratios` is for.
TORCH_ERRORS = 2
ROUNDINGS = 6
NEIGHBORS = 3
# In float64 there is nothing more exact to compare with: both are some roundings (2e-16 each) away
# from the truth, amplified by cancellation and by the length of the sequence.
FLOAT64_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Call:
    """One call of a module: the tensors it starts from, and how they become its arguments.

    Gradients are taken with respect to the leaves, so an argument may be any view of a leaf.
    """

    leaves: dict[str, Tensor]
    arrange: Callable[[dict[str, Tensor]], tuple] = lambda leaves: tuple(leaves.values())
    backward: bool = True
    seed: int = 0  # of the cotangents

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    def leaves_for(self, module: nn.Module) -> dict[str, Tensor]:
        """Fresh copies of the leaves, on the module's device."""
        place = next(module.parameters()).device
        return {name: leaf.detach().clone().to(place) for name, leaf in self.leaves.items()}


def normal(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Random float64, the same for every device: on the CPU."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def flatten(results: object) -> list[Tensor]:
    """The tensors in what a module returned, in order."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    assert isinstance(results, tuple), type(results)
    return [tensor for part in results for tensor in flatten(part)]


def evaluate(
    module: nn.Module, call: Call, *, exactly: bool = False, neighbor: int | None = None
) -> dict[str, Tensor]:
    """Call the module, go backward if the call says so; return results and gradients by name.

    The call's data goes to the module's device, what is returned comes to the CPU.

    Args:
        exactly: evaluate in float64.
        neighbor: number of a point near the call's data to use instead (see the error policy).
    """
    place = next(module.parameters()).device
    moves = None if neighbor is None else torch.Generator().manual_seed(neighbor)

    def prepare(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(place)
        if moves is not None:
            steps = torch.randint(
                -1, 2, tensor.shape, generator=moves, dtype=torch.float64, device="cpu"
            )
            moved = tensor.double() * (1 + torch.finfo(call.dtype).eps * steps.to(place))
            tensor = moved.to(call.dtype)
        return tensor.double() if exactly else tensor

    if exactly or moves is not None:
        original, module = module, copy.deepcopy(module)
        module.to(torch.float64 if exactly else call.dtype)
        with torch.no_grad():
            for parameter, source in zip(module.parameters(), original.parameters(), strict=True):
                parameter.copy_(prepare(source))
    leaves = {
        name: prepare(leaf).clone().requires_grad_(call.backward)
        for name, leaf in call.leaves.items()
    }
    results = flatten(module(*call.arrange(leaves)))
    names = ("output", "h_n", "c_n") if isinstance(module, nn.RNNBase) else ("h_n", "c_n")
    named = {name: result.detach() for name, result in zip(names, results, strict=False)}
    if call.backward:
        generator = torch.Generator().manual_seed(call.seed)
        cotangents = [prepare(normal(generator, r.shape).to(call.dtype)) for r in results]
        wanted = leaves | dict(module.named_parameters())
        gradients = torch.autograd.grad(
            results, list(wanted.values()), cotangents, allow_unused=True, materialize_grads=True
        )
        named |= {f"d_{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {name: value.cpu() for name, value in named.items()}


def assert_matches_torch(ours: nn.Module, call: Call, theirs: nn.Module | None = None) -> None:
    """Assert that a module of rnn_ext gives what torch.nn gives, by the error policy above.

    Args:
        theirs: the module of torch.nn with the same weights; made from `ours` if not given.
    """
    theirs = torch_twin(ours) if theirs is None else theirs
    assert_results_match(evaluate(ours, call), theirs, call)


def assert_results_match(ours: dict[str, Tensor], theirs: nn.Module, call: Call) -> None:
    """Assert that results equal those that a module of torch.nn gives, by the error policy."""
    expected = evaluate(theirs, call)
    assert list(ours) == list(expected)
    for name, result in ours.items():
        assert result.shape == expected[name].shape, f"shape of {name}"
        assert result.dtype == expected[name].dtype, f"dtype of {name}"
    if call.dtype == torch.float64:
        for name, truth in expected.items():
            bound = FLOAT64_TOLERANCE * magnitude(truth)
            assert_within(ours[name], truth, bound, f"{name} ({bound:.1e} allowed)")
        return
    exact = evaluate(theirs, call, exactly=True)
    torch_error = max_errors(expected, exact)
    sensitivity = {n: torch.finfo(call.dtype).eps / 2 * magnitude(t) for n, t in exact.items()}
    for neighbor in range(NEIGHBORS):
        there = evaluate(theirs, call, exactly=True, neighbor=neighbor)
        for name, error in max_errors(evaluate(theirs, call, neighbor=neighbor), there).items():
            torch_error[name] = max(torch_error[name], error)
        for name, change in max_errors(there, exact).items():
            sensitivity[name] = max(sensitivity[name], change)
    for name, truth in exact.items():
        bound = TORCH_ERRORS * torch_error[name] + ROUNDINGS * sensitivity[name]
        assert_within(
            ours[name].double(),
            truth,
            bound,
            f"{name} ({bound:.1e} allowed: torch's error is {torch_error[name]:.1e}, "
            f"rounding the data changes it by {sensitivity[name]:.1e})",
        )


def error_ratios(ours: nn.Module, theirs: nn.Module, call: Call) -> dict[str, float]:
    """For each result the largest error of our module over that of torch's, without any floor.

    A single ratio says little, the mean of many says whether our errors are systematically larger.
    Results without an error in either are left out.
    """
    exact = evaluate(theirs, call, exactly=True)
    mine = max_errors(evaluate(ours, call), exact)
    others = max_errors(evaluate(theirs, call), exact)
    return {name: mine[name] / others[name] for name in exact if mine[name] and others[name]}


def max_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: magnitude(results[name].double() - t) for name, t in truth.items()}


def magnitude(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_within(actual: Tensor, truth: Tensor, bound: float, what: str) -> None:
    error = magnitude(actual - truth)
    assert error <= bound, f"error {error:.1e} in {what}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads; the suite runs with one otherwise (see conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------ making modules


@dataclass(frozen=True)
class Config:
    """Everything that decides one drawn call, small enough to be printed when it fails."""

    cell: str = "lstm"
    input_size: int = 5
    hidden_size: int = 7
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    steps: int = 6
    batch: int | None = 4  # None: unbatched
    lengths: tuple[int, ...] | None = None  # of a packed sequence; steps and batch follow from it
    given_state: bool = True
    layout: str = "contiguous"  # of the input and of the states; see LAYOUTS
    dtype: torch.dtype = torch.float32
    training: bool = True
    seed: int = 0

    @property
    def class_name(self) -> str:
        return {"lstm": "LSTM", "gru": "GRU"}.get(self.cell, "RNN")

    def options(self) -> dict[str, object]:
        """The keyword arguments of the module's constructor."""
        options: dict[str, object] = {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "dtype": self.dtype,
        }
        if self.cell == "lstm":
            options["proj_size"] = self.proj_size
        if self.class_name == "RNN":
            options["nonlinearity"] = self.cell.removeprefix("rnn_")
        return options


def make_module(config: Config, library: ModuleType = rnn_ext) -> nn.RNNBase:
    """The module of a configuration, with the same weights in both libraries.

    That of torch.nn, the reference, is on the CPU.
    """
    torch.manual_seed(config.seed)
    module = getattr(library, config.class_name)(**config.options(), device="cpu")
    module.train(config.training)
    return module if library is nn else module.to(chosen())


def torch_twin(module: nn.Module) -> nn.Module:
    """A plain torch.nn module with the weights that `module` would use if it were called now, on
    the CPU (see devices.py)."""
    kind = next(c for c in type(module).__mro__ if c.__module__ == nn.LSTM.__module__)
    accepted = {
        nn.RNN: ("num_layers", "batch_first", "bidirectional", "dropout", "nonlinearity"),
        nn.LSTM: ("num_layers", "batch_first", "bidirectional", "dropout", "proj_size"),
        nn.GRU: ("num_layers", "batch_first", "bidirectional", "dropout"),
        nn.RNNCell: ("nonlinearity",),
    }
    options = {name: getattr(module, name) for name in accepted.get(kind, ())}
    twin = kind(module.input_size, module.hidden_size, bias=module.bias, device="cpu", **options)
    weights = {name: getattr(module, name).detach().cpu() for name in twin.state_dict()}
    twin.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return twin.train(module.training)


# ------------------------------------------------------------------------------- making calls

# How a tensor of a wanted shape is obtained from a leaf: (shape of the leaf, the view of it). The
# first dimension is time (or layer), the last one features.
LAYOUTS: dict[str, tuple[Callable[[torch.Size], Sequence[int]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda s: s, lambda leaf: leaf),
    "every_second": (lambda s: (*s[:-1], 2 * s[-1]), lambda leaf: leaf[..., ::2]),
    "transposed": (lambda s: s[::-1], lambda leaf: leaf.permute(*range(leaf.dim())[::-1])),
    "slice": (lambda s: (s[0] + 2, *s[1:-1], s[-1] + 3), lambda leaf: leaf[1:-1, ..., 2:-1]),
    "expanded": (lambda s: (1, *s[1:]), lambda leaf: leaf),  # make_call expands what is left
}


def pack(sequences: Sequence[Tensor], *, enforce_sorted: bool = True) -> PackedSequence:
    """torch's pack_sequence, which wants the CPU to be the default device: for its lengths."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device="cpu")
    return pack_padded_sequence(pad_sequence(sequences), lengths, enforce_sorted=enforce_sorted)


def make_call(config: Config) -> Call:
    """Random data for a configuration; every number is one of the configuration's dtype."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    lengths = config.lengths
    batch = config.batch if lengths is None else len(lengths)
    steps = config.steps if lengths is None else max(lengths)
    rows = config.num_layers * (2 if config.bidirectional else 1)
    sizes = {"input": config.input_size}
    if config.given_state:
        sizes["h_0"] = config.proj_size or config.hidden_size
        if config.cell == "lstm":
            sizes["c_0"] = config.hidden_size
    leaf_shape, view = LAYOUTS[config.layout]
    shapes = {}
    for name, size in sizes.items():
        leading = [rows if name != "input" else steps] + ([] if batch is None else [batch])
        if name == "input" and config.batch_first and batch is not None:
            leading.reverse()
        shapes[name] = torch.Size([*leading, size])
    leaves = {
        name: to_device(normal(generator, leaf_shape(s)).to(config.dtype))
        for name, s in shapes.items()
    }

    def arrange(leaves: dict[str, Tensor]) -> tuple:
        views = {name: view(leaf).expand(shapes[name]) for name, leaf in leaves.items()}
        arguments: list[object] = [views.pop("input")]
        if lengths is not None:
            arguments[0] = pack_padded_sequence(
                arguments[0],
                torch.tensor(lengths, device="cpu"),
                batch_first=config.batch_first,
                enforce_sorted=list(lengths) == sorted(lengths, reverse=True),
            )
        if views:
            arguments.append(tuple(views.values()) if config.cell == "lstm" else views["h_0"])
        return tuple(arguments)

    return Call(leaves, arrange, seed=config.seed + 2)


def make_cell_call(
    class_name: str,
    input_size: int,
    hidden_size: int,
    *,
    batch: int | None = 3,
    given_state: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Call:
    """Random data for RNNCell, LSTMCell or GRUCell; no batch means a single example."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"input": input_size}
    if given_state:
        sizes["h_0"] = hidden_size
        if class_name == "LSTMCell":
            sizes["c_0"] = hidden_size
    leading = () if batch is None else (batch,)
    leaves = {
        name: to_device(normal(generator, (*leading, size)).to(dtype))
        for name, size in sizes.items()
    }

    def arrange(leaves: dict[str, Tensor]) -> tuple:
        input, *state = leaves.values()
        if not state:
            return (input,)
        return (input, tuple(state) if class_name == "LSTMCell" else state[0])

    return Call(leaves, arrange, seed=seed + 1)


def check(config: Config) -> None:
    """Assert that the module of rnn_ext equals the one of torch.nn for this configuration."""
    assert_matches_torch(
        make_module(config), make_call(config), theirs=make_module(config, library=nn)
    )


@st.composite
def configs(
    draw: st.DrawFn, dtype: torch.dtype = torch.float32, packed: bool | None = None
) -> Config:
    """Any configuration, most of them small; sizes are around the widths of vectors and tiles.

    One hidden unit is drawn in float64 only: there a whole gradient can be one number that hangs on
    the last bit of one saturated tanh, 1 - tanh^2, and says nothing about an implementation.
    """
    sizes = st.sampled_from((1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 33, 64, 67))
    hidden_sizes = sizes if dtype == torch.float64 else sizes.filter(lambda size: size > 1)
    batches = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 16, 19))
    steps = st.sampled_from((1, 1, 2, 3, 5, 8, 13))
    cell = draw(st.sampled_from(CELLS))
    hidden_size = draw(hidden_sizes)
    proj_size = 0
    if cell == "lstm" and hidden_size > 1:
        proj_size = draw(st.just(0) | st.integers(1, hidden_size - 1))
    lengths = None
    if draw(st.booleans()) if packed is None else packed:
        lengths = tuple(draw(st.lists(steps, min_size=1, max_size=8)))
        if draw(st.booleans()):
            lengths = tuple(sorted(lengths, reverse=True))
    return Config(
        cell=cell,
        input_size=draw(sizes),
        hidden_size=hidden_size,
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=proj_size,
        steps=draw(steps),
        batch=draw(batches | st.none()) if lengths is None else None,
        lengths=lengths,
        given_state=draw(st.booleans()),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        dtype=dtype,
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
