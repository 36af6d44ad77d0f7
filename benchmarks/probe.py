"""Measure this machine: multiply-adds, reads from each level of memory, core-to-core signals."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("probe.c")


def compile_shared(source: Path, folder: str | Path, *flags: str) -> Path:
    """Compile one C file of this directory into a shared library in `folder`."""
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None:
        raise SystemExit(
            f"benchmarks: no C compiler to build {source.name} with; install gcc or set CC"
        )
    library = Path(folder, source.stem + ".so")
    command = [*compiler.split(), "-O3", "-fPIC", "-shared", "-pthread", *flags]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


class Probe:
    """The measurements of probe.c. Each runs for about `seconds` and uses threads of its own."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = compile_shared(SOURCE, folder, "-march=native", "-ffp-contract=fast")
            self._library = ctypes.CDLL(str(library))
        for name, arguments in {
            "probe_fma": [ctypes.c_int, ctypes.c_int, ctypes.c_double],
            "probe_read": [ctypes.c_int, ctypes.c_size_t, ctypes.c_double],
            "probe_handoff": [ctypes.c_double],
        }.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_double

    def fma(self, threads: int, element_bytes: int = 4, seconds: float = 0.02) -> float:
        """Multiply-add rate of all threads together, in flop/s (two per multiply-add)."""
        return self._checked(self._library.probe_fma(threads, element_bytes, seconds))

    def read(self, threads: int, bytes_per_thread: int, seconds: float = 0.05) -> float:
        """Read rate of all threads together, each from its own buffer, in byte/s."""
        return self._checked(self._library.probe_read(threads, bytes_per_thread, seconds))

    def handoff(self, seconds: float = 0.02) -> float:
        """Seconds from a store on one core to its sight on another."""
        return self._checked(self._library.probe_handoff(seconds))

    @staticmethod
    def _checked(value: float) -> float:
        if value < 0:
            raise MemoryError("the probe could not allocate its buffers or start its threads")
        return value
