"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import rnn_ext

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(blocks[0], names)
    assert names["output"].shape == (16, 50, 256)
    assert isinstance(names["fast"][0], rnn_ext.GRU)
    assert type(names["back"][0]) is torch.nn.GRU
    assert names["back"][0].weight_hh_l0 is names["model"][0].weight_hh_l0
    exec(blocks[1], names)
    assert names["output"].shape == (50, 16, 256)
    assert names["lstm"].layer_norm
