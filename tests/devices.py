"""The device on which the suite runs: `pytest --device=cuda`, or RNN_EXT_TEST_DEVICE; else the CPU.

Tests make their tensors and modules without naming a device and get this one (conftest.py sets it
as torch's default). What has to be the same numbers on every device is drawn on the CPU and moved
with `to_device`. References compute on the CPU: with one yardstick for all devices, and because
cuDNN refuses much of what is compared here (backward in eval mode, double backward, forward mode).
Parity with cuDNN itself is test_cuda.py's subject.

`pretend` needs no GPU: see pretend_device.py.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

CHOICES = ("cpu", "cuda", "pretend")

_device = torch.device("cpu")


def choose(name: str) -> None:
    """Called once, before any test is collected."""
    global _device
    _device = torch.device("cuda" if name == "pretend" else name)


def chosen() -> torch.device:
    return _device


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """For a reference that runs on the device and does what cuDNN refuses."""
    return torch.backends.cudnn.flags(enabled=False)


def to_device(tensor: Tensor) -> Tensor:
    """The tensor where the suite runs."""
    return tensor.to(_device)
