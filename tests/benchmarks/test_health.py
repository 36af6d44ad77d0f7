"""Disturbed measurements are noticed, repeated, and marked."""

from __future__ import annotations

import hashlib
import threading
import time
import types
from dataclasses import replace

import pytest
from stand_ins import MACHINE, FakeProbe, fake_times, patience

import health
import report
import timing
from rnn_ext._bench import Case, Timing, interleave


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
