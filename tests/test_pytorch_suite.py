"""The runner of PyTorch's own test files, on a small one that is written here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).parent / "pytorch_suite" / "run.py"
HEAD = """
import unittest
import torch
from torch import nn

class TestNN(unittest.TestCase):
"""
PASSING = """
    def test_rnn_runs(self):
        output, _ = nn.RNN(2, 3)(torch.zeros(4, 1, 2))
        self.assertEqual(tuple(output.shape), (4, 1, 3))

    def test_body(self):
        self.assertIs(nn.LSTM, torch.nn.modules.LSTM)

    @unittest.skip("no such machine")
    def test_gru_elsewhere(self):
        pass

    def test_linear(self):
        self.fail("not asked for")
"""
TORCH_ONLY = """
    def test_lstm_of_torch(self):
        self.assertTrue(nn.LSTM.__module__.startswith("torch."), "it is of rnn_ext")
"""


def run(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path.write_text(HEAD + text)
    command = [sys.executable, str(RUNNER), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compares_what_is_concerned(tmp_path: Path) -> None:
    done = run(tmp_path / "test_small.py", PASSING)
    assert done.returncode == 0, done.stderr
    assert "| TestNN.test_rnn_runs | passes | passes |" in done.stdout
    assert "| TestNN.test_body | passes | passes |" in done.stdout
    assert "| TestNN.test_gru_elsewhere | skipped | skipped | no such machine |" in done.stdout
    assert "test_linear" not in done.stdout


def test_fails_where_torch_passes(tmp_path: Path) -> None:
    done = run(tmp_path / "test_small.py", PASSING + TORCH_ONLY)
    assert done.returncode == 1, done.stderr
    assert "| TestNN.test_lstm_of_torch | passes | fails | AssertionError" in done.stdout
    assert "it is of rnn_ext" in done.stdout


def test_fails_where_nothing_ran(tmp_path: Path) -> None:
    done = run(tmp_path / "test_small.py", "    def test_linear(self):\n        pass\n")
    assert done.returncode == 1, done.stderr
