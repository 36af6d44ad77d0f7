"""Peak memory of a call, in a fresh process for each side and shape (Linux, glibc).

The process builds the module and its input, runs a tiny layer of the same kind so that thread pools
and one-time tables exist, and only then starts to count. Weights and input are therefore not in the
figures. Outputs, activations kept for backward, scratch, gradients, and whatever a side keeps for
its next call (packed weights, compiled primitives) are. Two figures, because neither is enough
alone:

    heap      highest number of bytes asked for and not yet given back. The same in every run, but
              it counts pages that were never written.
    resident  what the first call left behind in anonymous pages, plus how far the kernel's
              high-water mark rises during a later call (median of several). What the machine really
              gave, but it moves by up to a megabyte with the allocator's state: no use for a layer
              that needs 300 kB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch

from peers import BASELINE, OURS, PEERS, build_all
from probe import compile_shared
from rnn_ext._bench import Case
from rows import MemoryRow

HEAP_COUNTER = Path(__file__).with_name("heap.c")
PR_SET_THP_DISABLE = 41
RESET_HIGH_WATER_MARK = "5"

# Above this many bytes the resident figure repeats within a few percent.
RESIDENT_IS_PRECISE = 8 << 20


@dataclass(frozen=True)
class Peak:
    """Bytes above what the process held before its first call."""

    heap: int
    resident: int

    def ratio(self, other: Peak) -> float:
        """This peak over the other: the worse of the figures to be trusted at this size."""
        if min(self.resident, other.resident) < RESIDENT_IS_PRECISE:
            return self.heap / other.heap
        return max(self.heap / other.heap, self.resident / other.resident)

    def beside(self, size: int) -> int:
        """What is left when `size` bytes are taken off, by the same choice."""
        if self.resident < RESIDENT_IS_PRECISE:
            return self.heap - size
        return max(self.heap, self.resident) - size


def output_bytes(case: Case) -> int:
    """Bytes of the output and the final states."""
    states = 2 if case.cell == "LSTM" else 1
    per_row = case.steps * case.directions + case.num_layers * case.directions * states
    return case.dtype.itemsize * case.batch * case.hidden_size * per_row


@contextmanager
def heap_counter() -> Iterator[Path]:
    """The compiled counter, for `measure`."""
    with tempfile.TemporaryDirectory() as folder:
        yield compile_shared(HEAP_COUNTER, folder, "-fno-builtin")


def measure(case: Case, peer: str, counter: Path, threads: int) -> Peak:
    """Run this file in a fresh process and read its figures."""
    fields = {name: value for name, value in asdict(case).items() if name != "dtype"}
    command = [
        sys.executable,
        __file__,
        "--peer",
        peer,
        "--threads",
        str(threads),
        json.dumps(fields),
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(counter),
        # Freed memory goes back to the kernel, or the high-water mark would not see it being used
        # again.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Peak(**json.loads(done.stdout))


def status(field: str) -> int:
    """One of the kernel's memory figures of this process, in bytes."""
    found = re.search(
        rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    if found is None:
        raise OSError(f"the kernel does not report {field}")
    return int(found[1]) << 10


def measure_here(case: Case, peer: str, repeats: int = 5) -> Peak:
    """Measure in this process, which was started with the heap counter and has run nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.heap_current.restype = libc.heap_peak.restype = ctypes.c_long
    if libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "huge pages could not be switched off")

    only = {peer: PEERS[peer]}
    tiny = replace(case, batch=2, steps=2, input_size=4, hidden_size=8)
    with tiny.context():
        build_all(tiny, only)[peer]()
    work = build_all(case, only)[peer]

    def call() -> None:
        with case.context():
            work()

    def settle() -> None:
        for tensor in (work.input, *work.parameters):
            tensor.grad = None
        gc.collect()
        libc.malloc_trim(0)

    settle()
    heap_before = libc.heap_current()
    pages_before = status("RssAnon")
    libc.heap_reset_peak()
    call()
    settle()
    kept = status("RssAnon") - pages_before
    rises = []
    for _ in range(repeats):
        settle()
        Path("/proc/self/clear_refs").write_text(RESET_HIGH_WATER_MARK)
        resident = status("VmRSS")
        call()
        rises.append(status("VmHWM") - resident)
    return Peak(libc.heap_peak() - heap_before, int(statistics.median(rises)) + kept)


def compare_peaks(case: Case, counter: Path, threads: int) -> MemoryRow:
    """A training step beside torch.nn's, inference beside its own outputs."""
    ours = measure(case, OURS, counter, threads)
    if not case.training:
        extra = ours.beside(output_bytes(case))
        return MemoryRow(case, astuple(ours), theirs=None, ratio=None, beside_outputs=extra)
    theirs = measure(case, BASELINE, counter, threads)
    return MemoryRow(case, astuple(ours), astuple(theirs), ours.ratio(theirs), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Child process of measure(); not meant to be run by hand."
    )
    parser.add_argument("--peer", required=True, choices=list(PEERS))
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("case", help="fields of a Case, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(asdict(measure_here(Case(**json.loads(arguments.case)), arguments.peer))))


if __name__ == "__main__":
    main()
