"""What the modules do beyond torch.nn's: lengths, resets, all states, truncation, masks."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rnn_ext
from helpers import Config, flatten, threads
from references import features as reference
from references import philox
from references.stack import join_flat_weights, split_flat_weights
from rnn_ext import features

STEPS, BATCH, INPUT, HIDDEN = 7, 4, 3, 5
# Rounding of sums of some hundred terms in float64, for values of order 1.
TOLERANCE = {"rtol": 0, "atol": 1e-10}

CELLS = {
    "rnn_tanh": Config("rnn_tanh", INPUT, HIDDEN, dtype=torch.float64),
    "rnn_relu": Config("rnn_relu", INPUT, HIDDEN, dtype=torch.float64),
    "lstm": Config("lstm", INPUT, HIDDEN, dtype=torch.float64),
    "lstm_proj": Config("lstm", INPUT, HIDDEN, proj_size=2, dtype=torch.float64),
    "gru": Config("gru", INPUT, HIDDEN, dtype=torch.float64),
}
each_cell = pytest.mark.parametrize("cell", CELLS)
each_way = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
each_layout = pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])


def build(cell: str, library: Any = rnn_ext, **options: Any) -> Any:
    """A module in float64, the same weights for the same options."""
    config = CELLS[cell]
    torch.manual_seed(11)
    return getattr(library, config.class_name)(**{**config.options(), **options})


def plain(module: nn.RNNBase) -> nn.RNNBase:
    """The module of torch.nn with the same weights."""
    cell = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}.get(module.mode, module.mode.lower())
    cell += "_proj" if module.proj_size else ""
    twin = build(
        cell, nn, num_layers=module.num_layers, bias=module.bias, batch_first=module.batch_first,
        bidirectional=module.bidirectional, dropout=module.dropout,
    )  # fmt: skip
    twin.load_state_dict(module.state_dict())
    return twin


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def draw_state(module: nn.RNNBase, batch: int = BATCH) -> Any:
    slots = module.num_layers * (2 if module.bidirectional else 1)
    h = draw(slots, batch, module.proj_size or module.hidden_size)
    return (h, draw(slots, batch, module.hidden_size)) if module.mode == "LSTM" else h


def parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def as_state(tensors: tuple[Tensor, ...]) -> Any:
    return tensors if len(tensors) == 2 else tensors[0]


def select(state: Any, rows: Any) -> Any:
    return as_state(tuple(part[:, rows] for part in parts(state)))


def assert_same(actual: Any, expected: Any) -> None:
    for one, other in zip(flatten(actual), flatten(expected), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def gradients(results: Any, wanted: list[Tensor], seed: int = 3) -> tuple[Tensor, ...]:
    """Of the results weighted by fixed random numbers."""
    results = flatten(results)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    return torch.autograd.grad(results, wanted, weights, allow_unused=True, materialize_grads=True)


def leaves(module: nn.Module, *tensors: Any) -> list[Tensor]:
    for tensor in tensors:
        tensor.requires_grad_()
    return [*tensors, *module.parameters()]


LENGTHS = torch.tensor([3, STEPS, 0, 5])


def draw_resets() -> Tensor:
    """Episodes of several lengths, one of one step, one row without, one beginning at step 0."""
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[[0, 2, 3], 0] = True
    resets[5, 1] = True
    resets[[1, 2, 6], 3] = True
    return resets


def to_numpy(values: Any) -> Any:
    return tuple(part.detach().numpy() for part in parts(values))


def numpy_params(module: nn.RNNBase) -> list[Any]:
    name = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}.get(module.mode, module.mode.lower())
    flat = [weight.detach().numpy() for weight in module._flat_weights]
    return split_flat_weights(name, flat, bias=module.bias, projected=module.proj_size > 0)


def numpy_cell(cell: str) -> str:
    return cell.removesuffix("_proj")


# ------------------------------------------------------------------------- against NumPy

FORMS = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"resets": True},
    "reset_state": {"resets": True, "reset_state": True},
    "lengths_and_resets": {"lengths": LENGTHS, "resets": True, "reset_state": True},
    "all_lengths_zero": {"lengths": torch.zeros(BATCH, dtype=torch.int64)},
}
each_form = pytest.mark.parametrize("form", FORMS)


def arguments(module: nn.RNNBase, form: str) -> dict[str, Any]:
    given = dict(FORMS[form])
    if "resets" in given:
        given["resets"] = draw_resets()
    if "reset_state" in given:
        given["reset_state"] = draw_state(module)
    return given


def numpy_arguments(given: dict[str, Any]) -> dict[str, Any]:
    made = {}
    if "lengths" in given:
        made["lengths"] = given["lengths"].tolist()
    if "resets" in given:
        made["resets"] = given["resets"].numpy()
    if "reset_state" in given:
        made["reset_state"] = to_numpy(given["reset_state"])
    return made


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


# ------------------------------------------------------------------------- lengths


@each_cell
@each_way
@each_layout
def test_lengths_equal_a_packed_sequence(cell: str, bidirectional: bool, batch_first: bool) -> None:
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": batch_first}
    module = build(cell, **options)
    twin = plain(module)
    lengths = torch.tensor([3, STEPS, 1, 5])
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    x = x.transpose(0, 1).contiguous() if batch_first else x
    ours = module(x, hx, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    output, state = twin(packed, hx)
    theirs = pad_packed_sequence(output, batch_first)[0], state
    assert_same(ours, theirs)
    assert_same(
        gradients(ours, leaves(module, x, *parts(hx))),
        gradients(theirs, leaves(twin, x, *parts(hx))),
    )


@each_cell
@each_way
def test_lengths_equal_each_row_alone(cell: str, bidirectional: bool) -> None:
    module = build(cell, num_layers=2, bidirectional=bidirectional)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    output, state = module(x, hx, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        assert (output[length:, row] == 0).all()
        if length == 0:
            assert_same(select(state, row), select(hx, row))
            continue
        alone, end = plain(module)(x[:length, row], select(hx, row))
        assert_same(output[:length, row], alone)
        assert_same(select(state, row), end)


@each_cell
@each_layout
@pytest.mark.parametrize("lengths", [LENGTHS, torch.zeros(BATCH, dtype=torch.int64)])
def test_padding_is_not_seen(cell: str, batch_first: bool, lengths: Tensor) -> None:
    """NaN in the padding reaches no result, and no gradient comes back to it."""
    module = build(cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    padding = torch.arange(STEPS)[:, None] >= lengths
    original = draw(STEPS, BATCH, INPUT)

    def run(fill: float) -> list[Tensor]:
        x = original.clone()
        x[padding] = fill
        x = (x.transpose(0, 1) if batch_first else x).contiguous()
        wanted = leaves(module, x)
        results = module(x, lengths=lengths)
        return [*flatten(results), *gradients(results, wanted)]

    zeros, filled = run(0.0), run(torch.nan)
    for one, other in zip(zeros, filled, strict=True):
        assert torch.equal(one, other)
    dx = filled[len(zeros) - 1 - len(list(module.parameters()))]
    dx = dx.transpose(0, 1) if batch_first else dx
    assert (dx[padding] == 0).all()
    assert (dx[~padding] != 0).any(-1).all()


@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS.tolist(),
        tuple(LENGTHS.tolist()),
        LENGTHS.int(),
        LENGTHS.to(torch.uint8),
        LENGTHS.numpy(),
        torch.stack([LENGTHS, LENGTHS])[0],
        torch.stack([LENGTHS, LENGTHS], dim=1)[:, 0],
    ],
    ids=["list", "tuple", "int32", "uint8", "numpy", "row", "strided"],
)
def test_forms_of_lengths(lengths: Any) -> None:
    module, x = build("lstm"), draw(STEPS, BATCH, INPUT)
    assert_same(module(x, lengths=lengths), module(x, lengths=LENGTHS))


@each_cell
def test_full_lengths_are_no_lengths(cell: str) -> None:
    module, x = build(cell, bidirectional=True), draw(STEPS, BATCH, INPUT)
    assert_same(module(x, lengths=[STEPS] * BATCH), module(x))


# ------------------------------------------------------------------------- resets


@each_cell
@each_way
@pytest.mark.parametrize("learned", [False, True], ids=["to_h_0", "to_a_learned_state"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
def test_resets_equal_episodes_one_by_one(
    cell: str, bidirectional: bool, learned: bool, lengths: Tensor | None
) -> None:
    """With torch.nn's module for every episode of every row, layer by layer as they are stacked."""
    module = build(cell, bidirectional=bidirectional)
    x, hx, resets = draw(STEPS, BATCH, INPUT), draw_state(module), draw_resets()
    reset_state = draw_state(module, 1) if learned else None
    tensors = [x, *parts(hx), *(parts(reset_state) if learned else ())]
    wanted = leaves(module, *tensors)
    ours = module(x, hx, resets=resets, reset_state=reset_state, lengths=lengths)

    twin = plain(module)
    rows, ends = [], []
    for row in range(BATCH):
        first = select(hx, slice(row, row + 1))
        later = reset_state if learned else first
        length = STEPS if lengths is None else int(lengths[row])
        begins = [t for t in range(length) if t == 0 or resets[t, row]]
        outputs, states = [x.new_zeros(0, ours[0].size(-1))], []
        for begin, end in itertools.pairwise([*begins, length]):
            # Direction 0 comes from h_0 in the first episode, direction 1 in the last.
            from_first = (begin == 0 and not resets[0, row], end == length)
            initial = as_state(
                tuple(
                    torch.cat([(f if from_first[d] else s)[d : d + 1] for d in range(f.size(0))])
                    for f, s in zip(parts(first), parts(later), strict=True)
                )
            )
            output, state = twin(x[begin:end, row : row + 1], initial)
            outputs.append(output[:, 0])
            states.append(parts(state))
        outputs.append(x.new_zeros(STEPS - length, ours[0].size(-1)))
        rows.append(torch.cat(outputs))
        # Direction 0 ends with the last episode, direction 1 with the first.
        ends.append(
            [torch.cat([states[-1][k][:1], states[0][k][1:]]) for k in range(len(parts(hx)))]
            if states
            else list(parts(first))
        )
    theirs = (
        torch.stack(rows, dim=1),
        as_state(tuple(torch.cat([end[k] for end in ends], dim=1) for k in range(len(parts(hx))))),
    )
    assert_same(ours, theirs)
    own = [*tensors, *twin.parameters()]
    assert_same(gradients(ours, wanted), gradients(theirs, own))


@each_cell
def test_resets_are_a_python_loop_over_steps(cell: str) -> None:
    """What reinforcement learning does today, through two layers."""
    module = build(cell, num_layers=2)
    x, hx, resets = draw(STEPS, BATCH, INPUT), draw_state(module), draw_resets()
    reset_state = draw_state(module, 1)
    wanted = leaves(module, x, *parts(hx), *parts(reset_state))
    ours = module(x, hx, resets=resets, reset_state=reset_state)
    twin = plain(module)
    outputs, state = [], parts(hx)
    for t in range(STEPS):
        state = tuple(
            torch.where(resets[t][:, None], again, part)
            for part, again in zip(state, parts(reset_state), strict=True)
        )
        output, new = twin(x[t : t + 1], as_state(state))
        outputs.append(output)
        state = parts(new)
    theirs = torch.cat(outputs), as_state(state)
    assert_same(ours, theirs)
    own = [x, *parts(hx), *parts(reset_state), *twin.parameters()]
    assert_same(gradients(ours, wanted), gradients(theirs, own))


@each_cell
@each_way
def test_reset_at_every_step_forgets_everything(cell: str, bidirectional: bool) -> None:
    module, x = build(cell, bidirectional=bidirectional), draw(STEPS, BATCH, INPUT)
    resets = torch.ones(STEPS, BATCH, dtype=torch.bool)
    hx = draw_state(module, 1)
    expand = as_state(tuple(p.expand(-1, STEPS * BATCH, -1).contiguous() for p in parts(hx)))
    alone, _ = plain(module)(x.reshape(1, STEPS * BATCH, INPUT), expand)
    output, _ = module(x, select(hx, [0] * BATCH), resets=resets)
    assert_same(output, alone.view(STEPS, BATCH, -1))


def test_no_reset_is_the_plain_call() -> None:
    module, x = build("gru", bidirectional=True), draw(STEPS, BATCH, INPUT)
    never = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    assert_same(module(x, resets=never), plain(module)(x))


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


# ------------------------------------------------------------------------- truncated BPTT


@each_cell
@pytest.mark.parametrize("k", [1, 2, 3, STEPS, STEPS + 3])
def test_chunks_equal_a_loop_that_detaches(cell: str, k: int) -> None:
    module = build(cell, num_layers=2, bptt_steps=k)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    wanted = leaves(module, x, *parts(hx))
    ours = module(x, hx)
    twin = plain(module)
    outputs, state = [], hx
    for chunk in x.split(k):
        output, state = twin(chunk, as_state(parts(state)))
        outputs.append(output)
        end, state = state, as_state(tuple(part.detach() for part in parts(state)))
    theirs = torch.cat(outputs), end
    assert_same(ours, theirs)
    own = [x, *parts(hx), *twin.parameters()]
    assert_same(gradients(ours, wanted), gradients(theirs, own))


@each_cell
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("k", [1, 3, STEPS])
@each_layout
def test_windows_equal_a_loop_over_steps(
    cell: str, num_layers: int, k: int, batch_first: bool
) -> None:
    """For every t the last k steps again, from the states before them."""
    module = build(
        cell, num_layers=num_layers, bptt_steps=k, bptt_style="window", batch_first=batch_first
    )
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    wanted = leaves(module, x, *parts(hx))
    ours = module(x.transpose(0, 1) if batch_first else x, hx)
    output = ours[0].transpose(0, 1) if batch_first else ours[0]
    twin = plain(module)
    twin.batch_first = False
    outputs = []
    for t in range(STEPS):
        first = max(0, t - k + 1)
        state = hx
        if first > 0:
            _, state = twin(x[:first], hx)
            state = as_state(tuple(part.detach() for part in parts(state)))
        window, end = twin(x[first : t + 1], state)
        outputs.append(window[-1])
    theirs = torch.stack(outputs), end
    assert_same((output, ours[1]), theirs)
    own = [x, *parts(hx), *twin.parameters()]
    assert_same(gradients((output, ours[1]), wanted), gradients(theirs, own))


def test_window_of_an_unbatched_sequence() -> None:
    module = build("gru", bptt_steps=2, bptt_style="window")
    x = draw(STEPS, INPUT)
    wanted = leaves(module, x)
    alone = gradients(module(x)[0], wanted)
    batched = gradients(module(x.unsqueeze(1))[0].squeeze(1), wanted)
    assert_same(alone, batched)


@pytest.mark.parametrize(
    ("options", "keywords", "what"),
    [
        ({}, {"lengths": LENGTHS}, "lengths"),
        ({}, {"resets": torch.zeros(STEPS, BATCH, dtype=torch.bool)}, "resets"),
        ({}, {"return_all_states": True}, "return_all_states"),
        ({"checkpoint_steps": 2}, {}, "checkpoint_steps"),
        ({"zoneout": 0.1}, {}, "zoneout"),
        ({"layer_norm": True}, {}, "layer_norm"),
        ({"input_dropout": 0.1}, {}, "input_dropout"),
        ({"hidden_dropout": 0.1}, {}, "hidden_dropout"),
        ({"weight_dropout": 0.1}, {}, "weight_dropout"),
    ],
    ids=str,
)
def test_what_a_window_does_not_go_together_with(options: dict, keywords: dict, what: str) -> None:
    module = build("lstm", bptt_steps=2, bptt_style="window", **options)
    x = draw(STEPS, BATCH, INPUT)
    with pytest.raises(ValueError, match=f"bptt_style='window' does not go together with {what}"):
        module(x, **keywords)
    with torch.no_grad():  # nothing is truncated there
        module(x, **keywords)


def test_truncation_takes_no_part_without_gradients() -> None:
    module, x = build("lstm", bptt_steps=2, checkpoint_steps=3), draw(STEPS, BATCH, INPUT)
    with torch.no_grad():
        assert not features.in_use(module)
        output, _ = module(x)
    assert_same(output, plain(module)(x)[0])


@each_cell
@each_way
@each_form
@pytest.mark.parametrize("k", [1, 3, STEPS])
def test_checkpoints_change_no_bit(cell: str, bidirectional: bool, form: str, k: int) -> None:
    module = build(cell, num_layers=2, bidirectional=bidirectional)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    given = arguments(module, form)
    wanted = leaves(module, x, *parts(hx), *parts(given.get("reset_state", ())))

    def run(checkpoint_steps: int | None) -> list[Tensor]:
        module.checkpoint_steps = checkpoint_steps
        results = module(x, hx, return_all_states=True, **given)[:2]
        return [*flatten(results), *gradients(results, wanted)]

    for one, other in zip(run(None), run(k), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------- masks


def masks_of_layers(module: nn.RNNBase, batch: int, params: list[Any]) -> Callable[..., Any]:
    """The masks that the next call of a module in training draws, for `reference.stack`."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    directions = 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    zoneout = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,) * 2

    def mask(size: tuple[int, ...], p: float) -> np.ndarray:
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, dtype=torch.int64)
        return philox.mask(int(seed), size, p)

    def dropped(size: tuple[int, ...], p: float) -> np.ndarray:
        return mask(size, 1 - p) / (1 - p)

    def of_layer(k: int, x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        for slot in range(k * directions, (k + 1) * directions):
            if module.weight_dropout:
                weight = params[slot].weight_hh
                masked = weight * dropped(weight.shape, module.weight_dropout)
                params[slot] = params[slot]._replace(weight_hh=masked)
        options: dict[str, Any] = {}
        if module.input_dropout:
            x = x * dropped((batch, x.shape[2]), module.input_dropout)
        if module.hidden_dropout:
            size = (directions, batch, width)
            options["hidden_mask"] = dropped(size, module.hidden_dropout)
        size = (len(x), batch, directions * module.hidden_size)
        options["zoneout"] = tuple(
            mask(size, p) if p else None
            for p in (zoneout if module.mode == "LSTM" else zoneout[:1])
        )
        return x, options

    return of_layer


REGULARIZERS = {
    "input_dropout": {"input_dropout": 0.4},
    "hidden_dropout": {"hidden_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.4},
    "zoneout": {"zoneout": 0.4},
    "all_drops": {"input_dropout": 0.2, "hidden_dropout": 0.3, "weight_dropout": 0.4},
    "all": {"input_dropout": 0.2, "hidden_dropout": 0.3, "weight_dropout": 0.4, "zoneout": 0.5},
    "zoneout_of_h": {"zoneout": (0.4, 0.0)},
    "zoneout_of_c": {"zoneout": (0.0, 0.4)},
}


def cases(names: Iterable[str]) -> list[tuple[str, str]]:
    """Zoneout of an LSTM with projections is not defined, that of c is for the LSTM only."""
    return [
        (cell, name)
        for cell, name in itertools.product(CELLS, names)
        if not (cell == "lstm_proj" and "zoneout" in REGULARIZERS[name])
        and (cell == "lstm" or name not in ("zoneout_of_h", "zoneout_of_c"))
    ]


@pytest.mark.parametrize(("cell", "name"), cases(REGULARIZERS))
@each_way
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
def test_masks_equal_numpy(
    cell: str, name: str, bidirectional: bool, lengths: Tensor | None
) -> None:
    module = build(cell, num_layers=2, bidirectional=bidirectional, **REGULARIZERS[name])
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    params = numpy_params(module)
    of_layer = masks_of_layers(module, BATCH, params)
    output, state = module(x, hx, lengths=lengths)
    every, final = reference.stack(
        numpy_cell(cell), x.numpy(), to_numpy(hx), params, of_layer=of_layer,
        directions=2 if bidirectional else 1,
        lengths=None if lengths is None else lengths.tolist(),
    )  # fmt: skip
    assert_same(output, torch.from_numpy(every[-1][0]))
    assert_same(state, as_state(tuple(map(torch.from_numpy, final))))
    assert not torch.allclose(output, plain(module)(x, hx)[0])


@pytest.mark.parametrize(("cell", "name"), cases(REGULARIZERS))
@each_layout
def test_masks_follow_the_seed_on_any_number_of_threads(
    cell: str, batch_first: bool, name: str
) -> None:
    options = {"num_layers": 2, "batch_first": batch_first, "dropout": 0.0}
    module = build(cell, **options, **REGULARIZERS[name])
    x = draw(BATCH, STEPS, INPUT)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        results = module(x)
        return [*flatten(results), *gradients(results, list(module.parameters()))]

    first = run(1)
    for one, other in zip(first, run(1), strict=True):
        assert torch.equal(one, other)
    with threads(2):
        for one, other in zip(first, run(1), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(first[0], run(2)[0])


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
def test_variational_masks_are_the_same_at_every_step(cell: str) -> None:
    """A dropped input feature has no gradient at any step; the others have one at every step."""
    module = build(cell, input_dropout=0.5)
    x = draw(STEPS, 40, INPUT).requires_grad_()
    output, _ = module(x)
    (dx,) = torch.autograd.grad(output.sum(), x)
    dropped = dx == 0
    assert (dropped == dropped[0]).all()
    assert 0 < dropped[0].sum() < dropped[0].numel()
    assert (dropped[0] != dropped[0, 0]).any()  # the rows differ


@each_cell
@pytest.mark.parametrize("name", ["input_dropout", "hidden_dropout", "weight_dropout"])
def test_nothing_is_dropped_in_eval(cell: str, name: str) -> None:
    module = build(cell, **REGULARIZERS[name]).eval()
    twin, x = plain(module), draw(STEPS, BATCH, INPUT)
    before = torch.get_rng_state()
    assert_same(module(x), twin(x))
    assert_same(module(x, lengths=[STEPS] * BATCH), twin(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_zoneout_takes_the_mean_in_eval(cell: str) -> None:
    p = 0.3
    module = build(cell, zoneout=p, bidirectional=True).eval()
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    every, final = reference.stack(
        cell, x.numpy(), to_numpy(hx), numpy_params(module), directions=2,
        zoneout=(np.full((STEPS, BATCH, 2 * HIDDEN), p),) * 2,
    )  # fmt: skip
    output, state = module(x, hx)
    assert_same(output, torch.from_numpy(every[-1][0]))
    assert_same(state, as_state(tuple(map(torch.from_numpy, final))))


@pytest.mark.parametrize("name", ["input_dropout", "hidden_dropout", "weight_dropout", "zoneout"])
def test_probability_1(name: str) -> None:
    """Everything dropped, or every state kept: finite, and what it says."""
    module = build("gru", **{name: 1.0})
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    output, _ = module(x, hx)
    assert output.isfinite().all()
    twin = plain(module)
    if name == "zoneout":
        assert_same(output, hx.expand(STEPS, -1, -1))
    elif name == "input_dropout":
        assert_same(output, twin(torch.zeros_like(x), hx)[0])
    else:
        nn.init.zeros_(twin.weight_hh_l0)
        assert_same(output, twin(x, hx)[0])


def test_dropout_between_layers_comes_with_the_others() -> None:
    module, x = build("lstm", num_layers=2, dropout=1.0), draw(STEPS, BATCH, INPUT)
    silent = build("lstm", num_layers=2)
    with torch.no_grad():
        silent.weight_ih_l1.zero_()
    assert_same(module(x, lengths=[STEPS] * BATCH), silent(x))


# ------------------------------------------------------------------------- layer normalization


def build_normalized(cell: str, **options: Any) -> Any:
    """With gains and biases that are not the ones they start from."""
    module = build(cell, layer_norm=True, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def numpy_norms(module: nn.RNNBase) -> list[list[reference.Norm]]:
    """For each layer and direction."""
    names = ["norm_ih", "norm_hh"] + (["norm_c", "norm_c_bias"] if module.mode == "LSTM" else [])
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    return [
        [
            reference.Norm(*(getattr(module, f"{n}_l{k}{suffix}").detach().numpy() for n in names))
            for suffix in suffixes
        ]
        for k in range(module.num_layers)
    ]


NORMALIZED = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


@pytest.mark.parametrize("cell", NORMALIZED)
@each_form
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["one", "stack_of_two_ways", "no_bias"],
)
def test_layer_norm_equals_numpy(cell: str, form: str, options: dict[str, Any]) -> None:
    module = build_normalized(cell, **options)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    given = arguments(module, form)
    norms = numpy_norms(module)
    output, state = module(x, hx, **given)
    every, final = reference.stack(
        cell, x.numpy(), to_numpy(hx), numpy_params(module),
        directions=2 if module.bidirectional else 1,
        of_layer=lambda k, x: (x, {"norm": norms[k]}), **numpy_arguments(given),
    )  # fmt: skip
    assert_same(output, torch.from_numpy(every[-1][0]))
    assert_same(state, as_state(tuple(map(torch.from_numpy, final))))


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_layer_norm(cell: str, masked: bool) -> None:
    module = build_normalized(cell, num_layers=2, bidirectional=True)
    if masked:
        module.hidden_dropout = module.weight_dropout = module.zoneout = 0.3
    x, hx, reset_state = draw(4, 3, INPUT), draw_state(module, 3), draw_state(module, 1)
    resets = torch.rand(4, 3) < 0.4
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


def test_parameters_of_layer_norm() -> None:
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    module = rnn_ext.LSTM(2, 3, layer_norm=True, forget_bias=1.0, **options)
    torch.manual_seed(0)
    twin = rnn_ext.LSTM(2, 3, forget_bias=1.0, **options)
    mine, theirs = module.state_dict(), twin.state_dict()
    norms = [name for name in mine if name not in theirs]
    slots = ["l0", "l0_reverse", "l1", "l1_reverse"]
    starts = {"norm_ih": (12, 1.0), "norm_hh": (12, 1.0), "norm_c": (3, 1.0)}
    starts["norm_c_bias"] = (3, 0.0)
    assert sorted(norms) == sorted(f"{name}_{slot}" for name in starts for slot in slots)
    for _ in range(2):
        for name in norms:
            size, start = starts[name.partition("_l")[0]]
            assert torch.equal(module.state_dict()[name], torch.full((size,), start))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        module.reset_parameters()
        mine, theirs = module.state_dict(), {}
    assert module.layer_norm
    assert "layer_norm=True" in repr(module)
    again = pickle.loads(pickle.dumps(module))
    x = torch.randn(STEPS, BATCH, 2)
    assert torch.equal(again(x)[0], module(x)[0])
    assert list(rnn_ext.GRU(2, 3, layer_norm=True).state_dict())[-2:] == [
        "norm_ih_l0",
        "norm_hh_l0",
    ]
    assert (
        rnn_ext.GRU(2, 3, layer_norm=False).state_dict().keys() == nn.GRU(2, 3).state_dict().keys()
    )


# ------------------------------------------------------------------------- reset gate before


@each_form
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"hidden_dropout": 0.4}],
    ids=["one", "stack_of_two_ways", "no_bias", "hidden_dropout"],
)
def test_reset_gate_before_the_product_equals_numpy(form: str, options: dict[str, Any]) -> None:
    module = build("gru", reset_after=False, **options)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    given = arguments(module, form)
    params = numpy_params(module)
    of_layer = masks_of_layers(module, BATCH, params)
    output, state = module(x, hx, **given)
    every, final = reference.stack(
        "gru", x.numpy(), to_numpy(hx), params, directions=2 if module.bidirectional else 1,
        of_layer=of_layer, reset_after=False, **numpy_arguments(given),
    )  # fmt: skip
    assert_same(output, torch.from_numpy(every[-1][0]))
    assert_same(state, torch.from_numpy(final[0]))


@pytest.mark.parametrize("options", [{}, {"hidden_dropout": 0.4, "zoneout": 0.3}], ids=str)
def test_gradcheck_of_the_reset_gate_before_the_product(options: dict[str, Any]) -> None:
    module = build("gru", num_layers=2, bidirectional=True, reset_after=False, **options)
    x, hx, reset_state = draw(4, 3, INPUT), draw_state(module, 3), draw_state(module, 1)
    wanted = leaves(module, x, hx, reset_state)
    names = [name for name, _ in module.named_parameters()]
    resets = torch.rand(4, 3) < 0.4

    def call(x: Tensor, hx: Tensor, reset_state: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        keywords = {"lengths": [4, 2, 3], "resets": resets, "reset_state": reset_state}
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, weights, (x, hx), keywords)

    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)


def test_reset_after_is_an_option_of_the_gru() -> None:
    module = rnn_ext.GRU(2, 3, reset_after=False)
    assert "reset_after=False" in repr(module)
    with pytest.raises(ValueError, match="reset_after=False"):
        rnn_ext.to_torch(module)
    module.reset_after = True
    assert repr(module) == repr(nn.GRU(2, 3))
    with pytest.raises(TypeError, match="reset_after should be of type bool"):
        module.reset_after = 0
    with pytest.raises(ValueError, match="does not go together with layer_norm"):
        rnn_ext.GRU(2, 3, layer_norm=True, reset_after=False)
    with pytest.raises(TypeError, match="reset_after"):
        rnn_ext.LSTM(2, 3, reset_after=False)


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


def jagged(sequences: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)


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


# ------------------------------------------------------------------------- stream


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("library", [rnn_ext, nn], ids=["ours", "torchs"])
def test_stream_equals_the_whole_sequence(cell: str, library: Any) -> None:
    module = build(cell, library, num_layers=2)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    outputs = rnn_ext.stream(module, x.split(3), hx)
    whole, end = module(x, hx)
    assert_same(torch.cat(list(outputs)), whole)
    assert_same(outputs.hx, end)
    assert not any(part.requires_grad for part in parts(outputs.hx))


def test_gradients_of_a_stream_are_those_of_chunks() -> None:
    module = build("lstm", num_layers=2)
    x, hx = draw(STEPS, BATCH, INPUT), draw_state(module)
    wanted = leaves(module, x, *hx)
    for output in rnn_ext.stream(module, x.split(3), hx):
        output.square().sum().backward()
    streamed = [leaf.grad for leaf in wanted]
    module.bptt_steps = 3
    output, _ = module(x, hx)
    assert_same(tuple(streamed), tuple(torch.autograd.grad(output.square().sum(), wanted)))


def test_stream_reads_one_chunk_at_a_time_and_goes_on() -> None:
    module = build("gru")
    read = []

    def chunks() -> Iterator[Tensor]:
        for k in range(3):
            read.append(k)
            yield torch.full((2, BATCH, INPUT), float(k), dtype=torch.float64)

    stream = rnn_ext.stream(module, chunks())
    assert read == []
    next(stream)
    assert read == [0]
    first = [next(stream), next(stream)]
    with pytest.raises(StopIteration):
        next(stream)
    assert read == [0, 1, 2]
    later = list(rnn_ext.stream(module, [torch.zeros(2, BATCH, INPUT).double()], stream.hx))
    assert_same(later[0], module(torch.zeros(2, BATCH, INPUT).double(), first[1][-1:])[0])


def test_stream_needs_one_direction() -> None:
    with pytest.raises(ValueError, match="expected a module of one direction"):
        rnn_ext.stream(rnn_ext.GRU(2, 3, bidirectional=True), [])


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
