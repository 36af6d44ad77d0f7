"""The grid with both sides limited to AVX2: `python benchmarks/report.py --avx2`.

Instruction sets are chosen when a library is loaded, so the grid runs in a process of its own. MKL,
which torch.nn's GRU and RNN call for their products, has no such switch on every processor and
keeps its own choice: if that matters, it is in torch.nn's favor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rows import Row

LIMITED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "RNN_EXT_CPU_ISA": "avx2",
}


def time_limited(report: Path, options: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Rows of the grid and wrong results, from a run of the report in such a process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "avx2.json")
        command = [sys.executable, str(report), "--grid", "--peers", "nn", "--no-bars"]
        command += ["--json", str(out)]
        done = subprocess.run([*command, *options], env={**os.environ, **LIMITED}, check=False)
        if not out.exists():
            raise SystemExit(f"benchmarks: the run limited to AVX2 ended with {done.returncode}")
        document = json.loads(out.read_text())
    if document["isa"] != "avx2":
        raise SystemExit(f"benchmarks: the run limited to AVX2 used {document['isa']}")
    rows = [Row.from_json(entry) for entry in document["rows"]]
    return [row for row in rows if row.case.mode != "streaming"], document["wrong"]
