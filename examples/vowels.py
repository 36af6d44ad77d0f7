"""Who is speaking? Nine speakers told apart by two vowels, sequences of 7 to 29 steps.

The UCI data set JapaneseVowels, as the package aeon carries it: 270 utterances to learn from, 370
to be tested on, 12 channels (coefficients of a linear prediction of the sound wave). A
bidirectional GRU is told their lengths, so padding is neither computed nor seen.

    python examples/vowels.py            under a minute
    python examples/vowels.py --quick    a few seconds

Claim: at least 95 % of the test part is right.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import common
import rnn_ext

SPEAKERS = 9
CHANNELS = 12


@dataclass
class Utterances:
    sequences: list[Tensor]  # each (T, 12)
    speakers: Tensor  # (N)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Padded utterances (T, B, 12), their lengths (B) and speakers (B)."""
        chosen = [self.sequences[row] for row in rows]
        lengths = torch.tensor([len(sequence) for sequence in chosen])
        return pad_sequence(chosen), lengths, self.speakers[rows]

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.batch(torch.arange(len(self.sequences)))


def parse(text: str) -> Utterances:
    """The .ts format: after @data a line for each utterance, channels and the label between ":"."""
    _, _, lines = text.partition("@data\n")
    sequences, speakers = [], []
    for line in lines.splitlines():
        *channels, speaker = line.split(":")
        values = [[float(value) for value in channel.split(",")] for channel in channels]
        sequences.append(torch.tensor(values).T.contiguous())
        speakers.append(int(speaker) - 1)
    return Utterances(sequences, torch.tensor(speakers))


class SpeakerGRU(nn.Module):
    """Padded utterances (T, B, 12) to scores (B, 9), from the last state of either direction."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gru = rnn_ext.GRU(CHANNELS, hidden, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, SPEAKERS)

    def forward(self, utterances: Tensor, lengths: Tensor) -> Tensor:
        _, h_n = self.gru(utterances, lengths=lengths)  # (2, B, H)
        return self.head(self.dropout(torch.cat([h_n[0], h_n[1]], dim=-1)))


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the test part, after each epoch
    confusion: Tensor | None = None  # (9, 9): rows who it was, columns who it was taken for


def train(hidden: int, epochs: int, batch: int, learning_rate: float) -> Result:
    learn = parse(common.read_packaged(common.VOWELS_TRAIN).decode())
    test = parse(common.read_packaged(common.VOWELS_TEST).decode())
    steps = [len(sequence) for sequence in learn.sequences + test.sequences]
    print(
        f"{len(learn.sequences)} utterances to learn from, {len(test.sequences)} to test; "
        f"{min(steps)} to {max(steps)} steps"
    )
    model = SpeakerGRU(hidden, dropout=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    result = Result()
    bar = trange(epochs, unit="epoch")
    for _ in bar:
        model.train()
        total = 0.0
        for rows in torch.randperm(len(learn.sequences)).split(batch):
            utterances, lengths, speakers = learn.batch(rows)
            loss = F.cross_entropy(model(utterances, lengths), speakers)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        result.losses.append(total / len(learn.sequences))

        model.eval()
        utterances, lengths, speakers = test.all()
        with torch.inference_mode():
            predicted = model(utterances, lengths).argmax(-1)
        result.accuracies.append((predicted == speakers).float().mean().item())
        bar.set_postfix_str(f"loss {result.losses[-1]:.3f}, test {result.accuracies[-1]:.3f}")
    pairs = torch.bincount(speakers * SPEAKERS + predicted, minlength=SPEAKERS**2)
    result.confusion = pairs.view(SPEAKERS, SPEAKERS)
    return result


def claims(result: Result, accuracy: float) -> dict[str, bool]:
    """Of the last epoch: to pick the best by the test part would be to learn from it."""
    last = result.accuracies[-1]
    return {f"{last:.1%} of the test part right, at least {accuracy:.0%}": last >= accuracy}


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=40, help="(default: %(default)s; quick: 20)")
    add("--hidden", type=int, default=64, help="units a direction (default: %(default)s)")
    add("--batch", type=int, default=30, help="utterances in a batch (default: %(default)s)")
    add("--learning-rate", type=float, default=5e-3, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv, epochs=20)
    result = train(arguments.hidden, arguments.epochs, arguments.batch, arguments.learning_rate)
    with common.picture(arguments.plot, columns=3, width=12) as (losses, accuracies, confusion):
        losses.semilogy(result.losses)
        losses.set(xlabel="epoch", ylabel="loss, nats an utterance")
        accuracies.plot(result.accuracies, color="tab:green")
        accuracies.axhline(0.95, color="gray", linestyle=":")
        accuracies.set(xlabel="epoch", ylabel="accuracy on the test part")
        confusion.imshow(result.confusion.numpy(), cmap="Blues")
        for was, row in enumerate(result.confusion.tolist()):
            for taken_for, count in enumerate(row):
                if count:
                    color = "white" if count > 40 else "black"
                    confusion.text(taken_for, was, count, ha="center", va="center", color=color)
        names = range(1, SPEAKERS + 1)
        confusion.set(xlabel="taken for speaker", ylabel="was speaker")
        confusion.set_xticks(range(SPEAKERS), names)
        confusion.set_yticks(range(SPEAKERS), names)
    return common.report(claims(result, 0.9 if arguments.quick else 0.95))


if __name__ == "__main__":
    sys.exit(main())
