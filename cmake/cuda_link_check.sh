#!/bin/sh
# `make cuda-link-check`: builds the whole extension against a CUDA build of torch and loads it.
# Needs nvcc, no GPU. The virtual environment (6 GB) is kept for the next time.
#
#   PYTHON  the interpreter (default: python3)      CUDA_TORCH  the torch to install (2.14.1)
set -eu
cd "$(dirname "$0")/.."
out=$PWD/out/cuda-link-check
venv=$out/.venv
mkdir -p "$out"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  "torch==${CUDA_TORCH:-2.14.1}" cmake ninja "pybind11>=2.13" "setuptools>=77" wheel numpy
rm -f "$out"/*.whl
RNN_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0}" PATH="$venv/bin:$PATH" \
  "$venv/bin/python" -m pip wheel . --quiet --disable-pip-version-check --no-build-isolation \
  --no-deps --wheel-dir "$out"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --force-reinstall "$out"/rnn_ext-*.whl
cd "$out"  # not the folder of the sources, whose rnn_ext would be imported
"$venv/bin/python" ../../cmake/cuda_link_check.py
