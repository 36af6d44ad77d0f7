"""Each instruction set of this machine, forced: right results, and a wrong name is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rnn_ext
from helpers import CELLS, Config, check
from rnn_ext import _C

AVAILABLE = tuple(_C.cpu_info()["available"])
VARIABLE = "RNN_EXT_CPU_ISA"

each_isa = pytest.mark.parametrize("isa", AVAILABLE)
each_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture
def forced(isa: str) -> Iterator[str]:
    selected = _C.cpu_info()["isa"]
    _C.set_cpu_isa(isa)
    yield isa
    _C.set_cpu_isa(selected)


def run_python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the same rnn_ext."""
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment["PYTHONPATH"] = str(Path(rnn_ext.__file__).parents[1])
    if isa is not None:
        environment[VARIABLE] = isa
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_is_available() -> None:
    built = _C.build_info()["isas"]
    assert set(AVAILABLE) <= set(built)
    assert AVAILABLE[0] == "scalar"
    if VARIABLE not in os.environ:
        assert _C.cpu_info()["isa"] == AVAILABLE[-1], "the best one is not the default"


@each_isa
@pytest.mark.usefixtures("forced")
def test_selected(isa: str) -> None:
    assert _C.cpu_info()["isa"] == isa
    plan = _C.plan("lstm", 20, 16, 64, 64)
    assert plan["isa"] == isa


@each_isa
@each_cell
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=["f32", "f64", "bf16", "f16"],
)
@pytest.mark.usefixtures("forced")
def test_forced(cell: str, dtype: torch.dtype) -> None:
    """Shapes on both sides of every vector width, small batch and large, ragged too."""
    common = {"num_layers": 2, "bidirectional": True, "dtype": dtype}
    for config in (
        Config(cell, **common),
        Config(cell, input_size=19, hidden_size=37, batch=1, **common),
        Config(cell, input_size=33, hidden_size=21, batch=18, steps=3, **common),
        Config(cell, input_size=16, hidden_size=32, lengths=(3, 9, 1, 5), **common),
    ):
        check(config)


@each_isa
@pytest.mark.usefixtures("forced")
def test_forced_projection() -> None:
    check(Config("lstm", hidden_size=37, proj_size=19, num_layers=2, bidirectional=True, batch=9))


@each_isa
def test_environment_variable(isa: str) -> None:
    code = "import rnn_ext; print(rnn_ext._C.cpu_info()['isa'])"
    result = run_python(code, isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_environment_variable_with_an_unknown_name() -> None:
    result = run_python("import rnn_ext", "sse9")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    assert VARIABLE in message
    assert "sse9" in message
    assert all(isa in message for isa in AVAILABLE)


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx2 "])
def test_unknown_name(name: str) -> None:
    selected = _C.cpu_info()["isa"]
    with pytest.raises(ValueError, match="not available on this machine; choose from: scalar"):
        _C.set_cpu_isa(name)
    assert _C.cpu_info()["isa"] == selected
