"""The examples run, and notice when what they claim is not so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnn_ext

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def char_lstm():
    spec = importlib.util.spec_from_file_location("char_lstm", EXAMPLES / "char_lstm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_char_lstm_quick(tmp_path):
    picture = tmp_path / "curves.png"
    command = [sys.executable, str(EXAMPLES / "char_lstm.py"), "--quick", "--steps", "60"]
    command += ["--threads", "1", "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\nok ") == 3
    assert "FAILED" not in done.stdout
    assert "60/60" in done.stderr  # the progress bars
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_char_lstm_batches_are_shifted_by_one(char_lstm):
    data = torch.arange(100)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = char_lstm.draw_batch(data, 4, 7, generator)
    assert inputs.shape == (4, 7)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_char_lstm_text(char_lstm):
    text, data, alphabet = char_lstm.load_text()
    assert len(text) == len(data) > 300_000
    assert text.isascii()
    assert "".join(alphabet[i] for i in data[:200]) == text[:200]


def sampler_and_runs(char_lstm, apart: float, text: str = "The same"):
    """What main() hands to report_claims, made by hand: losses near 1 that differ by `apart`."""
    model = char_lstm.CharModel(5, 4, rnn_ext.LSTM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runs = {
        "torch.nn": char_lstm.Run(model, optimizer, losses=[4.0] * 9 + [1.0]),
        "rnn_ext": char_lstm.Run(model, optimizer, losses=[4.0] * 9 + [1.0 + apart]),
    }
    samplers = {name: char_lstm.Sampler(model, "The x", 0) for name in runs}
    samplers["torch.nn"].text = "The same"
    samplers["rnn_ext"].text = text
    return runs, samplers


@pytest.mark.parametrize(
    ("apart", "text", "final_loss", "code"),
    [
        (0.02, "The same", 1.5, 0),
        (0.04, "The same", 1.5, 1),
        (0.02, "The other", 1.5, 1),
        (0.02, "The same", 1.01, 1),
        (float("nan"), "The same", 1.5, 1),
    ],
    ids=["all hold", "losses differ", "texts differ", "loss too high", "loss is NaN"],
)
def test_char_lstm_notices_failed_claims(char_lstm, capsys, apart, text, final_loss, code):
    claims = char_lstm.Claims(final_loss=final_loss, difference=0.03)
    runs, samplers = sampler_and_runs(char_lstm, apart, text)
    assert char_lstm.report_claims(runs, samplers, claims) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_char_lstm_says_slower_when_it_is(char_lstm):
    assert char_lstm.describe_ratio({"torch.nn": 2.0, "rnn_ext": 1.0}) == "2.00x faster"
    assert char_lstm.describe_ratio({"torch.nn": 1.0, "rnn_ext": 2.0}) == "2.00x slower"


def test_the_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(blocks[0], names)
    assert names["output"].shape == (16, 50, 256)
    assert isinstance(names["fast"][0], rnn_ext.GRU)
    assert type(names["back"][0]) is torch.nn.GRU
    assert names["back"][0].weight_hh_l0 is names["model"][0].weight_hh_l0
