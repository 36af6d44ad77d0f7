"""The benchmark harness, on stand-ins: no test here depends on how fast anything is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rnn_ext
from rnn_ext._bench import Case, Timing, Workload, compare, interleave

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other by their plain names

import avx2  # noqa: E402
import bars  # noqa: E402
import cases  # noqa: E402
import compiled  # noqa: E402
import disturbed  # noqa: E402
import health  # noqa: E402
import heatmap  # noqa: E402
import memory  # noqa: E402
import onnx_weights  # noqa: E402
import peers  # noqa: E402
import probe  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import scan  # noqa: E402
import timing  # noqa: E402
from rows import (  # noqa: E402
    BusyRow,
    Growth,
    MemoryRow,
    Results,
    Row,
    Scan,
    StolenRow,
    Verdict,
    case_from_json,
    case_to_json,
)

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


@pytest.fixture
def keep_threads() -> Iterator[None]:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


# cases


def test_the_whole_grid_is_selected():
    selected = cases.grid()
    assert len(selected) == 10 * 3 * 2
    assert len(set(selected)) == len(selected)
    assert {case.mode for case in selected} == {"inference", "training"}


def test_selection_by_cell_and_batch():
    selected = cases.grid(("GRU",), max_batch=16)
    assert {case.cell for case in selected} == {"GRU"}
    assert len(selected) == 5 * 2
    assert max(case.batch for case in selected) == 16


def test_streaming_steps_have_bars():
    assert [case.label for case in cases.streaming(("LSTM",))] == [
        "LSTM B1 T1 I64 H64 streaming",
        "LSTM B1 T1 I128 H128 streaming 2 layers",
        "LSTM B8 T1 I256 H256 streaming",
    ]
    assert set(cases.STREAMING) == set(bars.STREAMING_SECONDS)
    assert all(case.given_state for case in cases.streaming())
    assert len(cases.streaming(max_batch=1)) == 6


def test_variants_of_the_grid():
    grid = cases.grid(("RNN",))
    assert {case.dtype for case in cases.half_precision(grid)} == {torch.bfloat16}
    both = cases.bidirectional(grid)
    assert len(both) == 4 * 2
    assert all(case.bidirectional and case.batch == 1 for case in both)


# peers and the check before the time


def test_peers_share_weights_and_inputs():
    case = Case("GRU", 2, 3, 4, 5, "training")
    sides = peers.build_all(case, peers.PEERS)
    assert list(sides) == [peers.BASELINE, peers.OURS]
    timing.check(case, sides)


def spoiled(case: Case, reference: nn.RNNBase) -> Workload:
    module = peers.build_ours(case, reference).module
    with torch.no_grad():
        module.weight_hh_l0 += 1e-3
    return Workload(case, module)


@pytest.mark.parametrize("who", [peers.OURS, "onnxruntime"])
def test_a_wrong_result_is_not_timed(who):
    measure_times = fake_times()
    sides = {**peers.PEERS, who: spoiled}
    message = rf"GRU B2 T3 I4 H5 inference: {who}: output: relative"
    with pytest.raises(timing.WrongResult, match=message):
        timing.time_case(
            Case("GRU", 2, 3, 4, 5),
            MACHINE,
            FakeProbe(200e9),
            patience(),
            sides,
            measure_times=measure_times,
        )
    assert measure_times.calls == 0


def test_time_case():
    case = Case("GRU", 2, 3, 4, 5, "training")
    measured = timing.time_case(
        case,
        MACHINE,
        FakeProbe(200e9),
        patience(),
        measure_times=fake_times(**{peers.BASELINE: 6e-3, peers.OURS: 2e-3}),
    )
    assert measured.ratio == pytest.approx(3.0)
    assert measured.floor == roofline.floor_seconds(case, MACHINE)
    assert measured.peak == MACHINE.peak
    assert measured.healthy_limits
    assert measured.healthy
    assert measured.health == health.Health(1.0, 1e-7)
    assert measured.spread == 0.0


def test_no_share_of_a_peak_that_is_not_measured():
    case = Case("GRU", 2, 3, 4, 5, dtype=torch.bfloat16)
    measured = timing.time_case(
        case, MACHINE, FakeProbe(200e9), patience(), measure_times=fake_times()
    )
    assert (measured.peak_share, measured.share) == (None, None)
    assert report.format_row(measured)


def test_best_peer_is_neither_ours_nor_a_yardstick():
    measured = row(SMALL, 3.0, **{"onnxruntime": 2e-3, peers.TRAINING_FORWARD: 1e-4})
    assert measured.best_peer == "onnxruntime"
    assert measured.best_ratio == pytest.approx(2.0)
    assert row(SMALL, 3.0).best_peer == peers.BASELINE


@pytest.mark.parametrize(
    ("case", "yardstick"),
    [
        (Case("LSTM", 32, 2, 3, 4, "training"), peers.TRAINING_FORWARD),
        (Case("LSTM", 2, 2, 3, 4, dtype=torch.bfloat16), peers.SINGLE_PRECISION),
        (Case("LSTM", 2, 2, 3, 4, bidirectional=True), peers.TWO_DIRECTIONS_IN_TURN),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else "",
)
def test_yardsticks_are_ours_in_another_setting(case, yardstick):
    assert list(peers.yardsticks(case)) == [yardstick]
    sides = peers.build_all(case, {**peers.PEERS, **peers.yardsticks(case)})
    with case.context():
        produced, ours = sides[yardstick](), sides[peers.OURS]()
    if yardstick == peers.TRAINING_FORWARD:
        assert produced[0].requires_grad
        assert torch.equal(produced[0], ours[0])
        assert all(parameter.grad is None for parameter in sides[yardstick].parameters)
    elif yardstick == peers.SINGLE_PRECISION:
        assert produced[0].dtype == torch.float32
        # The same weights and inputs, not the same precision: bfloat16 has 8 bits, over all steps.
        torch.testing.assert_close(produced[0], ours[0].float(), rtol=0.1, atol=0.02)
    else:
        assert torch.equal(produced[0], ours[0][:, :, :4])  # forward; backward, on x not turned
        turned = Workload(case, sides[peers.OURS].module)
        turned.input = turned.input.flip(0)
        with case.context():
            assert torch.equal(produced[3].flip(0), turned()[0][:, :, 4:])


def test_no_yardstick_where_no_bar_needs_one():
    assert peers.yardsticks(Case("LSTM", 32, 2, 3, 4)) == {}
    assert peers.yardsticks(Case("LSTM", 16, 2, 3, 4, "training")) == {}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def onnx_operator(cell: str, x, W, R, B, h, c):
    """The ONNX specification's equations of one operator, one direction; GRU with
    linear_before_reset = 1. Written from the operators' documentation, in float64.
    """
    W, R, B = W[0].astype(np.float64), R[0].astype(np.float64), B[0].astype(np.float64)
    Wb, Rb = np.split(B, 2)
    outputs = []
    for x_t in x:
        from_x, from_h = x_t @ W.T + Wb, h @ R.T + Rb
        if cell == "RNN":
            h = np.tanh(from_x + from_h)
        elif cell == "LSTM":
            i, o, f, g = np.split(from_x + from_h, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (x_z, x_r, x_h), (h_z, h_r, h_h) = np.split(from_x, 3, 1), np.split(from_h, 3, 1)
            z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
            h = (1 - z) * np.tanh(x_h + r * h_h) + z * h
        outputs.append(h)
    return np.stack(outputs), h, c


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_onnx_gate_order(cell):
    case = Case(cell, 2, 3, 4, 5, "streaming", num_layers=2, given_state=True, dtype=torch.float64)
    module = case.build_module(nn)
    work = Workload(case, module)
    sequence = work.input.numpy()
    for layer in range(2):
        h, *c = (state[layer].numpy() for state in work.initial_state)
        weights = onnx_weights.onnx_weights(cell, module, layer)
        assert list(weights) == ["W", "R", "B"]
        sequence, h_n, c_n = onnx_operator(cell, sequence, *weights.values(), h, *(c or [None]))
    output, *states = (tensor.detach().numpy() for tensor in work())
    # float64 on both sides: a gate in the wrong place is off by far more than roundings are.
    np.testing.assert_allclose(sequence, output, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(h_n, states[0][1], rtol=1e-12, atol=1e-14)
    if cell == "LSTM":
        np.testing.assert_allclose(c_n, states[1][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("rival", peers.USUAL_RIVALS)
@pytest.mark.parametrize(
    "sizes",
    [{"steps": 6}, {"steps": 1, "mode": "streaming", "given_state": True, "num_layers": 2}],
    ids=["sequence", "two layers, one step"],
)
def test_rivals_compute_the_same(cell, rival, sizes):
    rival = peers.RIVALS[rival]
    if not rival.installed:
        pytest.skip(f"{rival.name} is not installed (requirements-bench.txt)")
    case = Case(cell, batch=3, input_size=5, hidden_size=7, **sizes)
    assert rival.has(case)
    timing.check(case, peers.build_all(case, {**peers.PEERS, rival.name: rival.build}))


def test_rivals_are_asked_only_for_what_they_have():
    assert all(rival.has(STEP) for rival in peers.RIVALS.values())
    assert not any(
        rival.has(replace(STEP, dtype=torch.bfloat16)) for rival in peers.RIVALS.values()
    )
    having = {key for key, rival in peers.RIVALS.items() if rival.has(replace(SMALL, steps=50))}
    assert having == {"ort", "openvino", "compile"}
    training = replace(SMALL, steps=50, mode="training")
    assert {key for key, rival in peers.RIVALS.items() if rival.has(training)} == {"compile"}
    assert not peers.RIVALS["compile"].has(SMALL)  # 100 steps


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_the_loop_that_is_compiled(cell, monkeypatch):
    """As plain Python: what inductor makes of it is checked before it is timed."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for mode in ("streaming", "training"):
        case = Case(cell, 2, 3, 4, 5, mode, given_state=True)
        sides = peers.build_all(case, {peers.BASELINE: Workload, "loop": compiled.Compiled})
        deviations = compare(case, sides["loop"], sides[peers.BASELINE])
        assert all(deviation.within for deviation in deviations)


# health


@pytest.mark.parametrize(
    ("rates", "calls", "healthy"),
    [
        ([200e9], 1, True),
        ([100e9, 200e9], 1, True),  # a core was away before, and was waited for
        ([200e9, 100e9, 200e9], 2, True),  # a core went away meanwhile: once more
        ([100e9], health.ATTEMPTS, False),
    ],
)
def test_an_unhealthy_row_is_repeated_and_marked(rates, calls, healthy):
    measure_times = fake_times()
    measured = timing.time_case(
        Case("RNN", 2, 3, 4, 5),
        MACHINE,
        FakeProbe(*rates),
        patience(),
        measure_times=measure_times,
    )
    assert measure_times.calls == calls
    assert measured.healthy == healthy
    assert report.format_row(measured).endswith("unhealthy") != healthy


@pytest.mark.parametrize(("last", "healthy"), [(1.3e-3, True), (3e-3, False)])
def test_a_row_disturbed_between_the_checks_is_unhealthy(last, healthy):
    def measure_times(sides, rounds, min_sample):
        return {name: Timing((1e-3, 1e-3, 1e-3, last, last)) for name in sides}

    measured = timing.time_case(
        Case("RNN", 2, 3, 4, 5),
        MACHINE,
        FakeProbe(200e9),
        patience(),
        measure_times=measure_times,
    )
    assert measured.healthy == healthy


def test_own_threads_that_still_spin_are_not_mistaken_for_others(monkeypatch):
    asked = []
    monkeypatch.setattr(health, "wait_for_idle_threads", lambda: asked.append("idle"))

    class Probe(FakeProbe):
        def fma(self, *arguments, **options):
            asked.append("cores")
            return super().fma(*arguments, **options)

    health.check_health(Probe(200e9), MACHINE)
    assert asked == ["idle", "cores"]


def test_a_slow_answer_is_unhealthy():
    assert health.check_health(FakeProbe(200e9), MACHINE).good(MACHINE)
    late = health.check_health(FakeProbe(200e9, handoff=1e-3), MACHINE)
    assert not late.good(MACHINE)
    assert late.good(replace(MACHINE, threads=1, fma_one_thread=200e9))  # there is no other core


def undisturbed(results: list[float], rates: list[float], seconds: float = 100.0) -> float:
    """Which of the results, given as their spreads, is kept."""
    kept, _ = health.undisturbed(
        lambda: results.pop(0), lambda spread: spread, FakeProbe(*rates), MACHINE, patience(seconds)
    )
    return kept


def test_the_steadiest_healthy_attempt_is_kept():
    assert undisturbed([0.9, 0.3, 0.5, 0.4], [200e9]) == 0.3
    assert undisturbed([0.9, 0.1], [200e9]) == 0.1  # steady: no need for more
    assert undisturbed([0.1, 0.9], [200e9, 100e9, 200e9], seconds=0.2) == 0.9  # then no patience


def test_the_healthiest_attempt_is_kept_if_none_is_healthy():
    checks_of_an_attempt = 1 + health.ATTEMPTS
    rates = [100e9] * (checks_of_an_attempt + 1) + [150e9] * (checks_of_an_attempt + 1) + [100e9]
    assert undisturbed([0.1, 0.3, 0.1, 0.1], rates) == 0.3


def test_without_patience_there_is_one_attempt():
    assert undisturbed([0.9], [100e9], seconds=0.0) == 0.9


def test_slow_repeats_use_patience_up():
    now = types.SimpleNamespace(seconds=0.0)
    calls = []

    def work() -> float:
        now.seconds += 60.0
        calls.append(now.seconds)
        return 0.0

    limited = health.Patience(100.0, sleep=lambda _: None, clock=lambda: now.seconds)
    health.undisturbed(work, lambda _: 0.0, FakeProbe(100e9), MACHINE, limited)
    assert len(calls) == 3  # the first is due in any case, after the third 100 seconds are over


def test_repeating_costs_patience():
    ticks = iter(range(100))
    left = health.Patience(10.0, sleep=lambda _: None, clock=lambda: float(next(ticks)))
    assert left.pause()
    assert left.spend(lambda: "result") == "result"
    assert left.left == pytest.approx(10.0 - health.PAUSE - 1.0)
    left.left = 0.0
    assert not left.pause()


def test_every_side_begins_on_a_settled_machine():
    log: list[str] = []
    now = iter(range(1000))
    sides = {name: lambda name=name: log.append(name) for name in "ab"}
    interleave(
        sides,
        rounds=2,
        min_sample=0.5,
        clock=lambda: float(next(now)),
        settle=lambda: log.append("|"),
    )
    # A call and a calibration for each side, then the rounds.
    assert "".join(log) == "|aa|bb" + 2 * "|a|b"


def test_threads_that_spin_are_waited_for():
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            hashlib.sha256(bytes(1 << 20))  # without the interpreter's lock

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        seen = [health.running_threads() for _ in range(100)]
        assert max(seen) >= 1
        start = time.monotonic()
        health.wait_for_idle_threads(longest=0.05)  # it never is
        assert time.monotonic() - start >= 0.04
    finally:
        stop.set()
        thread.join()


def test_idle_threads_are_waited_for(monkeypatch):
    states = [2, 1, 0]
    naps = []
    monkeypatch.setattr(health, "running_threads", lambda: states.pop(0))
    monkeypatch.setattr(health.time, "sleep", naps.append)
    health.wait_for_idle_threads(longest=1000.0)
    assert not states
    assert len(naps) == 2


# roofline


def test_floor_is_bound_by_flops_for_large_batches():
    case = Case("LSTM", 64, 50, 512, 512)
    assert roofline.floor_seconds(case, MACHINE) == pytest.approx(case.flops / 200e9)


def test_floor_is_bound_by_weight_reads_for_one_row():
    case = Case("LSTM", 1, 100, 512, 512)  # W_hh is 4 MiB: L3, and half of it still is
    reads = 100 * 4 * 4 * 512 * 512
    assert roofline.floor_seconds(case, MACHINE) == pytest.approx(reads / 60e9 + 100 * 100e-9)
    training = replace(case, mode="training")
    assert roofline.floor_seconds(training, MACHINE) == pytest.approx(
        2 * (reads / 60e9 + 100 * 100e-9)
    )


def test_floor_of_a_tiny_layer_is_one_thread():
    case = Case("RNN", 1, 100, 4, 64)  # sharing it would cost 100 waits
    assert roofline.floor_seconds(case, MACHINE) == pytest.approx(
        max(case.flops / 100e9, 100 * 4 * 64 * 64 / 200e9)
    )


def test_floor_of_two_rows_needs_no_waits():
    case = Case("RNN", 2, 1000, 4, 64)
    assert roofline.floor_seconds(case, MACHINE) == pytest.approx(case.flops / 200e9)


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 2}, {"bidirectional": True}, {"proj_size": 2}, {"dtype": torch.bfloat16}],
)
def test_no_floor_is_made_up(changes):
    case = replace(Case("LSTM", 1, 2, 3, 4), **changes)
    assert roofline.floor_seconds(case, MACHINE) is None
    assert Row(case, {peers.OURS: 1.0}, 0.0, True, floor=None).share is None


@pytest.fixture
def small_machine(monkeypatch) -> None:
    monkeypatch.setattr(roofline, "best_sgemm", lambda attempts: 1e9)
    monkeypatch.setattr(roofline, "cache_sizes", lambda: [32 * KB, 1024 * KB, 32768 * KB])


@pytest.mark.usefixtures("small_machine")
def test_measure_takes_the_best_of_several():
    machine = roofline.measure(FakeProbe(1e9, 3e9, 2e9), threads=2, attempts=2)
    assert machine.fma_one_thread == 3e9
    assert [level.name for level in machine.levels] == ["L1", "L2", "L3", "DRAM"]
    rates = [level.one_thread for level in machine.levels]
    assert rates == sorted(rates, reverse=True)
    assert machine.level_of(1e12).name == "DRAM"
    assert machine.peak == max(machine.fma_all_threads, machine.sgemm)


@pytest.mark.usefixtures("small_machine")
def test_one_core_can_do_its_part_of_what_all_did():
    assert roofline.measure(FakeProbe(1e9, 8e9), threads=2, attempts=1).fma_one_thread == 4e9


@pytest.mark.usefixtures("small_machine")
def test_limits_are_measured_again_while_a_core_is_away():
    # One thread, all threads: first with half of the cores, then with all.
    rates = FakeProbe(2e9, 2e9, 1e9, 4e9)
    machine = health.measure_limits(rates, threads=2, attempts=1, patience=patience())
    assert (machine.fma_one_thread, machine.fma_all_threads) == (2e9, 4e9)
    assert "a core was away" not in report.describe_machine(machine)
    away = FakeProbe(2e9)
    machine = health.measure_limits(away, threads=2, attempts=1, patience=patience())
    assert machine.fma_all_threads == 2e9  # not for ever
    assert "a core was away" in report.describe_machine(machine)


def test_best_of_two_machines():
    other = replace(
        MACHINE,
        fma_one_thread=90e9,
        handoff=50e-9,
        levels=tuple(replace(level, all_threads=1e9, one_thread=1e12) for level in MACHINE.levels),
    )
    best = MACHINE.best(other)
    assert best.fma_one_thread == 100e9
    assert best.handoff == 50e-9
    assert [level.all_threads for level in best.levels] == [
        level.all_threads for level in MACHINE.levels
    ]
    assert {level.one_thread for level in best.levels} == {1e12}


def test_cache_sizes_of_a_machine_that_reports_none(monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "CACHE_SIZES", tmp_path)
    assert roofline.cache_sizes() == [32 * KB, 1024 * KB, 32768 * KB]


def test_the_probe_measures_something():
    measured = probe.Probe()
    assert measured.fma(1, seconds=1e-3) > 0
    assert measured.fma(2, 8, seconds=1e-3) > 0
    assert measured.read(2, 16 * KB, seconds=1e-3) > 0
    assert measured.handoff(seconds=1e-3) > 0


def test_a_missing_compiler_is_explained(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no C compiler"):
        probe.Probe()


# bars

TRAINING = replace(LARGE, mode="training")
HALF = replace(LARGE, dtype=torch.bfloat16)
BOTH_WAYS = replace(SMALL, bidirectional=True)
PEAK = (100, 100)
LINE = {(16, 1): 1e-4, (33, 1): 2e-4, (50, 1): 3e-4}


def half_row(single: float, **settings) -> Row:
    return row(HALF, settings.pop("ratio", 2.0), **settings, **{peers.SINGLE_PRECISION: single})


def both_ways(in_turn: float, healthy: bool = True) -> Row:
    return row(BOTH_WAYS, healthy=healthy, **{peers.TWO_DIRECTIONS_IN_TURN: in_turn})


def step_row(ours: float, ratio: float, healthy: bool = True) -> Row:
    return row(STEP, ratio, healthy, ours)


def busy_row(ours: float, theirs: float, healthy: bool = True) -> BusyRow:
    return BusyRow(SMALL, 1e-3, ours, theirs, healthy)


# Each bar with a run that meets it and one that does not; `healthy` goes into what is measured.
BARS: dict[str, Callable[[bool, bool], Results]] = {
    "inference, every grid cell >= 1.0x the best peer": lambda met, healthy: Results(
        grid=[
            row(SMALL, 9.0, healthy),
            row(LARGE, 9.0, healthy, openvino=0.98e-3 - 2e-5 * (not met)),
        ]
    ),
    "training, every grid cell >= 1.0x torch.nn": lambda met, healthy: Results(
        grid=[row(TRAINING, 0.98 if met else 0.96, healthy)]
    ),
    "GRU inference, geometric mean against torch.nn >= 3.5x": lambda met, healthy: Results(
        grid=[row(SMALL, 2.0, healthy), row(LARGE, 7.0 if met else 6.0, healthy)]
    ),
    "LSTM inference, geometric mean against torch.nn >= 2.5x": lambda met, healthy: Results(
        grid=[row(replace(SMALL, cell="LSTM"), 2.6 if met else 2.4, healthy)]
    ),
    "RNN training, geometric mean against torch.nn >= 4.0x": lambda met, healthy: Results(
        grid=[row(replace(TRAINING, cell="RNN"), 4.1 if met else 3.9, healthy)]
    ),
    "LSTM training, geometric mean against torch.nn >= 2.0x": lambda met, healthy: Results(
        grid=[row(replace(TRAINING, cell="LSTM"), 2.1 if met else 1.9, healthy)]
    ),
    "inference, geometric mean against the best peer of each cell >= 1.6x": (
        lambda met, healthy: Results(
            grid=[row(SMALL, 9.0, healthy, onnxruntime=1.7e-3 if met else 1.5e-3)]
        )
    ),
    "share of the roofline, B = 1, H in 256..1024 >= 60%": lambda met, healthy: Results(
        grid=[
            replace(
                row(replace(SMALL, hidden_size=256), healthy=healthy),
                floor=6.1e-4 - 2e-5 * (not met),
            )
        ]
    ),
    "inference, share of the multiply-add peak, B >= 32, H >= 256 >= 80%": (
        lambda met, healthy: Results(
            grid=[
                replace(
                    row(LARGE, healthy=healthy), peak=LARGE.flops / 1e-3 / (0.81 - 0.02 * (not met))
                )
            ]
        )
    ),
    "training, share of the multiply-add peak, B >= 32, H >= 256 >= 75%": (
        lambda met, healthy: Results(
            grid=[
                replace(
                    row(TRAINING, healthy=healthy),
                    peak=TRAINING.flops / 1e-3 / (0.76 - 0.02 * (not met)),
                )
            ]
        )
    ),
    "backward / forward of training, B >= 32 <= 2.3": lambda met, healthy: Results(
        grid=[
            row(TRAINING, healthy=healthy, **{peers.TRAINING_FORWARD: 1e-3 / (3.2 if met else 3.4)})
        ]
    ),
    "streaming step B1 H64 <= 12 µs": lambda met, healthy: Results(
        streaming=[step_row(11.9e-6 if met else 12.1e-6, 5.0, healthy)]
    ),
    "streaming step B1 H64 <= 1/4 of torch.nn's time": lambda met, healthy: Results(
        streaming=[step_row(1e-6, 4.1 if met else 3.9, healthy)]
    ),
    "bfloat16 inference, geometric mean against torch.nn's >= 1.5x": lambda met, healthy: Results(
        half=[half_row(2e-3, ratio=1.6 if met else 1.4, healthy=healthy)]
    ),
    "bfloat16 against our own float32, B >= 16, geometric mean >= 1.8x": (
        lambda met, healthy: Results(half=[half_row(1.9e-3 if met else 1.7e-3, healthy=healthy)])
    ),
    "bidirectional layer, B = 1, of two single directions' time one after the other <= 0.65": (
        lambda met, healthy: Results(
            bidirectional=[both_ways(1e-3 / (0.64 if met else 0.66), healthy)]
        )
    ),
    "no cliff: time per flop over the mean of the neighbors (H±17, B±3) <= 1.4x": (
        lambda met, healthy: Results(
            scans=[Scan(SMALL, LINE, {(33, 1): 1.3 if met else 1.5}, {(33, 1): healthy})]
        )
    ),
    "linear in T up to 20,000: time per step over that of the shortest <= 1.4x": (
        lambda met, healthy: Results(
            growths=[Growth(SMALL, {10: 1e-3, 100: 1.3e-2 if met else 1.5e-2}, healthy)]
        )
    ),
    "busy neighbor on each core: slowdown <= 2.5x": lambda met, healthy: Results(
        busy=[busy_row(2.4e-3 if met else 2.6e-3, 1.0, healthy)]
    ),
    "busy neighbor on each core: never behind torch.nn": lambda met, healthy: Results(
        busy=[busy_row(2e-3, 2.1e-3 if met else 1.9e-3, healthy)]
    ),
    "stolen core: time <= 1.3x of our own on one thread": lambda met, healthy: Results(
        stolen=[StolenRow(SMALL, 1e-3, 1.2e-3 if met else 1.4e-3, healthy)]
    ),
    "forced AVX2 against torch.nn limited to AVX2, geometric mean >= 1.5x": (
        lambda met, healthy: Results(avx2=[row(SMALL, 1.6 if met else 1.4, healthy)])
    ),
}


def verdict_on(bar: str, results: Results) -> Verdict:
    (verdict,) = [found for found in bars.judge(results) if found.bar.startswith(bar)]
    return verdict


@pytest.mark.parametrize("bar", BARS)
def test_bars(bar):
    measure = BARS[bar]
    assert verdict_on(bar, measure(True, True)).status == "ok"
    assert verdict_on(bar, measure(False, True)).status == "falls short"
    assert verdict_on(bar, measure(True, False)).status == "no verdict"
    assert verdict_on(bar, measure(False, False)).status == "no verdict"


@pytest.mark.parametrize(
    ("bar", "ratio", "beside_outputs", "status"),
    [
        ("training peak memory <= torch.nn's", 0.99, None, "ok"),
        ("training peak memory <= torch.nn's", 1.01, None, "falls short"),
        ("inference peak memory <= inputs + outputs + 8 MB", None, 7_900_000, "ok"),
        ("inference peak memory <= inputs + outputs + 8 MB", None, 8_100_000, "falls short"),
    ],
)
def test_memory_bars(bar, ratio, beside_outputs, status):
    measured = MemoryRow(SMALL, PEAK, PEAK, ratio, beside_outputs)
    found = bars.judge(Results(memory=[measured]))
    assert [(verdict.bar, verdict.status) for verdict in found] == [(bar, status)]


def test_every_bar_of_the_issue_is_tried():
    """A run of everything gives each bar once."""
    everything = [measure(True, True) for measure in BARS.values()]
    merged = Results(memory=[MemoryRow(SMALL, PEAK, PEAK, 0.9, 1)])
    for results in everything:
        for name in ("grid", "streaming", "half", "bidirectional", "scans", "growths"):
            getattr(merged, name).extend(getattr(results, name))
        for name in ("busy", "stolen", "avx2"):
            getattr(merged, name).extend(getattr(results, name))
    found = [verdict.bar for verdict in bars.judge(merged)]
    assert len(found) == len(set(found))
    assert {bar for bar in BARS if not any(name.startswith(bar) for name in found)} == set()


def test_one_healthy_figure_beyond_a_bar_decides_it():
    rows = [row(TRAINING, 0.5, healthy=False), row(TRAINING, 0.9), row(TRAINING, 2.0)]
    verdict = verdict_on("training, every grid cell", Results(grid=rows))
    assert verdict.status == "falls short"
    assert "worst 0.90x" in verdict.figure
    assert "beyond the bar: 2 of 3" in verdict.figure


def test_shares_of_unhealthy_limits_decide_nothing():
    case = replace(LARGE, batch=1)
    rows = [replace(row(found, 9.0), healthy_limits=False) for found in (case, LARGE)]
    by_bar = {verdict.bar: verdict.status for verdict in bars.judge(Results(grid=rows))}
    assert [state for bar, state in by_bar.items() if "share" in bar] == ["no verdict"] * 2
    assert [state for bar, state in by_bar.items() if "share" not in bar] == ["ok"] * 3


def test_a_missing_peer_leaves_its_bars_open():
    bar = "inference, every grid cell"
    verdict = verdict_on(bar, Results(grid=[row(SMALL, 9.0)], absent=["onnxruntime"]))
    assert verdict.status == "no verdict"
    assert verdict.figure.endswith("without onnxruntime")
    behind = Results(grid=[row(SMALL, 0.5)], absent=["onnxruntime"])
    assert verdict_on(bar, behind).status == "falls short"  # with any more peers too


def test_bars_look_only_at_their_own_cases():
    small = bars.judge(Results(grid=[row(SMALL, 9.0)]))
    assert not [verdict for verdict in small if "share" in verdict.bar or "LSTM" in verdict.bar]
    assert bars.judge(Results()) == []
    one_row = replace(HALF, batch=1)
    found = bars.judge(Results(half=[row(one_row, **{peers.SINGLE_PRECISION: 1.0})]))
    assert not [verdict for verdict in found if "own float32" in verdict.bar]


def test_summary_names_the_worst():
    lines = bars.summary([row(SMALL, 2.0), row(replace(SMALL, batch=4), 8.0), row(LARGE, 0.5)])
    assert len(lines) == 1
    assert "B <= 16:  4.00x" in lines[0]
    assert "all:  2.00x" in lines[0]
    assert lines[0].endswith("worst:  0.50x at B64 T50 I512 H512")
    assert bars.summary([row(SMALL, healthy=False)])[0].endswith("unhealthy")
    assert "best peer:  1.50x" in bars.summary([row(SMALL, 3.0, openvino=1.5e-3)])[0]


# scan


def smooth(hidden_size: int, batch: int) -> float:
    """Seconds of a program without cliffs: a call, the weights once, the arithmetic."""
    return 1e-5 + 1e-9 * hidden_size**2 * (1 + 0.2 * batch)


def surface(time_of: Callable[[int, int], float]) -> dict[tuple[int, int], float]:
    return {
        (hidden_size, batch): time_of(hidden_size, batch)
        for hidden_size in scan.HIDDEN_SIZES[:20]
        for batch in scan.BATCHES[:12]
    }


SCANNED = Case("LSTM", 1, scan.STEPS, 1, 1)


def test_no_cliff_on_a_smooth_surface():
    ratios = scan.cliff_ratios(SCANNED, surface(smooth))
    assert max(ratios.values()) < 1.1
    corners = 4
    assert len(ratios) == 20 * 12 - corners


def test_a_cliff_is_found():
    seconds = surface(smooth)
    place = (scan.HIDDEN_SIZES[5], scan.BATCHES[6])
    seconds[place] *= 2
    ratios = scan.cliff_ratios(SCANNED, seconds)
    assert max(ratios, key=ratios.__getitem__) == place
    assert ratios[place] > 1.8


def test_scan_covers_what_the_issue_asks_for():
    assert (scan.HIDDEN_SIZES[0], scan.BATCHES[0]) == (16, 1)
    assert scan.HIDDEN_SIZES[-1] + scan.HIDDEN_STEP > 1100
    assert scan.BATCHES[-1] + scan.BATCH_STEP > 130
    assert max(scan.GROWTH_STEPS) == 20_000


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("rate", [200e9, 100e9])
def test_a_suspect_is_looked_at_again(monkeypatch, stays, rate):
    place = (scan.HIDDEN_SIZES[2], scan.BATCHES[2])
    looks: list[list[tuple[int, int]]] = []

    def time_points(case, points, calls):
        looks.append(list(points))
        slow = stays or len(looks) <= 5  # for all lines, and never again
        return {point: smooth(*point) * (3 if point == place and slow else 1) for point in points}

    monkeypatch.setattr(scan, "time_points", time_points)
    found = scan.scan(
        SCANNED,
        MACHINE,
        FakeProbe(rate),
        patience(0.0),
        scan.HIDDEN_SIZES[:5],
        scan.BATCHES[:5],
    )
    around = [place, *scan.neighbors(place, found.seconds)]
    assert looks[5:] == [sorted(around)] * (scan.LOOKS if stays else 1)
    beyond = [point for point, ratio in found.ratios.items() if ratio > bars.CLIFF]
    assert beyond == ([place] if stays else [])
    assert set(found.healthy.values()) == {rate == 200e9}


def test_a_cliff_once_seen_on_a_healthy_machine_is_one(monkeypatch):
    place = (scan.HIDDEN_SIZES[2], scan.BATCHES[2])
    monkeypatch.setattr(
        scan,
        "time_points",
        lambda case, points, calls: {
            point: smooth(*point) * (3 if point == place else 1) for point in points
        },
    )
    lines = [100e9, 100e9] * 5  # unhealthy before and after each; no patience to repeat
    found = scan.scan(
        SCANNED,
        MACHINE,
        FakeProbe(*lines, 200e9),
        patience(0.0),
        scan.HIDDEN_SIZES[:5],
        scan.BATCHES[:5],
    )
    assert [point for point, healthy in found.healthy.items() if healthy] == [place]
    assert verdict_on("no cliff", Results(scans=[found])).status == "falls short"


def test_points_are_timed_with_one_module_for_each_size(monkeypatch):
    built = []
    monkeypatch.setattr(
        Case,
        "build_module",
        lambda case, namespace: built.append(case) or rnn_ext.LSTM(case.input_size, 16),
    )
    points = [(16, 1), (16, 4), (33, 1)]
    monkeypatch.setattr(scan, "fastest", lambda work, calls: float(work.input.shape[1]))
    # The stand-in has 16 hidden units whatever is asked, so the third point builds another one.
    assert scan.time_points(SCANNED, points, calls=2) == {(16, 1): 1.0, (16, 4): 4.0, (33, 1): 1.0}
    assert [case.hidden_size for case in built] == [16, 33]


def test_fastest_of_several_calls():
    now = types.SimpleNamespace(seconds=0.0)
    durations = iter([9.0, 3.0, 1.0, 2.0])  # the first call is not counted

    def work() -> None:
        now.seconds += next(durations)

    assert scan.fastest(work, calls=3, seconds=1.0, clock=lambda: now.seconds) == 1.0


def test_growth_of_a_real_call():
    case = Case("RNN", 1, 1, 4, 4)
    grown = scan.growth(case, MACHINE, FakeProbe(200e9), patience(), steps=(2, 4))
    assert set(grown.seconds) == {2, 4}
    assert grown.healthy
    assert grown.ratio(2) == 1.0
    assert Growth(case, {2: 1.0, 4: 3.0}, True).ratio(4) == pytest.approx(1.5)


def test_cases_of_the_scan_follow_the_cells_asked_for():
    assert [case.cell for case in scan.scanned_cases(("LSTM", "RNN"))] == ["LSTM"]
    assert {case.cell for case in scan.growth_cases(("RNN",))} == {"RNN"}


# disturbed


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_spinners_end_with_the_measurement(monkeypatch):
    started = []
    popen = subprocess.Popen

    def remember(*arguments, **keywords):
        started.append(popen(*arguments, **keywords))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    core = min(os.sched_getaffinity(0))

    def measure_and_fail() -> None:
        with disturbed.spinners([core]):
            (process,) = started
            assert is_running(process.pid)
            assert os.sched_getaffinity(process.pid) == {core}
            raise timing.WrongResult

    with pytest.raises(timing.WrongResult):
        measure_and_fail()
    assert not is_running(started[0].pid)


def test_a_spinner_does_not_outlive_its_parent():
    """Even one that was killed, and could not clean up."""
    script = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); import subprocess\n"
        "p = subprocess.Popen([sys.executable, '-I', '-S', sys.argv[1] + '/spinner.py',"
        " str(min(os.sched_getaffinity(0))), '0'], stdout=subprocess.PIPE,"
        " stderr=subprocess.DEVNULL, text=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(BENCHMARKS)], capture_output=True, text=True
    )
    spinner = int(done.stdout)
    for _ in range(200):
        if not is_running(spinner):
            return
        time.sleep(0.05)
    os.kill(spinner, 9)
    pytest.fail("the spinner went on without its parent")


def test_what_cannot_be_taken_away_is_said(monkeypatch, tmp_path):
    refused = tmp_path / "spinner.py"
    refused.write_text("print('Operation not permitted')\n")
    monkeypatch.setattr(disturbed, "SPINNER", refused)
    with (
        pytest.raises(disturbed.CannotDisturb, match="core 1 at nice -20: Operation not permitted"),
        disturbed.spinners([1], -20),
    ):
        pytest.fail("was not refused")


def test_time_busy(monkeypatch):
    spinning = []

    @contextlib.contextmanager
    def spinners(cores):
        spinning.append(cores)
        yield

    monkeypatch.setattr(disturbed, "spinners", spinners)
    case = Case("GRU", 2, 3, 4, 5)
    measured = disturbed.time_busy(
        case,
        MACHINE,
        FakeProbe(200e9),
        patience(),
        measure_times=fake_times(**{peers.BASELINE: 5e-3}),
    )
    assert measured == BusyRow(case, 1e-3, 1e-3, 5e-3, healthy=True)
    assert spinning == [sorted(os.sched_getaffinity(0))]


@pytest.mark.usefixtures("keep_threads")
def test_time_stolen(monkeypatch):
    cores = {0, 1}
    pinned: list[set[int]] = []
    taken = []

    @contextlib.contextmanager
    def spinners(cores, niceness):
        taken.append((cores, niceness))
        yield

    def measure_times(ways, rounds):
        for work in ways.values():
            work()
        return {"one thread": Timing((2e-3,) * 3), "all threads": Timing((3e-3,) * 3)}

    monkeypatch.setattr(disturbed, "spinners", spinners)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, chosen: pinned.append(chosen))
    torch.set_num_threads(2)
    case = Case("GRU", 2, 3, 4, 5)
    measured = disturbed.time_stolen(
        case, MACHINE, FakeProbe(200e9), patience(), measure_times=measure_times
    )
    assert measured.ratio == pytest.approx(1.5)
    assert taken == [([1], -20)]
    assert pinned == [{0}, {0, 1}, {0, 1}]  # one thread on the free core, all, and as it was before
    assert torch.get_num_threads() == 2


def test_a_single_core_cannot_be_stolen():
    with pytest.raises(disturbed.CannotDisturb, match="no second"):
        disturbed.time_stolen(SMALL, replace(MACHINE, threads=1), FakeProbe(1e9), patience())


# avx2


def avx2_run(monkeypatch, document: dict | None) -> dict[str, str]:
    """Runs time_limited with a stand-in for the report; what it was given as environment."""
    given: dict[str, str] = {}

    def run(command, env, check):
        given.update(env)
        if document is not None:
            out = command[command.index("--json") + 1]
            Path(out).write_text(json.dumps(document))
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    return given


def test_avx2_runs_in_a_limited_process(monkeypatch):
    entries = [row(STEP).to_json(), row(SMALL, 2.0, healthy=False).to_json()]
    given = avx2_run(monkeypatch, {"isa": "avx2", "rows": entries, "wrong": ["one"]})
    rows, wrong = avx2.time_limited(Path("report.py"), ["--quick"])
    assert {name: given[name] for name in avx2.LIMITED} == avx2.LIMITED
    (only,) = rows  # streaming steps are no part of the grid
    assert (only.case, only.healthy, wrong) == (SMALL, False, ["one"])
    assert only.ratio == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("document", "message"),
    [(None, "ended with 3"), ({"isa": "avx512", "rows": [], "wrong": []}, "used avx512")],
)
def test_avx2_run_that_failed(monkeypatch, document, message):
    avx2_run(monkeypatch, document)
    with pytest.raises(SystemExit, match=message):
        avx2.time_limited(Path("report.py"), [])


# memory


def test_memory_of_a_small_layer_is_measured_in_a_process_of_its_own():
    case = Case("GRU", 4, 6, 64, 64, "training")
    with memory.heap_counter() as counter:
        first, second = (memory.measure(case, peers.BASELINE, counter, threads=1) for _ in "ab")
    gradients = 4 * (2 * 3 * 64 * 64 + 2 * 3 * 64)
    assert first.heap > gradients
    assert first.resident > 0
    assert abs(first.heap - second.heap) < 64 * KB


def test_small_peaks_are_compared_by_heap_and_large_ones_by_both():
    small, large = memory.Peak(100, 50), memory.Peak(100 << 20, 50 << 20)
    assert memory.Peak(90, 1000).ratio(small) == pytest.approx(0.9)
    assert memory.Peak(90 << 20, 55 << 20).ratio(large) == pytest.approx(1.1)
    assert small.beside(30) == 70
    assert memory.Peak(10 << 20, 20 << 20).beside(5 << 20) == 15 << 20


def test_output_bytes():
    case = Case("LSTM", 2, 3, 4, 5, num_layers=2, bidirectional=True)
    module = case.build_module(nn)
    output, (h_n, c_n) = module(torch.zeros(3, 2, 4))
    assert memory.output_bytes(case) == sum(tensor.nbytes for tensor in (output, h_n, c_n))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_inference_is_not_compared_with_torch_nn(monkeypatch, tmp_path, mode):
    peaks = {peers.OURS: memory.Peak(1000, 10), peers.BASELINE: memory.Peak(2000, 20)}
    monkeypatch.setattr(memory, "measure", lambda case, peer, *_: peaks[peer])
    case = Case("RNN", 2, 3, 4, 5, mode)
    measured = memory.compare_peaks(case, tmp_path, threads=1)
    assert measured.ours == (1000, 10)
    if mode == "training":
        assert (measured.theirs, measured.ratio) == ((2000, 20), 0.5)
    else:
        assert measured.beside_outputs == 1000 - 4 * 2 * 5 * (3 + 1)
        assert measured.theirs is None


def test_unknown_memory_field():
    with pytest.raises(OSError, match="does not report VmNothing"):
        memory.status("VmNothing")


# report


@pytest.fixture
def quiet_report(monkeypatch):
    """report.main with the measuring replaced; returns how to run it on given results."""

    def run(measured: Results, *arguments: str) -> int:
        def measure_all(run, sections, results):
            for name, values in vars(measured).items():
                getattr(results, name).extend(values)
            return MACHINE

        monkeypatch.setattr(report, "measure_all", measure_all)
        return report.main([*arguments, "--threads", str(torch.get_num_threads())])

    return run


def everything(healthy: bool = True) -> Results:
    return Results(
        grid=[
            row(SMALL, 9.0, openvino=5e-3),
            row(TRAINING, 8.0, healthy, **{peers.TRAINING_FORWARD: 4e-4}),
        ],
        streaming=[step_row(1e-6, 5.0)],
        half=[half_row(2e-3)],
        bidirectional=[both_ways(2e-3)],
        memory=[
            MemoryRow(SMALL, PEAK, None, None, 60),
            MemoryRow(TRAINING, (99, 99), PEAK, 0.99, None),
        ],
        scans=[Scan(SCANNED, LINE, {(33, 1): 1.3}, dict.fromkeys(LINE, True))],
        growths=[Growth(SMALL, {10: 1e-3, 100: 1.3e-2}, True)],
        busy=[busy_row(2e-3, 3e-3)],
        stolen=[StolenRow(SMALL, 1e-3, 1.1e-3, True)],
        avx2=[row(SMALL, 2.0)],
        impossible=[Verdict("forced AVX-1024", "no such thing", "no verdict")],
    )


def test_report_writes_json_and_compares_with_it(quiet_report, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert quiet_report(everything(), "--json", str(old)) == 0
    document = json.loads(old.read_text())
    assert document["schema"] == report.JSON_SCHEMA
    labels = [entry["label"] for entry in document["rows"]]
    assert labels == [case.label for case in (STEP, SMALL, TRAINING, HALF, BOTH_WAYS)]
    first = document["rows"][1]
    assert (first["ratio"], first["best_peer"]) == (pytest.approx(9.0), "openvino")
    assert first["best_peer_ratio"] == pytest.approx(5.0)
    assert first["health"] == {"fma": 1.0, "handoff": 1e-7}
    assert first["case"]["dtype"] == "float32"
    assert document["machine"]["handoff"] == 100e-9
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["versions"]) >= {"onnxruntime", "openvino"}
    assert {len(document[part]) for part in ("scan", "growth", "busy", "stolen", "avx2")} == {1}
    assert len(document["memory"]) == 2
    assert {
        "bar": "forced AVX-1024",
        "figure": "no such thing",
        "status": "no verdict",
    } in document["bars"]

    slower = Results(grid=[row(SMALL, 6.0, ours=1.5e-3)])
    assert quiet_report(slower, "--compare", str(old), "--json", str(new)) == 0
    out = capsys.readouterr().out
    assert "(+50%), ratio 9.00x -> 6.00x  slower" in out


def test_compare_with_a_run_of_the_first_schema():
    entry = {"label": SMALL.label, "rnn_ext_seconds": 2e-3, "ratio": 2.0}
    (line,) = report.compare_with({"schema": 1, "rows": [entry]}, [row(SMALL, 4.0)])
    assert "(-50%), ratio 2.00x -> 4.00x  faster" in line


def test_compare_with_another_set_of_cases():
    assert report.compare_with({"rows": []}, [row(SMALL)]) == ["no case is in both runs"]


@pytest.mark.parametrize("case", [SMALL, HALF, BOTH_WAYS, STEP])
def test_cases_survive_json(case):
    assert case_from_json(json.loads(json.dumps(case_to_json(case)))) == case


def test_report_writes_markdown(quiet_report, tmp_path):
    quiet_report(everything(healthy=False), "--markdown", str(tmp_path / "new" / "tables.md"))
    text = (tmp_path / "new" / "tables.md").read_text(encoding="utf-8")
    for line in (
        "| GRU | 5.0x | 9.0x |  | 9.0x | 8.0x (unhealthy) | 5.0x | 8.00x (B64 T50",
        "| GRU B1 T100 I64 H64 inference | 9 | 5 | 1 | 9.00x | 5.00x | 2% |",
        "8.00x (unhealthy)",
        "| reads from L3, GB/s | 30 | 60 |",
        "| GRU B64 T50 I512 H512 training | 0.0 (0.0) | 0.0 (0.0) | 0.99 |  |",
        "| GRU B1 T100 I64 H64 inference bidirectional | 2 | 1 | 0.50 |",
        "| H33 B1 | 0.2 | 1.30 |",
        "| GRU B1 H64 inference | 100.00 | 130.00 | 1.30 |",
        "| GRU B1 T100 I64 H64 inference | 1 | 2 | 3 | 2.00x |",
        "| GRU B1 T100 I64 H64 inference | 1 | 1.1 | 1.10x |",
        "## AVX2",
        "| no verdict |",
    ):
        assert line in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_wrong_results_fail_the_report(quiet_report, capsys):
    assert quiet_report(Results(wrong=["GRU: output: off"])) == 1
    assert "1 cases gave WRONG RESULTS" in capsys.readouterr().out


def test_report_says_when_rows_are_unhealthy(quiet_report, capsys):
    quiet_report(Results(grid=[row(SMALL, healthy=False)], streaming=[row(STEP)]))
    assert "1 of 2 rows were measured while a core was away" in capsys.readouterr().out


def test_report_says_when_the_limits_cannot_be_right(quiet_report, capsys):
    quiet_report(Results(grid=[row(SMALL)]))
    assert "above 100%" not in capsys.readouterr().out
    quiet_report(Results(grid=[replace(row(SMALL), floor=1.1e-3)]))
    assert "above 100%" in capsys.readouterr().out


def test_report_says_who_is_absent(quiet_report, monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    quiet_report(Results(grid=[row(SMALL, 9.0)]))
    out = capsys.readouterr().out
    for name in ("onnxruntime", "openvino"):
        assert f"{name} is absent: pip install -r requirements-bench.txt" in out
    assert "torch.compile is absent" not in out
    assert re.search(
        r"no verdict +inference, every grid cell .* without onnxruntime, openvino", out
    )


def test_bars_can_be_left_out(quiet_report, capsys):
    quiet_report(everything(), "--no-bars")
    assert "bars" not in capsys.readouterr().out


def test_sections_run_in_their_order(monkeypatch):
    ran = []
    monkeypatch.setattr(
        report,
        "SECTIONS",
        {name: ("", lambda *_, name=name: ran.append(name)) for name in report.SECTIONS},
    )
    monkeypatch.setattr(report.Run, "machine", MACHINE)
    assert report.main(["--memory", "--grid", "--avx2"]) == 0
    assert ran == ["grid", "memory", "avx2"]
    ran.clear()
    report.main([])
    assert ran == list(report.SECTIONS)


@pytest.fixture
def fast_run(monkeypatch) -> report.Run:
    """A run whose every measurement is a stand-in."""
    monkeypatch.setattr(report.Run, "machine", MACHINE)
    monkeypatch.setattr(report.Run, "probe", FakeProbe(200e9))
    monkeypatch.setattr(timing, "measure_in_turn", fake_times())
    return report.Run(2, ("GRU",), None, True, 7, patience(), ())


def test_a_wrong_case_does_not_stop_the_others(fast_run, monkeypatch, capsys):
    def time_case(case, *_, **__):
        if case.training:
            raise timing.WrongResult(f"{case.label}: off")
        return row(case)

    monkeypatch.setattr(report, "time_case", time_case)
    results = Results()
    report.run_bidirectional(fast_run, results)
    assert [measured.case.mode for measured in results.bidirectional] == ["inference"]
    assert results.wrong == ["GRU B1 T100 I64 H64 training bidirectional: off"]
    assert "WRONG RESULT, not timed" in capsys.readouterr().out


def test_rivals_and_yardsticks_are_built_where_they_belong(fast_run, monkeypatch, capsys):
    asked = {}

    def time_case(case, machine, probe, patience, sides, **samples):
        asked[case.label] = list(sides)
        return row(case, **{name: 2e-3 for name in sides if name not in peers.PEERS})

    monkeypatch.setattr(report, "time_case", time_case)
    fast_run.rivals = (peers.RIVALS["ort"],)
    report.run_grid(fast_run, Results())
    report.run_half(fast_run, Results())
    assert asked["GRU B16 T50 I128 H128 inference"] == ["torch.nn", "rnn_ext", "onnxruntime"]
    assert asked["GRU B16 T50 I128 H128 training"] == ["torch.nn", "rnn_ext"]
    both = ["torch.nn", "rnn_ext", peers.SINGLE_PRECISION]
    assert asked["GRU B16 T50 I128 H128 training bfloat16"] == both
    out = capsys.readouterr().out
    assert "onnxruntime" in out
    assert f"{peers.SINGLE_PRECISION} 2.00 ms" in out


def test_disturbed_section(fast_run, monkeypatch, capsys):
    monkeypatch.setattr(disturbed, "time_busy", lambda case, *_: busy_row(2e-3, 3e-3))

    def refuse(*_):
        raise disturbed.CannotDisturb("core 1 at nice -20: Operation not permitted")

    monkeypatch.setattr(disturbed, "time_stolen", refuse)
    results = Results()
    report.run_disturbed(fast_run, results)
    assert [measured.slowdown for measured in results.busy] == [2.0, 2.0]  # both modes
    (verdict,) = results.impossible
    assert (verdict.bar, verdict.status) == ("stolen core", "no verdict")
    assert "not measured: core 1 at nice -20" in capsys.readouterr().out


def test_avx2_section(fast_run, monkeypatch):
    monkeypatch.setattr(
        avx2, "time_limited", lambda path, options: ([row(SMALL)], ["x " + options[1]])
    )
    monkeypatch.setattr(rnn_ext._C, "cpu_info", lambda: {"available": ["avx2"]})
    results = Results()
    report.run_avx2(fast_run, results)
    assert len(results.avx2) == 1
    assert results.wrong == ["limited to AVX2: x 2"]
    monkeypatch.setattr(rnn_ext._C, "cpu_info", lambda: {"available": ["scalar"]})
    report.run_avx2(fast_run, results)
    assert results.impossible[0].status == "no verdict"


def test_scan_section(fast_run, monkeypatch, capsys):
    monkeypatch.setattr(
        scan, "time_points", lambda case, points, calls: {p: smooth(*p) for p in points}
    )
    results = Results()
    report.run_scan(fast_run, results)
    assert [found.case.mode for found in results.scans] == ["training"]  # GRU's
    assert len(results.scans[0].seconds) == 16
    assert [growth.case.mode for growth in results.growths] == ["inference", "training"]
    assert "over its neighbors" in capsys.readouterr().out


@pytest.mark.parametrize("selected", [cases.grid(), [STEP], [SMALL]], ids=["all", "step", "one"])
@pytest.mark.parametrize("others", [{}, {"openvino": 5e-3}], ids=["torch.nn", "best peer"])
def test_heat_map_is_drawn(tmp_path, selected, others):
    picture = tmp_path / "heat.png"
    rows = [row(case, 1 + i, healthy=i % 2 == 0, **others) for i, case in enumerate(selected)]
    heatmap.heat_map(rows, picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_heat_map_has_a_place_for_every_row():
    rows = [row(SMALL, 2.0), row(replace(SMALL, mode="training"), 4.0, healthy=False), row(STEP)]
    lines, columns = [("GRU", "inference"), ("GRU", "training")], ["one step\nB1 H64", SMALL.shape]
    grid, unhealthy = heatmap.ratio_grid(rows, lambda found: found.ratio, lines, columns)
    torch.testing.assert_close(grid, torch.tensor([[3.0, 2.0], [math.nan, 4.0]]), equal_nan=True)
    assert unhealthy.tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "GRU,ELMAN"], "unknown cells ELMAN"),
        (["--peers", "nn,cntk"], "unknown peers cntk; there are nn, ort, openvino, compile"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--rounds", "3"], "--rounds must be at least 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_one_real_quick_run(tmp_path):
    """Part of the report on the smallest cases, as CI runs it."""
    out = tmp_path / "quick.json"
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--quick", "--grid", "--cells", "RNN"]
    command += ["--max-batch", "1", "--patience", "0", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a quick run: figures are not to be quoted" in done.stdout
    document = json.loads(out.read_text())
    assert [entry["label"] for entry in document["rows"]] == [
        "RNN B1 T1 I64 H64 streaming",
        "RNN B1 T1 I128 H128 streaming 2 layers",
        "RNN B1 T100 I64 H64 inference",
        "RNN B1 T100 I64 H64 training",
    ]
    assert document["wrong"] == []
