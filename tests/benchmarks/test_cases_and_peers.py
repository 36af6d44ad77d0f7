"""What is measured, the sides, and the check before the time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from stand_ins import MACHINE, SMALL, STEP, FakeProbe, fake_times, patience, row
from torch import nn

import bars
import cases
import compiled
import health
import onnx_weights
import peers
import report
import roofline
import timing
from rnn_ext._bench import Case, Workload, compare


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
