"""What the modules do beyond torch.nn's, in NumPy: literally, one row and one step at a time.

``layer`` and ``stack`` are the results, with lengths, resets, masks and zoneout; nothing is masked
out or computed for all rows at once: a row runs through the steps it has, in its direction's order.
``gradients`` has those of resets, lengths and truncation, by cutting every row into the pieces that
gradients do not cross and running the plain references forward and backward over each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .activations import STANDARD, Array
from .stack import CELLS

Bools = NDArray[np.bool_]
States = tuple[Array, ...]  # h and, of an LSTM, c


class Norm(NamedTuple):
    """Layer normalization of one direction."""

    ih: Array  # (G*H): gains
    hh: Array  # (G*H)
    c: Array | None = None  # (H), LSTM only
    c_bias: Array | None = None  # (H)
    eps: float = 1e-5

    def of(self, v: Array, gain: Array) -> Array:
        """The values of one row, of mean 0 and variance 1, times the gain."""
        centered = v - v.mean()
        return gain * centered / np.sqrt((centered**2).mean() + self.eps)


def step(
    cell: str,
    x: Array,  # (I,)
    read: Array,  # (R,): what the product with W_hh reads of h
    state: States,  # of (R,), (H,)
    params: Any,
    norm: Norm | None = None,
    reset_after: bool = True,
) -> States:
    weight_ih, weight_hh, bias_ih, bias_hh = params[:4]
    u, v = weight_ih @ x, weight_hh @ read
    if norm is not None:
        u, v = norm.of(u, norm.ih), norm.of(v, norm.hh)
    if bias_ih is not None:
        u, v = u + bias_ih, v + bias_hh
    sigmoid, tanh = STANDARD.sigmoid, STANDARD.tanh
    if cell == "lstm":
        a_i, a_f, a_g, a_o = np.split(u + v, 4)
        c = sigmoid(a_f) * state[1] + sigmoid(a_i) * tanh(a_g)
        seen = c if norm is None else norm.of(c, norm.c) + norm.c_bias
        m = sigmoid(a_o) * tanh(seen)
        return (m if params.weight_hr is None else params.weight_hr @ m), c
    if cell == "gru":
        (u_r, u_z, u_n), (v_r, v_z, v_n) = np.split(u, 3), np.split(v, 3)
        r, z = sigmoid(u_r + v_r), sigmoid(u_z + v_z)
        if not reset_after:  # Cho et al. 2014, and Keras: r times h, then the product
            v_n = weight_hh[2 * len(r) :] @ (r * read)
            if bias_hh is not None:
                v_n = v_n + bias_hh[2 * len(r) :]
        n = tanh(u_n + (r * v_n if reset_after else v_n))
        return ((1.0 - z) * n + z * state[0],)
    return (tanh(u + v) if cell == "rnn_tanh" else np.maximum(u + v, 0.0),)


def order(length: int, reverse: bool) -> list[int]:
    steps = list(range(length))
    return steps[::-1] if reverse else steps


def begins(resets: Bools | None, row: int, places: list[int], place: int, reverse: bool) -> bool:
    """Does an episode begin with this place of a row's order?"""
    if resets is None:
        return False
    if not reverse:
        return bool(resets[places[place], row])
    return place > 0 and bool(resets[places[place - 1], row])  # the step before began one


def layer(
    cell: str,
    x: Array,  # (T, B, I)
    initial: States,  # h_0 (D, B, R), for LSTM also c_0 (D, B, H)
    params: Sequence[Any],  # D
    *,
    lengths: Sequence[int] | None = None,  # (B)
    resets: Bools | None = None,  # (T, B)
    reset_state: States | None = None,  # as initial
    hidden_mask: Array | None = None,  # (D, B, R)
    zoneout: tuple[Array | None, Array | None] = (None, None),  # (T, B, D*H)
    norm: Sequence[Norm] | None = None,  # D
    reset_after: bool = True,
) -> tuple[list[Array], States]:
    """All states (T, B, D*R), for LSTM also (T, B, D*H), and the final ones, as initial."""
    steps, batch = x.shape[:2]
    reset_state = initial if reset_state is None else reset_state
    final = tuple(np.empty_like(s) for s in initial)
    every = [np.zeros((steps, batch, len(params) * s.shape[2])) for s in initial]
    for d, direction in enumerate(params):
        for row in range(batch):
            places = order(steps if lengths is None else lengths[row], reverse=d == 1)
            state = tuple(s[d, row] for s in initial)
            for place, t in enumerate(places):
                if begins(resets, row, places, place, reverse=d == 1):
                    state = tuple(s[d, row] for s in reset_state)
                read = state[0] if hidden_mask is None else state[0] * hidden_mask[d, row]
                of_direction = None if norm is None else norm[d]
                new = list(step(cell, x[t, row], read, state, direction, of_direction, reset_after))
                for k, keep in enumerate(zoneout[: len(new)]):
                    if keep is not None:
                        width = len(new[k])
                        z = keep[t, row, d * width : (d + 1) * width]
                        new[k] = z * state[k] + (1.0 - z) * new[k]
                state = tuple(new)
                for k, value in enumerate(state):
                    every[k][t, row, d * len(value) : (d + 1) * len(value)] = value
            for k, value in enumerate(state):
                final[k][d, row] = value
    return every, final


def stack(
    cell: str,
    x: Array,  # (T, B, I)
    initial: States,  # (L*D, B, .)
    params: Sequence[Any],  # L*D
    *,
    directions: int = 1,
    reset_state: States | None = None,  # (L*D, B, .)
    of_layer: Callable[[int, Array], tuple[Array, dict[str, Any]]] = lambda k, x: (x, {}),
    **options: Any,
) -> tuple[list[list[Array]], States]:
    """Every layer's states, and the final ones (L*D, B, .).

    ``of_layer`` gives what is of one layer only: its input, masked, and its masks.
    """
    every, finals = [], []
    for k in range(len(params) // directions):
        slots = slice(k * directions, (k + 1) * directions)
        x, masks = of_layer(k, x)
        reset = None if reset_state is None else tuple(s[slots] for s in reset_state)
        states, final = layer(
            cell, x, tuple(s[slots] for s in initial), params[slots], reset_state=reset,
            **options, **masks,
        )  # fmt: skip
        every.append(states)
        finals.append(final)
        x = states[0]
    return every, tuple(np.concatenate(parts) for parts in zip(*finals, strict=True))


def gradients(
    cell: str,
    x: Array,  # (T, B, I)
    initial: States,  # (D, B, .)
    params: Sequence[Any],  # D
    doutput: Array,  # (T, B, D*R)
    dfinal: States,  # as initial
    *,
    lengths: Sequence[int] | None = None,
    resets: Bools | None = None,
    reset_state: States | None = None,
    detach_steps: int = 0,
) -> tuple[Array, States, States, list[Any]]:
    """Of x, initial, reset_state (zeros if there is none) and params, of one layer."""
    steps, batch = x.shape[:2]
    width = initial[0].shape[2]
    dx = np.zeros_like(x)
    dinitial = tuple(np.zeros_like(s) for s in initial)
    dreset = tuple(np.zeros_like(s) for s in initial)
    dparams = []
    for d, direction in enumerate(params):
        total = [None if array is None else np.zeros_like(array) for array in direction]
        for row in range(batch):
            places = order(steps if lengths is None else lengths[row], reverse=d == 1)

            cuts = [
                place
                for place in range(len(places))
                if place == 0
                or begins(resets, row, places, place, reverse=d == 1)
                or (detach_steps and place % detach_steps == 0)
            ]
            column = slice(row, row + 1)
            state = tuple(s[d, column] for s in initial)
            pieces = []  # in order: steps, what the piece began from, what backward needs
            for first, end in pairwise([*cuts, len(places)]):
                came_from = "initial" if first == 0 else "detached"
                if begins(resets, row, places, first, reverse=d == 1):
                    source = initial if reset_state is None else reset_state
                    state = tuple(s[d, column] for s in source)
                    came_from = "initial" if reset_state is None else "reset"
                own = places[first:end]
                _, state, saved = CELLS[cell].forward(x[own, column], state, direction)
                pieces.append((own, came_from, saved))
            dlast = tuple(s[d, column] for s in dfinal)
            if not pieces:  # a length of 0: the final state is the initial one
                for whole, part in zip(dinitial, dlast, strict=True):
                    whole[d, column] += part
            for own, came_from, saved in reversed(pieces):
                dy = doutput[own, column, d * width : (d + 1) * width]
                dpiece, dstate, dgroup = CELLS[cell].backward(dy, dlast, saved)
                dx[own, column] += dpiece
                if came_from != "detached":
                    target = dinitial if came_from == "initial" else dreset
                    for whole, part in zip(target, dstate, strict=True):
                        whole[d, column] += part
                total = [
                    None if array is None else array + part
                    for array, part in zip(total, dgroup, strict=True)
                ]
                dlast = tuple(np.zeros_like(part) for part in dlast)
        dparams.append(type(direction)(*total))
    return dx, dinitial, dreset, dparams
