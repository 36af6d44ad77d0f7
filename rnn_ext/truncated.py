"""Window-style truncated backpropagation through time.

The gradient of the loss at step t (through ``output[t]``; through h_n and c_n at the last step)
flows back through steps t, t-1, ..., t-k+1 of every layer and stops there; where a window reaches
the first step it flows on into h_0 and c_0. The values are those of the ordinary call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnn_ext import functional as F

__all__ = ["window_bptt"]


class _WindowBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[Any, ...],
        steps: int,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, h_n, c_n, reserve = torch.ops.rnn_ext.recurrent(
            input, None, h_0, c_0, params, *options, save_reserve=True
        )
        ctx.options, ctx.steps = options, steps
        ctx.set_materialize_grads(False)
        if options[0] != F.LSTM:
            ctx.mark_non_differentiable(c_n)
        # Backward reads the output, which the caller may change in place, as after any other call:
        # a lazy clone shares its memory until then.
        kept = torch.ops.aten._lazy_clone(output)
        ctx.save_for_backward(input, h_0, c_0, kept, reserve, *params)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, h_0, c_0, output, reserve, *params = ctx.saved_tensors
        asked = list(ctx.needs_input_grad[2:])
        with torch.no_grad():
            results = torch.ops.rnn_ext.recurrent_window_backward(
                *grads, input, h_0, c_0, params, output, reserve, *ctx.options, ctx.steps, asked
            )
        wanted = [result for result, ask in zip(results, asked, strict=True) if ask]
        if torch.is_grad_enabled():  # create_graph
            wanted = iter(_NoSecondDerivative.apply(len(wanted), *wanted, input, *params))
        else:
            wanted = iter(wanted)
        return (None, None, *(next(wanted) if ask else None for ask in asked))


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients that depend on the operands after them in a way that nobody can go back through:
    without this a second derivative would silently be that of constants."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "truncated BPTT over a window has no second derivative: its gradients are not the "
            "derivative of any loss"
        )


def window_bptt(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    cell: int,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.recurrent` of padded data whose gradients flow back through `steps` steps.

    Args:
        input: (T, B, I), with `batch_first` (B, T, I).
        h_0: (L*D, B, R) or None for zeros; c_0: (L*D, B, H), LSTM only.
        params: in the order of `torch.nn.RNNBase._flat_weights`.
        cell: `functional.RNN_TANH`, `RNN_RELU`, `LSTM` or `GRU`.
        steps: k, at least 1. From T on this is backpropagation through time in full.

    Of a bidirectional layer each direction counts steps in its own order: t, t+1, ..., t+k-1 in the
    second one. Half precision is computed in float32 on the way back.

    Returns:
        (output, h_n, c_n) as `functional.recurrent`; c_n is empty unless LSTM.

    Raises:
        ValueError: `steps` < 1; several bidirectional layers, where a layer's window would begin in
            the middle of what the other direction of the layer below has seen.
        TypeError: `steps` is not an int; `input` is no tensor (a PackedSequence).
        NotImplementedError: `input` is not on the CPU.
        RuntimeError: sizes, dtypes or devices that do not fit; a second derivative.
    """
    if not isinstance(input, Tensor):
        raise TypeError(
            f"truncated BPTT over a window takes a padded batch, got {type(input).__name__}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"the window's steps must be an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"the window must have at least one step, got {steps}")
    if num_layers > 1 and bidirectional:
        raise ValueError(
            "truncated BPTT over a window has no single meaning for several bidirectional layers: "
            "a layer reads what both directions of the one below have seen of all steps"
        )
    options = (cell, bias, num_layers, bidirectional, batch_first, dropout, training)
    operands = [input, h_0, c_0, *params]
    tracked = torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in operands
    )
    if not tracked or input.dim() != 3 or steps >= input.size(1 if batch_first else 0):
        return F.recurrent(input, None, h_0, c_0, params, *options)
    device = input.device.type
    if device != "cpu":
        raise NotImplementedError(f"truncated BPTT over a window runs on the CPU, not on {device}")
    if not torch.is_autocast_enabled(device):
        return _WindowBackward.apply(options, steps, *operands)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        cast = [operand if operand is None else operand.to(dtype) for operand in operands]
        return _WindowBackward.apply(options, steps, *cast)
