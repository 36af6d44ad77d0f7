"""A tanh RNN of 20 units learns one sentence, character by character, with Adam.

    python examples/char_rnn.py            a few seconds
    python examples/char_rnn.py --quick    300 epochs instead of 600

Claim: at the end it predicts every next character of the sentence (accuracy 1.0).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import common
import rnn_ext

TEXT = "hello world! nice to meet you! i love iron-man"


class CharRNN(nn.Module):
    """One-hot characters (T, V), an RNN, and a score (T, V) for every character to follow."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.rnn = rnn_ext.RNN(characters, hidden)
        self.head = nn.Linear(hidden, characters)

    def forward(self, one_hot: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = self.rnn(one_hot, h_0)
        return self.head(output), h_n


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    text: str = ""


def train(hidden: int, epochs: int, learning_rate: float) -> Result:
    vocabulary = common.Vocabulary(TEXT)
    numbers = vocabulary.encode(TEXT)
    inputs, targets = vocabulary.one_hot(numbers[:-1]), numbers[1:]
    model = CharRNN(len(vocabulary), hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    result = Result()
    bar = trange(epochs, unit="epoch")
    for _ in bar:
        scores, _ = model(inputs)
        loss = F.cross_entropy(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.losses.append(loss.item())
        result.accuracies.append((scores.argmax(-1) == targets).float().mean().item())
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {result.accuracies[-1]:.3f}", refresh=False)
    with torch.inference_mode():
        predicted = model(inputs)[0].argmax(-1)
    result.text = TEXT[0] + "".join(vocabulary.decode(predicted))
    return result


def claims(result: Result) -> dict[str, bool]:
    right = sum(a == b for a, b in zip(result.text[1:], TEXT[1:], strict=True)) / (len(TEXT) - 1)
    return {f"accuracy {right:.3f}, at least 1.0: {result.text!r}": right == 1}


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=600, help="(default: %(default)s)")
    add("--hidden", type=int, default=20, help="hidden units (default: %(default)s)")
    add("--learning-rate", type=float, default=0.01, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv, epochs=300)
    result = train(arguments.hidden, arguments.epochs, arguments.learning_rate)
    with common.picture(arguments.plot, columns=2) as (left, right):
        left.semilogy(result.losses)
        left.set(xlabel="epoch", ylabel="loss, nats a character")
        right.plot(result.accuracies, color="tab:green")
        right.set(xlabel="epoch", ylabel="accuracy", title=result.text)
    return common.report(claims(result))


if __name__ == "__main__":
    sys.exit(main())
