"""What torch.utils.flop_counter counts for the operators: the products, as it does elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def _per_weight(input: Shape, params: Sequence[Shape]) -> list[int]:
    """Flops of one product of every row with each parameter; 0 for biases, which are no product."""
    models = params[0][:-2]
    rows = math.prod(input[len(models) : -1]) * math.prod(models)
    width = len(models) + 2
    return [2 * rows * math.prod(p[-2:]) if len(p) == width else 0 for p in params]


@register_flop_formula(torch.ops.rnn_ext.recurrent)
def _forward(input: Shape, batch_sizes: Any, h_0: Any, c_0: Any, params: Any, *_: Any, **__: Any):
    return sum(_per_weight(input, params))


@register_flop_formula(
    [torch.ops.rnn_ext.recurrent_backward, torch.ops.rnn_ext.recurrent_backward_per_example]
)
def _backward(
    grad_output: Any, grad_h_n: Any, grad_c_n: Any, input: Shape, batch_sizes: Any, h_0: Any,
    c_0: Any, params: Any, output: Any, reserve: Any, cell: int, has_biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool, dropout: float, training: bool, mask: Sequence[bool],
    *_: Any, **__: Any,
):  # fmt: skip
    flops = _per_weight(input, params)
    # By the rows: through every weight but W_ih of the first layer, where nobody may want dx.
    per_direction = len(params) // (num_layers * (2 if bidirectional else 1))
    first = [0, per_direction] if bidirectional else [0]
    through = sum(flops) - (0 if mask[0] else sum(flops[i] for i in first))
    return through + sum(f for f, asked in zip(flops, mask[3:], strict=True) if asked)


@register_flop_formula(torch.ops.rnn_ext.recurrent_window_backward)
def _window_backward(
    grad_output: Any, grad_h_n: Any, grad_c_n: Any, input: Shape, h_0: Any, c_0: Any,
    params: Sequence[Shape], output: Any, reserve: Any, cell: int, has_biases: bool,
    num_layers: int, bidirectional: bool, batch_first: bool, dropout: float, training: bool,
    window: int, mask: Sequence[bool], **_: Any,
):  # fmt: skip
    flops = _per_weight(input, params)
    steps = input[1 if batch_first else 0]
    depths = min(window, steps)
    # Steps that the chains of all losses pass through, and those that they leave backwards: by all
    # but the last step of a window, unless that one is followed by h_0.
    passed = sum(steps - depth for depth in range(depths))
    left = passed - (steps - depths)
    directions = 2 if bidirectional else 1
    width = len(params) // (num_layers * directions)
    total = sum(f for f, asked in zip(flops, mask[3:], strict=True) if asked)
    for first in range(0, len(params), width):
        if first >= directions * width:
            total += flops[first] // steps * passed
        elif mask[0]:
            total += flops[first]
        total += flops[first + 1] // steps * left
        if width % 2:  # weight_hr
            total += flops[first + width - 1] // steps * passed
    return total
