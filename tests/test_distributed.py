"""Two processes under torchrun train to the weights of one: see examples/distributed.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "distributed.py"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_to_the_weights_of_one(strategy: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(EXAMPLE), "--strategy", strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok {strategy}" in done.stdout
