"""benchmarks/features.py: it checks before it times, and judges what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

import features
from timing import WrongResult


class MadeUp:
    """A bench whose times are told instead of taken."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = seconds
        self.called: list[str] = []

    def time(self, title: str, sides: Mapping[str, Callable[[], object]]) -> tuple[dict, bool]:
        for name, side in sides.items():
            side()
            self.called.append(name)
        return {name: self.seconds[name] for name in sides}, True


def statuses(verdicts: object) -> list[str]:
    return [verdict.status for verdict in verdicts]


@pytest.mark.parametrize(("mine", "status"), [(1.0, "ok"), (30.0, "falls short")])
def test_lengths(mine: float, status: str) -> None:
    seconds = {
        "rnn_ext, lengths": mine,
        "rnn_ext, padded": 3.0,
        "torch.nn, packing": 10.0,
        "torch.nn, packed before": 9.0,
    }
    bench = MadeUp(seconds)
    found = statuses(features.bench_lengths(bench, steps=9, batch=5, size=6))
    assert found == [status] * 4
    assert set(bench.called) == set(seconds)


@pytest.mark.parametrize(("mine", "status"), [(1.05, "ok"), (1.2, "falls short")])
def test_resets(mine: float, status: str) -> None:
    seconds = {
        "rnn_ext, resets": mine,
        "rnn_ext, without": 1.0,
        "torch.nn, Python loop": 11.0,
    }
    found = features.bench_resets(MadeUp(seconds), steps=9, batch=5, size=6, density=0.3)
    assert statuses(found) == [status] * 4


@pytest.mark.parametrize(("mine", "status"), [(1.0, "ok"), (1.2, "falls short")])
def test_all_states(mine: float, status: str) -> None:
    seconds = {"rnn_ext, all states": mine, "rnn_ext, plain": 0.9, "storing them": 0.15}
    found = features.bench_all_states(MadeUp(seconds), steps=9, batch=5, size=6)
    assert statuses(found) == [status] * 2


@pytest.mark.parametrize(("mine", "status"), [(1.9, "ok"), (2.1, "falls short")])
def test_layer_norm(mine: float, status: str) -> None:
    seconds = {"rnn_ext, layer norm": mine, "rnn_ext, without": 1.0}
    seconds |= {"torch, Python loop": 10.0, "torch, hoisted": 10.0}
    found = features.bench_layer_norm(MadeUp(seconds), steps=9, batch=5, size=64)
    assert statuses(found) == [status] * 3


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_side_that_computes_something_else_is_not_timed(what: str) -> None:
    theirs, ours, exact = features.modules(4, 5)
    x, weight = torch.randn(7, 3, 4), torch.randn(7, 3, 5)

    def right(module: torch.nn.LSTM, x: torch.Tensor) -> torch.Tensor:
        return module(x)[0]

    def wrong(module: torch.nn.LSTM, x: torch.Tensor) -> torch.Tensor:
        output = module(x)[0]
        if what == "output":
            return output * (1 + 1e-5)
        return output.detach() + 0.5 * (output - output.detach())

    def side(module: torch.nn.LSTM, run: Callable) -> features.Side:
        return features.Side(module, x, run, weight, True)

    features.check({"a": side(ours, right), "b": side(theirs, right)}, "b", side(exact, right))
    with pytest.raises(WrongResult, match="a: result"):
        features.check({"a": side(ours, wrong), "b": side(theirs, right)}, "b", side(exact, right))
