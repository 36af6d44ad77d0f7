"""One LSTM, used as its own classifier, learns that "hihell" goes on as "ihello".

Five characters, five hidden units: the outputs are the scores, there is no layer behind them.

    python examples/hihello.py    a second or two (--quick is the same)

Claim: after 50 steps the prediction at every position is right: ihello.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F
from tqdm import trange

import common
import rnn_ext

TEXT = "hihello"


def train(steps: int, learning_rate: float) -> tuple[list[float], list[str]]:
    """The loss and the prediction at every step."""
    vocabulary = common.Vocabulary(TEXT, keep_order=True)  # h, i, e, l, o
    numbers = vocabulary.encode(TEXT)
    inputs, targets = vocabulary.one_hot(numbers[:-1]), numbers[1:]
    lstm = rnn_ext.LSTM(len(vocabulary), len(vocabulary))
    optimizer = torch.optim.Adam(lstm.parameters(), lr=learning_rate)
    losses, predictions = [], []
    bar = trange(steps, unit="step")
    for _ in bar:
        scores, _ = lstm(inputs)
        loss = F.cross_entropy(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        predictions.append("".join(vocabulary.decode(scores.argmax(-1))))
        bar.set_postfix_str(f"{predictions[-1]} {loss:.3f}", refresh=False)
    return losses, predictions


def claims(predictions: list[str]) -> dict[str, bool]:
    last = predictions[-1]
    return {f"step {len(predictions)} predicts {last}, to be {TEXT[1:]}": last == TEXT[1:]}


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=50, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=0.1, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv)
    losses, predictions = train(arguments.steps, arguments.learning_rate)
    with common.picture(arguments.plot) as axis:
        axis.plot(range(1, len(losses) + 1), losses)
        axis.set(xlabel="step", ylabel="loss, nats a character", title=TEXT)
        axis.margins(y=0.15)
        before = ""
        for step, (loss, text) in enumerate(zip(losses, predictions, strict=True), start=1):
            if text != before:  # each prediction where it first appears
                axis.annotate(
                    text, (step, loss), xytext=(4, 4), textcoords="offset points", rotation=45
                )
            before = text
    return common.report(claims(predictions))


if __name__ == "__main__":
    sys.exit(main())
