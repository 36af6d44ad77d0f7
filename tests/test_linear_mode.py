"""A thousand steps with linear activations: nothing saturates, so no error is forgotten.

Inside ``rnn_ext.testing.linear_activations()`` the engine is a linear recurrence (RNN) or a
polynomial one (LSTM, GRU). The weights are chosen so that it contracts slowly: an error lives for
tens of steps and would be seen, and nothing explodes. See docs/math.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import rnn_ext
from numpy_twin import (
    CELLS,
    Arrays,
    assert_close,
    make_module,
    max_error,
    random_step,
    run_numpy,
    run_torch,
)
from references import LINEAR
from rnn_ext import testing

STEPS, BATCH, INPUT, HIDDEN = 1000, 3, 5, 19
# Relative to the largest value of each array: rounding errors of products over up to 57 terms, kept
# alive for some tens of steps and, in the gradients of the weights, summed over 3,000 rows.
TOLERANCES = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}


@pytest.fixture(params=rnn_ext._C.cpu_info()["available"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = rnn_ext._C.cpu_info()["isa"]
    rnn_ext._C.set_cpu_isa(request.param)
    yield request.param
    rnn_ext._C.set_cpu_isa(before)


def stable_module(cell: str, dtype: torch.dtype, **options: int) -> nn.RNNBase:
    """A module whose state decays by a few percent a step under linear activations.

    relu: even units always on, odd ones always off. A pre-activation near 0 would turn a
    rounding difference into another gradient, in float32 about once in a million.
    """
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, dtype=torch.float64, **options)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(HIDDEN)[:HIDDEN]
    kept = slice(HIDDEN, 2 * HIDDEN)  # rows of LSTM's forget and GRU's update gate
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if cell == "rnn_tanh":
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter, gain=0.97)
            elif cell == "rnn_relu":
                if name.startswith("weight_hh"):
                    magnitude = parameter.abs()
                    parameter.copy_(0.9 * magnitude / magnitude[:, ::2].sum(dim=1, keepdim=True))
                if name.startswith("bias_ih"):
                    parameter.fill_(1.0)
                if name.startswith(("weight_hh", "bias_ih", "weight_ih_l1")):
                    parameter.copy_(torch.einsum("i,i...->i...", sign, parameter.abs()))
            else:
                parameter.mul_(0.15)
                if name.startswith("bias_ih"):
                    parameter[kept] += 1.7  # 0.5 + 0.25 * 1.7 = 0.925 is kept
    return module.to(dtype)


@functools.cache
def case(cell: str, dtype: torch.dtype, layers: int) -> tuple[nn.RNNBase, tuple, Arrays]:
    """Module, step and expected values; the same for every instruction set."""
    module = stable_module(cell, dtype, num_layers=layers, bidirectional=True)
    step = random_step(module, STEPS, BATCH)
    expected = run_numpy(module, *step, activation=LINEAR)
    for name, value in expected.items():
        assert np.isfinite(value).all(), name
        assert np.abs(value).max() < 1e5, f"{name} grows: the weights are not stable"
    return module, step, expected


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps(cell: str, dtype: torch.dtype, layers: int, isa: str) -> None:
    module, step, expected = case(cell, dtype, layers)
    with testing.linear_activations():
        actual = run_torch(module, *step)
    assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell: str, isa: str) -> None:
    module = stable_module(cell, torch.float64, num_layers=2, bidirectional=True)
    batch_sizes = torch.tensor([3] * 40 + [2] * 150 + [1] * 10, device="cpu")
    step = random_step(module, 200, 3, batch_sizes)
    expected = run_numpy(module, *step, batch_sizes=batch_sizes, activation=LINEAR)
    with testing.linear_activations():
        actual = run_torch(module, *step, batch_sizes=batch_sizes)
    assert_close(actual, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("cell", CELLS)
def test_an_error_survives(cell: str) -> None:
    """What the mode is for: a change of one input by 1e-3 is plain to see 100 steps later."""
    module, (x, initial, doutput, dfinal), expected = case(cell, torch.float64, 1)
    moved = x.clone()
    moved[100] += 1e-3
    with testing.linear_activations():
        actual = run_torch(module, moved, initial, doutput, dfinal)
    width = expected["output"].shape[2] // 2
    later = max_error(actual["output"][200, :, :width], expected["output"][200, :, :width])
    assert later > 1000 * TOLERANCES[torch.float64]


@pytest.mark.parametrize("cell", CELLS)
def test_mode_ends_with_the_context(cell: str) -> None:
    """Also when the body raises; and contexts nest."""
    module = make_module(rnn_ext, cell, 4, 6)
    step = random_step(module, 5, 2)
    curved = run_numpy(module, *step)
    straight = run_numpy(module, *step, activation=LINEAR)
    assert_close(run_torch(module, *step), curved, 1e-12)
    with pytest.raises(KeyError), testing.linear_activations():
        raise KeyError
    assert_close(run_torch(module, *step), curved, 1e-12)
    with testing.linear_activations():
        with testing.linear_activations():
            assert_close(run_torch(module, *step), straight, 1e-12)
        assert_close(run_torch(module, *step), straight, 1e-12)
    assert_close(run_torch(module, *step), curved, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_is_of_the_linear_cell(cell: str) -> None:
    """The differentiable backward uses the same activations as the fused one."""
    module = make_module(rnn_ext, cell, 3, 4, num_layers=2, bidirectional=True)
    x, _, doutput, _ = random_step(module, 4, 2)

    def input_gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(module(x)[0], x, doutput, create_graph=True)[0]

    with testing.linear_activations():
        x.requires_grad_()
        (fused,) = torch.autograd.grad(module(x)[0], x, doutput)
        torch.testing.assert_close(input_gradient(x), fused, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(input_gradient, x)
