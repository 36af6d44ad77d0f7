"""Layers, directions, packed batches and dropout around the single-layer definitions.

This is the whole of torch.nn.RNN / LSTM / GRU in NumPy, with nothing fused:

* Layer l reads the output of layer l-1, times a given dropout mask; both directions read the same
  input and their outputs lie side by side, forward first: y is (T, B, D*R).
* States are (L*D, B, .) and parameters a list of L*D, both in the order layer 0 forward, layer 0
  reverse, layer 1 forward, ...
* A packed batch is B sequences that do not know of each other. It is computed as just that: one
  row at a time, each from its own first to its own last step; in the reverse direction from its own
  last to its own first. That is slow and leaves nothing to get wrong.

A sequence or a batch is addressed through an index of shape (steps, rows) into the rows of the flat
data (N, I), so that gathering is ``data[index]`` (steps, rows, I), the reverse direction is
``index[::-1]`` and scattering back is ``out[index] = y``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import gru, lstm, rnn
from .activations import STANDARD, Activation, Array


@dataclass(frozen=True)
class Cell:
    forward: Callable[..., tuple[Array, tuple[Array, ...], Any]]
    backward: Callable[..., tuple[Array, tuple[Array, ...], Any]]
    params: Callable[..., Any]


CELLS = {
    "rnn_tanh": Cell(partial(rnn.forward, nonlinearity="tanh"), rnn.backward, rnn.Params),
    "rnn_relu": Cell(partial(rnn.forward, nonlinearity="relu"), rnn.backward, rnn.Params),
    "lstm": Cell(lstm.forward, lstm.backward, lstm.Params),
    "gru": Cell(gru.forward, gru.backward, gru.Params),
}


def split_flat_weights(
    cell: str, flat: Sequence[Array], *, bias: bool, projected: bool = False
) -> list[Any]:
    """torch.nn.RNNBase._flat_weights as one Params for each layer and direction."""
    names = ["weight_ih", "weight_hh"]
    names += ["bias_ih", "bias_hh"] if bias else []
    names += ["weight_hr"] if projected else []
    if len(flat) % len(names) != 0:
        raise ValueError(f"{len(flat)} arrays do not divide into groups of {names}")
    groups = [flat[k : k + len(names)] for k in range(0, len(flat), len(names))]
    return [CELLS[cell].params(**dict(zip(names, group, strict=True))) for group in groups]


def join_flat_weights(params: Sequence[Any]) -> list[Array]:
    """The inverse of ``split_flat_weights``."""
    return [array for group in params for array in group if array is not None]


def packed_rows(batch_sizes: Sequence[int]) -> list[tuple[NDArray[np.int64], slice]]:
    """For each row b of a packed batch: where its steps lie in the data, and its state's column."""
    sizes = np.asarray(batch_sizes, dtype=np.int64)
    first = np.cumsum(sizes) - sizes  # data row at which step t begins
    return [((first[sizes > b] + b)[:, None], slice(b, b + 1)) for b in range(sizes[0])]


def forward(
    cell: str,
    x: Array,  # (T, B, I), or packed data (N, I) with batch_sizes
    initial: tuple[Array, ...],  # h_0 (L*D, B, R), for LSTM also c_0 (L*D, B, H)
    params: Sequence[Any],  # L*D
    *,
    directions: int = 1,
    batch_sizes: Sequence[int] | None = None,
    masks: Sequence[Array] | None = None,  # L-1, each shaped as the output of a layer
    activation: Activation = STANDARD,
) -> tuple[Array, tuple[Array, ...], Any]:
    """Returns the output (x's shape with D*R for I), the final states and what backward needs."""
    if batch_sizes is None:
        layout = [(np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]), slice(None))]
    else:
        layout = packed_rows(batch_sizes)
    final = tuple(np.empty_like(state) for state in initial)
    width = initial[0].shape[2]
    output = x.reshape(-1, x.shape[-1])  # of the layer below
    runs = []  # for each layer and direction, for each group of the layout: (index, columns, saved)
    for k, layer_params in enumerate(params):
        layer, direction = divmod(k, directions)
        if direction == 0:
            data = output
            if layer > 0 and masks is not None:
                data = data * masks[layer - 1].reshape(data.shape)
            output = np.empty((len(data), directions * width))
        run = []
        for index, columns in layout:
            index = index[::-1] if direction == 1 else index
            y, last, saved = CELLS[cell].forward(
                data[index],
                tuple(state[k, columns] for state in initial),
                layer_params,
                activation=activation,
            )
            output[index, direction * width : (direction + 1) * width] = y
            for state, value in zip(final, last, strict=True):
                state[k, columns] = value
            run.append((index, columns, saved))
        runs.append(run)
    shape = (*x.shape[:-1], output.shape[-1])
    return output.reshape(shape), final, (cell, x.shape, params, directions, masks, runs)


def backward(
    doutput: Array,  # as output
    dfinal: tuple[Array, ...],  # as the final states
    saved: Any,
) -> tuple[Array, tuple[Array, ...], list[Any]]:
    """Returns dx, the gradients of the initial states and of the parameters, as they were given."""
    cell, x_shape, params, directions, masks, runs = saved
    dinitial = tuple(np.empty_like(state) for state in dfinal)
    dparams: list[Any] = [None] * len(params)
    dy = doutput.reshape(-1, doutput.shape[-1])  # (N, D*R)
    width = dy.shape[1] // directions
    for layer in reversed(range(len(params) // directions)):
        ddata = np.zeros((len(dy), params[layer * directions].weight_ih.shape[1]))  # (N, I)
        for direction in range(directions):
            k = layer * directions + direction
            total = [None if array is None else np.zeros_like(array) for array in params[k]]
            for index, columns, run in runs[k]:
                dx, dstate, dgroup = CELLS[cell].backward(
                    dy[index, direction * width : (direction + 1) * width],
                    tuple(state[k, columns] for state in dfinal),
                    run,
                )
                ddata[index] += dx  # no index occurs twice within a direction
                for state, value in zip(dinitial, dstate, strict=True):
                    state[k, columns] = value
                total = [
                    None if array is None else array + part
                    for array, part in zip(total, dgroup, strict=True)
                ]
            dparams[k] = CELLS[cell].params(*total)
        if layer > 0 and masks is not None:
            ddata = ddata * masks[layer - 1].reshape(ddata.shape)
        dy = ddata
    return dy.reshape(x_shape), dinitial, dparams
