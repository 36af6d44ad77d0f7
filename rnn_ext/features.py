"""What the modules do beyond torch.nn's: a call that uses any of it walks through the layers here.

The recurrence of a layer, with lengths, resets, masks and truncation, is one operator
(`rnn_ext.layer`). What stands around it is plain torch: dropout, the drawing of masks, and the
forms of input that are a padded batch in disguise (packed, jagged, unbatched).

Shapes, with T steps, B batch rows, I input size, H hidden size, L layers, D directions and R =
``proj_size`` of an LSTM that has one, else H. "As the input" means (T, B, ...), with
``batch_first`` (B, T, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnn_ext.functional import GRU, LSTM, RNN_RELU, RNN_TANH
from rnn_ext.layer import LayerNorm, layer

__all__ = ["AllStates", "stream"]

_CELLS = {"RNN_TANH": RNN_TANH, "RNN_RELU": RNN_RELU, "LSTM": LSTM, "GRU": GRU}
_WEIGHT_HH = 1  # its place among the weights of a direction

_States = tuple[Tensor | None, Tensor | None]  # h and, of an LSTM, c


class AllStates(NamedTuple):
    """The states of every layer after every step, in the layout of the output.

    Attributes:
        h: a tensor for each layer: (T, B, D*R), as the input. The last one is the output.
        c: likewise (T, B, D*H); None unless LSTM.
    """

    h: tuple[Any, ...]
    c: tuple[Any, ...] | None


# --------------------------------------------------------------------------------------- options


class Option:
    """An attribute of a module that has a default, and is checked whenever it is set.

    What differs from the defaults is kept in ``module._options``, a dictionary that is replaced
    and never changed, or None: a call sees at one glance that there is nothing to do.
    """

    def __init__(self, default: object, check: Callable[[nn.Module, str, Any], Any]) -> None:
        self.default = default
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        options = None if module is None else module._options
        return self.default if options is None else options.get(self.name, self.default)

    def __set__(self, module: nn.Module, value: Any) -> None:
        value = self.check(module, self.name, value)
        options = dict(module._options or ())
        options.pop(self.name, None)
        if value != self.default:
            options[self.name] = value
        module._options = options or None


def _steps(module: nn.Module, name: str, value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int or None, got: {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _style(module: nn.Module, name: str, value: Any) -> str:
    if value not in ("chunk", "window"):
        raise ValueError(f"{name} must be 'chunk' or 'window', got {value!r}")
    return value


def _probability(module: nn.Module, name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")
    return float(value)


def _zoneout(module: nn.Module, name: str, value: Any) -> float | tuple[float, float]:
    if module.proj_size > 0:
        raise ValueError(f"{name} of an LSTM with projections is not defined")
    if not isinstance(value, (tuple, list)):
        return _probability(module, name, value)
    if module.mode != "LSTM" or len(value) != 2:
        raise ValueError(
            f"{name} should be a number, or for the LSTM a pair of numbers (h, c), got {value!r}"
        )
    h, c = (_probability(module, name, part) for part in value)
    return h if h == c else (h, c)


def _layer_norm(module: nn.Module, name: str, value: Any) -> bool:
    if value is not module.layer_norm:
        raise ValueError(f"{name} has parameters of its own: choose it in the constructor")
    return value


def reset_after_option(module: nn.Module, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    if module.layer_norm and not value:
        raise ValueError(f"{name}=False does not go together with layer_norm")
    return value


class Options:
    """The options of all recurrent modules, as class attributes that hold the defaults."""

    _options: dict[str, Any] | None = None

    bptt_steps = Option(None, _steps)
    bptt_style = Option("chunk", _style)
    checkpoint_steps = Option(None, _steps)
    input_dropout = Option(0.0, _probability)
    hidden_dropout = Option(0.0, _probability)
    weight_dropout = Option(0.0, _probability)
    zoneout = Option(0.0, _zoneout)
    layer_norm = Option(False, _layer_norm)
    reset_after: bool = True  # an option of the GRU


OPTION_NAMES = tuple(name for name, value in vars(Options).items() if isinstance(value, Option))
# What a module computes is the same with and without these.
_KEEPS_RESULTS = {"checkpoint_steps", "bptt_style"}


# Gains and a bias of layer normalization: names of parameters, and what they start from.
_NORMS = {"norm_ih": 1.0, "norm_hh": 1.0, "norm_c": 1.0, "norm_c_bias": 0.0}


def _norm_names(module: nn.Module) -> list[str]:
    return list(_NORMS) if module.mode == "LSTM" else list(_NORMS)[:2]


def _slot_suffixes(module: nn.Module, layer: int) -> list[str]:
    """Of parameters' names, one for each direction."""
    return [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]


def add_layer_norm(module: nn.Module) -> None:
    """Gives a module the parameters of layer normalization, and the option that says so."""
    if module.proj_size > 0:
        raise ValueError("layer_norm of an LSTM with projections is not defined")
    like = module.weight_hh_l0
    for k in range(module.num_layers):
        for suffix in _slot_suffixes(module, k):
            for name in _norm_names(module):
                size = module.hidden_size if name.startswith("norm_c") else like.size(0)
                setattr(module, name + suffix, nn.Parameter(like.new_empty(size)))
    module._options = {**(module._options or {}), "layer_norm": True}
    reset_layer_norm(module)


@torch.no_grad()
def reset_layer_norm(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        start = _NORMS.get(name.partition("_l")[0])
        if start is not None:
            parameter.fill_(start)


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} should be a number, got: {type(value).__name__}")


def set_options(module: nn.Module) -> list[str]:
    """The options that differ from their defaults, as one writes them."""
    return [f"{name}={value!r}" for name, value in (module._options or {}).items()]


def changing_options(module: nn.Module) -> list[str]:
    """Those of them that torch.nn's class could not do without giving other results."""
    return [o for o in set_options(module) if o.partition("=")[0] not in _KEEPS_RESULTS]


def in_use(module: nn.Module) -> bool:
    """Do the module's options change anything about a call made now?"""
    truncates = module.bptt_steps is not None or module.checkpoint_steps is not None
    drops = module.input_dropout or module.hidden_dropout or module.weight_dropout
    return bool(
        (truncates and torch.is_grad_enabled())
        or (drops and module.training)
        or module.zoneout != 0.0
        or module.layer_norm
        or not module.reset_after
    )


# ------------------------------------------------------------------------------------ random masks


def random_mask(size: Sequence[int], p: float, like: Tensor) -> Tensor:
    """1 with probability p, else 0, as a function of one number from torch's generator.

    Made on the CPU, where the same seed gives the same mask on any number of threads.
    """
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    mask = torch.ops.rnn_ext.random_mask(seed, size, p, like.dtype)
    return mask.to(like.device)


def _dropout_mask(size: Sequence[int], dropout: float, like: Tensor) -> Tensor:
    """0 with probability ``dropout``, else what keeps the mean."""
    keep = 1 - dropout
    return random_mask(size, keep, like) / (keep or 1.0)


# ----------------------------------------------------------------------------------------- a call


class _Padded(NamedTuple):
    """A batch as the operator takes it."""

    input: Tensor  # (T, B, I) or (B, T, I)
    batch_first: bool
    lengths: Tensor | None = None  # (B) int64 on the CPU
    resets: Tensor | None = None  # (T, B) or (B, T) bool
    initial: _States = (None, None)  # h_0 (L*D, B, R), c_0 (L*D, B, H)
    reset_to: _States = (None, None)

    @property
    def steps(self) -> int:
        return self.input.size(1 if self.batch_first else 0)

    @property
    def batch(self) -> int:
        return self.input.size(0 if self.batch_first else 1)


def forward(
    module: nn.Module,
    weights: Sequence[Tensor],
    input: Any,
    hx: Any,
    lengths: Any,
    resets: Tensor | None,
    reset_state: Any,
    return_all_states: bool,
) -> tuple[Any, ...]:
    """`rnn_ext.modules` documents arguments, result and errors."""
    if reset_state is not None and resets is None:
        raise ValueError("reset_state is what resets return to: expected resets too")
    call = _Call(module, weights, return_all_states)
    if isinstance(input, PackedSequence):
        output, state, states = call.packed(input, hx, lengths, resets, reset_state)
    elif input.is_nested:
        output, state, states = call.jagged(input, hx, lengths, resets, reset_state)
    elif input.dim() == 2:
        output, state, states = call.unbatched(input, hx, lengths, resets, reset_state)
    else:
        output, state, states = call.batched(
            input, hx, lengths, resets, reset_state, module.batch_first
        )
    return (output, state, states) if return_all_states else (output, state)


class _Call:
    """One call of a module. Each form of input becomes a padded batch, and its results that form
    again: (output, final state in the layout of hx, all states or None)."""

    def __init__(
        self, module: nn.Module, weights: Sequence[Tensor], return_all_states: bool
    ) -> None:
        self.module = module
        self.weights = weights
        self.return_all_states = return_all_states
        self.lstm = module.mode == "LSTM"
        self.directions = 2 if module.bidirectional else 1
        self.state_size = module.proj_size or module.hidden_size

    def packed(
        self, packed: PackedSequence, hx: Any, lengths: Any, resets: Any, reset_state: Any
    ) -> tuple[Any, Any, Any]:
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence has its own")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self.module.check_input(data, batch_sizes)
        batch_first = self.module.batch_first
        input, lengths = pad_packed_sequence(packed, batch_first)
        output, state, states = self.batched(input, hx, lengths, resets, reset_state, batch_first)
        # Where the rows of the packed data stand among those of the padded (T * B).
        batch = torch.arange(len(lengths))
        columns = batch if sorted_indices is None else sorted_indices.cpu()
        rows = torch.arange(len(batch_sizes))[:, None] * len(lengths) + columns
        rows = rows[batch < batch_sizes[:, None]].to(data.device)

        def pack(padded: Tensor) -> PackedSequence:
            padded = padded.transpose(0, 1) if batch_first else padded
            flat = padded.flatten(0, 1).index_select(0, rows)
            return PackedSequence(flat, batch_sizes, sorted_indices, unsorted_indices)

        output, states = _each(pack, output, states)
        return output, state, states

    def jagged(
        self, input: Tensor, hx: Any, lengths: Any, resets: Any, reset_state: Any
    ) -> tuple[Any, Any, Any]:
        if input.layout != torch.jagged or input.dim() != 3:
            raise ValueError(
                f"{self.module._get_name()}: Expected a nested input to be jagged, (B, steps of "
                f"each row, I), got {input.dim()}D of layout {input.layout}"
            )
        if lengths is not None:
            raise ValueError("lengths: a nested tensor has its own")
        values, offsets, counts = input.values(), input.offsets(), input.lengths()
        has_holes = counts is not None
        counts = counts if has_holes else offsets.diff()
        batch, steps = len(counts), max(1, int(counts.max()) if len(counts) else 0)
        step = torch.arange(steps, device=values.device)
        present = step < counts[:, None]  # (B, T)
        padded_rows = present.flatten().nonzero()[:, 0]
        padded = values.new_zeros(batch * steps, values.size(-1)).index_copy(
            0, padded_rows, values.index_select(0, (offsets[: len(counts), None] + step)[present])
        )
        output, state, states = self.batched(
            padded.view(batch, steps, -1), hx, counts, resets, reset_state, True
        )
        if has_holes:  # which the output has not
            offsets = functional.pad(counts.cumsum(0), (1, 0))

        def nest(padded: Tensor) -> Tensor:
            flat = padded.flatten(0, 1).index_select(0, padded_rows)
            return torch.nested.nested_tensor_from_jagged(flat, offsets)

        output, states = _each(nest, output, states)
        return output, state, states

    def unbatched(
        self, input: Tensor, hx: Any, lengths: Any, resets: Any, reset_state: Any
    ) -> tuple[Any, Any, Any]:
        if lengths is not None:
            raise ValueError("lengths: expected a batch of sequences, got 2-D (unbatched) input")
        if isinstance(resets, Tensor):
            if resets.dim() != 1:
                raise RuntimeError(
                    f"For unbatched 2-D input, resets should be 1-D but got {resets.dim()}-D tensor"
                )
            resets = resets.unsqueeze(1)

        def with_batch(state: Any) -> Any:
            h, c = self.module._states(state, 2)
            if h is None:
                return None
            return h.unsqueeze(1) if c is None else (h.unsqueeze(1), c.unsqueeze(1))

        output, state, states = self.batched(
            input.unsqueeze(1), with_batch(hx), None, resets, with_batch(reset_state), False
        )
        output, states = _each(lambda sequence: sequence.squeeze(1), output, states)
        if self.lstm:
            return output, (state[0].squeeze(1), state[1].squeeze(1)), states
        return output, state.squeeze(1), states

    def batched(
        self,
        input: Tensor,
        hx: Any,
        lengths: Any,
        resets: Any,
        reset_state: Any,
        batch_first: bool,
    ) -> tuple[Tensor, Any, AllStates | None]:
        module = self.module
        if input.dim() != 3:
            raise ValueError(
                f"{module._get_name()}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        module.check_input(input, None)
        padded = _Padded(input, batch_first)
        if padded.steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        padded = padded._replace(
            lengths=_checked_lengths(lengths, padded),
            resets=_checked_resets(resets, padded),
            initial=self.checked_state(hx, padded.batch, "hidden"),
            reset_to=self.checked_state(reset_state, padded.batch, "reset_state"),
        )
        truncates = module.bptt_steps is not None and torch.is_grad_enabled()
        walk = self.windows if truncates and module.bptt_style == "window" else self.layers
        output, h_n, c_n, states = walk(padded)
        return output, ((h_n, c_n) if self.lstm else h_n), states

    def checked_state(self, state: Any, batch: int, what: str) -> _States:
        """(h, c) of a state in torch.nn's form. A reset state of one row is for the whole batch."""
        checked = []
        sizes = (self.state_size, self.module.hidden_size)
        for k, (part, size) in enumerate(zip(self.module._states(state, 3), sizes, strict=True)):
            if part is not None:
                if what == "reset_state" and part.size(1) == 1:
                    part = part.expand(-1, batch, -1)
                expected = (self.module.num_layers * self.directions, batch, size)
                name = f"{what}[{k}]" if self.lstm else what
                self.module.check_hidden_size(
                    part, expected, f"Expected {name} size {{}}, got {{}}"
                )
            checked.append(part)
        return checked[0], checked[1]

    def windows(self, call: _Padded) -> tuple[Tensor, Tensor, Tensor, None]:
        from rnn_ext.truncated import window_bptt

        module = self.module
        asked = {
            "lengths, PackedSequence or nested tensors": call.lengths is not None,
            "resets": call.resets is not None,
            "return_all_states": self.return_all_states,
            "checkpoint_steps": module.checkpoint_steps is not None,
            "zoneout": module.zoneout != 0.0,
            "layer_norm": module.layer_norm,
            "reset_after=False": not module.reset_after,
        }
        for name in ("input_dropout", "hidden_dropout", "weight_dropout"):
            asked[name] = module.training and getattr(module, name) > 0
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(f"bptt_style='window' does not go together with {name}")
        output, h_n, c_n = window_bptt(
            call.input, *call.initial, self.weights, _CELLS[module.mode], module.bias,
            module.num_layers, module.bidirectional, call.batch_first, module.dropout,
            module.training, module.bptt_steps,
        )  # fmt: skip
        return output, h_n, c_n, None

    def layers(self, call: _Padded) -> tuple[Tensor, Tensor, Tensor, AllStates | None]:
        module = self.module
        cells_wanted = self.lstm and self.return_all_states
        recording = torch.is_grad_enabled()
        x = call.input
        h_ends, c_ends, h_all, c_all = [], [], [], []
        for k in range(module.num_layers):
            slots = slice(k * self.directions, (k + 1) * self.directions)
            states = (*call.initial, *call.reset_to)
            h_0, c_0, reset_h, reset_c = (None if s is None else s[slots] for s in states)
            # The order in which masks are drawn is what a seed stands for.
            params = self.layer_weights(slots)
            x = self.drop_input(x, call)
            hidden_mask = self.hidden_mask(x, call)
            zoneout_h, zoneout_c = self.zoneout_masks(x, call)
            output, h_n, c_n, cells = layer(
                x, params, cell=_CELLS[module.mode], bias=module.bias,
                bidirectional=module.bidirectional, batch_first=call.batch_first,
                lengths=call.lengths, resets=call.resets, h_0=h_0, c_0=c_0, reset_h=reset_h,
                reset_c=reset_c, hidden_mask=hidden_mask, zoneout_h=zoneout_h,
                zoneout_c=zoneout_c, norm=self.layer_norm(k), return_cells=cells_wanted,
                reset_after=module.reset_after,
                detach_steps=(module.bptt_steps or 0) if recording else 0,
                checkpoint_steps=(module.checkpoint_steps or 0) if recording else 0,
            )  # fmt: skip
            h_ends.append(h_n)
            c_ends.append(c_n)
            h_all.append(output)
            c_all.append(cells)
            x = output
            if k + 1 < module.num_layers:
                x = functional.dropout(x, module.dropout, module.training)
        states = None
        if self.return_all_states:
            states = AllStates(tuple(h_all), tuple(c_all) if self.lstm else None)
        h_n, c_n = (ends[0] if len(ends) == 1 else torch.cat(ends) for ends in (h_ends, c_ends))
        return output, h_n, c_n, states

    def layer_weights(self, slots: slice) -> list[Tensor]:
        """Of both directions, in the order of _flat_weights."""
        module = self.module
        count = len(self.weights) // (module.num_layers * self.directions)
        params = list(self.weights[slots.start * count : slots.stop * count])
        if module.training and module.weight_dropout > 0:
            for place in range(_WEIGHT_HH, len(params), count):
                weight = params[place]
                params[place] = weight * _dropout_mask(weight.shape, module.weight_dropout, weight)
        return params

    def layer_norm(self, layer: int) -> LayerNorm | None:
        module = self.module
        if not module.layer_norm:
            return None
        suffixes = _slot_suffixes(module, layer)
        gains = []
        for name in _norm_names(module):
            rows = [getattr(module, name + suffix) for suffix in suffixes]
            gains.append(rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows))
        return LayerNorm(*gains)

    def drop_input(self, x: Tensor, call: _Padded) -> Tensor:
        module = self.module
        if not module.training or module.input_dropout == 0:
            return x
        mask = _dropout_mask((call.batch, x.size(-1)), module.input_dropout, x)
        return x * mask.unsqueeze(1 if call.batch_first else 0)

    def hidden_mask(self, x: Tensor, call: _Padded) -> Tensor | None:
        module = self.module
        if not module.training or module.hidden_dropout == 0:
            return None
        size = (self.directions, call.batch, self.state_size)
        return _dropout_mask(size, module.hidden_dropout, x)

    def zoneout_masks(self, x: Tensor, call: _Padded) -> _States:
        zoneout = self.module.zoneout
        of_h, of_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)

        # As the output of a module without projection: (T, B, D*H) or (B, T, D*H).
        size = (*call.input.shape[:2], self.directions * self.module.hidden_size)

        def mask(probability: float) -> Tensor | None:
            """How much of its old state a unit keeps: all or nothing in training, else the mean."""
            if probability == 0:
                return None
            if self.module.training:
                return random_mask(size, probability, x)
            return x.new_full((1, 1, 1), probability).expand(size)

        return mask(of_h), (mask(of_c) if self.lstm else None)


def _each(
    change: Callable[[Tensor], Any], output: Tensor, states: AllStates | None
) -> tuple[Any, AllStates | None]:
    """Changes what has a row for every step; the last layer's h is the output, once."""
    changed = change(output)
    if states is None:
        return changed, None
    h = (*map(change, states.h[:-1]), changed)
    return changed, AllStates(h, None if states.c is None else tuple(map(change, states.c)))


def _checked_lengths(lengths: Any, call: _Padded) -> Tensor | None:
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    is_integer = not (lengths.is_floating_point() or lengths.is_complex())
    if lengths.numel() > 0 and (not is_integer or lengths.dtype == torch.bool):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (call.batch,):
        raise RuntimeError(
            f"Expected lengths to have one entry for each of the {call.batch} rows of the batch, "
            f"got shape {tuple(lengths.shape)}"
        )
    lengths = lengths.detach().to(device="cpu", dtype=torch.int64)
    if lengths.numel() > 0:
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > call.steps:
            raise RuntimeError(
                f"Expected lengths between 0 and the {call.steps} steps of the input, got {least} "
                f"to {most}"
            )
    return lengths


def _checked_resets(resets: Any, call: _Padded) -> Tensor | None:
    if resets is None:
        return None
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a tensor of torch.bool, got {got}")
    if resets.shape != call.input.shape[:2]:
        raise RuntimeError(
            f"Expected resets of size {tuple(call.input.shape[:2])}, got {tuple(resets.shape)}"
        )
    if resets.device != call.input.device:
        raise RuntimeError(
            "Input and resets tensors are not at the same device, found input tensor at "
            f"{call.input.device} and resets tensor at {resets.device}"
        )
    return resets


# -------------------------------------------------------------------------------------- streaming


class stream(Iterator[Any]):
    """Run a module over a long sequence chunk by chunk: an iterator of its outputs.

    ::

        for output in rnn_ext.stream(lstm, x.split(100)):
            loss(output).backward()

    The state is carried from chunk to chunk and detached between them, so that a chunk can be
    forgotten after its backward: memory is that of one chunk, however long the sequence is. The
    outputs equal those of one call over the whole sequence; gradients stop at the cuts.

    Args:
        module: called as ``output, hx = module(chunk, hx)``: an RNN, LSTM or GRU of this package
            or of torch.nn, or a model of yours with that signature.
        chunks: the pieces, in order; any iterable, read one at a time.
        hx: the state before the first chunk, or None. Its gradient is that of the first chunk.

    Attributes:
        hx: the state after the last chunk so far, detached: what a later ``stream`` goes on from.

    Raises:
        ValueError: a bidirectional module, whose second direction begins at the end.
    """

    def __init__(self, module: nn.Module, chunks: Iterable[Any], hx: Any = None) -> None:
        if getattr(module, "bidirectional", False):
            raise ValueError(
                "stream: expected a module of one direction; the other one begins at the end of "
                "the sequence, which a chunk does not know"
            )
        self.module = module
        self.chunks = iter(chunks)
        self.hx = hx

    def __next__(self) -> Any:
        output, hx = self.module(next(self.chunks), self.hx)
        self.hx = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, hx)
        return output
