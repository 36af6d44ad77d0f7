"""Check a case, then time its sides in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from health import (
    UNRELIABLE,
    Patience,
    limits_are_good,
    undisturbed,
    wait_for_idle_threads,
)
from peers import BASELINE, OURS, PEERS, RIVAL_NAMES, Build, build_all
from rnn_ext._bench import Case, Timing, Workload, compare_all, interleave
from roofline import Machine, MachineProbe, floor_seconds
from rows import Row

# A rival owes nobody twice torch.nn's error. It owes the same work in the same precision: products
# in bfloat16 would be a thousand times the bound.
RIVAL_ALLOWANCE = 8

MeasureTimes = Callable[..., dict[str, Timing]]
measure_in_turn: MeasureTimes = partial(interleave, settle=wait_for_idle_threads)


class WrongResult(Exception):
    """A side computes something else: its time would mean nothing."""


def check(case: Case, sides: Mapping[str, Workload]) -> None:
    """Ours and the rivals' results against float64. Ours in another setting is not looked at."""
    candidates = {
        name: side
        for name, side in sides.items()
        if name == OURS or (name in RIVAL_NAMES and name != BASELINE)
    }
    wrong = []
    for name, deviations in compare_all(case, candidates, sides[BASELINE]).items():
        allowance = 1 if name == OURS else RIVAL_ALLOWANCE
        wrong += [
            f"{name}: {deviation}"
            for deviation in deviations
            if not deviation.error <= allowance * deviation.bound
        ]
    if wrong:
        raise WrongResult(f"{case.label}: " + "; ".join(wrong))


def time_case(
    case: Case,
    machine: Machine,
    probe: MachineProbe,
    patience: Patience,
    peers: Mapping[str, Build] = PEERS,
    rounds: int = 7,
    min_sample: float = 5e-3,
    measure_times: MeasureTimes = measure_in_turn,
) -> Row:
    """Check, then time: undisturbed, or as nearly so as patience allows."""
    sides = build_all(case, peers)
    check(case, sides)
    with case.context():
        timings, health = undisturbed(
            lambda: measure_times(sides, rounds=rounds, min_sample=min_sample),
            largest_spread,
            probe,
            machine,
            patience,
        )
    spread = largest_spread(timings)
    return Row(
        case=case,
        times={name: timing.median for name, timing in timings.items()},
        spread=spread,
        healthy=health.good(machine) and spread <= UNRELIABLE,
        health=health,
        floor=floor_seconds(case, machine),
        # Of float32: nothing else is measured, and bfloat16 products have a higher one.
        peak=machine.peak if case.dtype == torch.float32 else None,
        healthy_limits=limits_are_good(machine),
    )


def largest_spread(timings: Mapping[str, Timing]) -> float:
    return max(timing.spread for timing in timings.values())
