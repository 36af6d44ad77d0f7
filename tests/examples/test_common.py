"""The helpers that the examples share."""

from __future__ import annotations

import pytest
import torch

import common


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_quick_replaces_defaults_but_not_what_was_asked_for():
    def parse(*argv: str):
        parser = common.parser("examples/some.py", "")
        parser.add_argument("--steps", type=int, default=100)
        parser.add_argument("--hidden", type=int, default=50)
        return common.parse(parser, argv, steps=10, hidden=5)

    full, quick, asked = parse(), parse("--quick"), parse("--quick", "--steps", "7")
    assert (full.steps, full.hidden) == (100, 50)
    assert (quick.steps, quick.hidden) == (10, 5)
    assert (asked.steps, asked.hidden) == (7, 5)
    assert full.plot.as_posix() == "out/some.png"
    parse("--seed", "3", "--threads", "2")
    assert torch.get_num_threads() == 2
    assert torch.initial_seed() == 3


def test_one_failed_claim_is_a_failed_run(capsys):
    assert common.report({"this": True, "that": True}) == 0
    assert common.report({"this": True, "that": False}) == 1
    assert capsys.readouterr().out.splitlines()[2:] == ["ok     this", "FAILED that"]


def test_calls_take_turns():
    calls = []
    times = common.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 5  # two of them warm up
    assert set(times) == {"a", "b"}
    assert all(milliseconds >= 0 for milliseconds in times.values())


def test_times_that_vary_are_called_so(capsys):
    common.warn_if_noisy([1.0, 1.0, 1.01, 1.0])
    assert capsys.readouterr().out == ""
    common.warn_if_noisy([1.0, 2.0, 1.0, 2.0])
    assert "vary a lot" in capsys.readouterr().out


def test_vocabulary():
    vocabulary = common.Vocabulary("hello")
    assert vocabulary.tokens == ["e", "h", "l", "o"]
    numbers = vocabulary.encode("hole")
    assert vocabulary.decode(numbers) == list("hole")
    assert torch.equal(vocabulary.one_hot(numbers).argmax(-1), numbers)
    assert common.Vocabulary("hello", keep_order=True).tokens == ["h", "e", "l", "o"]
    with pytest.raises(KeyError):
        vocabulary.encode("x")
