"""Time the CUDA engine's methods side by side, and what the cost model predicts for each.

One call for each shape, pass and method, in a CUDA graph, ours alone, on one buffer: a few hundred
cases take some seconds. For constants of the plan; gpu.py compares with other engines and checks
results.

    python benchmarks/gpu_methods.py --json out/gpu_methods.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import gpu
import rnn_ext
from rnn_ext._bench import Case

BATCHES = (1, 16, 64, 128)
HIDDEN = (64, 128, 192, 256, 384, 512, 768, 1024)
STEPS = 128
ROUNDS = 5


def grid(dtypes: Sequence[str]) -> Iterator[Case]:
    for cell in gpu.CELLS:
        for dtype in dtypes:
            for hidden in HIDDEN:
                for batch in BATCHES:
                    for mode in gpu.MODES:
                        yield Case(
                            cell, batch, STEPS, hidden, hidden, mode, dtype=gpu.DTYPES[dtype]
                        )


def measure(case: Case, device: torch.device, model: str) -> Iterator[dict[str, object]]:
    """Seconds of the case by each method that all its passes can run by."""
    on_gpu = device.type == "cuda"
    prepare = gpu.prepare_on_gpu if on_gpu else gpu.prepare_on_host
    seconds_of = gpu.seconds_on_gpu if on_gpu else gpu.seconds_on_host
    torch.manual_seed(0)
    chosen = [plan["method"] for plan in gpu.plans_of(case, model)]
    for method, plans in gpu.possible_methods(case, model).items():
        workload = gpu.ByMethod(case, case.build_module(rnn_ext), device, 1, method)
        with case.context():
            ready = prepare([workload])
            seconds = statistics.median(seconds_of(ready.run) for _ in range(ROUNDS))
        yield {
            "cell": case.cell,
            "dtype": str(case.dtype).removeprefix("torch."),
            "batch": case.batch,
            "steps": case.steps,
            "hidden": case.hidden_size,
            "mode": case.mode,
            "method": method,
            "seconds": seconds,
            "predicted": gpu.seconds_of_plans(plans),
            "chosen": set(chosen) == {method},
        }


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", help="cpu: for tests (default: %(default)s)")
    add("--dtypes", nargs="+", default=list(gpu.DTYPES), choices=list(gpu.DTYPES))
    add("--tf32", action="store_true", help="float32 is multiplied as TF32")
    add("--json", type=Path, help="where to write everything that was measured")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_methods.py: no GPU is available; nothing was measured", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    model = gpu.model_of(device) or "h100"
    rows = []
    for case in grid(arguments.dtypes) if cases is None else cases:
        for row in measure(case, device, model):
            rows.append(row)
            mark = "*" if row["chosen"] else " "
            print(
                f"{case.label:48} {mark} {row['method']:10} {row['seconds'] * 1e3:8.3f} ms, "
                f"predicted on {model} {row['predicted'] * 1e3:8.3f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
