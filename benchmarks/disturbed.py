"""What is left of the speed when others want the cores: `python benchmarks/report.py --disturbed`.

busy neighbor   one spinning process pinned to each core: half of every core is left. A program
                that waits for all its threads at every step waits for time slices instead.
stolen core     a spinning process of the highest priority (nice -20) pinned to the second core:
                next to nothing is left of it, though the machine still counts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from cases import MODES
from health import Patience, undisturbed
from peers import BASELINE, OURS, PEERS, build_all
from rnn_ext._bench import Case
from roofline import Machine, MachineProbe
from rows import BusyRow, StolenRow
from timing import MeasureTimes, check, measure_in_turn

SPINNER = Path(__file__).with_name("spinner.py")
HIGHEST_PRIORITY = -20

# (batch, steps, input_size, hidden_size): of the grid, what is run on both cores, in both ways of
# sharing the work.
BUSY_SHAPES = ((1, 100, 256, 256), (16, 50, 128, 128), (64, 50, 512, 512))
STOLEN_SHAPES = (
    (1, 100, 64, 64),
    (1, 100, 256, 256),
    (1, 100, 512, 512),
    (4, 100, 256, 256),
    (16, 50, 128, 128),
)


class CannotDisturb(Exception):
    """This machine does not let us take a core away."""


@contextmanager
def spinners(cores: Sequence[int], niceness: int = 0) -> Iterator[None]:
    """Keep the cores busy meanwhile."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for core in cores:
            command = [sys.executable, "-I", "-S", str(SPINNER), str(core), str(niceness)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for core, process in zip(cores, processes, strict=True):
            answer = process.stdout.readline().strip()
            if answer != "spinning":
                raise CannotDisturb(f"core {core} at nice {niceness}: {answer or 'no answer'}")
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def time_busy(
    case: Case,
    machine: Machine,
    probe: MachineProbe,
    patience: Patience,
    rounds: int = 7,
    measure_times: MeasureTimes = measure_in_turn,
) -> BusyRow:
    sides = build_all(case, PEERS)
    check(case, sides)

    def measure() -> tuple[float, float, float]:
        with case.context():
            quiet = measure_times({OURS: sides[OURS]}, rounds=rounds)
            with spinners(sorted(os.sched_getaffinity(0))):
                busy = measure_times(sides, rounds=rounds)
        return quiet[OURS].median, busy[OURS].median, busy[BASELINE].median

    found, health = undisturbed(measure, lambda _: 0.0, probe, machine, patience)
    return BusyRow(case, *found, healthy=health.good(machine))


def on(cores: set[int], threads: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work, called from these cores with so many threads. A switch costs as much as a short
    call, and the first call of a sample, which is not counted, makes it.
    """

    def run() -> None:
        if torch.get_num_threads() != threads:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)
        work()

    return run


def time_stolen(
    case: Case,
    machine: Machine,
    probe: MachineProbe,
    patience: Patience,
    rounds: int = 7,
    measure_times: MeasureTimes = measure_in_turn,
) -> StolenRow:
    every_core = os.sched_getaffinity(0)
    if machine.threads < 2 or len(every_core) < 2:
        raise CannotDisturb("there is no second core, or no second thread")
    free, stolen, *_ = sorted(every_core)
    sides = build_all(case, PEERS)
    check(case, sides)
    work = sides[OURS]
    ways = {
        "one thread": on({free}, 1, work),
        "all threads": on(every_core, machine.threads, work),
    }

    def measure() -> tuple[float, float]:
        try:
            with case.context(), spinners([stolen], HIGHEST_PRIORITY):
                timings = measure_times(ways, rounds=rounds)
        finally:
            os.sched_setaffinity(0, every_core)
            torch.set_num_threads(machine.threads)
        return timings["one thread"].median, timings["all threads"].median

    found, health = undisturbed(measure, lambda _: 0.0, probe, machine, patience)
    return StolenRow(case, *found, healthy=health.good(machine))


def busy_cases(cells: Sequence[str]) -> list[Case]:
    return [Case(cell, *shape, mode) for shape in BUSY_SHAPES for cell in cells for mode in MODES]


def stolen_cases(cells: Sequence[str]) -> list[Case]:
    return [Case(cell, *shape, mode) for shape in STOLEN_SHAPES for cell in cells for mode in MODES]
