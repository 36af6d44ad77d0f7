"""The grid as pytest-benchmark cases: `python -m pytest benchmarks`.

One case for each peer, cell, shape and mode, grouped so that the peers stand beside each other. The
result is checked before it is timed. For ratios use report.py instead: it times the peers in turn,
here they run one after the other.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cases import select
from peers import BASELINE, PEERS, build_all
from rnn_ext._bench import Case, compare


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", select(), ids=lambda case: case.label.replace(" ", "-"))
def test_layer(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    sides = build_all(case, PEERS)
    wrong = [str(d) for d in compare(case, sides[peer], sides[BASELINE]) if not d.within]
    assert not wrong

    benchmark.group = case.label
    benchmark.extra_info["flops"] = case.flops
    with case.context():
        benchmark(sides[peer])
