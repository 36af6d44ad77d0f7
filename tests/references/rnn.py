"""Elman RNN, one layer, one direction: the definition, forward and backward through time.

Forward, for t = 1 .. T (f is tanh or relu; matrices are torch's, (out, in); rows are the batch):

    a_t = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh
    h_t = f(a_t)

Backward, for t = T .. 1, with dy_t the gradient that reaches the output at step t:

    dh_t     = dy_t + (what step t+1 sends back; dh_n at t = T)
    da_t     = dh_t f'(a_t)          tanh: 1 - h_t^2      relu: 1 where h_t > 0, else 0
    dx_t     = da_t W_ih
    dh_{t-1} = da_t W_hh
    dW_ih = sum_t da_t^T x_t      dW_hh = sum_t da_t^T h_{t-1}      db_ih = db_hh = sum_t,b da_t
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .activations import STANDARD, Activation, Array

NUM_GATES = 1


class Params(NamedTuple):
    weight_ih: Array  # (H, I)
    weight_hh: Array  # (H, H)
    bias_ih: Array | None = None  # (H,)
    bias_hh: Array | None = None  # (H,)


def forward(
    x: Array,  # (T, B, I)
    initial: tuple[Array],  # h_0 (B, H)
    params: Params,
    activation: Activation = STANDARD,
    nonlinearity: str = "tanh",
) -> tuple[Array, tuple[Array], Any]:
    """Returns y (T, B, H), the final state (h_n,) and what backward needs."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    weight_ih, weight_hh, bias_ih, bias_hh = params
    (h,) = initial
    hs = [h]  # h_0 .. h_T, each (B, H)
    for x_t in x:
        a = x_t @ weight_ih.T + h @ weight_hh.T  # (B, H)
        if bias_ih is not None:
            a = a + bias_ih + bias_hh
        h = activation.tanh(a) if nonlinearity == "tanh" else np.maximum(a, 0.0)
        hs.append(h)
    return np.stack(hs[1:]), (h,), (x, params, activation, nonlinearity, hs)


def backward(
    dy: Array,  # (T, B, H)
    dfinal: tuple[Array],  # dh_n (B, H)
    saved: Any,
) -> tuple[Array, tuple[Array], Params]:
    """Returns dx (T, B, I), (dh_0,) and the gradient of every parameter."""
    x, params, activation, nonlinearity, hs = saved
    (dh,) = dfinal
    dx = np.empty_like(x)
    dweight_ih = np.zeros_like(params.weight_ih)
    dweight_hh = np.zeros_like(params.weight_hh)
    dbias = np.zeros(params.weight_hh.shape[0])
    for t in reversed(range(len(x))):
        h_prev, h = hs[t], hs[t + 1]
        dh = dh + dy[t]
        da = dh * (activation.d_tanh(h) if nonlinearity == "tanh" else h > 0.0)  # (B, H)
        dx[t] = da @ params.weight_ih
        dweight_ih += da.T @ x[t]
        dweight_hh += da.T @ h_prev
        dbias += da.sum(axis=0)
        dh = da @ params.weight_hh
    if params.bias_ih is None:
        return dx, (dh,), Params(dweight_ih, dweight_hh)
    return dx, (dh,), Params(dweight_ih, dweight_hh, dbias, dbias.copy())
