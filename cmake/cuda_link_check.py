"""Is what cuda_link_check.sh built all there? Runs without a GPU, and runs no kernel."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rnn_ext

CELLS = {"RNN": 0, "LSTM": 2, "GRU": 3}  # CellKind of csrc/sequence.h


def check(condition: bool, what: str) -> None:
    print(f"{'ok    ' if condition else 'WRONG '} {what}")
    if not condition:
        raise SystemExit(1)


def main() -> None:
    # torch.nn.RNNBase asks a fake tensor where it is.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
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
        directions = 2 if bidirectional else 1
        with FakeTensorMode(), torch.no_grad():
            module = getattr(rnn_ext, cell)(
                8, 16, 2, bidirectional=bidirectional, device="cuda", dtype=dtype
            )
            x = torch.empty(5, 3, 8, device="cuda", dtype=dtype)
            output, state = module(x)
            states = state if cell == "LSTM" else (state,)
            # The operators themselves: autograd's engine would ask for the device.
            weights = list(module.parameters())
            call = (x, None, None, None, weights)
            options = (CELLS[cell], True, 2, bidirectional, False, 0.0, False)
            *_, reserve = torch.ops.rnn_ext.recurrent(*call, *options, save_reserve=True)
            gradients = torch.ops.rnn_ext.recurrent_backward(
                output, None, None, *call, output, reserve, *options,
                [True, False, False, *(True for _ in weights)],
            )  # fmt: skip
        made = (output, *states, gradients[0], *gradients[3:])
        check(
            tuple(output.shape) == (5, 3, directions * 16)
            and all(tuple(s.shape) == (2 * directions, 3, 16) for s in states)
            and gradients[0].shape == x.shape
            and [g.shape for g in gradients[3:]] == [w.shape for w in weights]
            and {t.device.type for t in made} == {"cuda"}
            and {t.dtype for t in made} == {dtype},
            f"forward and backward on fake CUDA tensors: {cell} {dtype}, {directions} directions",
        )


if __name__ == "__main__":
    main()
