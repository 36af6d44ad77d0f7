"""python -m rnn_ext info | check | bench, and the measuring code they are made of."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rnn_ext
from rnn_ext import _cli
from rnn_ext._bench import (
    WARM_UP,
    Case,
    Timing,
    Workload,
    build_pair,
    compare,
    interleave,
    relative_error,
    repetitions,
)


@pytest.fixture(autouse=True)
def keep_threads():
    """Commands may set the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_off(method: Callable[..., tuple[object, Tensor]]) -> Callable[..., tuple[object, Tensor]]:
    """A forward of RNN or GRU whose final state is wrong in the fourth digit."""

    def forward(*arguments: object, **keywords: object) -> tuple[object, Tensor]:
        output, h_n = method(*arguments, **keywords)
        return output, h_n * 1.001

    return forward


# info


def test_info_names_the_build_and_the_machine(capsys):
    assert _cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for part in (rnn_ext.__version__, torch.__version__, rnn_ext._C.cpu_info()["isa"]):
        assert part in out


def test_threads_option_sets_torchs_threads(capsys):
    assert _cli.main(["info", "--threads", "1"]) == 0
    assert torch.get_num_threads() == 1
    assert rnn_ext._C.cpu_info()["num_threads"] == 1


def test_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rnn_ext", "info"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("rnn_ext", run_name="__main__")
    assert stop.value.code == 0
    assert rnn_ext.__version__ in capsys.readouterr().out


# check


def test_check_passes(capsys):
    assert _cli.main(["check", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "all results agree" in out
    assert "WRONG" not in out
    for dtype in _cli.DTYPES:
        assert out.count(f" {dtype} ") == 5


def test_check_finds_a_wrong_result(capsys, monkeypatch):
    monkeypatch.setattr(rnn_ext.GRU, "forward", one_off(rnn_ext.GRU.forward))
    monkeypatch.setattr(_cli, "DTYPES", {"float32": torch.float32})
    assert _cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "GRU B3 T11 I7 H19 inference: h_n: relative error 1.00e-03" in out
    assert "differ from torch.nn" in out
    assert [line[:3] for line in out.splitlines() if "WRONG" in line] == ["GRU"]


# bench


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cell", "rnn", "--nonlinearity", "relu"],
        ["--cell", "lstm", "--layers", "3", "--proj", "3", "--explain"],
        ["--cell", "gru", "--training", "--bidirectional", "--layers", "2", "--explain"],
        ["--cell", "gru", "--dtype", "bfloat16", "--explain"],
        ["--cell", "lstm", "--steps", "1", "--batch", "2"],
    ],
    ids=" ".join,
)
def test_bench(capsys, arguments):
    small = ["--steps", "4", "--input", "5", "--hidden", "6", "--rounds", "2", "--threads", "1"]
    assert _cli.main(["bench", *small, *arguments]) == 0
    out = capsys.readouterr().out
    assert "results agree with torch.nn" in out
    assert "faster" in out or "slower" in out
    assert ("layer 0 forward: " in out) == ("--explain" in arguments)
    assert ("layer 1 backward: " in out) == ("--training" in arguments)
    assert ("layers 1 to 2 forward: " in out) == ("3" in arguments)
    assert ("streaming" in out) == ("1" in arguments)


def test_bench_does_not_time_a_wrong_result(capsys, monkeypatch):
    monkeypatch.setattr(rnn_ext.RNN, "forward", one_off(rnn_ext.RNN.forward))
    monkeypatch.setattr(_cli, "interleave", lambda *_, **__: pytest.fail("timed a wrong result"))
    assert _cli.main(["bench", "--cell", "rnn", "--steps", "3", "--hidden", "4"]) == 1
    assert "WRONG h_n" in capsys.readouterr().out


def test_bench_says_when_the_machine_is_busy(capsys, monkeypatch):
    slow, fast = Timing((4e-3, 4e-3, 8e-3)), Timing((2e-3, 2e-3, 2e-3))
    monkeypatch.setattr(_cli, "interleave", lambda *_, **__: {"torch.nn": fast, "rnn_ext": slow})
    assert _cli.main(["bench", "--cell", "rnn", "--steps", "3", "--hidden", "4"]) == 0
    out = capsys.readouterr().out
    assert "2.00x slower" in out
    assert "repeat this on a quiet machine" in out


@pytest.mark.parametrize("device", rnn_ext._C.cuda_devices())
@pytest.mark.parametrize("dtype", _cli.DTYPES)
def test_bench_explains_a_device_that_is_not_there(capsys, monkeypatch, device, dtype):
    monkeypatch.setattr(_cli, "interleave", lambda *_, **__: pytest.fail("measured something"))
    arguments = ["--explain", "--device-model", device, "--dtype", dtype, "--training"]
    assert (
        _cli.main(["bench", "--steps", "1024", "--batch", "16", "--layers", "3", *arguments]) == 0
    )
    out = capsys.readouterr().out
    assert f"on {device}: predictions of a cost model, on paper. Nothing was measured." in out
    if device == "v100":
        assert "refused, compute capability below 7.5" in out
        assert "ms" not in out
    else:
        for part in ("layer 0 forward", "layer 0 backward", "layers 1 to 2 backward", "floor"):
            assert part in out
        assert any(method in out for method in ("cluster, ", "persistent, ", "stepwise, "))


@pytest.mark.parametrize(("device", "method"), [("h100", "cluster"), ("a100", "persistent")])
def test_explains_which_devices_have_clusters(capsys, device, method):
    shape = ["--steps", "200", "--batch", "64", "--hidden", "32", "--dtype", "bfloat16"]
    assert _cli.main(["bench", "--explain", "--device-model", device, *shape]) == 0
    out = capsys.readouterr().out
    assert f"layer 0 forward: {method}, " in out
    assert ("cluster_blocks 0" in out) == (method != "cluster")


def test_prediction_for_float32_follows_torchs_setting_for_tf32(capsys):
    before = torch.get_float32_matmul_precision()
    printed = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            assert _cli.main(["bench", "--explain", "--device-model", "h100", "--batch", "32"]) == 0
            printed.append(capsys.readouterr().out)
    finally:
        torch.set_float32_matmul_precision(before)
    assert "tensor_cores False" in printed[0]
    assert "tensor_cores True" in printed[1]


def test_prediction_of_the_design_point_is_documented():
    """docs/cuda.md states what the model says."""
    shape = ("lstm", 1024, 16, 768, 768)
    plans = [
        rnn_ext._C.cuda_plan(
            *shape, dtype="bfloat16", backward=backward, training=True, device="h100"
        )
        for backward in (False, True)
    ]
    text = (Path(rnn_ext.__file__).parents[1] / "docs" / "cuda.md").read_text()
    for title, key in (("**predicted on paper**", "total_seconds"), ("floor of", "floor_seconds")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {title}")]
        forward, backward = (plan[key] * 1e3 for plan in plans)
        assert f"{forward:.2f} ms" in line
        assert f"{forward + backward:.2f} ms" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--device-model", "h100"], "--device-model needs --explain"),
        (["bench", "--explain", "--device-model", "voodoo"], "invalid choice"),
        (["bench", "--cell", "elman"], "invalid choice"),
        (["bench", "--batch", "0"], "must be at least 1"),
        (["bench", "--hidden", "many"], "invalid positive value"),
        (["bench", "--rounds", "1"], "must be at least 2"),
        (["bench", "--cell", "gru", "--proj", "2"], "--proj needs --cell lstm"),
        (["bench", "--hidden", "4", "--proj", "4"], "--proj must be smaller than --hidden"),
        (["bench", "--nonlinearity", "relu"], "--nonlinearity needs --cell rnn"),
        ([], "required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        _cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.50 s"), (12.3e-3, "12.30 ms"), (4.5e-6, "4.50 µs")]
)
def test_format_seconds(seconds, text):
    assert _cli.format_seconds(seconds) == text


# the measuring code


def test_both_sides_get_the_same_numbers():
    pair = build_pair(Case("LSTM", 2, 3, 4, 5, "training", given_state=True), rnn_ext)
    theirs, ours = pair["torch.nn"], pair["rnn_ext"]
    assert type(theirs.module) is nn.LSTM
    assert type(ours.module) is rnn_ext.LSTM
    assert torch.equal(theirs.input, ours.input)
    assert torch.equal(theirs.grad_output, ours.grad_output)
    for a, b in zip(theirs.initial_state, ours.initial_state, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(theirs.parameters, ours.parameters, strict=True):
        assert torch.equal(a, b)
        assert a is not b


def test_results_hold_everything_and_do_not_add_up():
    work = build_pair(Case("LSTM", 2, 3, 4, 5, "training", given_state=True), rnn_ext)["rnn_ext"]
    names = ["output", "h_n", "c_n", "grad input", "grad h_0", "grad c_0"]
    names += [f"grad {name}" for name, _ in work.module.named_parameters()]
    first = work.results()
    assert list(first) == names
    for name, tensor in work.results().items():
        assert torch.equal(tensor, first[name])


def test_inference_results_have_no_gradients():
    case = Case("GRU", 2, 3, 4, 5)
    with case.context():
        results = build_pair(case, rnn_ext)["rnn_ext"].results()
    assert list(results) == ["output", "h_n"]
    assert results["output"].is_inference()


def test_missing_gradient_is_an_error():
    work = build_pair(Case("GRU", 2, 3, 4, 5, "training"), rnn_ext)["rnn_ext"]
    work.module.weight_hh_l0.requires_grad_(False)
    with pytest.raises(AssertionError, match="no gradient arrived at weight_hh_l0"):
        work.results()


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_compare_finds_a_wrong_gradient(name):
    case = Case("GRU", 2, 3, 4, 5, "training")
    pair = build_pair(case, rnn_ext)
    getattr(pair["rnn_ext"].module, name).register_hook(lambda gradient: gradient * 1.001)
    wrong = [d.name for d in compare(case, pair["rnn_ext"], pair["torch.nn"]) if not d.within]
    assert wrong == [f"grad {name}"]


def test_packed_workload_skips_the_padding():
    work = build_pair(Case("GRU", 3, 8, 4, 5, packed=True), rnn_ext)["rnn_ext"]
    assert work.lengths == [8, 7, 6]
    output, h_n = work()
    assert output.shape == (21, 5)
    assert h_n.shape == (1, 3, 5)


def test_relative_error():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == 0.0
    assert relative_error(torch.zeros(3), reference) == float("inf")


def test_nan_is_never_within():
    case = Case("RNN", 1, 2, 3, 4)
    pair = build_pair(case, rnn_ext)
    with torch.no_grad():
        pair["rnn_ext"].input.fill_(float("nan"))
    assert not any(d.within for d in compare(case, pair["rnn_ext"], pair["torch.nn"]))


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        # 2 * T * B * gates * H * (I + H)
        (Case("RNN", 2, 3, 4, 5), 2 * 3 * 2 * 1 * 5 * (4 + 5)),
        (Case("GRU", 2, 3, 4, 5), 2 * 3 * 2 * 3 * 5 * (4 + 5)),
        (Case("GRU", 2, 3, 4, 5, "training"), 3 * 2 * 3 * 2 * 3 * 5 * (4 + 5)),
        (
            Case("LSTM", 2, 3, 4, 5, num_layers=2, bidirectional=True),
            2 * 3 * 2 * 2 * 4 * 5 * ((4 + 5) + (10 + 5)),
        ),
        (Case("LSTM", 2, 3, 4, 5, proj_size=2), 2 * 3 * 2 * (4 * 5 * (4 + 2) + 5 * 2)),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else "",
)
def test_flops(case, flops):
    assert case.flops == flops


class Clock:
    """A clock that only the work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Work that takes the given times in turn, over and over."""

        def run() -> None:
            self.now += seconds[self.log.count(name) % len(seconds)]
            self.log.append(name)

        return run


def test_repetitions_make_a_sample_long_enough():
    clock = Clock()
    calls, seconds = repetitions(clock.work("a", 1e-4), 5e-3, clock)
    assert 50 <= calls <= 70
    assert seconds == pytest.approx(calls * 1e-4)
    assert repetitions(clock.work("b", 1.0), 5e-3, clock) == (1, pytest.approx(1.0))


def test_repetitions_survive_a_clock_that_stands_still():
    ticks = iter([0.0, 0.0, 0.0, 1.0])
    assert repetitions(lambda: None, 5e-3, lambda: next(ticks)) == (10, 1.0)


def test_interleave_takes_turns():
    clock = Clock()
    sides = {"a": clock.work("a", 8e-2), "b": clock.work("b", 5e-2)}
    timings = interleave(sides, rounds=7, min_sample=5e-3, clock=clock)
    assert "".join(clock.log) == "aabb" + 7 * "ab"  # first call and calibration, then turns
    assert timings["a"].median == pytest.approx(8e-2)
    assert timings["b"].median == pytest.approx(5e-2)
    assert len(timings["a"].samples) == 7


def test_short_calls_are_repeated_and_warmed_up_in_each_turn():
    clock = Clock()
    call = 1 / 64
    timings = interleave({"a": clock.work("a", call)}, rounds=2, min_sample=2 * call, clock=clock)
    warming = math.ceil(WARM_UP / call)
    # First call, calibration with 1 and 2, turns.
    assert len(clock.log) == 1 + 1 + 2 + 2 * (warming + 2)
    assert timings["a"].median == pytest.approx(call)


def test_timing_statistics():
    assert Timing((1.0, 1.0, 1.0, 9.0)).median == 1.0
    assert Timing((2.0, 2.0, 2.0)).spread == 0.0
    assert Timing((1.0, 2.0, 3.0)).spread == pytest.approx(1.0)


def test_workload_is_reusable_with_any_module_of_the_family():
    case = Case("GRU", 2, 3, 4, 5)
    work = Workload(case, nn.GRU(4, 5))
    assert work()[0].shape == (3, 2, 5)
