"""What truncated BPTT over a window costs: beside full BPTT, and beside the literal double loop.

    python benchmarks/window.py            the issue's shape: LSTM, T 200, k 20, B 16, H 128
    python benchmarks/window.py --sweep    the same over k and the other cells

Before anything is timed its gradients in float64 are compared with the double loop's. The double
loop is torch.nn and autograd: for every t the k steps up to it, one after the other, from the state
before them, and backward. Its friendlier form hands each window to torch.nn in one call. Times are
forward and backward together, of one layer, taken in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rnn_ext
from health import wait_for_idle_threads
from rnn_ext import functional as F
from rnn_ext._bench import NUM_GATES, interleave
from rnn_ext.truncated import window_bptt

FULL, WINDOW, LOOP, CALLS = "full BPTT", "window", "double loop", "loop of calls"
MOST_OF_FULL = 6.0
LEAST_BEFORE_LOOP = 10.0
EXACT = 1e-10
KINDS = {"RNN_TANH": F.RNN_TANH, "LSTM": F.LSTM, "GRU": F.GRU}


@dataclass(frozen=True)
class Shape:
    cell: str = "LSTM"
    steps: int = 200
    window: int = 20
    batch: int = 16
    size: int = 128  # input and hidden

    def __str__(self) -> str:
        return f"{self.cell} T{self.steps} k{self.window} B{self.batch} H{self.size}"

    @property
    def chain_flops(self) -> float:
        """Of the products with W_hh^T that take the chains back."""
        rows = sum(self.steps - depth for depth in range(1, min(self.window, self.steps)))
        return 2.0 * rows * self.batch * NUM_GATES[self.cell] * self.size**2


def window_step(module: nn.RNNBase, x: Tensor, doutput: Tensor, window: int) -> None:
    output, _, _ = window_bptt(
        x, None, None, module._flat_weights, KINDS[module.mode],
        True, 1, False, False, 0.0, True, window,
    )  # fmt: skip
    output.backward(doutput)


def full_step(module: nn.RNNBase, x: Tensor, doutput: Tensor) -> None:
    module(x)[0].backward(doutput)


def states_before(module: nn.RNNBase, x: Tensor) -> list[object]:
    states = [None]
    with torch.no_grad():
        for t in range(len(x)):
            states.append(module(x[t : t + 1], states[-1])[1])
    return states


def double_loop_step(module: nn.RNNBase, x: Tensor, doutput: Tensor, window: int) -> None:
    states = states_before(module, x)
    for t in range(len(x)):
        start = max(0, t - window + 1)
        state = states[start]
        for step in range(start, t + 1):
            output, state = module(x[step : step + 1], state)
        output.backward(doutput[t : t + 1])


def loop_of_calls_step(module: nn.RNNBase, x: Tensor, doutput: Tensor, window: int) -> None:
    states = states_before(module, x)
    for t in range(len(x)):
        start = max(0, t - window + 1)
        output, _ = module(x[start : t + 1], states[start])
        output[-1].backward(doutput[t])


def gradients(module: nn.RNNBase, step: Callable[[], object], x: Tensor) -> list[Tensor]:
    leaves = [x, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    step()
    return [leaf.grad for leaf in leaves]


def sides(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    torch.manual_seed(0)
    ours = getattr(rnn_ext, shape.cell)(shape.size, shape.size).to(dtype)
    theirs = getattr(nn, shape.cell)(shape.size, shape.size).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape.steps, shape.batch, shape.size).to(dtype).requires_grad_()
    doutput = torch.randn(shape.steps, shape.batch, shape.size).to(dtype)
    k = shape.window
    steps: dict[str, tuple[nn.RNNBase, Callable[[], None]]] = {
        FULL: (ours, lambda: full_step(ours, x, doutput)),
        WINDOW: (ours, lambda: window_step(ours, x, doutput, k)),
        LOOP: (theirs, lambda: double_loop_step(theirs, x, doutput, k)),
        CALLS: (theirs, lambda: loop_of_calls_step(theirs, x, doutput, k)),
    }
    return {
        name: lambda module=module, step=step: gradients(module, step, x)
        for name, (module, step) in steps.items()
    }


def check(shape: Shape) -> float:
    """Largest difference from the double loop in float64, relative to the largest gradient."""
    exact = sides(shape, torch.float64)
    worst = 0.0
    for ours, theirs in zip(exact[WINDOW](), exact[LOOP](), strict=True):
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


def measure(shape: Shape, rounds: int, with_loop: bool) -> list[tuple[str, bool]]:
    """Prints a row; returns the verdicts."""
    error = check(shape)
    verdicts = [(f"gradients within {EXACT:.0e} of the double loop's: {error:.1e}", error <= EXACT)]
    works = sides(shape, torch.float32)
    if not with_loop:
        del works[LOOP], works[CALLS]
    timings = interleave(works, rounds=rounds, settle=wait_for_idle_threads)
    times = {name: timing.median for name, timing in timings.items()}
    row = "   ".join(
        f"{name} {1e3 * times[name]:8.2f} ms ±{timings[name].spread:4.0%}" for name in times
    )
    beyond = times[WINDOW] - times[FULL]
    rate = shape.chain_flops / beyond / 1e9 if beyond > 0 else float("inf")
    print(f"{shape!s:<28} {row}   beyond full: {rate:.0f} GFLOP/s", flush=True)
    ratio = times[WINDOW] / times[FULL]
    verdicts.append((f"window / full BPTT <= {MOST_OF_FULL}: {ratio:.2f}", ratio <= MOST_OF_FULL))
    if with_loop:
        gain = times[LOOP] / times[WINDOW]
        verdicts.append(
            (f"double loop / window >= {LEAST_BEFORE_LOOP}: {gain:.1f}", gain >= LEAST_BEFORE_LOOP)
        )
        print(f"loop of calls / window: {times[CALLS] / times[WINDOW]:.1f} (no bar)")
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sweep", action="store_true", help="window lengths and cells, without the bars")
    add("--rounds", type=int, default=7, help="(default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.sweep:
        shapes = [Shape(window=k) for k in (1, 5, 10, 20, 50, 100)]
        shapes += [Shape(cell="GRU"), Shape(cell="RNN"), Shape(batch=1), Shape(size=512, steps=100)]
        found = [verdict for shape in shapes for verdict in measure(shape, arguments.rounds, False)]
        verdicts = [verdict for verdict in found if verdict[0].startswith("gradients")]
    else:
        verdicts = measure(Shape(), arguments.rounds, True)
    for text, met in verdicts:
        print(f"{'ok' if met else 'falls short':<12} {text}")
    return 0 if all(met for _, met in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
