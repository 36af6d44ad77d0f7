"""The registered operators: their schemas, and fake kernels that tell the real ones' shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

import rnn_ext
from helpers import threads
from rnn_ext import functional as F

recurrent = torch.ops.rnn_ext.recurrent.default
recurrent_backward = torch.ops.rnn_ext.recurrent_backward.default
recurrent_backward_per_example = torch.ops.rnn_ext.recurrent_backward_per_example.default

CONFIGURATIONS = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm-stack": (nn.LSTM, {"num_layers": 3, "dropout": 0.3}),
    "lstm-stack-eval": (nn.LSTM, {"num_layers": 3}),
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


# A dozen calls: each cell, padded and packed, with and without a state, both directions, stacks.
OPCHECKS = [
    ("rnn", False, False),
    ("rnn", True, True),
    ("relu", False, True),
    ("relu", True, True),
    ("gru", False, False),
    ("gru", True, True),
    ("lstm", False, True),
    ("lstm", True, True),
    ("lstm-stack-eval", False, False),
    ("lstm-proj", False, True),
    ("lstm-proj", True, True),
    ("gru-bf16", False, True),
]
each_opcheck = pytest.mark.parametrize(("name", "packed", "state"), OPCHECKS)


def with_grad(call: object) -> object:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_(tensor.is_floating_point())

    return pytree.tree_map_only(Tensor, leaf, call)


def check_all(operator: object, call: tuple, aot_dynamic: bool = True) -> None:
    utilities = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    ]
    if aot_dynamic:
        utilities.append("test_aot_dispatch_dynamic")
    found = torch.library.opcheck(operator, call, test_utils=utilities)
    assert found == dict.fromkeys(utilities, "SUCCESS")


def test_opcheck_packed_without_a_state() -> None:
    # How many sequences there are is data then, which a graph of fixed shapes cannot hold.
    call = arguments("lstm", packed=True, state=False)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = torch.library.opcheck(recurrent, call, test_utils=utilities)
    assert set(found.values()) == {"SUCCESS"}
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(recurrent, call, test_utils="test_aot_dispatch_static")


@each_opcheck
def test_opcheck_forward(name: str, packed: bool, state: bool) -> None:
    call = arguments(name, packed, state)
    check_all(recurrent, call)
    check_all(recurrent, with_grad(call))


@each_opcheck
def test_opcheck_backward(name: str, packed: bool, state: bool) -> None:
    call = arguments(name, packed, state)
    output, h_n, c_n, reserve = recurrent(*call, True)
    lstm = c_n.numel() > 0
    grads = (torch.ones_like(output), torch.ones_like(h_n), torch.ones_like(c_n) if lstm else None)
    mask = [True, state, state and lstm] + [True] * len(call[4])
    check_all(recurrent_backward, (*grads, *call[:5], output, reserve, *call[5:12], mask))


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm-proj"])
def test_opcheck_double_backward(name: str) -> None:
    call = arguments(name, packed=False, state=True)
    output, h_n, c_n, reserve = recurrent(*call, True)
    lstm = c_n.numel() > 0
    grads = (torch.ones_like(output), torch.ones_like(h_n), torch.ones_like(c_n) if lstm else None)
    mask = [True, True, lstm] + [True] * len(call[4])
    leaves = with_grad((*grads, *call[:5]))
    # The step-by-step form that it is made of is one graph for each length.
    check_all(recurrent_backward, (*leaves, output, reserve, *call[5:12], mask), aot_dynamic=False)


def per_example_call(name: str, packed: bool) -> tuple[object, ...]:
    """The batch of three, each row an example of its own; packed, all of them of one length."""
    call = list(arguments(name, packed=False, state=True))
    if packed:
        call[1] = torch.full((call[0].size(0),), 3)
        call[0] = call[0].flatten(0, 1)
    output, h_n, c_n, reserve = recurrent(*call, True)
    lstm = c_n.numel() > 0
    grads = (torch.ones_like(output), torch.ones_like(h_n), torch.ones_like(c_n) if lstm else None)
    mask = [True, True, lstm] + [True] * len(call[4])
    return (*grads, *call[:5], output, reserve, *call[5:12], mask)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["rnn", "relu", "gru", "lstm", "lstm-stack-eval", "gru-bf16"])
def test_opcheck_backward_per_example(name: str, packed: bool) -> None:
    backward = list(per_example_call(name, packed))
    backward[-3:-1] = [0.0, True]  # no dropout
    check_all(recurrent_backward_per_example, (*backward, 3))
    sums = recurrent_backward(*backward)
    own = recurrent_backward_per_example(*backward, 3)
    for i, (found, expected) in enumerate(zip(own, sums, strict=True)):
        if i < 3:  # of input and states: rows of the batch in any case
            assert torch.equal(found, expected)
            continue
        assert found.shape == (3, *expected.shape)
        # bfloat16: three roundings and one are not the same.
        bounds = {"rtol": 2e-2, "atol": 0.1} if name == "gru-bf16" else {}
        torch.testing.assert_close(found.sum(0), expected, **bounds)


def test_backward_per_example_of_uneven_rows_or_with_projection_is_an_error() -> None:
    backward = per_example_call("gru", packed=False)
    with pytest.raises(RuntimeError, match="as many rows of each example, got 2 examples"):
        recurrent_backward_per_example(*backward, 2)
    with pytest.raises(NotImplementedError, match="proj_size"):
        recurrent_backward_per_example(*per_example_call("lstm-proj", packed=False), 3)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm-proj"])
def test_opcheck_of_several_models_in_one_call(name: str) -> None:
    call = list(arguments(name, packed=False, state=True))
    for i in (0, 2, 3):
        call[i] = None if call[i] is None else torch.stack([call[i], -call[i]])
    call[4] = [torch.stack([p, p / 2]) for p in call[4]]
    check_all(recurrent, tuple(call))
    check_all(recurrent, with_grad(tuple(call)))


@pytest.mark.parametrize("what", ["input", "h_0", "parameter"])
def test_several_models_of_different_counts_are_an_error(what: str) -> None:
    call = list(arguments("gru", packed=False, state=True))
    for i in (0, 2):
        call[i] = torch.stack([call[i]] * 2)
    call[4] = [torch.stack([p] * 2) for p in call[4]]
    if what == "parameter":
        call[4][-1] = call[4][-1][:1]
    else:
        call[0 if what == "input" else 2] = call[0 if what == "input" else 2][:1]
    with pytest.raises(RuntimeError, match=f"{what} must have 2 entries in dimension 0"):
        recurrent(*call)


def test_an_error_in_one_of_several_models_ends_the_call() -> None:
    call = list(arguments("gru", packed=False, state=False))
    call[0] = torch.stack([call[0]] * 4)
    call[4] = [torch.stack([p] * 4) for p in call[4]]
    output, h_n, _, reserve = recurrent(*call, True)
    mask = [True] * (3 + len(call[4]))
    grads = (torch.ones_like(output), torch.ones_like(h_n), None)
    with (
        threads(2),  # where the other one waits for the jobs of the first
        pytest.raises(RuntimeError, match="reserve is not the one of this call's forward"),
    ):
        recurrent_backward(*grads, *call[:5], output, reserve[:, 1:], *call[5:], mask)


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
