"""Which builds get the CUDA engine: decided by torch and the compiler, never by a visible GPU."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools

import rnn_ext

ROOT = Path(rnn_ext.__file__).resolve().parents[1]


@pytest.fixture
def setup_py(monkeypatch):
    """The names of setup.py, without running it."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """Puts a compiler of some release where CUDA_HOME says."""

    def put(release: str) -> Path:
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return path

    return put


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_built_where_torch_and_compiler_are_of_one_release(setup_py, nvcc, wish):
    path = nvcc("13.0")
    definitions = setup_py["cuda_definitions"]("13.2", wish)
    assert definitions == {
        "CUDA_COMPILER": str(path),
        "CUDA_ARCHITECTURES": setup_py["CUDA_ARCHITECTURES"],
    }


def test_never_built_against_the_wish(setup_py, nvcc):
    nvcc("13.0")
    assert setup_py["cuda_definitions"]("13.0", "0") == {}


def test_cpu_build_of_torch(setup_py, nvcc, capsys):
    nvcc("13.0")
    assert setup_py["cuda_definitions"](None, "auto") == {}
    assert capsys.readouterr().err == ""  # nothing is missing
    with pytest.raises(SystemExit, match="RNN_EXT_CUDA=1, but torch is not a CUDA build"):
        setup_py["cuda_definitions"](None, "1")


def test_compiler_of_another_release(setup_py, nvcc, capsys):
    nvcc("12.8")
    assert setup_py["cuda_definitions"]("13.0", "auto") == {}
    assert "nvcc is of CUDA 12.8, torch of 13.0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the major versions differ"):
        setup_py["cuda_definitions"]("13.0", "1")


def test_unknown_wish(setup_py):
    with pytest.raises(SystemExit, match="RNN_EXT_CUDA must be auto, 0 or 1, not 'yes'"):
        setup_py["cuda_definitions"]("13.0", "yes")


@pytest.mark.parametrize(
    ("listed", "architectures"),
    [
        ("8.0;9.0", "80-real;90-real"),
        ("8.6 12.0+PTX", "86-real;120"),
        ("9.0a;10.0", "90a-real;100-real"),
        ("", ""),
    ],
)
def test_architectures(setup_py, listed, architectures):
    assert setup_py["cuda_architectures"](listed) == architectures


@pytest.mark.parametrize(("listed", "message"), [("7.0", "7.5 is the lowest"), ("Volta", "write")])
def test_bad_architectures(setup_py, listed, message):
    with pytest.raises(SystemExit, match=message):
        setup_py["cuda_architectures"](listed)
