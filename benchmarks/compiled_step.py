"""What torch.compile adds to one step: T = 1, batch 1, one thread, a given state, no gradients.

    python benchmarks/compiled_step.py

Prints microseconds, the best of some thousand calls, of an eager LSTM, of what torch.compile costs
without it, and of the same LSTM compiled in several ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rnn_ext

SIZE, CALLS = 32, 3000


def microseconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


class Sums(nn.Module):
    """As many parameters, inputs and results as the LSTM, and next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(SIZE) for _ in range(4))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c, d = self.weights
        return x + a + b, state[0] + c, state[1] + d


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(1, 1, SIZE)
    state = (torch.zeros(1, 1, SIZE), torch.zeros(1, 1, SIZE))
    lstm, linear, sums = rnn_ext.LSTM(SIZE, SIZE), nn.Linear(SIZE, SIZE), Sums()

    def show(title: str, call: Callable[[], object]) -> None:
        torch._dynamo.reset()
        print(f"{title:60s} {microseconds(call):6.1f}")

    def show_lstm(title: str, **options: object) -> None:
        compiled = rnn_ext.compile(lstm, fullgraph=True, **options)
        show(f"LSTM, compiled{title}", lambda: compiled(x, state))

    print(f"torch {torch.__version__}")
    with torch.no_grad():
        show("LSTM, eager", lambda: lstm(x, state))
        add = torch.compile(lambda x: x + 1)
        show("x + 1, compiled", lambda: add(x))
        compiled_linear, compiled_sums = torch.compile(linear), torch.compile(sums)
        show("nn.Linear, compiled", lambda: compiled_linear(x))
        show("sums of as many tensors as the LSTM has, compiled", lambda: compiled_sums(x, state))
        show_lstm("")
        show_lstm(", backend='eager'", backend="eager")
        show_lstm(", size_asserts=False", options={"size_asserts": False})
        show_lstm(", cpp_wrapper=True", options={"cpp_wrapper": True})
        both = {"size_asserts": False, "cpp_wrapper": True}
        show_lstm(", both", options=both)
        unguarded = {**both, "guard_filter_fn": lambda guards: [False] * len(guards)}
        show_lstm(", both, no guards (wrong once anything changes)", options=unguarded)
        with torch._dynamo.config.patch(allow_rnn=True):
            compiled = torch.compile(lstm, options=both)
            show("  both, allow_rnn set once and for all", lambda: compiled(x, state))


if __name__ == "__main__":
    main()
