"""Gradients of the modules: right (finite differences, NumPy), only those asked for, repeatable.

``torch.nn`` and ``references`` are the two independent opinions; nothing here trusts the engine.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnn_ext
from devices import to_device
from helpers import normal, torch_twin
from numpy_twin import (
    CELLS,
    STATES,
    assert_close,
    make_module,
    random_step,
    run_numpy,
    run_torch,
    state_shapes,
)

TOLERANCE = 1e-12  # float64, see docs/math.md
LAYOUTS = {  # lengths of the sequences; None for padded
    "padded": None,
    "packed_sorted": [3, 2],
    "packed_unsorted": [1, 3],
}


class Call:
    """A module as a function of all its tensors: (input, h_0, (c_0), parameters...) -> outputs."""

    def __init__(
        self,
        module: nn.RNNBase,
        steps: int,
        batch: int,
        lengths: list[int] | None = None,
        enforce_sorted: bool = True,
    ) -> None:
        self.module = module
        self.lengths = lengths
        self.enforce_sorted = enforce_sorted
        self.parameter_names, parameters = zip(*module.named_parameters(), strict=True)
        x, initial, _, _ = random_step(module, steps, batch)
        self.num_states = len(initial)
        self.names = ["input", *(f"{s}_0" for s in STATES[: len(initial)]), *self.parameter_names]
        values = [x, *initial, *parameters]
        self.tensors = [value.detach().clone().requires_grad_() for value in values]

    def __call__(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, parameters = rest[: self.num_states], rest[self.num_states :]
        given = dict(zip(self.parameter_names, parameters, strict=True))
        data = x
        if self.lengths is not None:
            data = pack_padded_sequence(x, self.lengths, enforce_sorted=self.enforce_sorted)
        hx = states if self.num_states == 2 else states[0]
        output, final = torch.func.functional_call(self.module, given, (data, hx))
        output = output if self.lengths is None else output.data
        return (output, *final) if self.num_states == 2 else (output, final)

    def cotangents(self) -> list[Tensor]:
        """Fixed random gradients for the outputs."""
        generator = torch.Generator().manual_seed(4)
        outputs = self(*self.tensors)
        return [to_device(normal(generator, o.shape).to(o.dtype)) for o in outputs]

    def run(self) -> list[Tensor]:
        """Outputs, then the gradient of every tensor."""
        cotangents = self.cotangents()
        outputs = self(*self.tensors)
        return [*outputs, *torch.autograd.grad(outputs, self.tensors, cotangents)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_and_gradgradcheck(
    cell: str, layers: int, bidirectional: bool, layout: str
) -> None:
    """Over input, h_0, c_0 and every parameter.

    The first derivative is checked coordinate by coordinate. So is the second for one layer, one
    direction and packed rows, where each row still starts and ends by itself; elsewhere it is
    checked along random directions (fast_mode), because coordinates take seconds.
    """
    module = make_module(rnn_ext, cell, 2, 2, num_layers=layers, bidirectional=bidirectional)
    call = Call(module, 3, 2, LAYOUTS[layout], enforce_sorted=layout != "packed_unsorted")
    assert gradcheck(call, call.tensors)
    simplest = layers == 1 and not bidirectional and layout == "packed_sorted"
    assert gradgradcheck(call, call.tensors, fast_mode=not simplest)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("layers", "bidirectional"), [(1, False), (1, True), (3, False), (2, True)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_numpy(
    cell: str, layers: int, bidirectional: bool, bias: bool, packed: bool
) -> None:
    """Sizes that are a multiple of nothing, so that every kind of remainder occurs."""
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    module = make_module(rnn_ext, cell, 13, 37, **options)
    batch_sizes = torch.tensor([11, 11, 9, 8, 3, 1, 1], device="cpu") if packed else None
    step = random_step(module, 7, 11, batch_sizes)
    actual = run_torch(module, *step, batch_sizes=batch_sizes)
    assert_close(actual, run_numpy(module, *step, batch_sizes=batch_sizes), TOLERANCE)


@pytest.mark.parametrize(
    ("steps", "batch", "input_size", "hidden_size"),
    [(1, 1, 1, 2), (1, 5, 1, 6), (9, 1, 2, 5), (2, 33, 1, 6), (300, 2, 3, 4), (5, 101, 3, 70)],
)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_numpy_at_the_edges(
    cell: str, steps: int, batch: int, input_size: int, hidden_size: int
) -> None:
    """Nothing to share, and more than one chunk of steps, block of rows or panel of units."""
    module = make_module(rnn_ext, cell, input_size, hidden_size, bidirectional=True)
    step = random_step(module, steps, batch)
    assert_close(run_torch(module, *step), run_numpy(module, *step), TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_equals_numpy_for_many_rows_of_many_lengths(cell: str) -> None:
    """Packed, with rows that start and end in every chunk of steps and block of rows."""
    module = make_module(rnn_ext, cell, 3, 20, num_layers=2, bidirectional=True)
    batch_sizes = torch.tensor([60 * (40 - t) // 40 for t in range(40)], device="cpu")
    step = random_step(module, 40, 60, batch_sizes)
    actual = run_torch(module, *step, batch_sizes=batch_sizes)
    assert_close(actual, run_numpy(module, *step, batch_sizes=batch_sizes), TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_two_calls_in_a_row_are_one(cell: str) -> None:
    """Gradients flow from the second half of a sequence into the first through the state."""
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2)
    x, initial, doutput, _ = random_step(module, 7, 3)
    x.requires_grad_()
    hx = tuple(initial) if len(initial) == 2 else initial[0]
    wanted = [x, *module.parameters()]
    whole, _ = module(x, hx)
    first, state = module(x[:4], hx)
    second, _ = module(x[4:], state)
    halves = torch.cat([first, second])
    torch.testing.assert_close(halves, whole, rtol=TOLERANCE, atol=TOLERANCE)
    for a, b in zip(
        torch.autograd.grad(halves, wanted, doutput),
        torch.autograd.grad(whole, wanted, doutput),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str) -> None:
    """No rows, no contribution: parameters get zeros, as the sum over nothing."""
    module = make_module(rnn_ext, cell, 3, 4, num_layers=2, bidirectional=True)
    step = random_step(module, 5, 0)
    assert_close(run_torch(module, *step), run_torch(torch_twin(module), *step), 0.0)


# What is asked for


@pytest.mark.parametrize("layout", ["padded", "packed_unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_asked_for(cell: str, layout: str) -> None:
    """One tensor at a time: its gradient is what it was among all others, which now get none."""
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    call = Call(module, 3, 2, LAYOUTS[layout], enforce_sorted=layout != "packed_unsorted")
    cotangents = call.cotangents()
    everything = torch.autograd.grad(call(*call.tensors), call.tensors, cotangents)
    for chosen, name in enumerate(call.names):
        tensors = [t.detach().requires_grad_(k == chosen) for k, t in enumerate(call.tensors)]
        outputs = call(*tensors)
        # A final state does not depend on everything (h_n of layer 0 not on layer 1's weights), but
        # one call has one node: as in torch.nn with cuDNN, all its outputs require a gradient.
        outputs, given = zip(
            *[(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad],
            strict=True,
        )
        torch.autograd.backward(outputs, given)
        for tensor, other in zip(tensors, call.names, strict=True):
            assert (tensor.grad is not None) == (other == name)
        assert torch.equal(tensors[chosen].grad, everything[chosen]), name


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias", "_l0", "_l1", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_parameters(cell: str, frozen: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, initial, doutput, _ = random_step(module, 4, 3)
    hx = tuple(initial) if len(initial) == 2 else initial[0]
    module(x, hx)[0].backward(doutput)
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name)
    module(x, hx)[0].backward(doutput)
    for name, parameter in module.named_parameters():
        if frozen in name:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_one_output_alone(cell: str) -> None:
    """Of output, of h_n, of c_n: equal to zeros for the others, in torch.nn and in NumPy."""
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, initial, doutput, dfinal = random_step(module, 4, 3)
    cotangents = [doutput, *dfinal]
    hx = tuple(initial) if len(initial) == 2 else initial[0]
    for chosen in range(len(cotangents)):
        module.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        output, final = module(leaf, hx)
        outputs = [output, *final] if isinstance(final, tuple) else [output, final]
        outputs[chosen].backward(cotangents[chosen])
        masked = [c if k == chosen else torch.zeros_like(c) for k, c in enumerate(cotangents)]
        expected = run_numpy(module, x, initial, masked[0], masked[1:])
        actual = {f"d_{name}": p.grad.cpu().numpy() for name, p in module.named_parameters()}
        actual["d_input"] = leaf.grad.cpu().numpy()
        assert_close(actual, {name: expected[name] for name in actual}, TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_without_hx(cell: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, initial, doutput, dfinal = random_step(module, 4, 3)
    zeros = [torch.zeros_like(state) for state in initial]
    module(x)[0].backward(doutput)
    expected = run_numpy(module, x, zeros, doutput, [torch.zeros_like(d) for d in dfinal])
    actual = {f"d_{name}": p.grad.cpu().numpy() for name, p in module.named_parameters()}
    assert_close(actual, {name: expected[name] for name in actual}, TOLERANCE)


# The graph


@pytest.mark.parametrize("cell", CELLS)
def test_backward_in_eval_mode(cell: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, dropout=0.5).eval()
    step = random_step(module, 4, 3)
    assert_close(run_torch(module, *step), run_numpy(module, *step), TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice_through_a_retained_graph(cell: str, layout: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True, dropout=0.3)
    call = Call(module, 3, 2, LAYOUTS[layout], enforce_sorted=layout != "packed_unsorted")
    cotangents = call.cotangents()
    outputs = call(*call.tensors)
    first = torch.autograd.grad(outputs, call.tensors, cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, call.tensors, cotangents)
    assert_same_bits(second, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, call.tensors, cotangents)


@pytest.mark.parametrize("cell", CELLS)
def test_create_graph_changes_no_value(cell: str) -> None:
    """The differentiable backward and the fused one are two programs for the same numbers."""
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    call = Call(module, 4, 3)
    cotangents = call.cotangents()
    outputs = call(*call.tensors)
    fused = torch.autograd.grad(outputs, call.tensors, cotangents, retain_graph=True)
    composed = torch.autograd.grad(outputs, call.tensors, cotangents, create_graph=True)
    for name, a, b in zip(call.names, composed, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_penalty_equals_torch(cell: str) -> None:
    """The usual reason for double backward: a loss that contains the norm of a gradient."""

    def penalty(module: nn.RNNBase) -> tuple[Tensor, ...]:
        place = module.weight_ih_l0.device
        leaf = x.clone().to(place).requires_grad_()
        output = module(leaf)[0]
        (dx,) = torch.autograd.grad((output * doutput.to(place)).sum(), leaf, create_graph=True)
        loss = output.square().sum() + (dx.square().sum() - 1).square()
        return torch.autograd.grad(loss, [leaf, *module.parameters()])

    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, _, doutput, _ = random_step(module, 4, 3)
    for a, b in zip(penalty(module), penalty(torch_twin(module)), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=TOLERANCE, atol=TOLERANCE)


def transforms() -> dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]]:
    """Derivatives of a function of one tensor, by every mechanism that torch has."""
    functional = torch.autograd.functional

    def vjp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y, pull_back = torch.func.vjp(f, x)
        return pull_back(torch.arange(y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape))[
            0
        ]

    return {
        "func.grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
        "func.vjp": vjp,
        "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
        "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
        "func.hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
        "jacobian": lambda f, x: functional.jacobian(f, x),
        "jacobian_vectorized": lambda f, x: functional.jacobian(f, x, vectorize=True),
        "hessian": lambda f, x: functional.hessian(lambda x: f(x).square().sum(), x),
    }


@pytest.mark.parametrize("transform", transforms())
@pytest.mark.parametrize("cell", CELLS)
def test_transforms_equal_torch(cell: str, transform: str) -> None:
    module = make_module(rnn_ext, cell, 2, 3, num_layers=2, bidirectional=True)
    x = random_step(module, 3, 2)[0]
    derive = transforms()[transform]
    actual = derive(lambda x: module(x)[0], x)
    twin = torch_twin(module)
    expected = derive(lambda x: twin(x)[0], x.cpu())
    torch.testing.assert_close(actual.cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing requires a gradient"])
@pytest.mark.parametrize("cell", CELLS)
def test_inference_saves_nothing(cell: str, mode: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, initial, _, _ = random_step(module, 4, 3)
    hx = tuple(initial) if len(initial) == 2 else initial[0]
    saved: list[Tensor] = []

    def run() -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            output, final = module(x, hx)
        return [output, *(final if isinstance(final, tuple) else (final,))]

    training = run()
    assert saved  # so that the hooks are known to work
    saved.clear()
    if mode == "nothing requires a gradient":
        module.requires_grad_(False)
        outputs = run()
    else:
        with getattr(torch, mode)():
            outputs = run()
    assert not saved
    assert_same_bits(outputs, [tensor.detach() for tensor in training])
    for tensor in outputs:
        assert tensor.grad_fn is None
        assert not tensor.requires_grad
        assert tensor.is_inference() == (mode == "inference_mode")


@pytest.mark.parametrize("changed", ["input", "h_0", "weight"])
@pytest.mark.parametrize("cell", CELLS)
def test_changing_what_backward_needs_is_an_error(cell: str, changed: str) -> None:
    """An in-place change between forward and backward must never give a wrong gradient."""
    module = make_module(rnn_ext, cell, 3, 5)
    x, initial, doutput, _ = random_step(module, 4, 3)
    x.requires_grad_()
    hx = tuple(initial) if len(initial) == 2 else initial[0]
    output, _ = module(x, hx)
    tensors = {"input": x, "h_0": initial[0], "weight": module.weight_hh_l0}
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(doutput)


@pytest.mark.parametrize("cell", CELLS)
def test_the_output_may_be_changed_in_place(cell: str) -> None:
    """out += x, or an in-place activation, as torch.nn allows on the CPU."""
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2)
    x, _, doutput, _ = random_step(module, 4, 3)
    grads = []
    for change in (lambda t: t, lambda t: t.mul_(2)):
        leaf = x.clone().requires_grad_()
        output, _ = module(leaf)
        weight = doutput if not grads else doutput / 2
        (change(output) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoint_recomputes_the_same(cell: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, dropout=0.5)
    x, _, doutput, _ = random_step(module, 4, 3)
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        output, _ = run(leaf)
        results.append(torch.autograd.grad(output, [leaf, *module.parameters()], doutput))
    assert_same_bits(*results)


# Repeatable


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shape", [(12, 1, 64, 192), (10, 7, 40, 96), (6, 64, 64, 128)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_every_run_and_for_any_number_of_threads(
    cell: str,
    shape: tuple[int, int, int, int],
    layout: str,
    num_threads: Callable[[int], None],
) -> None:
    steps, batch, input_size, hidden_size = shape
    module = make_module(rnn_ext, cell, input_size, hidden_size, dtype=torch.float32)
    lengths = None if layout == "padded" else [max(1, steps - b // 2) for b in range(batch)]
    call = Call(module, steps, batch, lengths)
    num_threads(1)
    one = call.run()
    assert_same_bits(call.run(), one)
    num_threads(2)
    two = call.run()
    assert_same_bits(call.run(), two)
    assert_same_bits(two, one)


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_both_directions_and_threads(
    cell: str, num_threads: Callable[[int], None]
) -> None:
    module = make_module(
        rnn_ext, cell, 24, 100, dtype=torch.float32, num_layers=2, bidirectional=True
    )
    call = Call(module, 9, 12)
    results = []
    for count in (1, 2, 3):
        num_threads(count)
        results.append(call.run())
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_when_python_threads_train_at_once(
    cell: str, num_threads: Callable[[int], None]
) -> None:
    num_threads(2)
    module = make_module(rnn_ext, cell, 24, 64, dtype=torch.float32, num_layers=2)
    call = Call(module, 8, 16)
    cotangents = call.cotangents()

    def work(_: int) -> list[Tensor]:
        outputs = call(*call.tensors)
        return [*outputs, *torch.autograd.grad(outputs, call.tensors, cotangents)]

    expected = work(0)
    with ThreadPoolExecutor(3) as pool:
        for actual in pool.map(work, range(12)):
            assert_same_bits(actual, expected)


# Shapes of memory


def non_contiguous_versions(gradient: Tensor) -> Iterator[Tensor]:
    """``gradient`` (T, B, C) in memory that is laid out otherwise, then expanded ones."""
    for order in itertools.permutations(range(3)):
        inverse = [order.index(k) for k in range(3)]
        yield gradient.permute(order).contiguous().permute(inverse)
    wide = torch.full((*gradient.shape[:2], 2 * gradient.shape[2]), torch.nan, dtype=gradient.dtype)
    wide[..., ::2] = gradient
    yield wide[..., ::2]
    yield torch.ones((), dtype=gradient.dtype).expand(gradient.shape)  # of sum()
    yield gradient[:1].expand(gradient.shape)
    yield gradient[:, :1].expand(gradient.shape)
    yield gradient[..., :1].expand(gradient.shape)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_the_output_in_any_memory_layout(cell: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, _, doutput, _ = random_step(module, 4, 3)
    x.requires_grad_()
    wanted = [x, *module.parameters()]
    for gradient in non_contiguous_versions(doutput):
        actual = torch.autograd.grad(module(x)[0], wanted, gradient)
        expected = torch.autograd.grad(module(x)[0], wanted, gradient.contiguous())
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_the_final_state_in_any_memory_layout(cell: str) -> None:
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, _, _, dfinal = random_step(module, 4, 3)
    x.requires_grad_()
    for which, layout in itertools.product(range(len(dfinal)), ["transposed", "expanded"]):
        gradient = dfinal[which]
        if layout == "transposed":
            gradient = gradient.transpose(0, 2).contiguous().transpose(0, 2)
        else:
            gradient = gradient[:, :1].expand(gradient.shape)
        results = []
        for given in (gradient, gradient.contiguous()):
            final = module(x)[1]
            final = final if isinstance(final, tuple) else (final,)
            results.append(torch.autograd.grad(final[which], x, given))
        assert_same_bits(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_and_strided_input(cell: str) -> None:
    """The same numbers through (B, T, I), and through a slice of something wider."""
    module = make_module(rnn_ext, cell, 3, 5, num_layers=2, bidirectional=True)
    x, _, doutput, _ = random_step(module, 4, 2)
    x.requires_grad_()
    expected = torch.autograd.grad(module(x)[0], [x, *module.parameters()], doutput)
    wide = torch.randn(4, 2, 9, dtype=x.dtype)
    wide[..., 1:7:2] = x.detach()
    strided = wide.requires_grad_()[..., 1:7:2]
    output, _ = module(strided)
    assert_same_bits(
        torch.autograd.grad(output, [strided, *module.parameters()], doutput), expected
    )
    module.batch_first = True
    output, _ = module(x.transpose(0, 1))
    gradients = torch.autograd.grad(output, [x, *module.parameters()], doutput.transpose(0, 1))
    assert_same_bits(gradients, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_expanded_tensors_sum_their_gradients(cell: str) -> None:
    """One learned initial state for the whole batch, one input for all steps."""
    module = make_module(rnn_ext, cell, 3, 5)
    generator = torch.Generator().manual_seed(6)
    states = [
        to_device(normal(generator, shape)).requires_grad_() for shape in state_shapes(module, 1)
    ]
    x = to_device(normal(generator, (1, 4, 3))).requires_grad_()
    expanded = [state.expand(-1, 4, -1) for state in states]
    results = []
    for library in (module, torch_twin(module)):
        place = library.weight_ih_l0.device
        hx = tuple(state.to(place) for state in expanded)
        output, _ = library(x.expand(6, 4, 3).to(place), hx if len(hx) == 2 else hx[0])
        results.append(torch.autograd.grad(output.square().sum(), [x, *states]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


# Sharing and dropout

same_masks_as_torch = pytest.mark.cpu_only("a generator of another device draws other masks")


@pytest.mark.parametrize("cell", CELLS)
def test_tied_weights(cell: str) -> None:
    """One Parameter used by two layers gets the sum of what both would get."""
    width = 3 if cell == "lstm_proj" else 5  # layer 1 reads what layer 0 writes
    module = make_module(rnn_ext, cell, width, 5, num_layers=2)
    for name in module._flat_weights_names:
        if name.endswith("_l1"):
            setattr(module, name, getattr(module, name.replace("_l1", "_l0")))
    assert len(list(module.parameters())) == len(module._flat_weights) // 2
    untied = copy.deepcopy(module)
    for name in untied._flat_weights_names:
        setattr(untied, name, nn.Parameter(getattr(untied, name).detach().clone()))
    x, _, doutput, _ = random_step(module, 4, 3)
    module(x)[0].backward(doutput)
    untied(x)[0].backward(doutput)
    for name, parameter in module.named_parameters():
        total = getattr(untied, name).grad + getattr(untied, name.replace("_l0", "_l1")).grad
        torch.testing.assert_close(parameter.grad, total, rtol=TOLERANCE, atol=TOLERANCE)


@same_masks_as_torch
@pytest.mark.parametrize("probability", [0.4, 1.0])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_draws_what_torch_draws(cell: str, packed: bool, probability: float) -> None:
    """Same seed, same masks, and the generator is left where torch.nn leaves it."""
    options = {"num_layers": 3, "bidirectional": True, "dropout": probability}
    module = make_module(rnn_ext, cell, 3, 5, **options)
    batch_sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    step = random_step(module, 4, 3, batch_sizes)
    twin = torch_twin(module)
    torch.manual_seed(7)
    expected = run_torch(twin, *step, batch_sizes=batch_sizes)
    next_draw = torch.rand(())
    torch.manual_seed(7)
    actual = run_torch(module, *step, batch_sizes=batch_sizes)
    assert torch.equal(torch.rand(()), next_draw)
    assert_close(actual, expected, TOLERANCE)


@same_masks_as_torch
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_batch_first(cell: str) -> None:
    """torch draws the mask in time-first order whatever the layout of the input."""
    options = {"num_layers": 2, "dropout": 0.4, "batch_first": True}
    module = make_module(rnn_ext, cell, 3, 5, **options)
    x = random_step(module, 4, 3)[0].requires_grad_()
    results = []
    for each in (module, torch_twin(module)):
        torch.manual_seed(7)
        output, _ = each(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_with_dropout(cell: str, layout: str) -> None:
    module = make_module(rnn_ext, cell, 2, 2, num_layers=2, dropout=0.4)
    call = Call(module, 3, 2, LAYOUTS[layout], enforce_sorted=layout != "packed_unsorted")

    def seeded(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(8)
        return call(*tensors)

    assert gradcheck(seeded, call.tensors, fast_mode=True)
    assert gradgradcheck(seeded, call.tensors, fast_mode=True)
