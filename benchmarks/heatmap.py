"""The ratios of the grid as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cases import CELLS, MODES
from rnn_ext._bench import Case
from rows import Row


def column_of(case: Case) -> str:
    if case.mode != "streaming":
        return case.shape
    layers = f"\n{case.num_layers} layers" if case.num_layers > 1 else ""
    return f"one step\nB{case.batch} H{case.hidden_size}{layers}"


def line_of(case: Case) -> tuple[str, str]:
    """A streaming step is a kind of inference: it stands in the inference line of its cell."""
    return case.cell, "inference" if case.mode == "streaming" else case.mode


def ratio_grid(
    rows: Sequence[Row],
    ratio: Callable[[Row], float],
    lines: Sequence[tuple[str, str]],
    columns: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Ratios by line and column, NaN where nothing was measured; and where a core was away."""
    grid = torch.full((len(lines), len(columns)), float("nan"))
    unhealthy = torch.zeros(grid.shape, dtype=torch.bool)
    for row in rows:
        place = lines.index(line_of(row.case)), columns.index(column_of(row.case))
        grid[place] = ratio(row)
        unhealthy[place] = not row.healthy
    return grid, unhealthy


def heat_map(rows: Sequence[Row], path: Path, title: str) -> None:
    """One line for each cell and mode, one column for each shape; times faster than torch.nn, and
    below it than the fastest peer, if others took part.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    measured = {line_of(row.case) for row in rows}
    lines = [(cell, mode) for cell in CELLS for mode in MODES if (cell, mode) in measured]
    columns = list(dict.fromkeys(column_of(row.case) for row in rows))
    panels: dict[str, Callable[[Row], float]] = {"torch.nn": lambda row: row.ratio}
    if any(len(row.rivals) > 1 for row in rows):
        panels["the best peer of each case"] = lambda row: row.best_ratio

    figure, every_axes = plt.subplots(
        len(panels),
        figsize=(2.2 + 0.95 * len(columns), (1.5 + 0.5 * len(lines)) * len(panels) + 0.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, (peer, ratio) in zip(every_axes[:, 0], panels.items(), strict=True):
        grid, unhealthy = ratio_grid(rows, ratio, lines, columns)
        logarithm = torch.log2(grid)
        image = axes.imshow(
            logarithm.numpy(), aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0, vmin=-2, vmax=3.5)
        )
        labels = [column if "\n" in column else column.replace(" ", "\n") for column in columns]
        axes.set_xticks(range(len(columns)), labels, fontsize=8)
        axes.set_yticks(range(len(lines)), [f"{cell} {mode}" for cell, mode in lines], fontsize=9)
        for y in range(len(lines)):
            for x in range(len(columns)):
                value = grid[y, x].item()
                if not math.isnan(value):
                    digits = 2 if value < 2 else 1 if value < 9.95 else 0
                    color = "white" if not -1.4 < logarithm[y, x] < 2.4 else "black"
                    text = f"{value:.{digits}f}" + ("?" if unhealthy[y, x] else "")
                    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        axes.set_title(f"times faster than {peer}", fontsize=10)
        bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2, 3], pad=0.01)
        bar.ax.set_yticklabels(["¼x", "½x", "1x", "2x", "4x", "8x"], fontsize=8)
    disturbed = not all(row.healthy for row in rows)
    note = "\n?: measured while a core was away" if disturbed else ""
    figure.suptitle(title + note, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
