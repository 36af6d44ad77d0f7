"""The project's stated bars, judged from measured rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cases import CELLS, SMALL_BATCH
from rnn_ext._bench import Case

GEOMEAN_BARS = {"RNN": 2.0, "LSTM": 1.5, "GRU": 2.0}
STREAMING_BAR = 1 / 3


@dataclass(frozen=True)
class Row:
    """One measured case. Times in seconds a call."""

    case: Case
    theirs: float
    ours: float
    spread: float  # the larger interquartile range of the two, over its median
    floor: float
    healthy: bool

    @property
    def ratio(self) -> float:
        """How many times faster than torch.nn."""
        return self.theirs / self.ours

    @property
    def rate(self) -> float:
        return self.case.flops / self.ours

    @property
    def share(self) -> float:
        """Share of the roofline that is reached."""
        return self.floor / self.ours


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one training case: ours over torch.nn's, and both in bytes (see memory.py)."""

    case: Case
    ratio: float
    theirs: tuple[int, int]  # heap, resident
    ours: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """`ok`, `falls short`, or `no verdict` where a row was measured while a core was away.

    torch.nn can then be a thousand times slower than it is, which would flatter us.
    """

    bar: str
    figure: str
    status: str

    def __str__(self) -> str:
        return f"{self.status:<12} {self.bar}: {self.figure}"


def status(met: bool, rows: Sequence[Row]) -> str:
    if not all(row.healthy for row in rows):
        return "no verdict"
    return "ok" if met else "falls short"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def judge(rows: Sequence[Row], memory: Sequence[MemoryRow]) -> list[Verdict]:
    """A verdict for every bar that something was measured for."""
    verdicts = []
    grid = [row for row in rows if row.case.mode != "streaming"]
    small = [row for row in grid if row.case.batch <= SMALL_BATCH]
    if small:
        worst = min(small, key=lambda row: row.ratio)
        figure = f"worst {worst.ratio:.2f}x ({worst.case.label})"
        bar = f"no grid cell with B <= {SMALL_BATCH} slower than torch.nn"
        verdicts.append(Verdict(bar, figure, status(worst.ratio >= 1.0, small)))
    for cell in CELLS:
        chosen = [row for row in small if row.case.cell == cell]
        if chosen:
            mean = geometric_mean([row.ratio for row in chosen])
            bar = f"{cell}, B <= {SMALL_BATCH}, geometric mean >= {GEOMEAN_BARS[cell]}x"
            met = mean >= GEOMEAN_BARS[cell]
            verdicts.append(Verdict(bar, f"{mean:.2f}x", status(met, chosen)))
    for row in rows:
        if row.case.mode == "streaming":
            part = row.ours / row.theirs
            bar = f"{row.case.cell} streaming step {row.case.shape} <= 1/3 of torch.nn's time"
            figure = f"{part:.2f} ({row.ours * 1e6:.1f} of {row.theirs * 1e6:.1f} µs)"
            verdicts.append(Verdict(bar, figure, status(part <= STREAMING_BAR, [row])))
    if memory:
        largest = max(memory, key=lambda row: row.ratio)
        bar = "training peak memory never above torch.nn's"
        figure = f"at most {largest.ratio:.3f} of it ({largest.case.label})"
        verdicts.append(Verdict(bar, figure, status(largest.ratio <= 1.0, [])))
    return verdicts


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric means and the worst case of every cell and mode."""
    lines = []
    for cell in CELLS:
        for mode in ("inference", "training"):
            every = [row for row in rows if row.case.cell == cell and row.case.mode == mode]
            small = [row.ratio for row in every if row.case.batch <= SMALL_BATCH]
            if not every:
                continue
            worst = min(every, key=lambda row: row.ratio)
            lines.append(
                f"{cell:<4} {mode:<9}  "
                + (f"B <= {SMALL_BATCH}: {geometric_mean(small):5.2f}x   " if small else "")
                + f"all: {geometric_mean([row.ratio for row in every]):5.2f}x   "
                + f"worst: {worst.ratio:5.2f}x at {worst.case.shape}"
                + ("" if all(row.healthy for row in every) else "  unhealthy")
            )
    return lines
