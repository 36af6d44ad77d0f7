"""The CUDA engine's kernels behind torch.nn modules, run on the CPU by the host executor.

tests/cuda_host/library.cpp is the other side. What the kernels do wrong without changing a result
(races, missing barriers, reads of what nobody wrote) fails a call here as well.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import numpy_twin
from helpers import (
    CELLS,
    CLASS_NAMES,
    Config,
    assert_matches_torch,
    configs,
    flatten,
    make_call,
    make_module,
)

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"stepwise": 1, "persistent": 2, "cluster": 3}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}

DIRECTION_INPUTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_0", "c_0", "dh_n", "dc_n")
DIRECTION_OUTPUTS = ("h_n", "c_n", "dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr", "dh_0", "dc_0")
WEIGHTS = DIRECTION_INPUTS[:5]
Pointer = ctypes.POINTER(ctypes.c_double)


class Direction(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in DIRECTION_INPUTS + DIRECTION_OUTPUTS]


class Request(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("type", "method", "cell")),
        *((name, ctypes.c_int64) for name in ("steps", "batch", "input_size", "hidden_size")),
        *((name, ctypes.c_int64) for name in ("proj_size", "directions", "order", "seed")),
        ("batch_sizes", ctypes.POINTER(ctypes.c_int64)),
        *((name, Pointer) for name in ("x", "dy", "y", "dx")),
        ("directions_", Direction * 2),
    ]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The host executor with the engine; built if it is not there or not new."""
    build, scripts = ROOT / "build" / "cpp", Path(sys.executable).parent
    configure = [
        *(scripts / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={scripts / 'ninja'}", "-DRNN_EXT_ENGINE_ONLY=ON"),
        "-DRNN_EXT_WERROR=ON",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([scripts / "cmake", "--build", build, "--target", "cuda_host"], check=True)
    return ctypes.CDLL(str(build / "libcuda_host.so"))


Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Way:
    """How the emulated engine runs."""

    library: ctypes.CDLL
    method: str
    order: str = "forward"  # of the schedule
    seed: int = 0


def run_layer(
    library: ctypes.CDLL,
    way: Way,
    cell: str,
    dtype: torch.dtype,
    x: np.ndarray,
    batch_sizes: np.ndarray | None,
    directions: list[Arrays],
    dy: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, list[Arrays]]:
    """One layer, forward and backward.

    Args:
        x: (T, B, I), or (N, I) with batch_sizes (T,).
        directions: by names of DIRECTION_INPUTS, float64; what is absent is None or not there.
        dy: (T, B, D*R) or (N, D*R), zeros if not given.

    Returns:
        y, dx, and for each direction the arrays of DIRECTION_OUTPUTS.
    """
    packed = batch_sizes is not None
    steps, batch = (len(batch_sizes), int(batch_sizes[0])) if packed else x.shape[:2]
    state = directions[0]["w_hh"].shape[1]
    hidden = directions[0]["w_ih"].shape[0] // {"lstm": 4, "gru": 3}.get(cell, 1)
    projected = directions[0].get("w_hr") is not None
    kept = []  # what the request points to

    def pointer(array: np.ndarray | None) -> Pointer | None:
        if array is None:
            return None
        kept.append(array)
        assert array.dtype == np.float64
        assert array.flags.c_contiguous
        return array.ctypes.data_as(Pointer)

    y = np.full((*x.shape[:-1], len(directions) * state), np.nan)
    dx = np.full(x.shape, np.nan)
    request = Request(
        DTYPES[dtype], METHODS[way.method], CELLS.index(cell), steps, batch, x.shape[-1], hidden,
        state if projected else 0, len(directions), ORDERS[way.order], way.seed,
    )  # fmt: skip
    if packed:
        sizes = np.ascontiguousarray(batch_sizes, np.int64)
        request.batch_sizes = sizes.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
    request.x, request.y, request.dx = pointer(x), pointer(y), pointer(dx)
    request.dy = pointer(np.zeros_like(y) if dy is None else dy)
    results: list[Arrays] = []
    for number, inputs in enumerate(directions):
        out = {
            "h_n": np.full((batch, state), np.nan),
            "c_n": np.full((batch, hidden), np.nan),
            "dh_0": np.full((batch, state), np.nan),
            "dc_0": np.full((batch, hidden), np.nan),
        }
        out |= {f"d{n}": np.full_like(inputs[n], np.nan) for n in WEIGHTS if n in inputs}
        for name, array in (inputs | out).items():
            setattr(request.directions_[number], name, pointer(array))
        results.append(out)
    text = ctypes.create_string_buffer(4000)
    failed = library.rnn_ext_host_run(ctypes.byref(request), text, len(text))
    assert not failed, text.value.decode()
    return y, dx, results


class EmulatedLayer(torch.autograd.Function):
    """x, h_0, c_0 (each (D, B, .), c_0 of the LSTM only) and weights to y, h_n, c_n."""

    @staticmethod
    def forward(ctx, way, cell, batch_sizes, names, x, h_0, c_0, *weights):
        ctx.way, ctx.cell, ctx.batch_sizes, ctx.names = way, cell, batch_sizes, names
        ctx.save_for_backward(x, h_0, c_0, *weights)
        y, _, results = EmulatedLayer.run(ctx, x, h_0, c_0, weights)
        to = {"dtype": x.dtype}
        h_n = torch.tensor(np.stack([r["h_n"] for r in results]), **to)
        c_n = torch.tensor(np.stack([r["c_n"] for r in results]), **to)
        return torch.tensor(y, **to), h_n, c_n

    @staticmethod
    def run(ctx, x, h_0, c_0, weights, dy=None, dh_n=None, dc_n=None):
        def double(tensor: Tensor) -> np.ndarray:
            return np.ascontiguousarray(tensor.detach().double().numpy())

        directions = []
        for d in range(h_0.shape[0]):
            own = weights[d * len(ctx.names) : (d + 1) * len(ctx.names)]
            arrays = {n: double(w) for n, w in zip(ctx.names, own, strict=True)}
            states = {"h_0": h_0, "dh_n": dh_n}
            if ctx.cell == "lstm":
                states |= {"c_0": c_0, "dc_n": dc_n}
            arrays |= {n: double(s[d]) for n, s in states.items() if s is not None}
            directions.append(arrays)
        way = ctx.way
        return run_layer(
            way.library, way, ctx.cell, x.dtype, double(x), ctx.batch_sizes, directions,
            None if dy is None else double(dy),
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        x, h_0, c_0, *weights = ctx.saved_tensors
        _, dx, results = EmulatedLayer.run(ctx, x, h_0, c_0, weights, dy, dh_n, dc_n)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.tensor(array, dtype=x.dtype)

        dc_0 = tensor(np.stack([r["dc_0"] for r in results])) if ctx.cell == "lstm" else None
        dh_0 = tensor(np.stack([r["dh_0"] for r in results]))
        dweights = [tensor(r[f"d{name}"]) for r in results for name in ctx.names]
        return None, None, None, None, tensor(dx), dh_0, dc_0, *dweights


class EmulatedForward:
    """Gives a module of torch.nn the emulated CUDA engine."""

    way: Way

    def forward(self, x, state=None):
        m = self
        cell = m.mode.lower()
        packed = isinstance(x, PackedSequence)
        data, batch_sizes = (x.data, x.batch_sizes.numpy()) if packed else (x, None)
        unbatched = not packed and data.dim() == 2
        if unbatched:
            data = data.unsqueeze(1)
        elif m.batch_first and not packed:
            data = data.transpose(0, 1)
        directions = 2 if m.bidirectional else 1
        batch = int(batch_sizes[0]) if packed else data.shape[1]
        width = m.proj_size or m.hidden_size
        h_0, c_0 = state if cell == "lstm" and state is not None else (state, None)
        sorting = x.sorted_indices if packed else None

        def prepare(tensor: Tensor | None, size: int) -> Tensor:
            if tensor is None:
                return data.new_zeros(m.num_layers * directions, batch, size)
            tensor = tensor.unsqueeze(1) if unbatched else tensor
            return tensor if sorting is None else tensor[:, sorting]

        h_0, c_0 = prepare(h_0, width), prepare(c_0, m.hidden_size)
        names = [n for n in WEIGHTS if (m.bias or n[0] == "w") and (m.proj_size or n != "w_hr")]
        h_n, c_n = [], []
        for layer in range(m.num_layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            suffixes = [f"_l{layer}" + "_reverse" * d for d in range(directions)]
            weights = [
                getattr(m, n.replace("w_", "weight_").replace("b_", "bias_") + suffix)
                for suffix in suffixes
                for n in names
            ]
            data, h, c = EmulatedLayer.apply(
                m.way, cell, batch_sizes, names, data, h_0[rows], c_0[rows], *weights
            )
            h_n.append(h)
            c_n.append(c)
        states = [torch.cat(h_n), torch.cat(c_n)][: 2 if cell == "lstm" else 1]
        if packed:
            unsorting = x.unsorted_indices
            states = [s if unsorting is None else s[:, unsorting] for s in states]
            out: object = PackedSequence(data, x.batch_sizes, sorting, unsorting)
        elif unbatched:
            states = [s.squeeze(1) for s in states]
            out = data.squeeze(1)
        else:
            out = data.transpose(0, 1) if m.batch_first else data
        return out, tuple(states) if cell == "lstm" else states[0]


EMULATED = SimpleNamespace(
    **{name: type(name, (EmulatedForward, getattr(nn, name)), {}) for name in CLASS_NAMES}
)


def emulated(config: Config, way: Way) -> nn.RNNBase:
    module = make_module(config, library=EMULATED)
    module.way = way
    return module


def check(config: Config, way: Way) -> None:
    """The emulated module gives what torch.nn gives, by the error policy of helpers.py."""
    assert_matches_torch(emulated(config, way), make_call(config), make_module(config, library=nn))


EXAMPLES = {torch.float64: 20, torch.float32: 12, torch.float16: 6, torch.bfloat16: 6}


@pytest.mark.parametrize("dtype", EXAMPLES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_parity_with_torch(library: ctypes.CDLL, method: str, dtype: torch.dtype) -> None:
    @hypothesis.settings(max_examples=EXAMPLES[dtype])
    @hypothesis.given(config=small_configs(dtype, method), order=st.sampled_from(list(ORDERS)))
    def run(config: Config, order: str) -> None:
        check(config, Way(library, method, order, seed=config.seed))

    run()


def small_configs(dtype: torch.dtype, method: str) -> st.SearchStrategy[Config]:
    """Sizes that the executor runs in less than a second; projections are stepwise only."""

    def shrink(config: Config) -> Config:
        return replace(
            config,
            hidden_size=min(config.hidden_size, 24),
            num_layers=min(config.num_layers, 2),
            proj_size=min(config.proj_size, 23) if method == "stepwise" else 0,
            steps=min(config.steps, 5),
            batch=config.batch and min(config.batch, 9),
            lengths=config.lengths and tuple(min(n, 5) for n in config.lengths),
        )

    return configs(dtype).map(shrink)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(library: ctypes.CDLL, cell: str, method: str) -> None:
    config = Config(
        cell=cell, input_size=3, hidden_size=5, bidirectional=True, lengths=(3, 1),
        dtype=torch.float64, seed=3,
    )  # fmt: skip
    module, call = emulated(config, Way(library, method, "random")), make_call(config)
    leaves = {name: leaf.requires_grad_() for name, leaf in call.leaves.items()}
    parameters = dict(module.named_parameters())

    def run(*values: Tensor) -> list[Tensor]:
        moved = dict(zip([*leaves, *parameters], values, strict=True))
        arguments = call.arrange({name: moved[name] for name in leaves})
        weights = {name: moved[name] for name in parameters}
        return tuple(flatten(torch.func.functional_call(module, weights, arguments)))

    assert torch.autograd.gradcheck(run, (*leaves.values(), *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", numpy_twin.CELLS)
def test_agrees_with_numpy(library: ctypes.CDLL, cell: str, method: str, packed: bool) -> None:
    if cell == "lstm_proj" and method != "stepwise":
        with pytest.raises(AssertionError, match="the plan or a launch failed"):
            compare_with_numpy(cell, Way(library, method), packed)
    else:
        compare_with_numpy(cell, Way(library, method, "reverse"), packed)


def compare_with_numpy(cell: str, way: Way, packed: bool) -> None:
    module = numpy_twin.make_module(EMULATED, cell, 4, 19, num_layers=2, bidirectional=True)
    module.way = way
    batch_sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    step = numpy_twin.random_step(module, 4, 3, batch_sizes)
    ours = numpy_twin.run_torch(module, *step, batch_sizes)
    expected = numpy_twin.run_numpy(module, *step, batch_sizes)
    assert sorted(ours) == sorted(expected)
    for name, array in ours.items():
        # float64 on both sides, values of about 1: some hundred roundings.
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-13, err_msg=name)
