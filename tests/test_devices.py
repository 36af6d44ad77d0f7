"""The suite's own switch of devices: `--device=pretend` refuses what a GPU refuses, and what a run
leaves out is counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from pretend_device import THERE, PretendDevice

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.cpu_only("the switch itself")


@pytest.fixture
def pretend() -> Iterator[None]:
    mode = PretendDevice()
    mode.default = THERE
    with mode:
        yield


def on_the_cpu(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cpu")


MISTAKES: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    "two devices": (RuntimeError, lambda: torch.randn(3) + on_the_cpu(3)),
    "in a list": (RuntimeError, lambda: torch.cat([torch.randn(3), on_the_cpu(3)])),
    "a module": (RuntimeError, lambda: nn.Linear(3, 4)(on_the_cpu(2, 3))),
    "what was moved": (RuntimeError, lambda: torch.randn(3).cpu() * torch.randn(3)),
    "a view": (RuntimeError, lambda: torch.randn(3, 3)[1].t() @ on_the_cpu(3)),
    "a gradient": (RuntimeError, lambda: gradient() + on_the_cpu(3)),
    "generator": (RuntimeError, lambda: torch.randn(3, generator=torch.Generator())),
    "numpy": (TypeError, lambda: torch.randn(3).numpy()),
    "lengths": (RuntimeError, lambda: pack_padded_sequence(torch.ones(2, 1, 3), torch.tensor([2]))),
}


def gradient() -> torch.Tensor:
    x = torch.randn(3, requires_grad=True)
    x.sum().backward()
    return x.grad


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("pretend")
def test_what_a_gpu_refuses(mistake: str) -> None:
    error, make = MISTAKES[mistake]
    with pytest.raises(error):
        make()


@pytest.mark.usefixtures("pretend")
def test_what_a_gpu_takes() -> None:
    x = torch.randn(4, 2, 3, requires_grad=True)
    assert x.device == torch.device("cuda", 0)
    assert x.cpu().device.type == "cpu"
    assert (2 * x + torch.tensor(1.0, device="cpu")).device == x.device
    x[torch.tensor([True, False, True, False], device="cpu")].sum().backward()
    assert x.grad.device == x.device
    assert torch.zeros_like(x, device="cpu").numpy().shape == (4, 2, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 2], device="cpu"))
    assert packed.batch_sizes.device.type == "cpu"
    assert packed.data.device == x.device


def test_a_run_on_another_device_counts_what_it_leaves_out() -> None:
    """And real tests pass on it: those of packed and plain modules, a slice of each."""
    command = [sys.executable, "-m", "pytest", "--device=pretend", "-q", "-p", "no:cacheprovider"]
    names = "lstm and (test_lengths or test_only_one or test_dropout_without or test_frozen)"
    files = [f"tests/test_{name}.py" for name in ("packed", "parity", "gradients", "readme")]
    done = subprocess.run(
        [*command, *files, "-k", f"({names}) or test_readme"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 about the CPU: the README" in done.stdout
    passed = int(done.stdout.split("device pretend: ")[1].split()[0])
    assert passed > 80


def test_no_gpu_is_an_error_not_a_skip() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "--device=cuda", "tests/test_packed.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "torch sees no GPU" in done.stdout + done.stderr
