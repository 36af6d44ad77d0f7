"""Results have the right dtype and, measured over many of them, at most twice torch's errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import rnn_ext
from helpers import (
    ALL_CLASS_NAMES,
    CELL_CLASS_NAMES,
    CELLS,
    TORCH_ERRORS,
    Config,
    assert_matches_torch,
    check,
    configs,
    error_ratios,
    evaluate,
    flatten,
    magnitude,
    make_call,
    make_cell_call,
    make_module,
)

each_cell = pytest.mark.parametrize("cell", CELLS)
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=["f32", "f64", "bf16", "f16"],
)


@each_cell
@each_half
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("lengths", [None, (3, 6, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no_state"])
def test_stack(
    cell: str,
    dtype: torch.dtype,
    layers: int,
    bidirectional: bool,
    lengths: tuple[int, ...] | None,
    given_state: bool,
) -> None:
    check(
        Config(
            cell,
            num_layers=layers,
            bidirectional=bidirectional,
            lengths=lengths,
            given_state=given_state,
            dtype=dtype,
        )
    )


@each_half
@pytest.mark.parametrize("lengths", [None, (3, 6, 1)], ids=["padded", "packed"])
def test_projection(dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    check(
        Config("lstm", proj_size=3, num_layers=2, bidirectional=True, lengths=lengths, dtype=dtype)
    )


# T, B, I, H, and more: one step and many, one row and many, one layer and several.
SHAPES = (
    Config(steps=1, batch=1, input_size=30, hidden_size=40),
    Config(steps=1, batch=16, input_size=30, hidden_size=40),
    Config(steps=5, batch=3, input_size=20, hidden_size=30, num_layers=2, bidirectional=True),
    Config(steps=20, batch=1, input_size=40, hidden_size=64),
    Config(steps=20, batch=9, input_size=33, hidden_size=48, bidirectional=True),
    Config(steps=40, batch=4, input_size=16, hidden_size=32, num_layers=2),
    Config(steps=8, batch=33, input_size=24, hidden_size=20),
    Config(steps=60, batch=2, input_size=10, hidden_size=17),
)


@each_cell
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)
def test_mean_error_is_at_most_twice_torchs(cell: str, dtype: torch.dtype) -> None:
    """For each kind of result, the geometric mean over shapes of our error over torch's."""
    logarithms: dict[str, list[float]] = {}
    for seed, shape in enumerate(SHAPES * 2):
        config = replace(shape, cell=cell, dtype=dtype, seed=seed)
        if cell == "lstm" and seed % 2:
            config = replace(config, proj_size=config.hidden_size // 2)
        modules = make_module(config), make_module(config, library=nn)
        for name, ratio in error_ratios(*modules, make_call(config)).items():
            logarithms.setdefault(name.split("_l")[0], []).append(math.log(ratio))
    means = {name: math.exp(sum(values) / len(values)) for name, values in logarithms.items()}
    assert {"output", "h_n", "d_input", "d_h_0", "d_weight_ih", "d_bias_hh"} <= means.keys()
    assert max(means.values()) <= TORCH_ERRORS, means


@each_cell
@each_half
def test_sums_are_kept_in_float32(cell: str, dtype: torch.dtype) -> None:
    """300 products a gate and 60 steps a weight gradient: rounding each partial sum would show.

    One rounding of the result to its dtype is all that the sums may add, so the error of the
    output of one step is held to that of a few roundings whatever torch's own error is.
    """
    one_step = Config(cell, input_size=300, hidden_size=24, steps=1, dtype=dtype)
    call = make_call(one_step)
    output = evaluate(make_module(one_step), call)["output"]
    exact = evaluate(make_module(one_step, library=nn), call, exactly=True)["output"]
    eps = torch.finfo(dtype).eps
    assert magnitude(output.double() - exact) <= 2 * eps * magnitude(exact)
    check(Config(cell, input_size=300, hidden_size=24, steps=60, batch=3, dtype=dtype))


@settings(max_examples=40)
@given(configs(torch.bfloat16))
def test_drawn_bfloat16(config: Config) -> None:
    check(config)


@settings(max_examples=40)
@given(configs(torch.float16))
def test_drawn_float16(config: Config) -> None:
    check(config)


@pytest.mark.parametrize("class_name", CELL_CLASS_NAMES)
@each_half
@pytest.mark.parametrize("batch", [0, 1, 5, None], ids=["empty", "one", "batch", "single"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_cell(class_name: str, dtype: torch.dtype, batch: int | None, bias: bool) -> None:
    ours = getattr(rnn_ext, class_name)(9, 7, bias=bias, dtype=dtype)
    assert_matches_torch(ours, make_cell_call(class_name, 9, 7, batch=batch, dtype=dtype))


@each_cell
@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_everything_has_the_dtype_of_the_module(
    cell: str, dtype: torch.dtype, training: bool
) -> None:
    config = Config(cell, num_layers=2, bidirectional=True, dtype=dtype, training=training)
    results = evaluate(make_module(config), make_call(config))
    assert {name: result.dtype for name, result in results.items()} == dict.fromkeys(results, dtype)


@each_cell
@each_half
def test_module_cast_after_construction(cell: str, dtype: torch.dtype) -> None:
    """`.to(dtype)`, and back: the weights are those of the dtype, then float32 again."""
    config = Config(cell, num_layers=2, dtype=torch.float32)
    module = make_module(config).to(dtype)
    assert all(p.dtype == dtype for p in module._flat_weights)
    assert_matches_torch(module, make_call(Config(cell, num_layers=2, dtype=dtype)))
    assert_matches_torch(module.float(), make_call(config))


@each_cell
def test_large_float16_values_stay_finite_where_the_result_is(cell: str) -> None:
    """Sums beyond 65504, the largest float16, saturate the gates; they are not infinite inside."""
    config = Config(cell, input_size=64, steps=3, dtype=torch.float16)
    if cell == "rnn_relu":
        config = Config("rnn_tanh", input_size=64, steps=3, dtype=torch.float16)
    module = make_module(config)
    input = torch.full((3, 2, 64), 30000.0, dtype=torch.float16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_()
    output, _ = module(input)
    assert output.isfinite().all()
    assert (output.abs() <= 1).all()


@pytest.mark.cpu_only("torch has no complex LSTM and GRU elsewhere")
@pytest.mark.parametrize("class_name", ALL_CLASS_NAMES)
def test_complex_numbers_are_left_to_torch(class_name: str) -> None:
    ours = getattr(rnn_ext, class_name)(4, 5, dtype=torch.complex128)
    theirs = getattr(nn, class_name)(4, 5, dtype=torch.complex128)
    theirs.load_state_dict(ours.state_dict())
    shape = (3, 4) if class_name in CELL_CLASS_NAMES else (2, 3, 4)
    input = torch.randn(shape, dtype=torch.complex128)
    for actual, expected in zip(flatten(ours(input)), flatten(theirs(input)), strict=True):
        torch.testing.assert_close(actual, expected)
