"""LSTM, one layer, one direction, with optional projection: forward and backward through time.

Gate order in every 4H-sized array is torch's: i, f, g, o. Forward, for t = 1 .. T:

    [a_i a_f a_g a_o] = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh
    i, f, o = sigmoid(a_i, a_f, a_o)      g = tanh(a_g)
    c_t = f c_{t-1} + i g
    m_t = o tanh(c_t)
    h_t = m_t                   without projection; h_t is R = H wide
    h_t = m_t W_hr^T            with projection; h_t is R = P < H wide

Backward, for t = T .. 1 (dh and dc arrive from step t+1, or are dh_n and dc_n at t = T):

    dh_t     = dh + dy_t
    dm_t     = dh_t W_hr            (dh_t without projection);     dW_hr = sum_t dh_t^T m_t
    do       = dm_t tanh(c_t)
    dc_t     = dc + dm_t o (1 - tanh(c_t)^2)
    di       = dc_t g        df = dc_t c_{t-1}        dg = dc_t i
    da_s     = ds s (1 - s)  for s = i, f, o          da_g = dg (1 - g^2)
    dc_{t-1} = dc_t f
    dx_t     = da_t W_ih            dh_{t-1} = da_t W_hh
    dW_ih = sum_t da_t^T x_t        dW_hh = sum_t da_t^T h_{t-1}      db_ih = db_hh = sum_t,b da_t
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .activations import STANDARD, Activation, Array

NUM_GATES = 4


class Params(NamedTuple):
    weight_ih: Array  # (4H, I)
    weight_hh: Array  # (4H, R)
    bias_ih: Array | None = None  # (4H,)
    bias_hh: Array | None = None  # (4H,)
    weight_hr: Array | None = None  # (P, H), where there is a projection


def forward(
    x: Array,  # (T, B, I)
    initial: tuple[Array, Array],  # h_0 (B, R), c_0 (B, H)
    params: Params,
    activation: Activation = STANDARD,
) -> tuple[Array, tuple[Array, Array], Any]:
    """Returns y (T, B, R), the final states (h_n, c_n) and what backward needs."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = params
    h, c = initial
    ys = []
    steps = []  # per step: h_{t-1}, c_{t-1}, the four gates, tanh(c_t)
    for x_t in x:
        a = x_t @ weight_ih.T + h @ weight_hh.T  # (B, 4H)
        if bias_ih is not None:
            a = a + bias_ih + bias_hh
        a_i, a_f, a_g, a_o = np.split(a, NUM_GATES, axis=1)  # each (B, H)
        i, f, o = (activation.sigmoid(a_s) for a_s in (a_i, a_f, a_o))
        g = activation.tanh(a_g)
        h_prev, c_prev = h, c
        c = f * c_prev + i * g
        tanh_c = activation.tanh(c)
        m = o * tanh_c  # (B, H)
        h = m if weight_hr is None else m @ weight_hr.T  # (B, R)
        ys.append(h)
        steps.append((h_prev, c_prev, i, f, g, o, tanh_c))
    return np.stack(ys), (h, c), (x, params, activation, steps)


def backward(
    dy: Array,  # (T, B, R)
    dfinal: tuple[Array, Array],  # dh_n (B, R), dc_n (B, H)
    saved: Any,
) -> tuple[Array, tuple[Array, Array], Params]:
    """Returns dx (T, B, I), (dh_0, dc_0) and the gradient of every parameter."""
    x, params, activation, steps = saved
    weight_hr = params.weight_hr
    dh, dc = dfinal
    dx = np.empty_like(x)
    dweight_ih = np.zeros_like(params.weight_ih)
    dweight_hh = np.zeros_like(params.weight_hh)
    dbias = np.zeros(params.weight_hh.shape[0])
    dweight_hr = None if weight_hr is None else np.zeros_like(weight_hr)
    for t in reversed(range(len(x))):
        h_prev, c_prev, i, f, g, o, tanh_c = steps[t]
        dh = dh + dy[t]
        if weight_hr is None:
            dm = dh
        else:
            dm = dh @ weight_hr  # (B, H)
            dweight_hr += dh.T @ (o * tanh_c)
        do = dm * tanh_c
        dc = dc + dm * o * activation.d_tanh(tanh_c)
        di, df, dg = dc * g, dc * c_prev, dc * i
        da = np.concatenate(  # (B, 4H)
            [
                di * activation.d_sigmoid(i),
                df * activation.d_sigmoid(f),
                dg * activation.d_tanh(g),
                do * activation.d_sigmoid(o),
            ],
            axis=1,
        )
        dx[t] = da @ params.weight_ih
        dweight_ih += da.T @ x[t]
        dweight_hh += da.T @ h_prev
        dbias += da.sum(axis=0)
        dh = da @ params.weight_hh
        dc = dc * f
    has_bias = params.bias_ih is not None
    dparams = Params(
        dweight_ih,
        dweight_hh,
        dbias if has_bias else None,
        dbias.copy() if has_bias else None,
        dweight_hr,
    )
    return dx, (dh, dc), dparams
