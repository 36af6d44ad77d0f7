"""Gradients cut short, states recomputed, sequences in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn_ext
from feature_cases import (
    BATCH,
    CELLS,
    INPUT,
    LENGTHS,
    STEPS,
    arguments,
    as_state,
    assert_same,
    build,
    draw,
    draw_state,
    each_cell,
    each_form,
    each_layout,
    each_way,
    gradients,
    leaves,
    parts,
    plain,
)
from helpers import flatten
from rnn_ext import features

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
