"""Options of what goes beyond torch.nn: where they are kept, what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import (
    pack_sequence,
)

import rnn_ext
from feature_cases import (
    BATCH,
    HIDDEN,
    INPUT,
    LENGTHS,
    STEPS,
    assert_same,
    build,
    draw,
    jagged,
)
from rnn_ext import features

# ------------------------------------------------------------------------- options and state


def test_options_and_what_is_shown() -> None:
    module = rnn_ext.LSTM(
        2, 3, bptt_steps=4, bptt_style="window", zoneout=(0.1, 0.2), forget_bias=1.0
    )
    assert module.extra_repr() == (
        "2, 3, bptt_steps=4, bptt_style='window', zoneout=(0.1, 0.2), forget_bias=1.0"
    )
    module.zoneout, module.bptt_steps, module.bptt_style = 0.0, None, "chunk"
    assert module.extra_repr() == "2, 3, forget_bias=1.0"
    assert module._options is None
    assert repr(rnn_ext.GRU(2, 3)) == repr(nn.GRU(2, 3))
    assert rnn_ext.LSTM.zoneout == 0.0
    assert rnn_ext.LSTM.bptt_steps is None


def test_options_of_one_module_are_not_those_of_its_copy() -> None:
    module = rnn_ext.GRU(2, 3, zoneout=0.5)
    for twin in (copy.copy(module), copy.deepcopy(module)):
        twin.zoneout = 0.25
        twin.hidden_dropout = 0.5
        assert (module.zoneout, module.hidden_dropout) == (0.5, 0.0)


@pytest.mark.parametrize(
    "name", [*sorted({*features.OPTION_NAMES} - {"layer_norm"}), "forget_bias"]
)
def test_state_dict_and_initial_weights_are_torchs(name: str) -> None:
    values = {"bptt_steps": 2, "bptt_style": "window", "checkpoint_steps": 3}
    torch.manual_seed(0)
    module = rnn_ext.LSTM(2, 3, num_layers=2, **{name: values.get(name, 0.5)})
    torch.manual_seed(0)
    twin = nn.LSTM(2, 3, num_layers=2)
    assert list(module.state_dict()) == list(twin.state_dict())
    for key, value in twin.state_dict().items():
        if name != "forget_bias" or not key.startswith("bias"):
            assert torch.equal(module.state_dict()[key], value)
    twin.load_state_dict(module.state_dict())


def test_pickle_keeps_options() -> None:
    module = rnn_ext.LSTM(2, 3, zoneout=(0.1, 0.2), checkpoint_steps=5, forget_bias=2.0)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert repr(loaded) == repr(module)
    assert loaded.zoneout == (0.1, 0.2)
    loaded.zoneout = 0.0
    assert module.zoneout == (0.1, 0.2)


def test_forget_bias() -> None:
    torch.manual_seed(0)
    module = rnn_ext.LSTM(2, 3, num_layers=2, bidirectional=True, forget_bias=1.5)
    torch.manual_seed(0)
    twin = rnn_ext.LSTM(2, 3, num_layers=2, bidirectional=True)
    for _ in range(2):
        for name, parameter in module.named_parameters():
            expected = dict(twin.named_parameters())[name].detach().clone()
            if name.startswith("bias"):
                expected[3:6] = 1.5 if name.startswith("bias_ih") else 0.0
            assert torch.equal(parameter, expected)
            assert parameter.requires_grad
        torch.manual_seed(1)
        module.reset_parameters()
        torch.manual_seed(1)
        twin.reset_parameters()


def test_options_come_with_a_converted_module() -> None:
    model = rnn_ext.convert(nn.Sequential(nn.GRU(INPUT, HIDDEN)))
    model[0].checkpoint_steps = 3
    assert not hasattr(rnn_ext.to_torch(model)[0], "checkpoint_steps")
    again = rnn_ext.convert(rnn_ext.to_torch(model))
    assert again[0].checkpoint_steps == 3
    x = torch.randn(STEPS, BATCH, INPUT)
    assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"bptt_steps": 2},
        {"input_dropout": 0.1},
        {"hidden_dropout": 0.1},
        {"weight_dropout": 0.1},
        {"zoneout": 0.1},
        {"layer_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("parametrized", [False, True])
def test_to_torch_refuses_what_torch_cannot_do(options: dict, parametrized: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), rnn_ext.LSTM(2, 3, **options))
    if parametrized:
        parametrizations.weight_norm(model[1], "weight_hh_l0")
    with pytest.raises(ValueError, match=f"'1' has {next(iter(options))}=.*which torch.nn lacks"):
        rnn_ext.to_torch(model)
    assert isinstance(model[1], rnn_ext.LSTM)
    if "layer_norm" in options:
        return
    setattr(model[1], next(iter(options)), getattr(rnn_ext.LSTM, next(iter(options))))
    assert not isinstance(rnn_ext.to_torch(model)[1], rnn_ext.LSTM)


def test_parametrized_weights_are_those_of_the_call() -> None:
    module = build("lstm", hidden_dropout=0.5)
    x = draw(STEPS, BATCH, INPUT)
    torch.manual_seed(4)
    before, _ = module(x, lengths=LENGTHS)
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2.0)  # the norms
    torch.manual_seed(4)
    after, _ = module(x, lengths=LENGTHS)
    twin = build("lstm", hidden_dropout=0.5)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(2.0)
    torch.manual_seed(4)
    assert_same(after, twin(x, lengths=LENGTHS)[0])
    assert not torch.allclose(before, after)


def test_autocast() -> None:
    module = rnn_ext.LSTM(8, 8, num_layers=2, hidden_dropout=0.5)
    x = torch.randn(STEPS, BATCH, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x, lengths=LENGTHS)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert module.weight_ih_l0.grad.dtype == torch.float32


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bptt_steps": 0}, ValueError, "bptt_steps must be at least 1, got 0"),
        ({"bptt_steps": 2.0}, TypeError, "bptt_steps should be of type int or None, got: float"),
        ({"bptt_steps": True}, TypeError, "bptt_steps should be of type int or None, got: bool"),
        ({"checkpoint_steps": -1}, ValueError, "checkpoint_steps must be at least 1"),
        ({"bptt_style": "chunks"}, ValueError, "bptt_style must be 'chunk' or 'window'"),
        ({"input_dropout": 1.1}, ValueError, r"input_dropout should be a number in range \[0, 1\]"),
        ({"hidden_dropout": -0.1}, ValueError, "hidden_dropout should be a number in range"),
        ({"weight_dropout": True}, ValueError, "weight_dropout should be a number in range"),
        ({"zoneout": "0.1"}, ValueError, "zoneout should be a number in range"),
        ({"zoneout": float("nan")}, ValueError, "zoneout should be a number in range"),
        ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout should be a number, or for the LSTM"),
        ({"zoneout": (0.1, 1.2)}, ValueError, "zoneout should be a number in range"),
        ({"zoneout": 0.1, "proj_size": 2}, ValueError, "projections is not defined"),
        ({"layer_norm": True, "proj_size": 2}, ValueError, "projections is not defined"),
        ({"forget_bias": "1"}, TypeError, "forget_bias should be a number, got: str"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected bias=True"),
        ({"zone_out": 0.1}, TypeError, "unexpected keyword argument 'zone_out'"),
    ],
    ids=str,
)
def test_errors_of_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnn_ext.LSTM(2, 3, **options)


@pytest.mark.parametrize("options", [{"forget_bias": 1.0}, {"zoneout": (0.1, 0.2)}], ids=str)
def test_options_of_the_lstm_only(options: dict) -> None:
    for cls in (rnn_ext.RNN, rnn_ext.GRU):
        with pytest.raises((TypeError, ValueError), match=r"forget_bias|for the LSTM a pair"):
            cls(2, 3, **options)


def test_an_option_that_was_refused_changes_nothing() -> None:
    module = rnn_ext.LSTM(2, 3, zoneout=0.5)
    with pytest.raises(ValueError, match="range"):
        module.zoneout = 2
    assert module.zoneout == 0.5


def test_layer_norm_is_for_the_constructor() -> None:
    for module, other in ((rnn_ext.GRU(2, 3), True), (rnn_ext.GRU(2, 3, layer_norm=True), False)):
        module.layer_norm = not other
        with pytest.raises(ValueError, match="choose it in the constructor"):
            module.layer_norm = other


RESETS = torch.zeros(STEPS, BATCH, dtype=torch.bool)
STATE = torch.zeros(1, BATCH, HIDDEN), torch.zeros(1, BATCH, HIDDEN)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, TypeError, "lengths must be integers, got torch.float"),
        ({"lengths": RESETS[0]}, TypeError, "lengths must be integers, got torch.bool"),
        ({"lengths": [1, 2, 3]}, RuntimeError, "one entry for each of the 4 rows .* got shape"),
        ({"lengths": []}, RuntimeError, "one entry for each of the 4 rows"),
        ({"lengths": 3}, RuntimeError, r"got shape \(\)"),
        ({"lengths": [1, 2, 3, 8]}, RuntimeError, "between 0 and the 7 steps .* got 1 to 8"),
        ({"lengths": [1, 2, 3, -1]}, RuntimeError, "between 0 and the 7 steps .* got -1 to 3"),
        ({"resets": RESETS.int()}, TypeError, "resets must be a tensor of torch.bool"),
        ({"resets": RESETS.tolist()}, TypeError, "resets must be .* got list"),
        ({"resets": RESETS.T}, RuntimeError, r"Expected resets of size \(7, 4\), got \(4, 7\)"),
        ({"resets": RESETS[:, 0]}, RuntimeError, "Expected resets of size"),
        ({"resets": RESETS.to("meta")}, RuntimeError, "not at the same device"),
        ({"reset_state": STATE}, ValueError, "reset_state is what resets return to"),
        (
            {"resets": RESETS, "reset_state": (STATE[0][:, :2], STATE[1])},
            RuntimeError,
            r"Expected reset_state\[0\] size \(1, 4, 5\), got \[1, 2, 5\]",
        ),
        (
            {"resets": RESETS, "reset_state": (STATE[0], STATE[1][..., :4])},
            RuntimeError,
            r"Expected reset_state\[1\] size",
        ),
        ({"resets": RESETS, "reset_state": STATE[0]}, IndexError, "out of bounds"),
        (
            {"resets": RESETS, "reset_state": (STATE[0][0], STATE[1][0])},
            RuntimeError,
            "should also be 3-D",
        ),
        (
            {"resets": RESETS, "hx": (STATE[0][:, :2], STATE[1])},
            RuntimeError,
            r"Expected hidden\[0\] size \(1, 4, 5\), got \[1, 2, 5\]",
        ),
    ],
)
def test_errors_of_arguments(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnn_ext.LSTM(INPUT, HIDDEN)(torch.zeros(STEPS, BATCH, INPUT), **keywords)


@pytest.mark.parametrize(
    ("input", "keywords", "error", "message"),
    [
        (torch.zeros(STEPS, INPUT), {"lengths": [3]}, ValueError, "2-D .unbatched. input"),
        (torch.zeros(STEPS, INPUT), {"resets": RESETS}, RuntimeError, "resets should be 1-D"),
        (pack_sequence([torch.zeros(3, INPUT)]), {"lengths": [3]}, ValueError, "has its own"),
        (jagged([torch.zeros(3, INPUT)]), {"lengths": [3]}, ValueError, "has its own"),
        (jagged([torch.zeros(3, 2, INPUT)]), {}, ValueError, "nested input to be jagged"),
        (
            torch.nested.nested_tensor([torch.zeros(3, INPUT)], layout=torch.strided),
            {},
            ValueError,
            "nested input to be jagged",
        ),
        (torch.zeros(2, 2, 2, 2), {"lengths": [3]}, ValueError, "to be 2D or 3D, got 4D"),
        (torch.zeros(0, BATCH, INPUT), {"resets": RESETS[:0]}, RuntimeError, "larger than 0"),
        (torch.zeros(STEPS, BATCH, 2), {"resets": RESETS}, RuntimeError, "input.size.-1. must be"),
        (torch.zeros(STEPS, BATCH, INPUT).double(), {"resets": RESETS}, ValueError, "dtype"),
    ],
)
def test_errors_of_input(input: Any, keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnn_ext.GRU(INPUT, HIDDEN)(input, **keywords)
