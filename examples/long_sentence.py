"""A longer sentence in windows of 10: one LSTM alone fails, two and a linear head do not.

The outputs of an LSTM lie between -1 and 1. Used as scores of V characters they give the right one
at most e / (e + (V - 1) / e) of the probability, so the loss cannot fall below
log(1 + (V - 1) / e^2), which is 1.45 for the 25 characters here: more layers or time do not help, a
linear layer behind them does.

    python examples/long_sentence.py            some ten seconds
    python examples/long_sentence.py --quick    a few seconds

Claims: the single LSTM's loss stays at 1 or more; two layers with a linear head reach 0.3 or less.
The text that each makes of the sentence is printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
import rnn_ext

SENTENCE = (
    "if you want to build a ship, don't drum up people together to collect wood and don't assign "
    "them tasks and work, but rather teach them to long for the endless immensity of the sea."
)
WINDOW = 10


class CharLSTM(nn.Module):
    """One-hot (B, T, V) to scores (B, T, V); without a head the outputs are the scores."""

    def __init__(self, characters: int, layers: int, head: bool) -> None:
        super().__init__()
        self.lstm = rnn_ext.LSTM(characters, characters, num_layers=layers, batch_first=True)
        self.head = nn.Linear(characters, characters) if head else nn.Identity()

    def forward(self, one_hot: Tensor) -> Tensor:
        return self.head(self.lstm(one_hot)[0])


@dataclass
class Run:
    layers: int
    head: bool
    losses: list[float] = field(default_factory=list)
    text: str = ""


def sentence_from(predicted: Tensor, vocabulary: common.Vocabulary) -> str:
    """What the windows say in turn: the first says 10 characters, each further one its last."""
    numbers = torch.cat([predicted[0], predicted[1:, -1]])
    return SENTENCE[0] + "".join(vocabulary.decode(numbers))


def train(epochs: int, learning_rate: float) -> dict[str, Run]:
    vocabulary = common.Vocabulary(SENTENCE)
    windows = vocabulary.encode(SENTENCE).unfold(0, WINDOW + 1, 1)  # (B, 11)
    inputs, targets = vocabulary.one_hot(windows[:, :-1]), windows[:, 1:]
    runs = {
        "one layer, no head": Run(layers=1, head=False),
        "two layers, linear head": Run(layers=2, head=True),
    }
    for name, run in runs.items():
        model = CharLSTM(len(vocabulary), run.layers, run.head)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        bar = tqdm(range(epochs), desc=f"{name:>23}", unit="epoch")
        for _ in bar:
            scores = model(inputs)
            loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        with torch.inference_mode():
            run.text = sentence_from(model(inputs).argmax(-1), vocabulary)
    return runs


def claims(runs: dict[str, Run]) -> dict[str, bool]:
    alone, stacked = (run.losses for run in runs.values())
    return {
        f"one layer without a head never gets below 1 (lowest: {min(alone):.3f})": min(alone) >= 1,
        f"two layers with a head reach {stacked[-1]:.3f}, at most 0.3": stacked[-1] <= 0.3,
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=200, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=0.02, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv, epochs=150)
    runs = train(arguments.epochs, arguments.learning_rate)
    with common.picture(arguments.plot) as axis:
        for name, run in runs.items():
            print(f"\n{name}, loss {run.losses[-1]:.3f}:\n    {run.text}")
            axis.plot(run.losses, label=f"{name}: {run.text[:34]!r} ...")
        axis.axhline(0.3, color="gray", linestyle=":")
        axis.set(xlabel="epoch", ylabel="loss, nats a character", ylim=(0, None))
        axis.legend()
        print()
    return common.report(claims(runs))


if __name__ == "__main__":
    sys.exit(main())
