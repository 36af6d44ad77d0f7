"""Time rnn_ext on a GPU beside torch.nn (cuDNN), flashrnn and a compiled loop.

For each case the results are checked first, against torch.nn in float64 on the same device. Then
every side is captured into a CUDA graph that calls it on buffers in rotation (together larger than
the L2 cache, so that nobody finds the last call's inputs there), the graphs are replayed in turn,
and CUDA events give the times. `--device cpu` runs all of this but the graphs and events: for
tests, its times say nothing about a GPU. float32 is multiplied as float32 on all sides, or with
`--tf32` as TF32 on all sides; torch's own default differs between cuDNN and other products.

    python benchmarks/gpu.py --json out/gpu.json --markdown out/gpu.md --png out/gpu.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import flash
import rnn_ext
from rnn_ext._bench import Case, Deviation, Workload, compare_all

CELLS = ("LSTM", "GRU", "RNN")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BATCHES = (1, 7, 16, 64, 128)
STEPS = (1, 128, 1024)
HIDDEN = (64, 256, 512, 768, 1024, 2048)
MODES = ("inference", "training")
METHODS = ("stepwise", "persistent", "cluster")

# A compiled loop is unrolled over its steps: more of them take minutes to compile.
COMPILED_STEPS = 32
MAX_BUFFERS = 8
WARM_UP_CALLS = 3

BASELINE = "torch.nn"
OURS = "rnn_ext"
COMPILED = "compiled loop"
FLASH = "flashrnn"


def grid(
    cells: Sequence[str] = CELLS,
    dtypes: Sequence[str] = tuple(DTYPES),
    batches: Sequence[int] = BATCHES,
    steps: Sequence[int] = STEPS,
    hidden: Sequence[int] = HIDDEN,
    modes: Sequence[str] = MODES,
) -> Iterator[Case]:
    for cell, dtype, B, T, H, mode in itertools.product(
        cells, dtypes, batches, steps, hidden, modes
    ):
        yield Case(cell, B, T, H, H, mode, dtype=DTYPES[dtype])


class OnDevice(Workload):
    """A workload with everything it owns on a device."""

    def __init__(self, case: Case, module: nn.RNNBase, device: torch.device, seed: int = 1) -> None:
        super().__init__(case, module.to(device), seed)

        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        self.input = move(self.input)
        self.grad_output = move(self.grad_output)
        self.initial_state = tuple(move(state) for state in self.initial_state)
        if self.initial_state:
            self.hx = self.initial_state if case.cell == "LSTM" else self.initial_state[0]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.input, self.grad_output))


class ByMethod(OnDevice):
    """Ours by one method of the CUDA engine where it can be, whatever the plan prefers."""

    def __init__(
        self, case: Case, module: nn.RNNBase, device: torch.device, seed: int, method: str
    ) -> None:
        super().__init__(case, module, device, seed)
        self.method = method

    def __call__(self) -> tuple[Tensor, ...]:
        rnn_ext._C.set_cuda_method(self.method)
        try:
            return super().__call__()
        finally:
            rnn_ext._C.set_cuda_method("auto")


class CompiledOnDevice(OnDevice):
    """The loop of compiled.py."""

    def __init__(self, case: Case, module: nn.RNNBase, device: torch.device, seed: int = 1) -> None:
        from compiled import STEPS as CELL_STEPS
        from compiled import time_loop

        super().__init__(case, module, device, seed)
        shape = (1, case.batch, case.hidden_size)
        self.first_state = tuple(
            torch.zeros(shape, dtype=case.dtype, device=device)
            for _ in range(2 if case.cell == "LSTM" else 1)
        )
        self.step = CELL_STEPS[case.cell]
        self.loop = torch.compile(time_loop, fullgraph=True, dynamic=False)

    def _forward(self) -> tuple[Tensor, ...]:
        return self.loop(self.step, self.input, self.first_state, *self.parameters)


class FlashOnDevice(OnDevice):
    """The package flashrnn, see flash.py."""

    def __init__(self, case: Case, module: nn.RNNBase, device: torch.device, seed: int = 1) -> None:
        self.function = flash.flashrnn_function()
        self.cell, self.dtype = case.cell, case.dtype
        super().__init__(case, module, device, seed)

    def _forward(self) -> tuple[Tensor, ...]:
        return flash.forward(self.function, self.cell, self.dtype, self.input, *self.parameters)


def why_flashrnn_is_absent(case: Case, device: torch.device) -> str:
    """Empty where flashrnn runs the case. It compiles itself at the first call, so anything may go
    wrong then; whatever it is, the row says it."""
    try:
        FlashOnDevice(case, case.build_module(nn), device)()
    except Exception as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        return f"{type(error).__name__}: {first_line[:200]}"
    return ""


def build_sides(
    case: Case,
    device: torch.device,
    seed: int,
    with_flash: bool = False,
    methods: Sequence[str] = (),
) -> dict[str, Workload]:
    """The case in every engine that has it, with the same weights and inputs."""
    torch.manual_seed(0)
    reference = case.build_module(nn)

    def alike(namespace: object) -> nn.RNNBase:
        module = case.build_module(namespace)
        module.load_state_dict(reference.state_dict())
        return module

    sides: dict[str, Workload] = {
        BASELINE: OnDevice(case, alike(nn), device, seed),
        OURS: OnDevice(case, alike(rnn_ext), device, seed),
    }
    for method in methods:
        sides[method] = ByMethod(case, alike(rnn_ext), device, seed, method)
    if with_flash:
        sides[FLASH] = FlashOnDevice(case, alike(nn), device, seed)
    if case.steps <= COMPILED_STEPS:
        torch.compiler.reset()
        sides[COMPILED] = CompiledOnDevice(case, alike(nn), device, seed)
    return sides


def wrong_results(
    case: Case, device: torch.device, with_flash: bool = False, methods: Sequence[str] = ()
) -> dict[str, list[Deviation]]:
    """What each side but torch.nn computes wrongly."""
    sides = build_sides(case, device, 1, with_flash, methods)
    torch_nn = sides.pop(BASELINE)
    deviations = compare_all(
        case, sides, torch_nn, make=lambda case, module: OnDevice(case, module, device)
    )
    return {
        name: wrong
        for name, checked in deviations.items()
        if (wrong := [deviation for deviation in checked if not deviation.within])
    }


# --- Time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One prepared side: what to run, and how many calls that is."""

    run: Callable[[], object]
    calls: int


def prepare_on_host(workloads: Sequence[Workload]) -> Sample:
    def run() -> None:
        for workload in workloads:
            workload()

    run()
    return Sample(run, len(workloads))


def prepare_on_gpu(workloads: Sequence[Workload]) -> Sample:
    """A CUDA graph of one call on each buffer."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            for workload in workloads:
                workload()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for workload in workloads:
            workload()
    graph.replay()
    torch.cuda.synchronize()
    return Sample(graph.replay, len(workloads))


def seconds_on_host(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def seconds_on_gpu(run: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def buffers_for(workload: OnDevice, cache_bytes: int) -> int:
    """How many copies of the inputs are larger than twice the cache, within reason."""
    return max(1, min(MAX_BUFFERS, math.ceil(2 * cache_bytes / max(workload.bytes, 1))))


@dataclass
class Row:
    cell: str
    dtype: str
    batch: int
    steps: int
    hidden: int
    mode: str
    seconds: dict[str, float]
    spread: dict[str, float]
    wrong: dict[str, list[str]]
    gflops: float
    floor_seconds: float | None = None  # of the cost model, where the device is one of its table
    predicted: dict[str, float] = field(default_factory=dict)  # by the same, for ours
    absent: dict[str, str] = field(default_factory=dict)  # peers that could not run it, and why

    @property
    def ratio(self) -> float:
        """How many times faster than torch.nn; NaN where ours was wrong."""
        if OURS not in self.seconds:
            return math.nan
        return self.seconds[BASELINE] / self.seconds[OURS]

    @property
    def floor_share(self) -> float:
        if self.floor_seconds is None or OURS not in self.seconds:
            return math.nan
        return self.floor_seconds / self.seconds[OURS]


def plans_of(case: Case, model: str, method: str = "auto") -> list[dict]:
    """The cost model's plan for each pass of the case."""
    rnn_ext._C.set_cuda_method(method)
    try:
        return [
            rnn_ext._C.cuda_plan(
                "rnn_tanh" if case.cell == "RNN" else case.cell.lower(),
                case.steps,
                case.batch,
                case.input_size,
                case.hidden_size,
                dtype=str(case.dtype).removeprefix("torch."),
                backward=backward,
                training=case.training,
                device=model,
                allow_tf32=torch.backends.cuda.matmul.allow_tf32,
            )
            for backward in ((False, True) if case.training else (False,))
        ]
    finally:
        rnn_ext._C.set_cuda_method("auto")


def seconds_of_plans(plans: Sequence[dict], key: str = "total_seconds") -> float:
    return sum(plan[key] for plan in plans)


def possible_methods(case: Case, model: str | None) -> dict[str, list[dict]]:
    """The methods by which every pass of the case can run, with their plans."""
    if model is None:
        return {}
    plans = {method: plans_of(case, model, method) for method in METHODS}
    return {
        method: found
        for method, found in plans.items()
        if all(plan["method"] == method for plan in found)
    }


def measure(
    case: Case, device: torch.device, rounds: int, model: str | None, each_method: bool = False
) -> Row:
    """Check one case, then time the sides that are right, in turn."""
    on_gpu = device.type == "cuda"
    no_flash = why_flashrnn_is_absent(case, device)
    by_method = possible_methods(case, model) if each_method else {}
    methods = tuple(by_method)
    wrong = wrong_results(case, device, not no_flash, methods)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
    first = build_sides(case, device, 1, not no_flash, methods)
    count = buffers_for(first[BASELINE], cache)
    others = range(2, count + 1)
    buffers = [first, *(build_sides(case, device, n, not no_flash, methods) for n in others)]
    prepare = prepare_on_gpu if on_gpu else prepare_on_host
    seconds_of = seconds_on_gpu if on_gpu else seconds_on_host
    samples: dict[str, list[float]] = {name: [] for name in first if name not in wrong}
    with case.context():
        ready = {name: prepare([sides[name] for sides in buffers]) for name in samples}
        for _ in range(rounds):
            for name, sample in ready.items():
                samples[name].append(seconds_of(sample.run) / sample.calls)
    medians = {name: statistics.median(times) for name, times in samples.items()}

    def spread(times: list[float]) -> float:
        lower, middle, upper = statistics.quantiles(times, n=4)
        return (upper - lower) / middle

    planned = {**({OURS: plans_of(case, model)} if model else {}), **by_method}
    return Row(
        cell=case.cell,
        dtype=str(case.dtype).removeprefix("torch."),
        batch=case.batch,
        steps=case.steps,
        hidden=case.hidden_size,
        mode=case.mode,
        seconds=medians,
        spread={name: spread(times) for name, times in samples.items()},
        wrong={name: [str(deviation) for deviation in found] for name, found in wrong.items()},
        gflops=case.flops / medians[OURS] / 1e9 if OURS in medians else math.nan,
        floor_seconds=seconds_of_plans(planned[OURS], "floor_seconds") if planned else None,
        predicted={name: seconds_of_plans(plans) for name, plans in planned.items()},
        absent={FLASH: no_flash} if no_flash else {},
    )


# --- Reports --------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], title: str) -> str:
    lines = [
        f"# {title}",
        "",
        "Milliseconds a call. Ratio: torch.nn's time over ours. Floor: share of the time that the "
        "cost model's lower bound accounts for.",
        "",
        "| case | torch.nn | rnn_ext | compiled loop | flashrnn | ratio | GFLOP/s | floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def milliseconds(row: Row, name: str) -> str:
        if name in row.wrong:
            return "WRONG"
        return f"{row.seconds[name] * 1e3:.3f}" if name in row.seconds else ""

    for row in rows:
        share = "" if math.isnan(row.floor_share) else f"{row.floor_share:.0%}"
        cells = [
            f"{row.cell} {row.dtype} B{row.batch} T{row.steps} H{row.hidden} {row.mode}",
            *(milliseconds(row, name) for name in (BASELINE, OURS, COMPILED, FLASH)),
            f"{row.ratio:.2f}",
            f"{row.gflops:.0f}",
            share,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = Counter(f"{name}: {why}" for row in rows for name, why in row.absent.items())
    lines += [""] + [f"Absent from {n} of {len(rows)} cases: {why}" for why, n in reasons.items()]
    return "\n".join(lines) + "\n"


def line_of(case: Case, row: Row) -> str:
    sides = (
        f"{name} {row.seconds[name] * 1e3:.3f}"
        + (f" (predicted {row.predicted[name] * 1e3:.3f})" if name in row.predicted else "")
        for name in row.seconds
    )
    ratio = "WRONG" if OURS in row.wrong else f"{row.ratio:.2f}x"
    return f"{case.label}: {ratio}; ms: {', '.join(sides)}"


def heat_map(rows: Sequence[Row], path: Path, title: str) -> None:
    """Times faster than torch.nn: a line for each cell, dtype and mode, a column for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    names = list(dict.fromkeys((row.cell, row.dtype, row.mode) for row in rows))
    shapes = list(dict.fromkeys((row.steps, row.batch, row.hidden) for row in rows))
    values = torch.full((len(names), len(shapes)), float("nan"))
    for row in rows:
        place = names.index((row.cell, row.dtype, row.mode))
        values[place, shapes.index((row.steps, row.batch, row.hidden))] = math.log2(row.ratio)
    figure, axes = plt.subplots(figsize=(2 + 0.22 * len(shapes), 2 + 0.3 * len(names)))
    image = axes.imshow(values.numpy(), aspect="auto", cmap="RdYlGn", norm=TwoSlopeNorm(0, -2, 2))
    axes.set_yticks(range(len(names)), [" ".join(name) for name in names])
    axes.set_xticks(range(len(shapes)), [f"T{t} B{b} H{h}" for t, b, h in shapes], rotation=90)
    axes.set_title(title)
    bar = figure.colorbar(image)
    bar.set_label("log2 of times faster than torch.nn")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def model_of(device: torch.device) -> str | None:
    """The cost model's name for this GPU, if it is in its table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((model for model in rnn_ext._C.cuda_devices() if model in name), None)


AXES = {
    "cells": CELLS,
    "dtypes": tuple(DTYPES),
    "batches": BATCHES,
    "steps": STEPS,
    "hidden": HIDDEN,
    "modes": MODES,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", help="cpu: for tests (default: %(default)s)")
    add("--rounds", type=int, default=9, help="samples of each side (default: %(default)s)")
    add("--quick", action="store_true", help="a few cases of the grid")
    for axis, values in AXES.items():
        kind = type(values[0])
        add(f"--{axis}", type=kind, nargs="+", default=values, help="of the grid (default: all)")
    add("--tf32", action="store_true", help="float32 is multiplied as TF32, by all sides")
    add("--each-method", action="store_true", help="ours also by each method of the engine")
    add("--match", default="", help="only cases whose label contains this")
    add("--json", type=Path, help="where to write everything that was measured")
    add("--markdown", type=Path, help="where to write the table")
    add("--png", type=Path, help="where to draw the heat map")
    return parser


def quick(case: Case) -> bool:
    return case.batch in (1, 16) and case.steps == 128 and case.hidden_size in (256, 768)


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no GPU is available; nothing was measured", file=sys.stderr)
        return 2
    if cases is None:
        axes = {axis: getattr(arguments, axis) for axis in AXES}
        cases = [case for case in grid(**axes) if not arguments.quick or quick(case)]
    cases = [case for case in cases if arguments.match in case.label]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32
    model = model_of(device)
    rows = []
    for case in cases:
        rows.append(measure(case, device, arguments.rounds, model, arguments.each_method))
        print(line_of(case, rows[-1]), flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    title = f"rnn_ext {rnn_ext.__version__} on {name}, torch {torch.__version__}"
    title += f", cuDNN {torch.backends.cudnn.version()}{', TF32' if arguments.tf32 else ''}"
    if arguments.json:
        report = {"title": title, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, title))
    if arguments.png and rows:
        heat_map(rows, arguments.png, title)
    return 1 if any(name != FLASH for row in rows for name in row.wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
