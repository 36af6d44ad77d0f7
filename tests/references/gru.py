"""GRU, one layer, one direction: the definition, forward and backward through time.

Gate order in every 3H-sized array is torch's: r, z, n. The product with h_{t-1} and its bias stay
apart from the product with x_t, because r multiplies only the former inside n. For t = 1 .. T:

    [u_r u_z u_n] = x_t W_ih^T + b_ih           [v_r v_z v_n] = h_{t-1} W_hh^T + b_hh
    r = sigmoid(u_r + v_r)                      z = sigmoid(u_z + v_z)
    n = tanh(u_n + r v_n)
    h_t = (1 - z) n + z h_{t-1}

Backward, for t = T .. 1 (dh arrives from step t+1, or is dh_n at t = T):

    dh_t = dh + dy_t
    da_n = dh_t (1 - z) (1 - n^2)
    da_z = dh_t (h_{t-1} - n) z (1 - z)
    da_r = da_n v_n r (1 - r)
    du   = [da_r da_z da_n]                     dv = [da_r da_z (da_n r)]
    dx_t = du W_ih                              dh_{t-1} = dv W_hh + dh_t z
    dW_ih = sum_t du^T x_t                      dW_hh = sum_t dv^T h_{t-1}
    db_ih = sum_t,b du                          db_hh = sum_t,b dv
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .activations import STANDARD, Activation, Array

NUM_GATES = 3


class Params(NamedTuple):
    weight_ih: Array  # (3H, I)
    weight_hh: Array  # (3H, H)
    bias_ih: Array | None = None  # (3H,)
    bias_hh: Array | None = None  # (3H,)


def forward(
    x: Array,  # (T, B, I)
    initial: tuple[Array],  # h_0 (B, H)
    params: Params,
    activation: Activation = STANDARD,
) -> tuple[Array, tuple[Array], Any]:
    """Returns y (T, B, H), the final state (h_n,) and what backward needs."""
    weight_ih, weight_hh, bias_ih, bias_hh = params
    (h,) = initial
    ys = []
    steps = []  # per step: h_{t-1}, r, z, n, v_n
    for x_t in x:
        u = x_t @ weight_ih.T  # (B, 3H)
        v = h @ weight_hh.T  # (B, 3H)
        if bias_ih is not None:
            u = u + bias_ih
            v = v + bias_hh
        u_r, u_z, u_n = np.split(u, NUM_GATES, axis=1)  # each (B, H)
        v_r, v_z, v_n = np.split(v, NUM_GATES, axis=1)
        r = activation.sigmoid(u_r + v_r)
        z = activation.sigmoid(u_z + v_z)
        n = activation.tanh(u_n + r * v_n)
        h_prev = h
        h = (1.0 - z) * n + z * h_prev
        ys.append(h)
        steps.append((h_prev, r, z, n, v_n))
    return np.stack(ys), (h,), (x, params, activation, steps)


def backward(
    dy: Array,  # (T, B, H)
    dfinal: tuple[Array],  # dh_n (B, H)
    saved: Any,
) -> tuple[Array, tuple[Array], Params]:
    """Returns dx (T, B, I), (dh_0,) and the gradient of every parameter."""
    x, params, activation, steps = saved
    (dh,) = dfinal
    dx = np.empty_like(x)
    dweight_ih = np.zeros_like(params.weight_ih)
    dweight_hh = np.zeros_like(params.weight_hh)
    dbias_ih = np.zeros(params.weight_hh.shape[0])
    dbias_hh = np.zeros(params.weight_hh.shape[0])
    for t in reversed(range(len(x))):
        h_prev, r, z, n, v_n = steps[t]
        dh = dh + dy[t]
        da_n = dh * (1.0 - z) * activation.d_tanh(n)
        da_z = dh * (h_prev - n) * activation.d_sigmoid(z)
        da_r = da_n * v_n * activation.d_sigmoid(r)
        du = np.concatenate([da_r, da_z, da_n], axis=1)  # (B, 3H)
        dv = np.concatenate([da_r, da_z, da_n * r], axis=1)  # (B, 3H)
        dx[t] = du @ params.weight_ih
        dweight_ih += du.T @ x[t]
        dweight_hh += dv.T @ h_prev
        dbias_ih += du.sum(axis=0)
        dbias_hh += dv.sum(axis=0)
        dh = dv @ params.weight_hh + dh * z
    if params.bias_ih is None:
        return dx, (dh,), Params(dweight_ih, dweight_hh)
    return dx, (dh,), Params(dweight_ih, dweight_hh, dbias_ih, dbias_hh)
