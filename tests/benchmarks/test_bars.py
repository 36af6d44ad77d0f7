"""Each bar, with runs that meet it and runs that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from stand_ins import (
    HALF,
    LARGE,
    LINE,
    PEAK,
    SMALL,
    TRAINING,
    both_ways,
    busy_row,
    half_row,
    row,
    step_row,
    verdict_on,
)

import bars
import peers
from rows import Growth, MemoryRow, Results, Scan, StolenRow

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
