"""The shapes that are measured."""

from __future__ import annotations

from dataclasses import replace

import torch

from rnn_ext._bench import Case, Mode

CELLS = ("RNN", "LSTM", "GRU")

# (batch, steps, input_size, hidden_size)
Shape = tuple[int, int, int, int]

GRID: tuple[Shape, ...] = (
    (1, 100, 64, 64),
    (1, 100, 256, 256),
    (1, 100, 512, 512),
    (1, 50, 1024, 1024),
    (16, 50, 128, 128),
    (32, 50, 256, 256),
    (64, 28, 28, 128),
    (64, 50, 512, 512),
    (128, 35, 650, 650),
    (64, 50, 1024, 1024),
)

# What --quick measures: enough to see that the harness and the kernels run, not enough to be
# quoted.
QUICK_GRID: tuple[Shape, ...] = ((1, 100, 64, 64), (16, 50, 128, 128))

# One step with the state handed in: what a caller pays per character, frame or action.
# (batch, size of input and of state, layers)
STREAMING = ((1, 64, 1), (1, 128, 2), (8, 256, 1))

SMALL_BATCH = 16

MODES: tuple[Mode, ...] = ("inference", "training")


def grid(
    cells: tuple[str, ...] = CELLS, max_batch: int | None = None, quick: bool = False
) -> list[Case]:
    """Small batches first, inference beside training."""
    shapes = [
        shape for shape in (QUICK_GRID if quick else GRID) if shape[0] <= (max_batch or shape[0])
    ]
    return [Case(cell, *shape, mode) for shape in shapes for cell in cells for mode in MODES]


def streaming(cells: tuple[str, ...] = CELLS, max_batch: int | None = None) -> list[Case]:
    return [
        Case(cell, batch, 1, size, size, "streaming", num_layers=layers, given_state=True)
        for batch, size, layers in STREAMING
        for cell in cells
        if batch <= (max_batch or batch)
    ]


def half_precision(cases: list[Case]) -> list[Case]:
    return [replace(case, dtype=torch.bfloat16) for case in cases]


def bidirectional(cases: list[Case]) -> list[Case]:
    """The cases with one row, in both directions."""
    return [replace(case, bidirectional=True) for case in cases if case.batch == 1]
