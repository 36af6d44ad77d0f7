"""The stateless calls that the modules are made of.

Shapes, with T steps, B batch rows, I input size, H hidden size, L layers, D directions (1 or 2) and
R = ``proj_size`` of an LSTM that has one, else H:

- ``input``: (T, B, I), with ``batch_first`` (B, T, I); with ``batch_sizes`` packed data (N, I).
- ``hx``: h_0 of (L*D, B, R); for the LSTM a pair (h_0, c_0), c_0 of (L*D, B, H). None means zeros.
- ``params``: flat list in the order of ``torch.nn.RNNBase._flat_weights``: for each layer and
  direction weight_ih (G*H, I or D*R), weight_hh (G*H, R), then bias_ih and bias_hh (G*H) with
  ``bias``, then weight_hr (R, H) for an LSTM with projection. G is 1, 4 or 3 for RNN, LSTM, GRU.
- result: output (T, B, D*R) in the layout of ``input``, and the final state in that of ``hx``.

All tensors share one dtype (float32, float64, bfloat16, float16) and one device; ``RuntimeError``
for sizes, dtypes or devices that do not fit. The equations are in docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnn_ext import _C

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]

# The codes of csrc/sequence.h (CellKind).
RNN_TANH, RNN_RELU, LSTM, GRU = range(4)

_operator = torch.ops.rnn_ext.recurrent.default


def recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    *options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.rnn_ext.recurrent without its reserve: (output, h_n, c_n).

    Goes the short way into C++ unless somebody (a compiler, a tracer) has to see the operator.
    """
    if not torch.compiler.is_compiling():
        result = _C.recurrent(input, batch_sizes, h_0, c_0, params, *options)
        if result is not NotImplemented:
            return result
    return _operator(input, batch_sizes, h_0, c_0, params, *options)[:3]


def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman RNN with tanh: h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh).

    Shapes and errors: see the module's docstring.
    """
    output, h_n, _ = recurrent(
        input, batch_sizes, hx, None, params, RNN_TANH,
        bias, num_layers, bidirectional, batch_first, dropout, training,
    )  # fmt: skip
    return output, h_n


def rnn_relu(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman RNN with relu: h_t = max(0, W_ih x_t + b_ih + W_hh h_(t-1) + b_hh).

    Shapes and errors: see the module's docstring.
    """
    output, h_n, _ = recurrent(
        input, batch_sizes, hx, None, params, RNN_RELU,
        bias, num_layers, bidirectional, batch_first, dropout, training,
    )  # fmt: skip
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRU (Cho et al. 2014) with the reset gate after the product, gate order r, z, n, as torch.nn.

    Shapes and errors: see the module's docstring.
    """
    output, h_n, _ = recurrent(
        input, batch_sizes, hx, None, params, GRU,
        bias, num_layers, bidirectional, batch_first, dropout, training,
    )  # fmt: skip
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM (Hochreiter and Schmidhuber 1997, with forget gate), gate order i, f, g, o, as torch.nn.

    A projection is there when ``params`` has weight_hr. Shapes and errors: see the module's
    docstring.
    """
    h_0, c_0 = (None, None) if hx is None else hx
    output, h_n, c_n = recurrent(
        input, batch_sizes, h_0, c_0, params, LSTM,
        bias, num_layers, bidirectional, batch_first, dropout, training,
    )  # fmt: skip
    return output, (h_n, c_n)
