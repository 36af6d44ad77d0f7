"""Builds rnn_ext._C by driving CMake: the sources and flags are in CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import re
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


# What is compiled for where TORCH_CUDA_ARCH_LIST does not say: machine code for each, and the
# intermediate code of the last one for what comes after it.
CUDA_ARCHITECTURES = "75-real;80-real;86-real;89-real;90-real;100-real;120"


def cuda_architectures(listed: str) -> str:
    """CMake's architectures for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX"."""
    architectures = []
    for entry in listed.replace(" ", ";").split(";"):
        if not entry:
            continue
        number = entry.removesuffix("+PTX")
        major, _, minor = number.rstrip("af").partition(".")
        if not (major.isdigit() and minor.isdigit()):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has an entry {entry!r}; write 8.0;9.0+PTX")
        if (int(major), int(minor)) < (7, 5):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {entry}; 7.5 is the lowest supported")
        suffix = number[len(number.rstrip("af")) :]
        code = "" if entry.endswith("+PTX") else "-real"
        architectures.append(f"{major}{minor}{suffix}{code}")
    return ";".join(architectures)


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise BuildError(f"{nvcc} does not say which release it is")
    return int(found[1]), int(found[2])


def cuda_definitions(torch_cuda: str | None, wish: str) -> dict[str, str]:
    """What CMake has to know to build the CUDA engine; empty if it is not to be built.

    ``torch_cuda`` is torch.version.cuda, ``wish`` RNN_EXT_CUDA: 0 never, 1 or an error, auto if
    torch is a CUDA build and a compiler of its major release is there. Whether a GPU is visible
    makes no difference.
    """
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"RNN_EXT_CUDA must be auto, 0 or 1, not {wish!r}")
    if wish == "0":
        return {}
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.environ.get("CUDACXX") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    reason = None
    if torch_cuda is None:
        reason = "torch is not a CUDA build"
    elif nvcc is None:
        reason = f"nvcc was not found; install the CUDA toolkit {torch_cuda} or set CUDA_HOME"
    elif nvcc_version(nvcc)[0] != int(torch_cuda.split(".")[0]):
        release = ".".join(map(str, nvcc_version(nvcc)))
        reason = f"nvcc is of CUDA {release}, torch of {torch_cuda}: the major versions differ"
    if reason is not None:
        if wish == "1":
            raise BuildError(f"RNN_EXT_CUDA=1, but {reason}")
        if torch_cuda is not None:
            print(f"rnn_ext: built without CUDA kernels: {reason}", file=sys.stderr)
        return {}
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    return {
        "CUDA_COMPILER": str(nvcc),
        "CUDA_ARCHITECTURES": cuda_architectures(listed) or CUDA_ARCHITECTURES,
    }


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
                "CUDA_COMPILER": "",
                **cuda_definitions(torch.version.cuda, os.environ.get("RNN_EXT_CUDA", "auto")),
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
        kind = f"{build_type}-cuda" if definitions["CUDA_COMPILER"] else build_type
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-{kind}"
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
