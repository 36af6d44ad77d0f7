"""Bad input: the same type of exception as torch.nn, and a message that helps.

Each case is run on both libraries. Where torch has words for the mistake we use the same; where it
fails deep inside (sizes of a matrix product, a primitive that could not be made) ours name the
argument and what was expected of it. oneDNN is off for the reference: through it nn.LSTM takes
weights of the wrong shape and reads foreign memory; without it, it fails as RNN and GRU do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_ext
from helpers import ALL_CLASS_NAMES, CELL_CLASS_NAMES, CLASS_NAMES, flatten

INPUT, HIDDEN = 4, 6
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class Mistake:
    """A call that must fail: `make` gets the library and the name of the class."""

    what: str
    make: Callable[[ModuleType, str], object]
    says: tuple[str, ...]  # regular expressions, each to be found in our message
    on: tuple[str, ...] = ()  # names of classes; empty: every class of the table's kind
    cpu_only: str = ""  # why, if so


def x(*shape: int, **options: object) -> Tensor:
    return torch.zeros(shape or (3, 2, INPUT), **options)


def state(name: str, *shape: int, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    """Zeros in the form in which the class takes its state."""
    h = torch.zeros(shape, **options)
    return (h, h.clone()) if name.startswith("LSTM") else h


def construct(*args: object, **options: object) -> Callable[[ModuleType, str], object]:
    return lambda library, name: getattr(library, name)(*args, **options)


def call(
    make_args: Callable[[str], tuple], **options: object
) -> Callable[[ModuleType, str], object]:
    """Build the module, then call it with what `make_args` gives for the name of the class."""
    return lambda library, name: getattr(library, name)(INPUT, HIDDEN, **options)(*make_args(name))


def packed(data: object, batch_sizes: object, *indices: object) -> PackedSequence:
    return PackedSequence(data, batch_sizes, *indices)


def with_weight(attribute: str, change: Callable[[Tensor], Tensor]) -> Callable:
    """A call of a module one of whose weights was replaced."""

    def make(library: ModuleType, name: str) -> object:
        module = getattr(library, name)(INPUT, HIDDEN)
        setattr(module, attribute, nn.Parameter(change(getattr(module, attribute).detach())))
        return module(x(2, INPUT) if name in CELL_CLASS_NAMES else x())

    return make


ASSERTED_ON_A_GPU = "an index out of range ends a process that uses a GPU"
FLOAT64 = r"float64|Double"
FLOAT32 = r"float32|\bFloat\b"
STATE = r"hx|h_0|hidden"

CONSTRUCTORS = [
    Mistake("zero input_size", construct(0, 6), ("input_size must be greater than zero",)),
    Mistake("negative input_size", construct(-1, 6), ("input_size must be greater than zero",)),
    Mistake("zero hidden_size", construct(4, 0), ("hidden_size must be greater than zero",)),
    Mistake("negative hidden_size", construct(4, -2), ("hidden_size must be greater than zero",)),
    Mistake("float input_size", construct(4.0, 6), ("input_size should be of type int.*float",)),
    Mistake("str input_size", construct("4", 6), ("input_size should be of type int.*str",)),
    Mistake("float hidden_size", construct(4, 6.0), ("hidden_size should be of type int.*float",)),
    Mistake("no layers", construct(4, 6, num_layers=0), ("num_layers must be greater than zero",)),
    Mistake("-1 layers", construct(4, 6, num_layers=-1), ("num_layers must be greater than zero",)),
    Mistake("1.5 layers", construct(4, 6, num_layers=1.5), ("float.*integer",)),
    Mistake("int bias", construct(4, 6, bias=1), ("bias should be of type bool.*int",)),
    Mistake("int batch_first", construct(4, 6, batch_first=1), ("batch_first should be.* bool",)),
    Mistake("dropout 1.5", construct(4, 6, dropout=1.5), (r"dropout should be.*\[0, 1\]",)),
    Mistake("dropout -0.1", construct(4, 6, dropout=-0.1), (r"dropout should be.*\[0, 1\]",)),
    Mistake("dropout True", construct(4, 6, dropout=True), (r"dropout should be.*\[0, 1\]",)),
    Mistake("dropout nan", construct(4, 6, dropout=np.nan), (r"dropout should be.*\[0, 1\]",)),
    Mistake("str dropout", construct(4, 6, dropout="a"), ("could not convert.*float.*'a'",)),
    Mistake("int dtype", construct(4, 6, dtype=torch.int64), ("floating point.*gradients",)),
    Mistake("str dtype", construct(4, 6, dtype="float"), ("torch.dtype, not str|dtype=str",)),
    Mistake("unknown option", construct(4, 6, cells=3), ("unexpected keyword argument 'cells'",)),
    Mistake("no sizes", construct(), ("missing.*'input_size' and 'hidden_size'",)),
    Mistake("no hidden_size", construct(4), ("missing.*'hidden_size'",)),
    Mistake(
        "proj_size equal to hidden_size",
        construct(4, 6, proj_size=6),
        ("proj_size has to be smaller than hidden_size",),
        on=("LSTM",),
    ),
    Mistake(
        "proj_size above hidden_size",
        construct(4, 6, proj_size=7),
        ("proj_size has to be smaller than hidden_size",),
        on=("LSTM",),
    ),
    Mistake(
        "negative proj_size",
        construct(4, 6, proj_size=-1),
        ("proj_size should be a positive integer or zero",),
        on=("LSTM",),
    ),
    Mistake(
        "proj_size without LSTM",
        construct(4, 6, proj_size=3),
        ("proj_size argument is only supported for LSTM",),
        on=("RNN", "GRU"),
    ),
    Mistake(
        "unknown nonlinearity",
        construct(4, 6, nonlinearity="gelu"),
        ("Unknown nonlinearity 'gelu'", "'tanh' or 'relu'"),
        on=("RNN",),
    ),
    Mistake(
        "nonlinearity without RNN",
        construct(4, 6, nonlinearity="relu"),
        ("unexpected keyword argument 'nonlinearity'",),
        on=("LSTM", "GRU", "LSTMCell", "GRUCell"),
    ),
    Mistake(
        "negative sizes of a cell",
        construct(4, -1),
        ("negative dimension",),
        on=CELL_CLASS_NAMES,
    ),
    Mistake(
        "float size of a cell",
        construct(4, 6.0),
        ("ints.*float|tuple of ints",),
        on=CELL_CLASS_NAMES,
    ),
    Mistake(
        "int dtype of a cell",
        construct(4, 6, dtype=torch.int64),
        ("floating point.*gradients",),
        on=CELL_CLASS_NAMES,
    ),
]

INPUTS = [
    Mistake(
        "0-D input", call(lambda name: (torch.tensor(1.0),)), ("input to be 2D or 3D, got 0D",)
    ),
    Mistake("1-D input", call(lambda name: (x(4),)), ("input to be 2D or 3D, got 1D",)),
    Mistake("4-D input", call(lambda name: (x(2, 2, 2, 4),)), ("input to be 2D or 3D, got 4D",)),
    Mistake("features", call(lambda name: (x(3, 2, 5),)), ("input_size. Expected 4, got 5",)),
    Mistake("features, unbatched", call(lambda name: (x(3, 5),)), ("Expected 4, got 5",)),
    Mistake(
        "features, batch_first",
        call(lambda name: (x(2, 4, 3),), batch_first=True),
        ("input_size. Expected 4, got 3",),
    ),
    Mistake("no steps", call(lambda name: (x(0, 2, 4),)), ("sequence length to be larger than 0",)),
    Mistake("no steps, unbatched", call(lambda name: (x(0, 4),)), ("length to be larger than 0",)),
    Mistake("nothing at all", call(lambda name: (x(0, 0, 4),)), ("length to be larger than 0",)),
    *(
        Mistake(
            f"{dtype} input",
            call(lambda name, dtype=dtype: (x(dtype=dtype),)),
            (f"{dtype}.*does not match weight dtype.*float32", "Convert input"),
        )
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    ),
    Mistake(
        "meta input",
        call(lambda name: (x(device="meta"),)),
        ("not at the same device.*input tensor at meta and parameter tensor at (cpu|cuda)",),
    ),
    Mistake(
        "meta module",
        call(lambda name: (x(),), device="meta"),
        ("not at the same device.*input tensor at (cpu|cuda\\S*) and parameter tensor at meta",),
    ),
    Mistake(
        "int bidirectional",
        call(lambda name: (x(),), bidirectional=1),
        ("bool",),
        cpu_only="under torch.device(...) operators called from Python take an int for a bool",
    ),
    Mistake("NumPy input", call(lambda name: (x(device="cpu").numpy(),)), ("ndarray",)),
    Mistake("list input", call(lambda name: ([[1.0, 2.0]],)), ("list",)),
    Mistake("None input", call(lambda name: (None,)), ("NoneType",)),
    Mistake("no input", call(lambda name: ()), ("missing.*'input'",)),
    Mistake(
        "unknown argument",
        lambda library, name: getattr(library, name)(4, 6)(x(), h0=None),
        ("unexpected keyword argument 'h0'",),
    ),
    Mistake(
        "sparse input",
        call(lambda name: (x().to_sparse(),)),
        ("sparse",),
        cpu_only="it goes to torch.nn, whose error is cuDNN's there",
    ),
    Mistake(
        "gradient for integers",
        call(lambda name: (x(dtype=torch.int64).requires_grad_(),)),
        ("floating point.*gradients",),
    ),
]

STATES = [
    Mistake(
        "layers", call(lambda name: (x(), state(name, 2, 2, 6))), (r"\(1, 2, 6\), got \[2, 2, 6\]",)
    ),
    Mistake(
        "batch", call(lambda name: (x(), state(name, 1, 3, 6))), (r"\(1, 2, 6\), got \[1, 3, 6\]",)
    ),
    Mistake(
        "hidden", call(lambda name: (x(), state(name, 1, 2, 5))), (r"\(1, 2, 6\), got \[1, 2, 5\]",)
    ),
    Mistake(
        "two directions",
        call(lambda name: (x(), state(name, 1, 2, 6)), bidirectional=True),
        (r"\(2, 2, 6\), got \[1, 2, 6\]",),
    ),
    Mistake(
        "batch_first concerns only the input",
        call(lambda name: (x(2, 3, 4), state(name, 2, 1, 6)), batch_first=True),
        (r"\(1, 2, 6\), got \[2, 1, 6\]",),
    ),
    Mistake(
        "2-D for a batch",
        call(lambda name: (x(), state(name, 2, 6))),
        ("batched 3-D input", "also be 3-D but got"),
    ),
    Mistake(
        "4-D",
        call(lambda name: (x(), state(name, 1, 1, 2, 6))),
        ("batched 3-D input", "also be 3-D but got"),
    ),
    Mistake(
        "3-D unbatched",
        call(lambda name: (x(3, 4), state(name, 1, 1, 6))),
        ("unbatched 2-D input", "also be 2-D but got"),
    ),
    Mistake(
        "float64",
        call(lambda name: (x(), state(name, 1, 2, 6, dtype=torch.float64))),
        (STATE, FLOAT64, FLOAT32),
    ),
    Mistake(
        "bfloat16",
        call(lambda name: (x(), state(name, 1, 2, 6, dtype=torch.bfloat16))),
        (STATE, "bfloat16", FLOAT32),
    ),
    Mistake(
        "int64",
        call(lambda name: (x(), state(name, 1, 2, 6, dtype=torch.int64))),
        (STATE, "int64|Long", FLOAT32),
    ),
    Mistake(
        "meta",
        call(lambda name: (x(), state(name, 1, 2, 6, device="meta"))),
        ("not at the same device.*input tensor at (cpu|cuda\\S*) and hidden tensor at meta",),
    ),
    Mistake(
        "NumPy",
        call(lambda name: (x(), np.zeros((1, 2, 6), np.float32))),
        ("ndarray",),
        on=("RNN", "GRU"),
    ),
    Mistake("str", call(lambda name: (x(), "zeros")), ("str",)),
    Mistake(
        "tuple without LSTM",
        call(lambda name: (x(), (x(1, 2, 6),) * 2)),
        ("tuple",),
        on=("RNN", "GRU"),
    ),
    Mistake(
        "tensor with LSTM",
        call(lambda name: (x(), x(1, 2, 6))),
        ("index 1|two|tuple",),
        on=("LSTM",),
    ),
    Mistake("1-tuple", call(lambda name: (x(), (x(1, 2, 6),))), ("index|two",), on=("LSTM",)),
    Mistake(
        "3-tuple",
        call(lambda name: (x(), (x(1, 2, 6),) * 3)),
        ("lstm expects two hidden states",),
        on=("LSTM",),
    ),
    Mistake("no c_0", call(lambda name: (x(), (x(1, 2, 6), None))), ("NoneType",), on=("LSTM",)),
    Mistake(
        "c_0 of another batch",
        call(lambda name: (x(), (x(1, 2, 6), x(1, 3, 6)))),
        (r"hidden\[1\] size \(1, 2, 6\), got \[1, 3, 6\]",),
        on=("LSTM",),
    ),
    Mistake(
        "2-D c_0", call(lambda name: (x(), (x(1, 2, 6), x(2, 6)))), (r"\(3-D, 2-D\)",), on=("LSTM",)
    ),
    Mistake(
        "float64 c_0",
        call(lambda name: (x(), (x(1, 2, 6), x(1, 2, 6, dtype=torch.float64)))),
        ("cx|c_0|cell|hidden", FLOAT64, FLOAT32),
        on=("LSTM",),
    ),
    Mistake(
        "h_0 not projected",
        call(lambda name: (x(), (x(1, 2, 6), x(1, 2, 6))), proj_size=3),
        (r"hidden\[0\] size \(1, 2, 3\), got \[1, 2, 6\]",),
        on=("LSTM",),
    ),
    Mistake(
        "c_0 projected",
        call(lambda name: (x(), (x(1, 2, 3), x(1, 2, 3))), proj_size=3),
        (r"hidden\[1\] size \(1, 2, 6\), got \[1, 2, 3\]",),
        on=("LSTM",),
    ),
]

SIZES = torch.tensor([2, 2, 1], device="cpu")
PACKED = [
    Mistake(
        "lengths not sorted",
        call(lambda name: (pack_padded_sequence(x(), torch.tensor([2, 3], device="cpu")),)),
        ("must be sorted in decreasing order", "enforce_sorted=False"),
    ),
    Mistake(
        "length 0",
        call(lambda name: (pack_padded_sequence(x(), torch.tensor([2, 0], device="cpu")),)),
        ("greater than 0",),
    ),
    Mistake("features", call(lambda name: (packed(x(5, 5), SIZES),)), (r"\b5\b", r"\b4\b")),
    Mistake(
        "dtype",
        call(lambda name: (packed(x(5, 4, dtype=torch.float64), SIZES),)),
        (FLOAT64, FLOAT32),
    ),
    Mistake("3-D data", call(lambda name: (packed(x(5, 1, 4), SIZES),)), ("2.*dim|dim.*2|2-D",)),
    Mistake(
        "too little data",
        call(lambda name: (packed(x(5, 4), torch.tensor([3, 3, 1], device="cpu")),)),
        ("batch_sizes", r"\b5\b"),
    ),
    Mistake(
        "batch sizes that grow",
        call(lambda name: (packed(x(5, 4), torch.tensor([2, 3], device="cpu")),)),
        ("batch_sizes", "decreas|increas|sorted|grow"),
    ),
    Mistake(
        "negative batch size",
        call(lambda name: (packed(x(2, 4), torch.tensor([2, 1, -1], device="cpu")),)),
        ("batch_sizes",),
    ),
    Mistake(
        "no batch sizes",
        call(lambda name: (packed(x(0, 4), torch.tensor([], dtype=torch.int64, device="cpu")),)),
        ("index 0 is out of bounds|batch_sizes",),
    ),
    Mistake(
        "int32 batch sizes",
        call(lambda name: (packed(x(5, 4), SIZES.int()),)),
        ("int64|Long", "int32|Int"),
    ),
    Mistake(
        "float batch sizes",
        call(lambda name: (packed(x(5, 4), SIZES.float()),)),
        ("size|batch_sizes",),
    ),
    Mistake(
        "2-D batch sizes",
        call(lambda name: (packed(x(5, 4), SIZES.unsqueeze(0)),)),
        ("size|batch_sizes",),
    ),
    Mistake("list of batch sizes", call(lambda name: (packed(x(5, 4), [2, 2, 1]),)), ("list",)),
    Mistake(
        "state of another batch",
        call(lambda name: (packed(x(5, 4), SIZES), state(name, 1, 3, 6))),
        (r"\b2\b", r"\b3\b"),
    ),
    Mistake(
        "2-D state",
        call(lambda name: (packed(x(5, 4), SIZES), state(name, 2, 6))),
        (r"hidden size \(1, 2, 6\), got \[2, 6\]|Dimension out of range|dimensions",),
    ),
    Mistake(
        "state too small to be sorted",
        call(
            lambda name: (
                packed(x(5, 4), SIZES, torch.tensor([1, 0]), torch.tensor([1, 0])),
                state(name, 1, 1, 6),
            )
        ),
        ("out of (DATA )?bounds|index out of range",),
        cpu_only=ASSERTED_ON_A_GPU,
    ),
    Mistake(
        "sorted_indices out of range",
        call(
            lambda name: (
                packed(x(5, 4), SIZES, torch.tensor([0, 9]), torch.tensor([0, 9])),
                state(name, 1, 2, 6),
            )
        ),
        ("out of (DATA )?bounds|index out of range",),
        cpu_only=ASSERTED_ON_A_GPU,
    ),
]

WEIGHTS = [
    Mistake(
        "columns of weight_ih",
        with_weight("weight_ih_l0", lambda w: torch.cat([w, w[:, :1]], 1)),
        ("weight_ih|input_size", r"\b5\b", r"\b4\b"),
    ),
    Mistake(
        "columns of weight_hh",
        with_weight("weight_hh_l0", lambda w: w[:, :5]),
        ("weight_hh", r"\b5\b", r"\b6\b"),
    ),
    Mistake(
        "rows of weight_hh",
        with_weight("weight_hh_l0", lambda w: torch.cat([w, w[:1]])),
        ("weight_hh",),
    ),
    Mistake(
        "length of bias_ih",
        with_weight("bias_ih_l0", lambda b: torch.cat([b, b[:1]])),
        ("bias_ih",),
    ),
    Mistake(
        "float64 weight_hh",
        with_weight("weight_hh_l0", Tensor.double),
        ("weight_hh", FLOAT64, FLOAT32),
    ),
    Mistake(
        "float64 bias_hh", with_weight("bias_hh_l0", Tensor.double), ("bias_hh", FLOAT64, FLOAT32)
    ),
]

CELLS = [
    Mistake(
        "0-D input", call(lambda name: (torch.tensor(1.0),)), ("input to be 1D or 2D, got 0D",)
    ),
    Mistake("3-D input", call(lambda name: (x(),)), ("input to be 1D or 2D, got 3D",)),
    Mistake("features", call(lambda name: (x(2, 5),)), ("input_size", r"\b5\b", r"\b4\b")),
    Mistake(
        "features of one example", call(lambda name: (x(5),)), ("input_size", r"\b5\b", r"\b4\b")
    ),
    Mistake(
        "float64 input", call(lambda name: (x(2, 4, dtype=torch.float64),)), (FLOAT64, FLOAT32)
    ),
    Mistake(
        "int64 input", call(lambda name: (x(2, 4, dtype=torch.int64),)), ("int64|Long", FLOAT32)
    ),
    Mistake("meta input", call(lambda name: (x(2, 4, device="meta"),)), ("meta", "cpu|cuda")),
    Mistake("None input", call(lambda name: (None,)), ("NoneType",)),
    Mistake("packed input", call(lambda name: (packed(x(5, 4), SIZES),)), ("PackedSequence",)),
    Mistake(
        "3-D state", call(lambda name: (x(2, 4), state(name, 1, 2, 6))), ("to be 1D or 2D, got 3D",)
    ),
    Mistake(
        "batch of the state",
        call(lambda name: (x(2, 4), state(name, 3, 6))),
        ("hidden", r"\b2\b", r"\b3\b"),
    ),
    Mistake(
        "state is not broadcast",
        call(lambda name: (x(2, 4), state(name, 1, 6))),
        ("hidden", r"\b2\b", r"\b1\b"),
    ),
    Mistake(
        "hidden",
        call(lambda name: (x(2, 4), state(name, 2, 5))),
        ("hidden", r"\b5\b", r"\b6\b"),
    ),
    Mistake(
        "1-D state for a batch",
        call(lambda name: (x(2, 4), state(name, 6))),
        ("hidden", r"\b2\b"),
    ),
    Mistake(
        "float64 state",
        call(lambda name: (x(2, 4), state(name, 2, 6, dtype=torch.float64))),
        (FLOAT64, FLOAT32),
    ),
    Mistake(
        "tuple without LSTM",
        call(lambda name: (x(2, 4), (x(2, 6),) * 2)),
        ("tuple",),
        on=("RNNCell", "GRUCell"),
    ),
    Mistake(
        "tensor with LSTM",
        call(lambda name: (x(2, 4), x(2, 6))),
        ("tuple of Tensors, not Tensor|two|tuple",),
        on=("LSTMCell",),
    ),
    Mistake(
        "1-tuple",
        call(lambda name: (x(2, 4), (x(2, 6),))),
        ("two hidden states",),
        on=("LSTMCell",),
    ),
    Mistake(
        "3-tuple",
        call(lambda name: (x(2, 4), (x(2, 6),) * 3)),
        ("two hidden states",),
        on=("LSTMCell",),
    ),
    Mistake(
        "columns of weight_ih",
        with_weight("weight_ih", lambda w: torch.cat([w, w[:, :1]], 1)),
        ("input_size", r"\b5\b", r"\b4\b"),
    ),
    Mistake(
        "rows of weight_hh",
        with_weight("weight_hh", lambda w: torch.cat([w, w[:1]])),
        ("weight_hh", r"\b(7|19|25)\b"),
    ),
    Mistake(
        "length of bias_ih",
        with_weight("bias_ih", lambda b: torch.cat([b, b[:1]])),
        ("bias_ih|expanded size",),
    ),
    Mistake(
        "nonlinearity",
        call(lambda name: (x(2, 4),), nonlinearity="gelu"),
        ("Unknown nonlinearity: gelu",),
        on=("RNNCell",),
    ),
]


def parameters(mistakes: list[Mistake], default: tuple[str, ...] = CLASS_NAMES) -> Callable:
    """Parametrize a test over the mistakes and the classes each concerns."""
    cases = [
        pytest.param(
            name,
            mistake,
            id=f"{name}-{mistake.what}".replace(" ", "_"),
            marks=[pytest.mark.cpu_only(mistake.cpu_only)] if mistake.cpu_only else [],
        )
        for mistake in mistakes
        for name in mistake.on or default
    ]
    return pytest.mark.parametrize(("name", "mistake"), cases)


@contextmanager
def without_onednn() -> Iterator[None]:
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def assert_same_exception(name: str, mistake: Mistake) -> None:
    with torch.device("cpu"), without_onednn(), pytest.raises(Exception) as theirs:  # noqa: PT011
        mistake.make(nn, name)
    with pytest.raises(theirs.type) as ours:
        mistake.make(rnn_ext, name)
    assert ours.type is theirs.type
    message = str(ours.value)
    for expected in mistake.says:
        assert re.search(expected, message, re.DOTALL), f"{expected!r} is not in {message!r}"


@parameters(CONSTRUCTORS)
def test_constructor(name: str, mistake: Mistake) -> None:
    assert_same_exception(name, mistake)


@parameters(INPUTS)
def test_input(name: str, mistake: Mistake) -> None:
    assert_same_exception(name, mistake)


@parameters(STATES)
def test_state(name: str, mistake: Mistake) -> None:
    assert_same_exception(name, mistake)


@parameters(PACKED)
def test_packed(name: str, mistake: Mistake) -> None:
    assert_same_exception(name, mistake)


@parameters(WEIGHTS)
def test_weights(name: str, mistake: Mistake) -> None:
    assert_same_exception(name, mistake)


@parameters(CELLS, default=CELL_CLASS_NAMES)
def test_cells(name: str, mistake: Mistake) -> None:
    assert_same_exception(name, mistake)


def test_a_failed_call_leaves_the_module_usable() -> None:
    module = rnn_ext.LSTM(INPUT, HIDDEN)
    input = torch.randn(3, 2, INPUT)
    expected = module(input)[0]
    for wrong in (x(3, 2, 5), x(0, 2, 4), x(dtype=torch.float64), packed(x(5, 5), SIZES)):
        with pytest.raises((ValueError, RuntimeError)):
            module(wrong)
    assert torch.equal(module(input)[0], expected)


# ------------------------------------------------------------------- what torch.nn lets through


def same_numbers(actual: object, expected: object) -> None:
    for ours, theirs in zip(flatten(actual), flatten(expected), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", ALL_CLASS_NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["input", "state", "weight_hh"])
def test_non_finite_numbers_propagate(name: str, value: float, where: str) -> None:
    """Only what depends on the number turns non-finite: its row of the batch, from its step on."""
    torch.manual_seed(1)
    theirs = getattr(nn, name)(INPUT, HIDDEN)
    ours = getattr(rnn_ext, name)(INPUT, HIDDEN)
    is_cell = name in CELL_CLASS_NAMES
    input = torch.randn((3, INPUT) if is_cell else (5, 3, INPUT))
    h_0 = torch.randn((3, HIDDEN) if is_cell else (1, 3, HIDDEN))
    if where == "input":
        input[(1, 2) if is_cell else (2, 1, 2)] = value
    elif where == "state":
        h_0[..., 1, 2] = value
    else:
        with torch.no_grad():
            getattr(theirs, "weight_hh" if is_cell else "weight_hh_l0")[3, 2] = value
    ours.load_state_dict(theirs.state_dict())
    hx = (h_0, h_0.clone()) if name.startswith("LSTM") else h_0
    same_numbers(ours(input, hx), theirs(input, hx))


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_nan_in_backward(name: str) -> None:
    module, input = getattr(rnn_ext, name)(INPUT, HIDDEN), torch.randn(5, 3, INPUT)
    input[2, 1, 0] = torch.nan
    input.requires_grad_()
    module(input)[0].sum().backward()
    assert input.grad[:, 1].isnan().all()  # the row of the NaN, through all steps
    assert input.grad[:, [0, 2]].isfinite().all()
    assert module.weight_hh_l0.grad.isnan().any()


@pytest.mark.parametrize("name", ALL_CLASS_NAMES)
def test_empty_batch(name: str) -> None:
    input = x(0, INPUT) if name in CELL_CLASS_NAMES else x(3, 0, INPUT)
    theirs, ours = getattr(nn, name)(INPUT, HIDDEN), getattr(rnn_ext, name)(INPUT, HIDDEN)
    same_numbers(ours(input), theirs(input))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_state_as_a_list(name: str) -> None:
    shape = (2, HIDDEN) if name == "LSTMCell" else (1, 2, HIDDEN)
    theirs = getattr(nn, name)(INPUT, HIDDEN)
    ours = getattr(rnn_ext, name)(INPUT, HIDDEN)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(*shape[:-1], INPUT)
    hx = [torch.randn(shape), torch.randn(shape)]
    same_numbers(ours(input, hx), theirs(input, hx))


@pytest.mark.parametrize("name", CELL_CLASS_NAMES)
@pytest.mark.parametrize(("input_size", "hidden_size"), [(0, 3), (3, 0), (0, 0)])
def test_cell_of_size_zero(name: str, input_size: int, hidden_size: int) -> None:
    theirs = getattr(nn, name)(input_size, hidden_size)
    ours = getattr(rnn_ext, name)(input_size, hidden_size)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(2, input_size)
    same_numbers(ours(input), theirs(input))


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_packed_state_of_a_larger_batch(name: str) -> None:
    """An unsorted batch picks the rows that it needs from the state."""
    theirs, ours = getattr(nn, name)(INPUT, HIDDEN), getattr(rnn_ext, name)(INPUT, HIDDEN)
    ours.load_state_dict(theirs.state_dict())
    lengths = torch.tensor([2, 3], device="cpu")
    input = pack_padded_sequence(torch.randn(3, 2, INPUT), lengths, enforce_sorted=False)
    hx = state(name, 1, 3, HIDDEN)
    for part in flatten(hx):
        part.normal_()
    same_numbers(ours(input, hx), theirs(input, hx))
