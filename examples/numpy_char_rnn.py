"""A character RNN in NumPy with its backward pass written by hand, checked against rnn_ext.

The network of a hundred tutorials: a tanh RNN of 100 units reads the alphabet in stretches of 10
letters, carries its state from one to the next, and learns to say which letter follows.
Backpropagation through time, clipping at 5 and Adagrad are written out. The parameters of an
rnn_ext.RNN are views of the very NumPy arrays, so both see the same weights at every step and their
gradients can be compared at every step.

    python examples/numpy_char_rnn.py            about ten seconds
    python examples/numpy_char_rnn.py --quick    a few seconds

Claims: every gradient of every step agrees to 1e-10 (float64), the loss falls to 0.01 nats a
letter, and the text sampled after "a" goes on through the alphabet.
"""

from __future__ import annotations

import string
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import trange

import common
import rnn_ext

TEXT = string.ascii_lowercase
STRETCH = 10
CLIP = 5.0
Weights = dict[str, np.ndarray]


def init_weights(characters: int, hidden: int, generator: np.random.Generator) -> Weights:
    def small(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape) * 0.01

    return {
        "weight_ih": small(hidden, characters),
        "weight_hh": small(hidden, hidden),
        "bias": np.zeros(hidden),
        "weight_out": small(characters, hidden),
        "bias_out": np.zeros(characters),
    }


def forward_backward(
    weights: Weights, inputs: np.ndarray, targets: np.ndarray, h_0: np.ndarray
) -> tuple[float, Weights, np.ndarray]:
    """Mean loss of one stretch, its gradients, and the state after it. Shapes: (T), (T), (H)."""
    steps = len(inputs)
    h = [h_0]  # h[t + 1] is the state after step t
    probabilities = []
    loss = 0.0
    for t in range(steps):
        # A one-hot input only picks a column of weight_ih.
        recurrent = weights["weight_hh"] @ h[t]
        h.append(np.tanh(weights["weight_ih"][:, inputs[t]] + recurrent + weights["bias"]))
        scores = weights["weight_out"] @ h[t + 1] + weights["bias_out"]
        exponentials = np.exp(scores - scores.max())
        probabilities.append(exponentials / exponentials.sum())
        loss -= np.log(probabilities[t][targets[t]]) / steps

    gradients = {name: np.zeros_like(weight) for name, weight in weights.items()}
    dh_next = np.zeros_like(h_0)
    for t in reversed(range(steps)):
        dscores = probabilities[t].copy()
        dscores[targets[t]] -= 1.0
        dscores /= steps
        gradients["weight_out"] += np.outer(dscores, h[t + 1])
        gradients["bias_out"] += dscores
        dh = weights["weight_out"].T @ dscores + dh_next
        da = dh * (1 - h[t + 1] ** 2)
        gradients["weight_ih"][:, inputs[t]] += da
        gradients["weight_hh"] += np.outer(da, h[t])
        gradients["bias"] += da
        dh_next = weights["weight_hh"].T @ da
    return loss, gradients, h[-1]


def adagrad(weights: Weights, gradients: Weights, sums: Weights, learning_rate: float) -> None:
    for name, weight in weights.items():
        gradient = np.clip(gradients[name], -CLIP, CLIP)
        sums[name] += gradient**2
        weight -= learning_rate * gradient / np.sqrt(sums[name] + 1e-8)  # in place


def sample(weights: Weights, start: int, count: int, generator: np.random.Generator) -> list[int]:
    """`count` characters, each drawn from what the network expects after the one before."""
    h = np.zeros(len(weights["bias"]))
    characters = [start]
    for _ in range(count):
        recurrent = weights["weight_hh"] @ h
        h = np.tanh(weights["weight_ih"][:, characters[-1]] + recurrent + weights["bias"])
        scores = weights["weight_out"] @ h + weights["bias_out"]
        exponentials = np.exp(scores - scores.max())
        chances = exponentials / exponentials.sum()
        characters.append(int(generator.choice(len(chances), p=chances)))
    return characters


class Twin:
    """The same network made of rnn_ext.RNN; its parameters are the NumPy arrays themselves."""

    def __init__(self, weights: Weights) -> None:
        characters, hidden = weights["weight_out"].shape
        self.rnn = rnn_ext.RNN(characters, hidden, dtype=torch.float64)
        self.head = nn.Linear(hidden, characters, dtype=torch.float64)
        nn.init.zeros_(self.rnn.bias_hh_l0)  # the network has one bias, torch's RNN has two
        self.rnn.bias_hh_l0.requires_grad_(False)
        self.parameters = {
            "weight_ih": self.rnn.weight_ih_l0,
            "weight_hh": self.rnn.weight_hh_l0,
            "bias": self.rnn.bias_ih_l0,
            "weight_out": self.head.weight,
            "bias_out": self.head.bias,
        }
        for name, parameter in self.parameters.items():
            parameter.data = torch.from_numpy(weights[name])

    def forward_backward(
        self, inputs: np.ndarray, targets: np.ndarray, h_0: np.ndarray
    ) -> tuple[float, Weights, np.ndarray]:
        """What the function of that name does."""
        one_hot = F.one_hot(torch.from_numpy(inputs), self.rnn.input_size).double()
        output, h_n = self.rnn(one_hot, torch.from_numpy(h_0)[None])
        loss = F.cross_entropy(self.head(output), torch.from_numpy(targets))
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        named = zip(self.parameters, (gradient.numpy() for gradient in gradients), strict=True)
        return loss.item(), dict(named), h_n[0].detach().numpy()


@dataclass
class Result:
    losses: list[float]
    difference: float
    text: str


def train(hidden: int, steps: int, learning_rate: float, seed: int) -> Result:
    """Every step: both forward and backward passes on the same weights, then NumPy's update."""
    generator = np.random.default_rng(seed)
    vocabulary = common.Vocabulary(TEXT)
    weights = init_weights(len(vocabulary), hidden, generator)
    sums = {name: np.zeros_like(weight) for name, weight in weights.items()}
    twin = Twin(weights)
    losses = []
    difference = 0.0
    text = vocabulary.encode(TEXT).numpy()
    position = 0
    bar = trange(steps, unit="step")
    for _ in bar:
        if position == 0:  # the text begins (again); within it the state is carried on
            h = np.zeros(hidden)
        stretch = text[position : position + STRETCH + 1]
        loss, gradients, h_n = forward_backward(weights, stretch[:-1], stretch[1:], h)
        _, twin_gradients, twin_h_n = twin.forward_backward(stretch[:-1], stretch[1:], h)
        apart = [np.abs(gradients[name] - twin_gradients[name]).max() for name in weights]
        difference = max(difference, *apart, np.abs(h_n - twin_h_n).max())
        adagrad(weights, gradients, sums, learning_rate)
        losses.append(loss)
        h = h_n
        position += STRETCH
        if position >= len(text) - 1:
            position = 0
        if len(losses) % 100 == 0:
            bar.set_postfix_str(f"loss {loss:.4f}, gradients differ by {difference:.0e}")
    start = vocabulary.number["a"]
    letters = sample(weights, start, len(TEXT) - 1, generator)
    return Result(losses, difference, "".join(vocabulary.decode(letters)))


def claims(result: Result) -> dict[str, bool]:
    loss = float(np.mean(result.losses[-100:]))
    return {
        f"all gradients and states within {result.difference:.1e}, at most 1e-10": (
            result.difference <= 1e-10
        ),
        f"loss {loss:.4f}, at most 0.01": loss <= 0.01,
        f"after 'a' comes the alphabet: {result.text}": result.text == TEXT,
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=3000, help="stretches to learn from (default: %(default)s)")
    add("--hidden", type=int, default=100, help="hidden units (default: %(default)s)")
    add("--learning-rate", type=float, default=0.03, help="of Adagrad (default: %(default)s)")
    arguments = common.parse(parser, argv, steps=1500)
    result = train(arguments.hidden, arguments.steps, arguments.learning_rate, arguments.seed)
    with common.picture(arguments.plot) as axis:
        axis.semilogy(result.losses, linewidth=0.8)
        axis.axhline(0.01, color="gray", linestyle=":")
        axis.set(
            xlabel="stretch of 10 letters",
            ylabel="loss, nats a letter",
            title=f"NumPy and rnn_ext, gradients within {result.difference:.0e}\n{result.text}",
        )
    return common.report(claims(result))


if __name__ == "__main__":
    sys.exit(main())
