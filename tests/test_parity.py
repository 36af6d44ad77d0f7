"""Do the modules compute what those of torch.nn compute: outputs, final states, all gradients?

The error policy, and with it every tolerance, is in helpers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rnn_ext
from helpers import (
    CELL_CLASS_NAMES,
    CELLS,
    LAYOUTS,
    Config,
    assert_matches_torch,
    assert_results_match,
    check,
    configs,
    evaluate,
    flatten,
    make_call,
    make_cell_call,
    make_module,
    normal,
    pack,
    threads,
)

each_cell = pytest.mark.parametrize("cell", CELLS)
each_cell_class = pytest.mark.parametrize("class_name", CELL_CLASS_NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


# ------------------------------------------------------------------------------------ the grid


@each_cell
@each_dtype
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no_state"])
def test_stack(
    cell: str, dtype: torch.dtype, layers: int, bidirectional: bool, bias: bool, given_state: bool
) -> None:
    check(
        Config(
            cell,
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            given_state=given_state,
            dtype=dtype,
        )
    )


@each_dtype
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("proj_size", [1, 3, 6])
def test_projection(
    dtype: torch.dtype, layers: int, bidirectional: bool, bias: bool, proj_size: int
) -> None:
    check(
        Config(
            "lstm",
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            proj_size=proj_size,
            dtype=dtype,
        )
    )


@each_cell
@each_dtype
@pytest.mark.parametrize("batch", [0, 1, 4, None], ids=["empty", "one", "batch", "unbatched"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no_state"])
def test_shapes(
    cell: str,
    dtype: torch.dtype,
    batch: int | None,
    batch_first: bool,
    steps: int,
    given_state: bool,
) -> None:
    check(
        Config(
            cell,
            num_layers=2,
            bidirectional=True,
            batch=batch,
            batch_first=batch_first,
            steps=steps,
            given_state=given_state,
            dtype=dtype,
        )
    )


@each_cell
@pytest.mark.parametrize("input_size", [1, 15, 16, 65])
@pytest.mark.parametrize("hidden_size", [1, 15, 16, 65])
@pytest.mark.parametrize("batch", [1, 7, 17])
def test_sizes_around_the_vector_width(
    cell: str, input_size: int, hidden_size: int, batch: int
) -> None:
    check(Config(cell, input_size=input_size, hidden_size=hidden_size, batch=batch, steps=3))


@each_cell
@each_dtype
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_memory_layout_of_the_arguments(
    cell: str, dtype: torch.dtype, layout: str, batch_first: bool
) -> None:
    check(
        Config(
            cell,
            num_layers=2,
            bidirectional=True,
            batch_first=batch_first,
            layout=layout,
            dtype=dtype,
        )
    )


@each_cell
@each_dtype
def test_memory_layout_of_the_weights(cell: str, dtype: torch.dtype) -> None:
    config = Config(cell, num_layers=2, dtype=dtype)
    ours, theirs = make_module(config), make_module(config, library=nn)
    for parameter in ours.parameters():
        # Matrices lie transposed, biases are every second element of a wider tensor.
        wide = torch.stack([parameter.detach(), torch.full_like(parameter, torch.nan)], dim=-1)
        matrix = parameter.dim() == 2
        strided = parameter.detach().t().contiguous().t() if matrix else wide[..., 0]
        assert not strided.is_contiguous()
        parameter.data = strided
    assert_matches_torch(ours, make_call(config), theirs)


@each_cell
@pytest.mark.parametrize(
    ("steps", "batch", "input_size", "hidden_size", "layers", "bidirectional"),
    [
        (40, 1, 64, 128, 1, False),
        (12, 1, 100, 200, 2, True),
        (10, 16, 128, 96, 1, True),
        (5, 37, 40, 72, 2, False),
        (4, 64, 28, 130, 1, False),
        (2, 150, 9, 33, 1, True),
    ],
)
def test_larger_than_one_tile(
    cell: str,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    layers: int,
    bidirectional: bool,
) -> None:
    config = Config(
        cell,
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=layers,
        bidirectional=bidirectional,
        steps=steps,
        batch=batch,
    )
    ours, theirs, call = make_module(config), make_module(config, library=nn), make_call(config)
    for count in (1, 2):
        with threads(count):
            results = evaluate(ours, call)
        assert_results_match(results, theirs, call)


# ------------------------------------------------------------------------------- drawn by chance


@settings(max_examples=250)
@given(configs(torch.float32))
def test_drawn_float32(config: Config) -> None:
    check(config)


@settings(max_examples=150)
@given(configs(torch.float64))
def test_drawn_float64(config: Config) -> None:
    check(config)


@settings(max_examples=60)
@given(
    class_name=st.sampled_from(CELL_CLASS_NAMES),
    input_size=st.integers(1, 40),
    hidden_size=st.integers(1, 40),
    batch=st.none() | st.integers(0, 20),
    bias=st.booleans(),
    given_state=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@example("LSTMCell", 64, 64, 1, True, True, torch.float32, 0)
def test_drawn_cells(
    class_name: str,
    input_size: int,
    hidden_size: int,
    batch: int | None,
    bias: bool,
    given_state: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ours = getattr(rnn_ext, class_name)(input_size, hidden_size, bias=bias, dtype=dtype)
    call = make_cell_call(
        class_name,
        input_size,
        hidden_size,
        batch=batch,
        given_state=given_state,
        dtype=dtype,
        seed=seed,
    )
    assert_matches_torch(ours, call)


# ---------------------------------------------------------------------------- cells of one step


@each_cell_class
@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch", [0, 1, 5, None], ids=["empty", "one", "batch", "single"])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no_state"])
def test_cell(
    class_name: str, dtype: torch.dtype, bias: bool, batch: int | None, given_state: bool
) -> None:
    ours = getattr(rnn_ext, class_name)(9, 7, bias=bias, dtype=dtype)
    call = make_cell_call(class_name, 9, 7, batch=batch, given_state=given_state, dtype=dtype)
    assert_matches_torch(ours, call)


@each_dtype
@pytest.mark.parametrize("batch", [1, 5, None], ids=["one", "batch", "single"])
def test_relu_cell(dtype: torch.dtype, batch: int | None) -> None:
    ours = rnn_ext.RNNCell(9, 7, nonlinearity="relu", dtype=dtype)
    assert_matches_torch(ours, make_cell_call("RNNCell", 9, 7, batch=batch, dtype=dtype))


@each_cell_class
def test_cell_called_step_by_step_trains_through_all_steps(class_name: str) -> None:
    ours = getattr(rnn_ext, class_name)(5, 7, dtype=torch.float64)
    theirs = getattr(nn, class_name)(5, 7, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(6, 3, 5, dtype=torch.float64)

    def unroll(cell: nn.Module) -> dict[str, Tensor]:
        state = None
        for x in input:
            state = cell(x, state)
        final = flatten(state)
        sum((part**2).sum() for part in final).backward()
        return {"h_n": final[0].detach()} | {n: p.grad for n, p in cell.named_parameters()}

    actual, expected = unroll(ours), unroll(theirs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


# --------------------------------------------------------------------------------- stateless calls


@each_cell
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_functional_equals_module(
    cell: str, packed: bool, given_state: bool, proj_size: int
) -> None:
    config = Config(
        cell,
        num_layers=2,
        bidirectional=True,
        proj_size=proj_size if cell == "lstm" else 0,
        given_state=given_state,
        lengths=(5, 3, 3, 1) if packed else None,
        dtype=torch.float64,
    )
    module, call = make_module(config), make_call(config)
    input, *state = call.arrange(call.leaves)
    options: dict[str, object] = {"num_layers": 2, "bidirectional": True}
    if packed:
        options["batch_sizes"] = input.batch_sizes
    function = getattr(rnn_ext.functional, cell)
    actual = function(
        input.data if packed else input,
        state[0] if state else None,
        list(module.parameters()),
        **options,
    )
    for result, expected in zip(flatten(actual), flatten(module(input, *state)), strict=True):
        assert torch.equal(result, expected)


# --------------------------------------------------------------------------------------- autograd


def double_pair(cell: str, **options: object) -> tuple[nn.RNNBase, nn.RNNBase, Config]:
    """Our module and torch's with the same weights, float64."""
    config = Config(cell, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    return make_module(config), make_module(config, library=nn), config


@each_cell
@pytest.mark.parametrize(
    "wanted", ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l1_reverse", "bias_hh_l0", "none"]
)
def test_only_one_gradient_wanted(cell: str, wanted: str) -> None:
    if wanted == "c_0" and cell != "lstm":
        wanted = "h_0"
    ours, theirs, config = double_pair(cell)
    call = make_call(config)

    def gradients(module: nn.RNNBase) -> dict[str, Tensor | None]:
        tensors = call.leaves_for(module)
        results = flatten(module.requires_grad_(False)(*call.arrange(tensors)))
        assert not any(r.requires_grad for r in results)
        tensors |= dict(module.named_parameters())
        if wanted != "none":
            tensors[wanted].requires_grad_()
            leaves = {name: tensors[name] for name in call.leaves}
            results = flatten(module(*call.arrange(leaves)))
            sum((r**2).sum() for r in results).backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    actual, expected = gradients(ours), gradients(theirs)
    assert [n for n, g in actual.items() if g is not None] == [n for n in [wanted] if n != "none"]
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=name, check_device=False)


def last_step(result: Tensor) -> Tensor:
    return result[-1].sum()


def total(result: Tensor) -> Tensor:
    return result.sum()  # its gradient is an expanded scalar


def transposed(result: Tensor) -> Tensor:
    weights = torch.arange(result.numel(), dtype=result.dtype, device=result.device)
    weights = weights.view(result.shape[::-1])
    return (result.permute(2, 1, 0) * weights).sum()


@each_cell
@pytest.mark.parametrize("loss", [last_step, total, transposed])
@pytest.mark.parametrize("used", [0, 1, 2], ids=["output", "h_n", "c_n"])
def test_only_one_result_used(cell: str, loss: Callable[[Tensor], Tensor], used: int) -> None:
    if used == 2 and cell != "lstm":
        used = 0
    ours, theirs, config = double_pair(cell)
    call = make_call(config)

    def gradients(module: nn.RNNBase) -> dict[str, Tensor | None]:
        leaves = {n: leaf.requires_grad_() for n, leaf in call.leaves_for(module).items()}
        loss(flatten(module(*call.arrange(leaves)))[used]).backward()
        return {n: t.grad for n, t in (leaves | dict(module.named_parameters())).items()}

    actual, expected = gradients(ours), gradients(theirs)
    for name, gradient in expected.items():
        # Where nothing flows, torch may leave no gradient where we give zeros, or the reverse.
        zero = torch.zeros(1, dtype=torch.float64, device="cpu")
        torch.testing.assert_close(
            actual[name] if actual[name] is not None else zero.expand_as(gradient),
            gradient if gradient is not None else zero.expand_as(actual[name]),
            msg=name,
            check_device=False,
        )


@each_cell
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_twice_through_a_retained_graph(cell: str, training: bool) -> None:
    ours, _, config = double_pair(cell, training=training)
    output = flatten(ours(*make_call(config).arrange(make_call(config).leaves)))[0]
    loss = (output**2).sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(ours.parameters()))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, list(ours.parameters()))


@each_cell
def test_two_calls_before_their_backward(cell: str) -> None:
    """What one call keeps for its backward survives the next call."""
    ours, theirs, config = double_pair(cell)
    calls = [make_call(config), make_call(replace(config, seed=5))]

    def gradients(module: nn.RNNBase) -> list[Tensor]:
        leaves = [c.leaves_for(module) for c in calls]
        results = [module(*c.arrange(own)) for c, own in zip(calls, leaves, strict=True)]
        losses = [(flatten(result)[0] ** 2).sum() for result in results]
        return [g for x in losses for g in torch.autograd.grad(x, list(module.parameters()))]

    for actual, expected in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(actual, expected, check_device=False)


@each_cell
def test_state_carried_over_calls(cell: str) -> None:
    """Truncated backward: results feed the next call, attached or detached (also in place)."""
    ours, theirs, config = double_pair(cell)
    call = make_call(config)

    def gradients(module: nn.RNNBase) -> list[Tensor]:
        input = call.leaves_for(module)["input"]
        _, state = module(input)
        output, state = module(input, state)
        state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()
        later, state = module(input, state)
        for part in flatten(state):
            part.detach_()
        last, _ = module(input, state)
        loss = (output**2).sum() + (later**2).sum() + (last**2).sum()
        return list(torch.autograd.grad(loss, list(module.parameters())))

    for actual, expected in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(actual, expected, check_device=False)


@each_cell
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_grad(cell: str, mode: Callable) -> None:
    ours, _, config = double_pair(cell)
    call = make_call(config)
    leaves = {n: leaf.clone().requires_grad_() for n, leaf in call.leaves.items()}
    with mode():
        results = flatten(ours(*call.arrange(leaves)))
    assert all(r.grad_fn is None and not r.requires_grad for r in results)
    assert all(r.is_inference() == (mode is torch.inference_mode) for r in results)
    expected = evaluate(ours, call)
    for result, name in zip(results, expected, strict=False):
        torch.testing.assert_close(result, expected[name], check_device=False)


@each_cell
def test_results_and_arguments_are_independent_memory(cell: str) -> None:
    ours, _, config = double_pair(cell)
    call = make_call(config)
    before = {name: leaf.clone() for name, leaf in call.leaves.items()}
    with torch.no_grad():
        results = flatten(ours(*call.arrange(call.leaves)))
        for i, result in enumerate(results):
            result.fill_(i)
    assert all((result == i).all() for i, result in enumerate(results))
    assert all(torch.equal(leaf, before[name]) for name, leaf in call.leaves.items())


@each_cell
@pytest.mark.parametrize(("batch", "hidden_size"), [(1, 200), (33, 72)])
def test_same_bits_in_every_run(cell: str, batch: int, hidden_size: int) -> None:
    config = Config(cell, input_size=40, hidden_size=hidden_size, steps=12, batch=batch)
    module, call = make_module(config), make_call(config)
    with threads(2):
        first, *others = [evaluate(module, call) for _ in range(4)]
    for again in others:
        assert all(torch.equal(first[name], again[name]) for name in first)


# ---------------------------------------------------------------------------------------- dropout


@each_cell
@pytest.mark.parametrize(("p", "training"), [(0.5, False), (1.0, True), (0.0, True)])
def test_dropout_without_chance(cell: str, p: float, training: bool) -> None:
    config = Config(cell, num_layers=3, bidirectional=True, training=training)
    ours, theirs = make_module(config), make_module(config, library=nn)
    ours.dropout = theirs.dropout = p
    assert_matches_torch(ours, make_call(config), theirs)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dropout_drops_the_right_share_between_layers(packed: bool) -> None:
    """Two relu layers that pass on ones: the output shows the mask between them."""
    p, size = 0.3, 32
    module = rnn_ext.RNN(size, size, num_layers=2, bias=False, nonlinearity="relu", dropout=p)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(torch.eye(size) if "ih" in name else torch.zeros(size, size))
    input: object = torch.ones(40, 25, size)
    if packed:
        input = pack(list(torch.ones(25, 40, size)))
    output = flatten(module(input))[0]
    kept = output != 0
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / output.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    by_feature = kept.view(-1, size).double().mean(0)
    assert 0 < by_feature.min() < by_feature.max(), "features share a mask"


@each_cell
def test_dropout_follows_the_seed_and_masks_the_gradient(cell: str) -> None:
    config = Config(cell, num_layers=2, steps=5, batch=3, dtype=torch.float64)
    module, call = make_module(config), make_call(config)
    module.dropout = 0.5
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(evaluate(module, call))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["output"], runs[2]["output"])
    # Forward and backward see the same mask: compare the gradient with a difference quotient.
    direction = torch.randn_like(call.leaves["input"])
    cotangent_of = replace(call, backward=False)

    def loss(step: float) -> float:
        torch.manual_seed(1)
        shifted = call.leaves | {"input": call.leaves["input"] + step * direction}
        results = evaluate(module, replace(cotangent_of, leaves=shifted))
        generator = torch.Generator().manual_seed(call.seed)
        return sum((r * normal(generator, r.shape)).sum().item() for r in results.values())

    step = 1e-6
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert slope == pytest.approx((runs[0]["d_input"] * direction.cpu()).sum().item(), rel=1e-6)


@pytest.mark.cpu_only("a generator of another device draws other masks")
@each_cell
def test_drawn_dropout_equals_torch(cell: str) -> None:
    """torch draws one mask for the whole output of a layer, all steps and directions; so do we."""
    config = Config(cell, num_layers=3, bidirectional=True, dtype=torch.float64)
    ours, theirs = make_module(config), make_module(config, library=nn)
    ours.dropout = theirs.dropout = 0.4
    call = make_call(config)
    torch.manual_seed(3)
    actual = evaluate(ours, call)
    torch.manual_seed(3)
    assert_results_match(actual, theirs, call)
