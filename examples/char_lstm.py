"""Train a two-layer character LSTM on real text, twice: with torch.nn.LSTM and with rnn_ext.LSTM.

Both start from the same weights and see the same batches, so the loss curves must agree; what
differs is the time. The two take turns, step by step, so that a busy machine is equally busy for
both.

The text is the reference documentation of the Python language that every Python installation
carries (`help("topics")`): some 450 kB of English.

    python examples/char_lstm.py            one to three minutes on two cores
    python examples/char_lstm.py --quick    about 15 seconds, for a first look

Claims that are tested here (exit code 1 if one fails): the final losses agree and are low enough,
and the same weights sampled through either library give the same text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
import rnn_ext

PROMPT = "The "


@dataclass(frozen=True)
class Claims:
    """What a run has to show. Losses are means of the last tenth of the steps, nats a character."""

    final_loss: float
    difference: float


FULL = Claims(final_loss=1.5, difference=0.03)
QUICK = Claims(final_loss=3.1, difference=0.003)


class CharModel(nn.Module):
    """Embedding, two LSTM layers, and a linear layer that scores every character."""

    def __init__(self, characters: int, hidden: int, lstm: type[nn.LSTM]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = lstm(64, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(
        self, characters: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(self.embedding(characters), state)
        return self.head(output), state


@dataclass
class Run:
    """One of the two trainings."""

    model: CharModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        scores, _ = self.model(inputs)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def final_loss(self) -> float:
        return statistics.mean(self.losses[-max(1, len(self.losses) // 10) :])


def load_text() -> tuple[str, Tensor, str]:
    """The text, its characters as numbers, and the alphabet."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = text.encode("ascii", errors="ignore").decode()
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    return text, torch.tensor([number[character] for character in text]), alphabet


def draw_batch(
    data: Tensor, batch: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`batch` stretches of text, and the same moved on by one character."""
    starts = torch.randint(len(data) - length - 1, (batch,), generator=generator)
    positions = starts[:, None] + torch.arange(length + 1)
    stretch = data[positions]
    return stretch[:, :-1], stretch[:, 1:]


def train(arguments: argparse.Namespace, data: Tensor, characters: int) -> dict[str, Run]:
    runs = {}
    for name, lstm in (("torch.nn", nn.LSTM), ("rnn_ext", rnn_ext.LSTM)):
        torch.manual_seed(arguments.seed)
        model = CharModel(characters, arguments.hidden, lstm)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=arguments.learning_rate))

    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(2):  # first calls set things up; their times are not kept
        inputs, targets = draw_batch(data, arguments.batch, arguments.length, generator)
        for run in runs.values():
            run.model(inputs)[0].sum().backward()
    bars = [
        tqdm(total=arguments.steps, desc=f"{name:>8}", position=position, unit="step")
        for position, name in enumerate(runs)
    ]
    for _ in range(arguments.steps):
        inputs, targets = draw_batch(data, arguments.batch, arguments.length, generator)
        for run, bar in zip(runs.values(), bars, strict=True):
            run.step(inputs, targets)
            bar.set_postfix_str(
                f"loss {run.losses[-1]:.3f}, {run.seconds[-1] * 1e3:.1f} ms a step", refresh=False
            )
            bar.update()
    for bar in bars:
        bar.close()
    return runs


@dataclass
class Sampler:
    """Writes text, one character at a time, each drawn from what the model expects to follow."""

    model: CharModel
    alphabet: str
    seed: int
    temperature: float = 0.7

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.text = PROMPT
        self.seconds: list[float] = []
        self.state: tuple[Tensor, Tensor] | None = None
        self.unread = [self.alphabet.index(character) for character in PROMPT]

    @torch.inference_mode()
    def write(self, count: int) -> None:
        for _ in range(count):
            start = time.perf_counter()
            scores, self.state = self.model(torch.tensor([self.unread]), self.state)
            chances = torch.softmax(scores[0, -1] / self.temperature, dim=-1)
            chosen = int(torch.multinomial(chances, 1, generator=self.generator))
            self.unread = [chosen]
            self.text += self.alphabet[chosen]
            self.seconds.append(time.perf_counter() - start)


def sample(model: CharModel, alphabet: str, count: int, seed: int) -> dict[str, Sampler]:
    """The same weights through both libraries, taking turns."""
    samplers = {
        "torch.nn": Sampler(rnn_ext.to_torch(model).eval(), alphabet, seed),
        "rnn_ext": Sampler(model.eval(), alphabet, seed),
    }
    turn = 25
    for _ in tqdm(range(0, count, turn), desc="sampling", unit="turn"):
        for sampler in samplers.values():
            sampler.write(turn)
    return samplers


def plot(
    runs: dict[str, Run], times: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> None:
    """Both loss curves on the left, the times on the right."""
    colors = common.COLORS
    with common.picture(
        arguments.plot, 1 + len(times), width=11, width_ratios=[3] + [1] * len(times)
    ) as (curves, *panels):
        curves.plot(
            runs["torch.nn"].losses,
            color=colors["torch.nn"],
            linewidth=3,
            alpha=0.6,
            label="torch.nn.LSTM",
        )
        curves.plot(
            runs["rnn_ext"].losses, color=colors["rnn_ext"], linewidth=0.8, label="rnn_ext.LSTM"
        )
        curves.set(
            xlabel="step", ylabel="loss, nats a character", title="same weights, same batches"
        )
        curves.legend()
        for panel, (what, values) in zip(panels, times.items(), strict=True):
            bars = panel.bar(
                list(values), list(values.values()), color=[colors[name] for name in values]
            )
            panel.bar_label(bars, fmt="%.2f", padding=2)
            panel.margins(y=0.12)
            panel.set(title=f"{what}\n{common.describe_ratio(values)}", ylabel="ms")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=600, help="of each model (default: %(default)s; quick: 150)")
    add("--batch", type=int, default=16, help="stretches of text in a batch (default: %(default)s)")
    add("--length", type=int, default=64, help="characters in a stretch (default: %(default)s)")
    add(
        "--hidden",
        type=int,
        default=256,
        help="units of a layer (default: %(default)s; quick: 128)",
    )
    add("--learning-rate", type=float, default=3e-3, help="of Adam (default: %(default)s)")
    add("--characters", type=int, default=1000, help="to sample (default: %(default)s; quick: 200)")
    return common.parse(parser, argv, steps=150, hidden=128, characters=200)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    text, data, alphabet = load_text()
    print(
        f"{len(text):,} characters of text, {len(alphabet)} different; "
        f"2 layers of {arguments.hidden}, batch {arguments.batch} x {arguments.length}, "
        f"{torch.get_num_threads()} threads"
    )
    runs = train(arguments, data, len(alphabet))
    samplers = sample(runs["rnn_ext"].model, alphabet, arguments.characters, arguments.seed)

    print(f"\nwritten by the rnn_ext model after {PROMPT!r}:\n")
    print(textwrap.indent(samplers["rnn_ext"].text, "    "))

    times = {
        "training step": {name: 1e3 * statistics.median(run.seconds) for name, run in runs.items()},
        "one character": {name: 1e3 * statistics.median(s.seconds) for name, s in samplers.items()},
    }
    print(f"\n{'':<16}{'torch.nn.LSTM':>15}{'rnn_ext.LSTM':>15}")
    print(f"{'final loss':<16}" + "".join(f"{run.final_loss:>15.4f}" for run in runs.values()))
    for what, values in times.items():
        columns = "".join(f"{value:>12.2f} ms" for value in values.values())
        print(f"{what:<16}{columns}   {common.describe_ratio(values)}")

    common.warn_if_noisy(*(timed.seconds for timed in [*runs.values(), *samplers.values()]))
    plot(runs, times, arguments)
    return report_claims(runs, samplers, QUICK if arguments.quick else FULL)


def report_claims(runs: dict[str, Run], samplers: dict[str, Sampler], claims: Claims) -> int:
    """Print each claim and whether it held. The exit code: 0 if all did."""
    theirs, ours = runs["torch.nn"], runs["rnn_ext"]
    apart = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    print(f"largest difference of the two loss curves at any step: {apart:.1e}")
    difference = abs(theirs.final_loss - ours.final_loss)
    highest = max(theirs.final_loss, ours.final_loss)
    results = {
        f"final losses differ by {difference:.1e}, at most {claims.difference}": difference
        <= claims.difference,
        f"final losses at most {highest:.3f}, below {claims.final_loss}": highest
        < claims.final_loss,
        "both libraries write the same text from the same weights": samplers["torch.nn"].text
        == samplers["rnn_ext"].text,
    }
    return common.report(results)


if __name__ == "__main__":
    sys.exit(main())
