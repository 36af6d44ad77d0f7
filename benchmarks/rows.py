"""What is measured, as values: a timed case, a peak of memory, a verdict on a bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from health import Health
from peers import BASELINE, OURS, RIVAL_NAMES
from rnn_ext._bench import Case

Json = dict[str, object]


@dataclass(frozen=True)
class Row:
    """One timed case. Times in seconds a call, by side."""

    case: Case
    times: Mapping[str, float]
    spread: float  # the largest interquartile range of the sides, over its median
    healthy: bool
    health: Health | None = None
    floor: float | None = None  # seconds; None where the roofline is not defined
    peak: float | None = None  # flop/s of all threads
    healthy_limits: bool = True  # floor and peak, too: measured with a core away they flatter

    @property
    def theirs(self) -> float:
        return self.times[BASELINE]

    @property
    def ours(self) -> float:
        return self.times[OURS]

    @property
    def ratio(self) -> float:
        """How many times faster than torch.nn."""
        return self.theirs / self.ours

    @property
    def rivals(self) -> dict[str, float]:
        """The times of the others: not ours, nor ours in another setting."""
        return {name: seconds for name, seconds in self.times.items() if name in RIVAL_NAMES}

    @property
    def best_peer(self) -> str:
        return min(self.rivals, key=self.times.__getitem__)

    @property
    def best_ratio(self) -> float:
        """How many times faster than the fastest peer."""
        return self.times[self.best_peer] / self.ours

    @property
    def rate(self) -> float:
        return self.case.flops / self.ours

    @property
    def share(self) -> float | None:
        """Share of the roofline that is reached."""
        return None if self.floor is None else self.floor / self.ours

    @property
    def peak_share(self) -> float | None:
        """Share of the multiply-add peak that is reached."""
        return None if self.peak is None else self.rate / self.peak

    def to_json(self) -> Json:
        return {
            "label": self.case.label,
            "case": case_to_json(self.case),
            "times": dict(self.times),
            "torch_nn_seconds": self.theirs,
            "rnn_ext_seconds": self.ours,
            "ratio": self.ratio,
            "best_peer": self.best_peer,
            "best_peer_ratio": self.best_ratio,
            "spread": self.spread,
            "gflops": self.rate / 1e9,
            "floor_seconds": self.floor,
            "roofline_share": self.share,
            "peak_share": self.peak_share,
            "healthy": self.healthy,
            "healthy_limits": self.healthy_limits,
            "health": asdict(self.health) if self.health else None,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, object]) -> Row:
        """Enough of a row to judge it against torch.nn."""
        return cls(case_from_json(entry["case"]), entry["times"], entry["spread"], entry["healthy"])


def case_to_json(case: Case) -> Json:
    return {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def case_from_json(fields: Mapping[str, object]) -> Case:
    return Case(**{**fields, "dtype": getattr(torch, fields["dtype"])})


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one case above its weights and input, in bytes (see memory.py)."""

    case: Case
    ours: tuple[int, int]  # heap, resident
    theirs: tuple[int, int] | None  # None for inference, which is not compared
    ratio: float | None  # ours over theirs
    beside_outputs: int | None  # inference: ours less the outputs


@dataclass(frozen=True)
class Verdict:
    """`ok`, `falls short`, or `no verdict` where the machine or a missing peer left it open."""

    bar: str
    figure: str
    status: str

    def __str__(self) -> str:
        return f"{self.status:<12} {self.bar}: {self.figure}"


@dataclass(frozen=True)
class Scan:
    """Seconds a call over hidden sizes and batches; `case` says the rest of each."""

    case: Case
    seconds: Mapping[tuple[int, int], float]  # by (hidden_size, batch)
    ratios: Mapping[tuple[int, int], float]  # time per flop over the mean of the neighbors'
    healthy: Mapping[tuple[int, int], bool]

    @property
    def title(self) -> str:
        return f"{self.case.cell} {self.case.mode} T{self.case.steps}"

    def to_json(self) -> Json:
        return {
            "case": case_to_json(self.case),
            "points": [
                {
                    "hidden_size": hidden_size,
                    "batch": batch,
                    "seconds": seconds,
                    "ratio": self.ratios.get((hidden_size, batch)),
                    "healthy": self.healthy[hidden_size, batch],
                }
                for (hidden_size, batch), seconds in self.seconds.items()
            ],
        }


@dataclass(frozen=True)
class Growth:
    """Seconds a call of one case at more and more steps."""

    case: Case
    seconds: Mapping[int, float]  # by steps
    healthy: bool

    def ratio(self, steps: int) -> float:
        """Time a step, over that of the shortest sequence."""
        shortest = min(self.seconds)
        return (self.seconds[steps] / steps) / (self.seconds[shortest] / shortest)

    @property
    def worst(self) -> int:
        return max(self.seconds, key=self.ratio)

    def to_json(self) -> Json:
        return {
            "case": case_to_json(self.case),
            "seconds": dict(self.seconds),
            "healthy": self.healthy,
        }


@dataclass(frozen=True)
class BusyRow:
    """With one spinning process on each core. Times in seconds a call."""

    case: Case
    quiet: float  # ours, without them
    ours: float
    theirs: float
    healthy: bool  # before and after, when nobody else was to be there

    @property
    def slowdown(self) -> float:
        return self.ours / self.quiet

    def to_json(self) -> Json:
        return {**asdict(self), "case": self.case.label, "slowdown": self.slowdown}


@dataclass(frozen=True)
class StolenRow:
    """With the second core taken by a process of higher priority. Times in seconds a call."""

    case: Case
    one_thread: float  # ours, one thread, pinned to the core that is free
    ours: float
    healthy: bool  # before and after, when nobody else was to be there

    @property
    def ratio(self) -> float:
        return self.ours / self.one_thread

    def to_json(self) -> Json:
        return {**asdict(self), "case": self.case.label, "ratio": self.ratio}


@dataclass
class Results:
    """Everything of one run."""

    grid: list[Row] = field(default_factory=list)
    streaming: list[Row] = field(default_factory=list)
    half: list[Row] = field(default_factory=list)
    bidirectional: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    busy: list[BusyRow] = field(default_factory=list)
    stolen: list[StolenRow] = field(default_factory=list)
    avx2: list[Row] = field(default_factory=list)
    absent: list[str] = field(
        default_factory=list
    )  # peers that the bars mean and that were not there
    impossible: list[Verdict] = field(default_factory=list)  # bars that this machine cannot measure
    wrong: list[str] = field(default_factory=list)

    @property
    def timed(self) -> list[Row]:
        return [*self.streaming, *self.grid, *self.half, *self.bidirectional]

    def to_json(self) -> Json:
        return {
            "rows": [row.to_json() for row in self.timed],
            "memory": [{**asdict(row), "case": row.case.label} for row in self.memory],
            "scan": [scan.to_json() for scan in self.scans],
            "growth": [growth.to_json() for growth in self.growths],
            "busy": [row.to_json() for row in self.busy],
            "stolen": [row.to_json() for row in self.stolen],
            "avx2": [row.to_json() for row in self.avx2],
            "absent": self.absent,
            "wrong": self.wrong,
        }
