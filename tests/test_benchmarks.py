"""The benchmark harness, on stand-ins: no test here depends on how fast anything is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rnn_ext._bench import Case, Timing, Workload

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other by their plain names

import bars  # noqa: E402
import cases  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import probe  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402

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

    def __init__(self, *rates: float) -> None:
        self.rates = list(rates)

    def fma(self, threads: int, element_bytes: int = 4, seconds: float = 0.02) -> float:
        return self.rates.pop(0) if len(self.rates) > 1 else self.rates[0]

    def read(self, threads: int, bytes_per_thread: int, seconds: float = 0.05) -> float:
        return threads * 1e15 / bytes_per_thread  # smaller buffers are faster, as they should be

    def handoff(self, seconds: float = 0.02) -> float:
        return 1e-7


def row(case: Case, ratio: float = 3.0, healthy: bool = True) -> bars.Row:
    return bars.Row(case, ratio * 1e-3, 1e-3, spread=0.02, floor=4e-4, healthy=healthy)


def fake_times(theirs: float, ours: float):
    """A stand-in for interleave that counts how often it was called."""

    def measure_times(sides, rounds, min_sample):
        measure_times.calls += 1
        return {
            peers.BASELINE: Timing((theirs,) * rounds),
            peers.OURS: Timing((ours,) * rounds),
        }

    measure_times.calls = 0
    return measure_times


# cases


def test_the_whole_grid_is_selected():
    selected = cases.select()
    assert len(selected) == 3 + 10 * 3 * 2
    assert len(set(selected)) == len(selected)
    assert [case.label for case in selected[:3]] == [
        f"{cell} B1 T1 I64 H64 streaming" for cell in ("RNN", "LSTM", "GRU")
    ]


def test_selection_by_cell_and_batch():
    selected = cases.select(("GRU",), max_batch=16)
    assert {case.cell for case in selected} == {"GRU"}
    assert len(selected) == 1 + 5 * 2
    assert max(case.batch for case in selected) == 16


# peers and the check before the time


def test_peers_share_weights_and_inputs():
    case = Case("GRU", 2, 3, 4, 5, "training")
    sides = peers.build_all(case, peers.PEERS)
    assert list(sides) == [peers.BASELINE, peers.OURS]
    report.check(case, sides)


def spoiled(case: Case, reference: nn.RNNBase) -> Workload:
    module = peers.build_ours(case, reference).module
    with torch.no_grad():
        module.weight_hh_l0 += 1e-3
    return Workload(case, module)


def test_a_wrong_result_is_not_timed():
    measure_times = fake_times(1.0, 1.0)
    wrong = {**peers.PEERS, peers.OURS: spoiled}
    with pytest.raises(report.WrongResult, match=r"GRU B2 T3 I4 H5 inference: output: relative"):
        report.time_case(
            Case("GRU", 2, 3, 4, 5), MACHINE, FakeProbe(200e9), wrong, measure_times=measure_times
        )
    assert measure_times.calls == 0


def test_time_case():
    case = Case("GRU", 2, 3, 4, 5, "training")
    measured = report.time_case(
        case, MACHINE, FakeProbe(200e9), measure_times=fake_times(6e-3, 2e-3)
    )
    assert measured.ratio == pytest.approx(3.0)
    assert measured.floor == roofline.floor_seconds(case, MACHINE)
    assert measured.healthy
    assert measured.spread == 0.0


@pytest.mark.parametrize(
    ("rates", "calls", "healthy"),
    [
        ([200e9, 200e9], 1, True),
        ([100e9, 200e9, 200e9, 200e9], 2, True),  # a core was away before, then it was back
        ([200e9, 100e9, 200e9, 200e9], 2, True),  # a core went away meanwhile
        ([100e9], 2, False),
    ],
)
def test_an_unhealthy_row_is_repeated_once_and_marked(rates, calls, healthy):
    measure_times = fake_times(2e-3, 1e-3)
    measured = report.time_case(
        Case("RNN", 2, 3, 4, 5), MACHINE, FakeProbe(*rates), measure_times=measure_times
    )
    assert measure_times.calls == calls
    assert measured.healthy == healthy
    assert report.format_row(measured).endswith("unhealthy") != healthy


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
    [{"num_layers": 2}, {"bidirectional": True}, {"proj_size": 2}, {"dtype": torch.float64}],
)
def test_no_floor_is_made_up(changes):
    case = replace(Case("LSTM", 1, 2, 3, 4), **changes)
    with pytest.raises(ValueError, match="no floor is defined"):
        roofline.floor_seconds(case, MACHINE)


def test_measure_takes_the_best_of_several(monkeypatch):
    monkeypatch.setattr(roofline, "best_sgemm", lambda attempts: 1e9)
    monkeypatch.setattr(roofline, "cache_sizes", lambda: [32 * KB, 1024 * KB, 32768 * KB])
    machine = roofline.measure(FakeProbe(1e9, 3e9, 2e9), threads=2, attempts=2)
    assert machine.fma_one_thread == 3e9
    assert [level.name for level in machine.levels] == ["L1", "L2", "L3", "DRAM"]
    rates = [level.one_thread for level in machine.levels]
    assert rates == sorted(rates, reverse=True)
    assert machine.level_of(1e12).name == "DRAM"
    assert machine.peak == max(machine.fma_all_threads, machine.sgemm)


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

SMALL = Case("GRU", 1, 100, 64, 64)
LARGE = Case("GRU", 64, 50, 512, 512)
STEP = Case("GRU", 1, 1, 64, 64, "streaming", given_state=True)


def verdicts(rows, memory_rows=()):
    return {verdict.bar: verdict.status for verdict in bars.judge(rows, memory_rows)}


def test_bars_that_hold():
    rows = [row(SMALL, 2.5), row(LARGE, 0.9), row(STEP, 3.1)]
    peak = bars.MemoryRow(SMALL, 0.99, (100, 100), (99, 99))
    assert set(verdicts(rows, [peak]).values()) == {"ok"}
    assert len(verdicts(rows, [peak])) == 4


def test_bars_that_do_not():
    rows = [row(SMALL, 0.99), row(STEP, 2.9)]
    peak = bars.MemoryRow(SMALL, 1.01, (100, 100), (101, 101))
    assert set(verdicts(rows, [peak]).values()) == {"falls short"}


def test_no_verdict_from_an_unhealthy_machine():
    rows = [row(SMALL, 1000.0, healthy=False), row(STEP, 3.1)]
    found = verdicts(rows)
    assert found["no grid cell with B <= 16 slower than torch.nn"] == "no verdict"
    assert found["GRU, B <= 16, geometric mean >= 2.0x"] == "no verdict"
    assert list(found.values()).count("ok") == 1


def test_lstm_has_its_own_bar():
    lstm = replace(SMALL, cell="LSTM")
    assert verdicts([row(lstm, 1.6)])["LSTM, B <= 16, geometric mean >= 1.5x"] == "ok"
    assert verdicts([row(SMALL, 1.6)])["GRU, B <= 16, geometric mean >= 2.0x"] == "falls short"


def test_summary_names_the_worst():
    lines = bars.summary([row(SMALL, 2.0), row(replace(SMALL, batch=4), 8.0), row(LARGE, 0.5)])
    assert len(lines) == 1
    assert "B <= 16:  4.00x" in lines[0]
    assert "all:  2.00x" in lines[0]
    assert lines[0].endswith("worst:  0.50x at B64 T50 I512 H512")
    assert bars.summary([row(SMALL, healthy=False)])[0].endswith("unhealthy")


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


def test_unknown_memory_field():
    with pytest.raises(OSError, match="does not report VmNothing"):
        memory.status("VmNothing")


# report


@pytest.fixture
def quiet_report(monkeypatch):
    """report.main with the expensive parts replaced; returns how to run it on given rows."""

    def run(rows: list[bars.Row], wrong: list[str], *arguments: str) -> int:
        monkeypatch.setattr(report, "time_all", lambda *_: (MACHINE, rows, wrong))
        monkeypatch.setattr(
            report,
            "measure_memory",
            lambda *_: [bars.MemoryRow(SMALL, 0.5, (200, 200), (100, 100))],
        )
        return report.main([*arguments, "--threads", str(torch.get_num_threads())])

    return run


def test_report_writes_json_and_compares_with_it(quiet_report, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert quiet_report([row(SMALL), row(STEP)], [], "--json", str(old)) == 0
    document = json.loads(old.read_text())
    assert document["schema"] == report.JSON_SCHEMA
    assert document["rows"][0]["ratio"] == pytest.approx(3.0)
    assert document["rows"][0]["case"]["dtype"] == "float32"
    assert document["machine"]["handoff"] == 100e-9
    assert document["versions"]["torch"] == torch.__version__
    assert {bar["status"] for bar in document["bars"]} == {"ok"}

    slower = replace(row(SMALL), ours=1.5e-3)
    assert quiet_report([slower], [], "--compare", str(old), "--json", str(new)) == 0
    out = capsys.readouterr().out
    assert "(+50%), ratio 3.00x -> 2.00x  slower" in out


def test_report_writes_markdown(quiet_report, tmp_path):
    rows = [row(STEP), row(SMALL, 2.0), row(replace(SMALL, mode="training"), 8.0, healthy=False)]
    quiet_report(rows, [], "--markdown", str(tmp_path / "new" / "tables.md"))
    text = (tmp_path / "new" / "tables.md").read_text(encoding="utf-8")
    assert "| GRU | 3.0x | 2.0x | 8.0x (unhealthy) | 2.0x | 8.0x (unhealthy) | 2.00x (B1" in text
    assert "| GRU B1 T1 I64 H64 streaming | 3 | 1 | 3.00x | 2% | 0.0 | 40% |" in text
    assert "8.00x (unhealthy)" in text
    assert "| reads from L3, GB/s | 30 | 60 |" in text
    assert "| GRU B1 T100 I64 H64 | 0.0 (0.0) | 0.0 (0.0) | 0.50 |" in text
    assert "| no verdict |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_compare_with_another_set_of_cases():
    assert report.compare_with({"rows": []}, [row(SMALL)]) == ["no case is in both runs"]


def test_wrong_results_fail_the_report(quiet_report, capsys):
    assert quiet_report([], ["GRU: output: off"], "--no-memory") == 1
    assert "1 cases gave WRONG RESULTS" in capsys.readouterr().out


def test_report_says_when_rows_are_unhealthy(quiet_report, capsys):
    quiet_report([row(SMALL, healthy=False), row(STEP)], [])
    assert "1 of 2 rows were measured while a core was away" in capsys.readouterr().out


def test_report_says_when_the_limits_cannot_be_right(quiet_report, capsys):
    quiet_report([row(SMALL)], [])
    assert "above 100%" not in capsys.readouterr().out
    quiet_report([replace(row(SMALL), floor=1.1e-3)], [])
    assert "above 100%" in capsys.readouterr().out


@pytest.mark.parametrize("selected", [cases.select(), [STEP], [SMALL]], ids=["all", "step", "one"])
def test_heat_map_is_drawn(tmp_path, selected):
    picture = tmp_path / "heat.png"
    rows = [row(case, 1 + i, healthy=i % 2 == 0) for i, case in enumerate(selected)]
    report.heat_map(rows, picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "GRU,ELMAN"], "unknown cells ELMAN"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--rounds", "3"], "--rounds must be at least 7"),
        (["--memory", "--no-memory"], "not allowed with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_one_real_quick_run(tmp_path):
    """The whole report on the smallest cases, as CI runs it."""
    out = tmp_path / "quick.json"
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--quick", "--cells", "RNN"]
    command += ["--max-batch", "1", "--no-memory", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a quick run: figures are not to be quoted" in done.stdout
    document = json.loads(out.read_text())
    assert [entry["label"] for entry in document["rows"]] == [
        "RNN B1 T1 I64 H64 streaming",
        "RNN B1 T100 I64 H64 inference",
        "RNN B1 T100 I64 H64 training",
    ]
    assert document["wrong"] == []
