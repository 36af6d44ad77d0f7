"""A word-level RNN that learns to finish one sentence: embedding 5, hidden 20, Adam, 151 steps.

    python examples/finish_the_sentence.py    a few seconds (--quick is the same)

Claims: after 151 steps the loss is at most 0.45, and from "We" the model says the whole sentence,
each word chosen after the ones it said itself.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import common
import rnn_ext

SENTENCE = "We are going to watch Avengers End Game"


class WordRNN(nn.Module):
    """Words (B, T) to scores (B, T, V) of the word to follow."""

    def __init__(self, words: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        self.rnn = rnn_ext.RNN(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, words)

    def forward(self, words: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = self.rnn(self.embedding(words), h_0)
        return self.head(output), h_n


@torch.inference_mode()
def finish(model: WordRNN, start: int, count: int) -> list[int]:
    """`count` words after `start`: each the likeliest after those before it."""
    words, h = [start], None
    for _ in range(count):
        scores, h = model(torch.tensor([[words[-1]]]), h)
        words.append(int(scores[0, -1].argmax()))
    return words


def train(steps: int, learning_rate: float) -> tuple[list[float], list[str]]:
    """The losses, and the sentence that the model says."""
    words = SENTENCE.split()
    vocabulary = common.Vocabulary(words)
    numbers = vocabulary.encode(words)[None]
    model = WordRNN(len(vocabulary), embedding=5, hidden=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    bar = trange(steps, unit="step")
    for _ in bar:
        scores, _ = model(numbers[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), numbers[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    said = finish(model, int(numbers[0, 0]), len(words) - 1)
    return losses, vocabulary.decode(said)


def claims(losses: list[float], said: list[str]) -> dict[str, bool]:
    return {
        f"loss {losses[-1]:.3f} at step {len(losses)}, at most 0.45": losses[-1] <= 0.45,
        f"it says: {' '.join(said)}": said == SENTENCE.split(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=151, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=0.002, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv)
    losses, said = train(arguments.steps, arguments.learning_rate)
    with common.picture(arguments.plot) as axis:
        axis.plot(range(1, len(losses) + 1), losses)
        axis.axhline(0.45, color="gray", linestyle=":")
        axis.set(xlabel="step", ylabel="loss, nats a word", title=" ".join(said))
    return common.report(claims(losses, said))


if __name__ == "__main__":
    sys.exit(main())
