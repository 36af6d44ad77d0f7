# Every target sets up what it needs: the virtual environment, the pinned packages, the build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CMAKE := $(BIN)/cmake
# A test that hangs is a failure, not the end of the build's time.
CTEST := $(BIN)/ctest --output-on-failure --no-tests=error --timeout 600
JOBS := $(shell nproc)
# Each Python test process has a torch of its own, some 500 MB.
TEST_JOBS := $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

CXX_SOURCES := $(shell find csrc tests/cpp tests/cuda_host benchmarks -name "*.h" -o -name "*.cpp" -o -name "*.c" -o -name "*.cu")
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
ENGINE := -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DRNN_EXT_ENGINE_ONLY=ON -DRNN_EXT_WERROR=ON

DEPENDENCIES := $(VENV)/.dependencies
BENCH_DEPENDENCIES := $(VENV)/.bench-dependencies
THIRD_PARTY_DEPENDENCIES := $(VENV)/.third-party-dependencies
BUILT := build/.built

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench bench-features bench-peers build wheel sdist lint format test-cpp test-third-party \
	test-device test-module-info test-pytorch-suite sanitize test-aarch64 cuda-check cuda-compile cuda-link-check cuda-mutants clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BUILT) ## Train a character LSTM beside torch.nn's (DEMO_ARGS=--quick for a short run)
	$(BIN)/python examples/char_lstm.py $(DEMO_ARGS)

test: $(BUILT) test-cpp test-module-info ## Run the whole test suite, Python and C++
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --cov --cov-report=term --cov-fail-under=95

test-third-party: $(BUILT) $(THIRD_PARTY_DEPENDENCIES) ## Run published models with our modules in them
	$(BIN)/python -m pytest -s tests/third_party

test-module-info: $(BUILT) ## Run torch's own samples for its RNN modules on both libraries
	$(BIN)/python -m pytest tests/module_info

test-pytorch-suite: $(BUILT) ## Run the RNN tests of a PyTorch checkout on both libraries (PYTORCH=/path/to/pytorch)
	@test -f "$(PYTORCH)/test/test_nn.py" || { echo "PYTORCH=... must name a checkout of pytorch" >&2; exit 1; }
	$(BIN)/python tests/pytorch_suite/run.py $(PYTORCH)/test/test_nn.py $(PYTORCH)/test/test_modules.py

test-device: $(BUILT) ## Run the suite as on a GPU, on a device that is none: is no test tied to the CPU?
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --device=pretend

bench: $(BUILT) $(BENCH_DEPENDENCIES) ## Compare with torch.nn, onnxruntime and OpenVINO (BENCH_ARGS=--quick for a short run)
	@mkdir -p out
	$(BIN)/python benchmarks/report.py --json out/bench.json --markdown out/bench.md --png out/bench.png $(BENCH_ARGS)

bench-features: $(BUILT) ## Measure what torch.nn lacks against its bars: lengths, resets, checkpoints
	$(BIN)/python benchmarks/features.py $(BENCH_ARGS)

bench-peers: $(BENCH_DEPENDENCIES) ## Install the other engines that bench compares with

build: $(BUILT) ## Build the extension in place and make rnn_ext importable in .venv

wheel: $(DEPENDENCIES) ## Build a wheel for this Python and torch into dist/
	rm -rf build/lib.* dist/*.whl
	$(BIN)/pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir dist

sdist: $(DEPENDENCIES) ## Build the source distribution into dist/
	rm -rf dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

lint: $(DEPENDENCIES) ## Check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(DEPENDENCIES) ## Rewrite the sources in the style that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

test-cpp: $(DEPENDENCIES) ## Run the unit tests of the C++ engine
	$(CMAKE) $(ENGINE) -B build/cpp
	$(CMAKE) --build build/cpp --parallel $(JOBS)
	$(CTEST) --test-dir build/cpp

sanitize: $(DEPENDENCIES) ## The same under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer
	$(CMAKE) $(ENGINE) -B build/sanitize -DRNN_EXT_SANITIZE=ON
	$(CMAKE) --build build/sanitize --parallel $(JOBS)
	$(CTEST) --test-dir build/sanitize
	$(CMAKE) $(ENGINE) -B build/sanitize-thread -DRNN_EXT_SANITIZE=thread
	$(CMAKE) --build build/sanitize-thread --parallel $(JOBS)
	$(CTEST) --test-dir build/sanitize-thread

test-aarch64: $(DEPENDENCIES) ## The same cross-compiled for aarch64, under qemu (Debian packages)
	@cmake/install_aarch64_tools.sh
	$(CMAKE) $(ENGINE) -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake
	$(CMAKE) --build build/aarch64 --parallel $(JOBS)
	$(CTEST) --test-dir build/aarch64

cuda-compile: ## Compile the CUDA kernels and check registers, spills, instructions (CUDA_ARCHS="80 90")
	$(PYTHON) tests/cuda/compile_budgets.py $(if $(CUDA_ARCHS),--archs $(CUDA_ARCHS))

cuda-mutants: $(DEPENDENCIES) ## Delete each barrier and wait of the persistent CUDA kernels: does a test notice?
	$(CMAKE) $(ENGINE) -B build/cpp
	$(CMAKE) --build build/cpp --parallel $(JOBS) --target test_drawn_layers
	PATH=$(CURDIR)/$(BIN):$$PATH $(PYTHON) tests/cuda_host/mutants.py build/cpp

cuda-check: ## Build, test and time the CUDA engine on a GPU (PYTHON=... with a CUDA build of torch)
	@PYTHON=$(PYTHON) CHECK_ARGS="$(CHECK_ARGS)" cmake/cuda_check.sh

cuda-link-check: ## Build and load everything against a CUDA build of torch; needs nvcc, no GPU
	@PYTHON=$(PYTHON) cmake/cuda_link_check.sh

clean: ## Remove build outputs (keeps .venv)
	rm -rf build dist out rnn_ext.egg-info rnn_ext/_C*.so rnn_ext/_build_info.py

$(DEPENDENCIES): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "rnn_ext: Python 3.10 or later is needed; set PYTHON=... to one" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "rnn_ext: $(PYTHON) lacks venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of requirements-dev.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(BENCH_DEPENDENCIES): requirements-bench.txt $(DEPENDENCIES)
	@echo "Installing the packages of requirements-bench.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $< -c requirements-dev.txt
	@touch $@

# Every package that they need is in the list: without --no-deps one would ask for others of ours.
$(THIRD_PARTY_DEPENDENCIES): tests/third_party/requirements.txt $(DEPENDENCIES)
	@echo "Installing the packages of $< into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

# build_ext first: its errors are one line, pip would wrap them. The editable install then finds
# everything built and only makes `import rnn_ext` work from any folder.
$(BUILT): $(DEPENDENCIES) $(BUILD_INPUTS)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
