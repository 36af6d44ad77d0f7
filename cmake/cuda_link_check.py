"""Is what cuda_link_check.sh built all there? Runs without a GPU, and runs no kernel."""

from __future__ import annotations

import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rnn_ext


def check(condition: bool, what: str) -> None:
    print(f"{'ok    ' if condition else 'WRONG '} {what}")
    if not condition:
        raise SystemExit(1)


def main() -> None:
    build = rnn_ext._C.build_info()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {rnn_ext.__path__[0]}")
    check(build["cuda"] is not None, f"CUDA {build['cuda']} for {build['cuda_architectures']}")
    for operator, keys in {
        "recurrent": ("CPU", "CUDA", "Autograd", "AutocastCPU", "AutocastCUDA"),
        "recurrent_backward": ("CPU", "CUDA"),
    }.items():
        for key in keys:
            there = torch._C._dispatch_has_kernel_for_dispatch_key(f"rnn_ext::{operator}", key)
            check(there, f"rnn_ext::{operator} has a kernel for {key}")
    for cell, dtype, bidirectional in itertools.product(
        ("RNN", "LSTM", "GRU"),
        (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        (False, True),
    ):
        with FakeTensorMode():
            module = getattr(rnn_ext, cell)(
                8, 16, 2, bidirectional=bidirectional, device="cuda", dtype=dtype
            )
            x = torch.empty(5, 3, 8, device="cuda", dtype=dtype, requires_grad=True)
            output, state = module(x)
            output.sum().backward()
        directions = 2 if bidirectional else 1
        states = state if cell == "LSTM" else (state,)
        check(
            tuple(output.shape) == (5, 3, directions * 16)
            and all(tuple(s.shape) == (2 * directions, 3, 16) for s in states)
            and x.grad.shape == x.shape
            and all(p.grad.shape == p.shape for p in module.parameters())
            and {t.device.type for t in (output, *states, x.grad)} == {"cuda"}
            and {t.dtype for t in (output, *states, x.grad)} == {dtype},
            f"shapes on fake CUDA tensors: {cell} {dtype} {directions} directions, and gradients",
        )


if __name__ == "__main__":
    main()
