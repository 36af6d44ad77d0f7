"""The memory that is kept between calls."""

from __future__ import annotations

from rnn_ext import _C


def empty_cache() -> None:
    """Give the memory that is kept for the next calls on the CPU back to the system.

    What a step needed (values saved for backward, workspaces, outputs and gradients that nobody
    holds any more) is kept for the next steps, up to 256 MiB: fresh memory costs a page fault for
    every 4 KiB. Tensors in use are not affected. The counterpart of `torch.cuda.empty_cache`.
    """
    _C.empty_pool()
