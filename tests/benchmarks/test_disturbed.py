"""Busy neighbors, stolen cores, AVX2 only."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_ins import BENCHMARKS, MACHINE, SMALL, STEP, FakeProbe, fake_times, patience, row

import avx2
import disturbed
import peers
import timing
from rnn_ext._bench import Case, Timing
from rows import BusyRow


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
