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

from rnn_ext import _C
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


class _Recurrent(_NotScriptable, nn.RNNBase):
    """The forward that RNN, LSTM and GRU share."""

    def _weights(self) -> list[Tensor]:
        """In the order of ``_flat_weights``, but never stale as that list can be."""
        return _current(self, self._flat_weights_names)

    def forward(self, input, hx=None):
        """As the torch.nn class of the same name; shapes and errors are its own.

        Args:
            input: (T, B, I), with ``batch_first`` (B, T, I), unbatched (T, I), or a
                ``PackedSequence``.
            hx: h_0, for the LSTM a pair (h_0, c_0); zeros if missing.

        Returns:
            output and the final state in the layout of ``hx``.

        Raises:
            ValueError: input of wrong rank or of another dtype than the weights.
            RuntimeError: sizes or devices that do not fit.
        """
        weights = self._weights()
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


class RNN(_Recurrent, nn.RNN):
    __doc__ = nn.RNN.__doc__


class LSTM(_Recurrent, nn.LSTM):
    __doc__ = nn.LSTM.__doc__


class GRU(_Recurrent, nn.GRU):
    __doc__ = nn.GRU.__doc__


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
