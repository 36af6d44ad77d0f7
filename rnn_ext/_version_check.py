"""Says in one line why the compiled part cannot be loaded, before the linker says it in many."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path


def check() -> None:
    """Raises ImportError unless the extension is built, and for the torch that is installed.

    torch's C++ symbols change between minor versions: a build fits one major.minor version only.
    """
    if find_spec("rnn_ext._C") is None or find_spec("rnn_ext._build_info") is None:
        raise ImportError(
            f"rnn_ext is not built for Python {platform.python_version()} in "
            f"{Path(__file__).parent}; in a source tree, run `make build` at its root"
        )

    import torch

    import rnn_ext._build_info as build

    installed = str(torch.__version__)
    if _major_minor(build.TORCH_VERSION) != _major_minor(installed):
        raise ImportError(
            f"rnn_ext {build.VERSION} was built for torch {build.TORCH_VERSION}, but torch "
            f"{installed} is installed; rebuild rnn_ext (`make build`, or `pip install "
            f"--no-build-isolation .`) or install torch {_major_minor(build.TORCH_VERSION)}"
        )


def _major_minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
