"""The project's stated bars, judged from what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cases import CELLS, MODES, SMALL_BATCH
from peers import SINGLE_PRECISION, TRAINING_FORWARD, TWO_DIRECTIONS_IN_TURN
from rows import BusyRow, MemoryRow, Results, Row, StolenRow, Verdict

# No grid cell behind a peer, where two equal programs come out up to 3 % apart.
LEVEL, LEVEL_WITH_NOISE = 1.0, 0.97
GEOMEANS = {
    "inference": {"LSTM": 2.5, "GRU": 3.5, "RNN": 3.5},
    "training": {"LSTM": 2.0, "GRU": 4.0, "RNN": 4.0},
}
BEST_PEER_GEOMEAN = 1.6
ROOFLINE_SHARE = 0.60
PEAK_SHARES = {"inference": 0.80, "training": 0.75}
HALF_GEOMEANS = {"inference": 1.5, "training": 3.0}
HALF_AGAINST_SINGLE = 1.8
STREAMING_SECONDS = {(1, 64, 1): 12e-6, (1, 128, 2): 20e-6, (8, 256, 1): 25e-6}
STREAMING_PART = 1 / 4
BACKWARD_OVER_FORWARD = 2.3
BIDIRECTIONAL_PART = 0.65
CLIFF = 1.4
GROWTH = 1.4
INFERENCE_BYTES = 8e6
BUSY_SLOWDOWN = 2.5
STOLEN_CORE = 1.3
AVX2_GEOMEAN = 1.5


@dataclass(frozen=True)
class Figure:
    """One value that a bar is about, where it was measured, and whether the machine was ours."""

    value: float
    where: str
    healthy: bool = True


def figures(rows: Iterable, value: Callable[..., float]) -> list[Figure]:
    return [Figure(value(row), row.case.label, getattr(row, "healthy", True)) for row in rows]


def shares(rows: Iterable[Row], share: Callable[[Row], float | None]) -> list[Figure]:
    """Shares of the machine's limits, where they are defined."""
    return [
        Figure(share(row), row.case.label, row.healthy and row.healthy_limits)
        for row in rows
        if share(row) is not None
    ]


def every(
    bar: str,
    found: Sequence[Figure],
    met: Callable[[float], bool],
    worst: Callable[..., Figure],
    show: Callable[[float], str],
) -> list[Verdict]:
    """One verdict on many figures. One healthy figure beyond the bar decides it; one that was
    measured while a core was away decides nothing: torch.nn can then be a thousand times slower
    than it is.
    """
    if not found:
        return []
    beyond = [figure for figure in found if not met(figure.value)]
    surely = [figure for figure in beyond if figure.healthy]
    status = "falls short" if surely else "ok"
    if not surely and not all(figure.healthy for figure in found):
        status = "no verdict"
    shown = worst(surely or found, key=lambda figure: figure.value)
    figure = f"worst {show(shown.value)} ({shown.where})"
    if beyond:
        figure += f", beyond the bar: {len(beyond)} of {len(found)}"
    return [Verdict(bar, figure, status)]


def at_least(
    bar: str, found: Sequence[Figure], limit: float, show: Callable[[float], str]
) -> list[Verdict]:
    return every(bar, found, lambda value: value >= limit, min, show)


def at_most(
    bar: str, found: Sequence[Figure], limit: float, show: Callable[[float], str]
) -> list[Verdict]:
    return every(bar, found, lambda value: value <= limit, max, show)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_at_least(bar: str, found: Sequence[Figure], limit: float) -> list[Verdict]:
    if not found:
        return []
    mean = geometric_mean([figure.value for figure in found])
    status = "ok" if mean >= limit else "falls short"
    if not all(figure.healthy for figure in found):
        status = "no verdict"
    return [Verdict(bar, f"{mean:.2f}x", status)]


def times(value: float) -> str:
    return f"{value:.2f}x"


def percent(value: float) -> str:
    return f"{value:.0%}"


def without(absent: Sequence[str], verdicts: Iterable[Verdict]) -> list[Verdict]:
    """A bar against the best peer is not met by leaving a peer out."""
    if not absent:
        return list(verdicts)
    return [
        Verdict(
            verdict.bar,
            f"{verdict.figure}; without {', '.join(absent)}",
            "no verdict" if verdict.status == "ok" else verdict.status,
        )
        for verdict in verdicts
    ]


def judge_grid(rows: Sequence[Row], absent: Sequence[str]) -> list[Verdict]:
    inference = [row for row in rows if row.case.mode == "inference"]
    training = [row for row in rows if row.case.mode == "training"]
    verdicts = without(
        absent,
        at_least(
            f"inference, every grid cell >= {LEVEL}x the best peer ({LEVEL_WITH_NOISE} with noise)",
            [
                Figure(row.best_ratio, f"{row.case.label}, {row.best_peer}", row.healthy)
                for row in inference
            ],
            LEVEL_WITH_NOISE,
            times,
        ),
    )
    verdicts += at_least(
        f"training, every grid cell >= {LEVEL}x torch.nn ({LEVEL_WITH_NOISE} with noise)",
        figures(training, lambda row: row.ratio),
        LEVEL_WITH_NOISE,
        times,
    )
    for mode in MODES:
        for cell, least in GEOMEANS[mode].items():
            chosen = [row for row in rows if (row.case.cell, row.case.mode) == (cell, mode)]
            verdicts += mean_at_least(
                f"{cell} {mode}, geometric mean against torch.nn >= {least}x",
                figures(chosen, lambda row: row.ratio),
                least,
            )
    verdicts += without(
        absent,
        mean_at_least(
            f"inference, geometric mean against the best peer of each cell >= {BEST_PEER_GEOMEAN}x",
            figures(inference, lambda row: row.best_ratio),
            BEST_PEER_GEOMEAN,
        ),
    )
    one_row = [row for row in rows if row.case.batch == 1 and 256 <= row.case.hidden_size <= 1024]
    verdicts += at_least(
        f"share of the roofline, B = 1, H in 256..1024 >= {ROOFLINE_SHARE:.0%}",
        shares(one_row, lambda row: row.share),
        ROOFLINE_SHARE,
        percent,
    )
    for mode, least in PEAK_SHARES.items():
        large = [
            row
            for row in rows
            if row.case.mode == mode and row.case.batch >= 32 and row.case.hidden_size >= 256
        ]
        verdicts += at_least(
            f"{mode}, share of the multiply-add peak, B >= 32, H >= 256 >= {least:.0%}",
            shares(large, lambda row: row.peak_share),
            least,
            percent,
        )
    with_forward = [row for row in rows if TRAINING_FORWARD in row.times]
    verdicts += at_most(
        f"backward / forward of training, B >= 32 <= {BACKWARD_OVER_FORWARD}",
        figures(with_forward, lambda row: row.ours / row.times[TRAINING_FORWARD] - 1),
        BACKWARD_OVER_FORWARD,
        "{:.2f}".format,
    )
    return verdicts


def judge_streaming(rows: Sequence[Row]) -> list[Verdict]:
    verdicts = []
    for (batch, size, layers), most in STREAMING_SECONDS.items():
        chosen = [
            row
            for row in rows
            if (row.case.batch, row.case.hidden_size, row.case.num_layers) == (batch, size, layers)
        ]
        step = f"streaming step B{batch} H{size}" + (f" {layers} layers" if layers > 1 else "")
        verdicts += at_most(
            f"{step} <= {most * 1e6:.0f} µs",
            figures(chosen, lambda row: row.ours),
            most,
            lambda seconds: f"{seconds * 1e6:.1f} µs",
        )
        verdicts += at_most(
            f"{step} <= 1/4 of torch.nn's time",
            figures(chosen, lambda row: row.ours / row.theirs),
            STREAMING_PART,
            "{:.2f}".format,
        )
    return verdicts


def judge_half(rows: Sequence[Row]) -> list[Verdict]:
    verdicts = []
    for mode, least in HALF_GEOMEANS.items():
        verdicts += mean_at_least(
            f"bfloat16 {mode}, geometric mean against torch.nn's >= {least}x",
            figures([row for row in rows if row.case.mode == mode], lambda row: row.ratio),
            least,
        )
    large = [row for row in rows if row.case.batch >= 16 and SINGLE_PRECISION in row.times]
    return verdicts + mean_at_least(
        f"bfloat16 against our own float32, B >= 16, geometric mean >= {HALF_AGAINST_SINGLE}x",
        figures(large, lambda row: row.times[SINGLE_PRECISION] / row.ours),
        HALF_AGAINST_SINGLE,
    )


def judge_bidirectional(rows: Sequence[Row]) -> list[Verdict]:
    return at_most(
        "bidirectional layer, B = 1, of two single directions' time one after the other "
        f"<= {BIDIRECTIONAL_PART}",
        figures(rows, lambda row: row.ours / row.times[TWO_DIRECTIONS_IN_TURN]),
        BIDIRECTIONAL_PART,
        "{:.2f}".format,
    )


def judge_scans(results: Results) -> list[Verdict]:
    points = [
        Figure(ratio, f"{scan.title} H{place[0]} B{place[1]}", scan.healthy[place])
        for scan in results.scans
        for place, ratio in scan.ratios.items()
    ]
    grown = [
        Figure(
            growth.ratio(growth.worst), f"{growth.case.label} at T{growth.worst}", growth.healthy
        )
        for growth in results.growths
    ]
    return at_most(
        f"no cliff: time per flop over the mean of the neighbors (H±17, B±3) <= {CLIFF}x",
        points,
        CLIFF,
        times,
    ) + at_most(
        f"linear in T up to 20,000: time per step over that of the shortest <= {GROWTH}x",
        grown,
        GROWTH,
        times,
    )


def judge_memory(rows: Sequence[MemoryRow]) -> list[Verdict]:
    return at_most(
        "training peak memory <= torch.nn's",
        figures([row for row in rows if row.ratio is not None], lambda row: row.ratio),
        1.0,
        "{:.3f} of it".format,
    ) + at_most(
        "inference peak memory <= inputs + outputs + 8 MB",
        figures(
            [row for row in rows if row.beside_outputs is not None],
            lambda row: row.beside_outputs,
        ),
        INFERENCE_BYTES,
        lambda size: f"{size / 1e6:.2f} MB",
    )


def judge_disturbed(busy: Sequence[BusyRow], stolen: Sequence[StolenRow]) -> list[Verdict]:
    return [
        *at_most(
            f"busy neighbor on each core: slowdown <= {BUSY_SLOWDOWN}x",
            figures(busy, lambda row: row.slowdown),
            BUSY_SLOWDOWN,
            times,
        ),
        *at_most(
            "busy neighbor on each core: never behind torch.nn",
            figures(busy, lambda row: row.ours / row.theirs),
            1.0,
            "{:.2f} of its time".format,
        ),
        *at_most(
            f"stolen core: time <= {STOLEN_CORE}x of our own on one thread",
            figures(stolen, lambda row: row.ratio),
            STOLEN_CORE,
            times,
        ),
    ]


def judge(results: Results) -> list[Verdict]:
    """A verdict for every bar that something was measured for."""
    return [
        *judge_grid(results.grid, results.absent),
        *judge_half(results.half),
        *judge_streaming(results.streaming),
        *judge_bidirectional(results.bidirectional),
        *judge_scans(results),
        *judge_memory(results.memory),
        *judge_disturbed(results.busy, results.stolen),
        *mean_at_least(
            f"forced AVX2 against torch.nn limited to AVX2, geometric mean >= {AVX2_GEOMEAN}x",
            figures(results.avx2, lambda row: row.ratio),
            AVX2_GEOMEAN,
        ),
        *results.impossible,
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric means against torch.nn and the worst case of every cell and mode."""
    lines = []
    for cell in CELLS:
        for mode in MODES:
            every_row = [row for row in rows if row.case.cell == cell and row.case.mode == mode]
            small = [row.ratio for row in every_row if row.case.batch <= SMALL_BATCH]
            if not every_row:
                continue
            worst = min(every_row, key=lambda row: row.ratio)
            lines.append(
                f"{cell:<4} {mode:<9}  "
                + (f"B <= {SMALL_BATCH}: {geometric_mean(small):5.2f}x   " if small else "")
                + f"all: {geometric_mean([row.ratio for row in every_row]):5.2f}x   "
                + "against the best peer: "
                + f"{geometric_mean([row.best_ratio for row in every_row]):5.2f}x   "
                + f"worst: {worst.ratio:5.2f}x at {worst.case.shape}"
                + ("" if all(row.healthy for row in every_row) else "  unhealthy")
            )
    return lines
