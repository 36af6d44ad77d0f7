"""Modules, arguments and comparisons that the tests of what goes beyond torch.nn share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn_ext
from helpers import Config, flatten
from references.stack import split_flat_weights

STEPS, BATCH, INPUT, HIDDEN = 7, 4, 3, 5
# Rounding of sums of some hundred terms in float64, for values of order 1.
TOLERANCE = {"rtol": 0, "atol": 1e-10}

CELLS = {
    "rnn_tanh": Config("rnn_tanh", INPUT, HIDDEN, dtype=torch.float64),
    "rnn_relu": Config("rnn_relu", INPUT, HIDDEN, dtype=torch.float64),
    "lstm": Config("lstm", INPUT, HIDDEN, dtype=torch.float64),
    "lstm_proj": Config("lstm", INPUT, HIDDEN, proj_size=2, dtype=torch.float64),
    "gru": Config("gru", INPUT, HIDDEN, dtype=torch.float64),
}
each_cell = pytest.mark.parametrize("cell", CELLS)
each_way = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
each_layout = pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])


def build(cell: str, library: Any = rnn_ext, **options: Any) -> Any:
    """A module in float64, the same weights for the same options."""
    config = CELLS[cell]
    torch.manual_seed(11)
    return getattr(library, config.class_name)(**{**config.options(), **options})


def plain(module: nn.RNNBase) -> nn.RNNBase:
    """The module of torch.nn with the same weights."""
    cell = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}.get(module.mode, module.mode.lower())
    cell += "_proj" if module.proj_size else ""
    twin = build(
        cell, nn, num_layers=module.num_layers, bias=module.bias, batch_first=module.batch_first,
        bidirectional=module.bidirectional, dropout=module.dropout,
    )  # fmt: skip
    twin.load_state_dict(module.state_dict())
    return twin


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def draw_state(module: nn.RNNBase, batch: int = BATCH) -> Any:
    slots = module.num_layers * (2 if module.bidirectional else 1)
    h = draw(slots, batch, module.proj_size or module.hidden_size)
    return (h, draw(slots, batch, module.hidden_size)) if module.mode == "LSTM" else h


def parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def as_state(tensors: tuple[Tensor, ...]) -> Any:
    return tensors if len(tensors) == 2 else tensors[0]


def select(state: Any, rows: Any) -> Any:
    return as_state(tuple(part[:, rows] for part in parts(state)))


def assert_same(actual: Any, expected: Any) -> None:
    for one, other in zip(flatten(actual), flatten(expected), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def gradients(results: Any, wanted: list[Tensor], seed: int = 3) -> tuple[Tensor, ...]:
    """Of the results weighted by fixed random numbers."""
    results = flatten(results)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    return torch.autograd.grad(results, wanted, weights, allow_unused=True, materialize_grads=True)


def leaves(module: nn.Module, *tensors: Any) -> list[Tensor]:
    for tensor in tensors:
        tensor.requires_grad_()
    return [*tensors, *module.parameters()]


LENGTHS = torch.tensor([3, STEPS, 0, 5])


def draw_resets() -> Tensor:
    """Episodes of several lengths, one of one step, one row without, one beginning at step 0."""
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[[0, 2, 3], 0] = True
    resets[5, 1] = True
    resets[[1, 2, 6], 3] = True
    return resets


def to_numpy(values: Any) -> Any:
    return tuple(part.detach().numpy() for part in parts(values))


def numpy_params(module: nn.RNNBase) -> list[Any]:
    name = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}.get(module.mode, module.mode.lower())
    flat = [weight.detach().numpy() for weight in module._flat_weights]
    return split_flat_weights(name, flat, bias=module.bias, projected=module.proj_size > 0)


def numpy_cell(cell: str) -> str:
    return cell.removesuffix("_proj")


FORMS = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"resets": True},
    "reset_state": {"resets": True, "reset_state": True},
    "lengths_and_resets": {"lengths": LENGTHS, "resets": True, "reset_state": True},
    "all_lengths_zero": {"lengths": torch.zeros(BATCH, dtype=torch.int64)},
}
each_form = pytest.mark.parametrize("form", FORMS)


def arguments(module: nn.RNNBase, form: str) -> dict[str, Any]:
    given = dict(FORMS[form])
    if "resets" in given:
        given["resets"] = draw_resets()
    if "reset_state" in given:
        given["reset_state"] = draw_state(module)
    return given


def numpy_arguments(given: dict[str, Any]) -> dict[str, Any]:
    made = {}
    if "lengths" in given:
        made["lengths"] = given["lengths"].tolist()
    if "resets" in given:
        made["resets"] = given["resets"].numpy()
    if "reset_state" in given:
        made["reset_state"] = to_numpy(given["reset_state"])
    return made


def jagged(sequences: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
