"""flashrnn (PyPI) as a peer on a GPU: nn.LSTM, GRU and RNN written for its one function.

It compiles its kernels on the user's machine for each shape, multiplies no input, starts from
zeros and takes one head of H units here. Never run by this project.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

FUNCTIONS = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}
# Of torch's gates r, z, n, the places that flashrnn's GRU has for R (n, r, z).
GRU_RECURRENT = (2, 0, 1)


def flashrnn_function() -> Callable[..., tuple[Tensor, Tensor]]:
    """Raises ImportError where the package is not installed."""
    from flashrnn import flashrnn

    return flashrnn


def arrange(
    cell: str, sequence: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Wx (B, T, G, 1, H), R (G, 1, H, H) with rows of the new state first, b (gates, 1, H)."""
    steps, batch, _ = sequence.shape
    hidden = weight_hh.shape[1]
    gates = functional.linear(sequence, weight_ih).view(steps, batch, -1, 1, hidden)
    recurrent = weight_hh.view(-1, 1, hidden, hidden)
    b_ih, b_hh = bias_ih.view(-1, 1, hidden), bias_hh.view(-1, 1, hidden)
    if cell == "GRU":
        # The reset gate is applied to W_hn h + b_hn alone: four biases, n's two apart.
        recurrent = recurrent[list(GRU_RECURRENT)]
        bias = torch.stack([b_hh[2], b_ih[0] + b_hh[0], b_ih[1] + b_hh[1], b_ih[2]])
    else:
        bias = b_ih + b_hh
    return gates.transpose(0, 1), recurrent, bias


def forward(function: Callable, cell: str, dtype: torch.dtype, *tensors: Tensor) -> tuple:
    """(output (T, B, H), h_n (1, B, H) and for the LSTM c_n)."""
    gates, recurrent, bias = arrange(cell, *tensors)
    states, last = function(
        gates.contiguous(),
        recurrent.contiguous(),
        bias.contiguous(),
        function=FUNCTIONS[cell],
        backend="cuda" if cell == "GRU" else "cuda_fused",  # it has no other one for GRU
        dtype=str(dtype).removeprefix("torch."),
    )
    # states (S, B, T, 1, H), last (S, B, 1, 1, H)
    return (states[0, :, :, 0].transpose(0, 1), *(last[:, :, 0, 0].unsqueeze(1)))
