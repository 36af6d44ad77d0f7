"""Compare rnn_ext with torch.nn, onnxruntime and OpenVINO on this machine: `make bench`.

Each row: check every side against float64, see that every core is free, then time the sides in turn
in this process (at least 5 ms a sample, median of at least 7). Last come the geometric means, and
each of the project's bars with `ok` or `falls short`. docs/performance.md explains the columns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

import rnn_ext
import tables
from bars import judge, summary
from cases import CELLS, bidirectional, grid, half_precision, streaming
from health import Patience, limits_are_good, measure_limits
from heatmap import heat_map
from peers import BASELINE, OURS, PEERS, RIVAL_NAMES, RIVALS, USUAL_RIVALS, Rival, yardsticks
from rnn_ext._bench import Case
from roofline import Machine, MachineProbe
from rows import MemoryRow, Results, Row, Verdict
from timing import WrongResult, time_case

# A change of our own time against an older run that is worth a mark.
NOTABLE_CHANGE = 0.10

JSON_SCHEMA = 2


@dataclass
class Run:
    """What was asked for, and what all sections share."""

    threads: int
    cells: tuple[str, ...]
    max_batch: int | None
    quick: bool
    rounds: int
    patience: Patience
    rivals: tuple[Rival, ...]

    @cached_property
    def probe(self) -> MachineProbe:
        from probe import Probe

        return Probe()

    @cached_property
    def machine(self) -> Machine:
        attempts = 2 if self.quick else 5
        machine = measure_limits(self.probe, self.threads, attempts, self.patience)
        print(f"limits: {describe_machine(machine)}", flush=True)
        return machine

    @property
    def surroundings(self) -> tuple[Machine, MachineProbe, Patience]:
        return self.machine, self.probe, self.patience

    @property
    def samples(self) -> dict[str, float]:
        if self.quick:
            return {"rounds": 3, "min_sample": 1e-3}
        return {"rounds": self.rounds, "min_sample": 5e-3}

    def grid(self) -> list[Case]:
        return grid(self.cells, self.max_batch, self.quick)

    def small_enough(self, cases: Sequence[Case]) -> list[Case]:
        """--max-batch, and with --quick only the first shape."""
        kept = [case for case in cases if case.batch <= (self.max_batch or case.batch)]
        return [case for case in kept if case.shape == kept[0].shape] if self.quick else kept


def attempt(case: Case, results: Results, work: Callable[[], str]) -> None:
    """Measure a case, and print its line, unless it computes something else."""
    try:
        print(work(), flush=True)
    except WrongResult as error:
        results.wrong.append(str(error))
        print(f"WRONG RESULT, not timed: {error}", flush=True)


def time_rows(run: Run, cases: Sequence[Case], rows: list[Row], results: Results) -> None:
    machine, probe, patience = run.surroundings
    columns = [rival.name for rival in run.rivals if any(map(rival.has, cases))]
    print(header(columns))

    def measure_row(case: Case) -> str:
        rivals = {rival.name: rival.build for rival in run.rivals if rival.has(case)}
        sides = {**PEERS, **rivals, **yardsticks(case)}
        rows.append(time_case(case, machine, probe, patience, sides, **run.samples))
        return format_row(rows[-1], columns)

    for case in cases:
        attempt(case, results, lambda case=case: measure_row(case))


def run_grid(run: Run, results: Results) -> None:
    print("\none step with its state handed in, T = 1")
    time_rows(run, streaming(run.cells, run.max_batch), results.streaming, results)
    print("\nthe grid")
    time_rows(run, run.grid(), results.grid, results)


def run_half(run: Run, results: Results) -> None:
    print("\nbfloat16")
    time_rows(run, half_precision(run.grid()), results.half, results)


def run_bidirectional(run: Run, results: Results) -> None:
    print("\nboth directions of one layer")
    time_rows(run, bidirectional(run.grid()), results.bidirectional, results)


def run_memory(run: Run, results: Results) -> None:
    import memory

    print("\npeak memory of a call above weights and input, MB")
    print(f"{'':<44}{'torch.nn heap, resident':>23}{'rnn_ext heap, resident':>24}{'ratio':>8}")
    with memory.heap_counter() as counter:
        for case in run.grid():
            results.memory.append(memory.compare_peaks(case, counter, run.threads))
            print(format_memory(results.memory[-1]), flush=True)


def run_scan(run: Run, results: Results) -> None:
    import scan

    hidden_sizes, batches, steps = scan.HIDDEN_SIZES, scan.BATCHES, scan.GROWTH_STEPS
    if run.quick:
        hidden_sizes, batches, steps = hidden_sizes[:4], batches[:4], (20, 200)
    batches = [batch for batch in batches if batch <= (run.max_batch or batch)]
    print(f"\nscan: {len(hidden_sizes)} hidden sizes x {len(batches)} batches")
    for case in scan.scanned_cases(run.cells):
        found = scan.scan(case, *run.surroundings, hidden_sizes, batches)
        results.scans.append(found)
        print(tables.scan_table(found), flush=True)
    for case in run.small_enough(scan.growth_cases(run.cells)):
        results.growths.append(scan.growth(case, *run.surroundings, steps))
    print("\n" + tables.growth_table(results.growths), flush=True)


def run_disturbed(run: Run, results: Results) -> None:
    import disturbed

    rounds = run.samples["rounds"]
    print(f"\n{'a busy neighbor on each core':<44}{'rnn_ext alone':>15}{'rnn_ext':>12}", end="")
    print(f"{'torch.nn':>12}{'slowdown':>10}")

    def measure_busy(case: Case) -> str:
        row = disturbed.time_busy(case, *run.surroundings, rounds)
        results.busy.append(row)
        return (
            f"{case.label:<44}{format_time(row.quiet):>15}{format_time(row.ours):>12}"
            f"{format_time(row.theirs):>12}{row.slowdown:>9.2f}x{mark(row.healthy)}"
        )

    def measure_stolen(case: Case) -> str:
        row = disturbed.time_stolen(case, *run.surroundings, rounds)
        results.stolen.append(row)
        return (
            f"{case.label:<44}{format_time(row.one_thread):>15}{format_time(row.ours):>12}"
            f"{row.ratio:>9.2f}x{mark(row.healthy)}"
        )

    for case in run.small_enough(disturbed.busy_cases(run.cells)):
        attempt(case, results, lambda case=case: measure_busy(case))
    print(f"\n{'the second core stolen':<44}{'one thread':>15}{'all threads':>12}{'ratio':>10}")
    try:
        for case in run.small_enough(disturbed.stolen_cases(run.cells)):
            attempt(case, results, lambda case=case: measure_stolen(case))
    except disturbed.CannotDisturb as reason:
        results.impossible.append(Verdict("stolen core", str(reason), "no verdict"))
        print(f"not measured: {reason}")


def run_avx2(run: Run, results: Results) -> None:
    import avx2

    print("\nthe grid limited to AVX2, in a process of its own", flush=True)
    if "avx2" not in rnn_ext._C.cpu_info()["available"]:
        reason = "this processor has no AVX2, or it was not built"
        results.impossible.append(Verdict("forced AVX2", reason, "no verdict"))
        print(f"not measured: {reason}")
        return
    options = ["--threads", str(run.threads), "--cells", ",".join(run.cells)]
    options += ["--rounds", str(run.rounds), "--patience", str(max(run.patience.left, 0.0))]
    options += ["--quick"] if run.quick else []
    options += ["--max-batch", str(run.max_batch)] if run.max_batch else []
    rows, wrong = avx2.time_limited(Path(__file__), options)
    results.avx2 += rows
    results.wrong += [f"limited to AVX2: {line}" for line in wrong]


# In the order in which they run when none is asked for by name.
SECTIONS: dict[str, tuple[str, Callable[[Run, Results], None]]] = {
    "grid": ("streaming steps and the grid in float32", run_grid),
    "bf16": ("the grid in bfloat16", run_half),
    "bidirectional": ("both directions of a layer against two single ones", run_bidirectional),
    "memory": ("peak memory", run_memory),
    "scan": ("every size and batch, and long sequences: is there a cliff?", run_scan),
    "disturbed": ("with busy neighbors, and with a core taken away", run_disturbed),
    "avx2": ("the grid with both sides limited to AVX2", run_avx2),
}
NEED_NO_LIMITS = {"memory", "avx2"}


def format_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def mark(healthy: bool) -> str:
    return "" if healthy else "  unhealthy"


def format_share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def header(rivals: Sequence[str]) -> str:
    """Above the rows. Ratios are against torch.nn and, where others are timed, the best of all."""
    return (
        f"{'case':<44}{BASELINE:>12}"
        + "".join(f"{name:>14}" for name in rivals)
        + f"{OURS:>12}{'ratio':>9}"
        + (f"{'to best':>9}" if rivals else "")
        + f"{'spread':>8}{'GFLOP/s':>9}{'of peak':>9}{'roofline':>9}{'cores':>7}{'answer':>11}"
    )


def format_row(row: Row, rivals: Sequence[str] = ()) -> str:
    cores, answer = "-", "-"
    if row.health:
        cores, answer = f"{row.health.fma:.2f}", f"{row.health.handoff * 1e6:.2f} µs"
    beside = [
        f"{name} {format_time(seconds)}"
        for name, seconds in row.times.items()
        if name != OURS and name not in RIVAL_NAMES
    ]
    return (
        f"{row.case.label:<44}{format_time(row.theirs):>12}"
        + "".join(f"{format_time(row.times.get(name)):>14}" for name in rivals)
        + f"{format_time(row.ours):>12}{row.ratio:>8.2f}x"
        + (f"{row.best_ratio:>8.2f}x" if rivals else "")
        + f"{row.spread:>8.0%}{row.rate / 1e9:>9.1f}{format_share(row.peak_share):>9}"
        + f"{format_share(row.share):>9}{cores:>7}{answer:>11}"
        + "".join(f"  {text}" for text in beside)
        + mark(row.healthy)
    )


def format_memory(row: MemoryRow) -> str:
    def megabytes(peak: tuple[int, int] | None) -> str:
        return "-" if peak is None else f"{peak[0] / 1e6:9.2f} {peak[1] / 1e6:9.2f}"

    if row.ratio is None:
        last = f"  {row.beside_outputs / 1e6:.2f} MB beside the outputs"
    else:
        last = f"{row.ratio:>8.2f}"
    return f"{row.case.label:<44}{megabytes(row.theirs):>23}{megabytes(row.ours):>24}{last}"


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
            **{rival.name: rival.version for rival in RIVALS.values()},
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
        + (
            ""
            if limits_are_good(machine)
            else "; measured while a core was away: shares of them flatter"
        )
    )


def compare_with(old: Mapping[str, object], rows: Sequence[Row]) -> list[str]:
    """Our time and ratio beside those of an older run, of any schema, for every case in both."""
    before = {entry["label"]: entry for entry in old["rows"]}
    lines = []
    for row in rows:
        entry = before.get(row.case.label)
        if entry is None:
            continue
        change = row.ours / entry["rnn_ext_seconds"] - 1
        note = "" if abs(change) < NOTABLE_CHANGE else "  slower" if change > 0 else "  faster"
        lines.append(
            f"{row.case.label:<44}{format_time(entry['rnn_ext_seconds']):>12} -> "
            f"{format_time(row.ours):>10}  ({change:+.0%}), "
            f"ratio {entry['ratio']:.2f}x -> {row.ratio:.2f}x{note}"
        )
    return lines or ["no case is in both runs"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare rnn_ext with torch.nn and others on this machine.", allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="few shapes, 3 short samples: a smoke test"
    )
    parser.add_argument(
        "--cells",
        default=",".join(CELLS),
        metavar="RNN,LSTM,GRU",
        help="which cells (default: all)",
    )
    parser.add_argument(
        "--peers",
        default=",".join(["nn", *USUAL_RIVALS]),
        metavar=",".join(["nn", *RIVALS]),
        help="whom to compare with, torch.nn always (default: %(default)s; compile is a Python "
        "loop over a cell under torch.compile: minutes of compiling)",
    )
    parser.add_argument(
        "--max-batch", type=int, metavar="B", help="leave out shapes with a larger batch"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--rounds", type=int, default=7, help="samples a side (default and least: 7)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        metavar="S",
        help="seconds to wait for, and repeat on, a machine that others use (default: 300; "
        "10 with --quick)",
    )
    sections = parser.add_argument_group("what to measure (default: everything)")
    for name, (text, _) in SECTIONS.items():
        sections.add_argument(
            f"--{name}", dest="sections", action="append_const", const=name, help=text
        )
    parser.add_argument("--no-bars", action="store_true", help="leave out geometric means and bars")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables for the docs")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="show changes against an older --json"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the ratios as a heat map")
    return parser


def split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.cells = tuple(name.upper() for name in split_names(arguments.cells))
    arguments.peers = split_names(arguments.peers)
    for what, names, known in (
        ("cells", arguments.cells, CELLS),
        ("peers", arguments.peers, ("nn", *RIVALS)),
    ):
        unknown = set(names) - set(known)
        if unknown:
            given = ", ".join(sorted(unknown))
            parser.error(f"unknown {what} {given}; there are {', '.join(known)}")
    if arguments.threads < 1:
        parser.error("--threads must be at least 1")
    if arguments.rounds < 7:
        parser.error("--rounds must be at least 7: the median of fewer is not worth quoting")
    if arguments.patience is None:
        arguments.patience = 10.0 if arguments.quick else 300.0
    return arguments


def measure_all(run: Run, sections: Sequence[str], results: Results) -> Machine | None:
    """Fill in the results; the machine's limits, if any section needs them."""
    machine = run.machine if set(sections) - NEED_NO_LIMITS else None
    for name, (_, measure_section) in SECTIONS.items():
        if name in sections:
            measure_section(run, results)
    return machine


def print_bars(results: Results, verdicts: Sequence[Verdict], quick: bool) -> None:
    if results.grid:
        print("\ntimes faster than torch.nn, geometric means")
        print("\n".join(summary(results.grid)))
    print("\nbars" + (" (a quick run: figures are not to be quoted)" if quick else ""))
    print("\n".join(map(str, verdicts)))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    older = json.loads(arguments.compare.read_text()) if arguments.compare else None
    wanted = [rival for key, rival in RIVALS.items() if key in arguments.peers]
    present = tuple(rival for rival in wanted if rival.installed)
    run = Run(
        arguments.threads,
        arguments.cells,
        arguments.max_batch,
        arguments.quick,
        arguments.rounds,
        Patience(arguments.patience),
        present,
    )
    results = Results(
        absent=[RIVALS[key].name for key in USUAL_RIVALS if RIVALS[key] not in present]
    )
    print(
        f"{cpu_name()}, {arguments.threads} threads, {rnn_ext._C.cpu_info()['isa']}, "
        f"torch {torch.__version__}"
        + "".join(f", {rival.name} {rival.version}" for rival in present if rival.packages)
    )
    for rival in wanted:
        if rival not in present:
            print(f"{rival.name} is absent: pip install -r requirements-bench.txt brings it")
    machine = measure_all(run, arguments.sections or list(SECTIONS), results)

    verdicts = judge(results)
    if not arguments.no_bars:
        print_bars(results, verdicts, arguments.quick)
    unhealthy = sum(not row.healthy for row in results.timed)
    if unhealthy:
        print(
            f"{unhealthy} of {len(results.timed)} rows were measured while a core was away: "
            "repeat on a quiet machine, or with fewer --threads"
        )
    if any(row.share is not None and row.share > 1 for row in results.timed):
        print(
            "rows above 100% of the roofline: its limits were measured while the machine was busy, "
            "the whole column is too high"
        )
    if older is not None:
        print(f"\nagainst {arguments.compare} ({older['date']})")
        print("\n".join(compare_with(older, results.timed)))

    if arguments.json:
        document = {
            **environment(machine),
            "quick": arguments.quick,
            **results.to_json(),
            "bars": [asdict(verdict) for verdict in verdicts],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    title = f"torch.nn {torch.__version__}, float32, {arguments.threads} threads, {cpu_name()}"
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(
            tables.document(f"times faster than {title}", machine, results, verdicts),
            encoding="utf-8",
        )
    if arguments.png and results.grid:
        heat_map([*results.streaming, *results.grid], arguments.png, title)
    if results.wrong:
        print(f"\n{len(results.wrong)} cases gave WRONG RESULTS:\n" + "\n".join(results.wrong))
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
