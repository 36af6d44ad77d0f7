"""Check rnn_ext against torch.nn on one shape, then time both.

`python -m rnn_ext check`, `python -m rnn_ext bench` and everything in `benchmarks/` share this
module: one definition of "the same work", one of "the same answer", and one way to take a time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

Mode = Literal["inference", "training", "streaming"]

NUM_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}

# Seconds that short calls are repeated for before a sample begins. A thread that wakes up may find
# itself behind another one on the same core; Linux 6.18 was seen to take 12 to 40 ms to notice that
# the other core is free.
WARM_UP = 40e-3


@dataclass(frozen=True)
class Case:
    """One call to compare. Streaming is inference that is handed its state, step by step."""

    cell: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    mode: Mode = "inference"
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    nonlinearity: str = "tanh"
    dtype: torch.dtype = torch.float32
    packed: bool = False
    given_state: bool = False

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def shape(self) -> str:
        return f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size}"

    @property
    def label(self) -> str:
        extras = [
            f"{self.num_layers} layers" if self.num_layers > 1 else "",
            "bidirectional" if self.bidirectional else "",
            f"proj {self.proj_size}" if self.proj_size else "",
            self.nonlinearity if self.nonlinearity != "tanh" else "",
            "packed" if self.packed else "",
            str(self.dtype).removeprefix("torch.") if self.dtype != torch.float32 else "",
        ]
        return " ".join(filter(None, [self.cell, self.shape, self.mode, *extras]))

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, two per multiply-add.

        Backward has two products (data and weight gradient) for each one of forward. A packed batch
        does less than this.
        """
        multiplies = 0
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else self.state_size * self.directions
            gates = NUM_GATES[self.cell] * self.hidden_size
            multiplies += gates * (inputs + self.state_size) + self.hidden_size * self.proj_size
        forward = 2 * self.steps * self.batch * self.directions * multiplies
        return 3 * forward if self.training else forward

    def build_module(self, namespace: ModuleType) -> nn.RNNBase:
        extra: dict[str, int | str] = {}
        if self.cell == "RNN":
            extra["nonlinearity"] = self.nonlinearity
        if self.proj_size:
            extra["proj_size"] = self.proj_size
        module: nn.RNNBase = getattr(namespace, self.cell)(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bidirectional=self.bidirectional,
            dtype=self.dtype,
            **extra,
        )
        return module

    def context(self) -> contextlib.AbstractContextManager[object]:
        """What the caller is under. Entered once around a measurement and never part of a time."""
        return contextlib.nullcontext() if self.training else torch.inference_mode()


class Workload:
    """A module with its own copy of the inputs. One call is one forward or one training step."""

    def __init__(self, case: Case, module: nn.RNNBase, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = module.weight_ih_l0.dtype

        def draw(*shape: int) -> Tensor:
            # Rounded to the case's dtype before it is cast to the module's, so that a float64 copy
            # of the module is given the very same numbers.
            return torch.randn(*shape, generator=generator).to(case.dtype).to(dtype)

        self.module = module
        self.training = case.training
        self.parameters = list(module.parameters())
        self.lengths = None
        rows = [case.steps, case.batch]
        if case.packed:
            self.lengths = [
                case.steps - b * case.steps // (2 * case.batch) for b in range(case.batch)
            ]
            rows = [sum(self.lengths)]
        self.input = draw(case.steps, case.batch, case.input_size).requires_grad_(case.training)
        self.grad_output = draw(*rows, case.state_size * case.directions)
        self.hx: Tensor | tuple[Tensor, Tensor] | None = None
        self.initial_state: tuple[Tensor, ...] = ()
        if case.given_state:
            layers = case.num_layers * case.directions
            sizes = [case.state_size, case.hidden_size][: 2 if case.cell == "LSTM" else 1]
            self.initial_state = tuple(
                draw(layers, case.batch, size).requires_grad_(case.training) for size in sizes
            )
            self.hx = self.initial_state if case.cell == "LSTM" else self.initial_state[0]

    def __call__(self) -> tuple[Tensor, ...]:
        """Output and final states: (output, h_n) or (output, h_n, c_n)."""
        if not self.training:
            return self._forward()
        for tensor in (self.input, *self.initial_state, *self.parameters):
            tensor.grad = None
        output, *state = self._forward()
        output.backward(self.grad_output)
        return output, *state

    def _forward(self) -> tuple[Tensor, ...]:
        sequence = self.input
        if self.lengths is not None:
            sequence = pack_padded_sequence(sequence, self.lengths)
        output, state = self.module(sequence, self.hx)
        if isinstance(output, PackedSequence):
            output = output.data
        return (output, *state) if isinstance(state, tuple) else (output, state)

    def results(self) -> dict[str, Tensor]:
        """Everything one call produces, by name."""
        produced = name_states("output", "h_n", "c_n", tensors=self())
        if self.training:
            leaves = {
                "input": self.input,
                **name_states("h_0", "c_0", tensors=self.initial_state),
            }
            leaves.update(self.module.named_parameters())
            for name, leaf in leaves.items():
                if leaf.grad is None:
                    raise AssertionError(f"no gradient arrived at {name}")
                produced[f"grad {name}"] = leaf.grad
        return {name: tensor.detach() for name, tensor in produced.items()}


def name_states(*names: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Tensors by name. Only an LSTM has the last name's."""
    return dict(zip(names, tensors, strict=False))


def build_pair(case: Case, ours: ModuleType, theirs: ModuleType = nn) -> dict[str, Workload]:
    """The case in torch.nn and in rnn_ext, with the same weights and the same inputs."""
    torch.manual_seed(0)
    reference = case.build_module(theirs)
    candidate = case.build_module(ours)
    candidate.load_state_dict(reference.state_dict())
    return {"torch.nn": Workload(case, reference), "rnn_ext": Workload(case, candidate)}


@dataclass(frozen=True)
class Deviation:
    """How far one tensor is from the float64 reference, next to how far it may be."""

    name: str
    error: float
    bound: float

    @property
    def within(self) -> bool:
        return self.error <= self.bound  # False for NaN, as it should be

    def __str__(self) -> str:
        return f"{self.name}: relative error {self.error:.2e}, allowed {self.bound:.2e}"


def relative_error(actual: Tensor, reference: Tensor) -> float:
    if actual.shape != reference.shape:
        return float("inf")
    difference = (actual.double() - reference).norm()
    return float(difference / reference.norm()) if reference.norm() > 0 else float(difference)


def compare(case: Case, candidate: Workload, torch_nn: Workload) -> list[Deviation]:
    """Error of everything the candidate computes: `compare_all` for one."""
    return compare_all(case, {"candidate": candidate}, torch_nn)["candidate"]


def compare_all(
    case: Case,
    candidates: Mapping[str, Workload],
    torch_nn: Workload,
    make: Callable[[Case, nn.RNNBase], Workload] = Workload,
) -> dict[str, list[Deviation]]:
    """Error of everything each candidate computes, in units of the norm of the exact result.

    The exact result is torch.nn's in float64 on the same numbers. At any lower precision the
    candidate may be twice as far from it as torch.nn is at that precision, plus one rounding. In
    float64 there is nothing better to compare with, so the bound is the rounding of a long sum:
    4096 eps = 9e-13. `make` puts the exact module where the candidates are.
    """
    double_case = replace(case, dtype=torch.float64)
    exact_module = double_case.build_module(nn)
    exact_module.load_state_dict(torch_nn.module.state_dict())
    with case.context():
        exact = make(case, exact_module).results()
        expected = torch_nn.results()
        produced = {name: candidate.results() for name, candidate in candidates.items()}
    eps = torch.finfo(case.dtype).eps

    def bound(name: str) -> float:
        if case.dtype == torch.float64:
            return 4096 * eps
        return 2 * relative_error(expected[name], exact[name]) + eps

    bounds = {name: bound(name) for name in exact}
    return {
        candidate: [
            Deviation(name, relative_error(actual[name], reference), bounds[name])
            for name, reference in exact.items()
        ]
        for candidate, actual in produced.items()
    }


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the samples of one side of an interleaved measurement."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.02 is a quiet machine, 0.5 is a useless one."""
        first, _, third = statistics.quantiles(self.samples, n=4)
        return (third - first) / self.median


def repetitions(
    work: Callable[[], object], min_sample: float, clock: Callable[[], float]
) -> tuple[int, float]:
    """How many calls make one sample of at least `min_sample` seconds, and how long they take. Also
    warms the call up.
    """
    work()
    calls = 1
    while True:
        start = clock()
        for _ in range(calls):
            work()
        elapsed = clock() - start
        if elapsed >= min_sample:
            return calls, elapsed
        # Aim a fifth above the target; grow at most tenfold, for a first call can be far too fast
        # or slow.
        wanted = calls * 1.2 * min_sample / max(elapsed, 1e-9)
        calls = max(calls + 1, min(10 * calls, int(wanted)))


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    min_sample: float = 5e-3,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time the sides in turn, A B A B ..., so that a busy moment hits all of them alike.

    `settle` runs before each sample, outside the time: where the sides have thread pools of their
    own, one pool's threads still spin when the next side's turn comes.
    """
    calls: dict[str, int] = {}
    lasts: dict[str, float] = {}  # seconds a sample
    for name, work in sides.items():
        settle()
        calls[name], lasts[name] = repetitions(work, min_sample, clock)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            settle()
            # The other side has just left the caches and this side's threads may be asleep: a
            # short sample must not pay for that.
            if lasts[name] < WARM_UP:
                warm_up(work, clock)
            start = clock()
            for _ in range(calls[name]):
                work()
            samples[name].append((clock() - start) / calls[name])
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def warm_up(work: Callable[[], object], clock: Callable[[], float]) -> None:
    start = clock()
    while clock() - start < WARM_UP:
        work()
