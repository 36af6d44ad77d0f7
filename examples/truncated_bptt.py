"""Backpropagation through time in full, and truncated in the two ways that go by that name.

Window: the loss of every step t flows back through exactly k steps, t, t-1, ..., t-k+1.
Chunk: the sequence is cut every k steps; the state is handed on, gradients stop at the cuts, so a
loss flows back through 1 to k steps, depending on where it stands.

In all three the state is carried through the whole sentence; only the gradients differ. The chains
of the window style are independent of each other: rnn_ext takes all of them one step back in one
product, k times. Both styles are an option of the module.

    python examples/truncated_bptt.py            under a minute
    python examples/truncated_bptt.py --quick    some ten seconds

Claims: with k = T both truncated styles have the gradients of full BPTT; with k < T they have not,
and still learn the sentence. The cost of each is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import common
from char_rnn import TEXT, CharRNN

Loss = Callable[[CharRNN, Tensor, Tensor], Tensor]


def full_loss(model: CharRNN, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of a sequence (T, I). Its gradient flows back to the first step."""
    scores, _ = model(inputs)
    return F.cross_entropy(scores, targets)


def truncated_loss(model: CharRNN, inputs: Tensor, targets: Tensor, k: int, style: str) -> Tensor:
    """The same value; its gradient is truncated to k steps in this style."""
    model.rnn.bptt_steps, model.rnn.bptt_style = k, style
    try:
        return full_loss(model, inputs, targets)
    finally:
        model.rnn.bptt_steps = None


window_loss = partial(truncated_loss, style="window")
chunk_loss = partial(truncated_loss, style="chunk")


def gradients(model: CharRNN, loss: Tensor) -> Tensor:
    """All of them in one row."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@dataclass
class Run:
    loss: Loss
    model: CharRNN
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    milliseconds: float = 0.0
    error_at_k: float = 0.0
    error_at_full_length: float = 0.0


def train(hidden: int, epochs: int, k: int, learning_rate: float, seed: int) -> dict[str, Run]:
    vocabulary = common.Vocabulary(TEXT)
    numbers = vocabulary.encode(TEXT)
    inputs, targets = vocabulary.one_hot(numbers[:-1]), numbers[1:]
    losses = {"full": full_loss, "window": window_loss, "chunk": chunk_loss}
    runs = {}
    for name, loss in losses.items():
        torch.manual_seed(seed)  # the same weights to start from
        model = CharRNN(len(vocabulary), hidden)
        exact = gradients(model, full_loss(model, inputs, targets))

        def error(k: int, loss=loss, model=model, exact=exact) -> float:
            """Of the truncated gradient against the full one, relative to its norm."""
            if loss is full_loss:
                return 0.0
            truncated = gradients(model, loss(model, inputs, targets, k))
            return ((truncated - exact).norm() / exact.norm()).item()

        chosen = loss if loss is full_loss else partial(loss, k=k)
        runs[name] = Run(chosen, model)
        runs[name].error_at_k = error(k)
        runs[name].error_at_full_length = error(len(inputs))

    for name, run in runs.items():
        optimizer = torch.optim.Adam(run.model.parameters(), lr=learning_rate)
        for _ in tqdm(range(epochs), desc=f"{name:>6}", unit="epoch"):
            loss = run.loss(run.model, inputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
        with torch.inference_mode():
            predicted = run.model(inputs)[0].argmax(-1)
        run.accuracy = (predicted == targets).float().mean().item()

    times = common.take_turns(
        {
            name: lambda run=run: run.loss(run.model, inputs, targets).backward()
            for name, run in runs.items()
        },
        repeats=50,
    )
    for name, milliseconds in times.items():
        runs[name].milliseconds = milliseconds
    return runs


def claims(runs: dict[str, Run]) -> dict[str, bool]:
    truncated = {name: run for name, run in runs.items() if name != "full"}
    return {
        "with k = T the truncated gradients are the full ones (to 1e-5)": all(
            run.error_at_full_length < 1e-5 for run in truncated.values()
        ),
        "with k < T they are not (off by at least 1e-3)": all(
            run.error_at_k > 1e-3 for run in truncated.values()
        ),
        "all three learn the whole sentence: accuracy 1.0": all(
            run.accuracy == 1 for run in runs.values()
        ),
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=600, help="(default: %(default)s)")
    add("--steps-back", type=int, default=5, help="k (default: %(default)s)")
    add("--hidden", type=int, default=20, help="hidden units (default: %(default)s)")
    add("--learning-rate", type=float, default=0.01, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv, epochs=300)
    k = arguments.steps_back
    runs = train(arguments.hidden, arguments.epochs, k, arguments.learning_rate, arguments.seed)
    print(f"\nk = {k}, T = {len(TEXT) - 1}")
    print(f"{'':<8}{'final loss':>12}{'accuracy':>10}{'gradient off by':>17}{'ms a step':>11}")
    for name, run in runs.items():
        print(
            f"{name:<8}{run.losses[-1]:>12.4f}{run.accuracy:>10.3f}"
            f"{run.error_at_k:>17.3f}{run.milliseconds:>11.2f}"
        )
    with common.picture(arguments.plot) as axis:
        for name, run in runs.items():
            style = "-" if name == "full" else "--"
            label = f"{name}: {run.milliseconds:.2f} ms a step"
            axis.semilogy(run.losses, style, label=label)
        axis.set(
            xlabel="epoch",
            ylabel="loss, nats a character",
            title=f"the same weights at the start, k = {k} of {len(TEXT) - 1} steps",
        )
        axis.legend()
    return common.report(claims(runs))


if __name__ == "__main__":
    sys.exit(main())
