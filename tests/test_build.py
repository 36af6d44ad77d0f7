"""What stands between a user and a page of linker errors: each is one line that says what to do."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import rnn_ext
from rnn_ext import _build_info, _version_check

ROOT = Path(rnn_ext.__file__).resolve().parents[1]


def build(tmp_path: Path, **environment: str) -> str:
    """The last line of a build that has to fail before it compiles anything."""
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_missing_compiler(tmp_path: Path) -> None:
    message = build(tmp_path, CXX="no-such-compiler -O2")
    assert message.startswith("rnn_ext: no C++ compiler found (looked for no-such-compiler)")


def test_torch_too_old_to_build_for(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.10.1"\n')
    message = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert message == "rnn_ext: torch 2.10.1 is too old; 2.11 or later is needed"


def test_built_for_the_installed_torch() -> None:
    _version_check.check()


def test_patch_release_of_torch_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor, _ = torch.__version__.split(".", 2)
    monkeypatch.setattr(_build_info, "TORCH_VERSION", f"{major}.{minor}.99+cu128")
    _version_check.check()


@pytest.mark.parametrize("built", ["2.5.1", "3.0.0a0+git1234"])
def test_other_torch(monkeypatch: pytest.MonkeyPatch, built: str) -> None:
    monkeypatch.setattr(_build_info, "TORCH_VERSION", built)
    with pytest.raises(ImportError, match="was built for torch") as error:
        _version_check.check()
    message = str(error.value)
    assert built in message
    assert str(torch.__version__) in message
    assert "\n" not in message


@pytest.mark.parametrize("missing", ["rnn_ext._C", "rnn_ext._build_info"])
def test_never_built(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        _version_check, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(ImportError, match="run `make build`") as error:
        _version_check.check()
    assert "\n" not in str(error.value)


def test_versions_agree() -> None:
    assert isinstance(rnn_ext._C, types.ModuleType)
    assert rnn_ext.__version__ == _build_info.VERSION == rnn_ext._C.build_info()["version"]
    assert rnn_ext._C.build_info()["torch_version"] == _build_info.TORCH_VERSION
