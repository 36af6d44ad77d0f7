"""The scan for cliffs, and growth in T."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
from stand_ins import MACHINE, SCANNED, FakeProbe, patience, smooth, verdict_on

import bars
import rnn_ext
import scan
from rnn_ext._bench import Case
from rows import Growth, Results


def surface(time_of: Callable[[int, int], float]) -> dict[tuple[int, int], float]:
    return {
        (hidden_size, batch): time_of(hidden_size, batch)
        for hidden_size in scan.HIDDEN_SIZES[:20]
        for batch in scan.BATCHES[:12]
    }


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
