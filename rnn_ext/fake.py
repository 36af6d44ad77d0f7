"""Shapes of the operators' results without running them: for torch.compile and export."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_ext.functional import GRU, LSTM

_PAD = 16  # kPad of csrc/sequence.h
SAVED = {LSTM: 5, GRU: 4}  # num_saved of csrc/sequence.h


def padded(size: int) -> int:
    """The engine's arrays pad their innermost dimension."""
    return (size + _PAD - 1) // _PAD * _PAD


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _check_device(name: str, input: Tensor, other: Tensor) -> None:
    if input.device != other.device:
        raise RuntimeError(
            f"Input and {name} tensors are not at the same device, found input tensor at "
            f"{input.device} and {name} tensor at {other.device}"
        )


@torch.library.register_fake("rnn_ext::recurrent")
def _recurrent(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: list[Tensor],
    cell: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    save_reserve: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_device("parameter", input, params[0])
    if h_0 is not None:
        _check_device("hidden", input, h_0)
    directions = 2 if bidirectional else 1
    gates = {LSTM: 4, GRU: 3}.get(cell, 1)
    hidden = params[0].shape[-2] // gates
    state = params[1].shape[-1]
    models = params[0].shape[:-2]  # several models in one call: a leading dimension
    if batch_sizes is None:
        rows = input.shape[-3] * input.shape[-2]
        batch = input.shape[-3] if batch_first else input.shape[-2]
    else:
        rows = input.shape[-2]
        # The widest step: data of batch_sizes, known from h_0 where there is one.
        batch = h_0.shape[-2] if h_0 is not None else torch.library.get_ctx().new_dynamic_size()
    width = directions * state
    slots = num_layers * directions
    wide = compute_dtype(input.dtype)
    output = input.new_empty((*input.shape[:-1], width))
    h_n = input.new_empty((*models, slots, batch, state))
    c_n = input.new_empty((*models, slots, batch, hidden) if cell == LSTM else (*models, 0))
    size = 0
    if save_reserve:
        size = slots * rows * SAVED.get(cell, 0) * padded(hidden)
        inner = (num_layers - 1) * rows * width
        size += inner * (2 if training and dropout > 0 else 1)
    return output, h_n, c_n, input.new_empty((*models, size), dtype=wide)


@torch.library.register_fake("rnn_ext::recurrent_backward")
def _recurrent_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: list[Tensor],
    output: Tensor,
    reserve: Tensor,
    cell: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    output_mask: list[bool],
) -> list[Tensor]:
    return _like_asked([input, h_0, c_0, *params], output_mask)


@torch.library.register_fake("rnn_ext::recurrent_backward_per_example")
def _recurrent_backward_per_example(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: list[Tensor],
    output: Tensor,
    reserve: Tensor,
    cell: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    output_mask: list[bool],
    examples: int,
) -> list[Tensor]:
    own = [p.expand(examples, *p.shape) for p in params]
    return _like_asked([input, h_0, c_0, *own], output_mask)


def _like_asked(operands: list[Tensor | None], asked: list[bool]) -> list[Tensor]:
    """A gradient of each operand that one is asked for of, an empty tensor of each other."""
    like = operands[0]
    return [
        like.new_empty(operand.shape if ask and operand is not None else (0,))
        for operand, ask in zip(operands, asked, strict=True)
    ]


@torch.library.register_fake("rnn_ext::random_mask")
def _random_mask(seed: Tensor, size: list[int], p: float, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(size, dtype=dtype)


@torch.library.register_fake("rnn_ext::recurrent_window_backward")
def _recurrent_window_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: list[Tensor],
    output: Tensor,
    reserve: Tensor,
    cell: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    window: int,
    output_mask: list[bool],
) -> list[Tensor]:
    return _like_asked([input, h_0, c_0, *params], output_mask)
