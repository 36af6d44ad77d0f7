"""What the modules do beyond torch.nn's, against its bars: lengths, resets, layer norm, memory.

    python benchmarks/features.py                 a minute or two
    python benchmarks/features.py --only resets   one of them

Every side is checked before it is timed: outputs and gradients may be twice as far from those of
torch.nn in float64 as torch.nn's own are in float32. The sides take turns; a time is the median.
Truncated BPTT over a window has a file of its own, window.py.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn_ext
from bars import Figure, at_least, at_most, percent, times
from health import Patience, measure_limits, undisturbed
from memory import heap_counter
from probe import Probe
from rnn_ext._bench import Timing, relative_error
from rows import Verdict
from timing import WrongResult, largest_spread, measure_in_turn

ROUNDS = 9
OVER_REAL_STEPS = 1.15
BEFORE_PACKED = 3.0
OVER_NO_RESETS = 1.1
BEFORE_LOOP = 10.0
CHECKPOINT_MEMORY = 0.25
CHECKPOINT_TIME = 1.6
ALL_STATES = 1.0
OVER_NO_NORM = 2.0
BEFORE_NORM_LOOP = 5.0

MODES = ("inference", "training")
State = tuple[Tensor, Tensor]


class Side:
    """One way to do the work. A call is one forward, or one training step with all gradients."""

    def __init__(
        self,
        module: nn.LSTM,
        x: Tensor,
        run: Callable[[nn.LSTM, Tensor], Tensor],
        weight: Tensor,
        training: bool,
        input_gradient: bool = True,
    ) -> None:
        self.module, self.run, self.training = module, run, training
        dtype = module.weight_ih_l0.dtype
        self.x = x.to(dtype, copy=True).requires_grad_(training and input_gradient)
        self.weight = weight.to(dtype)  # of the output: its gradient
        self.leaves = [*([self.x] if self.x.requires_grad else []), *module.parameters()]

    def __call__(self) -> Tensor:
        if not self.training:
            with torch.inference_mode():
                return self.run(self.module, self.x)
        for leaf in self.leaves:
            leaf.grad = None
        output = self.run(self.module, self.x)
        output.backward(self.weight)
        return output

    def results(self) -> list[Tensor]:
        output = self().detach().clone()
        return [output, *(leaf.grad for leaf in self.leaves if self.training)]


def check(sides: Mapping[str, Side], torch_side: str, exact: Side) -> None:
    """Every side against float64, by the measure of torch.nn's error."""
    truth = exact.results()
    theirs = [relative_error(t, e) for t, e in zip(sides[torch_side].results(), truth, strict=True)]
    for name, side in sides.items():
        for k, (result, reference) in enumerate(zip(side.results(), truth, strict=True)):
            error, bound = relative_error(result, reference), 2 * theirs[k] + 2**-23
            if not error <= bound:
                raise WrongResult(f"{name}: result {k} is off by {error:.1e}, allowed {bound:.1e}")


def modules(input_size: int, hidden_size: int, num_layers: int = 1) -> tuple[nn.LSTM, ...]:
    """torch.nn's, ours, torch.nn's in float64: the same weights."""
    torch.manual_seed(0)
    theirs = nn.LSTM(input_size, hidden_size, num_layers)
    ours = rnn_ext.LSTM(input_size, hidden_size, num_layers)
    exact = nn.LSTM(input_size, hidden_size, num_layers, dtype=torch.float64)
    for module in (ours, exact):
        module.load_state_dict(theirs.state_dict())
    return theirs, ours, exact


@dataclass
class Bench:
    """Times sides undisturbed, prints them, and collects verdicts."""

    probe: Probe = field(default_factory=Probe)
    patience: Patience = field(default_factory=lambda: Patience(60.0))

    def __post_init__(self) -> None:
        self.machine = measure_limits(self.probe, torch.get_num_threads(), 3, self.patience)

    def time(self, title: str, sides: Mapping[str, Callable[[], object]]) -> tuple[dict, bool]:
        def measure() -> dict[str, Timing]:
            return measure_in_turn(sides, rounds=ROUNDS)

        timings, health = undisturbed(
            measure, largest_spread, self.probe, self.machine, self.patience
        )
        healthy = health.good(self.machine)
        print(f"{title}{'' if healthy else '  (the machine was disturbed)'}")
        for name, timing in timings.items():
            print(f"  {name:<34}{timing.median * 1e3:>10.3f} ms  ± {timing.spread:.0%}")
        return {name: timing.median for name, timing in timings.items()}, healthy


# ------------------------------------------------------------------------- lengths


def bench_lengths(
    bench: Bench, steps: int = 200, batch: int = 32, size: int = 128
) -> Iterator[Verdict]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps  # so that padded means the same for everybody
    real = lengths.sum().item() / (steps * batch)
    x = torch.randn(steps, batch, size, generator=generator)
    weight = torch.randn(steps, batch, size, generator=generator)
    weight[torch.arange(steps)[:, None] >= lengths] = 0.0
    theirs, ours, exact = modules(size, size)

    def with_lengths(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x, lengths=lengths)[0]

    def with_packing(module: nn.LSTM, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(module(packed)[0], total_length=steps)[0]

    def padded(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x)[0]

    # Packed once, outside the time: torch.nn's side is not charged for the ceremony.
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    packed_weight = pack_padded_sequence(weight, lengths, enforce_sorted=False).data

    def already_packed(module: nn.LSTM, data: Tensor) -> Tensor:
        return module(PackedSequence(data, *packed[1:]))[0].data

    for mode in MODES:
        training = mode == "training"
        sides = {
            "rnn_ext, lengths": Side(ours, x, with_lengths, weight, training),
            "torch.nn, packing": Side(theirs, x, with_packing, weight, training),
        }
        check(sides, "torch.nn, packing", Side(exact, x, with_packing, weight, training))
        sides["rnn_ext, padded"] = Side(ours, x, padded, weight, training)
        sides["torch.nn, packed before"] = Side(
            theirs, packed.data, already_packed, packed_weight, training
        )
        where = f"LSTM T{steps} B{batch} H{size} {mode}, {real:.0%} of the steps are real"
        found, healthy = bench.time(f"lengths: {where}", sides)
        mine = found["rnn_ext, lengths"]
        yield from at_most(
            f"lengths, {mode}: time over (real / padded steps) x the padded time "
            f"<= {OVER_REAL_STEPS}x",
            [Figure(mine / (real * found["rnn_ext, padded"]), where, healthy)],
            OVER_REAL_STEPS,
            times,
        )
        yield from at_least(
            f"lengths, {mode}: faster than nn.LSTM on the PackedSequence >= {BEFORE_PACKED}x",
            [Figure(found["torch.nn, packed before"] / mine, where, healthy)],
            BEFORE_PACKED,
            times,
        )


# ------------------------------------------------------------------------- resets


def bench_resets(
    bench: Bench, steps: int = 128, batch: int = 16, size: int = 128, density: float = 0.01
) -> Iterator[Verdict]:
    generator = torch.Generator().manual_seed(2)
    resets = torch.rand(steps, batch, generator=generator) < density
    x = torch.randn(steps, batch, size, generator=generator)
    weight = torch.randn(steps, batch, size, generator=generator)
    theirs, ours, exact = modules(size, size)

    def fused(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x, resets=resets)[0]

    def plain(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x)[0]

    def loop(module: nn.LSTM, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, batch, size)
        goes_on = (~resets)[..., None].to(x.dtype)
        state, outputs = (zeros, zeros), []
        for t in range(steps):
            output, state = module(x[t : t + 1], tuple(part * goes_on[t] for part in state))
            outputs.append(output)
        return torch.cat(outputs)

    for mode in MODES:
        training = mode == "training"
        sides = {
            "rnn_ext, resets": Side(ours, x, fused, weight, training),
            "torch.nn, Python loop": Side(theirs, x, loop, weight, training),
        }
        check(sides, "torch.nn, Python loop", Side(exact, x, loop, weight, training))
        sides["rnn_ext, without"] = Side(ours, x, plain, weight, training)
        where = f"LSTM T{steps} B{batch} H{size} {mode}, {int(resets.sum())} resets"
        found, healthy = bench.time(f"resets: {where}", sides)
        mine = found["rnn_ext, resets"]
        yield from at_most(
            f"resets, {mode}: time over that without <= {OVER_NO_RESETS}x",
            [Figure(mine / found["rnn_ext, without"], where, healthy)],
            OVER_NO_RESETS,
            times,
        )
        yield from at_least(
            f"resets, {mode}: faster than the Python loop over nn.LSTM >= {BEFORE_LOOP}x",
            [Figure(found["torch.nn, Python loop"] / mine, where, healthy)],
            BEFORE_LOOP,
            times,
        )


# ------------------------------------------------------------------------- all states


def bench_all_states(
    bench: Bench, steps: int = 200, batch: int = 16, size: int = 128, layers: int = 2
) -> Iterator[Verdict]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(steps, batch, size, generator=generator)
    weight = torch.randn(steps, batch, size, generator=generator)
    _, ours, _ = modules(size, size, layers)

    def all_states(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x, return_all_states=True)[0]

    def plain(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x)[0]

    # What storing costs: the tensors that the plain call has not got, written once.
    extra = [torch.randn(steps, batch, size) for _ in range(2 * layers - 1)]
    target = [torch.empty_like(tensor) for tensor in extra]

    def store() -> None:
        for to, source in zip(target, extra, strict=True):
            to.copy_(source)

    for mode in MODES:
        training = mode == "training"
        sides: dict[str, Callable[[], object]] = {
            "rnn_ext, all states": Side(ours, x, all_states, weight, training),
            "rnn_ext, plain": Side(ours, x, plain, weight, training),
            "storing them": store,
        }
        same = zip(*(side.results() for side in list(sides.values())[:2]), strict=True)
        for k, (one, other) in enumerate(same):
            if not relative_error(one, other.double()) <= 1e-5:
                raise WrongResult(f"all states: result {k} differs from the plain call's")
        where = f"LSTM T{steps} B{batch} H{size} {layers} layers {mode}"
        found, healthy = bench.time(f"all states: {where}", sides)
        allowed = found["rnn_ext, plain"] + found["storing them"]
        yield from at_most(
            f"all states, {mode}: time over the plain call's and that of storing them "
            f"<= {ALL_STATES}x",
            [Figure(found["rnn_ext, all states"] / allowed, where, healthy)],
            ALL_STATES,
            times,
        )


# ------------------------------------------------------------------------- layer normalization


def normalized_loop(module: nn.LSTM, x: Tensor, hoisted: bool = False) -> Tensor:
    """The cell step by step in torch operations; hoisted: the input's part once for all steps."""
    steps, batch, _ = x.shape
    hidden, gates = module.hidden_size, (4 * module.hidden_size,)
    h = c = x.new_zeros(batch, hidden)
    bias = module.bias_ih_l0 + module.bias_hh_l0

    def of_input(x: Tensor) -> Tensor:
        product = functional.linear(x, module.weight_ih_l0)
        return functional.layer_norm(product, gates, module.norm_ih_l0, bias)

    of_x = of_input(x) if hoisted else None
    outputs = []
    for t in range(steps):
        of_h = functional.linear(h, module.weight_hh_l0)
        of_h = functional.layer_norm(of_h, gates, module.norm_hh_l0)
        gate_sums = (of_input(x[t]) if of_x is None else of_x[t]) + of_h
        i, f, g, o = gate_sums.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        seen = functional.layer_norm(c, (hidden,), module.norm_c_l0, module.norm_c_bias_l0)
        h = o.sigmoid() * seen.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def bench_layer_norm(
    bench: Bench, steps: int = 50, batch: int = 16, size: int = 128
) -> Iterator[Verdict]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(steps, batch, size, generator=generator)
    weight = torch.randn(steps, batch, size, generator=generator)
    torch.manual_seed(0)
    ours = rnn_ext.LSTM(size, size, layer_norm=True)
    exact = copy.deepcopy(ours).double()
    _, without, _ = modules(size, size)

    def fused(module: nn.LSTM, x: Tensor) -> Tensor:
        return module(x)[0]

    for mode in MODES:
        training = mode == "training"
        sides = {
            "rnn_ext, layer norm": Side(ours, x, fused, weight, training),
            "torch, Python loop": Side(copy.deepcopy(ours), x, normalized_loop, weight, training),
        }
        check(sides, "torch, Python loop", Side(exact, x, normalized_loop, weight, training))
        sides["rnn_ext, without"] = Side(without, x, fused, weight, training)
        hoisted = functools.partial(normalized_loop, hoisted=True)
        sides["torch, hoisted"] = Side(copy.deepcopy(ours), x, hoisted, weight, training)
        where = f"LSTM T{steps} B{batch} H{size} {mode}"
        found, healthy = bench.time(f"layer norm: {where}", sides)
        mine = found["rnn_ext, layer norm"]
        if training:
            yield from at_most(
                f"layer norm, {mode}: time over that of the plain LSTM <= {OVER_NO_NORM}x",
                [Figure(mine / found["rnn_ext, without"], where, healthy)],
                OVER_NO_NORM,
                times,
            )
        yield from at_least(
            f"layer norm, {mode}: faster than a Python loop over torch operations "
            f">= {BEFORE_NORM_LOOP}x",
            [
                Figure(found["torch, Python loop"] / mine, where, healthy),
                Figure(found["torch, hoisted"] / mine, f"{where}, input hoisted", healthy),
            ],
            BEFORE_NORM_LOOP,
            times,
        )


# ------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Long:
    """The issue's shape, and the segments tried."""

    steps: int = 2000
    batch: int = 16
    size: int = 256
    segments: tuple[int, ...] = (32, 64, 128)

    def side(self, checkpoint_steps: int | None, input_gradient: bool) -> Side:
        torch.manual_seed(4)
        module = rnn_ext.LSTM(self.size, self.size, checkpoint_steps=checkpoint_steps)
        x = torch.randn(self.steps, self.batch, self.size)
        weight = torch.randn(self.steps, self.batch, self.size)

        def run(module: nn.LSTM, x: Tensor) -> Tensor:
            return module(x)[0]

        return Side(module, x, run, weight, True, input_gradient)


def peak_here(checkpoint_steps: int | None, input_gradient: bool) -> int:
    """Highest number of bytes that a training step asked for and had not given back, above what
    was there before: input, weights and the gradient of the output are not counted."""
    libc = ctypes.CDLL(None)
    libc.heap_current.restype = libc.heap_peak.restype = ctypes.c_long
    Long(4, 2, 8).side(checkpoint_steps, input_gradient)()  # pools and tables that are made once
    side = Long().side(checkpoint_steps, input_gradient)
    rnn_ext.empty_cache()
    gc.collect()
    before = libc.heap_current()
    libc.heap_reset_peak()
    side()
    return libc.heap_peak() - before


def peak(checkpoint_steps: int | None, input_gradient: bool) -> int:
    """In a fresh process, under the heap counter of memory.py."""
    with heap_counter() as counter:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", json.dumps([checkpoint_steps, input_gradient])],
            env={**os.environ, "LD_PRELOAD": str(counter)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return int(done.stdout)


def bench_checkpoints(bench: Bench) -> Iterator[Verdict]:
    long = Long()
    sides = {"everything kept": long.side(None, True)}
    sides |= {f"checkpoint_steps={k}": long.side(k, True) for k in long.segments}
    expected = sides["everything kept"].results()
    for name, side in sides.items():
        for k, (one, other) in enumerate(zip(side.results(), expected, strict=True)):
            if not torch.equal(one, other):
                raise WrongResult(f"{name}: result {k} is not the same to the bit")
    where = f"LSTM T{long.steps} B{long.batch} H{long.size} training"
    found, healthy = bench.time(f"checkpoints: {where}", sides)
    plain = found["everything kept"]
    for input_gradient in (False, True):
        whole = peak(None, input_gradient)
        peaks = {k: peak(k, input_gradient) for k in long.segments}
        what = "with" if input_gradient else "without"
        print(f"  peak {what} the input's gradient: {whole / 1e6:.1f} MB; ", end="")
        print(", ".join(f"k={k}: {size / 1e6:.1f} MB" for k, size in peaks.items()))
        best = min(peaks, key=peaks.__getitem__)
        yield from at_most(
            f"checkpoints, {what} the input's gradient: peak memory over the plain run's "
            f"<= {CHECKPOINT_MEMORY:.0%}",
            [Figure(peaks[best] / whole, f"{where}, k={best}")],
            CHECKPOINT_MEMORY,
            percent,
        )
    yield from at_most(
        f"checkpoints: time over the plain run's <= {CHECKPOINT_TIME}x",
        [
            Figure(found[f"checkpoint_steps={k}"] / plain, f"{where}, k={k}", healthy)
            for k in long.segments
        ],
        CHECKPOINT_TIME,
        times,
    )


BENCHES: dict[str, Callable[[Bench], Iterator[Verdict]]] = {
    "lengths": bench_lengths,
    "resets": bench_resets,
    "all_states": bench_all_states,
    "layer_norm": bench_layer_norm,
    "checkpoints": bench_checkpoints,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=list(BENCHES), action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # of the child process
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_here(*json.loads(arguments.peak)))
        return 0
    bench = Bench()
    verdicts: list[Verdict] = []
    for name in arguments.only or BENCHES:
        verdicts += BENCHES[name](bench)
    print(*verdicts, sep="\n")
    return int(any(verdict.status == "falls short" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
