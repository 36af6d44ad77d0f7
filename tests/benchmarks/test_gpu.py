"""benchmarks/gpu.py: everything but the device."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import gpu
import gpu_methods
import rnn_ext
from rnn_ext._bench import Case

CPU = torch.device("cpu")


def small(cell: str = "LSTM", mode: str = "inference", steps: int = 40, **keywords) -> Case:
    return Case(cell, 2, steps, 5, 6, mode, **keywords)


def test_grid_is_the_one_that_was_asked_for():
    cases = list(gpu.grid())
    assert len(cases) == len(set(cases)) == 3 * 3 * 5 * 3 * 6 * 2
    assert {case.dtype for case in cases} == {torch.float32, torch.float16, torch.bfloat16}
    assert {case.mode for case in cases} == {"inference", "training"}
    assert 0 < sum(map(gpu.quick, cases)) < len(cases) / 10


@pytest.mark.parametrize("cell", gpu.CELLS)
@pytest.mark.parametrize("mode", gpu.MODES)
def test_all_sides_are_given_the_same_work(cell, mode):
    case = small(cell, mode)
    sides = gpu.build_sides(case, CPU, seed=3)
    assert set(sides) == {gpu.BASELINE, gpu.OURS}  # too many steps for a compiled loop
    ours, theirs = sides[gpu.OURS], sides[gpu.BASELINE]
    assert isinstance(ours.module, getattr(rnn_ext, cell))
    assert type(theirs.module) is getattr(nn, cell)
    assert torch.equal(ours.input, theirs.input)
    assert ours.input.requires_grad == (mode == "training")
    for a, b in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(a, b)
        assert a is not b
    assert not gpu.wrong_results(case, CPU)


@pytest.mark.parametrize("cell", gpu.CELLS)
@pytest.mark.parametrize("mode", gpu.MODES)
def test_compiled_loop_takes_part_in_short_cases(monkeypatch, cell, mode):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes a minute
    case = small(cell, mode, steps=3)
    assert set(gpu.build_sides(case, CPU, seed=1)) == {gpu.BASELINE, gpu.OURS, gpu.COMPILED}
    assert not gpu.wrong_results(case, CPU)


def test_another_seed_is_another_buffer():
    first, second = (gpu.build_sides(small(), CPU, seed)[gpu.OURS] for seed in (1, 2))
    assert not torch.equal(first.input, second.input)


def test_wrong_results_are_not_timed(monkeypatch):
    right = rnn_ext.GRU.forward

    def wrong(*arguments, **keywords):
        output, h_n = right(*arguments, **keywords)
        return output, h_n * 1.01

    monkeypatch.setattr(rnn_ext.GRU, "forward", wrong)
    row = gpu.measure(small("GRU"), CPU, rounds=2, model=None)
    assert gpu.OURS not in row.seconds
    assert "h_n" in row.wrong[gpu.OURS][0]
    assert math.isnan(row.ratio)
    assert "WRONG" in gpu.markdown([row], "title")


def test_buffers_outgrow_the_cache():
    workload = gpu.build_sides(small(), CPU, seed=1)[gpu.BASELINE]
    assert gpu.buffers_for(workload, 0) == 1
    assert gpu.buffers_for(workload, 10**9) == gpu.MAX_BUFFERS
    counts = [gpu.buffers_for(workload, n * workload.bytes) for n in range(5)]
    assert all(a <= b for a, b in pairwise(counts))
    assert counts[2] == 4


def test_times_are_of_one_call(monkeypatch):
    monkeypatch.setattr(gpu, "buffers_for", lambda *_: 4)
    monkeypatch.setattr(gpu, "seconds_on_host", lambda _: 8.0)
    row = gpu.measure(small(), CPU, rounds=3, model="h100")
    assert row.seconds == {gpu.BASELINE: 2.0, gpu.OURS: 2.0}
    assert row.ratio == 1
    assert 0 < row.floor_share < 1


def test_each_method_takes_part(monkeypatch):
    chosen = []
    monkeypatch.setattr(rnn_ext._C, "set_cuda_method", chosen.append)
    row = gpu.measure(small(), CPU, rounds=2, model="h100", each_method=True)
    # Without the choice, every plan is the model's own: of a small layer, in a cluster.
    assert set(row.seconds) == {gpu.BASELINE, gpu.OURS, "cluster"}
    assert set(row.predicted) == {gpu.OURS, "cluster"}
    assert set(gpu.METHODS) <= set(chosen)
    assert chosen[-1] == "auto"


def test_possible_methods():
    small_layer, large_layer = (Case("LSTM", 4, 20, 8, h, "training") for h in (64, 4096))
    assert list(gpu.possible_methods(small_layer, "h100")) == list(gpu.METHODS)
    assert list(gpu.possible_methods(large_layer, "h100")) == ["stepwise"]
    assert gpu.plans_of(small_layer, "h100")[0]["method"] == "cluster"  # the choice is back


def test_reports(tmp_path, capsys):
    paths = [tmp_path / name for name in ("gpu.json", "gpu.md", "gpu.png")]
    kinds = ("json", "markdown", "png")
    options = [f"--{kind}={path}" for kind, path in zip(kinds, paths, strict=True)]
    cases = [small("LSTM"), small("GRU", "training")]
    assert gpu.main(["--device", "cpu", "--rounds", "2", *options], cases) == 0
    assert capsys.readouterr().out.count("x; ms: torch.nn ") == 2
    rows = json.loads(paths[0].read_text())["rows"]
    assert [row["cell"] for row in rows] == ["LSTM", "GRU"]
    assert paths[1].read_text().count("| GRU float32 B2 T40 H6 training |") == 1
    assert paths[2].stat().st_size > 1000


def like_flashrnn(wx, recurrent, bias, function, backend, dtype):
    """What the package documents: one head, gates g = R y + W x + b, states from zeros."""
    assert dtype == str(wx.dtype).removeprefix("torch.")
    batch, _, _, heads, hidden = wx.shape
    assert (heads, recurrent.shape[1:]) == (1, (1, hidden, hidden))
    y, c, states = wx.new_zeros(batch, hidden), wx.new_zeros(batch, hidden), []
    b = bias[:, 0]
    for x in wx[:, :, :, 0].unbind(1):  # (B, G, H)
        r = torch.einsum("gdp,bp->bgd", recurrent[:, 0], y)
        if function == "lstm":
            i, f, g, o = (x + r + b).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            y = o.sigmoid() * c.tanh()
        elif function == "gru":
            reset, update = (x[:, 0] + r[:, 1] + b[1]).sigmoid(), x[:, 1] + r[:, 2] + b[2]
            new = (x[:, 2] + b[3] + reset * (r[:, 0] + b[0])).tanh()
            y = update.sigmoid() * y + (1 - update.sigmoid()) * new
        else:
            y = (x + r + b)[:, 0].tanh()
        states.append(torch.stack([y, c] if function == "lstm" else [y]))
    history = torch.stack(states, dim=2).unsqueeze(3)  # (S, B, T, 1, H)
    return history, history[:, :, -1:]


@pytest.mark.parametrize("cell", gpu.CELLS)
@pytest.mark.parametrize("mode", gpu.MODES)
def test_flashrnn_is_given_the_same_layer(monkeypatch, cell, mode):
    monkeypatch.setattr(gpu.flash, "flashrnn_function", lambda: like_flashrnn)
    row = gpu.measure(small(cell, mode), CPU, rounds=2, model=None)
    assert not row.wrong
    assert not row.absent
    assert gpu.FLASH in row.seconds


def test_flashrnn_falls_out_with_a_note(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel for this shape\nand a long trace")

    monkeypatch.setattr(gpu.flash, "flashrnn_function", lambda: broken)
    row = gpu.measure(small(), CPU, rounds=2, model=None)
    assert row.absent == {gpu.FLASH: "RuntimeError: no kernel for this shape"}
    assert set(row.seconds) == {gpu.BASELINE, gpu.OURS}
    assert "Absent from 1 of 1 cases: flashrnn: RuntimeError" in gpu.markdown([row], "title")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_and_nothing_measured(capsys):
    assert gpu.main([]) == 2
    assert "no GPU is available" in capsys.readouterr().err


def test_methods_beside_predictions(tmp_path, capsys):
    path = tmp_path / "methods.json"
    cases = [small("LSTM"), small("GRU", "training")]
    assert gpu_methods.main(["--device", "cpu", "--json", str(path)], cases) == 0
    rows = json.loads(path.read_text())
    assert [row["method"] for row in rows] == 2 * list(gpu.METHODS)
    assert [row["method"] for row in rows if row["chosen"]] == 2 * ["cluster"]
    assert all(row["seconds"] > 0 and row["predicted"] > 0 for row in rows)
    assert capsys.readouterr().out.count(" ms, predicted on h100") == 6
    assert len(list(gpu_methods.grid(["float32"]))) == 3 * 8 * 4 * 2
