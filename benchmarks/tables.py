"""The measured rows as Markdown, for README.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from bars import MemoryRow, Row, Verdict, geometric_mean
from cases import CELLS, SMALL_BATCH
from roofline import Machine


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


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

    def mean(cell: str, mode: str, largest_batch: float = float("inf")) -> str:
        chosen = [
            row
            for row in rows
            if (row.case.cell, row.case.mode) == (cell, mode) and row.case.batch <= largest_batch
        ]
        if not chosen:
            return ""
        mark = "" if all(row.healthy for row in chosen) else " (unhealthy)"
        return f"{geometric_mean([row.ratio for row in chosen]):.1f}x{mark}"

    def worst(cell: str) -> str:
        grid = [row for row in rows if row.case.cell == cell and row.case.mode != "streaming"]
        if not grid:
            return ""
        slowest = min(grid, key=lambda row: row.ratio)
        return f"{slowest.ratio:.2f}x ({slowest.case.shape} {slowest.case.mode})"

    header = [
        "times faster than torch.nn",
        "one step, B1 H64",
        f"inference, B ≤ {SMALL_BATCH}",
        f"training, B ≤ {SMALL_BATCH}",
        "inference, all",
        "training, all",
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
            worst(cell),
        ]
        for cell in CELLS
        if any(row.case.cell == cell for row in rows)
    ]
    return table(header, lines)


def result_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            f"{row.case.cell} {row.case.shape} {row.case.mode}",
            milliseconds(row.theirs),
            milliseconds(row.ours),
            f"{row.ratio:.2f}x" + ("" if row.healthy else " (unhealthy)"),
            f"{row.spread:.0%}",
            f"{row.rate / 1e9:.1f}",
            f"{row.share:.0%}",
        ]
        for row in rows
    ]
    header = ["case", "torch.nn, ms", "rnn_ext, ms", "ratio", "spread", "GFLOP/s", "roofline"]
    return table(header, lines)


def memory_table(rows: Sequence[MemoryRow]) -> str:
    def megabytes(peak: tuple[int, int]) -> str:
        heap, resident = peak
        return f"{heap / 1e6:.1f} ({resident / 1e6:.1f})"

    lines = [
        [
            f"{row.case.cell} {row.case.shape}",
            megabytes(row.theirs),
            megabytes(row.ours),
            f"{row.ratio:.2f}",
        ]
        for row in rows
    ]
    header = ["training step", "torch.nn, heap (resident), MB", "rnn_ext", "rnn_ext / torch.nn"]
    return table(header, lines)


def bar_table(verdicts: Sequence[Verdict]) -> str:
    lines = [[verdict.bar, verdict.figure, verdict.status] for verdict in verdicts]
    return table(["bar", "measured", "verdict"], lines)


def document(
    title: str,
    machine: Machine | None,
    rows: Sequence[Row],
    memory: Sequence[MemoryRow],
    verdicts: Sequence[Verdict],
) -> str:
    """Everything of one run."""
    parts = [f"# {title}"]
    if machine is not None:
        parts += ["## Machine", machine_table(machine)]
    if rows:
        parts += ["## Ratios", ratio_table(rows), "## Results", result_table(rows)]
    if memory:
        parts += ["## Memory", memory_table(memory)]
    if verdicts:
        parts += ["## Bars", bar_table(verdicts)]
    return "\n\n".join(parts) + "\n"
