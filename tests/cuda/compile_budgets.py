"""Compiles the CUDA engine for every architecture and holds the compiler's report to its budgets.

    python tests/cuda/compile_budgets.py [--archs 80 90] [--types Float16 BFloat16] [--jobs 2]

Needs nvcc and no GPU. Warnings are errors. For every kernel and architecture:

* nothing is spilled; persistent kernels have no stack either, and no static shared memory, which
  the plan would not know of;
* as many blocks of a persistent kernel find room in the registers of a multiprocessor as the plan
  counts on (kBlocksByRegisters of csrc/cuda/tiles.h);
* persistent kernels multiply on tensor cores, but for those cut for plain multiply-adds, and those
  of clusters meet and store to each other as clusters do (read off the PTX);
* the objects of all types together are below 40 MB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (75, 80, 86, 89, 90, 100, 120)
# Persistent kernels of each type, forward and backward: 4 cells (relu and tanh are two) in each cut
# of csrc/cuda/tiles.h, by both exchanges. Half precision has a wide cut of LSTM forward.
TYPES = {"float": (16, 16), "double": (8, 8), "Float16": (10, 8), "BFloat16": (10, 8)}
REGISTERS = 65536  # of a multiprocessor
MAX_BYTES = 40_000_000


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    arch: int
    registers: int
    spilled: int  # bytes of stores and loads
    stack: int
    shared: int  # static

    @property
    def is_persistent(self) -> bool:
        return "persistent_" in self.name


def constant(name: str) -> int:
    """An integer constant of csrc/cuda/tiles.h, which may be a product of others."""
    text = (ROOT / "csrc/cuda/tiles.h").read_text()
    match = re.search(rf"constexpr int {name} = ([^;]+);", text)
    assert match, f"tiles.h has no constant {name}"
    factors = [part.strip() for part in match[1].split("*")]
    product = 1
    for factor in factors:
        product *= int(factor) if factor.isdigit() else constant(factor)
    return product


def parse(report: str) -> list[Kernel]:
    """The kernels in what `nvcc -Xptxas -v` has printed."""
    entries = re.split(r"Compiling entry function '", report)[1:]
    kernels = []
    for entry in entries:
        head = re.match(r"(\w+)' for 'sm_(\d+)a?'", entry)
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        registers = re.search(r"Used (\d+) registers", entry)
        if not (head and stack and registers):
            raise ValueError(f"this report is not understood: {entry[:500]}")
        shared = re.search(r"(\d+) bytes smem", entry)
        kernels.append(
            Kernel(
                name=head[1],
                arch=int(head[2]),
                registers=int(registers[1]),
                spilled=int(stack[2]) + int(stack[3]),
                stack=int(stack[1]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return kernels


def violations(kernels: list[Kernel], archs: list[int], counts: tuple[int, int]) -> list[str]:
    """What is over its budget, or not there, among the kernels of one type."""
    found = []
    threads, blocks = constant("kThreads"), constant("kBlocksByRegisters")
    for k in kernels:
        where = f"{k.name} for sm_{k.arch}"
        if k.spilled:
            found.append(f"{k.spilled} bytes spilled in {where}")
        if not k.is_persistent:
            continue
        if k.stack:
            found.append(f"a stack of {k.stack} bytes in {where}")
        if k.shared:
            found.append(f"{k.shared} bytes of static shared memory in {where}")
        # Registers are given out to warps in units of 256, 8 for each lane.
        if -(-k.registers // 8) * 8 * threads * blocks > REGISTERS:
            found.append(f"{k.registers} registers, too many for {blocks} blocks, in {where}")
    for arch in archs:
        for direction, expected in zip(("forward", "backward"), counts, strict=True):
            name = f"persistent_{direction}_kernel"
            count = sum(k.arch == arch and name in k.name for k in kernels)
            if count != expected:
                found.append(f"{count} instead of {expected} kernels {name} for sm_{arch}")
    return found


MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.(f16|bf16|tf32)\.")
CLUSTER = [
    re.compile(text) for text in (r"barrier\.cluster\.", r"mapa\.", r"st\.shared::cluster\.v4\.")
]


def missing_instructions(ptx: str, arch: int) -> list[str]:
    """The persistent kernels in this PTX, and what they should have and lack.

    Tensor cores: all but Cut::kLanes (0). Clusters: Exchange::kCluster (1), which has no code below
    9.0.
    """
    bodies = re.split(r"\.entry\s+", ptx)[1:]
    persistent = {body.split("(")[0]: body for body in bodies}
    persistent = {name: body for name, body in persistent.items() if "persistent_" in name}
    if not persistent:
        return ["(there is no persistent kernel)"]
    found = []
    for name, body in persistent.items():
        in_clusters = "ExchangeE1E" in name
        if in_clusters and arch < 90:
            continue
        needed = [*(CLUSTER if in_clusters else ()), *(() if "CutE0E" in name else (MMA,))]
        found += [f"no {p.pattern} in {name}" for p in needed if not p.search(body)]
    return found


def compile_type(name: str, archs: list[int], folder: Path) -> tuple[str, int, list[str]]:
    """Returns the compiler's report, the object's size and what is wrong."""
    kept = folder / name
    kept.mkdir()
    target = kept / "engine.o"
    command = [
        *("nvcc", "-std=c++20", "-O3", "-DNDEBUG", f"-DRNN_EXT_CUDA_TYPE={name}"),
        "--compress-mode=size",  # as CMakeLists.txt has it
        *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC", "-Xptxas", "-v"),
        *(f"-I{ROOT / 'csrc'}", "--keep", "--keep-dir", str(kept)),
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs),
        *("-c", str(ROOT / "csrc/cuda/engine.cu"), "-o", str(target)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    report = run.stdout + run.stderr
    if run.returncode:
        return report, 0, [f"nvcc failed for {name}:\n{report[-4000:]}"]
    found = violations(parse(report), archs, TYPES[name])
    for arch in archs:
        # 7.5 has not all of these instructions: the plan takes no tensor cores there.
        if arch < 80:
            continue
        ptx = [p for p in kept.glob("*.ptx") if f"compute_{arch}." in p.name]
        if len(archs) == 1:
            ptx = list(kept.glob("*.ptx"))
        if len(ptx) != 1:
            found.append(f"{len(ptx)} instead of 1 PTX file of {name} for sm_{arch}")
        for path in ptx:
            missing = missing_instructions(path.read_text(), arch)
            found += [f"{line} for sm_{arch}" for line in missing]
    return report, target.stat().st_size, found


def summary(kernels: list[Kernel]) -> str:
    """The registers of the persistent kernels, largest over cells."""
    persistent = [k for k in kernels if k.is_persistent]
    registers = {
        arch: max(k.registers for k in persistent if k.arch == arch)
        for arch in sorted({k.arch for k in persistent})
    }
    text = ", ".join(f"sm_{arch} {count}" for arch, count in registers.items())
    return f"{len(kernels)} kernels; registers of the persistent ones at most {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    if not shutil.which("nvcc"):
        print("nvcc is not in PATH: install the CUDA toolkit", file=sys.stderr)
        return 2
    begin = time.monotonic()
    total, found = 0, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        compiled = pool.map(
            lambda name: compile_type(name, arguments.archs, Path(folder)), arguments.types
        )
        for name, (report, size, wrong) in zip(arguments.types, compiled, strict=True):
            total += size
            found += wrong
            print(f"{name}: {size} bytes, {summary(parse(report))}", flush=True)
    if total > MAX_BYTES:
        found.append(f"the objects have {total} bytes, more than {MAX_BYTES}")
    print(f"{total} bytes for {len(arguments.archs)} architectures, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    for line in found:
        print(f"FAILED: {line}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
