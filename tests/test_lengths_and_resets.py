"""Rows that end at steps of their own, episodes that begin within a sequence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pad_packed_sequence,
)

from feature_cases import (
    BATCH,
    CELLS,
    INPUT,
    LENGTHS,
    STEPS,
    as_state,
    assert_same,
    build,
    draw,
    draw_resets,
    draw_state,
    each_cell,
    each_layout,
    each_way,
    gradients,
    leaves,
    parts,
    plain,
    select,
)
from helpers import flatten

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


@each_way
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        *((cell, {}) for cell in CELLS),
        *((cell, {"layer_norm": True}) for cell in CELLS if cell != "lstm_proj"),
        ("gru", {"reset_after": False}),
    ],
)
def test_many_rows_equal_a_few_at_a_time(
    cell: str, options: dict[str, bool], bidirectional: bool
) -> None:
    """Of many rows each block takes every n-th one, with its own sums of gradients."""
    module = build(cell, bidirectional=bidirectional, **options)
    rows, few, steps = 101, 3, 40
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
    lengths[:4] = torch.tensor([steps, 0, 1, steps])
    x, hx = draw(steps, rows, INPUT), draw_state(module, rows)
    resets = torch.rand(steps, rows, generator=generator) < 0.1
    inputs = leaves(module, x, *parts(hx))

    def run(part: slice) -> tuple[Tensor, ...]:
        output, state = module(
            x[:, part], select(hx, part), lengths=lengths[part], resets=resets[:, part]
        )
        return (output, *parts(state))

    together = run(slice(rows))
    apart = [run(slice(row, row + few)) for row in range(0, rows, few)]
    joined = tuple(torch.cat(pieces, dim=1) for pieces in zip(*apart, strict=True))
    assert_same(together, joined)
    assert_same(gradients(together, inputs), gradients(joined, inputs))


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
