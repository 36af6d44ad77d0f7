"""Drop-in modules: constructor, forward, state_dict and errors of the torch.nn class of the name.

They subclass torch.nn's, so ``isinstance(m, torch.nn.LSTM)`` holds, and only ``forward`` is theirs.
What a call outside the kernels needs (a device that this copy was not built for, a tensor subclass)
goes to torch.nn's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_ext import _C, features
from rnn_ext import functional as F

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_MODES = {"RNN_TANH": F.RNN_TANH, "RNN_RELU": F.RNN_RELU, "LSTM": F.LSTM, "GRU": F.GRU}
_NONLINEARITIES = {"tanh": F.RNN_TANH, "relu": F.RNN_RELU}
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_PLAIN_TYPES = {Tensor, nn.Parameter}
_HAS_CUDA = _C.build_info()["cuda"] is not None


def _is_covered(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor: a plain one on the CPU (on a GPU, if this copy has
    kernels for it), or a stand-in for one."""
    if type(tensor) in _PLAIN_TYPES:
        return tensor.is_cpu or (_HAS_CUDA and tensor.is_cuda)
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor, nn.Buffer))


def _current(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The module's weights as they are now: parameters, or computed attributes where something
    replaced them (a parametrization, weight_norm, pruning)."""
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


class _NotScriptable:
    """TorchScript cannot read these classes; without this it says so in terms of their source."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"torch.jit.script does not take rnn_ext.{self._get_name()}: script "
            "rnn_ext.to_torch(model), which computes the same from the same parameters, or use "
            "torch.jit.trace or torch.export"
        )


class _Recurrent(_NotScriptable, features.Options, nn.RNNBase):
    """The constructor and forward that RNN, LSTM and GRU share."""

    _keywords = features.OPTION_NAMES

    def __init__(self, *args, **kwargs) -> None:
        options = {name: kwargs.pop(name) for name in self._keywords if name in kwargs}
        super().__init__(*args, **kwargs)
        if options.pop("layer_norm", False):
            features.add_layer_norm(self)
        for name, value in options.items():
            setattr(self, name, value)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.layer_norm:
            features.reset_layer_norm(self)

    def _weights(self) -> list[Tensor]:
        """In the order of ``_flat_weights``, but never stale as that list can be."""
        return _current(self, self._flat_weights_names)

    def forward(
        self, input, hx=None, *, lengths=None, resets=None, reset_state=None,
        return_all_states=False,
    ):  # fmt: skip
        """As the torch.nn class of the same name; shapes and errors are its own.

        With D directions (1 or 2), L layers and R = ``proj_size`` if there is one, else H:

        Args:
            input: (T, B, I), with ``batch_first`` (B, T, I), unbatched (T, I), a
                ``PackedSequence``, or a nested tensor of jagged layout (B, steps of each row, I),
                for which the output is one too.
            hx: h_0 (L*D, B, R), for the LSTM a pair (h_0, c_0), c_0 of (L*D, B, H); zeros if
                missing.
            lengths: (B), a tensor or list of int in any order, 0 to T: how many steps each row of
                a padded input really has. What stands behind them is neither computed nor seen,
                the output there is 0. The final state is that after each row's own last step
                (the initial one for a length of 0), where the second direction begins.
            resets: (T, B), with ``batch_first`` (B, T), unbatched (T), of bool: an episode begins
                at step t. There the state returns to ``reset_state``, or to h_0 (c_0) if there is
                none, and no gradient crosses. Either direction computes what it would for each
                episode alone; the second one begins with the last.
            reset_state: in the layout of ``hx``, or with 1 in the place of B: one state, learned
                for example, for all rows.
            return_all_states: return a third result.

        Returns:
            output (T, B, D*R) in the layout of ``input``, and the final state in that of ``hx``.
            With ``return_all_states`` also ``AllStates(h, c)``: tuples of a tensor for each layer,
            its h_t as the output, before dropout, and its c_t (T, B, D*H); c is None unless LSTM.

        Raises:
            TypeError: lengths that are not integers, resets that are not bool.
            ValueError: input of wrong rank or of another dtype than the weights; arguments or
                options that do not go together.
            RuntimeError: sizes, lengths or devices that do not fit.
        """
        weights = self._weights()
        asked = lengths is not None or resets is not None or reset_state is not None
        if asked or return_all_states or (self._options is not None and features.in_use(self)):
            return features.forward(
                self, weights, input, hx, lengths, resets, reset_state, return_all_states
            )
        if not torch.compiler.is_compiling():
            try:
                result = _C.module_forward(
                    input, hx, weights, _MODES[self.mode],
                    self.bias, self.num_layers, self.bidirectional, self.batch_first,
                    self.dropout, self.training,
                )  # fmt: skip
            except RuntimeError:  # NotImplementedError is one
                pass  # the long way knows what torch.nn would do
            else:
                if result is not NotImplemented:
                    return result
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.is_nested:
            return features.forward(self, weights, input, hx, None, None, None, False)
        if not (_is_covered(input) and _is_covered(weights[0])):
            return self._torch_forward(input, hx)
        dim = input.dim()
        if dim != 3:
            if dim != 2:
                raise ValueError(
                    f"{self._get_name()}: Expected input to be 2D or 3D, got {dim}D instead"
                )
            return self._forward_unbatched(input, hx)
        h_0, c_0 = self._states(hx, 3)
        return self._run(input, None, h_0, c_0, weights)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *features.set_options(self)])

    def _run(self, input, batch_sizes, h_0, c_0, weights):
        lstm = self.mode == "LSTM"
        batch_first = self.batch_first and batch_sizes is None
        try:
            output, h_n, c_n = F.recurrent(
                input, batch_sizes, h_0, c_0, weights, _MODES[self.mode],
                self.bias, self.num_layers, self.bidirectional, batch_first,
                self.dropout, self.training,
            )  # fmt: skip
        except NotImplementedError:  # no kernel for this kind of tensor: complex, sparse
            hx = (h_0, c_0) if lstm and h_0 is not None else h_0
            if batch_sizes is not None:
                input = PackedSequence(input, batch_sizes)
            return self._torch_forward(input, hx)
        except RuntimeError:
            # Bad arguments: torch's own checks go first, for their types and wording. (Its LSTM
            # does not check packed input without a state.)
            if not (lstm and batch_sizes is not None and h_0 is None):
                self.check_input(input, batch_sizes)
            raise
        return output, ((h_n, c_n) if lstm else h_n)

    def _torch_forward(self, input, hx):
        # On a GPU torch.nn looks at its weights only where cuDNN is switched off.
        data = input.data if isinstance(input, PackedSequence) else input
        device, own = data.device, self._weights()[0].device
        if device.type == "cuda" and own != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{device} and parameter tensor at {own}"
            )
        self._update_flat_weights()
        self._flat_weights = self._weights()
        return super().forward(input, hx)

    def _states(self, hx, dim: int) -> tuple[Tensor | None, Tensor | None]:
        if hx is None:
            return None, None
        if self.mode != "LSTM":
            if hx.dim() == dim:
                return hx, None
            names, got = "hx", f"{hx.dim()}-D tensor"
        else:
            h_0, c_0 = hx[0], hx[1]
            if h_0.dim() == dim and c_0.dim() == dim:
                if len(hx) != 2:
                    raise RuntimeError(f"lstm expects two hidden states, got {len(hx)}")
                return h_0, c_0
            names, got = "hx and cx", f"({h_0.dim()}-D, {c_0.dim()}-D) tensors"
        batched = "batched" if dim == 3 else "unbatched"
        raise RuntimeError(
            f"For {batched} {dim}-D input, {names} should also be {dim}-D but got {got}"
        )

    def _forward_unbatched(self, input, hx):
        h_0, c_0 = self._states(hx, 2)
        if h_0 is not None:
            hx = (h_0.unsqueeze(1), c_0.unsqueeze(1)) if c_0 is not None else h_0.unsqueeze(1)
        dim = 0 if self.batch_first else 1
        output, state = _Recurrent.forward(self, input.unsqueeze(dim), hx)
        if self.mode == "LSTM":
            return output.squeeze(dim), (state[0].squeeze(1), state[1].squeeze(1))
        return output.squeeze(dim), state.squeeze(1)

    def _forward_packed(self, packed, hx):
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._weights()
        if not (_is_covered(data) and _is_covered(weights[0])):
            return self._torch_forward(packed, hx)
        if batch_sizes.dim() != 1 or batch_sizes.is_floating_point():
            raise TypeError(
                "batch_sizes must be a 1-D int64 tensor, got a "
                f"{batch_sizes.dim()}-D tensor of {batch_sizes.dtype}"
            )
        if batch_sizes.numel() == 0:
            raise IndexError("batch_sizes is empty: expected one entry per step")
        h_0 = c_0 = None
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
            h_0, c_0 = (hx[0], hx[1]) if self.mode == "LSTM" else (hx, None)
            if c_0 is not None and (h_0.dim() < 3 or c_0.dim() < 3):
                raise IndexError(
                    "Dimension out of range: for packed input hx and cx should be 3-D but got "
                    f"({h_0.dim()}-D, {c_0.dim()}-D) tensors"
                )
        output, state = self._run(data, batch_sizes, h_0, c_0, weights)
        if type(output) is PackedSequence:  # from torch's own forward
            output = output.data
        state = self.permute_hidden(state, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), state


_OPTIONS_DOC = """

    Beyond ``torch.nn.{name}``, as keywords whose defaults change nothing. All are attributes too,
    checked when they are set (ValueError, or TypeError for something else than a number):

    Keyword Args:
        bptt_steps: truncate backpropagation through time to k steps. Default: None, in full.
        bptt_style: how. ``"chunk"``: no gradient crosses the cuts at every k-th step of either
            direction. ``"window"``: the gradient of every step's loss flows back through exactly
            k steps. Default: ``"chunk"``.
        checkpoint_steps: keep the state of every k-th step only and compute the rest again in
            backward, k steps at a time: less memory, the same results. Default: None.
        input_dropout: probability of dropping an input feature, for a row of the batch and all its
            steps (variational dropout, Gal and Ghahramani 2016), of every layer. Default: 0.
        hidden_dropout: likewise for the units of h_(t-1) that the product with weight_hh reads.
            Default: 0.
        weight_dropout: probability of dropping an entry of weight_hh for the whole sequence
            (DropConnect, Merity et al. 2018). Default: 0.
        zoneout: probability of a unit to keep its h of the step before{pair} (Krueger et al.
            2017); in ``eval()`` the mean of both is taken. Default: 0.
        layer_norm: normalize what the gates add up, weight_ih x_t and weight_hh h_(t-1) each over
            all gates, and the c_t that the LSTM's output reads (Ba et al. 2016), before the biases.
            Has parameters, for each layer and direction norm_ih_l0, norm_hh_l0 (gains, (G*H)), for
            the LSTM norm_c_l0, norm_c_bias_l0 (H); in the constructor only. Default: False.{more}

    Of what is dropped the rest is scaled, as in ``dropout``, and in ``eval()`` nothing is dropped.
    Masks follow from ``torch.manual_seed``, whatever the number of threads. ``forward`` takes more
    arguments, too: see there.
    """


def _class_doc(plain: type, pair: str = "", more: str = "") -> str:
    extra = _OPTIONS_DOC.format(name=plain.__name__, pair=pair, more=more)
    return (plain.__doc__ or "") + extra  # python -OO leaves none


class RNN(_Recurrent, nn.RNN):
    __doc__ = _class_doc(nn.RNN)


class LSTM(_Recurrent, nn.LSTM):
    __doc__ = _class_doc(
        nn.LSTM,
        pair=",\n            or a pair (h, c) of them",
        more="""
        forget_bias: what the bias of the forget gate is initialized to, in bias_ih, with 0 in
            bias_hh (Jozefowicz et al. 2015 suggest 1). Default: None, random as the others.""",
    )

    forget_bias: float | None = None

    def __init__(self, *args, forget_bias: float | None = None, **kwargs) -> None:
        if forget_bias is not None:
            features.check_number("forget_bias", forget_bias)
        super().__init__(*args, **kwargs)
        if forget_bias is not None:
            if not self.bias:
                raise ValueError("forget_bias: expected bias=True")
            self.forget_bias = float(forget_bias)
            self._fill_forget_bias()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.forget_bias is not None:
            self._fill_forget_bias()

    @torch.no_grad()
    def _fill_forget_bias(self) -> None:
        forget = slice(self.hidden_size, 2 * self.hidden_size)  # of the gates i, f, g, o
        for name, bias in self.named_parameters(recurse=False):
            if name.startswith("bias_ih"):
                bias[forget] = self.forget_bias
            elif name.startswith("bias_hh"):
                bias[forget] = 0.0

    def extra_repr(self) -> str:
        forget_bias = [] if self.forget_bias is None else [f"forget_bias={self.forget_bias}"]
        return ", ".join([super().extra_repr(), *forget_bias])


class GRU(_Recurrent, nn.GRU):
    __doc__ = _class_doc(
        nn.GRU,
        more="""
        reset_after: whether the reset gate multiplies the product W_hn h_(t-1) + b_hn, as in
            torch.nn and cuDNN, or the h_(t-1) that the product reads, as in the original paper and
            in Keras with ``reset_after=False``. Default: True.""",
    )

    _keywords = (*features.OPTION_NAMES, "reset_after")
    reset_after = features.Option(True, features.reset_after_option)


class _Cell(_NotScriptable, nn.RNNCellBase):
    """One step, which is a sequence of length one."""

    def _weights(self) -> list[Tensor]:
        return _current(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])

    def _check_rank(self, what: str, tensor: Tensor) -> None:
        dim = tensor.dim()
        if dim != 1 and dim != 2:
            raise ValueError(
                f"{self._get_name()}: Expected {what} to be 1D or 2D, got {dim}D instead"
            )

    def _step(
        self, kind: int, input: Tensor, h_0: Tensor | None, c_0: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h_1, c_1) of one step; c_1 is empty unless LSTM."""
        if input.dim() == 1:
            h_0 = None if h_0 is None else h_0[None]
            c_0 = None if c_0 is None else c_0[None]
            h_1, c_1 = self._step(kind, input[None], h_0, c_0)
            return h_1[0], (c_1[0] if kind == F.LSTM else c_1)
        try:
            _, h_1, c_1 = F.recurrent(
                input[None], None,
                None if h_0 is None else h_0[None], None if c_0 is None else c_0[None],
                self._weights(), kind, bool(self.bias), 1, False, False, 0.0, False,
            )  # fmt: skip
        except RuntimeError:
            self._check_sizes(input, h_0, c_0)
            raise
        return h_1[0], (c_1[0] if kind == F.LSTM else c_1)

    def _check_sizes(self, input: Tensor, *states: Tensor | None) -> None:
        """Raises in terms of the cell's own arguments, without the step dimension."""
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        for index, state in enumerate(states):
            if state is None:
                continue
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{index} batch size "
                    f"{state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected "
                    f"{self.hidden_size}"
                )

    def _is_covered(self, input: Tensor) -> bool:
        weight = self._weights()[0]
        # torch lets a cell be of size 0, which leaves nothing to run, or complex.
        return (
            self.hidden_size > 0
            and weight.is_floating_point()
            and _is_covered(input)
            and _is_covered(weight)
        )


class RNNCell(_Cell, nn.RNNCell):
    __doc__ = nn.RNNCell.__doc__

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        self._check_rank("input", input)
        if hx is not None:
            self._check_rank("hidden", hx)
        kind = _NONLINEARITIES.get(self.nonlinearity)
        if kind is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if not self._is_covered(input):
            return super().forward(input, hx)
        return self._step(kind, input, hx)[0]


class LSTMCell(_Cell, nn.LSTMCell):
    __doc__ = nn.LSTMCell.__doc__

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check_rank("input", input)
        h_0 = c_0 = None
        if hx is not None:
            for index, state in enumerate(hx):
                self._check_rank(f"hx[{index}]", state)
            if isinstance(hx, Tensor):
                raise TypeError("hx must be a tuple (h_0, c_0), not a Tensor")
            if len(hx) != 2:
                raise RuntimeError(f"lstm_cell expects two hidden states, got {len(hx)}")
            h_0, c_0 = hx
        if not self._is_covered(input):
            return super().forward(input, hx)
        return self._step(F.LSTM, input, h_0, c_0)


class GRUCell(_Cell, nn.GRUCell):
    __doc__ = nn.GRUCell.__doc__

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        self._check_rank("input", input)
        if hx is not None:
            self._check_rank("hidden", hx)
        if not self._is_covered(input):
            return super().forward(input, hx)
        return self._step(F.GRU, input, hx)[0]
