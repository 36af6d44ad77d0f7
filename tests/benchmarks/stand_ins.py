"""Machines, probes, cases and results that are made up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

import bars
import health
import peers
import roofline
import scan
from rnn_ext._bench import Case, Timing
from rows import BusyRow, Results, Row, Verdict

BENCHMARKS = Path(roofline.__file__).parent
KB = 1 << 10
MACHINE = roofline.Machine(
    threads=2,
    fma_one_thread=100e9,
    fma_all_threads=200e9,
    sgemm=150e9,
    handoff=100e-9,
    levels=(
        roofline.Level("L1", 32 * KB, 200e9, 400e9),
        roofline.Level("L2", 1024 * KB, 100e9, 200e9),
        roofline.Level("L3", 32 * KB * KB, 30e9, 60e9),
        roofline.Level("DRAM", math.inf, 10e9, 15e9),
    ),
)


class FakeProbe:
    """Answers with given multiply-add rates of the whole team, the last one for good."""

    def __init__(self, *rates: float, handoff: float = 1e-7) -> None:
        self.rates = list(rates)
        self.answer = handoff

    def fma(self, threads: int, element_bytes: int = 4, seconds: float = 0.02) -> float:
        return self.rates.pop(0) if len(self.rates) > 1 else self.rates[0]

    def read(self, threads: int, bytes_per_thread: int, seconds: float = 0.05) -> float:
        return threads * 1e15 / bytes_per_thread  # smaller buffers are faster, as they should be

    def handoff(self, seconds: float = 0.02) -> float:
        return self.answer


def patience(seconds: float = 100.0) -> health.Patience:
    """One that only counts."""
    return health.Patience(seconds, sleep=lambda _: None, clock=lambda: 0.0)


SMALL = Case("GRU", 1, 100, 64, 64)
LARGE = Case("GRU", 64, 50, 512, 512)
STEP = Case("GRU", 1, 1, 64, 64, "streaming", given_state=True)
TRAINING = replace(LARGE, mode="training")
HALF = replace(LARGE, dtype=torch.bfloat16)
BOTH_WAYS = replace(SMALL, bidirectional=True)
SCANNED = Case("LSTM", 1, scan.STEPS, 1, 1)
PEAK = (100, 100)
LINE = {(16, 1): 1e-4, (33, 1): 2e-4, (50, 1): 3e-4}
GOOD, BAD = health.Health(1.0, 1e-7), health.Health(0.5, 4e-3)


def row(
    case: Case, ratio: float = 3.0, healthy: bool = True, ours: float = 1e-3, **others: float
) -> Row:
    """Ours takes a millisecond, torch.nn `ratio` times that, and others what is said of them."""
    times = {peers.BASELINE: ratio * ours, peers.OURS: ours, **others}
    state = GOOD if healthy else BAD
    return Row(case, times, 0.02, healthy, state, floor=0.8 * ours, peak=1.2 * case.flops / ours)


def fake_times(**seconds: float):
    """A stand-in for interleave that counts how often it was called. Others take 1 ms."""

    def measure_times(sides, rounds=7, min_sample=5e-3):
        measure_times.calls += 1
        return {name: Timing((seconds.get(name, 1e-3),) * rounds) for name in sides}

    measure_times.calls = 0
    return measure_times


def half_row(single: float, **settings) -> Row:
    return row(HALF, settings.pop("ratio", 2.0), **settings, **{peers.SINGLE_PRECISION: single})


def both_ways(in_turn: float, healthy: bool = True) -> Row:
    return row(BOTH_WAYS, healthy=healthy, **{peers.TWO_DIRECTIONS_IN_TURN: in_turn})


def step_row(ours: float, ratio: float, healthy: bool = True) -> Row:
    return row(STEP, ratio, healthy, ours)


def busy_row(ours: float, theirs: float, healthy: bool = True) -> BusyRow:
    return BusyRow(SMALL, 1e-3, ours, theirs, healthy)


def verdict_on(bar: str, results: Results) -> Verdict:
    (verdict,) = [found for found in bars.judge(results) if found.bar.startswith(bar)]
    return verdict


def smooth(hidden_size: int, batch: int) -> float:
    """Seconds of a program without cliffs: a call, the weights once, the arithmetic."""
    return 1e-5 + 1e-9 * hidden_size**2 * (1 + 0.2 * batch)
