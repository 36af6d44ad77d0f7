"""Threads: any number of them, none, forked processes, many callers at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rnn_ext

CELLS = ("RNN", "LSTM", "GRU")
# (T, B, I, H): a step too short to share, one shared by hidden units, one by batch rows as well.
SIZES = ((9, 1, 5, 7), (20, 2, 128, 192), (4, 70, 32, 96))
HANG = 60  # seconds after which a child is taken to hang

each_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def build(cell: str, size: tuple[int, int, int, int], **kwargs) -> tuple[torch.nn.RNNBase, Tensor]:
    steps, batch, input_size, hidden_size = size
    torch.manual_seed(1)
    module = getattr(rnn_ext, cell)(input_size, hidden_size, **kwargs)
    return module, torch.randn(steps, batch, input_size)


def train(module: torch.nn.RNNBase, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = module(x)[0]
    grads = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
    return [output.detach(), *grads]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_cell
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"bidirectional": True}, {"num_layers": 3}],
    ids=["plain", "two_ways", "stack"],
)
def test_same_bits_for_any_number_of_threads(
    cell: str, size: tuple[int, int, int, int], kwargs: dict
) -> None:
    module, x = build(cell, size, **kwargs)
    torch.set_num_threads(1)
    expected = train(module, x)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert same(train(module, x), expected), threads


@each_cell
def test_same_bits_for_a_stack_long_enough_for_a_wavefront(cell: str) -> None:
    module, x = build(cell, (77, 1, 16, 64), num_layers=3)
    torch.set_num_threads(1)
    expected = train(module, x)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(train(module, x), expected), threads


def run_child(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A team that is asked for but does not come: OpenMP may run fewer threads than requested.
@pytest.mark.parametrize(
    "environment",
    [{"OMP_NUM_THREADS": "1"}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}],
    ids=str,
)
def test_fewer_threads_than_asked_for(environment: dict[str, str]) -> None:
    code = """
        import torch, rnn_ext
        torch.manual_seed(0)
        for cell in ("RNN", "LSTM", "GRU"):
            for layers in (1, 3):
                module = getattr(rnn_ext, cell)(64, 160, layers, bidirectional=layers == 1)
                x = torch.randn(50, 4, 64)
                results = []
                for threads in (1, 4):
                    torch.set_num_threads(threads)
                    output = module(x)[0]
                    grads = torch.autograd.grad(output.sum(), list(module.parameters()))
                    results.append([output, *grads])
                assert all(torch.equal(a, b) for a, b in zip(*results)), (cell, layers)
        print("same")
    """
    assert run_child(code, **environment).strip() == "same"


def test_many_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    work = [(*build(cell, size), None) for cell in CELLS for size in SIZES]
    expected = [train(module, x) for module, x, _ in work]
    wrong: list[object] = []

    def run(offset: int) -> None:
        try:
            for i in range(2 * len(work)):
                which = (i + offset) % len(work)
                module, x, _ = work[which]
                if not same(train(module, x), expected[which]):
                    wrong.append(which)
        except Exception as error:  # would otherwise end this thread unseen
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_going_backward_through_one_graph() -> None:
    # One wins, the others are told so; none reads what the winner has released.
    module, x = build("RNN", (1, 1, 2, 2), num_layers=8, bidirectional=True)
    graphs = [module(x)[0] for _ in range(100)]
    barrier = threading.Barrier(2)
    unexpected: list[object] = []
    wins = []

    def run() -> None:
        for output in graphs:
            barrier.wait()
            try:
                torch.autograd.grad(output.sum(), [module.weight_ih_l0])
                wins.append(1)
            except RuntimeError as error:
                if "second time" not in str(error):
                    unexpected.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unexpected
    assert len(wins) >= len(graphs)


def in_forked_child(work: Callable[[], None]) -> None:
    """Fails if the child does, or hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@each_cell
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forked_child(cell: str, size: tuple[int, int, int, int]) -> None:
    module, x = build(cell, size)
    torch.set_num_threads(2)
    expected = train(module, x)  # torch's thread pool has started

    def work() -> None:
        x_in, weights = x.clone().requires_grad_(), list(module.parameters())
        output = module(x_in)[0]
        # Nothing large enough for torch itself to start a parallel region: that hangs in a child.
        grads = torch.autograd.grad(output, [x_in, *weights], torch.ones_like(output))
        if not torch.equal(output, expected[0]) or len(grads) != 1 + len(weights):
            raise AssertionError

    in_forked_child(work)
    assert same(train(module, x), expected)  # the parent goes on with its team


class Sequences(Dataset):
    """Runs a module in the workers, as an augmentation would."""

    def __init__(self, module: torch.nn.RNNBase, x: Tensor) -> None:
        self.module, self.x = module, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        output = self.module(self.x + index)[0]
        (grad,) = torch.autograd.grad(output.sum(), [self.module.weight_hh_l0])
        return torch.cat([output.detach().flatten(), grad.flatten()])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    torch.set_num_threads(2)
    data = Sequences(*build("LSTM", (20, 2, 64, 96)))
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=HANG
    )
    assert same(list(loader), expected)
