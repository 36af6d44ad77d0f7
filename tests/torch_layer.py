"""One layer step by step in differentiable torch operations: what `rnn_ext.layer.layer` computes.

An independent statement of the operator's contract, for tests of it: autograd derives the
gradients, to any order. Every row of the batch goes through its own steps in its own order: its
position p stands for step p in direction 0 and for step length - 1 - p in direction 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rnn_ext.functional import GRU, LSTM, RNN_RELU
from rnn_ext.layer import LayerNorm


def layer(
    input: Tensor,  # (T, B, I), with batch_first (B, T, I)
    params: Sequence[Tensor],  # of both directions, in the order of _flat_weights
    *,
    cell: int,
    bias: bool,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,  # (B)
    resets: Tensor | None = None,  # (T, B), with batch_first (B, T)
    h_0: Tensor | None = None,  # (D, B, R)
    c_0: Tensor | None = None,  # (D, B, H)
    reset_h: Tensor | None = None,  # (D, B, R)
    reset_c: Tensor | None = None,  # (D, B, H)
    hidden_mask: Tensor | None = None,  # (D, B, R)
    zoneout_h: Tensor | None = None,  # (T, B, D*H), with batch_first (B, T, D*H)
    zoneout_c: Tensor | None = None,  # likewise
    norm: LayerNorm | None = None,
    reset_after: bool = True,
    detach_steps: int = 0,
    checkpoint_steps: int = 0,  # which changes no result
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output (T, B, D*R) in the input's layout, h_n (D, B, R), c_n (D, B, H), cells (T, B, D*H)."""

    def in_time(t: Tensor | None) -> Tensor | None:
        return t.transpose(0, 1) if batch_first and t is not None else t

    x, resets, zoneout_h, zoneout_c = map(in_time, (input, resets, zoneout_h, zoneout_c))
    steps, batch = x.shape[:2]
    lengths = torch.full((batch,), steps) if lengths is None else lengths
    directions = 2 if bidirectional else 1
    count = len(params) // directions
    results = []
    for d in range(directions):
        weights = list(params[d * count : (d + 1) * count])
        hidden = weights[0].shape[0] // {LSTM: 4, GRU: 3}.get(cell, 1)
        width = weights[1].shape[1]

        def part(states: Tensor | None, size: int, d: int = d) -> Tensor:
            return x.new_zeros(batch, size) if states is None else states[d]

        def own(of_all: Tensor | None, size: int, d: int = d) -> Tensor | None:
            return None if of_all is None else of_all[..., d * size : (d + 1) * size]

        h, c = part(h_0, width), part(c_0, hidden)
        reset = (
            h if reset_h is None else reset_h[d],
            c if reset_c is None else reset_c[d],
        )
        mask = None if hidden_mask is None else hidden_mask[d]
        keep_h, keep_c = own(zoneout_h, hidden), own(zoneout_c, hidden)
        rows = torch.arange(batch)
        own_norm = None
        if norm is not None:
            gains = (None if gain is None else gain[d] for gain in norm[:4])
            own_norm = LayerNorm(*gains, norm.eps)
        ys, cs = [], []
        for p in range(steps):
            t = torch.full((batch,), p) if d == 0 else (lengths - 1 - p).clamp(min=0)
            active = (p < lengths)[:, None]
            if detach_steps and p > 0 and p % detach_steps == 0:
                h, c = torch.where(active, h.detach(), h), torch.where(active, c.detach(), c)
            if resets is not None and (d == 0 or p > 0):
                begins = resets[t if d == 0 else (t + 1).clamp(max=steps - 1), rows, None] & active
                h, c = torch.where(begins, reset[0], h), torch.where(begins, reset[1], c)
            read = h if mask is None else h * mask
            new_h, new_c = _step(cell, bias, weights, own_norm, reset_after, x[t, rows], read, h, c)
            if keep_h is not None:
                new_h = new_h + keep_h[t, rows] * (h - new_h)
            if keep_c is not None:
                new_c = new_c + keep_c[t, rows] * (c - new_c)
            h, c = torch.where(active, new_h, h), torch.where(active, new_c, c)
            ys.append(torch.where(active, h, 0.0))
            cs.append(torch.where(active, c, 0.0))
        by_position = torch.stack(ys), torch.stack(cs)  # (T, B, .)
        if d == 1:  # position length - 1 - t belongs to step t
            t = torch.arange(steps)[:, None]
            places, present = (lengths - 1 - t).clamp(min=0), (t < lengths)[..., None]
            by_position = tuple(torch.where(present, v[places, rows], 0.0) for v in by_position)
        results.append((*by_position, h, c))
    output, cells = (torch.cat([r[k] for r in results], dim=-1) for k in (0, 1))
    h_n, c_n = (torch.stack([r[k] for r in results]) for k in (2, 3))
    output, cells = in_time(output), in_time(cells)
    nothing = x.new_empty(0)
    return (
        output,
        h_n,
        c_n if cell == LSTM else nothing,
        cells if cell == LSTM and return_cells else nothing,
    )


def _step(
    cell: int,
    bias: bool,
    weights: Sequence[Tensor],
    norm: LayerNorm | None,  # of the direction
    reset_after: bool,
    x: Tensor,  # (B, I)
    read: Tensor,  # (B, R): what the product with weight_hh reads of h
    h: Tensor,  # (B, R)
    c: Tensor,  # (B, H)
) -> tuple[Tensor, Tensor]:
    bias_ih, bias_hh = weights[2:4] if bias else (None, None)
    of_x, of_h = functional.linear(x, weights[0]), functional.linear(read, weights[1])
    if norm is not None:
        of_x = functional.layer_norm(of_x, of_x.shape[1:], norm.ih, eps=norm.eps)
        of_h = functional.layer_norm(of_h, of_h.shape[1:], norm.hh, eps=norm.eps)
    if bias:
        of_x, of_h = of_x + bias_ih, of_h + bias_hh
    if cell == LSTM:
        i, f, g, o = (of_x + of_h).chunk(4, dim=1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        seen = new_c
        if norm is not None:
            seen = functional.layer_norm(new_c, new_c.shape[1:], norm.c, norm.c_bias, norm.eps)
        new_h = o.sigmoid() * seen.tanh()
        projection = weights[4 if bias else 2 :]
        return (functional.linear(new_h, projection[0]) if projection else new_h), new_c
    if cell == GRU:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, dim=1), of_h.chunk(3, dim=1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        if reset_after:
            h_n = r * h_n
        else:
            h_n = functional.linear(r * read, weights[1].chunk(3)[2])
            h_n = h_n + bias_hh.chunk(3)[2] if bias else h_n
        n = (x_n + h_n).tanh()
        return n + z * (h - n), c
    a = of_x + of_h
    return (a.relu() if cell == RNN_RELU else a.tanh()), c
