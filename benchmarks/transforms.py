"""torch.func on the CPU: gradients of every example, and an ensemble of models, against one by one.

    python benchmarks/transforms.py
    python benchmarks/transforms.py --rounds 25 --threads 1

Results are compared first; then both sides run in turn, some calls of one and some of the other, as
a training loop has them. The first of each is not timed: it finds the threads asleep and the caches
full of the other side's data. Prints the best time of each and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import rnn_ext

EXAMPLES, MODELS = 32, 8
CALLS_A_ROUND = 3
# cell, T, I, H
LAYERS = [
    (nn.LSTM, 50, 64, 64),
    (nn.GRU, 50, 64, 64),
    (nn.LSTM, 50, 32, 128),
    (nn.LSTM, 20, 16, 32),
]

Call = Callable[[], list[Tensor]]


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(title: str, at_once: Call, one_by_one: Call, rounds: int) -> None:
    for a, b in zip(at_once(), one_by_one(), strict=True):
        # Float32 sums of some thousand terms in another order.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    seconds: dict[Call, list[float]] = {at_once: [], one_by_one: []}
    for _ in range(rounds):
        for call, times in seconds.items():
            call()
            times.append(min(timed(call) for _ in range(CALLS_A_ROUND)))
    ratio = statistics.median(
        b / a for a, b in zip(seconds[at_once], seconds[one_by_one], strict=True)
    )
    best = [min(times) * 1e3 for times in seconds.values()]
    print(f"{title:48s} vmap {best[0]:7.2f} ms   one by one {best[1]:7.2f} ms   {ratio:.2f}x")


def per_example(cell: type[nn.RNNBase], steps: int, inputs: int, hidden: int, rounds: int) -> None:
    model = rnn_ext.convert(cell(inputs, hidden))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    data = torch.randn(EXAMPLES, steps, 1, inputs)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x,))[0].square().sum()

    of_each = vmap(grad(loss), in_dims=(None, 0))

    def at_once() -> list[Tensor]:
        return list(of_each(weights, data).values())

    def one_by_one() -> list[Tensor]:
        parameters = list(model.parameters())
        found = [torch.autograd.grad(model(x)[0].square().sum(), parameters) for x in data]
        return [torch.stack(g) for g in zip(*found, strict=True)]

    title = f"{EXAMPLES} examples, {cell.__name__} {inputs} to {hidden}, T {steps}"
    compare(title, at_once, one_by_one, rounds)


def ensemble(rounds: int, steps: int = 50, batch: int = 8, size: int = 64) -> None:
    models = [rnn_ext.convert(nn.LSTM(size, size)) for _ in range(MODELS)]
    x = torch.randn(steps, batch, size)
    stacked, _ = stack_module_state(models)
    plain = {name: p.detach() for name, p in stacked.items()}
    all_models = vmap(lambda w, x: functional_call(models[0], w, (x,))[0], in_dims=(0, None))

    def infer_at_once() -> list[Tensor]:
        with torch.no_grad():
            return list(all_models(plain, x))

    def infer_one_by_one() -> list[Tensor]:
        with torch.no_grad():
            return [m(x)[0] for m in models]

    def train_at_once() -> list[Tensor]:
        loss = all_models(stacked, x).square().sum()
        return list(torch.autograd.grad(loss, list(stacked.values())))

    def train_one_by_one() -> list[Tensor]:
        found = [torch.autograd.grad(m(x)[0].square().sum(), list(m.parameters())) for m in models]
        return [torch.stack(g) for g in zip(*found, strict=True)]

    title = f"{MODELS} LSTMs {size} to {size}, B {batch}, T {steps}"
    compare(f"{title}, inference", infer_at_once, infer_one_by_one, rounds)
    compare(f"{title}, training", train_at_once, train_one_by_one, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    for layer in LAYERS:
        per_example(*layer, arguments.rounds)
    ensemble(arguments.rounds)


if __name__ == "__main__":
    main()
