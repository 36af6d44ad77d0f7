"""Products of bfloat16 operands: asked for by torch's own settings in float32 models; how exact.

Rounding an operand to bfloat16 moves it by up to 2^-8. A bound that allows for this could not tell
it from a mistake, so the reference rounds the same operands and is otherwise float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rnn_ext
from helpers import (
    CELLS,
    ROUNDINGS,
    TORCH_ERRORS,
    Config,
    evaluate,
    magnitude,
    make_call,
    make_module,
    max_errors,
)
from rnn_ext import _C

HAS_BF16_PRODUCTS = _C.cpu_info()["bf16_products"]
AVAILABLE = _C.cpu_info()["available"]
WITH = [isa for isa in AVAILABLE if isa in ("avx512_bf16", "amx")]  # products of bfloat16
WITHOUT = [isa for isa in AVAILABLE if isa not in WITH]

Results = dict[str, Tensor]

CONFIGS = {
    "rows": {"input_size": 24, "hidden_size": 64, "batch": 16, "steps": 12},
    "odd": {"input_size": 33, "hidden_size": 61, "batch": 19, "steps": 9, "bias": False},
    "one_row": {"input_size": 40, "hidden_size": 520, "batch": 1, "steps": 50},
    "two_ways": {"input_size": 17, "hidden_size": 47, "batch": 12, "bidirectional": True},
    "deep": {"input_size": 700, "hidden_size": 48, "batch": 21, "steps": 7},
}

each_cell = pytest.mark.parametrize("cell", CELLS)
each_config = pytest.mark.parametrize("name", CONFIGS)

# Those above others first: setting one sets what is below it.
PLACES = {
    "everything": torch.backends,
    "cudnn": torch.backends.cudnn,
    "cudnn.conv": torch.backends.cudnn.conv,
    "cudnn.rnn": torch.backends.cudnn.rnn,
    "cuda.matmul": torch.backends.cuda.matmul,
    "conv": torch.backends.mkldnn.conv,
    "matmul": torch.backends.mkldnn.matmul,
    "rnn": torch.backends.mkldnn.rnn,
}


def ask_for(**precisions: str) -> None:
    """`legacy` is torch.set_float32_matmul_precision."""
    for place, precision in precisions.items():
        if place == "legacy":
            torch.set_float32_matmul_precision(precision)
        else:
            PLACES[place].fp32_precision = precision


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    isa = _C.cpu_info()["isa"]
    legacy = torch.get_float32_matmul_precision()
    before = {name: place.fp32_precision for name, place in PLACES.items()}
    yield
    _C.set_cpu_isa(isa)
    ask_for(legacy=legacy, **before)


def same_bits(left: Results, right: Results) -> list[bool]:
    assert list(left) == list(right)
    return [torch.equal(left[name], right[name]) for name in left]


# -------------------------------------------------------------------------------------- on and off

ON = (
    {"rnn": "bf16"},
    {"legacy": "medium"},
    {"matmul": "bf16"},
    {"everything": "bf16"},
    {"legacy": "highest", "rnn": "bf16"},
)
OFF = (
    {"legacy": "high"},
    {"rnn": "tf32"},
    {"legacy": "medium", "rnn": "ieee"},
    {"legacy": "medium", "rnn": "tf32"},
    {"everything": "bf16", "rnn": "ieee"},
)


@each_cell
@pytest.mark.parametrize("settings", ON, ids=str)
def test_on(cell: str, settings: dict[str, str]) -> None:
    config = Config(cell, **CONFIGS["rows"])
    module, call = make_module(config), make_call(config)
    full = evaluate(module, call)
    ask_for(**settings)
    same = same_bits(evaluate(module, call), full)
    assert not any(same) if HAS_BF16_PRODUCTS else all(same)


@each_cell
@pytest.mark.parametrize("settings", OFF, ids=str)
def test_off(cell: str, settings: dict[str, str]) -> None:
    config = Config(cell, **CONFIGS["rows"])
    module, call = make_module(config), make_call(config)
    full = evaluate(module, call)
    ask_for(**settings)
    assert all(same_bits(evaluate(module, call), full))


@each_cell
def test_off_again(cell: str) -> None:
    config = Config(cell, **CONFIGS["rows"])
    module, call = make_module(config), make_call(config)
    full = evaluate(module, call)
    for on, off in (
        ({"rnn": "bf16"}, {"rnn": "none"}),
        ({"legacy": "medium"}, {"legacy": "highest"}),
    ):
        ask_for(**on)
        assert any(same_bits(evaluate(module, call), full)) != HAS_BF16_PRODUCTS
        ask_for(**off)
        assert all(same_bits(evaluate(module, call), full))


def test_off_by_default() -> None:
    """In a fresh interpreter, where nobody has set or restored anything."""
    code = """if True:
        import torch, rnn_ext
        module, input = rnn_ext.GRU(24, 40), torch.randn(12, 16, 24)
        default, _ = module(input)
        torch.backends.mkldnn.rnn.fp32_precision = "ieee"
        assert torch.equal(module(input)[0], default)
        torch.backends.mkldnn.rnn.fp32_precision = "bf16"
        assert torch.equal(module(input)[0], default) != rnn_ext._C.cpu_info()["bf16_products"]
    """
    paths = {"PYTHONPATH": str(Path(rnn_ext.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=os.environ | paths, check=True)


@each_cell
@each_config
@pytest.mark.parametrize("isa", WITHOUT)
def test_instruction_set_without_bf16_products(cell: str, name: str, isa: str) -> None:
    _C.set_cpu_isa(isa)
    assert not _C.cpu_info()["bf16_products"]
    config = Config(cell, **CONFIGS[name])
    module, call = make_module(config), make_call(config)
    full = evaluate(module, call)
    ask_for(rnn="bf16")
    assert all(same_bits(evaluate(module, call), full))


@each_cell
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16], ids=["f64", "f16", "bf16"]
)
def test_only_float32_is_affected(cell: str, dtype: torch.dtype) -> None:
    config = Config(cell, dtype=dtype, **CONFIGS["rows"])
    module, call = make_module(config), make_call(config)
    before = evaluate(module, call)
    ask_for(everything="bf16")
    assert all(same_bits(evaluate(module, call), before))


# ------------------------------------------------------------------------------------ how exact


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


class Product(torch.autograd.Function):
    """values @ weight.T of rounded operands; its gradients are products of rounded operands too."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        return rounded(values) @ rounded(weight).T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, weight = ctx.saved_tensors
        gradient = rounded(gradient)
        return gradient @ rounded(weight), gradient.T @ rounded(values)


class Reference(nn.RNNBase):
    """One layer with the weights of `ours`, step after step, all its products as above.

    Each step reads h from `fed_back`, an output (T, B, D*H), not its own of the step before. An h
    between two bfloat16 numbers may be rounded up here and down there; with the same h on both
    sides float32 errors stay what they are.
    """

    def __init__(self, ours: nn.RNNBase, fed_back: Tensor) -> None:
        super().__init__(
            ours.mode,
            ours.input_size,
            ours.hidden_size,
            bias=ours.bias,
            bidirectional=ours.bidirectional,
            proj_size=ours.proj_size,
        )
        self.load_state_dict(ours.state_dict())
        self.fed_back = fed_back

    def forward(self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor]) -> tuple:
        h_0, c_0 = hx if self.mode == "LSTM" else (hx, hx)
        runs = [self.run(d, input, h_0[d], c_0[d]) for d in range(len(h_0))]
        outputs, h_n, c_n = zip(*runs, strict=True)
        states = torch.stack(h_n), torch.stack(c_n)
        return torch.cat(outputs, 2), states if self.mode == "LSTM" else states[0]

    def run(self, d: int, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = {name[:9]: getattr(self, name) for name in self._all_weights[d]}
        b_ih, b_hh = weights.get("bias_ih_l", 0), weights.get("bias_hh_l", 0)
        fed_back = self.fed_back.chunk(len(self._all_weights), 2)[d]
        outputs = {}
        for t in range(len(input)) if d == 0 else reversed(range(len(input))):
            x = Product.apply(input[t], weights["weight_ih"]) + b_ih
            a = Product.apply(h, weights["weight_hh"]) + b_hh
            h, c = self.step(x, a, h, c)
            if self.proj_size:
                h = Product.apply(h, weights["weight_hr"])
            outputs[t] = h
            h = h + (fed_back[t] - h).detach()
        return torch.stack([outputs[t] for t in range(len(input))]), outputs[t], c

    def step(self, x: Tensor, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == "LSTM":
            i, f, g, o = (x + a).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.mode == "GRU":
            (x_r, x_z, x_n), (a_r, a_z, a_n) = x.chunk(3, 1), a.chunk(3, 1)
            z = (x_z + a_z).sigmoid()
            n = (x_n + (x_r + a_r).sigmoid() * a_n).tanh()
            return (1 - z) * n + z * h, c
        return ((x + a).tanh() if self.mode == "RNN_TANH" else (x + a).relu()), c


@pytest.fixture(params=WITH)
def bf16_products(request: pytest.FixtureRequest) -> None:
    """Each instruction set that has them; none is a skip that says so."""
    _C.set_cpu_isa(request.param)
    assert _C.cpu_info()["bf16_products"]


@pytest.mark.usefixtures("bf16_products")
@each_cell
@each_config
def test_forward(cell: str, name: str) -> None:
    """By the error policy of helpers.py, with the reference in float32 in the place of torch.nn."""
    config = Config(cell, **CONFIGS[name])
    module, call = make_module(config), replace(make_call(config), backward=False)
    full = evaluate(module, call)
    ask_for(rnn="bf16")
    ours = evaluate(module, call)
    reference = Reference(module, ours["output"])
    exact = evaluate(reference, call, exactly=True)
    errors, away = max_errors(ours, exact), max_errors(full, exact)
    for result, error in max_errors(evaluate(reference, call), exact).items():
        ulp = torch.finfo(torch.float32).eps * magnitude(exact[result])
        bound = TORCH_ERRORS * error + ROUNDINGS * ulp / 2
        assert errors[result] <= bound, result
        assert away[result] > 100 * bound, f"{result}: not rounding is as good"


def distances(results: Results, exact: Results) -> dict[str, float]:
    """Of each result from the exact one, relative to its norm."""
    return {n: ((results[n].double() - e).norm() / e.norm()).item() for n, e in exact.items()}


# The reference rounds gate gradients that it has in float64, we round ours. A few in ten thousand
# lie so close to the middle of two bfloat16 numbers that the float32 error decides, and come out
# one spacing away, 2^-8 to 2^-7 of the value. One of the 500 (or more) gate gradients of a step
# makes 2^-7 / sqrt(500) = 2^-11.5 in the norm of what is derived from that step alone, dL/dh_0.
# Not rounding them at all would make 2^-8 / sqrt(3) and more everywhere.
MIDDLE = 2**-11
# At batch 1 there are no other rows: the step before rounds a few more values the other way, and
# after dozens of steps the two have no rounding in common. Each is then 2^-9 from not rounding.
UNRELATED = 2**-8


@pytest.mark.usefixtures("bf16_products")
@each_cell
@each_config
def test_gradients(cell: str, name: str) -> None:
    config = Config(cell, **CONFIGS[name])
    module, call = make_module(config), make_call(config)
    full = evaluate(module, call)
    ask_for(rnn="bf16")
    ours = evaluate(module, call)
    exact = evaluate(Reference(module, ours["output"]), call, exactly=True)
    away = distances(full, exact)
    for result, distance in distances(ours, exact).items():
        if config.batch == 1:
            assert distance <= UNRELATED, result
            continue
        assert distance <= MIDDLE, result
        if result.startswith("d_weight"):
            assert away[result] > 2 * MIDDLE, f"{result}: not rounding is as good"


@pytest.mark.usefixtures("bf16_products")
def test_projection() -> None:
    """What is projected, o * tanh(c), is rounded too, so all results are compared as gradients."""
    config = Config("lstm", input_size=30, hidden_size=90, proj_size=40, batch=20, steps=8)
    module, call = make_module(config), make_call(config)
    full = evaluate(module, call)
    ask_for(rnn="bf16")
    ours = evaluate(module, call)
    exact = evaluate(Reference(module, ours["output"]), call, exactly=True)
    away = distances(full, exact)
    for result, distance in distances(ours, exact).items():
        assert distance <= MIDDLE, result
        assert away[result] > MIDDLE, f"{result}: not rounding is as good"


@pytest.mark.usefixtures("bf16_products")
@each_cell
def test_stack_is_its_layers(cell: str) -> None:
    config = Config(cell, **CONFIGS["rows"], num_layers=2, given_state=False)
    stack = make_module(config)
    input = make_call(config).leaves["input"]
    layers = [
        make_module(replace(config, num_layers=1, input_size=size))
        for size in (config.input_size, config.hidden_size)
    ]
    weights = list(stack.parameters())
    for index, layer in enumerate(layers):
        own = weights[index * len(weights) // 2 :]
        layer.load_state_dict(dict(zip(layer.state_dict(), own, strict=False)))
    ask_for(rnn="bf16")
    lower, _ = layers[0](input)
    assert torch.equal(stack(input)[0], layers[1](lower)[0])


@pytest.mark.usefixtures("bf16_products")
@each_cell
def test_packed_is_each_sequence_alone(cell: str) -> None:
    """Sequences that are long enough to be worth packing the weights for one row."""
    lengths = (60, 77, 50)
    config = Config(cell, input_size=20, hidden_size=64, lengths=lengths, given_state=False)
    module = make_module(config)
    ask_for(rnn="bf16")
    sequences = [torch.randn(length, config.input_size) for length in lengths]
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    together = nn.utils.rnn.unpack_sequence(module(packed)[0])
    ours = dict(enumerate(together))
    alone = {i: module(sequence)[0] for i, sequence in enumerate(sequences)}
    assert max(distances(ours, alone).values()) <= MIDDLE


# --------------------------------------------------------------------------------- bfloat16 models


@pytest.mark.usefixtures("bf16_products")
@each_cell
@each_config
@pytest.mark.parametrize("isa", WITHOUT)
def test_bfloat16_model_is_the_same_without_bf16_products(cell: str, name: str, isa: str) -> None:
    """Up to one rounding of the results, 2^-8, and one of what they are made of."""
    config = Config(cell, dtype=torch.bfloat16, **CONFIGS[name])
    module, call = make_module(config), make_call(config)
    ours = evaluate(module, call)
    rows = _C.cpu_info()["bf16_products_rows"]
    _C.set_cpu_isa(isa)
    fallback = evaluate(module, call)
    assert max(distances(ours, fallback).values()) <= 2**-7
    if config.batch <= rows:
        assert not all(same_bits(ours, fallback)), "no product of bfloat16 operands was made"
    elif isa == "avx512":
        assert all(same_bits(ours, fallback)), "products of float32 are faster on this processor"


@each_cell
@each_config
def test_autocast(cell: str, name: str) -> None:
    """The very bits of a bfloat16 model with the same weights."""
    config = Config(cell, given_state=False, **CONFIGS[name])
    module, input = make_module(config), make_call(config).leaves["input"].requires_grad_()
    narrow = make_module(config).bfloat16()
    narrow_input = input.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(input)
    expected, _ = narrow(narrow_input)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    cotangent = torch.randn(output.shape).bfloat16()
    actual = torch.autograd.grad(output, [input, *module.parameters()], cotangent)
    wanted = torch.autograd.grad(expected, [narrow_input, *narrow.parameters()], cotangent)
    assert all(torch.equal(a, w.float()) for a, w in zip(actual, wanted, strict=True))
