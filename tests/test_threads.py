"""Threads, whoever starts them: the same bits for any team, and no call that never returns."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rnn_ext
from helpers import CELLS, Call, Config, evaluate, flatten, make_call, make_module, threads

HUNG = 120  # seconds; what is waited for takes a few
TASKS = Path("/proc/self/task")  # the threads of this process

each_cell = pytest.mark.parametrize("cell", CELLS)

# Large enough for a team: one row and wide; rows in several blocks, in one chunk of steps and in
# several; two directions and layers; layers at different chunks of steps at the same time.
SHAPES = {
    "one_row": {"input_size": 64, "hidden_size": 320, "batch": 1, "steps": 12},
    "rows": {"input_size": 40, "hidden_size": 72, "batch": 100, "steps": 6},
    "rows_in_chunks": {"input_size": 40, "hidden_size": 72, "batch": 33, "steps": 20},
    "ragged": {"input_size": 30, "hidden_size": 136, "lengths": tuple(range(1, 34))},
    "stack": {
        "input_size": 24,
        "hidden_size": 100,
        "batch": 12,
        "steps": 9,
        "num_layers": 2,
        "bidirectional": True,
    },
    "wavefront": {"input_size": 16, "hidden_size": 64, "batch": 1, "steps": 77, "num_layers": 3},
}
each_shape = pytest.mark.parametrize("shape", SHAPES)

Results = dict[str, Tensor]


def assert_same_bits(actual: Results, expected: Results) -> None:
    """By NumPy: torch.equal of large tensors starts a team, which hangs in a forked child."""
    assert list(actual) == list(expected)
    for name, result in expected.items():
        assert np.array_equal(actual[name].numpy(), result.numpy()), name


def planned_threads(config: Config, most: int) -> int:
    """Members of the team of one layer of the call, if `most` threads are on offer."""
    directions = 2 if config.bidirectional else 1
    steps, batch = config.steps, config.batch
    if config.lengths is not None:
        steps, batch = max(config.lengths), len(config.lengths)
    sizes = (steps, batch, config.input_size, config.hidden_size)
    return rnn_ext._C.plan(config.cell, *sizes, directions=directions, threads=most)["threads"]


def run_fresh(function: Callable[[], None], **environment: str) -> str:
    """Run a function of this file in an interpreter of its own; return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    paths = [Path(rnn_ext.__file__).parents[1], Path(__file__).parent]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    result = subprocess.run(
        [sys.executable, "-c", f"import test_threads; test_threads.{function.__name__}()"],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=False,
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout


def run_forked(function: Callable[[], None]) -> None:
    """Run a function in a fork of this process: it has to return, and not by raising."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(HUNG)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung
    assert process.exitcode == 0


# --------------------------------------------------------------------------- set_num_threads


@each_cell
@each_shape
def test_same_bits_for_any_number_of_threads(cell: str, shape: str) -> None:
    config = Config(cell, **SHAPES[shape])
    # That a wavefront has a team cannot be seen from outside.
    assert shape == "wavefront" or planned_threads(config, 2) == 2
    module, call = make_module(config), make_call(config)
    expected = evaluate(module, call)
    for count in (1, 2, 3, 8, os.cpu_count() + 1):
        with threads(count):
            assert_same_bits(evaluate(module, call), expected)


@each_cell
@pytest.mark.parametrize("bidirectional", [False, True])
def test_same_bits_with_lengths(cell: str, bidirectional: bool) -> None:
    """A member that has rows to itself gathers their inputs at every step, a team before them."""
    config = Config(cell, input_size=30, hidden_size=136, bidirectional=bidirectional)
    module = make_module(config)
    steps, rows = 50, 33
    x, lengths = torch.randn(steps, rows, 30), torch.randperm(steps)[:rows]

    def run() -> Results:
        leaf = x.clone().requires_grad_()
        output, state = module(leaf, lengths=lengths)
        results = flatten((output, state))
        loss = sum((r * (r + k)).sum() for k, r in enumerate(results))
        gradients = torch.autograd.grad(loss, [leaf, *module.parameters()])
        return {str(k): r.detach() for k, r in enumerate([*results, *gradients])}

    with threads(1):
        expected = run()
    for count in (2, 3, 8):
        with threads(count):
            assert_same_bits(run(), expected)


@each_cell
def test_another_number_of_threads_for_backward(cell: str) -> None:
    config = Config(cell, **SHAPES["stack"])
    module, call = make_module(config), make_call(config)
    expected = evaluate(module, call)
    leaves = [leaf.clone().requires_grad_() for leaf in call.leaves.values()]
    wanted = [*leaves, *module.parameters()]
    gradients = [gradient for name, gradient in expected.items() if name.startswith("d_")]
    generator = torch.Generator().manual_seed(call.seed)
    for forward, backward in ((3, 1), (1, 2), (2, 5)):
        with threads(forward):
            results = flatten(module(*call.arrange(dict(zip(call.leaves, leaves, strict=True)))))
        generator.manual_seed(call.seed)
        cotangents = [
            torch.randn(r.shape, generator=generator, dtype=torch.float64).float() for r in results
        ]
        with threads(backward):
            actual = torch.autograd.grad(results, wanted, cotangents)
        assert all(map(torch.equal, actual, gradients))


def count_threads() -> None:
    torch.set_num_threads(1)
    config = Config("lstm", input_size=256, hidden_size=256, batch=64, steps=4)
    module, call = make_module(config), make_call(config)
    with torch.inference_mode():
        for most in (1, 3):
            torch.set_num_threads(most)
            before = len(list(TASKS.iterdir()))
            module(*call.arrange(call.leaves))
            print(len(list(TASKS.iterdir())) - before, planned_threads(config, most) - 1)


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads in Linux's /proc")
def test_starts_as_many_threads_as_set() -> None:
    assert run_fresh(count_threads).splitlines() == ["0 0", "2 2"]


# -------------------------------------------------------- fewer threads than have been asked for


def digest(results: Iterable[Results]) -> str:
    digest = hashlib.sha256()
    for named in results:
        for name, result in named.items():
            digest.update(name.encode() + result.contiguous().numpy().tobytes())
    return digest.hexdigest()


def all_cells() -> list[Results]:
    configs = [Config(cell, **SHAPES["stack"]) for cell in CELLS]
    return [evaluate(make_module(config), make_call(config)) for config in configs]


def ask_for_four_threads() -> None:
    print(digest(all_cells()))
    torch.set_num_threads(4)
    assert planned_threads(Config("lstm", **SHAPES["stack"]), torch.get_num_threads()) == 4
    print(digest(all_cells()))


@pytest.mark.parametrize(
    "environment",
    [{"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}],
    ids=["one", "two"],
)
def test_smaller_team_than_asked_for(environment: dict[str, str]) -> None:
    expected = digest(all_cells())
    assert run_fresh(ask_for_four_threads, **environment).split() == [expected, expected]


@each_cell
def test_inside_a_parallel_region(cell: str) -> None:
    """Each thread of somebody else's OpenMP team makes the call; torch's own library starts it."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    config = Config(cell, **SHAPES["stack"])
    module, call = make_module(config), make_call(config)
    expected = evaluate(module, call)
    actual = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: None) -> None:
        actual.append((torch_cpu.omp_in_parallel(), evaluate(module, call)))

    with threads(2):
        torch_cpu.GOMP_parallel(body, None, 3, 0)
    assert [in_parallel for in_parallel, _ in actual] == [1, 1, 1]
    for _, results in actual:
        assert_same_bits(results, expected)


# ------------------------------------------------------------------------------------------- fork
# GNU's OpenMP, and with it torch, cannot start a team in a forked child of a process that has had
# one: torch.nn hangs there at nearly any size. Ours runs on one thread.


def use_a_team() -> None:
    config = Config("lstm", **SHAPES["stack"])
    assert planned_threads(config, 2) == 2
    with threads(2):
        evaluate(make_module(config), make_call(config))


@each_cell
def test_forked_child(cell: str) -> None:
    config = Config(cell, **SHAPES["stack"])
    module, call = make_module(config), make_call(config)
    with threads(2):
        expected = evaluate(module, call)

        def compare() -> None:
            with torch.inference_mode():
                output, *_ = flatten(module(*call.arrange(call.leaves)))
            assert_same_bits({"output": output}, {"output": expected["output"]})
            assert_same_bits(evaluate(module, call), expected)

        run_forked(compare)
        assert_same_bits(evaluate(module, call), expected)


def test_forked_child_clears_padding_and_draws_masks() -> None:
    # With a size that is no multiple of 16 what is kept for backward begins as zeros, too.
    module, x = rnn_ext.LSTM(8, 120, input_dropout=0.5), torch.randn(200, 16, 8)
    module.zoneout = 0.2  # a mask for every step
    lengths = torch.arange(1, 17)

    def evaluate_masked() -> Tensor:
        torch.manual_seed(7)
        return module(x, lengths=lengths)[0].detach()

    with threads(2):
        use_a_team()
        expected = evaluate_masked()

        def compare() -> None:
            assert_same_bits({"output": evaluate_masked()}, {"output": expected})

        run_forked(compare)


def test_forked_while_another_thread_runs() -> None:
    config = Config("gru", **SHAPES["stack"])
    module, call = make_module(config), make_call(config)
    expected = evaluate(module, call)
    stop = threading.Event()

    def keep_busy() -> None:
        torch.set_num_threads(2)
        while not stop.is_set():
            assert_same_bits(evaluate(module, call), expected)

    def compare() -> None:
        assert_same_bits(evaluate(module, call), expected)

    with threads(2), ThreadPoolExecutor(1) as pool:
        busy = pool.submit(keep_busy)
        try:
            for _ in range(5):
                run_forked(compare)
        finally:
            stop.set()
        busy.result()


class Computed(Dataset):
    """Items that a worker computes with our modules: inference, then a training step."""

    def __len__(self) -> int:
        return len(CELLS)

    def __getitem__(self, index: int) -> Results:
        config = Config(CELLS[index], **SHAPES["stack"])
        module, call = make_module(config), make_call(config)
        with torch.inference_mode():
            inferred = dict(enumerate(flatten(module(*call.arrange(call.leaves)))))
        return inferred | evaluate(module, call)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader(method: str) -> None:
    dataset = Computed()
    use_a_team()
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=HUNG
    )
    with threads(2):
        for actual, index in zip(loader, range(len(dataset)), strict=True):
            assert_same_bits(actual, dataset[index])


# ----------------------------------------------------------------------------- many Python threads

DIFFERENT = [
    Config("lstm", **SHAPES["one_row"]),
    Config("gru", **SHAPES["rows"]),
    Config("rnn_tanh", **SHAPES["ragged"]),
    Config("rnn_relu", **SHAPES["stack"]),
    Config("gru", input_size=5, hidden_size=7, steps=1, batch=1),
    Config("lstm", proj_size=24, **SHAPES["stack"]),
    Config("rnn_tanh", input_size=8, hidden_size=96, batch=7, batch_first=True),
    Config("gru", dtype=torch.float64, **SHAPES["ragged"]),
]


def run_at_once(
    work: list[tuple[torch.nn.Module, Call]], repeats: int, meanwhile: Callable[[], None]
) -> list[list[Results]]:
    """Results of each call, repeated in a thread of its own, all threads at the same time."""
    start = threading.Barrier(len(work))

    def repeat(module: torch.nn.Module, call: Call) -> list[Results]:
        start.wait(HUNG)
        return [evaluate(module, call) for _ in range(repeats)]

    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(repeat, *item) for item in work]
        while not all(future.done() for future in futures):
            meanwhile()
        return [future.result() for future in futures]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_different_calls_at_once(count: int) -> None:
    """While the main thread computes something else with torch's own threads."""
    work = [(make_module(config), make_call(config)) for config in DIFFERENT]
    expected = [evaluate(*item) for item in work]
    matrix = torch.randn(300, 300)
    with threads(count):
        for actual, alone in zip(
            run_at_once(work, 4, lambda: matrix @ matrix), expected, strict=True
        ):
            for results in actual:
                assert_same_bits(results, alone)


def test_number_of_threads_changes_meanwhile() -> None:
    config = Config("lstm", **SHAPES["stack"])
    module, call = make_module(config), make_call(config)
    expected = evaluate(module, call)
    counts = iter(range(10**9))

    def change() -> None:
        torch.set_num_threads(1 + next(counts) % 4)
        assert_same_bits(evaluate(module, call), expected)

    with threads(2):
        for results in run_at_once([(module, call)] * 4, 6, change):
            for actual in results:
                assert_same_bits(actual, expected)


@each_cell
def test_backward_through_one_graph_from_several_threads(cell: str) -> None:
    config = Config(cell, **SHAPES["stack"])
    module, call = make_module(config), make_call(config)
    leaf = call.leaves["input"].clone().requires_grad_()
    wanted = [leaf, *module.parameters()]
    output, _ = module(leaf)
    start = threading.Barrier(4)

    def go_backward(scale: int) -> tuple[Tensor, ...]:
        start.wait(HUNG)
        cotangent = torch.full_like(output, scale)
        return torch.autograd.grad(output, wanted, cotangent, retain_graph=True)

    with threads(2), ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(go_backward, range(4)))
    for scale, actual in enumerate(at_once):
        cotangent = torch.full_like(output, scale)
        alone = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
        assert all(map(torch.equal, actual, alone))


def release_one_graph_at_once() -> None:
    """Three threads go backward through a graph that does not outlive the first one to finish."""
    torch.set_num_threads(1)
    module = rnn_ext.RNN(2, 2, num_layers=16, bidirectional=True)
    input = torch.randn(1, 1, 2)
    weight = module.weight_ih_l0
    expected = torch.autograd.grad(module(input)[0].sum(), weight)[0]
    start = threading.Barrier(3)

    def go_backward(output: Tensor) -> str:
        start.wait(HUNG)
        try:
            (actual,) = torch.autograd.grad(output, weight, torch.ones_like(output))
        except RuntimeError as error:
            return str(error).split(" (")[0]
        assert torch.equal(actual, expected)
        return "done"

    seen = Counter()
    with ThreadPoolExecutor(3) as pool:
        for _ in range(1000):
            seen.update(pool.map(go_backward, [module(input)[0]] * 3))
    assert seen["done"] >= 1000, seen  # in every graph at least the first one
    assert seen.keys() <= {"done", "Trying to backward through the graph a second time"}


def test_graph_released_by_another_thread() -> None:
    """In a process of its own: what is released too early is a crash."""
    run_fresh(release_one_graph_at_once)
