"""The registered operators: their schemas, and fake kernels that tell the real ones' shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

import rnn_ext
from rnn_ext import functional as F

recurrent = torch.ops.rnn_ext.recurrent.default
recurrent_backward = torch.ops.rnn_ext.recurrent_backward.default

CONFIGURATIONS = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm-stack": (nn.LSTM, {"num_layers": 3, "dropout": 0.3}),
    "lstm-proj": (nn.LSTM, {"proj_size": 3, "bidirectional": True}),
    "gru-bf16": (nn.GRU, {"dtype": torch.bfloat16, "num_layers": 2}),
}


def arguments(name: str, packed: bool, state: bool) -> tuple[object, ...]:
    """The operator's arguments for a small call of that configuration."""
    torch.manual_seed(0)
    cls, options = CONFIGURATIONS[name]
    module = cls(4, 6, **options)
    dtype = module.weight_ih_l0.dtype
    if packed:
        data = [torch.randn(n, 4, dtype=dtype) for n in (5, 3, 3)]
        input, batch_sizes, _, _ = pack_sequence(data)
    else:
        shape = (3, 5, 4) if module.batch_first else (5, 3, 4)
        input, batch_sizes = torch.randn(shape, dtype=dtype), None
    slots = module.num_layers * (2 if module.bidirectional else 1)
    h_0 = torch.randn(slots, 3, module.proj_size or 6, dtype=dtype) if state else None
    c_0 = torch.randn(slots, 3, 6, dtype=dtype) if state and module.mode == "LSTM" else None
    params = [p.detach() for p in module._flat_weights]
    kinds = {"RNN_TANH": F.RNN_TANH, "RNN_RELU": F.RNN_RELU, "LSTM": F.LSTM, "GRU": F.GRU}
    return (
        input, batch_sizes, h_0, c_0, params, kinds[module.mode], module.bias, module.num_layers,
        module.bidirectional, module.batch_first and not packed, module.dropout, True,
    )  # fmt: skip


def fake_like(mode: FakeTensorMode, values: object) -> object:
    return pytree.tree_map_only(Tensor, mode.from_tensor, values)


def assert_same_layout(fake: object, real: object) -> None:
    fakes, reals = pytree.tree_leaves(fake), pytree.tree_leaves(real)
    for one, other in zip(fakes, reals, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("save_reserve", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fake_kernels_tell_the_real_shapes(name: str, packed: bool, save_reserve: bool) -> None:
    call = (*arguments(name, packed, state=True), save_reserve)
    real = recurrent(*call)
    with FakeTensorMode() as mode:
        assert_same_layout(recurrent(*fake_like(mode, call)), real)
    if not save_reserve:
        assert real[3].numel() == 0
        return
    output, h_n, c_n, reserve = real
    grads = [torch.ones_like(output), torch.ones_like(h_n), torch.ones_like(c_n)]
    if c_n.numel() == 0:
        grads[2] = None
    mask = [True, True, c_n.numel() > 0] + [i % 2 == 0 for i in range(len(call[4]))]
    backward = (*grads, *call[:5], output, reserve, *call[5:12], mask)
    with FakeTensorMode() as mode:
        fake = recurrent_backward(*fake_like(mode, backward))
    results = recurrent_backward(*backward)
    assert_same_layout(fake, results)
    for result, asked in zip(results, mask, strict=True):
        assert (result.numel() > 0) == asked


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm-proj"])
def test_opcheck(name: str, state: bool) -> None:
    call = arguments(name, packed=False, state=state)
    grad = pytree.tree_map_only(Tensor, lambda t: t.clone().requires_grad_(), call)
    for arguments_ in (call, grad):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(recurrent, arguments_, test_utils=checks)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_modules_run_on_fake_tensors(name: str) -> None:
    cls = {"lstm": rnn_ext.LSTM, "gru": rnn_ext.GRU}[name]
    with FakeTensorMode():
        output, state = cls(4, 6)(torch.randn(5, 3, 4))
    assert output.shape == (5, 3, 6)
    assert (state[0] if name == "lstm" else state).shape == (1, 3, 6)


def test_fake_inputs_on_two_devices_are_an_error() -> None:
    with FakeTensorMode():
        call = list(arguments("gru", packed=False, state=False))
        call[0] = torch.empty(5, 3, 4, device="meta")
        with pytest.raises(RuntimeError, match="not at the same device"):
            recurrent(*call)


def test_a_reserve_of_another_call_is_an_error() -> None:
    call = arguments("gru", packed=False, state=False)
    output, h_n, _, reserve = recurrent(*call, True)
    mask = [True] * (3 + len(call[4]))
    grads = (torch.ones_like(output), torch.ones_like(h_n), None)
    with pytest.raises(RuntimeError, match="reserve is not the one of this call's forward"):
        recurrent_backward(*grads, *call[:5], output, reserve[1:], *call[5:], mask)
