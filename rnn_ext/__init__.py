"""Fused RNN, LSTM and GRU for PyTorch: drop-in replacements for torch.nn's modules."""

from rnn_ext import _version_check

_version_check.check()

import torch  # noqa: E402, F401  (loads the libraries that _C is linked against)

from rnn_ext import _C, fake, flops, functional, layer  # noqa: E402, F401
from rnn_ext._build_info import VERSION as __version__  # noqa: E402
from rnn_ext.compiling import compile  # noqa: E402
from rnn_ext.convert import convert, to_torch  # noqa: E402
from rnn_ext.features import AllStates, stream  # noqa: E402
from rnn_ext.memory import empty_cache  # noqa: E402
from rnn_ext.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell  # noqa: E402

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AllStates",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "compile",
    "convert",
    "empty_cache",
    "functional",
    "stream",
    "to_torch",
]
