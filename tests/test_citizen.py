"""What torch.nn offers around modules: tracing, sharing, swapping, counting, autocast."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.profiler import profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import rnn_ext

NAMES = ("RNN", "LSTM", "GRU")
CELL_NAMES = ("RNNCell", "LSTMCell", "GRUCell")
each_name = pytest.mark.parametrize("name", NAMES)
each_class = pytest.mark.parametrize("name", NAMES + CELL_NAMES)
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def make(name: str, **options: object) -> nn.Module:
    return getattr(rnn_ext, name)(4, 5, **options)


def make_input(name: str) -> Tensor:
    return torch.randn(6, 3, 4) if name in NAMES else torch.randn(3, 4)


def flat(results: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(results)


def same(found: object, expected: object) -> None:
    torch.testing.assert_close(flat(found), flat(expected))


# --------------------------------------------------------------------------------- TorchScript


@deprecated
@each_class
def test_trace(name: str) -> None:
    module, input = make(name).eval(), make_input(name)
    with torch.no_grad():
        traced = torch.jit.trace(module, input)
        assert "rnn_ext::recurrent" in str(traced.inlined_graph)
        same(traced(2 * input), module(2 * input))
        if name in NAMES:
            same(traced(input[:2, :1]), module(input[:2, :1]))


@deprecated
@each_class
@pytest.mark.parametrize("inside", [False, True])
def test_script_says_what_to_do(name: str, inside: bool) -> None:
    model = nn.Sequential(make(name)) if inside else make(name)
    with pytest.raises(NotImplementedError, match=r"script rnn_ext\.to_torch\(model\)"):
        torch.jit.script(model)
    # In a model: torch's own recurrent layers cannot be called when scripted alone.
    scripted = torch.jit.script(nn.Sequential(rnn_ext.to_torch(model)))
    input = make_input(name)
    same(scripted(input), model(input))


@deprecated
@each_name
def test_quantize_dynamic(name: str) -> None:
    plain = rnn_ext.to_torch(nn.Sequential(make(name)))
    if name == "RNN":  # torch has no quantized one: left as it is, by torch
        quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.RNN})
        assert type(quantized[0]) is nn.RNN
        return
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.LSTM, nn.GRU})
    assert type(quantized[0]).__module__.startswith("torch.ao.nn.quantized.dynamic")
    input = make_input(name)
    # Weights and inputs of 8 bits, in a few steps: some hundredths.
    torch.testing.assert_close(quantized(input)[0], plain(input)[0], atol=0.05, rtol=0)


# ------------------------------------------------------------------------- where weights live


@each_class
def test_built_on_meta_and_materialized(name: str) -> None:
    with torch.device("meta"):
        module = make(name)
    assert all(p.is_meta for p in module.parameters())
    assert flat(module(torch.empty_like(make_input(name), device="meta")))[0].is_meta
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    expected, input = make(name), make_input(name)
    same(module(input), expected(input))


@each_class
def test_meta_weights_assigned_from_a_state_dict(name: str) -> None:
    source = make(name)
    with torch.device("meta"):
        module = make(name)
    module.load_state_dict(source.state_dict(), assign=True)
    input = make_input(name)
    same(module(input), source(input))


@each_class
def test_swapped_tensors(name: str) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = make(name)
        parameters = list(module.parameters())
        module.double()
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
        assert flat(module(make_input(name).double()))[0].dtype == torch.float64
        input = make_input(name).double()
        if name in CELL_NAMES:  # torch's own layers hold weak references, which forbid the rest
            other = make(name).double()
            module.load_state_dict(other.state_dict())
            with torch.no_grad():
                same(module(input), other(input))
            for mine, new in zip(
                module.parameters(), make(name).double().parameters(), strict=True
            ):
                torch.utils.swap_tensors(mine, new)
            assert not torch.equal(flat(module(input))[0], flat(other(input))[0])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@each_class
def test_replicas(name: str) -> None:
    """What DataParallel makes: modules without parameters, weights as plain attributes."""
    module, input = make(name), make_input(name)
    replica = module._replicate_for_data_parallel()
    names = [n for n, _ in module.named_parameters()]
    for key in names:
        setattr(replica, key, 2 * getattr(module, key))
    replica._former_parameters = {n: getattr(replica, n) for n in names}
    assert not list(replica.parameters())
    expected = functional_call(module, {n: 2 * p for n, p in module.named_parameters()}, input)
    same(replica(input), expected)
    flat(replica(input))[0].sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "ih" in n)


@each_class
def test_stacked_state(name: str) -> None:
    modules = [make(name) for _ in range(3)]
    params, _ = stack_module_state(modules)
    input = make_input(name)
    found = torch.vmap(lambda p: functional_call(modules[0], p, (input,)))(params)
    expected = [torch.stack(rs) for rs in zip(*(flat(m(input)) for m in modules), strict=True)]
    same(flat(found), expected)


def _train_shared(module: nn.Module, input: Tensor) -> None:
    torch.set_num_threads(1)
    flat(module(input))[0].sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= parameter.grad


@each_name
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shared_memory_is_trained_by_another_process(name: str, method: str) -> None:
    module, input = make(name), make_input(name)
    expected = copy.deepcopy(module)
    _train_shared(expected, input)
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    process = torch.multiprocessing.get_context(method).Process(
        target=_train_shared, args=(module, input)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    same(list(module.parameters()), list(expected.parameters()))


class Encoded(Dataset):
    """Examples that a recurrent module makes, in the worker."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.module(torch.full((3, 4), float(index)))[0]


@each_name
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(name: str, method: str) -> None:
    data = Encoded(make(name))
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    same(torch.cat(list(loader)), torch.stack([data[i] for i in range(6)]))


# ------------------------------------------------------------------------------ mixed precision


@each_name
def test_autocast_as_torch(name: str) -> None:
    module, input = make(name, num_layers=2), make_input(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(input)
        expected = rnn_ext.to_torch(module)(input)
    # Of the region's dtype, all three; torch on the CPU leaves its GRU in float32.
    assert [t.dtype for t in flat(found)] == [torch.bfloat16] * len(flat(expected))
    floats = [[t.float() for t in flat(results)] for results in (found, expected)]
    # A few roundings to bfloat16 (2^-9 each) apart: torch rounds gates where we do not. Accuracy
    # itself is judged in test_dtypes.py.
    torch.testing.assert_close(*floats, atol=0.02, rtol=0.02)
    flat(found)[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_autocast_is_registered_for_cuda() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("rnn_ext::recurrent", "AutocastCPU")
    assert has("rnn_ext::recurrent", "AutocastCUDA")


@each_name
def test_grad_scaler(name: str) -> None:
    module, twin, input = make(name), make(name), make_input(name)
    twin.load_state_dict(module.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, twin)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, plain = module(input)[0].sum(), twin(input)[0].sum()
    scaler.scale(loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    plain.backward()
    optimizers[1].step()
    same(list(module.parameters()), list(twin.parameters()))
    before = [p.detach().clone() for p in module.parameters()]
    (scaler.scale(module(input)[0].sum()) * float("inf")).backward()
    scaler.step(optimizers[0])
    scaler.update()
    same(list(module.parameters()), before)  # the step was left out
    assert scaler.get_scale() == 512.0


@each_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_mixed_dtypes_raise_as_in_torch(name: str, dtype: torch.dtype) -> None:
    input = make_input(name).to(dtype)
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever torch raises)
        getattr(nn, name)(4, 5)(input)
    with pytest.raises(theirs.type):
        make(name)(input)


# ---------------------------------------------------------------------------- what tools see


def count(function: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@each_name
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_flops_are_those_of_the_products(
    name: str, bidirectional: bool, input_gradient: bool
) -> None:
    module = make(name, num_layers=2, bidirectional=bidirectional)
    input = make_input(name).requires_grad_(input_gradient)
    steps, batch = input.shape[:2]
    h_0 = torch.zeros(4 if bidirectional else 2, batch, 5, requires_grad=True)
    hx = (h_0, h_0) if name == "LSTM" else h_0

    def by_hand() -> Tensor:
        x, total = input, 0
        for layer in range(2):
            outputs = []
            for suffix in ["", "_reverse"][: 2 if bidirectional else 1]:
                w_ih = getattr(module, f"weight_ih_l{layer}{suffix}")
                w_hh = getattr(module, f"weight_hh_l{layer}{suffix}")
                gates = nn.functional.linear(x, w_ih)
                h, ys = h_0[layer], []
                for t in range(steps):
                    g = gates[t] + nn.functional.linear(h, w_hh)
                    h = sum(g.split(5, dim=-1))
                    ys.append(h)
                outputs.append(torch.stack(ys))
            x = torch.cat(outputs, -1)
        return x.sum() + total

    assert count(lambda: module(input, hx)) == count(by_hand)
    assert count(lambda: module(input, hx)[0].sum().backward()) == count(
        lambda: by_hand().backward()
    )


def test_flops_of_a_projection_and_of_several_models() -> None:
    module, input = make("LSTM", proj_size=2), make_input("LSTM")
    expected = 2 * 18 * (20 * 4 + 20 * 2 + 2 * 5)
    assert count(lambda: module(input)) == expected
    params = [torch.stack([p, p]) for p in module._flat_weights]
    call = (torch.stack([input, input]), None, None, None, params, 2, True, 1)
    operator = torch.ops.rnn_ext.recurrent
    assert count(lambda: operator(*call, False, False, 0.0, False)) == 2 * expected


@each_name
def test_the_profiler_shows_both_operators_by_name(name: str) -> None:
    module, input = make(name), make_input(name)
    with profile() as records:
        module(input)[0].sum().backward()
    names = {e.key for e in records.key_averages()}
    assert {"rnn_ext::recurrent", "rnn_ext::recurrent_backward", "RecurrentBackward"} <= names


@each_class
def test_no_warning_from_any_of_it(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = make(name)
        flat(module(make_input(name)))[0].sum().backward()
        module.share_memory()
        copy.deepcopy(module)
