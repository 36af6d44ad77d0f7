"""One recurrent layer with what a call may ask for beyond the plain recurrence: rows of different
lengths, episode resets, masks, zoneout, every cell state, cut gradients, recomputation.

This is the operator ``torch.ops.rnn_ext.recurrent_layer`` with its autograd formula; the modules
walk through their layers with it (rnn_ext/features.py) when a call uses any of these. Shapes: T
steps, B rows, D directions, I input size, H hidden size, R = ``proj_size`` if there is one, else H.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rnn_ext.fake import SAVED, compute_dtype, padded
from rnn_ext.functional import GRU, LSTM, RNN_RELU

__all__ = ["LayerNorm", "layer"]


class LayerNorm(NamedTuple):
    """Gains of layer normalization in a cell with G gates, one row for each direction."""

    ih: Tensor  # (D, G*H), of W_ih x_t
    hh: Tensor  # (D, G*H), of W_hh h_(t-1)
    c: Tensor | None = None  # (D, H), of the c_t that the LSTM's output reads, and its bias
    c_bias: Tensor | None = None
    eps: float = 1e-5


class _Call(NamedTuple):
    """The operator's arguments that forward and backward share, in the order of its schema."""

    input: Tensor
    params: list[Tensor]
    lengths: Tensor | None
    resets: Tensor | None
    h_0: Tensor | None
    c_0: Tensor | None
    reset_h: Tensor | None
    reset_c: Tensor | None
    hidden_mask: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None
    norm_ih: Tensor | None
    norm_hh: Tensor | None
    norm_c: Tensor | None
    norm_c_bias: Tensor | None
    cell: int
    has_biases: bool
    bidirectional: bool
    batch_first: bool
    detach_steps: int = 0
    checkpoint_steps: int = 0
    norm_eps: float = 0.0
    reset_before: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def differentiable(self) -> list[Tensor | None]:
        """In the order of the gradients that backward returns."""
        return [*(getattr(self, name) for name in _DIFFERENTIABLE), *self.params]

    def with_differentiable(self, tensors: Sequence[Tensor | None]) -> _Call:
        states = dict(zip(_DIFFERENTIABLE, tensors, strict=False))
        return self._replace(**states, params=list(tensors[len(states) :]))


_DIFFERENTIABLE = (
    "input", "h_0", "c_0", "reset_h", "reset_c", "norm_ih", "norm_hh", "norm_c", "norm_c_bias",
)  # fmt: skip


def _by_argument(gradients: Sequence[Tensor | None]) -> list:
    """Gradients in the order of `_DIFFERENTIABLE` and the parameters as autograd wants them: one
    for each of the operator's arguments."""
    found = dict(zip(_DIFFERENTIABLE, gradients, strict=False))
    found["params"] = list(gradients[len(_DIFFERENTIABLE) :])
    return [found.get(name) for name in _Call._fields]


_GATES = {LSTM: 4, GRU: 3}  # else 1
_TENSORS = 15  # of _Call: those before the options


def layer(
    input: Tensor,
    params: Sequence[Tensor],
    *,
    cell: int,
    bias: bool,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    norm: LayerNorm | None = None,
    detach_steps: int = 0,
    checkpoint_steps: int = 0,
    reset_after: bool = True,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, one or both directions, over the whole sequence.

    Args:
        input: (T, B, I), with ``batch_first`` (B, T, I).
        params: the layer's weights in the order of ``torch.nn.RNNBase._flat_weights``.
        cell: a code of rnn_ext.functional.
        lengths: (B,) int64 on the CPU: steps of each row, any order, zeros allowed.
        resets: (T, B) bool, with ``batch_first`` (B, T): an episode begins at this step.
        h_0, c_0: (D, B, R) and (D, B, H), zeros if missing; c_0 for the LSTM only.
        reset_h, reset_c: likewise, what a row's state is at a reset; h_0 and c_0 if missing.
        hidden_mask: (D, B, R), factors of the h_(t-1) that the recurrent product reads. Not
            differentiated, as little as zoneout.
        zoneout_h, zoneout_c: (T, B, D*H) or (B, T, D*H), may be expanded: how much of the state
            before a step stays (0: nothing, 1: all of it).
        norm: gains of layer normalization inside the cell (Ba et al. 2016); the biases b_ih, b_hh
            are added after it.
        detach_steps: gradients stop between every so many steps; 0: nowhere.
        checkpoint_steps: keep states between segments of about so many steps for backward, which
            runs each segment again; 0: keep everything.
        reset_after: of a GRU, whether its reset gate applies to the product W_hn h_(t-1), as in
            torch.nn and cuDNN, or to what the product reads (Cho et al. 2014 at first; Keras'
            ``reset_after=False``).
        return_cells: whether to return every c_t.

    Returns:
        output (T, B, D*R) in the layout of ``input``, zeros beyond a row's length; h_n (D, B, R);
        c_n (D, B, H), empty unless LSTM; cells (T, B, D*H), empty unless asked for.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: resets that are not bool.
        ValueError: zoneout or layer normalization together with projections; the reset gate
            before the product in another cell than a GRU, or with layer normalization; negative
            steps.
    """
    call = _Call(
        input, list(params), lengths, resets, h_0, c_0, reset_h, reset_c, hidden_mask,
        zoneout_h, zoneout_c, *(norm or LayerNorm(None, None))[:4], cell, bias, bidirectional,
        batch_first, detach_steps, checkpoint_steps, norm.eps if norm else 0.0, not reset_after,
    )  # fmt: skip
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        cast = [_cast(t, dtype) for t in call[:1] + call[4:_TENSORS]]
        call = call._replace(
            input=cast[0],
            params=[_cast(p, dtype) for p in call.params],
            **dict(zip(_Call._fields[4:_TENSORS], cast[1:], strict=True)),
        )
    device = input.device.type
    if torch._C._are_functorch_transforms_active():  # torch.library's formulas refuse them
        return _step_by_step(call)
    if device not in ("cpu", "meta"):
        warnings.warn(
            f"rnn_ext: there is no kernel on {device} for lengths, resets and the other options "
            "beyond torch.nn's; they are computed step by step in torch operations",
            stacklevel=3,
        )
        return _step_by_step(call)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in call.differentiable()
    )
    if needs_grad and not torch.compiler.is_compiling():
        return _Layer.apply(call[_TENSORS:], len(call.params), return_cells, *_flat(call))
    return torch.ops.rnn_ext.recurrent_layer(*call, return_cells, needs_grad)[:4]


def _flat(call: _Call) -> list[Tensor | None]:
    return [call.input, *call.params, *call[2:_TENSORS]]


class _Layer(torch.autograd.Function):
    """The operator's autograd formula without what torch.library.register_autograd costs a call,
    which is more than a small layer takes."""

    @staticmethod
    def forward(ctx, options, num_params, return_cells, input, *rest):
        params, others = rest[:num_params], rest[num_params:]
        with torch._C._AutoDispatchBelowAutograd():
            *results, reserve = torch.ops.rnn_ext.recurrent_layer(
                input, params, *others, *options, return_cells, True
            )
        ctx.options, ctx.num_params = options, num_params
        # The caller may change the output in place, as torch.nn allows on the CPU.
        ctx.save_for_backward(input, *rest, torch._lazy_clone(results[0]), reserve)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[3:]
        params, others = needs[1 : 1 + ctx.num_params], needs[1 + ctx.num_params :]
        by_name = dict(zip(_Call._fields[2:_TENSORS], others, strict=True), input=needs[0])
        mask = [by_name[name] for name in _DIFFERENTIABLE] + list(params)
        found = dict(zip(_Call._fields, _gradients(ctx, grads, mask), strict=True))
        others = [found[name] for name in _Call._fields[2:_TENSORS]]
        return None, None, None, found["input"], *found["params"], *others


def _step_by_step(call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = None if call.lengths is None else call.lengths.to(call.input.device)
    empty = call.input.new_empty(0)
    found = composite(call._replace(lengths=lengths))
    output, h_n, c_n, cells = (empty if t is None else t for t in found)
    return output, h_n, c_n, cells


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.to(dtype)


@torch.library.register_fake("rnn_ext::recurrent_layer")
def _fake(*args):
    call, return_cells, save_reserve = _Call(*args[:-2]), args[-2], args[-1]
    input = call.input
    steps, batch = (input.shape[1], input.shape[0]) if call.batch_first else input.shape[:2]
    w_hh = call.params[1]
    gates, state = _GATES.get(call.cell, 1), w_hh.shape[1]
    hidden = w_hh.shape[0] // gates
    directions, lstm = call.directions, call.cell == LSTM

    def rows(width):
        return input.new_empty((*input.shape[:2], directions * width))

    size = 0
    norm = call.norm_hh is not None
    saved = SAVED.get(call.cell, int(call.zoneout_h is not None or norm))
    saved += 2 * gates + 1 if norm else 0
    if save_reserve and call.checkpoint_steps > 0 and saved:
        segments = (steps + call.checkpoint_steps - 1) // call.checkpoint_steps
        size = segments * directions * batch * (state + (hidden if lstm else 0))
    elif save_reserve and saved:
        count = steps * batch
        if call.lengths is not None:
            count = torch.library.get_ctx().new_dynamic_size()
        size = directions * count * saved * padded(hidden)
    return (
        rows(state),
        input.new_empty((directions, batch, state)),
        input.new_empty((directions, batch, hidden) if lstm else (0,)),
        rows(hidden) if return_cells else input.new_empty((0,)),
        input.new_empty((size,), dtype=compute_dtype(input.dtype)),
    )


@torch.library.register_fake("rnn_ext::recurrent_layer_backward")
def _fake_backward(*args):
    output_mask = args[-1]
    call = _Call(*args[4 : 4 + _TENSORS], *args[6 + _TENSORS : -1])
    return [
        call.input.new_empty(t.shape if asked and t is not None else (0,))
        for t, asked in zip(call.differentiable(), output_mask, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    call = _Call(*inputs[:-2])
    ctx.options = call[_TENSORS:]
    ctx.num_params = len(call.params)
    ctx.save_for_backward(call.input, *call.params, *call[2:_TENSORS], output[0], output[4])
    ctx.set_materialize_grads(False)


def _saved_call(ctx) -> tuple[_Call, Tensor, Tensor]:
    input, *rest = ctx.saved_tensors
    params, rest = rest[: ctx.num_params], rest[ctx.num_params :]
    return _Call(input, list(params), *rest[:-2], *ctx.options), rest[-2], rest[-1]


def _gradients(ctx, grads, mask: list[bool]) -> list:
    """For each of the operator's arguments; `mask`: of which are they wanted?"""
    call, output, reserve = _saved_call(ctx)
    *grads, grad_cells = grads
    if grad_cells is not None and grad_cells.dim() == 1:  # of cells that were not asked for
        grad_cells = None
    # Nobody differentiates again? Then the operator's own formula has nothing to add but its cost.
    again = torch.is_grad_enabled()
    with nullcontext() if again else torch._C._AutoDispatchBelowAutograd():
        found = torch.ops.rnn_ext.recurrent_layer_backward(
            *grads, grad_cells, *call[:_TENSORS], output, reserve, *call[_TENSORS:], mask
        )
    given = call.differentiable()
    return _by_argument(
        [
            g if asked and t is not None else None
            for g, asked, t in zip(found, mask, given, strict=True)
        ]
    )


def _backward(ctx, *grads):
    needs = dict(zip(_Call._fields, ctx.needs_input_grad[: len(_Call._fields)], strict=True))
    mask = [needs[name] for name in _DIFFERENTIABLE] + list(needs["params"])
    return *_gradients(ctx, grads[:4], mask), None, None


torch.library.register_autograd("rnn_ext::recurrent_layer", _backward, setup_context=_setup_context)


def _setup_double(ctx, inputs, output):
    call = _Call(*inputs[4 : 4 + _TENSORS], *inputs[6 + _TENSORS : -1])
    ctx.options = call[_TENSORS:]
    ctx.num_params = len(call.params)
    ctx.mask = list(inputs[-1])
    ctx.save_for_backward(*inputs[:4], call.input, *call.params, *call[2:_TENSORS])
    ctx.set_materialize_grads(False)


def _double_backward(ctx, found_grads):
    """Derivatives of the gradients: the layer in differentiable torch operations, twice derived."""
    grads, (input, *rest) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    params, rest = rest[: ctx.num_params], rest[ctx.num_params :]
    call = _Call(input, list(params), *rest, *ctx.options)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views that autograd can tell apart: a tensor used twice has a gradient for each use.
        grads, leaves = map(_differentiable_views, (grads, call.differentiable()))
        outputs = composite(call.with_differentiable(leaves))
        started = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [t for t, asked in zip(leaves, ctx.mask, strict=True) if asked and t is not None]
        first = torch.autograd.grad(
            [y for y, _ in started], wanted, [g for _, g in started],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
        given = [
            g
            for g, t, asked in zip(found_grads, leaves, ctx.mask, strict=True)
            if asked and t is not None
        ]
        pairs = [
            (y, g)
            for y, g in zip(first, given, strict=True)
            if y is not None and g is not None and y.requires_grad
        ]
        sources = [t for t in (*grads, *leaves) if t is not None]
        second = [None] * len(sources)
        if pairs:
            second = torch.autograd.grad(
                [y for y, _ in pairs], sources, [g for _, g in pairs],
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip
    second = iter(second)
    all_found = [None if t is None else next(second) for t in (*grads, *leaves)]
    of_call = _by_argument(all_found[4:])
    return *all_found[:4], *of_call[:_TENSORS], None, None, *of_call[_TENSORS:], None


torch.library.register_autograd(
    "rnn_ext::recurrent_layer_backward", _double_backward, setup_context=_setup_double
)


def _differentiable_views(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    views = [None if t is None else t.view_as(t) for t in tensors]
    return [t if t is None or t.requires_grad else t.requires_grad_() for t in views]


def composite(call: _Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The layer in differentiable torch operations, step by step: output, h_n, c_n, cells.

    Slow, and exact to any order of derivative.
    """
    x = call.input.transpose(0, 1) if call.batch_first else call.input
    steps, batch, _ = x.shape
    lstm, directions = call.cell == LSTM, call.directions
    w_hh = call.params[1]
    state, hidden = w_hh.shape[1], w_hh.shape[0] // _GATES.get(call.cell, 1)
    per_direction = len(call.params) // directions

    def in_time(t):
        return t.transpose(0, 1) if t is not None and call.batch_first else t

    resets, zoneout_h, zoneout_c = map(in_time, (call.resets, call.zoneout_h, call.zoneout_c))
    lengths = call.lengths
    if lengths is None:
        lengths = torch.full((batch,), steps, device=x.device)
    outputs, all_cells, h_n, c_n = [], [], [], []
    for d in range(directions):
        params = call.params[d * per_direction : (d + 1) * per_direction]
        b_ih = b_hh = None
        w_ih, w_hh, *rest = params
        if call.has_biases:
            b_ih, b_hh, *rest = rest
        w_hr = rest[0] if rest else None
        zero_h, zero_c = x.new_zeros(batch, state), x.new_zeros(batch, hidden)
        h = zero_h if call.h_0 is None else call.h_0[d]
        c = zero_c if call.c_0 is None else call.c_0[d]
        reset_h = h if call.reset_h is None else call.reset_h[d]
        reset_c = c if call.reset_c is None else call.reset_c[d]
        units = slice(d * hidden, (d + 1) * hidden)
        ys, cs = [zero_h] * steps, [zero_c] * steps
        for t in range(steps) if d == 0 else reversed(range(steps)):
            active = (t < lengths)[:, None]
            position = torch.full_like(lengths, t) if d == 0 else lengths - 1 - t
            if call.detach_steps > 0:
                cut = active & ((position > 0) & (position % call.detach_steps == 0))[:, None]
                h, c = torch.where(cut, h.detach(), h), torch.where(cut, c.detach(), c)
            if resets is not None:
                if d == 0:
                    anew = resets[t]
                else:
                    anew = (
                        resets[t + 1] & (t + 1 < lengths)
                        if t + 1 < steps
                        else torch.zeros_like(resets[0])
                    )
                anew = anew[:, None] & active
                h, c = torch.where(anew, reset_h, h), torch.where(anew, reset_c, c)
            read = h if call.hidden_mask is None else h * call.hidden_mask[d]
            if call.norm_ih is None:
                gx, gh = F.linear(x[t], w_ih, b_ih), F.linear(read, w_hh, b_hh)
            else:
                gx, gh = (
                    F.layer_norm(F.linear(v, w), w.shape[:1], gain[d], b, call.norm_eps)
                    for v, w, gain, b in (
                        (x[t], w_ih, call.norm_ih, b_ih),
                        (read, w_hh, call.norm_hh, b_hh),
                    )
                )
            new_c = c
            if lstm:
                i, f, g, o = (gx + gh).chunk(4, 1)
                new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                seen = new_c
                if call.norm_c is not None:
                    seen = F.layer_norm(
                        new_c, (hidden,), call.norm_c[d], call.norm_c_bias[d], call.norm_eps
                    )
                new_h = o.sigmoid() * seen.tanh()
                if w_hr is not None:
                    new_h = F.linear(new_h, w_hr)
            elif call.cell == GRU:
                (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, 1), gh.chunk(3, 1)
                r = (xr + hr).sigmoid()
                if call.reset_before:
                    reset = r * h
                    if call.hidden_mask is not None:
                        reset = reset * call.hidden_mask[d]
                    b_n = None if b_hh is None else b_hh[2 * hidden :]
                    n = (xn + F.linear(reset, w_hh[2 * hidden :], b_n)).tanh()
                else:
                    n = (xn + r * hn).tanh()
                new_h = n + (xz + hz).sigmoid() * (h - n)
            else:
                new_h = (gx + gh).relu() if call.cell == RNN_RELU else (gx + gh).tanh()
            if zoneout_h is not None:
                new_h = new_h + zoneout_h[t, :, units] * (h - new_h)
            if zoneout_c is not None:
                new_c = new_c + zoneout_c[t, :, units] * (c - new_c)
            h, c = torch.where(active, new_h, h), torch.where(active, new_c, c)
            ys[t], cs[t] = torch.where(active, h, 0), torch.where(active, c, 0)
        outputs.append(torch.stack(ys))
        all_cells.append(torch.stack(cs))
        h_n.append(h)
        c_n.append(c)
    output, cells = in_time(torch.cat(outputs, 2)), in_time(torch.cat(all_cells, 2))
    return output, torch.stack(h_n), torch.stack(c_n) if lstm else None, cells if lstm else None
