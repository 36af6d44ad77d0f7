"""The fastest any program could run a case on this machine.

The floor of a case is the cheapest of three ways to use n threads, each charged only for what
cannot be avoided:

    max(flops / multiply-add peak, bytes of W_hh / bandwidth of the level that holds them) + waits

    one thread    peak and bandwidth of one core; all of W_hh each step; no waits
    hidden split  n cores; each reads its n-th part of W_hh each step; every step of every pass
                  needs what the other cores have computed: one core-to-core signal is waited for
    batch split   n cores; each reads all of W_hh each step for its own rows; no waits (batch >= n)

W_hh has to be read again in every step, because a step needs the one before; training reads it in
two passes. Everything else is touched once, can be prefetched, and is left out, and so are the
activations: the floor is lower than anything real, and the share of it (floor / time) is never
flattered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from rnn_ext._bench import NUM_GATES, Case

CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")


class MachineProbe(Protocol):
    """What is needed of probe.Probe."""

    def fma(self, threads: int, element_bytes: int = 4, seconds: float = 0.02) -> float: ...
    def read(self, threads: int, bytes_per_thread: int, seconds: float = 0.05) -> float: ...
    def handoff(self, seconds: float = 0.02) -> float: ...


@dataclass(frozen=True)
class Level:
    """One level of memory: its size, and the read rate of one and of all threads in byte/s."""

    name: str
    size: float
    one_thread: float
    all_threads: float


@dataclass(frozen=True)
class Machine:
    """Measured limits with a given number of threads, in flop/s and seconds."""

    threads: int
    fma_one_thread: float
    fma_all_threads: float
    sgemm: float
    handoff: float
    levels: tuple[Level, ...]

    @property
    def peak(self) -> float:
        return max(self.fma_all_threads, self.sgemm)

    def best(self, other: Machine) -> Machine:
        """The higher rate of both in everything: a limit is what was possible once."""
        return replace(
            self,
            fma_one_thread=max(self.fma_one_thread, other.fma_one_thread),
            fma_all_threads=max(self.fma_all_threads, other.fma_all_threads),
            sgemm=max(self.sgemm, other.sgemm),
            handoff=min(self.handoff, other.handoff),
            levels=tuple(
                replace(
                    mine,
                    one_thread=max(mine.one_thread, theirs.one_thread),
                    all_threads=max(mine.all_threads, theirs.all_threads),
                )
                for mine, theirs in zip(self.levels, other.levels, strict=True)
            ),
        )

    def level_of(self, size: float) -> Level:
        return next((level for level in self.levels if size <= level.size), self.levels[-1])


def cache_sizes() -> list[int]:
    """Sizes in bytes of one core's data caches, innermost first, as the kernel reports them."""
    sizes = []
    for index in sorted(CACHE_SIZES.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            sizes.append(int((index / "size").read_text().strip().removesuffix("K")) << 10)
    # Inside some virtual machines the kernel reports nothing: a common, modest core is assumed
    # then.
    return sizes or [32 << 10, 1 << 20, 32 << 20]


def best_sgemm(sizes: tuple[int, ...] = (512, 1024, 1536, 2048), attempts: int = 5) -> float:
    """The best rate of torch's own matrix product with the current threads, in flop/s."""
    best = 0.0
    for size in sizes:
        a, b = torch.randn(size, size), torch.randn(size, size)
        out = torch.empty(size, size)
        for _ in range(attempts):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(probe: MachineProbe, threads: int, attempts: int = 5) -> Machine:
    """Best of several attempts: a limit is what the machine can do when left alone."""
    levels = []
    caches = cache_sizes()
    for number, size in enumerate([*caches, 0], start=1):
        if size == 0:
            name, buffer, size = "DRAM", min(4 * caches[-1], 256 << 20), float("inf")
        elif number < len(caches) or len(caches) == 1:
            name, buffer = f"L{number}", size // 2
        else:
            # The last level is shared: all threads' buffers together must fit, each beyond the
            # level before.
            name, buffer = f"L{number}", max(size // (2 * threads), 2 * caches[-2])
        one = max(probe.read(1, buffer) for _ in range(attempts))
        every = max(probe.read(threads, buffer) for _ in range(attempts))
        levels.append(Level(name, size, one, every))
    one_thread = max(probe.fma(1) for _ in range(attempts))
    all_threads = max(probe.fma(threads) for _ in range(attempts))
    return Machine(
        threads=threads,
        # Of several cores at once one has done the average at least.
        fma_one_thread=max(one_thread, all_threads / threads),
        fma_all_threads=all_threads,
        sgemm=best_sgemm(attempts=attempts),
        handoff=min(probe.handoff() for _ in range(4 * attempts)),
        levels=tuple(levels),
    )


def floor_seconds(case: Case, machine: Machine) -> float | None:
    """The time no program can beat on this machine (top of this file).

    None for what it is not defined for: it knows one layer, one direction and float32.
    """
    if case.dtype != torch.float32 or case.num_layers != 1 or case.bidirectional or case.proj_size:
        return None
    passes = 2 if case.training else 1
    weight_bytes = 4 * NUM_GATES[case.cell] * case.hidden_size**2
    reads = weight_bytes * case.steps * passes
    whole = machine.level_of(weight_bytes)
    part = machine.level_of(weight_bytes / machine.threads)
    waits = case.steps * passes * machine.handoff if machine.threads > 1 else 0.0
    ways = [
        max(case.flops / machine.fma_one_thread, reads / whole.one_thread),
        max(case.flops / machine.peak, reads / part.all_threads) + waits,
    ]
    if case.batch >= machine.threads:
        # Each thread reads everything: the rate of all threads together is shared by that many
        # readers.
        ways.append(max(case.flops / machine.peak, reads * machine.threads / whole.all_threads))
    return min(ways)
