"""Sequences of different lengths: PackedSequence in and out, sorted or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

from helpers import (
    CELLS,
    Config,
    assert_matches_torch,
    assert_results_match,
    check,
    configs,
    evaluate,
    flatten,
    make_call,
    make_module,
    pack,
    threads,
)

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

LENGTHS = {
    "sorted": (6, 4, 4, 2, 1),
    "unsorted": (2, 6, 1, 4, 4),
    "equal": (5, 5, 5),
    "ones": (1, 1, 1, 1),
    "single": (7,),
    "one_long": (9, 1, 1, 1, 1, 1, 1, 1, 1),
    "many": tuple(1 + i % 7 for i in range(40)),
}


@each_cell
@each_dtype
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no_state"])
def test_lengths(
    cell: str, dtype: torch.dtype, lengths: tuple, bidirectional: bool, given_state: bool
) -> None:
    check(
        Config(
            cell,
            num_layers=2,
            bidirectional=bidirectional,
            lengths=lengths,
            given_state=given_state,
            dtype=dtype,
        )
    )


@each_dtype
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_projection(dtype: torch.dtype, lengths: tuple) -> None:
    check(
        Config("lstm", num_layers=2, bidirectional=True, proj_size=3, lengths=lengths, dtype=dtype)
    )


@settings(max_examples=150)
@given(configs(torch.float32, packed=True))
def test_drawn_float32(config: Config) -> None:
    check(config)


@settings(max_examples=60)
@given(configs(torch.float64, packed=True))
def test_drawn_float64(config: Config) -> None:
    check(config)


@each_cell
def test_two_threads(cell: str) -> None:
    lengths = tuple(1 + (7 * i) % 23 for i in range(33))
    config = Config(cell, input_size=30, hidden_size=72, bidirectional=True, lengths=lengths)
    ours, theirs, call = make_module(config), make_module(config, library=nn), make_call(config)
    with threads(2):
        results = evaluate(ours, call)
    assert_results_match(results, theirs, call)


@each_cell
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
def test_equals_each_sequence_alone(cell: str, bidirectional: bool) -> None:
    """What packing means, said without torch's own implementation of it."""
    config = Config(cell, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    module = make_module(config)
    sequences = [torch.randn(n, config.input_size, dtype=torch.float64) for n in (3, 7, 1, 4)]
    output, state = module(pack(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == [3, 7, 1, 4]
    for i, sequence in enumerate(sequences):
        alone, alone_state = module(sequence)
        torch.testing.assert_close(padded[: len(sequence), i], alone)
        for part, alone_part in zip(flatten(state), flatten(alone_state), strict=True):
            torch.testing.assert_close(part[:, i], alone_part)


@each_cell
@pytest.mark.parametrize("lengths", [(4, 2, 1), (1, 4, 2)], ids=["sorted", "unsorted"])
def test_output_describes_the_same_packing(cell: str, lengths: tuple[int, ...]) -> None:
    config = Config(cell)
    input = pack_padded_sequence(
        torch.randn(4, 3, config.input_size),
        torch.tensor(lengths, device="cpu"),
        enforce_sorted=False,
    )
    output, _ = make_module(config)(input)
    assert type(output) is PackedSequence
    assert output.batch_sizes is input.batch_sizes
    assert output.sorted_indices is input.sorted_indices
    assert output.unsorted_indices is input.unsorted_indices


@each_cell
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_gradient_stops_at_the_padding(cell: str, batch_first: bool) -> None:
    """Numbers in the padding change nothing and get no gradient."""
    config = Config(cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    module = make_module(config)
    lengths = torch.tensor([2, 5, 3], device="cpu")
    padding = torch.arange(5, device="cpu").unsqueeze(1) >= lengths  # [T, B]

    def run(fill: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        input = torch.randn(5, 3, config.input_size)
        input[padding] = fill
        input = (input.transpose(0, 1) if batch_first else input).contiguous().requires_grad_()
        packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
        output, _ = pad_packed_sequence(module(packed)[0], batch_first)
        output.sum().backward()
        gradient = input.grad.transpose(0, 1) if batch_first else input.grad
        return output.detach(), gradient

    output, gradient = run(0.0)
    filled_output, filled_gradient = run(torch.nan)
    assert torch.equal(output, filled_output)
    assert torch.equal(gradient, filled_gradient)
    assert (gradient[padding] == 0).all()
    assert (gradient[~padding] != 0).any(dim=1).all()


@each_cell
@pytest.mark.parametrize("extra", [(0,), (0, 0, 0)], ids=["one_zero", "three_zeros"])
def test_steps_without_sequences_at_the_end(cell: str, extra: tuple[int, ...]) -> None:
    """torch.nn accepts them, in one direction."""
    config = Config(cell)
    ours, theirs = make_module(config), make_module(config, library=nn)
    sizes = torch.tensor([3, 2, *extra], device="cpu")
    input = PackedSequence(torch.randn(5, config.input_size), sizes)
    for actual, expected in zip(flatten(ours(input)), flatten(theirs(input.cpu())), strict=True):
        torch.testing.assert_close(actual, expected, check_device=False)


@each_cell
def test_more_data_than_the_batch_sizes_cover(cell: str) -> None:
    """torch.nn ignores the rest, in one direction."""
    config = Config(cell)
    ours, theirs = make_module(config), make_module(config, library=nn)
    sizes = torch.tensor([3, 2], device="cpu")
    input = PackedSequence(torch.randn(9, config.input_size), sizes)
    for actual, expected in zip(flatten(ours(input)), flatten(theirs(input.cpu())), strict=True):
        torch.testing.assert_close(actual, expected, check_device=False)


@each_cell
def test_state_of_an_unsorted_batch_is_in_the_callers_order(cell: str) -> None:
    config = Config(cell, lengths=(1, 4, 2), dtype=torch.float64)
    module, call = make_module(config), make_call(config)
    packed, state = call.arrange(call.leaves)
    _, final = module(packed, state)
    for i, length in enumerate(config.lengths):
        sequence = call.leaves["input"][:length, i]
        own = tuple(s[:, i] for s in flatten(state))
        _, alone = module(sequence, own if cell == "lstm" else own[0])
        for part, alone_part in zip(flatten(final), flatten(alone), strict=True):
            torch.testing.assert_close(part[:, i], alone_part)


@each_cell
def test_data_that_is_a_view(cell: str) -> None:
    config = Config(cell, lengths=(4, 3, 1), layout="every_second")
    assert_matches_torch(make_module(config), make_call(config))
    wide = torch.randn(8, 2 * config.input_size)
    batch_sizes = torch.tensor([3, 2, 2, 1], device="cpu")
    module = make_module(config)
    view = module(PackedSequence(wide[:, ::2], batch_sizes))
    copy = module(PackedSequence(wide[:, ::2].contiguous(), batch_sizes))
    for actual, expected in zip(flatten(view), flatten(copy), strict=True):
        assert torch.equal(actual, expected)


@each_cell
def test_batch_sizes_that_are_a_view(cell: str) -> None:
    """torch.nn reads past the stride here, and fails."""
    config = Config(cell)
    module, data = make_module(config), torch.randn(8, config.input_size)
    strided = torch.tensor([3, 0, 2, 0, 2, 0, 1, 0], device="cpu")[::2]
    view = module(PackedSequence(data, strided))
    copy = module(PackedSequence(data, strided.clone()))
    for actual, expected in zip(flatten(view), flatten(copy), strict=True):
        assert torch.equal(actual, expected)
