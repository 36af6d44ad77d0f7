"""Runs one training step of a torch.nn-like module, or of its NumPy twin, to named arrays.

Both functions return ``output``, ``h_n``, (``c_n``), and the gradients ``d_input``, ``d_h_0``,
(``d_c_0``) and ``d_<parameter>``, of the scalar sum(output * doutput) + sum(final * dfinal).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from devices import chosen, to_device
from references import STANDARD, Activation, Array, stack

Arrays = dict[str, Array]
STATES = ("h", "c")
CELLS = ("rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru")


def make_module(
    library: ModuleType,
    cell: str,
    input_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    **options: object,
) -> nn.RNNBase:
    """A recurrent module of ``library`` (torch.nn or rnn_ext); "lstm_proj" projects to H/2."""
    torch.manual_seed(seed)
    options["device"] = "cpu"  # where the seed gives the same weights on every machine
    if cell.startswith("rnn_"):
        nonlinearity = cell.removeprefix("rnn_")
        module = library.RNN(input_size, hidden_size, nonlinearity=nonlinearity, **options)
    elif cell == "gru":
        module = library.GRU(input_size, hidden_size, **options)
    else:
        proj_size = (hidden_size + 1) // 2 if cell == "lstm_proj" else 0
        module = library.LSTM(input_size, hidden_size, proj_size=proj_size, **options)
    return module.to(dtype) if library is nn else module.to(chosen(), dtype)


def cell_name(module: nn.RNNBase) -> str:
    return module.mode.lower()  # RNN_TANH, RNN_RELU, LSTM or GRU


def state_shapes(module: nn.RNNBase, batch: int) -> list[tuple[int, int, int]]:
    """Shapes of h_0 and, for LSTM, c_0."""
    directions = 2 if module.bidirectional else 1
    widths = [module.proj_size or module.hidden_size]
    widths += [module.hidden_size] if isinstance(module, nn.LSTM) else []
    return [(module.num_layers * directions, batch, width) for width in widths]


def random_step(
    module: nn.RNNBase, steps: int, batch: int, batch_sizes: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """x, initial states, doutput and dfinal for ``module``, time first, in its dtype."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return to_device(value.to(module.weight_ih_l0.dtype))

    lead = (steps, batch) if batch_sizes is None else (int(batch_sizes.sum()),)
    shapes = state_shapes(module, batch)
    directions = 2 if module.bidirectional else 1
    x = randn(*lead, module.input_size)
    initial = [randn(*shape) for shape in shapes]
    doutput = randn(*lead, directions * shapes[0][2])
    return x, initial, doutput, [randn(*shape) for shape in shapes]


def run_torch(
    module: nn.RNNBase,
    x: Tensor,
    initial: Sequence[Tensor],
    doutput: Tensor,
    dfinal: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
) -> Arrays:
    """One step of a time-first module: torch.nn's or one that claims to equal it; on its device."""
    place = module.weight_ih_l0.device
    x = x.detach().to(place).requires_grad_()
    states = [state.detach().to(place).requires_grad_() for state in initial]
    hx = tuple(states) if len(states) == 2 else states[0]
    output, final = module(x if batch_sizes is None else PackedSequence(x, batch_sizes), hx)
    output = output if batch_sizes is None else output.data
    final = final if isinstance(final, tuple) else (final,)
    names, parameters = zip(*module.named_parameters(), strict=True)
    cotangents = [d.to(place) for d in (doutput, *dfinal)]
    gradients = torch.autograd.grad([output, *final], [x, *states, *parameters], cotangents)
    values = [output, *final, *gradients]
    state_names = STATES[: len(states)]
    keys = ["output", *(f"{s}_n" for s in state_names), "d_input"]
    keys += [*(f"d_{s}_0" for s in state_names), *(f"d_{name}" for name in names)]
    return {key: value.detach().cpu().numpy() for key, value in zip(keys, values, strict=True)}


def run_numpy(
    module: nn.RNNBase,
    x: Tensor,
    initial: Sequence[Tensor],
    doutput: Tensor,
    dfinal: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    masks: Sequence[Tensor] | None = None,
    activation: Activation = STANDARD,
) -> Arrays:
    """The same step through ``references``, in float64 whatever the module's dtype."""

    def array(value: Tensor) -> Array:
        return value.detach().to(torch.float64).cpu().numpy()

    cell = cell_name(module)
    params = stack.split_flat_weights(
        cell,
        [array(p) for p in module._flat_weights],
        bias=module.bias,
        projected=module.proj_size > 0,
    )
    output, final, saved = stack.forward(
        cell,
        array(x),
        tuple(array(state) for state in initial),
        params,
        directions=2 if module.bidirectional else 1,
        batch_sizes=None if batch_sizes is None else batch_sizes.tolist(),
        masks=None if masks is None else [array(mask) for mask in masks],
        activation=activation,
    )
    dx, dinitial, dparams = stack.backward(
        array(doutput), tuple(array(state) for state in dfinal), saved
    )
    result = {"output": output, "d_input": dx}
    for name, last, dfirst in zip(STATES, final, dinitial, strict=False):
        result[f"{name}_n"] = last
        result[f"d_{name}_0"] = dfirst
    flat = stack.join_flat_weights(dparams)
    for name, gradient in zip(module._flat_weights_names, flat, strict=True):
        result[f"d_{name}"] = gradient
    return result


def max_error(actual: Array, expected: Array) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(actual - expected).max(initial=0.0)) / scale


def assert_close(actual: Arrays, expected: Arrays, tolerance: float) -> None:
    """Same names, shapes, and values within ``tolerance`` as ``max_error`` measures it."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        error = max_error(actual[name], value)
        assert error <= tolerance, f"{name}: error {error:.2e} above {tolerance:.0e}"  # also NaN
