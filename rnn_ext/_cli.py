"""The commands of `python -m rnn_ext`: info, check and bench."""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch

import rnn_ext
from rnn_ext._bench import Case, Timing, build_pair, compare, interleave

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Interquartile range over the median above which a time is not worth quoting.
NOISY = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    code: int = arguments.run(arguments)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rnn_ext",
        description="Drop-in RNN, LSTM and GRU for PyTorch: what is installed, is it right, is it "
        "faster?",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads to use (default: torch's own setting)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,check,bench}")

    info = commands.add_parser(
        "info", parents=[common], help="how this copy was built and what this machine offers"
    )
    info.set_defaults(run=run_info)

    check = commands.add_parser(
        "check",
        parents=[common],
        help="compare with torch.nn on this machine; exit code 1 if anything differs (10 seconds)",
        description="Outputs, final states and every gradient, compared with torch.nn in float64. "
        "The error may be at most twice torch.nn's own at the same dtype, plus one rounding.",
    )
    check.set_defaults(run=run_check)

    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="is it faster than torch.nn for my shape?",
        description="Checks the results, then times torch.nn and rnn_ext in turn in this process.",
        epilog="example: python -m rnn_ext bench --cell gru --batch 16 --steps 50 --input 128 "
        "--hidden 128 --training",
    )
    add = bench.add_argument
    default = "(default: %(default)s)"
    add("--cell", choices=["rnn", "lstm", "gru"], default="lstm", help=f"kind of layer {default}")
    add("--batch", type=positive, default=1, metavar="B", help=f"sequences in a batch {default}")
    add(
        "--steps",
        type=positive,
        default=100,
        metavar="T",
        help=f"time steps; 1 times a step that is handed its state {default}",
    )
    add("--input", type=positive, default=256, metavar="I", help=f"input_size {default}")
    add("--hidden", type=positive, default=256, metavar="H", help=f"hidden_size {default}")
    add("--layers", type=positive, default=1, metavar="L", help=f"num_layers {default}")
    add("--bidirectional", action="store_true", help="run both directions")
    add("--proj", type=positive, metavar="P", help="proj_size, lstm only (default: none)")
    add("--nonlinearity", choices=["tanh", "relu"], default="tanh", help=f"rnn only {default}")
    add("--dtype", choices=list(DTYPES), default="float32", help=f"of weights and input {default}")
    add("--training", action="store_true", help="time forward and backward, not only forward")
    add("--rounds", type=at_least_two, default=9, metavar="N", help=f"samples a side {default}")
    add("--explain", action="store_true", help="also print how the engine runs each layer, and why")
    add(
        "--device-model",
        choices=rnn_ext._C.cuda_devices(),
        metavar="GPU",
        help="with --explain: print how the CUDA engine would run each layer on this GPU, and the "
        "time that its cost model predicts, instead of measuring anything; one of %(choices)s",
    )
    bench.set_defaults(run=run_bench, parser=bench)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, not {value}")
    return value


def run_info(arguments: argparse.Namespace) -> int:
    """Print what was built, and what this machine can run."""
    build = rnn_ext._C.build_info()
    cpu = rnn_ext._C.cpu_info()
    lines = {
        "rnn_ext": build["version"],
        "torch": f"{torch.__version__} (built for {build['torch_version']})",
        "compiler": build["compiler"],
        "instruction sets built": ", ".join(build["isas"]),
        "instruction sets here": ", ".join(cpu["available"]),
        "instruction set in use": f"{cpu['isa']} (force another with RNN_EXT_CPU_ISA)",
        "threads": f"{cpu['num_threads']} (torch.set_num_threads)",
        "OpenMP": "yes" if build["openmp"] else "no",
        "CUDA kernels": f"built with CUDA {build['cuda']} for {build['cuda_architectures']}; "
        "run by this project on an H100 only"
        if build["cuda"]
        else "not built",
        "location": rnn_ext.__path__[0],
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0


def check_cases(cell: str, nonlinearity: str, proj_size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Small, odd and large enough for each way the engine has of running a layer."""
    variants = [
        {"batch": 3, "steps": 11, "given_state": True},
        {"batch": 17, "steps": 20, "input_size": 33, "hidden_size": 70},
        {"batch": 4, "steps": 9, "num_layers": 2, "bidirectional": True, "given_state": True},
        {"batch": 5, "steps": 12, "bidirectional": True, "packed": True},
    ]
    # The derivative of relu jumps at zero: in 16 bits, rounding moves units across it, in torch.nn
    # as in ours, and the gradients then say nothing about either.
    comparable = nonlinearity != "relu" or torch.finfo(dtype).bits > 16
    modes = ("inference", "training") if comparable else ("inference",)
    for mode, variant in itertools.product(modes, variants):
        sizes = {"input_size": 7, "hidden_size": 19, **variant}
        yield Case(
            cell, mode=mode, nonlinearity=nonlinearity, proj_size=proj_size, dtype=dtype, **sizes
        )
    yield Case(
        cell,
        batch=1,
        steps=1,
        input_size=7,
        hidden_size=19,
        mode="streaming",
        given_state=True,
        nonlinearity=nonlinearity,
        proj_size=proj_size,
        dtype=dtype,
    )


def run_check(arguments: argparse.Namespace) -> int:
    """Compare every kind of call with torch.nn. Exit code 1 if anything is too far off."""
    # torch.nn says this once about itself; it is no news about rnn_ext.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    print(f"rnn_ext ({rnn_ext._C.cpu_info()['isa']}) against torch.nn {torch.__version__}")
    layers = [
        ("RNN tanh", "RNN", "tanh", 0),
        ("RNN relu", "RNN", "relu", 0),
        ("LSTM", "LSTM", "tanh", 0),
        ("LSTM proj", "LSTM", "tanh", 5),
        ("GRU", "GRU", "tanh", 0),
    ]
    failures = 0
    for (title, cell, nonlinearity, proj_size), (dtype_name, dtype) in itertools.product(
        layers, DTYPES.items()
    ):
        worst = 0.0
        cases = list(check_cases(cell, nonlinearity, proj_size, dtype))
        wrong = []
        for case in cases:
            pair = build_pair(case, rnn_ext)
            for deviation in compare(case, pair["rnn_ext"], pair["torch.nn"]):
                if deviation.within:
                    worst = max(worst, deviation.error / deviation.bound)
                else:
                    wrong.append(f"{case.label}: {deviation}")
        verdict = "WRONG" if wrong else "ok"
        print(
            f"{title:<10} {dtype_name:<9} {len(cases)} calls  {verdict:<5}  "
            f"largest error {worst:4.0%} of allowed"
        )
        for line in wrong:
            print(f"    {line}")
        failures += len(wrong)
    print(
        "all results agree with torch.nn"
        if failures == 0
        else f"{failures} results differ from torch.nn"
    )
    return 1 if failures else 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Check and time one shape."""
    if arguments.proj is not None and arguments.cell != "lstm":
        arguments.parser.error("--proj needs --cell lstm")
    if arguments.proj is not None and arguments.proj >= arguments.hidden:
        arguments.parser.error("--proj must be smaller than --hidden")
    if arguments.nonlinearity != "tanh" and arguments.cell != "rnn":
        arguments.parser.error("--nonlinearity needs --cell rnn")
    streaming = arguments.steps == 1 and not arguments.training
    case = Case(
        cell=arguments.cell.upper(),
        batch=arguments.batch,
        steps=arguments.steps,
        input_size=arguments.input,
        hidden_size=arguments.hidden,
        mode="training" if arguments.training else "streaming" if streaming else "inference",
        num_layers=arguments.layers,
        bidirectional=arguments.bidirectional,
        proj_size=arguments.proj or 0,
        nonlinearity=arguments.nonlinearity,
        dtype=DTYPES[arguments.dtype],
        given_state=streaming,
    )
    if arguments.device_model is not None:
        if not arguments.explain:
            arguments.parser.error("--device-model needs --explain")
        explain_on_device(case, arguments.device_model)
        return 0
    isa = rnn_ext._C.cpu_info()["isa"]
    print(f"{case.label}, {torch.get_num_threads()} threads, {isa}")
    if arguments.explain:
        explain(case)

    pair = build_pair(case, rnn_ext)
    deviations = compare(case, pair["rnn_ext"], pair["torch.nn"])
    wrong = [deviation for deviation in deviations if not deviation.within]
    if wrong:
        for deviation in wrong:
            print(f"  WRONG {deviation}")
        print("results differ from torch.nn: not timed")
        return 1
    print(f"results agree with torch.nn ({len(deviations)} tensors)")

    with case.context():
        timings = interleave(pair, rounds=arguments.rounds)
    for name, timing in timings.items():
        print(
            f"{name:<9}{format_seconds(timing.median):>10}  (spread {timing.spread:.0%}, "
            f"{case.flops / timing.median / 1e9:.1f} GFLOP/s)"
        )
    print(f"rnn_ext is {describe_ratio(timings['torch.nn'], timings['rnn_ext'])} for this shape")
    if max(timing.spread for timing in timings.values()) > NOISY:
        print("the times vary a lot: something else is running, repeat this on a quiet machine")
    return 0


def calls_of(case: Case) -> Iterator[tuple[str, int, int, bool]]:
    """Title, number of layers, input size and direction of pass (backward?) of each kind of call.

    Layers after the first are alike and share one.
    """
    inputs = [("layer 0", 1, case.input_size)]
    if case.num_layers > 1:
        title = "layer 1" if case.num_layers == 2 else f"layers 1 to {case.num_layers - 1}"
        inputs.append((title, case.num_layers - 1, case.state_size * case.directions))
    passes = {"forward": False, "backward": True} if case.training else {"forward": False}
    for (title, layers, input_size), (name, backward) in itertools.product(inputs, passes.items()):
        yield f"{title} {name}", layers, input_size, backward


def cell_name(case: Case) -> str:
    return f"rnn_{case.nonlinearity}" if case.cell == "RNN" else case.cell.lower()


def explain(case: Case) -> None:
    """Print the engine's plan of each layer."""
    for title, _, input_size, backward in calls_of(case):
        plan = rnn_ext._C.plan(
            cell_name(case),
            case.steps,
            case.batch,
            input_size,
            case.hidden_size,
            proj_size=case.proj_size,
            directions=case.directions,
            # Half precision is widened: it runs as float32 does.
            dtype="float64" if case.dtype == torch.float64 else "float32",
            backward=backward,
        )
        reason = plan.pop("reason")
        print(f"{title}: {reason}\n    {describe_plan(plan)}")


def describe_plan(plan: dict[str, object]) -> str:
    return ", ".join(
        f"{key} {f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in plan.items()
    )


def explain_on_device(case: Case, device: str) -> None:
    """Print how the CUDA engine would run each layer on a GPU, and what its cost model predicts."""
    print(f"{case.label} on {device}: predictions of a cost model, on paper. Nothing was measured.")
    total = floor = 0.0
    for title, layers, input_size, backward in calls_of(case):
        plan = rnn_ext._C.cuda_plan(
            cell_name(case),
            case.steps,
            case.batch,
            input_size,
            case.hidden_size,
            proj_size=case.proj_size,
            directions=case.directions,
            dtype=str(case.dtype).removeprefix("torch."),
            backward=backward,
            training=case.training,
            device=device,
            allow_tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        )
        method, reason = plan.pop("method"), plan.pop("reason")
        parts = plan.pop("seconds")
        seconds, least = plan.pop("total_seconds"), plan.pop("floor_seconds")
        print(f"{title}: {method}, {reason}")
        if method == "refused":
            return
        print(f"    {describe_plan(plan)}")
        print("    " + ", ".join(f"{part} {format_seconds(s)}" for part, s in parts.items()))
        print(f"    predicted {format_seconds(seconds)}, floor {format_seconds(least)}")
        total += layers * seconds
        floor += layers * least
    print(f"predicted for all layers: {format_seconds(total)} (floor {format_seconds(floor)})")


def describe_ratio(theirs: Timing, ours: Timing) -> str:
    ratio = theirs.median / ours.median
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def format_seconds(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} µs"
