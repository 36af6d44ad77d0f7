"""The CUDA kernels on a GPU. `make cuda-check` runs these with RNN_EXT_NEEDS_GPU=1, which makes a
missing GPU a failure; elsewhere they are skipped. What can be proved without one is in
tests/cuda_host and tests/cuda."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_ext
from rnn_ext._bench import Case, Workload, compare_all

BUILT = rnn_ext._C.build_info()["cuda"] is not None
HERE = BUILT and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not HERE and os.environ.get("RNN_EXT_NEEDS_GPU") != "1",
    reason="no CUDA kernels were built, or there is no GPU",
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CELLS = ["RNN", "LSTM", "GRU"]
METHODS = ["stepwise", "persistent", "cluster"]
# The cost model that stands for this GPU; the largest one where there is none.
MODEL = next(
    (name for name in rnn_ext._C.cuda_devices()
     if HERE and name in torch.cuda.get_device_name().lower().replace(" ", "")),
    "h100",
)  # fmt: skip


@pytest.fixture(autouse=True)
def full_precision():
    """torch's float32 is a reference only without TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(case: Case, module: nn.RNNBase, device: str = "cuda") -> Workload:
    workload = Workload(case, module.to(device))

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    workload.input = move(workload.input)
    workload.grad_output = move(workload.grad_output)
    workload.initial_state = tuple(map(move, workload.initial_state))
    if workload.initial_state:
        state = workload.initial_state
        workload.hx = state if case.cell == "LSTM" else state[0]
    return workload


def pair(case: Case, device: str = "cuda") -> tuple[Workload, Workload]:
    torch.manual_seed(0)
    theirs, ours = case.build_module(nn), case.build_module(rnn_ext)
    ours.load_state_dict(theirs.state_dict())
    return on_gpu(case, ours, device), on_gpu(case, theirs, device)


def check(case: Case, device: str = "cuda") -> None:
    ours, theirs = pair(case, device)
    (deviations,) = compare_all(
        case, {"ours": ours}, theirs, make=lambda case, module: on_gpu(case, module, device)
    ).values()
    assert [str(d) for d in deviations if not d.within] == []


SHAPES = [
    {"batch": 1, "steps": 1, "input_size": 3, "hidden_size": 1},
    {"batch": 3, "steps": 11, "input_size": 7, "hidden_size": 19, "given_state": True},
    {"batch": 16, "steps": 30, "input_size": 64, "hidden_size": 256},
    {"batch": 130, "steps": 5, "input_size": 33, "hidden_size": 70, "bidirectional": True},
    {"batch": 5, "steps": 12, "input_size": 8, "hidden_size": 40, "packed": True},
    {"batch": 5, "steps": 12, "input_size": 8, "hidden_size": 40, "packed": True,
     "bidirectional": True, "num_layers": 2},
    {"batch": 2, "steps": 4, "input_size": 16, "hidden_size": 2100},
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_like_cudnn(cell, dtype, shape, mode):
    check(Case(cell, mode=mode, dtype=dtype, **shape))


METHOD_SHAPES = [
    {"batch": 1, "steps": 9, "input_size": 5, "hidden_size": 17},
    {"batch": 3, "steps": 11, "input_size": 7, "hidden_size": 19, "given_state": True},
    {"batch": 33, "steps": 7, "input_size": 16, "hidden_size": 96, "bidirectional": True},
    {"batch": 130, "steps": 5, "input_size": 33, "hidden_size": 70},
    {"batch": 16, "steps": 20, "input_size": 64, "hidden_size": 256},
    {"batch": 40, "steps": 6, "input_size": 16, "hidden_size": 512},
    {"batch": 5, "steps": 12, "input_size": 8, "hidden_size": 40, "packed": True,
     "bidirectional": True, "given_state": True},
    {"batch": 50, "steps": 12, "input_size": 8, "hidden_size": 130, "packed": True},
]  # fmt: skip


@pytest.fixture
def set_method():
    yield rnn_ext._C.set_cuda_method
    rnn_ext._C.set_cuda_method("auto")


def methods_of(case: Case) -> set[str]:
    """By which method each pass of the case would run, the way it is set now, on a model."""
    return {
        rnn_ext._C.cuda_plan(
            {"RNN": "rnn_tanh"}.get(case.cell, case.cell.lower()),
            case.steps,
            case.batch,
            case.input_size,
            case.hidden_size,
            directions=case.directions,
            dtype=str(case.dtype).removeprefix("torch."),
            backward=backward,
            training=True,
            device=MODEL,
        )["method"]
        for backward in (False, True)
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", METHOD_SHAPES, ids=str)
def test_each_method_like_cudnn(set_method, method, cell, dtype, shape):
    case = Case(cell, mode="training", dtype=dtype, **shape)
    set_method(method)
    if method not in methods_of(case):
        pytest.skip(f"neither pass fits the method {method}")
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(dtype):
    check(Case("LSTM", 4, 9, 6, 24, "training", proj_size=5, bidirectional=True, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_like_the_cpu_engine(cell):
    case = Case(cell, 4, 20, 12, 40, "training", num_layers=2, bidirectional=True)
    torch.manual_seed(0)
    module = case.build_module(rnn_ext)
    cpu = Workload(case, module).results()
    copy = case.build_module(rnn_ext)
    copy.load_state_dict(module.state_dict())
    for name, value in on_gpu(case, copy).results().items():
        # float32 in two orders of summation, through two layers and 20 steps; accuracy itself is
        # judged against float64 above.
        torch.testing.assert_close(value.cpu(), cpu[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(cell, packed):
    module = getattr(rnn_ext, cell)(3, 4, bidirectional=True, dtype=torch.float64, device="cuda")
    x = torch.randn(4, 3, 3, dtype=torch.float64, device="cuda", requires_grad=True)

    def run(x, *_):
        sequence = pack_padded_sequence(x, [4, 2, 1]) if packed else x
        output, _ = module(sequence)
        return output.data if packed else output

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_every_time(set_method, method, cell, dtype):
    set_method(method)
    ours, _ = pair(Case(cell, 16, 50, 64, 128, "training", dtype=dtype, bidirectional=True))
    first = {name: value.clone() for name, value in ours.results().items()}
    for _ in range(20):
        for name, value in ours.results().items():
            assert torch.equal(value, first[name]), name


def test_callers_stream():
    """Work is queued behind what the caller's stream holds, on that stream."""
    ours, _ = pair(Case("LSTM", 4, 20, 32, 64))
    expected = ours()[0].clone()
    ours.input.data.zero_()
    source = torch.empty_like(ours.input)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        source.copy_(pair(Case("LSTM", 4, 20, 32, 64))[0].input, non_blocking=True)
        ours.input.data.copy_(source)
        output = ours()[0]
    stream.synchronize()
    assert torch.equal(output, expected)


def test_two_streams_at_once():
    cases = [Case("LSTM", 8, 100, 64, 256), Case("GRU", 8, 100, 64, 256)]
    sides = [pair(case)[0] for case in cases]
    expected = [side()[0].clone() for side in sides]
    streams = [torch.cuda.Stream() for _ in sides]
    torch.cuda.synchronize()
    outputs = []
    for _, (side, stream) in itertools.product(range(10), zip(sides, streams, strict=True)):
        with torch.cuda.stream(stream):
            outputs.append(side()[0])
    torch.cuda.synchronize()
    for i, output in enumerate(outputs):
        assert torch.equal(output, expected[i % 2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_graph_capture(packed, mode):
    """One captured call replays with new inputs: nothing of the host's memory is read again."""
    case = Case("LSTM", 4, 20, 32, 64, mode, packed=packed)
    ours, _ = pair(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours()[0]
    for _ in range(3):
        with torch.no_grad():
            ours.input.copy_(torch.randn_like(ours.input))
        graph.replay()
        assert torch.equal(captured, ours()[0])


def test_no_synchronization():
    ours, _ = pair(Case("LSTM", 4, 20, 32, 64, "training", packed=False))
    ours()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    module = rnn_ext.LSTM(8, 16, device="cuda")
    x = torch.randn(5, 3, 8, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        output, _ = module(x)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.skipif(
    HERE and torch.cuda.get_device_capability() < (8, 0), reason="no TF32 before 8.0"
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_only_where_torch_allows_it(set_method, method, cell):
    """Rounding both operands of a product to TF32 moves it by 2^-10 of its terms at most; weights
    of 1/16 and states below 1 make that 256 terms of 2^-14 with either sign in each step."""
    set_method(method)
    ours, _ = pair(Case(cell, 16, 10, 64, 256))
    exact = ours()[0].clone()
    torch.backends.cuda.matmul.allow_tf32 = True  # full_precision sets it back
    rounded = ours()[0]
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=10 * 16 * 2**-14)


@pytest.mark.skipif(
    HERE and torch.cuda.get_device_capability() < (8, 0), reason="no TF32 before 8.0"
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_gradients(set_method, method, cell):
    """Each product's operands lose all but 10 bits: 2^-11 of either at most, anew in each step."""
    set_method(method)  # where the layer can run by it: no cluster holds an LSTM of 160
    ours, _ = pair(Case(cell, 20, 8, 64, 160, "training", bidirectional=True))
    exact = {name: value.clone() for name, value in ours.results().items()}
    torch.backends.cuda.matmul.allow_tf32 = True  # full_precision sets it back
    for name, value in ours.results().items():
        error = (value - exact[name]).norm() / exact[name].norm()
        assert 1e-6 < error < 8 * 2**-10, name


def test_other_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    check(Case("GRU", 3, 11, 7, 19, "training"), device="cuda:1")
    assert torch.cuda.current_device() == 0
