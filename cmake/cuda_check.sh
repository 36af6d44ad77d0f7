#!/bin/sh
# `make cuda-check`: everything about the CUDA engine that needs a GPU, into one folder.
#
#   PYTHON   an interpreter that has a CUDA build of torch (default: python3)
#   CHECK_ARGS  arguments for benchmarks/gpu.py (default: the whole grid; --quick for a short run)
#   CHECK_STEPS  what to do of: info tests-gpu tests-device tests-cpu sanitizer benchmark (default: all)
#   CHECK_JOBS  test processes at once (default: 4; each takes some GB of the GPU's memory)
#   CHECK_WHEELS  a folder with wheels of what PYTHON lacks, for a machine without a network
#
# Works in an environment on top of PYTHON's own, so that its torch is the one that is tested.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$PWD/out/cuda-check/$(date +%Y%m%d-%H%M%S)
steps=" ${CHECK_STEPS:-info tests-gpu tests-device tests-cpu sanitizer benchmark} "
jobs=${CHECK_JOBS:-4}
say() { echo "cuda-check: $*" | tee -a "$out/summary.txt"; }

"$python" - <<'END' || exit 1
import sys
try:
    import torch
except ImportError:
    sys.exit("cuda-check: PYTHON has no torch; set PYTHON to an interpreter with a CUDA build of it")
if torch.version.cuda is None:
    sys.exit(f"cuda-check: torch {torch.__version__} is not a CUDA build; set PYTHON to one that is")
if not torch.cuda.is_available():
    sys.exit("cuda-check: torch sees no GPU; nothing was checked")
END

mkdir -p "$out"
venv=out/cuda-check/.venv
[ -x $venv/bin/python ] || "$python" -m venv $venv || "$python" -m venv --without-pip $venv || exit 1
# The torch of PYTHON, which may itself be of a virtual environment; all else as for development.
"$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
  > "$(echo $venv/lib/python3*/site-packages)/torch_of_python.pth" || exit 1
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
if [ -n "${CHECK_WHEELS:-}" ]; then
  $pip --no-index --no-deps "$CHECK_WHEELS"/*.whl || exit 1
else
  grep -v '^torch=' requirements-dev.txt > "$out/requirements.txt"
  $pip -r "$out/requirements.txt" || exit 1
fi

$venv/bin/python - > "$out/environment.txt" <<'END'
import platform, torch
print("python", platform.python_version())
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
END
nvidia-smi >> "$out/environment.txt" 2>&1
git rev-parse HEAD >> "$out/environment.txt" 2>/dev/null

failed=0
step() { # name, command...: if it is asked for by the name's first word or two
  name=$1
  shift
  case $steps in *" $name "* | *" ${name%-*} "*) ;; *) return ;; esac
  if "$@" > "$out/$name.log" 2>&1; then say "$name: passed"; else
    say "$name: FAILED, see $out/$name.log"
    failed=1
  fi
}

export RNN_EXT_NEEDS_GPU=1 PYTHONPATH="$PWD"
export PATH="$PWD/$venv/bin:$(dirname "$(command -v "$python")"):$PATH"
RNN_EXT_CUDA=1 $venv/bin/python setup.py build_ext --inplace > "$out/build.log" 2>&1 || {
  say "build: FAILED, see $out/build.log"
  exit 1
}
pytest="$venv/bin/python -m pytest -p no:cacheprovider -q"
step info $venv/bin/python -m rnn_ext info
step tests-gpu $pytest -n "$jobs" tests/test_cuda.py -ra
step tests-device $pytest -n "$jobs" --dist loadfile tests --ignore tests/test_cuda.py --device=cuda
step tests-cpu $pytest -n "$jobs" --dist loadfile tests --ignore tests/test_cuda.py
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    step sanitizer-$tool compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
      $pytest tests/test_cuda.py -k "(test_each_method and given_state) or test_projection"
  done
else
  say "compute-sanitizer: not installed, not run"
fi
# shellcheck disable=SC2086  # several arguments in one variable
step benchmark $venv/bin/python benchmarks/gpu.py --json "$out/gpu.json" \
  --markdown "$out/gpu.md" --png "$out/gpu.png" ${CHECK_ARGS:-}
say "results in $out"
exit $failed
