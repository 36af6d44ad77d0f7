"""Settings of the whole suite: the same examples in every run, one thread unless a test asks."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("rnn_ext", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("rnn_ext")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
