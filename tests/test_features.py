"""What the modules do beyond torch.nn's: NumPy's results, derivatives, forms of input."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rnn_ext
from feature_cases import (
    BATCH,
    CELLS,
    HIDDEN,
    INPUT,
    STEPS,
    TOLERANCE,
    arguments,
    as_state,
    assert_same,
    build,
    draw,
    draw_resets,
    draw_state,
    each_cell,
    each_form,
    each_layout,
    each_way,
    gradients,
    jagged,
    leaves,
    numpy_arguments,
    numpy_cell,
    numpy_params,
    parts,
    plain,
    select,
    to_numpy,
)
from helpers import flatten
from references import features as reference
from references.stack import join_flat_weights


# ------------------------------------------------------------------------- against NumPy
@each_cell
@each_form
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["one", "two_ways", "stack", "no_bias"],
)
def test_states_equal_numpy(cell: str, form: str, options: dict[str, Any]) -> None:
    module = build(cell, **options)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    given = arguments(module, form)
    output, state, states = module(x, hx, return_all_states=True, **given)
    every, final = reference.stack(
        numpy_cell(cell), x.numpy(), to_numpy(hx), numpy_params(module),
        directions=2 if module.bidirectional else 1, **numpy_arguments(given),
    )  # fmt: skip
    assert_same(output, torch.from_numpy(every[-1][0]))
    assert_same(state, as_state(tuple(map(torch.from_numpy, final))))
    assert states.h[-1] is output
    assert (states.c is None) == (module.mode != "LSTM")
    for k, of_layer in enumerate(every):
        assert_same(states.h[k], torch.from_numpy(of_layer[0]))
        if states.c is not None:
            assert_same(states.c[k], torch.from_numpy(of_layer[1]))


@each_cell
@each_form
@each_way
@pytest.mark.parametrize("bptt_steps", [None, 1, 2, 3, STEPS], ids="k{}".format)
def test_gradients_equal_numpy(
    cell: str, form: str, bidirectional: bool, bptt_steps: int | None
) -> None:
    module = build(cell, bidirectional=bidirectional, bptt_steps=bptt_steps)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    given = arguments(module, form)
    wanted = leaves(module, x, *parts(hx), *parts(given.get("reset_state", ())))
    output, state = module(x, hx, **given)
    doutput, dstate = torch.randn_like(output), tuple(map(torch.randn_like, parts(state)))
    actual = torch.autograd.grad(
        [output, *parts(state)], wanted, [doutput, *dstate],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    dx, dinitial, dreset, dparams = reference.gradients(
        numpy_cell(cell), x.detach().numpy(), to_numpy(hx), numpy_params(module),
        doutput.numpy(), to_numpy(dstate), detach_steps=bptt_steps or 0, **numpy_arguments(given),
    )  # fmt: skip
    expected = [dx, *dinitial, *(dreset if "reset_state" in given else ())]
    expected += join_flat_weights(dparams)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, torch.from_numpy(other), **TOLERANCE)


# ------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
@each_layout
def test_gradcheck_of_everything_at_once(cell: str, batch_first: bool) -> None:
    """Into all states, the lower layer's c_t and h_t among them, with all masks drawn."""
    module = build(
        cell, num_layers=2, bidirectional=True, batch_first=batch_first, input_dropout=0.3,
        hidden_dropout=0.3, weight_dropout=0.3, dropout=0.3,
    )  # fmt: skip
    if cell != "lstm_proj":
        module.zoneout = 0.3
    x, hx, reset_state = draw(4, 3, INPUT), draw_state(module, 3), draw_state(module, 1)
    resets = torch.rand(4, 3) < 0.4
    if batch_first:
        x, resets = x.transpose(0, 1).contiguous(), resets.T.contiguous()
    wanted = leaves(module, x, *parts(hx), *parts(reset_state))
    names = [name for name, _ in module.named_parameters()]
    count = len(parts(hx))

    def call(x: Tensor, *rest: Tensor) -> list[Tensor]:
        torch.manual_seed(5)
        states, weights = rest[: 2 * count], dict(zip(names, rest[2 * count :], strict=True))
        keywords = {
            "lengths": [4, 2, 3], "resets": resets, "reset_state": as_state(states[count:]),
            "return_all_states": True,
        }  # fmt: skip
        output, state, all_states = torch.func.functional_call(
            module, weights, (x, as_state(states[:count])), keywords
        )
        return [output, *parts(state), all_states.h[0], *(all_states.c or ())]

    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_second_derivatives(cell: str) -> None:
    module = build(cell, bidirectional=True, hidden_dropout=0.3, zoneout=0.3)
    x, hx, resets = draw(3, 2, INPUT), draw_state(module, 2), torch.rand(3, 2) < 0.5
    wanted = leaves(module, x, *parts(hx))[: 1 + len(parts(hx))]

    def call(x: Tensor, *hx: Tensor) -> list[Tensor]:
        torch.manual_seed(5)
        output, state = module(x, as_state(hx), lengths=[3, 2], resets=resets)
        return [output, *parts(state)]

    assert torch.autograd.gradgradcheck(call, wanted, fast_mode=True)


# ------------------------------------------------------------------------- all states


@each_cell
def test_all_states_are_those_of_shorter_sequences(cell: str) -> None:
    module = build(cell, num_layers=3)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    output, state, states = module(x, hx, return_all_states=True)
    assert_same((output, state), plain(module)(x, hx))
    assert isinstance(states, rnn_ext.AllStates)
    for t in range(STEPS):
        _, end = plain(module)(x[: t + 1], hx)
        assert_same(torch.stack([h[t] for h in states.h]), parts(end)[0])
        if module.mode == "LSTM":
            assert_same(torch.stack([c[t] for c in states.c]), parts(end)[1])


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj"])
@each_way
def test_gradient_into_a_cell_state_of_the_lower_layer(cell: str, bidirectional: bool) -> None:
    """c_t of layer 0 alone: the layer above has no part in it."""
    module = build(cell, num_layers=2, bidirectional=bidirectional)
    x = draw(STEPS, BATCH, INPUT)
    wanted = leaves(module, x)
    _, _, states = module(x, return_all_states=True)
    weights = torch.randn_like(states.c[0][2])
    actual = torch.autograd.grad(
        states.c[0][2], wanted, weights, allow_unused=True, materialize_grads=True
    )
    twin = plain(module)
    _, (_, c_forward) = twin(x[:3])
    expected = [c_forward[0]]
    if bidirectional:
        _, (_, c_reverse) = twin(x[2:])
        expected.append(c_reverse[1])
    expected = torch.autograd.grad(
        torch.cat(expected, dim=-1), [x, *twin.parameters()], weights,
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    assert_same(tuple(actual), tuple(expected))
    assert not actual[0][3:].any() or bidirectional


def test_all_states_are_before_dropout() -> None:
    module, x = build("lstm", num_layers=2, dropout=0.5), draw(STEPS, BATCH, INPUT)
    _, _, states = module(x, return_all_states=True)
    assert (states.h[0] != 0).all()


# ------------------------------------------------------------------------- forms of input


@each_cell
@each_way
@pytest.mark.parametrize("form", ["resets", "lengths_and_resets", "reset_state"])
def test_batch_first(cell: str, bidirectional: bool, form: str) -> None:
    module = build(cell, bidirectional=bidirectional, num_layers=2)
    x, hx, given = draw(STEPS, BATCH, INPUT), draw_state(module), arguments(module, form)
    output, state, states = module(x, hx, return_all_states=True, **given)
    module.batch_first = True
    given["resets"] = given["resets"].T
    other = module(x.transpose(0, 1), hx, return_all_states=True, **given)
    assert_same(other[0].transpose(0, 1), output)
    assert_same(other[1], state)
    for mine, theirs in zip(flatten(tuple(states[:1])), flatten(tuple(other[2][:1])), strict=True):
        assert_same(theirs.transpose(0, 1), mine)


@each_cell
@each_layout
def test_unbatched(cell: str, batch_first: bool) -> None:
    module = build(cell, bidirectional=True, num_layers=2, batch_first=batch_first)
    x, hx, resets = draw(STEPS, INPUT), draw_state(module, 1), draw_resets()[:, 0]
    reset_state = draw_state(module, 1)
    output, state, states = module(
        x, select(hx, 0), resets=resets, reset_state=select(reset_state, 0), return_all_states=True
    )
    dim = 0 if batch_first else 1
    batched = module(
        x.unsqueeze(dim), hx, resets=resets.unsqueeze(dim), reset_state=reset_state,
        return_all_states=True,
    )  # fmt: skip
    assert_same(output, batched[0].squeeze(dim))
    assert_same(state, select(batched[1], 0))
    assert [h.shape for h in states.h] == [output.shape] * 2
    assert_same(states.h[0], batched[2].h[0].squeeze(dim))
    assert (states.c is None) == (module.mode != "LSTM")


@each_cell
@each_layout
@pytest.mark.parametrize("lengths", [(7, 5, 3, 1), (3, 7, 1, 5)], ids=["sorted", "unsorted"])
def test_packed_sequence_with_everything(
    cell: str, batch_first: bool, lengths: tuple[int, ...]
) -> None:
    """Resets are in the caller's order of rows, as the states are."""
    module = build(cell, bidirectional=True, num_layers=2, batch_first=batch_first)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    given = {"resets": draw_resets(), "reset_state": draw_state(module)}
    if batch_first:
        x, given["resets"] = x.transpose(0, 1).contiguous(), given["resets"].T
    x.requires_grad_()
    is_sorted = list(lengths) == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted=is_sorted)
    output, state, states = module(packed, hx, return_all_states=True, **given)
    expected = module(x, hx, lengths=lengths, return_all_states=True, **given)
    assert type(output) is PackedSequence
    assert output.batch_sizes is packed.batch_sizes
    assert output.sorted_indices is packed.sorted_indices
    assert_same(pad_packed_sequence(output, batch_first)[0], expected[0])
    assert_same(state, expected[1])
    for actual, padded in zip(states.h, expected[2].h, strict=True):
        assert_same(pad_packed_sequence(actual, batch_first)[0], padded)
    if states.c is not None:
        assert_same(pad_packed_sequence(states.c[0], batch_first)[0], expected[2].c[0])
    wanted = [x, *module.parameters()]
    unpacked = pad_packed_sequence(output, batch_first)[0]
    assert_same(gradients(unpacked, wanted), gradients(expected[0], wanted))


@each_cell
@each_layout
def test_jagged_nested_tensor(cell: str, batch_first: bool) -> None:
    module = build(cell, bidirectional=True, num_layers=2, batch_first=batch_first)
    sequences = [draw(n, INPUT) for n in (3, 7, 1, 5)]
    nested, hx = jagged(sequences), draw_state(module)
    output, state = module(nested, hx)
    assert output.is_nested
    assert output.layout == torch.jagged
    assert output.shape[:2] == nested.shape[:2]  # the same ragged dimension
    packed = pack_sequence([s.detach().requires_grad_() for s in sequences], enforce_sorted=False)
    theirs, end = plain(module)(packed, hx)
    padded, lengths = pad_packed_sequence(theirs, batch_first=True)
    for row, (mine, length) in enumerate(zip(output.unbind(), lengths, strict=True)):
        assert_same(mine, padded[row, :length])
    assert_same(state, end)
    own = [nested, *module.parameters()]
    mine = torch.autograd.grad(output.values().square().sum(), own)
    x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=batch_first).requires_grad_()
    other, _ = module(x, hx, lengths=lengths)
    expected = torch.autograd.grad(other.square().sum(), [x, *module.parameters()])
    dx = expected[0] if batch_first else expected[0].transpose(0, 1)
    for row, (of_row, length) in enumerate(zip(mine[0].unbind(), lengths, strict=True)):
        assert_same(of_row, dx[row, :length])
    assert_same(tuple(mine[1:]), tuple(expected[1:]))


def test_jagged_with_holes_and_empty_rows() -> None:
    module = build("lstm", bidirectional=True)
    values = draw(10, INPUT)
    offsets, lengths = torch.tensor([0, 4, 7, 10]), torch.tensor([2, 0, 3])
    nested = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
    output, state, states = module(nested, return_all_states=True)
    rows = [values[:2], values[4:4], values[7:]]
    for mine, row in zip(output.unbind(), rows, strict=True):
        assert len(mine) == len(row)
        if len(row):
            assert_same(mine, plain(module)(row)[0])
    assert (state[0][:, 1] == 0).all()
    assert states.c[0].is_nested
    with_none, _ = module(jagged([draw(0, INPUT), draw(0, INPUT)]))
    assert with_none.values().shape == (0, 2 * HIDDEN)


def test_jagged_with_a_mask_and_resets() -> None:
    module = build("gru")
    sequences = [draw(n, INPUT) for n in (3, 5)]
    resets = torch.rand(2, 5) < 0.5
    output, _ = module(jagged(sequences), resets=resets)
    padded = torch.nn.utils.rnn.pad_sequence(sequences)
    expected, _ = module(padded, lengths=[3, 5], resets=resets.T)
    for row, mine in enumerate(output.unbind()):
        assert_same(mine, expected[: len(mine), row])


@each_cell
@each_form
def test_one_step(cell: str, form: str) -> None:
    module = build(cell, bidirectional=True)
    x, hx, given = draw(STEPS, BATCH, INPUT), draw_state(module), arguments(module, form)
    if "lengths" in given:
        given["lengths"] = given["lengths"].clamp(max=1)
    if "resets" in given:
        given["resets"] = given["resets"][:1]
    output, state = module(x[:1], hx, **given)
    every, final = reference.stack(
        numpy_cell(cell), x[:1].numpy(), to_numpy(hx), numpy_params(module), directions=2,
        **numpy_arguments(given),
    )  # fmt: skip
    assert_same(output, torch.from_numpy(every[-1][0]))
    assert_same(state, as_state(tuple(map(torch.from_numpy, final))))


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes(cell: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of torch.nn on each row alone, in the same dtype."""
    config = CELLS[cell]
    torch.manual_seed(1)
    options = {**config.options(), "dtype": dtype, "input_size": 32, "hidden_size": 48}
    options |= {"bidirectional": True}
    module = getattr(rnn_ext, config.class_name)(**options)
    twin = getattr(nn, config.class_name)(**options)
    twin.load_state_dict(module.state_dict())
    exact_module = copy.deepcopy(twin).double()
    lengths = [9, 4, 0, 7, 12, 1]
    x = torch.randn(12, len(lengths), 32).to(dtype)
    resets = torch.rand(12, len(lengths)) < 0.2
    x_leaf = x.clone().requires_grad_()
    output, _ = module(x_leaf, lengths=lengths, resets=resets)
    (dx,) = torch.autograd.grad(output.float().sum(), x_leaf)

    def by_episodes(reference: nn.RNNBase, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        output = x.new_zeros(*x.shape[:2], module(x[:1].to(dtype))[0].size(-1))
        rows = []
        for row, length in enumerate(lengths):
            begins = [t for t in range(length) if t == 0 or resets[t, row]]
            pieces = [
                reference(x[begin:end, row])[0]
                for begin, end in itertools.pairwise([*begins, length])
            ]
            rows.append(torch.cat([*pieces, output[length:, row]]))
        output = torch.stack(rows, dim=1)
        return output.detach(), torch.autograd.grad(output.to(torch.float64).sum(), x)[0]

    exact, theirs = by_episodes(exact_module, x.double()), by_episodes(twin, x)
    for mine, other, truth in zip((output, dx), theirs, exact, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - truth).abs().max()
        assert error <= 2 * (other.double() - truth).abs().max()
