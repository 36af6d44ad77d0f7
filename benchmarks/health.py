"""Is the machine ours at this moment? And what to do while it is not.

Shared hosts take cores away, for a time slice or for minutes. A time taken then says nothing, and
torch.nn's suffers most: its threads wait for each other at every step. So every measurement stands
between two checks and is repeated if one of them fails: a bounded number of times for each row, and
with a bounded patience for the whole run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from roofline import Machine, MachineProbe, measure

# Below this share of undisturbed cores the machine is somebody else's at the moment.
FREE_CORES = 0.85

# Seconds. Between two cores at work a store is seen within well below a microsecond, even from
# socket to socket; with one of them away, within a time slice.
SLOW_ANSWER = 2e-6

# Interquartile range over the median above which a healthy row is worth another attempt, and above
# which, whatever the checks before and after it say, it was disturbed in between.
UNSTEADY = 0.25
UNRELIABLE = 0.5

ATTEMPTS = 4
PAUSE = 0.25

Result = TypeVar("Result")


@dataclass(frozen=True)
class Health:
    """All threads' multiply-add rate over `threads` undisturbed cores', and seconds from a store on
    one core to its sight on another. About 1 when every core is ours; 1/2 when one of two is taken.
    """

    fma: float
    handoff: float

    def worse(self, other: Health) -> Health:
        return Health(min(self.fma, other.fma), max(self.handoff, other.handoff))

    def good(self, machine: Machine) -> bool:
        return self.fma >= FREE_CORES and (machine.threads == 1 or self.handoff <= SLOW_ANSWER)


def check_health(probe: MachineProbe, machine: Machine) -> Health:
    # The threads that spin after a call of onnxruntime or OpenMP look like somebody else's.
    wait_for_idle_threads()
    share = probe.fma(machine.threads) / (machine.threads * machine.fma_one_thread)
    return Health(share, probe.handoff(seconds=5e-3) if machine.threads > 1 else machine.handoff)


def measure_limits(probe: MachineProbe, threads: int, attempts: int, patience: Patience) -> Machine:
    """The machine's limits, measured until all of its cores have been seen at work at once: limits
    that are too low would flatter every share of them.
    """
    machine = measure(probe, threads, attempts)
    for _ in range(ATTEMPTS - 1):
        if limits_are_good(machine) or not patience.pause():
            break
        machine = machine.best(measure(probe, threads, attempts))
    return machine


def limits_are_good(machine: Machine) -> bool:
    share = machine.fma_all_threads / (machine.threads * machine.fma_one_thread)
    return Health(share, machine.handoff).good(machine)


class Patience:
    """Seconds that a run may still spend on waiting and repeating. Not for ever: a core can be away
    for as long as the run would take.
    """

    def __init__(
        self,
        seconds: float,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.left = seconds
        self._sleep = sleep
        self._clock = clock

    def pause(self) -> bool:
        """Wait a moment. False if there is no patience left for it."""
        if self.left <= 0:
            return False
        self._sleep(PAUSE)
        self.left -= PAUSE
        return True

    def spend(self, work: Callable[[], Result]) -> Result:
        """The work's result. Its pauses are part of its time."""
        left, start = self.left, self._clock()
        result = work()
        self.left = left - (self._clock() - start)
        return result


def undisturbed(
    work: Callable[[], Result],
    spread: Callable[[Result], float],
    probe: MachineProbe,
    machine: Machine,
    patience: Patience,
) -> tuple[Result, Health]:
    """What `work` returns from its healthiest attempt, the steadiest one of several such."""
    attempts: list[tuple[Result, Health]] = []

    def attempt() -> None:
        before = check_health(probe, machine)
        # Waiting is cheaper than measuring what has to be thrown away.
        for _ in range(ATTEMPTS):
            if before.good(machine) or not patience.pause():
                break
            before = check_health(probe, machine)
        result = work()
        attempts.append((result, before.worse(check_health(probe, machine))))

    def merit(measured: tuple[Result, Health]) -> tuple[bool, float, float]:
        result, health = measured
        good = health.good(machine)
        return good, 0.0 if good else health.fma, -spread(result)

    attempt()
    while len(attempts) < ATTEMPTS:
        good, _, steadiness = max(map(merit, attempts))
        if (good and -steadiness <= UNSTEADY) or not patience.pause():
            break
        patience.spend(attempt)
    return max(attempts, key=merit)


def running_threads() -> int:
    """How many other threads of this process are on a core or wait for one, which is a spinning
    one's state. Processor times would not do: Linux books a running thread's at its ticks, up to
    10 ms apart.
    """
    running = 0
    for task in Path("/proc/self/task").glob("[0-9]*"):
        if int(task.name) == threading.get_native_id():
            continue
        with contextlib.suppress(OSError):  # it has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            running += state == "R"
    return running


def wait_for_idle_threads(longest: float = 0.2, look: float = 2e-3) -> None:
    """Sleep until every side's threads have gone to sleep. Measured after a call: OpenMP's
    (torch.nn and rnn_ext) spin for 10 ms, onnxruntime's for 40, OpenVINO's for 1.
    """
    end = time.perf_counter() + longest
    while running_threads() and time.perf_counter() < end:
        time.sleep(look)
