"""The report: sections, comparisons, tables, exit codes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from stand_ins import (
    BENCHMARKS,
    BOTH_WAYS,
    HALF,
    LINE,
    MACHINE,
    PEAK,
    SCANNED,
    SMALL,
    STEP,
    TRAINING,
    FakeProbe,
    both_ways,
    busy_row,
    fake_times,
    half_row,
    patience,
    row,
    smooth,
    step_row,
)

import avx2
import cases
import disturbed
import heatmap
import peers
import report
import rnn_ext
import scan
import timing
from rows import Growth, MemoryRow, Results, Scan, StolenRow, Verdict, case_from_json, case_to_json


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
