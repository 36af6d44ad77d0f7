"""convert and to_torch: every recurrent module swapped, everything else about the model kept."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnn_ext
from devices import to_device, without_cudnn
from helpers import ALL_CLASS_NAMES, CLASS_NAMES, flatten

each_class = pytest.mark.parametrize("name", ALL_CLASS_NAMES)
each_way = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])

scripting_is_deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")

FUSED = {getattr(nn, name): getattr(rnn_ext, name) for name in ALL_CLASS_NAMES}


class Net(nn.Module):
    """Recurrent modules in every place where one can be registered."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True)
        self.stack = nn.Sequential(nn.Linear(16, 6), nn.ModuleList([nn.GRU(6, 6)]))
        self.by_name = nn.ModuleDict({"rnn": nn.RNN(6, 6, nonlinearity="relu")})
        self.cells = nn.ModuleList([nn.RNNCell(6, 6), nn.LSTMCell(6, 6), nn.GRUCell(6, 6)])
        self.again = self.stack[1][0]  # the same module by another path
        self.norm = nn.BatchNorm1d(6)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x = self.stack[0](x)
        x, _ = self.stack[1][0](x)
        x, _ = self.again(x)
        x, _ = self.by_name["rnn"](x)
        h = self.norm(x[-1])
        for cell in self.cells:
            h = flatten(cell(h))[0]
        return h


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return to_device(torch.randint(11, (5, 4), generator=generator, device="cpu"))


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def same_objects(first: object, second: object) -> bool:
    return all(a is b for a, b in zip(first, second, strict=True))


def assert_same_function(first: Callable, second: Callable, *inputs: object) -> None:
    for actual, expected in zip(flatten(first(*inputs)), flatten(second(*inputs)), strict=True):
        torch.testing.assert_close(actual, expected)


# ------------------------------------------------------------------------------- what is swapped


@each_class
@each_way
def test_model_that_is_itself_recurrent(name: str, inplace: bool) -> None:
    plain = getattr(nn, name)(4, 6, bias=False)
    weights = list(plain.parameters())
    expected = plain(torch.ones(3, 4))
    fused = rnn_ext.convert(plain, inplace=inplace)
    assert type(fused) is getattr(rnn_ext, name)
    assert (fused is plain) == inplace
    assert type(plain) is getattr(rnn_ext if inplace else nn, name)
    assert same_objects(fused.parameters(), weights)
    for actual, before in zip(flatten(fused(torch.ones(3, 4))), flatten(expected), strict=True):
        torch.testing.assert_close(actual, before)
    back = rnn_ext.to_torch(fused, inplace=inplace)
    assert type(back) is getattr(nn, name)
    assert (back is fused) == inplace
    assert vars(back).keys() == vars(plain).keys()


@each_way
def test_every_place_in_a_model(inplace: bool) -> None:
    model = Net().double()
    before = classes(model)
    modules = list(model.modules())
    reference = copy.deepcopy(model)
    fused = rnn_ext.convert(model, inplace=inplace)
    assert classes(fused) == [FUSED.get(c, c) for c in before]
    assert sum(c.__module__.startswith("rnn_ext") for c in classes(fused)) == 6
    assert classes(model) == (classes(fused) if inplace else before)
    assert same_objects(model.modules(), modules)
    for m in fused.modules():
        assert any(m is module for module in modules) == inplace
    assert fused.again is fused.stack[1][0]
    assert_same_function(fused, reference, tokens())
    back = rnn_ext.to_torch(fused, inplace=inplace)
    assert classes(back) == before
    assert repr(back) == repr(reference)


@each_way
def test_nothing_to_swap(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    fused = rnn_ext.convert(model, inplace=inplace)
    assert classes(fused) == classes(model)
    assert same_objects(fused.parameters(), model.parameters())


@each_way
def test_twice_is_once(inplace: bool) -> None:
    once = rnn_ext.convert(Net(), inplace=inplace)
    assert classes(rnn_ext.convert(once, inplace=inplace)) == classes(once)
    plain = rnn_ext.to_torch(once, inplace=inplace)
    assert classes(rnn_ext.to_torch(plain, inplace=inplace)) == classes(Net())


@each_way
def test_classes_of_the_user_are_left_alone(inplace: bool) -> None:
    class Mine(nn.LSTM):
        def forward(self, input: Tensor, hx: object = None) -> Tensor:
            return super().forward(input, hx)[0]

    class MineFused(rnn_ext.GRU):
        pass

    assert type(rnn_ext.convert(Mine(3, 4), inplace=inplace)) is Mine
    assert type(rnn_ext.to_torch(MineFused(3, 4), inplace=inplace)) is MineFused
    nested = rnn_ext.convert(nn.ModuleList([Mine(3, 4), nn.LSTM(3, 4)]), inplace=inplace)
    assert classes(nested)[1:] == [Mine, rnn_ext.LSTM]


@scripting_is_deprecated
@each_way
def test_scripted_modules_are_left_alone(inplace: bool) -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    model = rnn_ext.convert(nn.ModuleList([scripted, nn.LSTM(3, 3)]), inplace=inplace)
    assert model[0] is scripted
    assert type(model[1]) is rnn_ext.LSTM
    assert rnn_ext.convert(scripted, inplace=inplace) is scripted


# ----------------------------------------------------------------------------------- what is kept


@each_way
def test_tensors_and_settings(inplace: bool) -> None:
    model = Net().double().eval()
    model.lstm.train()
    model.again.weight_hh_l0.requires_grad_(False)
    model.lstm.label = "mine"
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    training = [m.training for m in model.modules()]
    state = list(model.state_dict())
    flat_weights = list(model.lstm._flat_weights)

    def check(converted: nn.Module) -> None:
        assert same_objects(converted.parameters(), parameters.values())
        assert same_objects(converted.buffers(), buffers.values())
        assert list(converted.state_dict()) == state
        assert [m.training for m in converted.modules()] == training
        assert not converted.again.weight_hh_l0.requires_grad
        assert converted.lstm.label == "mine"
        assert same_objects(converted.lstm._flat_weights, flat_weights)
        assert same_objects((ref() for ref in converted.lstm._flat_weight_refs), flat_weights)

    fused = rnn_ext.convert(model, inplace=inplace)
    check(fused)
    check(rnn_ext.to_torch(fused, inplace=inplace))


@each_way
def test_device_and_dtype(inplace: bool) -> None:
    model = nn.ModuleList([nn.LSTM(3, 4, device="meta"), nn.GRUCell(3, 4, dtype=torch.bfloat16)])
    fused = rnn_ext.convert(model, inplace=inplace)
    assert all(p.is_meta for p in fused[0].parameters())
    assert all(p.dtype == torch.bfloat16 for p in fused[1].parameters())


@each_way
def test_optimizer_and_its_state_keep_working(inplace: bool) -> None:
    model, reference = Net().double(), Net().double()
    reference.load_state_dict(model.state_dict())
    losses = []
    for net in (model, reference):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(6):
            if net is model and step == 3:
                net = rnn_ext.convert(model, inplace=inplace)
            optimizer.zero_grad()
            loss = net(tokens()).square().sum()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))


def test_copy_and_original_are_two_trees_over_the_same_tensors() -> None:
    model = Net()
    fused = rnn_ext.convert(model)
    fused.eval()
    assert all(m.training for m in model.modules())
    fused.lstm.register_forward_hook(lambda *_: None)
    assert not model.lstm._forward_hooks
    fused.extra = nn.Linear(2, 2)
    assert not hasattr(model, "extra")
    del fused.by_name["rnn"]
    assert "rnn" in model.by_name
    fused.lstm.weight_hh_l0 = nn.Parameter(torch.zeros(32, 8))
    assert model.lstm.weight_hh_l0 is not fused.lstm.weight_hh_l0
    assert model.lstm._flat_weights[1] is model.lstm.weight_hh_l0
    with torch.no_grad():
        model.lstm.weight_ih_l0.fill_(0.5)
    assert (fused.lstm.weight_ih_l0 == 0.5).all()


@each_way
def test_tied_weights_stay_tied(inplace: bool) -> None:
    model = nn.ModuleList([nn.GRU(5, 5), nn.GRU(5, 5)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    fused = rnn_ext.convert(model, inplace=inplace)
    assert fused[0].weight_hh_l0 is fused[1].weight_hh_l0
    assert len(list(fused.parameters())) == 7


@each_way
def test_hooks_of_every_kind(inplace: bool) -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    lstm, seen = model[0], []

    def record(kind: str) -> Callable:
        return lambda module, *_, **__: seen.append((kind, module))

    lstm.register_forward_pre_hook(record("pre"))
    lstm.register_forward_hook(record("forward"), always_call=True)
    lstm.register_full_backward_pre_hook(record("backward_pre"))
    lstm.register_full_backward_hook(record("backward"))
    lstm.register_state_dict_pre_hook(record("state_dict_pre"))
    lstm.register_state_dict_post_hook(record("state_dict"))
    lstm.register_load_state_dict_pre_hook(record("load_pre"))
    lstm.register_load_state_dict_post_hook(record("load"))
    last = lstm.register_forward_hook(record("removed"))
    fused = rnn_ext.convert(model, inplace=inplace)
    output, _ = fused(torch.ones(2, 1, 3, requires_grad=True))
    output.sum().backward()
    fused.load_state_dict(fused.state_dict())
    kinds = ["pre", "forward", "removed", "backward_pre", "backward"]
    kinds += ["state_dict_pre", "state_dict", "load_pre", "load"]
    assert [kind for kind, _ in seen] == kinds
    assert all(module is fused[0] for _, module in seen)
    if inplace:  # the handle belongs to the module, which is still the same
        last.remove()
        assert len(fused[0]._forward_hooks) == 1


class Recorder(nn.Module):
    """Refers to its own modules in every way that convert says it follows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.calls = 0
        self.in_list = [self.lstm, [self.lstm]]
        self.in_tuple = (self.lstm, 1)
        self.in_dict = {"lstm": self.lstm, self.lstm: "lstm"}
        self.in_set = {self.lstm}
        self.cycle = [self.lstm]
        self.cycle.append(self.cycle)
        self.partial = functools.partial(flatten_with, self.lstm, module=self.lstm)
        self.weak = weakref.ref(self.lstm)
        self.method = self.lstm.extra_repr
        self.other = torch.zeros(3)
        self.handle = self.lstm.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, input: Tensor) -> Tensor:
        return self.lstm(input)[0]


def flatten_with(*arguments: object, module: nn.Module) -> tuple:
    return (*arguments, module)


@each_way
def test_references_lead_to_the_converted_module(inplace: bool) -> None:
    model = Recorder()
    fused = rnn_ext.convert(model, inplace=inplace)
    lstm = fused.lstm
    assert type(lstm) is rnn_ext.LSTM
    assert fused.in_list[0] is fused.in_list[1][0] is fused.in_tuple[0] is lstm
    assert fused.in_dict["lstm"] is lstm
    assert fused.in_dict[lstm] == "lstm"
    assert fused.in_set == {lstm}
    assert fused.cycle[0] is lstm
    assert fused.cycle[1] is fused.cycle
    assert same_objects(fused.partial(), (lstm, lstm))
    assert fused.weak() is lstm
    assert fused.method.__self__ is lstm
    assert fused.other is model.other
    fused(torch.zeros(2, 1, 3))
    assert fused.calls == 1
    assert model.calls == (1 if inplace else 0)
    if not inplace:
        assert model.in_list[0] is model.lstm
        assert type(model.lstm) is nn.LSTM


def test_attributes_in_slots() -> None:
    class Slotted(nn.Module):
        __slots__ = ("child", "label", "unset")

        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(2, 2)
            object.__setattr__(self, "child", self.rnn)
            self.label = "x"

    fused = rnn_ext.convert(Slotted())
    assert fused.child is fused.rnn
    assert fused.label == "x"
    assert not hasattr(fused, "unset")


# ------------------------------------------------------------------- weights that are computed


def weight_name(name: str) -> str:
    return "weight_hh_l0" if name in CLASS_NAMES else "weight_hh"


def make_input(name: str) -> Tensor:
    """An input whose result depends on weight_hh: more than one step, or see `run`."""
    shape = (4, 2, 3) if name in CLASS_NAMES else (2, 3)
    return torch.ones(shape, dtype=torch.float64)


def run(module: nn.Module, name: str) -> Tensor:
    hx = None
    if name not in CLASS_NAMES:
        h = torch.ones(2, 4, dtype=torch.float64)
        hx = (h, h) if name == "LSTMCell" else h
    return flatten(module(make_input(name), hx))[0]


@each_class
@each_way
@pytest.mark.parametrize(
    "constrain",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_parametrizations(name: str, inplace: bool, constrain: Callable) -> None:
    # In eval: training, spectral_norm takes a power iteration whenever anything reads the weight.
    plain = constrain(getattr(nn, name)(3, 4, dtype=torch.float64).eval(), weight_name(name))
    twin = copy.deepcopy(plain)
    plain_class = type(plain)
    fused = rnn_ext.convert(plain, inplace=inplace)
    assert type(fused).__name__ == f"Parametrized{name}"
    assert isinstance(fused, getattr(rnn_ext, name))
    assert parametrize.type_before_parametrizations(fused) is getattr(rnn_ext, name)
    assert same_objects(fused.parameters(), plain.parameters())
    losses = []
    for module in (fused, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with without_cudnn():  # its backward is for training mode only
                loss = run(module, name).square().sum()
                loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(list(fused.parameters()), list(twin.parameters()))
    if not inplace:
        assert type(plain) is plain_class
    back = rnn_ext.to_torch(fused, inplace=inplace)
    assert parametrize.type_before_parametrizations(back) is getattr(nn, name)
    torch.testing.assert_close(run(back, name), run(twin, name))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@each_way
def test_parametrizations_can_be_changed_afterwards(inplace: bool) -> None:
    model = nn.ModuleList([nn.GRU(3, 4), nn.Linear(3, 4)])
    parametrize.register_parametrization(model[0], "weight_hh_l0", Doubled())
    parametrize.register_parametrization(model[1], "weight", Doubled())
    fused = rnn_ext.convert(model, inplace=inplace)
    value = fused[0].weight_hh_l0.detach().clone()
    parametrize.register_parametrization(fused[0], "weight_ih_l0", Doubled())
    parametrize.register_parametrization(fused[0], "weight_hh_l0", Doubled(), unsafe=True)
    torch.testing.assert_close(fused[0].weight_hh_l0, 2 * value)
    if not inplace:
        assert not parametrize.is_parametrized(model[0], "weight_ih_l0")
        torch.testing.assert_close(model[0].weight_hh_l0, value)
        with parametrize.cached():  # two modules, two entries in torch's cache
            torch.testing.assert_close(model[0].weight_hh_l0, value)
            torch.testing.assert_close(fused[0].weight_hh_l0, 2 * value)
    for tensor_name in ("weight_ih_l0", "weight_hh_l0"):
        parametrize.remove_parametrizations(fused[0], tensor_name)
    parametrize.remove_parametrizations(fused[1], "weight")
    assert type(fused[0]) is rnn_ext.GRU
    assert type(fused[1]) is nn.Linear
    if not inplace:
        assert parametrize.is_parametrized(model[0], "weight_hh_l0")
        assert parametrize.is_parametrized(model[1], "weight")
        model[1](torch.zeros(1, 3))
        model[0](torch.zeros(2, 3))


@each_class
@each_way
def test_weight_norm_by_hook(name: str, inplace: bool) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        plain = nn.utils.weight_norm(getattr(nn, name)(3, 4).double(), weight_name(name))
    run(plain, name)  # leaves a weight that is part of a graph
    fused = rnn_ext.convert(plain, inplace=inplace)
    with torch.no_grad():
        getattr(fused, weight_name(name) + "_g").mul_(3)
    expected = run(rnn_ext.to_torch(fused), name).detach()
    torch.testing.assert_close(run(fused, name), expected)
    run(fused, name).sum().backward()
    assert getattr(fused, weight_name(name) + "_g").grad is not None
    nn.utils.remove_weight_norm(fused, weight_name(name))
    torch.testing.assert_close(run(fused, name), expected)


@each_class
@each_way
def test_pruning(name: str, inplace: bool) -> None:
    plain = getattr(nn, name)(3, 4).double()
    prune.l1_unstructured(plain, weight_name(name), amount=0.5)
    expected = run(plain, name)
    fused = rnn_ext.convert(plain, inplace=inplace)
    torch.testing.assert_close(run(fused, name), expected)
    with torch.no_grad():
        getattr(fused, weight_name(name) + "_orig").fill_(1.0)
    run(fused, name).sum().backward()
    mask = getattr(fused, weight_name(name) + "_mask")
    gradient = getattr(fused, weight_name(name) + "_orig").grad
    assert ((gradient != 0) == mask.bool()).all()
    prune.remove(fused, weight_name(name))
    assert torch.equal(getattr(fused, weight_name(name)).detach(), mask)
    assert torch.equal(run(fused, name), run(rnn_ext.convert(fused), name))


# ------------------------------------------------------------------ a converted model is a model


@each_way
def test_copied_pickled_and_saved(inplace: bool) -> None:
    model = rnn_ext.convert(Net().double().eval(), inplace=inplace)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model)
        assert_same_function(other, model, tokens())
        assert not set(map(id, other.parameters())) & set(map(id, model.parameters()))
    fresh = Net().double().eval()
    fresh.load_state_dict(model.state_dict())
    assert_same_function(fresh, model, tokens())


@scripting_is_deprecated
def test_back_in_torch_a_model_can_be_scripted() -> None:
    model = rnn_ext.to_torch(rnn_ext.convert(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4))))
    scripted = torch.jit.script(model)
    assert_same_function(scripted, model, torch.ones(2, 1, 3))


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("function", [rnn_ext.convert, rnn_ext.to_torch])
@pytest.mark.parametrize("model", [None, [nn.LSTM(2, 2)], nn.LSTM, torch.zeros(2)])
def test_not_a_module(function: Callable, model: object) -> None:
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module, got: "):
        function(model)


@pytest.mark.parametrize("function", [rnn_ext.convert, rnn_ext.to_torch])
@each_way
def test_compiled_model(function: Callable, inplace: bool) -> None:
    child = nn.GRU(2, 2)
    child.compile(backend="eager")
    for model in (torch.compile(nn.GRU(2, 2), backend="eager"), nn.Sequential(child)):
        before = classes(model)
        with pytest.raises(ValueError, match="is compiled; expected a model that is not"):
            function(model, inplace=inplace)
        assert classes(model) == before
