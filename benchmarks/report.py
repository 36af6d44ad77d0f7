"""Compare rnn_ext with torch.nn on this machine: `make bench`.

Each row: check both sides against float64, see that every core is free, then time both in turn in
this process (at least 5 ms a sample, median of at least 7). Last come the geometric means, and each
of the project's bars with `ok` or `falls short`. docs/performance.md explains the columns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import rnn_ext
import tables
from bars import MemoryRow, Row, judge, summary
from cases import CELLS, select
from peers import BASELINE, OURS, PEERS, Build, build_all
from rnn_ext._bench import Case, Timing, compare, interleave
from roofline import Machine, MachineProbe, floor_seconds, health, measure

# Below this share of undisturbed cores the machine is somebody else's at the moment.
HEALTHY = 0.85

# A change of our own time against an older run that is worth a mark.
NOTABLE_CHANGE = 0.10

JSON_SCHEMA = 1


class WrongResult(Exception):
    """A side computes something else: its time would mean nothing."""


def check(case: Case, sides: Mapping[str, object]) -> None:
    wrong = [
        str(deviation)
        for deviation in compare(case, sides[OURS], sides[BASELINE])
        if not deviation.within
    ]
    if wrong:
        raise WrongResult(f"{case.label}: " + "; ".join(wrong))


def time_case(
    case: Case,
    machine: Machine,
    probe: MachineProbe,
    peers: Mapping[str, Build] = PEERS,
    rounds: int = 7,
    min_sample: float = 5e-3,
    measure_times: Callable[..., dict[str, Timing]] = interleave,
) -> Row:
    """Check, then time. Repeated once, then marked, if a core was away meanwhile."""
    sides = build_all(case, peers)
    check(case, sides)
    for _ in range(2):
        before = health(probe, machine.threads, machine.fma_one_thread)
        with case.context():
            timings = measure_times(sides, rounds=rounds, min_sample=min_sample)
        after = health(probe, machine.threads, machine.fma_one_thread)
        healthy = min(before, after) >= HEALTHY
        if healthy:
            break
    return Row(
        case=case,
        theirs=timings[BASELINE].median,
        ours=timings[OURS].median,
        spread=max(timing.spread for timing in timings.values()),
        floor=floor_seconds(case, machine),
        healthy=healthy,
    )


def format_time(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:8.2f} ms"


HEADER = (
    f"{'cell':<5}{'shape':<20}{'mode':<11}{'torch.nn':>11}{'rnn_ext':>13}{'ratio':>9}{'spread':>8}"
    f"{'GFLOP/s':>9}{'roofline':>10}"
)


def format_row(row: Row) -> str:
    return (
        f"{row.case.cell:<5}{row.case.shape:<20}{row.case.mode:<11}"
        f"{format_time(row.theirs):>11}{format_time(row.ours):>13}{row.ratio:>8.2f}x"
        f"{row.spread:>8.0%}{row.rate / 1e9:>9.1f}{row.share:>10.0%}"
        + ("" if row.healthy else "  unhealthy")
    )


def format_memory(row: MemoryRow) -> str:
    theirs, ours = (
        f"{heap / 1e6:9.2f} {resident / 1e6:9.2f}" for heap, resident in (row.theirs, row.ours)
    )
    return f"{row.case.cell:<5}{row.case.shape:<20}{theirs}  {ours}{row.ratio:>8.2f}"


def cpu_name() -> str:
    """What the kernel calls the processor; the architecture where it has no name for it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def environment(machine: Machine | None) -> dict[str, object]:
    return {
        "schema": JSON_SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": rnn_ext._C.cpu_info()["isa"],
        "versions": {
            "rnn_ext": rnn_ext._C.build_info()["version"],
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "compiler": rnn_ext._C.build_info()["compiler"],
        },
        "machine": asdict(machine) if machine else None,
    }


def describe_machine(machine: Machine) -> str:
    levels = ", ".join(f"{level.name} {level.all_threads / 1e9:.0f}" for level in machine.levels)
    return (
        f"multiply-adds {machine.fma_all_threads / 1e9:.0f} GFLOP/s "
        f"({machine.fma_one_thread / 1e9:.0f} on one thread), "
        f"torch's sgemm {machine.sgemm / 1e9:.0f}; reads in GB/s: {levels}; "
        f"core to core {machine.handoff * 1e9:.0f} ns"
    )


def row_to_json(row: Row) -> dict[str, object]:
    case = asdict(row.case)
    case["dtype"] = str(row.case.dtype).removeprefix("torch.")
    return {
        "label": row.case.label,
        "case": case,
        "torch_nn_seconds": row.theirs,
        "rnn_ext_seconds": row.ours,
        "ratio": row.ratio,
        "spread": row.spread,
        "gflops": row.rate / 1e9,
        "roofline_share": row.share,
        "healthy": row.healthy,
    }


def compare_with(old: Mapping[str, object], rows: Sequence[Row]) -> list[str]:
    """Our time and ratio beside those of an older run, for every case in both."""
    before = {entry["label"]: entry for entry in old["rows"]}
    lines = []
    for row in rows:
        entry = before.get(row.case.label)
        if entry is None:
            continue
        change = row.ours / entry["rnn_ext_seconds"] - 1
        mark = "" if abs(change) < NOTABLE_CHANGE else "  slower" if change > 0 else "  faster"
        lines.append(
            f"{row.case.label:<42}{format_time(entry['rnn_ext_seconds'])} ->{format_time(row.ours)}"
            f"  ({change:+.0%}), ratio {entry['ratio']:.2f}x -> {row.ratio:.2f}x{mark}"
        )
    return lines or ["no case is in both runs"]


def heat_map(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the ratios: one line for each cell and mode, one column for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    lines = [(cell, mode) for cell in CELLS for mode in ("inference", "training")]
    lines = [line for line in lines if any((row.case.cell, row.case.mode) == line for row in rows)]
    streaming = any(row.case.mode == "streaming" for row in rows)
    shapes = list(dict.fromkeys(row.case.shape for row in rows if row.case.mode != "streaming"))
    columns = (["streaming"] if streaming else []) + shapes
    if not lines:
        lines = [
            (cell, "inference") for cell in CELLS if any(row.case.cell == cell for row in rows)
        ]
    grid = torch.full((len(lines), len(columns)), float("nan"))
    unhealthy = torch.zeros(grid.shape, dtype=torch.bool)
    for row in rows:
        # A streaming step is a kind of inference: it stands before the inference line of its cell.
        mode = "inference" if row.case.mode == "streaming" else row.case.mode
        column = "streaming" if row.case.mode == "streaming" else row.case.shape
        place = lines.index((row.case.cell, mode)), columns.index(column)
        grid[place] = row.ratio
        unhealthy[place] = not row.healthy

    figure, axes = plt.subplots(
        figsize=(2.2 + 0.95 * len(columns), 1.7 + 0.5 * len(lines)), layout="constrained"
    )
    logarithm = torch.log2(grid)
    image = axes.imshow(
        logarithm.numpy(), aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0, vmin=-2, vmax=3.5)
    )
    axes.set_xticks(range(len(columns)))
    axes.set_xticklabels(
        [
            column.replace(" ", "\n") if column != "streaming" else "one step\nB1 H64"
            for column in columns
        ],
        fontsize=8,
    )
    axes.set_yticks(range(len(lines)), [f"{cell} {mode}" for cell, mode in lines], fontsize=9)
    for y in range(len(lines)):
        for x in range(len(columns)):
            ratio = grid[y, x].item()
            if not math.isnan(ratio):
                digits = 2 if ratio < 2 else 1 if ratio < 9.95 else 0
                color = "white" if not -1.4 < logarithm[y, x] < 2.4 else "black"
                text = f"{ratio:.{digits}f}" + ("?" if unhealthy[y, x] else "")
                axes.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
    note = "\n?: measured while a core was away" if unhealthy.any() else ""
    axes.set_title(title + note, fontsize=10)
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2, 3], pad=0.01)
    bar.ax.set_yticklabels(["¼x", "½x", "1x", "2x", "4x", "8x"], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare rnn_ext with torch.nn on this machine.", allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, 3 short samples: a smoke test"
    )
    parser.add_argument(
        "--cells",
        default=",".join(CELLS),
        metavar="RNN,LSTM,GRU",
        help="which cells (default: all)",
    )
    parser.add_argument(
        "--max-batch", type=int, metavar="B", help="leave out shapes with a larger batch"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--rounds", type=int, default=7, help="samples a side (default and least: 7)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="measure only peak memory")
    what.add_argument("--no-memory", action="store_true", help="measure only times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables for the docs")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="show changes against an older --json"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the ratios as a heat map")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.cells = tuple(name.strip().upper() for name in arguments.cells.split(","))
    unknown = set(arguments.cells) - set(CELLS)
    if unknown:
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    if arguments.threads < 1:
        parser.error("--threads must be at least 1")
    if arguments.rounds < 7:
        parser.error("--rounds must be at least 7: the median of fewer is not worth quoting")
    return arguments


def time_all(
    cases: Sequence[Case], threads: int, quick: bool, rounds: int
) -> tuple[Machine, list[Row], list[str]]:
    from probe import Probe

    probe = Probe()
    machine = measure(probe, threads, attempts=2 if quick else 5)
    print(f"limits: {describe_machine(machine)}\n\n{HEADER}")
    rows: list[Row] = []
    wrong: list[str] = []
    settings = (
        {"rounds": 3, "min_sample": 1e-3} if quick else {"rounds": rounds, "min_sample": 5e-3}
    )
    for case in cases:
        try:
            rows.append(time_case(case, machine, probe, **settings))
        except WrongResult as error:
            wrong.append(str(error))
            print(f"WRONG RESULT, not timed: {error}", flush=True)
        else:
            print(format_row(rows[-1]), flush=True)
    return machine, rows, wrong


def measure_memory(cases: Sequence[Case], threads: int) -> list[MemoryRow]:
    import memory

    print("\npeak memory of a training step beside weights and input, MB")
    print(f"{'':<25}{'torch.nn heap, resident':>19}  {'rnn_ext heap, resident':>19}{'ratio':>6}")
    rows = []
    with memory.heap_counter() as counter:
        for case in cases:
            theirs = memory.measure(case, BASELINE, counter, threads)
            ours = memory.measure(case, OURS, counter, threads)
            rows.append(
                MemoryRow(
                    case,
                    ours.ratio(theirs),
                    (theirs.heap, theirs.resident),
                    (ours.heap, ours.resident),
                )
            )
            print(format_memory(rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    older = json.loads(arguments.compare.read_text()) if arguments.compare else None
    cases = select(arguments.cells, arguments.max_batch, arguments.quick)

    machine, rows, wrong, memory_rows = None, [], [], []
    print(
        f"{cpu_name()}, {arguments.threads} threads, {rnn_ext._C.cpu_info()['isa']}, "
        f"torch {torch.__version__}"
    )
    if not arguments.memory:
        machine, rows, wrong = time_all(cases, arguments.threads, arguments.quick, arguments.rounds)
    if not arguments.no_memory:
        memory_rows = measure_memory([case for case in cases if case.training], arguments.threads)

    if rows:
        print("\ntimes faster than torch.nn, geometric means")
        print("\n".join(summary(rows)))
    verdicts = judge(rows, memory_rows)
    print("\nbars" + (" (a quick run: figures are not to be quoted)" if arguments.quick else ""))
    print("\n".join(map(str, verdicts)))
    unhealthy = sum(not row.healthy for row in rows)
    if unhealthy:
        print(
            f"{unhealthy} of {len(rows)} rows were measured while a core was away: "
            "repeat on a quiet machine, or with fewer --threads"
        )
    if any(row.share > 1 for row in rows):
        print(
            "rows above 100% of the roofline: its limits were measured while the machine was busy, "
            "the whole column is too high"
        )
    if older is not None:
        print(f"\nagainst {arguments.compare} ({older['date']})")
        print("\n".join(compare_with(older, rows)))

    if arguments.json:
        document = {
            **environment(machine),
            "quick": arguments.quick,
            "rows": [row_to_json(row) for row in rows],
            "memory": [{**asdict(row), "case": row.case.label} for row in memory_rows],
            "bars": [asdict(verdict) for verdict in verdicts],
            "wrong": wrong,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    title = (
        f"times faster than torch.nn {torch.__version__}, float32, "
        f"{arguments.threads} threads, {cpu_name()}"
    )
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(
            tables.document(title, machine, rows, memory_rows, verdicts), encoding="utf-8"
        )
    if arguments.png and rows:
        heat_map(rows, arguments.png, title)
    if wrong:
        print(f"\n{len(wrong)} cases gave WRONG RESULTS:\n" + "\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
