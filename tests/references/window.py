"""Backpropagation through time over a window: the literal double loop.

For every t the last k steps up to t are run again from the state before them, and the gradient of
what the loss at t is made of (output[t]; at the last step also the final states) goes back through
them. That state is a constant, unless it is the initial one. All gradients are sums over t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import stack
from .activations import STANDARD, Activation, Array


def gradients(
    cell: str,
    x: Array,  # (T, B, I)
    initial: tuple[Array, ...],  # h_0 (L*D, B, R), for LSTM also c_0 (L*D, B, H)
    params: Sequence[Any],  # L*D
    doutput: Array,  # (T, B, D*R)
    dfinal: tuple[Array, ...],  # as initial
    steps: int,  # k
    *,
    directions: int = 1,  # 2 for one layer only
    masks: Sequence[Array] | None = None,  # as in stack.forward
    activation: Activation = STANDARD,
) -> tuple[Array, tuple[Array, ...], list[Any]]:
    """Returns dx, the gradients of the initial states and of the parameters."""
    if directions == 2:
        forward, backward = params
        width = doutput.shape[-1] // 2
        first, second = (
            gradients(
                cell,
                x[order],
                tuple(state[k : k + 1] for state in initial),
                [own],
                doutput[order, :, k * width : (k + 1) * width],
                tuple(state[k : k + 1] for state in dfinal),
                steps,
                activation=activation,
            )
            for k, (own, order) in enumerate(
                [(forward, slice(None)), (backward, slice(None, None, -1))]
            )
        )
        states = [np.concatenate(pair) for pair in zip(first[1], second[1], strict=True)]
        return first[0] + second[0][::-1], tuple(states), [*first[2], *second[2]]

    def run(begin: int, end: int, states: tuple[Array, ...]) -> tuple[Array, Any, Any]:
        here = None if masks is None else [mask[begin:end] for mask in masks]
        return stack.forward(cell, x[begin:end], states, params, masks=here, activation=activation)

    dx = np.zeros_like(x)
    dinitial = tuple(np.zeros_like(state) for state in initial)
    dparams = [np.zeros_like(array) for array in stack.join_flat_weights(params)]
    for t in range(len(x)):
        start = max(0, t - steps + 1)
        before = run(0, start, initial)[1] if start > 0 else initial
        output, _, saved = run(start, t + 1, before)
        dwindow = np.zeros_like(output)
        dwindow[-1] = doutput[t]
        last = t == len(x) - 1
        dlast = tuple(d if last else np.zeros_like(d) for d in dfinal)
        dinput, dbefore, dgroups = stack.backward(dwindow, dlast, saved)
        dx[start : t + 1] += dinput
        if start == 0:
            for total, part in zip(dinitial, dbefore, strict=True):
                total += part
        for total, part in zip(dparams, stack.join_flat_weights(dgroups), strict=True):
            total += part
    flat = iter(dparams)
    groups = [
        type(group)(*(None if array is None else next(flat) for array in group)) for group in params
    ]
    return dx, dinitial, groups
