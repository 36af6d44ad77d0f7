"""The single-layer operator against the same layer in differentiable torch operations: drawn calls
with any mixture of features, outputs and all gradients."""

import random

import pytest
import torch
from torch.utils import _pytree as pytree

from rnn_ext import functional as F
from rnn_ext.layer import _TENSORS, LayerNorm, _Call, _step_by_step, composite, layer

CELLS = {
    "rnn_tanh": (F.RNN_TANH, 1),
    "rnn_relu": (F.RNN_RELU, 1),
    "lstm": (F.LSTM, 4),
    "gru": (F.GRU, 3),
}
# float64 throughout; sums of up to some thousand terms of order one.
TOLERANCE = dict(rtol=1e-9, atol=1e-10)


def draw_call(seed, cell, **forced):
    """Arguments of layer() for drawn sizes and features."""
    r, g = random.Random(f"{cell} {seed}"), torch.Generator().manual_seed(seed)
    kind, gates = CELLS[cell]
    lstm = cell == "lstm"

    def maybe(name, chance=0.5):
        return forced.get(name, r.random() < chance)

    steps, batch = r.choice([1, 2, 5, 17, 40]), r.choice([1, 2, 3, 9, 35])
    inputs, hidden = r.choice([1, 3, 8, 21]), r.choice([1, 4, 7, 16, 33])
    proj = r.choice([1, 3, 20]) if lstm and maybe("proj", 0.2) else 0
    proj = proj if proj < hidden else 0
    state = proj or hidden
    directions = 2 if maybe("bidirectional") else 1
    batch_first, bias = maybe("batch_first"), maybe("bias")

    def tensor(*sizes, grad=True):
        return (torch.rand(*sizes, generator=g, dtype=torch.float64) - 0.5).requires_grad_(grad)

    def rows(width, **kw):
        return tensor(*((batch, steps) if batch_first else (steps, batch)), width, **kw)

    params = []
    for _ in range(directions):
        params += [tensor(gates * hidden, inputs), tensor(gates * hidden, state)]
        params += [tensor(gates * hidden), tensor(gates * hidden)] if bias else []
        params += [tensor(proj, hidden)] if proj else []
    call = dict(cell=kind, bias=bias, bidirectional=directions == 2, batch_first=batch_first)
    if maybe("lengths"):
        call["lengths"] = torch.randint(0, steps + 1, (batch,), generator=g)
    given = maybe("states")
    if given:
        call["h_0"] = tensor(directions, batch, state)
        if lstm:
            call["c_0"] = tensor(directions, batch, hidden)
    if maybe("resets"):
        density = r.choice([0.02, 0.3])
        call["resets"] = torch.rand(rows(1, grad=False).shape[:2], generator=g) < density
        if maybe("reset_state"):
            call["reset_h"] = tensor(directions, batch, state)
            if lstm:
                call["reset_c"] = tensor(directions, batch, hidden)
    if maybe("hidden_mask", 0.3):
        call["hidden_mask"] = (tensor(directions, batch, state, grad=False) > 0) * 2.0
        call["hidden_mask"] = call["hidden_mask"].double()
    if not proj and maybe("zoneout", 0.3):
        masks = r.random() < 0.5
        for name in ("zoneout_h", "zoneout_c") if lstm else ("zoneout_h",):
            if masks:
                call[name] = (rows(directions * hidden, grad=False) > 0.2).double()
            else:
                call[name] = torch.full((1, 1, directions * hidden), 0.3, dtype=torch.float64)
                call[name] = call[name].expand((*rows(1, grad=False).shape[:2], -1))
    if not proj and maybe("norm", 0.3):
        gains = [tensor(directions, gates * hidden) for _ in range(2)]
        gains += [tensor(directions, hidden) for _ in range(2)] if lstm else [None, None]
        call["norm"] = LayerNorm(*gains, eps=0.01)
    if cell == "gru" and "norm" not in call and maybe("reset_before", 0.4):
        call["reset_after"] = False
    if maybe("detach", 0.3):
        call["detach_steps"] = r.choice([1, 2, 7, 50])
    if maybe("checkpoint", 0.3):
        call["checkpoint_steps"] = r.choice([1, 3, 8, 100])
    if lstm and maybe("cells"):
        call["return_cells"] = True
    return rows(inputs), params, call


def as_call(input, params, call):
    values = {**_Call._field_defaults, **call, "has_biases": call["bias"]}
    values["reset_before"] = not call.get("reset_after", True)
    if "norm" in call:
        names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias", "norm_eps")
        values.update(zip(names, call["norm"], strict=True))
    fields = {name: values.get(name) for name in _Call._fields}
    return _Call(**{**fields, "input": input, "params": params})


def leaves_of(input, params, call):
    states = [call.get(n) for n in ("h_0", "c_0", "reset_h", "reset_c")]
    gains = call.get("norm", ())[:4]
    return [t for t in (input, *states, *gains, *params) if t is not None]


def run_both(input, params, call):
    """(results, gradients) of the operator and of the composite form, with the same loss."""
    leaves = leaves_of(input, params, call)
    found = []
    for results in (layer(input, params, **call), composite(as_call(input, params, call))):
        kept = [t for t in results[: 4 if call.get("return_cells") else 3] if t is not None]
        kept = [t for t in kept if t.numel()]
        factors = torch.Generator().manual_seed(5)
        loss = sum((t * torch.rand(t.shape, generator=factors, dtype=t.dtype)).sum() for t in kept)
        grads = [torch.zeros_like(t) for t in leaves]
        if loss.requires_grad:
            raw = torch.autograd.grad(loss, leaves, allow_unused=True)
            grads = [z if g is None else g for g, z in zip(raw, grads, strict=True)]
        found.append((kept, grads))
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("seed", range(60))
def test_equals_the_same_layer_in_torch_operations(seed, cell):
    (ours, our_grads), (theirs, their_grads) = run_both(*draw_call(seed, cell))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_checkpoints_do_not_change_a_bit(seed, dtype, cell):
    def cast(t):
        float_leaf = isinstance(t, torch.Tensor) and t.is_floating_point()
        return t.detach().to(dtype).requires_grad_(t.requires_grad) if float_leaf else t

    input, params, call = draw_call(seed, cell, checkpoint=False)
    input, params = cast(input), [cast(p) for p in params]
    call = {
        name: LayerNorm(*map(cast, value)) if name == "norm" else cast(value)
        for name, value in call.items()
    }
    leaves = leaves_of(input, params, call)
    results = []
    for steps in (0, 1, 3, 11):
        found = layer(input, params, **call, checkpoint_steps=steps)
        loss = sum(t.square().sum() for t in found if t.numel())
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([*found, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_checkpoints_really_cut_the_sequence():
    """A long narrow sequence has several of the plan's chunks: the reserve is then much smaller."""
    input = torch.randn(600, 16, 64, requires_grad=True)
    params = [torch.randn(256, 64) * 0.1, torch.randn(256, 64) * 0.1]
    call = as_call(input, params, dict(cell=F.LSTM, bias=False))
    call = call._replace(bidirectional=False, batch_first=False)
    operator = torch.ops.rnn_ext.recurrent_layer
    plain = operator(*call, False, True)
    cut = operator(*call._replace(checkpoint_steps=100), False, True)
    assert cut[4].numel() == 6 * 16 * (64 + 64)
    assert plain[4].numel() == 600 * 16 * 5 * 64
    assert torch.equal(plain[0], cut[0])


@pytest.mark.parametrize("cell", CELLS)
def test_operators_pass_opcheck(cell):
    for seed in range(6):
        input, params, call = draw_call(seed, cell, lengths=False)
        arguments = as_call(input, params, call)
        torch.library.opcheck(
            torch.ops.rnn_ext.recurrent_layer.default,
            (*arguments, bool(call.get("return_cells")), True),
        )


@pytest.mark.parametrize("cell", CELLS)
def test_the_backward_operator_passes_opcheck(cell):
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor",
                 "test_aot_dispatch_static")  # fmt: skip
    for seed in range(6):
        input, params, call = draw_call(seed, cell, lengths=False)
        arguments = pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, as_call(input, params, call)
        )
        cells = bool(call.get("return_cells"))
        results = torch.ops.rnn_ext.recurrent_layer(*arguments, cells, True)
        grads = [t if t.numel() else None for t in results[:4]]
        mask = [t is not None for t in arguments.differentiable()]
        found = torch.library.opcheck(
            torch.ops.rnn_ext.recurrent_layer_backward.default,
            (*grads, *arguments[:_TENSORS], results[0], results[4], *arguments[_TENSORS:], mask),
            test_utils=utilities,
        )
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell):
    forced = dict(
        lengths=True, resets=True, reset_state=True, zoneout=True, states=True, cells=True
    )
    input, params, call = draw_call(11, cell, **forced, proj=False, detach=False)
    torch.manual_seed(0)
    steps, batch = (input.size(1), input.size(0)) if call["batch_first"] else input.shape[:2]
    assert steps * batch >= 2
    leaves = leaves_of(input, params, call)
    grads = []
    for results in (layer(input, params, **call), composite(as_call(input, params, call))):
        loss = sum(t.square().sum() for t in results if t is not None and t.numel())
        found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        again = sum(t.square().sum() for t in found if t is not None)
        grads.append(torch.autograd.grad(again, leaves, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_devices_without_a_kernel_compute_step_by_step(cell):
    """What `layer` does with a tensor on such a device, here with one on the CPU."""
    for seed in range(5):
        input, params, call = draw_call(seed, cell)
        found = _step_by_step(as_call(input, params, call))
        expected = layer(input, params, **call)
        for a, b in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_the_output_may_be_changed_in_place(cell):
    input, params, call = draw_call(3, cell, states=True)
    leaves = leaves_of(input, params, call)
    grads = []
    for in_place in (False, True):
        output = layer(input, params, **call)[0]
        changed = output.mul_(3) if in_place else output * 3
        grads.append(torch.autograd.grad(changed.square().sum(), leaves, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_the_operator_and_the_eager_call_have_the_same_gradients(cell):
    for seed in range(10):
        input, params, call = draw_call(seed, cell)
        leaves = leaves_of(input, params, call)
        arguments = as_call(input, params, call)
        cells = bool(call.get("return_cells"))
        grads = []
        for results in (
            layer(input, params, **call),
            torch.ops.rnn_ext.recurrent_layer(*arguments, cells, True)[:4],
        ):
            loss = sum(t.square().sum() for t in results)
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_a_normalized_layer_has_both_gains():
    input, params = torch.randn(2, 3, 4), [torch.randn(20, 4), torch.randn(20, 5)]
    for missing in ("norm_ih", "norm_hh"):
        call = as_call(input, params, dict(cell=F.LSTM, bias=False, norm=LayerNorm(
            torch.ones(1, 20), torch.ones(1, 20), torch.ones(1, 5), torch.zeros(1, 5)
        )))  # fmt: skip
        call = call._replace(bidirectional=False, batch_first=False, **{missing: None})
        with pytest.raises(RuntimeError, match="needs norm_ih and norm_hh"):
            torch.ops.rnn_ext.recurrent_layer(*call, False, False)


@pytest.mark.parametrize("cell", CELLS)
def test_transforms_of_torch_func(cell):
    """They see the layer in torch operations: gradients, and those of every example."""
    input, params, call = draw_call(4, cell, states=False, resets=False, lengths=False, norm=False)
    for name in ("zoneout_h", "zoneout_c", "hidden_mask"):
        call.pop(name, None)

    def loss(input, params):
        return layer(input, params, **call)[0].square().sum()

    expected = torch.autograd.grad(loss(input, params), params)
    found = torch.func.grad(loss, argnums=1)(input.detach(), [p.detach() for p in params])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    twice = torch.stack([input.detach()] * 2)
    own = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))
    for a, b in zip(own(twice, [p.detach() for p in params]), expected, strict=True):
        torch.testing.assert_close(a[1], b, **TOLERANCE)
