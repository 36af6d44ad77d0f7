"""The layer operator, and the form that its second derivatives come from, against a statement of
the contract that shares nothing with either: every row in its own order (torch_layer.py)."""

from __future__ import annotations

import pytest
import torch

import torch_layer
from rnn_ext import layer
from test_layer import CELLS, TOLERANCE, as_call, draw_call, leaves_of


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_equals_every_row_by_itself(seed: int, cell: str) -> None:
    input, params, call = draw_call(seed, cell)
    leaves = leaves_of(input, params, call)
    asked = 4 if call.get("return_cells") else 3

    def results_and_gradients(results: tuple) -> list[torch.Tensor]:
        results = [r for r in results[:asked] if r is not None and r.numel() > 0]
        generator = torch.Generator().manual_seed(7)
        factors = [torch.rand(r.shape, generator=generator, dtype=r.dtype) for r in results]
        started = [(r, f) for r, f in zip(results, factors, strict=True) if r.requires_grad]
        gradients = torch.autograd.grad(
            [r for r, _ in started], leaves, [f for _, f in started],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return [*results, *gradients]

    expected = results_and_gradients(torch_layer.layer(input, params, **call))
    ours = results_and_gradients(layer.layer(input, params, **call))
    composite = results_and_gradients(layer.composite(as_call(input, params, call)))
    for one, other, truth in zip(ours, composite, expected, strict=True):
        torch.testing.assert_close(one, truth, **TOLERANCE)
        torch.testing.assert_close(other, truth, **TOLERANCE)
