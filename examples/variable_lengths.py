"""A batch of sequences of different lengths: told to the GRU, against simply padded with zeros.

The task is made up: say, after every step, the mean of the numbers seen so far. Lengths are 1 to
40. The padded run treats the zeros behind the end as data: it computes them, its loss averages over
them, and it cannot tell a 0 behind the end, where the answer is 0, from one before it.

    python examples/variable_lengths.py            under a minute
    python examples/variable_lengths.py --quick    some ten seconds

Claims: with `lengths=` the outputs behind the end are exactly 0; the last state is that of each
sequence's own last step; whatever stands in the padding, loss and gradients are bit for bit the
same. Of the padded run's loss at least a quarter is about padding, and its error on the real steps
of sequences not seen before is at least 1.5 times that of the run that knows the lengths.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import trange

import common
import rnn_ext

LONGEST = 40


@dataclass
class Batch:
    inputs: Tensor  # (T, B, 1)
    targets: Tensor  # (T, B)
    lengths: Tensor  # (B)

    @property
    def real(self) -> Tensor:
        """(T, B) of bool: the steps that are not padding."""
        return torch.arange(len(self.inputs))[:, None] < self.lengths


def draw(batch: int) -> Batch:
    lengths = torch.randint(1, LONGEST + 1, (batch,))
    steps = torch.arange(1, LONGEST + 1)[:, None]
    values = torch.rand(batch) * 2 - 1 + 0.5 * torch.randn(LONGEST, batch)
    drawn = Batch(values[..., None], values.cumsum(0) / steps, lengths)
    drawn.inputs[~drawn.real] = 0.0
    drawn.targets[~drawn.real] = 0.0
    return drawn


class RunningMean(nn.Module):
    """(T, B, 1) to (T, B)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = rnn_ext.GRU(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def run(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs (T, B, H), 0 behind the end, and the states at each end (B, H)."""
        output, h_n = self.gru(inputs, lengths=lengths)
        return output, h_n[0]

    def real_loss(self, batch: Batch) -> Tensor:
        """Mean square error over the real steps."""
        output, _ = self.run(batch.inputs, batch.lengths)
        error = self.head(output)[..., 0] - batch.targets
        return error[batch.real].square().mean()

    def padded_loss(self, batch: Batch) -> Tensor:
        """Mean square error over all steps, as if the padding were data."""
        output, _ = self.gru(batch.inputs)
        return (self.head(output)[..., 0] - batch.targets).square().mean()


@torch.inference_mode()
def padding_claims(model: RunningMean) -> dict[str, bool]:
    batch = draw(32)
    output, last = model.run(batch.inputs, batch.lengths)
    at_the_end = output[batch.lengths - 1, torch.arange(32)]
    with torch.inference_mode(mode=False), torch.enable_grad():
        results = []
        for padding in (0.0, 1e6):
            inputs = batch.inputs.clone()
            inputs[~batch.real] = padding
            loss = model.real_loss(Batch(inputs, batch.targets.clone(), batch.lengths.clone()))
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    return {
        "with lengths: outputs behind the end are 0, real ones are not": bool(
            (output[~batch.real] == 0).all() and (output[batch.real] != 0).any(-1).all()
        ),
        "with lengths: the last state is the output at each sequence's own end": torch.equal(
            last, at_the_end
        ),
        "with lengths: what stands in the padding changes no bit of loss and gradients": all(
            torch.equal(a, b) for a, b in zip(*results, strict=True)
        ),
    }


@dataclass
class Run:
    model: RunningMean
    optimizer: torch.optim.Optimizer
    errors: list[float] = field(default_factory=list)  # over real steps, on held-out sequences


def train(hidden: int, steps: int, batch: int, learning_rate: float, seed: int) -> dict[str, Run]:
    held_out = draw(500)
    runs = {}
    for name in ("lengths", "padded"):
        torch.manual_seed(seed)  # the same weights to start from
        model = RunningMean(hidden)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=learning_rate))
    bar = trange(steps, unit="step")
    for step in bar:
        drawn = draw(batch)
        for name, run in runs.items():
            loss = run.model.real_loss(drawn) if name == "lengths" else run.model.padded_loss(drawn)
            run.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            if (step + 1) % 20 == 0:
                # Real outputs do not depend on what follows them, so this is fair to both.
                with torch.inference_mode():
                    run.errors.append(run.model.real_loss(held_out).item())
        if (step + 1) % 20 == 0:
            errors = ", ".join(f"{name} {run.errors[-1]:.4f}" for name, run in runs.items())
            bar.set_postfix_str(errors)
    return runs


@torch.inference_mode()
def share_of_padding(model: RunningMean, batch: Batch) -> float:
    """How much of the padded loss comes from steps that are padding."""
    total = model.padded_loss(batch).item() * batch.real.numel()
    real = model.real_loss(batch).item() * batch.real.sum().item()
    return 1 - real / total


def claims(runs: dict[str, Run], share: float) -> dict[str, bool]:
    ratio = runs["padded"].errors[-1] / runs["lengths"].errors[-1]
    return {
        f"{share:.0%} of the padded run's loss is about padding, at least 25%": share >= 0.25,
        f"the padded run's error is {ratio:.1f} times the other run's, at least 1.5": ratio >= 1.5,
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=600, help="(default: %(default)s; quick: 200)")
    add("--hidden", type=int, default=32, help="hidden units (default: %(default)s)")
    add("--batch", type=int, default=32, help="sequences in a batch (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv, steps=200)
    runs = train(
        arguments.hidden,
        arguments.steps,
        arguments.batch,
        arguments.learning_rate,
        arguments.seed,
    )
    model = runs["lengths"].model
    with common.picture(arguments.plot, columns=2, width=11) as (errors, outputs):
        for name, run in runs.items():
            at = range(20, 20 * len(run.errors) + 1, 20)
            errors.semilogy(at, run.errors, label=f"{name}, held-out error on real steps")
        errors.set(xlabel="step", ylabel="mean square error")
        errors.legend()
        batch = draw(30)
        with torch.inference_mode():
            output, _ = model.run(batch.inputs, batch.lengths)
        order = batch.lengths.argsort(descending=True)
        outputs.imshow(output.abs().sum(-1).T[order].numpy(), cmap="viridis", aspect="auto")
        outputs.set(
            xlabel="step", ylabel="sequence", title="outputs with lengths, |h| (0 is darkest)"
        )
    share = share_of_padding(runs["padded"].model, draw(500))
    return common.report({**padding_claims(model), **claims(runs, share)})


if __name__ == "__main__":
    sys.exit(main())
