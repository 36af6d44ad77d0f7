"""Products of bfloat16 operands in float32 models: asked for through torch's own settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rnn_ext
from rnn_ext import _C

CELLS = ("RNN", "LSTM", "GRU")
NATIVE = _C.cpu_info()["bf16_products"]
T, B, I, H = 12, 16, 24, 40  # noqa: E741

each_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    isa = _C.cpu_info()["isa"]
    yield
    torch.backends.mkldnn.rnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    _C.set_cpu_isa(isa)


def build(cell: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.RNNBase, Tensor]:
    torch.manual_seed(3)
    return getattr(rnn_ext, cell)(I, H, dtype=dtype), torch.randn(T, B, I).to(dtype)


def narrow(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float64)


def with_narrow_operands(module: torch.nn.RNNBase, x: Tensor) -> Tensor:
    """The recurrence in float64, step by step, with everything a product reads in bfloat16."""
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in module.parameters())
    h = torch.zeros(B, H, dtype=torch.float64)
    c = torch.zeros_like(h)
    steps = []
    for x_t in x:
        from_x = narrow(x_t) @ narrow(w_ih).T + b_ih.double()
        from_h = narrow(h.float()) @ narrow(w_hh).T + b_hh.double()
        if isinstance(module, torch.nn.GRU):
            (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            z = torch.sigmoid(x_z + h_z)
            h = (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * h
        elif isinstance(module, torch.nn.LSTM):
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            h = torch.tanh(from_x + from_h)
        steps.append(h)
    return torch.stack(steps)


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def switch_on(how: str) -> None:
    if how == "rnn":
        torch.backends.mkldnn.rnn.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision("medium")


@each_cell
@pytest.mark.parametrize("how", ["rnn", "medium"])
def test_rounds_what_products_read_and_nothing_else(cell: str, how: str) -> None:
    module, x = build(cell)
    full = module(x)[0].detach()
    switch_on(how)
    reduced = module(x)[0].detach()
    if not NATIVE:
        assert torch.equal(reduced, full)
        return
    # An h that float32 and float64 round to different neighbors in bfloat16 is rare, but possible:
    # far below what the rounding itself changes, not at float32's precision.
    from_simulation = distance(reduced, with_narrow_operands(module, x))
    assert 0 < from_simulation < distance(reduced, full) / 10


@each_cell
def test_off_by_default_and_again(cell: str) -> None:
    module, x = build(cell)
    full = module(x)[0]
    for how in ("rnn", "medium"):
        switch_on(how)
        assert torch.equal(module(x)[0], full) != NATIVE
        torch.backends.mkldnn.rnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(module(x)[0], full)


def test_the_setting_of_rnns_goes_before_that_of_products() -> None:
    module, x = build("LSTM")
    full = module(x)[0]
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.rnn.fp32_precision = "ieee"
    assert torch.equal(module(x)[0], full)


@each_cell
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
def test_gradients(cell: str, bidirectional: bool) -> None:
    torch.manual_seed(5)
    module = getattr(rnn_ext, cell)(I, H, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(T, B, I, requires_grad=True)
    leaves = [x, *module.parameters()]
    output = module(x)[0]
    grad = torch.randn_like(output)
    full = torch.autograd.grad(output, leaves, grad)
    switch_on("rnn")
    reduced = torch.autograd.grad(module(x)[0], leaves, grad)
    for ours, exact in zip(reduced, full, strict=True):
        # 8 bits of precision in operands, errors of many terms cancel.
        assert (0 < distance(ours, exact) < 2**-6) if NATIVE else torch.equal(ours, exact)


@each_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["f64", "f16"])
def test_other_types_are_not_affected(cell: str, dtype: torch.dtype) -> None:
    module, x = build(cell, dtype)
    full = module(x)[0]
    switch_on("rnn")
    assert torch.equal(module(x)[0], full)


@each_cell
def test_instruction_set_without_it(cell: str) -> None:
    module, x = build(cell)
    _C.set_cpu_isa("scalar")
    assert not _C.cpu_info()["bf16_products"]
    full = module(x)[0]
    switch_on("rnn")
    assert torch.equal(module(x)[0], full)


@each_cell
def test_bfloat16_models_agree_between_instruction_sets(cell: str) -> None:
    module, x = build(cell, torch.bfloat16)
    native = module(x)[0]
    _C.set_cpu_isa("scalar")
    assert distance(native, module(x)[0]) < 2**-7


@each_cell
def test_single_steps_are_not_packed_and_stay_exact(cell: str) -> None:
    module, x = build(cell)
    full = module(x[:1, :2])[0]
    switch_on("rnn")
    assert torch.equal(module(x[:1, :2])[0], full)
