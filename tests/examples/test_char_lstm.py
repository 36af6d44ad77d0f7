"""The demo runs, and notices when what it claims is not so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import char_lstm
import common
import rnn_ext

SCRIPT = Path(char_lstm.__file__)


def test_char_lstm_quick(tmp_path):
    picture = tmp_path / "curves.png"
    command = [sys.executable, str(SCRIPT), "--quick", "--steps", "60"]
    command += ["--threads", "1", "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\nok ") == 3
    assert "FAILED" not in done.stdout
    assert "60/60" in done.stderr  # the progress bars
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_char_lstm_batches_are_shifted_by_one():
    data = torch.arange(100)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = char_lstm.draw_batch(data, 4, 7, generator)
    assert inputs.shape == (4, 7)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_char_lstm_text():
    text, data, alphabet = char_lstm.load_text()
    assert len(text) == len(data) > 300_000
    assert text.isascii()
    assert "".join(alphabet[i] for i in data[:200]) == text[:200]


def sampler_and_runs(apart: float, text: str = "The same"):
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
def test_char_lstm_notices_failed_claims(capsys, apart, text, final_loss, code):
    claims = char_lstm.Claims(final_loss=final_loss, difference=0.03)
    runs, samplers = sampler_and_runs(apart, text)
    assert char_lstm.report_claims(runs, samplers, claims) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_char_lstm_says_slower_when_it_is():
    assert common.describe_ratio({"torch.nn": 2.0, "rnn_ext": 1.0}) == "2.00x faster"
    assert common.describe_ratio({"torch.nn": 1.0, "rnn_ext": 2.0}) == "2.00x slower"
