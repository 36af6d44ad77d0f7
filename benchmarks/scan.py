"""Are there cliffs? Time per flop over every hidden size and batch, and time per step over T.

`python benchmarks/report.py --scan`. A point is compared with the mean of its neighbors, H ± 17 and
B ± 3, in pairs: on the rim, where one of a pair is missing, only the other pair counts, for time
per flop at B = 1 and at B = 4 differs by nature (one reads W_hh for one row, the other for four).
A time is the fastest of several calls: what disturbs a call only ever adds to it, and a cliff is in
all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import rnn_ext
from bars import CLIFF
from health import Patience, undisturbed
from rnn_ext._bench import Case, Workload
from roofline import Machine, MachineProbe
from rows import Growth, Scan

HIDDEN_STEP, BATCH_STEP = 17, 3
HIDDEN_SIZES = tuple(range(16, 1101, HIDDEN_STEP))
BATCHES = tuple(range(1, 131, BATCH_STEP))
STEPS = 8

# The kernels' tiles are the same for all cells: one cell forward, another one both ways.
SCANNED = (("LSTM", "inference"), ("GRU", "training"))

GROWTH_STEPS = (200, 2000, 20000)
GROWTH_SHAPES = ((1, 64), (16, 128))  # batch, hidden_size

# How often suspected cliffs are looked at again, and how many at once. Of more than that, on a
# disturbed machine, there is no end.
LOOKS = 3
SUSPECTS = 60

Point = tuple[int, int]  # hidden_size, batch


def fastest(
    work: Callable[[], object],
    calls: int = 2,
    seconds: float = 1e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of the fastest call, of at least so many and for at least so long."""
    work()
    start = before = clock()
    best = float("inf")
    while calls > 0 or before - start < seconds:
        work()
        after = clock()
        best = min(best, after - before)
        before = after
        calls -= 1
    return best


def neighbors(point: Point, points: Mapping[Point, float]) -> list[Point]:
    hidden_size, batch = point
    pairs = (
        ((hidden_size - HIDDEN_STEP, batch), (hidden_size + HIDDEN_STEP, batch)),
        ((hidden_size, batch - BATCH_STEP), (hidden_size, batch + BATCH_STEP)),
    )
    return [other for pair in pairs if all(end in points for end in pair) for other in pair]


def cliff_ratios(case: Case, seconds: Mapping[Point, float]) -> dict[Point, float]:
    """Time per flop of each point over the mean of its neighbors'. Corners have none."""

    def per_flop(point: Point) -> float:
        return seconds[point] / at(case, *point).flops

    ratios = {}
    for point in seconds:
        around = neighbors(point, seconds)
        if around:
            ratios[point] = per_flop(point) * len(around) / sum(map(per_flop, around))
    return ratios


def at(case: Case, hidden_size: int, batch: int) -> Case:
    return replace(case, batch=batch, input_size=hidden_size, hidden_size=hidden_size)


def time_points(case: Case, points: Iterable[Point], calls: int) -> dict[Point, float]:
    """Points of one hidden size stand together, so that a module is built once for all of them."""
    seconds: dict[Point, float] = {}
    module = None
    for hidden_size, batch in points:
        here = at(case, hidden_size, batch)
        if module is None or module.hidden_size != hidden_size:
            module = here.build_module(rnn_ext)
        with here.context():
            seconds[hidden_size, batch] = fastest(Workload(here, module), calls)
    return seconds


def scan(
    case: Case,
    machine: Machine,
    probe: MachineProbe,
    patience: Patience,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    batches: Sequence[int] = BATCHES,
) -> Scan:
    """Measure every point once, and what then looks like a cliff, with what is around it, again.

    A point is healthy if the machine was when it was last looked at.
    """

    def look(points: Sequence[Point], calls: int) -> tuple[dict[Point, float], bool]:
        found, health = undisturbed(
            lambda: time_points(case, points, calls), lambda _: 0.0, probe, machine, patience
        )
        return found, health.good(machine)

    seconds: dict[Point, float] = {}
    healthy: dict[Point, bool] = {}
    for hidden_size in hidden_sizes:
        found, good = look([(hidden_size, batch) for batch in batches], calls=2)
        seconds |= found
        healthy |= dict.fromkeys(found, good)
    for _ in range(LOOKS):
        ratios = cliff_ratios(case, seconds)
        highest = sorted(ratios, key=ratios.__getitem__, reverse=True)[:SUSPECTS]
        for suspect in (point for point in highest if ratios[point] > CLIFF):
            again, healthy[suspect] = look(sorted([suspect, *neighbors(suspect, seconds)]), calls=7)
            seconds |= {point: min(seconds[point], value) for point, value in again.items()}
    return Scan(case, seconds, cliff_ratios(case, seconds), healthy)


def growth(
    case: Case,
    machine: Machine,
    probe: MachineProbe,
    patience: Patience,
    steps: Sequence[int] = GROWTH_STEPS,
) -> Growth:
    module = case.build_module(rnn_ext)

    def measure() -> dict[int, float]:
        seconds = {}
        for number in steps:
            here = replace(case, steps=number)
            with here.context():
                seconds[number] = fastest(Workload(here, module), calls=3, seconds=0.02)
        return seconds

    seconds, health = undisturbed(measure, lambda _: 0.0, probe, machine, patience)
    return Growth(case, seconds, health.good(machine))


def scanned_cases(cells: Sequence[str]) -> list[Case]:
    return [Case(cell, 1, STEPS, 1, 1, mode) for cell, mode in SCANNED if cell in cells]


def growth_cases(cells: Sequence[str]) -> list[Case]:
    """Inference of every cell; training too, where what is kept for backward stays moderate."""
    return [
        Case(cell, batch, 1, size, size, mode)
        for cell in cells
        for batch, size in GROWTH_SHAPES
        for mode in ("inference", "training")
        if mode == "inference" or batch == 1
    ]
