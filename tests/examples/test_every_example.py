"""Every example runs with --quick as a user would run it, and fails when its claim does."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import common

EXAMPLES = Path(common.__file__).parent
# The number of claims that each makes; char_lstm and distributed have tests of their own.
CLAIMS = {
    "numpy_char_rnn": 3,
    "char_rnn": 1,
    "truncated_bptt": 3,
    "hand_written_rnn": 2,
    "finish_the_sentence": 2,
    "shapes": 5,
    "digit_rows": 6,
    "sentence_classification": 1,
    "hihello": 1,
    "long_sentence": 2,
    "variable_lengths": 5,
    "forecast": 2,
    "vowels": 1,
}


def test_every_example_is_listed_here_and_in_the_index():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    assert scripts == {*CLAIMS, "char_lstm", "distributed"}
    index = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"python examples/(\w+)\.py", index)) == scripts


@pytest.mark.parametrize("name", CLAIMS)
def test_quick_run_holds_its_claims(name, tmp_path):
    picture = tmp_path / "new" / "picture.png"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--threads", "1"]
    done = subprocess.run([*command, "--plot", str(picture)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == CLAIMS[name]
    assert not any(line.startswith("FAILED") for line in lines)
    assert "100%" in done.stderr  # the progress bar
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "too_little"),
    [
        ("numpy_char_rnn", ["--steps", "100"]),
        ("char_rnn", ["--epochs", "3"]),
        ("truncated_bptt", ["--epochs", "3"]),
        ("finish_the_sentence", ["--steps", "10"]),
        ("digit_rows", ["--epochs", "1", "--hidden", "4"]),
        ("sentence_classification", ["--epochs", "1", "--learning-rate", "0"]),
        ("hihello", ["--steps", "2"]),
        ("long_sentence", ["--epochs", "3"]),
        ("variable_lengths", ["--steps", "20", "--learning-rate", "0"]),
        ("forecast", ["--epochs", "1", "--learning-rate", "0"]),
        ("vowels", ["--epochs", "1"]),
    ],
)
def test_a_run_that_learned_too_little_fails(name, too_little, tmp_path, capsys):
    main = importlib.import_module(name).main
    picture = tmp_path / "picture.png"
    assert main(["--quick", *too_little, "--plot", str(picture)]) == 1
    assert "FAILED" in capsys.readouterr().out
