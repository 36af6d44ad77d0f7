"""Masks, layer normalization, the reset gate before the product."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnn_ext
from feature_cases import (
    BATCH,
    CELLS,
    HIDDEN,
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
    numpy_arguments,
    numpy_cell,
    numpy_params,
    parts,
    plain,
    to_numpy,
)
from helpers import flatten, threads
from references import features as reference
from references import philox

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
