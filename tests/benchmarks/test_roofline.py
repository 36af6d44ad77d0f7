"""The floor, and the machine's limits that it is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stand_ins import KB, MACHINE, FakeProbe, patience

import health
import peers
import probe
import report
import roofline
from rnn_ext._bench import Case
from rows import Row


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
