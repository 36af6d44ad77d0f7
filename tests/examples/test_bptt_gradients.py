"""Truncated BPTT against the literal double loop; the hand-written backward pass; the shapes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import hand_written_rnn
import numpy_char_rnn
import shapes
import truncated_bptt
from char_rnn import CharRNN

STEPS, CHARACTERS, HIDDEN = 23, 7, 5


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double_loop(model: CharRNN, inputs, targets, first_step) -> np.ndarray:
    """For every t: its loss, back through t, t-1, ..., first_step(t). One row of all gradients."""
    named = dict(model.named_parameters())
    weights = {name: parameter.detach().numpy() for name, parameter in named.items()}
    x = inputs.numpy()
    h = [np.zeros(HIDDEN)]
    for t in range(STEPS):
        a = weights["rnn.weight_ih_l0"] @ x[t] + weights["rnn.bias_ih_l0"]
        h.append(np.tanh(a + weights["rnn.weight_hh_l0"] @ h[t] + weights["rnn.bias_hh_l0"]))
    gradients = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for t in range(STEPS):
        scores = weights["head.weight"] @ h[t + 1] + weights["head.bias"]
        dscores = np.exp(scores) / np.exp(scores).sum()
        dscores[targets[t]] -= 1
        dscores /= STEPS
        gradients["head.weight"] += np.outer(dscores, h[t + 1])
        gradients["head.bias"] += dscores
        dh = weights["head.weight"].T @ dscores
        for s in range(t, first_step(t) - 1, -1):
            da = dh * (1 - h[s + 1] ** 2)
            gradients["rnn.weight_ih_l0"] += np.outer(da, x[s])
            gradients["rnn.weight_hh_l0"] += np.outer(da, h[s])
            gradients["rnn.bias_ih_l0"] += da
            gradients["rnn.bias_hh_l0"] += da
            dh = weights["rnn.weight_hh_l0"].T @ da
    return np.concatenate([gradients[name].ravel() for name in named])


@pytest.mark.parametrize("k", [1, 4, STEPS, STEPS + 3])
@pytest.mark.parametrize("style", ["full", "window", "chunk"])
@pytest.mark.usefixtures("double")
def test_truncated_bptt_is_the_double_loop(style, k):
    losses = {
        "full": truncated_bptt.full_loss,
        "window": partial(truncated_bptt.window_loss, k=k),
        "chunk": partial(truncated_bptt.chunk_loss, k=k),
    }
    first_steps = {
        "full": lambda t: 0,
        "window": lambda t: max(0, t - k + 1),
        "chunk": lambda t: t // k * k,
    }
    model = CharRNN(CHARACTERS, HIDDEN)
    inputs, targets = torch.randn(STEPS, CHARACTERS), torch.randint(CHARACTERS, (STEPS,))
    loss = losses[style](model, inputs, targets)
    torch.testing.assert_close(loss, truncated_bptt.full_loss(model, inputs, targets))
    gradients = truncated_bptt.gradients(model, loss).numpy()
    expected = double_loop(model, inputs, targets, first_steps[style])
    assert np.abs(gradients - expected).max() <= 1e-10


def test_numpy_gradients_are_finite_differences():
    generator = np.random.default_rng(0)
    weights = numpy_char_rnn.init_weights(6, 5, generator)
    for weight in weights.values():
        weight += 0.3 * generator.standard_normal(weight.shape)
    inputs, targets = generator.integers(6, size=8), generator.integers(6, size=8)
    h_0 = generator.standard_normal(5)

    def loss() -> float:
        return numpy_char_rnn.forward_backward(weights, inputs, targets, h_0)[0]

    _, gradients, _ = numpy_char_rnn.forward_backward(weights, inputs, targets, h_0)
    for name, weight in weights.items():
        place = tuple(generator.integers(size) for size in weight.shape)
        before = weight[place]
        weight[place] = before + 1e-5
        above = loss()
        weight[place] = before - 1e-5
        below = loss()
        weight[place] = before
        assert gradients[name][place] == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-9)


def test_numpy_char_rnn_clips_and_notices_wrong_gradients():
    weights = {"w": np.zeros(2)}
    sums = {"w": np.zeros(2)}
    numpy_char_rnn.adagrad(weights, {"w": np.array([100.0, -1.0])}, sums, learning_rate=0.1)
    assert sums["w"] == pytest.approx([25.0, 1.0])
    assert weights["w"] == pytest.approx([-0.1, 0.1])
    result = numpy_char_rnn.Result([0.0] * 100, 1e-9, numpy_char_rnn.TEXT)
    assert list(numpy_char_rnn.claims(result).values()) == [False, True, True]


def test_hand_written_rnn_notices_a_difference():
    by_hand = hand_written_rnn.HandWrittenRNN(3, 4)
    other = hand_written_rnn.HandWrittenRNN(3, 4)
    input = torch.randn(5, 2, 3)
    assert hand_written_rnn.largest_difference(by_hand, by_hand, input) == 0
    difference = hand_written_rnn.largest_difference(by_hand, other, input)
    assert difference > 1e-2
    assert not all(hand_written_rnn.claims({"batch_first=False": difference}).values())


@pytest.mark.parametrize("directions", [1, 2])
def test_shapes_notices_wrong_values_and_shapes(directions):
    input = torch.arange(1.0, 13.0).view(4, 3, 1)
    good = shapes.run(input, bidirectional=directions == 2)
    assert good.output.shape == (4, 3, 2 * directions)
    assert good.h_n.shape == (2 * directions, 4, 2)
    assert all(shapes.claims({directions: good}).values())
    flipped = shapes.Result(good.output.flip(1), good.h_n, good.torch_output, good.torch_h_n)
    assert not any(shapes.claims({directions: flipped}).values())
