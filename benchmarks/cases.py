"""The shapes that are measured."""

from __future__ import annotations

from rnn_ext._bench import Case, Mode

CELLS = ("RNN", "LSTM", "GRU")

# (batch, steps, input_size, hidden_size)
GRID = (
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

# One step of one stream with the state handed in: what a caller pays per character, frame or
# action.
STREAMING = (1, 1, 64, 64)

# What --quick measures: enough to see that the harness and the kernels run, not enough to be
# quoted.
QUICK_GRID = ((1, 100, 64, 64), (16, 50, 128, 128))

SMALL_BATCH = 16


def select(
    cells: tuple[str, ...] = CELLS, max_batch: int | None = None, quick: bool = False
) -> list[Case]:
    """Streaming steps first, then the grid, small batches first, inference beside training."""
    shapes = [
        shape for shape in (QUICK_GRID if quick else GRID) if shape[0] <= (max_batch or shape[0])
    ]
    modes: tuple[Mode, ...] = ("inference", "training")
    streaming = [Case(cell, *STREAMING, "streaming", given_state=True) for cell in cells]
    return streaming + [
        Case(cell, *shape, mode) for shape in shapes for cell in cells for mode in modes
    ]
