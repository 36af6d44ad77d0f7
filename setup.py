"""Builds rnn_ext._C by driving CMake: the sources and flags are in CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)


class BuildError(SystemExit):
    """Ends the build with one line that says what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(f"rnn_ext: {message}")


class CMakeExtension(Extension):
    """An extension without sources: CMake knows them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


def find_program(name: str, advice: str) -> str:
    """Path of a program of this interpreter's environment (activated or not), else on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise BuildError(f"{name} was not found; {advice}")
    return path


def check_compiler() -> None:
    chosen = os.environ.get("CXX")
    candidates = [chosen.split()[0]] if chosen else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        raise BuildError(
            f"no C++ compiler found (looked for {', '.join(candidates)}); install GCC 12 or later "
            "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX"
        )


def check_module(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise BuildError(
            f"{name} is needed at build time but is not installed for {sys.executable}; "
            "install it, or run `make build`, which sets everything up"
        )


class CMakeBuild(build_ext):
    """Configures and builds with CMake, and writes rnn_ext/_build_info.py beside the module."""

    def run(self) -> None:
        check_compiler()
        check_module("torch")
        check_module("pybind11")
        import torch

        torch_version = str(torch.__version__)
        if tuple(int(part) for part in torch_version.split(".")[:2]) < MIN_TORCH:
            minimum = ".".join(map(str, MIN_TORCH))
            raise BuildError(f"torch {torch_version} is too old; {minimum} or later is needed")

        import pybind11
        from torch.utils import cpp_extension

        (extension,) = self.extensions
        module_path = Path(self.get_ext_fullpath(extension.name)).resolve()
        self.cmake(
            module_path.parent,
            {
                "VERSION": self.distribution.get_version(),
                "TORCH_VERSION": torch_version,
                "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
                "TORCH_LIBRARY_DIR": str(Path(torch.__file__).parent / "lib"),
                "TORCH_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
                "PYTHON_INCLUDE_DIRS": sysconfig.get_path("include"),
                "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
                "MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
                "MODULE_DIR": str(module_path.parent),
            },
        )
        (module_path.parent / "_build_info.py").write_text(
            '"""Written by setup.py: what this copy was built for."""\n\n'
            f'VERSION = "{self.distribution.get_version()}"\n'
            f'TORCH_VERSION = "{torch_version}"\n'
        )

    def cmake(self, module_dir: Path, definitions: dict[str, str]) -> None:
        # The build folder outlives one build (setuptools' own build_temp does not, for an editable
        # install), so that every later build, also that of a wheel, compiles only what changed.
        build_type = "RelWithDebInfo" if self.debug else "Release"
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-{build_type}"
        module_dir.mkdir(parents=True, exist_ok=True)
        cmake = find_program("cmake", "install it with `pip install cmake`")
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir)]
        configure += [f"-DCMAKE_BUILD_TYPE={build_type}"]
        configure += [f"-DRNN_EXT_{name}={value}" for name, value in definitions.items()]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        if not (build_dir / "CMakeCache.txt").exists():
            ninja = find_program("ninja", "install it with `pip install ninja`")
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise BuildError("the C++ build failed; the first error above says why") from error


setup(
    ext_modules=[CMakeExtension("rnn_ext._C")],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
