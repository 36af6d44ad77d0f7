"""An RNN module written by hand, a Python loop over (T, B, E), beside rnn_ext.RNN.

    python examples/hand_written_rnn.py            some ten seconds
    python examples/hand_written_rnn.py --quick    a few seconds

Claims: with the same weights both give the same outputs, states and gradients, with batch_first
and without (to 1e-5 in float32). The times stand side by side, with torch.nn.RNN's between them.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
import rnn_ext


class HandWrittenRNN(nn.Module):
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), one step after the other."""

    def __init__(self, embedding: int, hidden: int, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden, embedding))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden, hidden))
        self.bias_ih_l0 = nn.Parameter(torch.empty(hidden))
        self.bias_hh_l0 = nn.Parameter(torch.empty(hidden))
        bound = 1 / math.sqrt(hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, B, E) to (T, B, H), or (B, T, E) to (B, T, H); and the last state (1, B, H)."""
        if self.batch_first:
            input = input.transpose(0, 1)
        hidden = len(self.bias_ih_l0)
        h = input.new_zeros(input.shape[1], hidden) if h_0 is None else h_0[0]
        outputs = []
        for x in input:
            from_input = x @ self.weight_ih_l0.T + self.bias_ih_l0
            h = torch.tanh(from_input + h @ self.weight_hh_l0.T + self.bias_hh_l0)
            outputs.append(h)
        output = torch.stack(outputs, dim=1 if self.batch_first else 0)
        return output, h[None]


def largest_difference(a: nn.Module, b: nn.Module, input: Tensor) -> float:
    """Of outputs, last states and the gradients of input and weights."""
    results = []
    for module in (a, b):
        x = input.clone().requires_grad_()
        output, h_n = module(x)
        wanted = [x, *module.parameters()]
        gradients = torch.autograd.grad(output.sin().mean() + h_n.square().mean(), wanted)
        results.append([output, h_n, *gradients])
    pairs = zip(*results, strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def compare(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The largest differences, and the times of forward alone and of forward with backward."""
    sizes = arguments.embedding, arguments.hidden
    differences = {}
    for batch_first in tqdm((False, True), desc="comparing"):
        by_hand = HandWrittenRNN(*sizes, batch_first=batch_first)
        fused = rnn_ext.RNN(*sizes, batch_first=batch_first)
        fused.load_state_dict(by_hand.state_dict())  # the names are the same
        shape = (
            (arguments.batch, arguments.steps)
            if batch_first
            else (arguments.steps, arguments.batch)
        )
        name = f"batch_first={batch_first}"
        differences[name] = largest_difference(
            fused, by_hand, torch.randn(*shape, arguments.embedding)
        )

    modules = {"by hand": by_hand, "torch.nn": nn.RNN(*sizes, batch_first=True), "rnn_ext": fused}
    input = torch.randn(arguments.batch, arguments.steps, arguments.embedding)
    with torch.inference_mode():
        forward = common.take_turns(
            {name: lambda m=m: m(input) for name, m in modules.items()}, arguments.repeats
        )
    training = common.take_turns(
        {name: lambda m=m: m(input)[0].sum().backward() for name, m in modules.items()},
        arguments.repeats,
    )
    return differences, {"forward": forward, "forward and backward": training}


def claims(differences: dict[str, float]) -> dict[str, bool]:
    return {
        f"{name}: outputs and gradients within {difference:.1e}, at most 1e-5": difference <= 1e-5
        for name, difference in differences.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="T (default: %(default)s)")
    add("--batch", type=int, default=16, help="B (default: %(default)s)")
    add("--embedding", type=int, default=64, help="E (default: %(default)s)")
    add("--hidden", type=int, default=128, help="H (default: %(default)s)")
    add("--repeats", type=int, default=100, help="timed calls of each (default: %(default)s)")
    arguments = common.parse(parser, argv, repeats=20)
    differences, times = compare(arguments)
    for what, values in times.items():
        columns = ", ".join(f"{name} {value:.2f} ms" for name, value in values.items())
        print(f"{what}: {columns}")
    with common.picture(arguments.plot, columns=2) as panels:
        for panel, (what, values) in zip(panels, times.items(), strict=True):
            colors = ["tab:gray", *common.COLORS.values()]
            bars = panel.bar(list(values), list(values.values()), color=colors)
            panel.bar_label(bars, fmt="%.2f", padding=2)
            panel.margins(y=0.12)
            sizes = f"T{arguments.steps} B{arguments.batch} E{arguments.embedding}"
            panel.set(ylabel="ms", title=f"{what}, {sizes} H{arguments.hidden}")
    return common.report(claims(differences))


if __name__ == "__main__":
    sys.exit(main())
