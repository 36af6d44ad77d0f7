"""The measured rows as Markdown, for README.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bars import geometric_mean
from cases import CELLS, SMALL_BATCH
from peers import (
    BASELINE,
    OURS,
    RIVAL_NAMES,
    SINGLE_PRECISION,
    TRAINING_FORWARD,
    TWO_DIRECTIONS_IN_TURN,
)
from roofline import Machine
from rows import BusyRow, Growth, MemoryRow, Results, Row, Scan, StolenRow, Verdict

WORST_POINTS = 8


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def mark(healthy: bool) -> str:
    return "" if healthy else " (unhealthy)"


def machine_table(machine: Machine) -> str:
    n = machine.threads
    lines = [
        [
            "multiply-adds, float32, GFLOP/s",
            f"{machine.fma_one_thread / 1e9:.0f}",
            f"{machine.fma_all_threads / 1e9:.0f}",
        ],
        ["torch's sgemm, best size, GFLOP/s", "", f"{machine.sgemm / 1e9:.0f}"],
    ]
    lines += [
        [
            f"reads from {level.name}, GB/s",
            f"{level.one_thread / 1e9:.0f}",
            f"{level.all_threads / 1e9:.0f}",
        ]
        for level in machine.levels
    ]
    lines.append(["core to core, ns", "", f"{machine.handoff * 1e9:.0f}"])
    return table(["limit", "1 thread", f"{n} thread{'s' if n > 1 else ''}"], lines)


def ratio_table(rows: Sequence[Row]) -> str:
    """Geometric means of times faster than torch.nn, one line a cell."""

    def mean(
        cell: str,
        mode: str,
        largest_batch: float = float("inf"),
        ratio: Callable[[Row], float] = lambda row: row.ratio,
    ) -> str:
        chosen = [
            row
            for row in rows
            if (row.case.cell, row.case.mode) == (cell, mode) and row.case.batch <= largest_batch
        ]
        if not chosen:
            return ""
        healthy = all(row.healthy for row in chosen)
        return f"{geometric_mean([ratio(row) for row in chosen]):.1f}x{mark(healthy)}"

    def worst(cell: str) -> str:
        grid = [row for row in rows if row.case.cell == cell and row.case.mode != "streaming"]
        if not grid:
            return ""
        slowest = min(grid, key=lambda row: row.ratio)
        return f"{slowest.ratio:.2f}x ({slowest.case.shape} {slowest.case.mode})"

    header = [
        "times faster than torch.nn",
        "one step",
        f"inference, B ≤ {SMALL_BATCH}",
        f"training, B ≤ {SMALL_BATCH}",
        "inference, all",
        "training, all",
        "inference, than the best peer",
        "slowest row",
    ]
    lines = [
        [
            cell,
            mean(cell, "streaming"),
            mean(cell, "inference", SMALL_BATCH),
            mean(cell, "training", SMALL_BATCH),
            mean(cell, "inference"),
            mean(cell, "training"),
            mean(cell, "inference", ratio=lambda row: row.best_ratio),
            worst(cell),
        ]
        for cell in CELLS
        if any(row.case.cell == cell for row in rows)
    ]
    return table(header, lines)


def result_table(rows: Sequence[Row]) -> str:
    timed = dict.fromkeys(name for row in rows for name in row.times)
    rivals = [name for name in timed if name in RIVAL_NAMES and name != BASELINE]
    header = ["case", "torch.nn, ms", *(f"{name}, ms" for name in rivals), "rnn_ext, ms", "ratio"]
    header += ["than the best peer"] if rivals else []
    header += ["spread", "GFLOP/s", "of peak", "roofline", "cores, answer ns"]
    lines = []
    for row in rows:
        line = [row.case.label, milliseconds(row.theirs)]
        line += [milliseconds(row.times.get(name)) for name in rivals]
        line += [milliseconds(row.ours), f"{row.ratio:.2f}x{mark(row.healthy)}"]
        line += [f"{row.best_ratio:.2f}x"] if rivals else []
        line += [f"{row.spread:.0%}", f"{row.rate / 1e9:.1f}"]
        line += [percent(row.peak_share), percent(row.share)]
        health = row.health
        line.append(f"{health.fma:.2f}, {health.handoff * 1e9:.0f}" if health else "")
        lines.append(line)
    return table(header, lines)


def yardstick_table(rows: Sequence[Row], yardstick: str, header: str) -> str:
    """Cases of ours beside ours in another setting."""
    lines = [
        [
            row.case.label,
            milliseconds(row.times[yardstick]),
            milliseconds(row.ours),
            f"{row.ours / row.times[yardstick]:.2f}{mark(row.healthy)}",
        ]
        for row in rows
        if yardstick in row.times
    ]
    return table([header, f"{yardstick}, ms", f"{OURS}, ms", "of its time"], lines)


def memory_table(rows: Sequence[MemoryRow]) -> str:
    def megabytes(peak: tuple[int, int] | None) -> str:
        if peak is None:
            return ""
        heap, resident = peak
        return f"{heap / 1e6:.1f} ({resident / 1e6:.1f})"

    lines = [
        [
            row.case.label,
            megabytes(row.theirs),
            megabytes(row.ours),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.beside_outputs is None else f"{row.beside_outputs / 1e6:.2f}",
        ]
        for row in rows
    ]
    header = [
        "peak memory",
        "torch.nn, heap (resident), MB",
        "rnn_ext",
        "rnn_ext / torch.nn",
        "rnn_ext without its outputs, MB",
    ]
    return table(header, lines)


def scan_table(scan: Scan) -> str:
    worst = sorted(scan.ratios, key=scan.ratios.__getitem__, reverse=True)[:WORST_POINTS]
    lines = [
        [
            f"H{hidden_size} B{batch}",
            milliseconds(scan.seconds[hidden_size, batch]),
            f"{scan.ratios[hidden_size, batch]:.2f}{mark(scan.healthy[hidden_size, batch])}",
        ]
        for hidden_size, batch in worst
    ]
    return table([f"{scan.title}, worst points", "rnn_ext, ms", "over its neighbors"], lines)


def growth_table(growths: Sequence[Growth]) -> str:
    steps = list(growths[0].seconds)
    lines = [
        [f"{growth.case.cell} B{growth.case.batch} H{growth.case.hidden_size} {growth.case.mode}"]
        + [f"{growth.seconds[number] / number * 1e6:.2f}" for number in steps]
        + [f"{growth.ratio(growth.worst):.2f}{mark(growth.healthy)}"]
        for growth in growths
    ]
    return table(["µs a step", *(f"T = {number}" for number in steps), "worst ratio"], lines)


def busy_table(rows: Sequence[BusyRow]) -> str:
    lines = [
        [
            row.case.label,
            milliseconds(row.quiet),
            milliseconds(row.ours),
            milliseconds(row.theirs),
            f"{row.slowdown:.2f}x{mark(row.healthy)}",
        ]
        for row in rows
    ]
    header = ["a busy neighbor on each core", "rnn_ext alone, ms", "rnn_ext, ms", "torch.nn, ms"]
    return table([*header, "slowdown"], lines)


def stolen_table(rows: Sequence[StolenRow]) -> str:
    lines = [
        [
            row.case.label,
            milliseconds(row.one_thread),
            milliseconds(row.ours),
            f"{row.ratio:.2f}x{mark(row.healthy)}",
        ]
        for row in rows
    ]
    return table(["the second core stolen", "1 thread, ms", "all threads, ms", "of it"], lines)


def bar_table(verdicts: Sequence[Verdict]) -> str:
    lines = [[verdict.bar, verdict.figure, verdict.status] for verdict in verdicts]
    return table(["bar", "measured", "verdict"], lines)


def document(
    title: str, machine: Machine | None, results: Results, verdicts: Sequence[Verdict]
) -> str:
    """Everything of one run."""
    grid = [*results.streaming, *results.grid]
    parts = [f"# {title}"]
    if machine is not None:
        parts += ["## Machine", machine_table(machine)]
    if grid:
        parts += ["## Ratios", ratio_table(grid), "## Results", result_table(grid)]
    if any(TRAINING_FORWARD in row.times for row in grid):
        parts.append(yardstick_table(grid, TRAINING_FORWARD, "a training step"))
    if results.half:
        parts += ["## bfloat16", result_table(results.half)]
        parts.append(yardstick_table(results.half, SINGLE_PRECISION, "bfloat16"))
    if results.bidirectional:
        parts += ["## Bidirectional", result_table(results.bidirectional)]
        parts.append(
            yardstick_table(results.bidirectional, TWO_DIRECTIONS_IN_TURN, "both directions")
        )
    if results.memory:
        parts += ["## Memory", memory_table(results.memory)]
    if results.scans:
        parts += ["## Scan", *map(scan_table, results.scans)]
    if results.growths:
        parts.append(growth_table(results.growths))
    if results.busy or results.stolen:
        parts.append("## Disturbed")
    if results.busy:
        parts.append(busy_table(results.busy))
    if results.stolen:
        parts.append(stolen_table(results.stolen))
    if results.avx2:
        parts += ["## AVX2", ratio_table(results.avx2), result_table(results.avx2)]
    if verdicts:
        parts += ["## Bars", bar_table(verdicts)]
    return "\n\n".join(parts) + "\n"
