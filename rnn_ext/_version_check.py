"""Says in one line why the compiled part cannot be loaded, before the linker says it in many."""

from __future__ import annotations


def check() -> None:
    """Raises ImportError unless the extension is built, and for the torch that is installed.

    torch's C++ symbols change between minor versions: a build fits one major.minor version only.
    """
    try:
        from rnn_ext import _build_info
    except ModuleNotFoundError:
        raise ImportError(
            "rnn_ext has not been built in this source tree; run `make build` at its root"
        ) from None

    import torch

    built, installed = _build_info.TORCH_VERSION, str(torch.__version__)
    if _major_minor(built) != _major_minor(installed):
        raise ImportError(
            f"rnn_ext {_build_info.VERSION} was built for torch {built}, but torch {installed} is "
            f"installed; rebuild rnn_ext (`make build` or `pip install --no-build-isolation .`) or "
            f"install torch {'.'.join(_major_minor(built))}"
        )


def _major_minor(version: str) -> tuple[str, str]:
    major, minor = version.split(".")[:2]
    return major, minor
