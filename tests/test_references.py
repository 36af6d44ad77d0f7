"""The NumPy references are what everything else is measured by, so they are measured here.

By torch.nn in float64 (values and gradients) and, independently of torch, by finite differences.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from numpy_twin import CELLS, assert_close, make_module, random_step, run_numpy, run_torch
from references import LINEAR, STANDARD, Activation, Array, gru, lstm, rnn, stack

TOLERANCE = 1e-12
STEPS, BATCH, INPUT, HIDDEN = 7, 4, 5, 6
BATCH_SIZES = (4, 4, 3, 1, 1)  # lengths 5, 3, 3, 2


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_equals_torch(
    cell: str, layers: int, bidirectional: bool, bias: bool, packed: bool
) -> None:
    module = make_module(
        nn, cell, INPUT, HIDDEN, num_layers=layers, bidirectional=bidirectional, bias=bias
    )
    batch_sizes = torch.tensor(BATCH_SIZES) if packed else None
    step = random_step(module, STEPS, BATCH, batch_sizes)
    expected = run_torch(module, *step, batch_sizes=batch_sizes)
    assert_close(run_numpy(module, *step, batch_sizes=batch_sizes), expected, TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_masks_equal_torch(cell: str) -> None:
    """torch draws one mask over the whole output of each layer but the last."""
    module = make_module(nn, cell, INPUT, HIDDEN, num_layers=3, bidirectional=True, dropout=0.4)
    step = random_step(module, STEPS, BATCH)
    torch.manual_seed(2)
    expected = run_torch(module, *step)
    torch.manual_seed(2)
    masks = [nn.functional.dropout(torch.ones_like(step[2]), 0.4) for _ in range(2)]
    assert_close(run_numpy(module, *step, masks=masks), expected, TOLERANCE)


def single_layer(cell: str, rng: np.random.Generator) -> tuple[tuple[Array, ...], list[Array]]:
    """Initial states and parameters of one small layer (B = 2, I = 3, H = 2, or 3 to P = 2).

    Small enough that nothing grows under linear activations, where LSTM is a polynomial in x.
    """
    batch, inputs, hidden = 2, 3, 3 if cell == "lstm_proj" else 2
    width = 2
    gates = {"lstm": lstm.NUM_GATES, "lstm_proj": lstm.NUM_GATES, "gru": gru.NUM_GATES}
    rows = gates.get(cell, rnn.NUM_GATES) * hidden
    shapes = [(rows, inputs), (rows, width), (rows,), (rows,)]
    shapes += [(width, hidden)] if cell == "lstm_proj" else []
    states = [(batch, width)] + ([(batch, hidden)] if cell.startswith("lstm") else [])
    return (
        tuple(0.5 * rng.standard_normal(shape) for shape in states),
        [0.5 * rng.standard_normal(shape) for shape in shapes],
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("activation", [STANDARD, LINEAR], ids=["standard", "linear"])
def test_backward_is_the_derivative_of_forward(cell: str, activation: Activation) -> None:
    """Central differences in every coordinate of every argument of a single-layer function."""
    rng = np.random.default_rng(3)
    states, weights = single_layer(cell, rng)
    implementation = stack.CELLS[cell.removesuffix("_proj")]
    x = rng.standard_normal((4, 2, 3))
    dy = rng.standard_normal((4, 2, states[0].shape[1]))
    dfinal = tuple(rng.standard_normal(state.shape) for state in states)
    params = implementation.params(*weights)

    def loss() -> float:
        y, final, _ = implementation.forward(x, states, params, activation=activation)
        return sum(float((a * b).sum()) for a, b in zip((y, *final), (dy, *dfinal), strict=True))

    _, _, saved = implementation.forward(x, states, params, activation=activation)
    dx, dstates, dparams = implementation.backward(dy, dfinal, saved)
    arguments = [x, *states, *weights]
    gradients = [dx, *dstates, *(g for g in dparams if g is not None)]
    step = 1e-6
    for argument, gradient in zip(arguments, gradients, strict=True):
        numeric = np.empty_like(argument)
        for position in itertools.product(*map(range, argument.shape)):
            value = argument[position]
            argument[position] = value + step
            above = loss()
            argument[position] = value - step
            numeric[position] = (above - loss()) / (2 * step)
            argument[position] = value
        np.testing.assert_allclose(gradient, numeric, rtol=1e-7, atol=1e-7)


def test_linear_activations_are_tangents_at_zero() -> None:
    x = np.array([-1e-4, 0.0, 1e-4])
    for name in ("sigmoid", "tanh"):
        curve, line = getattr(STANDARD, name)(x), getattr(LINEAR, name)(x)
        np.testing.assert_allclose(line, curve, atol=1e-11, rtol=0)
        slope = getattr(LINEAR, f"d_{name}")(line)
        np.testing.assert_allclose(slope, getattr(STANDARD, f"d_{name}")(curve), atol=1e-7, rtol=0)


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        values = STANDARD.sigmoid(np.array([-1000.0, -700.0, 0.0, 1000.0]))
    np.testing.assert_allclose(values, [0.0, np.exp(-700.0), 0.5, 1.0], rtol=1e-12)


def test_packed_rows() -> None:
    """Data rows of a PackedSequence: step 0 of each sequence, step 1 of each that has one, ..."""
    rows = stack.packed_rows([3, 2, 2, 1])
    assert [index[:, 0].tolist() for index, _ in rows] == [[0, 3, 5, 7], [1, 4, 6], [2]]
    assert [columns for _, columns in rows] == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_flat_weights_round_trip() -> None:
    module = make_module(nn, "lstm_proj", INPUT, HIDDEN, num_layers=2, bidirectional=True)
    flat = [p.detach().numpy() for p in module._flat_weights]
    params = stack.split_flat_weights("lstm", flat, bias=True, projected=True)
    assert len(params) == 4
    assert all(a is b for a, b in zip(stack.join_flat_weights(params), flat, strict=True))
    with pytest.raises(ValueError, match="do not divide"):
        stack.split_flat_weights("gru", flat[:3], bias=True)


def test_unknown_nonlinearity() -> None:
    states, weights = single_layer("rnn_tanh", np.random.default_rng(0))
    with pytest.raises(ValueError, match="nonlinearity"):
        rnn.forward(np.zeros((1, 2, 3)), states, rnn.Params(*weights), nonlinearity="sin")
