"""Backpropagation through time over a window: every gradient is the literal double loop's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import rnn_ext
from helpers import Call, assert_matches_torch, threads
from numpy_twin import CELLS, Arrays, assert_close, cell_name, make_module, max_error, random_step
from references import LINEAR, STANDARD, Activation, stack, window
from rnn_ext import _C
from rnn_ext import functional as F
from rnn_ext.testing import linear_activations
from rnn_ext.truncated import window_bptt

TOLERANCE = 1e-10
STEPS, BATCH, INPUT, HIDDEN = 11, 3, 4, 5
KINDS = {"RNN_TANH": F.RNN_TANH, "RNN_RELU": F.RNN_RELU, "LSTM": F.LSTM, "GRU": F.GRU}
STATES = ("h", "c")

each_cell = pytest.mark.parametrize("cell", CELLS)

Step = tuple[Tensor, list[Tensor], Tensor, list[Tensor]]


def call(
    module: nn.RNNBase, x: Tensor, states: Sequence[Tensor | None], steps: int
) -> tuple[Tensor, ...]:
    """window_bptt with the weights and settings of a module: output, h_n, (c_n)."""
    h_0, c_0 = states if len(states) == 2 else (states[0], None)
    results = window_bptt(
        x, h_0, c_0, module._flat_weights, KINDS[module.mode], module.bias, module.num_layers,
        module.bidirectional, module.batch_first, module.dropout, module.training, steps,
    )  # fmt: skip
    return results if module.mode == "LSTM" else results[:2]


def arrays(
    module: nn.RNNBase, values: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Arrays:
    names = [f"{s}_n" for s in STATES[: len(values) - 1]]
    keys = ["output", *names, "d_input", *(f"d_{n[0]}_0" for n in names)]
    keys += [f"d_{name}" for name in module._flat_weights_names]
    both = zip(keys, [*values, *gradients], strict=True)
    return {key: value.detach().double().numpy() for key, value in both}


def run(module: nn.RNNBase, step: Step, steps: int) -> Arrays:
    """A training step of the module (time first), truncated, as in numpy_twin.run_torch."""
    x, initial, doutput, dfinal = step
    x = x.detach().requires_grad_()
    states = [state.detach().requires_grad_() for state in initial]
    if module.batch_first:
        output, *final = call(module, x.transpose(0, 1).contiguous(), states, steps)
        output = output.transpose(0, 1)
    else:
        output, *final = call(module, x, states, steps)
    wanted = [x, *states, *module._flat_weights]
    gradients = torch.autograd.grad([output, *final], wanted, [doutput, *dfinal])
    for tensor, gradient in zip(wanted, gradients, strict=True):
        assert gradient.dtype == tensor.dtype
    return arrays(module, [output, *final], gradients)


def reference(
    module: nn.RNNBase,
    step: Step,
    steps: int,
    masks: Sequence[Tensor] | None = None,
    activation: Activation = STANDARD,
) -> Arrays:
    """The same by the double loop in NumPy, float64."""
    x, initial, doutput, dfinal = step

    def numbers(tensors: Sequence[Tensor]) -> list[np.ndarray]:
        return [tensor.detach().double().numpy() for tensor in tensors]

    cell = cell_name(module)
    flat = numbers(module._flat_weights)
    params = stack.split_flat_weights(cell, flat, bias=module.bias, projected=module.proj_size > 0)
    options = {
        "directions": 2 if module.bidirectional else 1,
        "masks": None if masks is None else numbers(masks),
        "activation": activation,
    }
    (x_, doutput_), initial_ = numbers([x, doutput]), tuple(numbers(initial))
    output, final, _ = stack.forward(cell, x_, initial_, params, **options)
    dx, dinitial, dparams = window.gradients(
        cell, x_, initial_, params, doutput_, tuple(numbers(dfinal)), steps, **options
    )
    gradients = [dx, *dinitial, *stack.join_flat_weights(dparams)]
    return arrays(
        module, *([torch.from_numpy(a) for a in part] for part in ([output, *final], gradients))
    )


def assert_differ(actual: Arrays, expected: Arrays, least: float) -> None:
    """Every gradient of a weight is at least that far off."""
    for name, value in expected.items():
        if name.startswith("d_weight_hh"):
            assert max_error(actual[name], value) >= least, name


LAYOUTS = {
    "one layer": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "two directions": {"bidirectional": True},
    "two directions, batch first": {"bidirectional": True, "batch_first": True},
    "three layers": {"num_layers": 3},
}


@pytest.mark.parametrize("steps", [1, 2, 4, STEPS - 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_cell
def test_is_the_double_loop(cell: str, layout: str, steps: int) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, **LAYOUTS[layout])
    step = random_step(module, STEPS, BATCH)
    ours = run(module, step, steps)
    assert_close(ours, reference(module, step, steps), TOLERANCE)
    # One step more or less would not pass.
    for other in {steps - 1, steps + 1} - {0}:
        assert_differ(ours, reference(module, step, other), 1000 * TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_cell
def test_a_window_of_all_steps_is_full_bptt(cell: str, layout: str) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, **LAYOUTS[layout])
    full = make_module(nn, cell, INPUT, HIDDEN, **LAYOUTS[layout] | {"batch_first": False})
    step = random_step(module, STEPS, BATCH)
    for steps in (STEPS, STEPS + 5):
        ours = run(module, step, steps)
        assert_close(ours, reference(full, step, steps), TOLERANCE)
        assert_close(operator(module, step, steps), ours, TOLERANCE)


def operator(module: nn.RNNBase, step: Step, steps: int) -> Arrays:
    """The operator itself, which window_bptt does not call for a window of all steps."""
    x, initial, doutput, dfinal = step
    if module.batch_first:
        x, doutput = x.transpose(0, 1).contiguous(), doutput.transpose(0, 1).contiguous()
    options = (
        KINDS[module.mode], module.bias, module.num_layers, module.bidirectional,
        module.batch_first, module.dropout, module.training,
    )  # fmt: skip
    params = [p.detach() for p in module._flat_weights]
    h_0, c_0 = initial if len(initial) == 2 else (initial[0], None)
    *values, reserve = torch.ops.rnn_ext.recurrent(x, None, h_0, c_0, params, *options, True)
    dh_n, dc_n = dfinal if len(dfinal) == 2 else (dfinal[0], None)
    mask = [True, True, c_0 is not None] + [True] * len(params)
    dx, dh_0, dc_0, *dparams = torch.ops.rnn_ext.recurrent_window_backward(
        doutput, dh_n, dc_n, x, h_0, c_0, params, values[0], reserve, *options, steps, mask
    )
    if module.batch_first:
        values[0], dx = values[0].transpose(0, 1), dx.transpose(0, 1)
    if c_0 is None:
        return arrays(module, values[:2], [dx, dh_0, *dparams])
    return arrays(module, values, [dx, dh_0, dc_0, *dparams])


@each_cell
def test_dropout_between_layers(cell: str) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, num_layers=3, dropout=0.4)
    step = random_step(module, STEPS, BATCH)
    torch.manual_seed(2)
    ours = run(module, step, 3)
    torch.manual_seed(2)
    masks = [nn.functional.dropout(torch.ones_like(step[2]), 0.4) for _ in range(2)]
    assert_close(ours, reference(module, step, 3, masks), TOLERANCE)


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Vectors and tiles that are not full, several blocks of chains."""
    draw = data.draw
    cell = draw(st.sampled_from(CELLS))
    two_ways = draw(st.booleans())
    options = {
        "num_layers": 1 if two_ways else draw(st.integers(1, 3)),
        "bidirectional": two_ways,
        "bias": draw(st.booleans()),
    }
    hidden = draw(st.integers(2, 40))
    module = make_module(rnn_ext, cell, draw(st.integers(1, 20)), hidden, **options)
    step = random_step(module, draw(st.integers(1, 16)), draw(st.integers(1, 60)))
    steps = draw(st.integers(1, 8))
    assert_close(operator(module, step, steps), reference(module, step, steps), TOLERANCE)


def isas() -> Iterator[str]:
    selected = _C.cpu_info()["isa"]
    for isa in _C.cpu_info()["available"]:
        _C.set_cpu_isa(isa)
        yield isa
    _C.set_cpu_isa(selected)


@each_cell
def test_every_instruction_set(cell: str) -> None:
    layout = {"bidirectional": True} if cell == "gru" else {"num_layers": 2}
    module = make_module(rnn_ext, cell, 7, 21, **layout)
    step = random_step(module, 9, 40)
    expected = reference(module, step, 4)
    seen = 0
    for _ in isas():
        assert_close(run(module, step, 4), expected, TOLERANCE)
        seen += 1
    assert seen == len(_C.cpu_info()["available"])


@each_cell
def test_linear_activations(cell: str) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, num_layers=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)  # a linear LSTM is a polynomial: it must not grow
    step = random_step(module, STEPS, BATCH)
    with linear_activations():
        ours = run(module, step, 3)
    assert_close(ours, reference(module, step, 3, activation=LINEAR), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["one layer", "two directions", "three layers"])
@each_cell
def test_the_same_bits_on_any_number_of_threads(cell: str, layout: str, dtype: torch.dtype) -> None:
    module = make_module(rnn_ext, cell, 30, 50, dtype=dtype, **LAYOUTS[layout])
    step = random_step(module, 40, 25)  # 1000 chains: several blocks
    expected = run(module, step, 7)
    for count in (2, 3):
        with threads(count):
            assert_same_bits(run(module, step, 7), expected)


def assert_same_bits(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(actual[name], value), name


class Windowed:
    """A module of rnn_ext whose forward is window_bptt."""

    window = 5

    def forward(self, x: Tensor, hx: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, object]:
        lstm = self.mode == "LSTM"
        output, *final = call(self, x, hx if lstm else [hx], self.window)
        return output, (tuple(final) if lstm else final[0])


class DoubleLoop:
    """A module of torch.nn whose output[t] is that of a call of k steps from a constant state."""

    window = 5

    def forward(self, x: Tensor, hx: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, object]:
        run = super().forward
        states = [hx]
        with torch.no_grad():
            for t in range(len(x)):
                states.append(run(x[t : t + 1], states[-1])[1])
        outputs = []
        for t in range(len(x)):
            start = max(0, t - self.window + 1)
            output, final = run(x[start : t + 1], states[start])
            outputs.append(output[-1])
        return torch.stack(outputs), final


def variant(library: ModuleType, way: type) -> SimpleNamespace:
    """The library with forward replaced."""
    names = ("RNN", "LSTM", "GRU")
    return SimpleNamespace(
        **{name: type(name, (way, getattr(library, name)), {}) for name in names}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_layers", [1, 2])
@each_cell
def test_no_less_accurate_than_torch(cell: str, num_layers: int, dtype: torch.dtype) -> None:
    ours = make_module(variant(rnn_ext, Windowed), cell, 12, 24, dtype=dtype, num_layers=num_layers)
    theirs = make_module(variant(nn, DoubleLoop), cell, 12, 24, dtype=dtype, num_layers=num_layers)
    x, initial, _, _ = random_step(ours, 20, 6)
    leaves = {"input": x, **{f"{s}_0": state for s, state in zip(STATES, initial, strict=False)}}

    def arrange(leaves: dict[str, Tensor]) -> tuple[object, ...]:
        x, *states = leaves.values()
        return x, (tuple(states) if len(states) == 2 else states[0])

    assert_matches_torch(ours, Call(leaves, arrange), theirs)


@each_cell
def test_only_what_is_asked_for(cell: str) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, num_layers=2)
    step = random_step(module, STEPS, BATCH)
    expected = run(module, step, 3)
    names = ["input", *(f"{s}_0" for s in STATES[: len(step[1])]), *module._flat_weights_names]
    for only, name in enumerate(names):
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        x, initial, doutput, dfinal = step
        operands = [x, *initial, *module._flat_weights]
        operands[only].requires_grad_(True)
        output, *final = call(module, x, initial, 3)
        torch.autograd.backward([output, *final], [doutput, *dfinal])
        assert_close({name: operands[only].grad.numpy()}, {name: expected[f"d_{name}"]}, TOLERANCE)
        assert all(o.grad is None for i, o in enumerate(operands) if i != only)
        operands[only].grad = None
        operands[only].requires_grad_(False)


@each_cell
def test_losses_of_one_result_only(cell: str) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, num_layers=2)
    x, initial, doutput, dfinal = random_step(module, STEPS, BATCH)
    for only in range(1 + len(initial)):
        results = call(module, x, initial, 3)
        cotangents = [doutput, *dfinal]
        gradients = torch.autograd.grad(
            results[only], module._flat_weights, cotangents[only], allow_unused=True
        )
        zeros = [torch.zeros_like(c) if i != only else c for i, c in enumerate(cotangents)]
        expected = reference(module, (x, initial, zeros[0], zeros[1:]), 3)
        named = zip(module._flat_weights_names, gradients, strict=True)
        ours = {f"d_{name}": gradient.numpy() for name, gradient in named}
        assert_close(ours, {name: expected[name] for name in ours}, TOLERANCE)


@each_cell
def test_without_an_initial_state(cell: str) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN)
    x, initial, doutput, dfinal = random_step(module, STEPS, BATCH)
    zeros = [torch.zeros_like(state) for state in initial]
    expected = reference(module, (x, zeros, doutput, dfinal), 3)
    results = call(module, x, [None] * len(initial), 3)
    gradients = torch.autograd.grad(results, module._flat_weights, [doutput, *dfinal])
    named = zip(module._flat_weights_names, gradients, strict=True)
    ours = {f"d_{name}": gradient.numpy() for name, gradient in named}
    assert_close(ours, {name: expected[name] for name in ours}, TOLERANCE)


def test_an_empty_batch() -> None:
    module = make_module(rnn_ext, "lstm", INPUT, HIDDEN)
    x = torch.zeros(STEPS, 0, INPUT, dtype=torch.float64, requires_grad=True)
    output, _, _ = call(module, x, [None, None], 3)
    output.sum().backward()
    assert output.shape == (STEPS, 0, HIDDEN)
    assert x.grad.shape == x.shape
    assert not module.weight_hh_l0.grad.any()


def test_without_gradients_nothing_is_kept() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    with torch.no_grad():
        output, h_n = call(module, x, initial, 3)
    assert output.grad_fn is None
    expected, expected_h_n = module(x, initial[0])
    torch.testing.assert_close((output, h_n), (expected.detach(), expected_h_n.detach()))


def test_a_second_backward_gives_the_same_bits() -> None:
    module = make_module(rnn_ext, "lstm", INPUT, HIDDEN)
    x, initial, doutput, _ = random_step(module, STEPS, BATCH)
    output, _, _ = call(module, x, initial, 3)
    first, second = (
        torch.autograd.grad(output, module._flat_weights, doutput, retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_output_may_be_changed_in_place() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, doutput, _ = random_step(module, STEPS, BATCH)
    output, _ = call(module, x, initial, 3)
    expected = torch.autograd.grad(output, module._flat_weights, doutput)
    output, _ = call(module, x, initial, 3)
    output += 1
    assert all(
        map(torch.equal, torch.autograd.grad(output, module._flat_weights, doutput), expected)
    )


def test_autocast_computes_in_its_dtype() -> None:
    module = make_module(rnn_ext, "lstm", INPUT, HIDDEN, dtype=torch.float32)
    x, initial, doutput, _ = random_step(module, STEPS, BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _, _ = call(module, x, initial, 3)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output, module._flat_weights, doutput.bfloat16())
    narrow = make_module(rnn_ext, "lstm", INPUT, HIDDEN, dtype=torch.bfloat16)
    states = [state.bfloat16() for state in initial]
    output, _, _ = call(narrow, x.bfloat16(), states, 3)
    expected = torch.autograd.grad(output, narrow._flat_weights, doutput.bfloat16())
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize(
    "layout",
    [{}, {"bidirectional": True}, {"num_layers": 2, "dropout": 0.3}],
    ids=["one", "bidirectional", "stack"],
)
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "lstm_proj", "gru"])
def test_opcheck(cell: str, layout: dict) -> None:
    module = make_module(rnn_ext, cell, INPUT, HIDDEN, **layout)
    x, initial, doutput, dfinal = random_step(module, STEPS, BATCH)
    h_0, c_0 = initial if len(initial) == 2 else (initial[0], None)
    dh_n, dc_n = dfinal if len(dfinal) == 2 else (dfinal[0], None)
    options = (
        KINDS[module.mode], True, module.num_layers, module.bidirectional, False,
        module.dropout, True,
    )  # fmt: skip
    params = [p.detach() for p in module._flat_weights]
    output, _, _, reserve = torch.ops.rnn_ext.recurrent(x, None, h_0, c_0, params, *options, True)
    mask = [True, True, c_0 is not None] + [i % 2 == 0 for i in range(len(params))]
    arguments = (doutput, dh_n, dc_n, x, h_0, c_0, params, output, reserve, *options, 3, mask)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor",
                 "test_aot_dispatch_static", "test_aot_dispatch_dynamic")  # fmt: skip
    found = torch.library.opcheck(
        torch.ops.rnn_ext.recurrent_window_backward.default, arguments, test_utils=utilities
    )
    assert set(found.values()) == {"SUCCESS"}


def test_inside_torch_compile() -> None:
    module = make_module(rnn_ext, "lstm", INPUT, HIDDEN)
    x, initial, doutput, _ = random_step(module, STEPS, BATCH)
    params = module._flat_weights

    def step(x: Tensor, h_0: Tensor, c_0: Tensor) -> Tensor:
        return window_bptt(
            x, h_0, c_0, params, F.LSTM, True, 1, False, False, 0.0, True, 3
        )[0]  # fmt: skip

    expected = torch.autograd.grad(step(x, *initial), params, doutput)
    output = torch.compile(step, backend="aot_eager", fullgraph=True)(x, *initial)
    assert all(map(torch.equal, torch.autograd.grad(output, params, doutput), expected))


@pytest.mark.parametrize("steps", [0, -3])
def test_a_window_needs_a_step(steps: int) -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    with pytest.raises(ValueError, match=f"at least one step, got {steps}"):
        call(module, x, initial, steps)


@pytest.mark.parametrize("steps", [2.0, True, None])
def test_steps_must_be_an_int(steps: object) -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    with pytest.raises(TypeError, match="must be an int"):
        call(module, x, initial, steps)


def test_several_bidirectional_layers_are_refused() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN, num_layers=2, bidirectional=True)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    with pytest.raises(ValueError, match="several bidirectional layers"):
        call(module, x, initial, 3)


def test_packed_data_are_refused() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    packed = pack_padded_sequence(x, [STEPS] * BATCH)
    with pytest.raises(TypeError, match="padded batch, got PackedSequence"):
        call(module, packed, initial, 3)


def test_second_derivatives_are_refused() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    output, _ = call(module, x, initial, 3)
    gradient = torch.autograd.grad(output.sum(), module.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient[0].sum(), module.weight_hh_l0)


def test_other_devices_are_refused() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN).to("meta")
    x = torch.zeros(STEPS, BATCH, INPUT, dtype=torch.float64, device="meta")
    with pytest.raises(NotImplementedError, match="on the CPU, not on meta"):
        call(module, x, [None], 3)


def test_wrong_sizes_are_torch_errors() -> None:
    module = make_module(rnn_ext, "gru", INPUT, HIDDEN)
    x, initial, _, _ = random_step(module, STEPS, BATCH)
    with pytest.raises(RuntimeError, match="input_size"):
        call(module, x[..., :-1], initial, 3)
    with pytest.raises(RuntimeError, match="hidden"):
        call(module, x, [initial[0][:, :-1]], 3)
    with pytest.raises(RuntimeError, match="3 dimensions"):
        call(module, x[:, 0], initial, 3)


@pytest.mark.parametrize("steps", [3, STEPS])
def test_flops_are_those_of_the_products(steps: int) -> None:
    module = make_module(rnn_ext, "lstm_proj", INPUT, HIDDEN, num_layers=2)
    step = random_step(module, STEPS, BATCH)
    with FlopCounterMode(display=False) as forward:
        module(step[0], tuple(step[1]))
    with FlopCounterMode(display=False) as both:
        operator(module, step, steps)
    passed = sum(min(t + 1, steps) for t in range(STEPS))  # by all chains; out of each but the last
    left = passed - sum(t >= steps for t in range(STEPS))
    H, R, gates = HIDDEN, module.proj_size, 4 * HIDDEN
    chains = 2 * left * gates * R + passed * (R * gates + 2 * H * R)
    every_row = STEPS * (gates * INPUT + gates * R + 2 * (gates * R + H * R) + gates * INPUT)
    expected = 2 * BATCH * (chains + every_row)
    assert both.get_total_flops() - forward.get_total_flops() == expected
