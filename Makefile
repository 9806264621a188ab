# `make demo` and `make test` need no other set-up: each first makes the environment and builds the native module, and a
# second run does neither. They need Python 3.11 or later with venv and headers, a C++ compiler and make.
# TORCH replaces the line of torch in constraints.txt, which pins every other package of the environment.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= $(shell grep '^torch==' constraints.txt)
JOBS   ?= 2

BIN         := $(VENV)/bin
STAMPS      := $(VENV)/.stamps
ENVIRONMENT := $(STAMPS)/environment
BUILT       := $(STAMPS)/built
STAND_IN    := $(STAMPS)/stand-in
CHECKED     := $(STAMPS)/checked-
PINNED      := $(STAMPS)/constraints.txt
BUILD_TOOLS := 'setuptools>=77' wheel ninja packaging
TOOLKIT     := tools/cuda_toolkit.py
SIMT        := $(shell find python_tests/simt -type f 2>/dev/null)
NATIVE      := $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE) $(SIMT))
PYTEST      := $(BIN)/python -m pytest python_tests
IN_PARALLEL := -n $(JOBS) --dist loadfile
# On other releases than those of constraints.txt: the environments $(VENV)-latest and $(VENV)-transformers-4.57.
RELEASES    := latest transformers-4.57
ON_RELEASES := $(RELEASES:%=test-with-%)
RELEASE_TESTS := $(patsubst %,python_tests/test_%.py,decoder request target unsupported_targets pictures lossless \
    drafters evidence composition tree_budget coupled_drafting checkpoint averaging export trainer training_data training_resume feature_store \
    objectives acceptance_estimate calibration)
LIBRARY      = $(shell $${CXX:-c++} -print-file-name=$(1))
IN_CHECKS    = TAPS_SIMT_LIBRARY="$(CURDIR)/build/$(1)/taps_ext/_simt$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"

.DEFAULT_GOAL := help
.PHONY: help environment build stand-in demo test test-all test-latest $(ON_RELEASES) sanitize cuda-check wheel bench \
        lint lint-style lint-types lint-cxx format clean

help:
	@echo 'make demo         build, then decode with two specialist drafters and every composition of them'
	@echo 'make test         build, then run the tests (at most 6 minutes on 2 cores)'
	@echo 'make test-all     run the tests and the long property tests'
	@echo 'make test-latest  run the decode, target and training tests with the newest releases and with transformers 4.57'
	@echo 'make sanitize     run the op tests with every kernel on the host, under address, undefined-behaviour and race checks'
	@echo 'make cuda-check   compile every kernel with nvcc, if it is installed; fail on spills, stack frames or warnings'
	@echo 'make wheel        build a wheel for the torch of $(VENV) in dist'
	@echo 'make bench        time the ops and a decode step; write the figures to out/bench'
	@echo 'make lint         run ruff, mypy and clang-format without changing a file'
	@echo 'make format       let ruff and clang-format change files'
	@echo 'make build        make the environment ($(VENV)) and build the native module'
	@echo 'make clean        remove everything that was built'
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) JOBS=$(JOBS) (test processes)'

# $(1): the directory of a new virtual environment
define NEW_VENV
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "taps_ext needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(1) || { echo 'this Python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'making the environment in $(1); torch is a large download'
endef

# $(1): latest, for the newest releases that the metadata allows, or transformers-4.57, for transformers==4.57.*
define INSTALL_RELEASES
	TAPS_NO_EXT=1 $(VENV)-$(1)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation \
		--editable '.[cli,train,eval,test]' '$(TORCH)' $(patsubst %,'%.*',$(subst -,==,$(filter-out latest,$(1))))
endef

environment: $(ENVIRONMENT)
build: $(BUILT)

# torch is installed before the package, which compiles against it without build isolation. TAPS_NO_EXT leaves the
# compiling to the build stamp, which recompiles only the files that changed.
$(ENVIRONMENT): pyproject.toml constraints.txt
	$(call NEW_VENV,$(VENV))
	@mkdir -p $(STAMPS) && grep -v '^torch==' constraints.txt >$(PINNED)
	$(BIN)/python -m pip install --quiet $(BUILD_TOOLS) '$(TORCH)' -c $(PINNED)
	TAPS_NO_EXT=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]' '$(TORCH)' -c $(PINNED)
	@rm -f $(BUILT) && touch $@

$(BUILT): $(ENVIRONMENT) setup.py $(TOOLKIT) $(NATIVE)
	@command -v $${CXX:-c++} >/dev/null || { echo 'no C++ compiler found; on Debian or Ubuntu: apt install g++' >&2; exit 1; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h") and "the headers of this Python are missing; on Debian or Ubuntu: apt install python3-dev")'
	@mkdir -p build && echo 'building the native module (log: build/build.log)'
	@$(BIN)/python setup.py build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@touch $@

# taps_ext._simt: the kernels, compiled for the host stand-in for CUDA; for tests alone.
stand-in: $(STAND_IN)

$(STAND_IN): $(BUILT) $(SIMT)
	@echo 'building the stand-in for CUDA (log: build/simt.log)'
	@TAPS_SIMT=1 $(BIN)/python setup.py build_ext --inplace >build/simt.log 2>&1 || { cat build/simt.log; exit 1; }
	@touch $@

$(CHECKED)%: $(BUILT) $(SIMT)
	@echo 'building the stand-in for CUDA with checks of $* (log: build/$*.log)'
	@TAPS_SIMT=1 TAPS_SANITIZE=$* $(BIN)/python setup.py build_ext >build/$*.log 2>&1 || { cat build/$*.log; exit 1; }
	@touch $@

demo: build
	$(BIN)/taps-ext demo

test: build stand-in
	$(PYTEST) $(IN_PARALLEL)

test-all: build stand-in
	$(PYTEST) $(IN_PARALLEL) --long

# The native module fits any environment with the same torch, so it is not built again. A run upgrades $(VENV)-latest.
test-latest: $(ON_RELEASES)

$(ON_RELEASES): test-with-%: $(VENV)-%/.stamps/environment $(BUILT)
	$(if $(filter latest,$*),$(call INSTALL_RELEASES,$*))
	@$(VENV)-$*/bin/python -c 'from importlib.metadata import version; \
		print("with $*:", *(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy", "datasets")))'
	$(VENV)-$*/bin/python -m pytest $(IN_PARALLEL) $(RELEASE_TESTS)

$(RELEASES:%=$(VENV)-%/.stamps/environment): $(VENV)-%/.stamps/environment: pyproject.toml
	$(call NEW_VENV,$(VENV)-$*)
	$(VENV)-$*/bin/python -m pip install --quiet $(BUILD_TOOLS) '$(TORCH)'
	$(call INSTALL_RELEASES,$*)
	@mkdir -p $(@D) && touch $@

# First every access to memory, then what two threads of a block do to one byte without a barrier between them. Python
# itself is not instrumented: the sanitizers' libraries are loaded before it, and libstdc++, whose exceptions they
# follow. Their reports go to stderr as the process ends, so pytest must not hold it back.
sanitize: $(CHECKED)memory $(CHECKED)races
	LD_PRELOAD='$(call LIBRARY,libasan.so) $(call LIBRARY,libubsan.so) $(call LIBRARY,libstdc++.so)' \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(call IN_CHECKS,memory) \
	$(PYTEST) --backend simt --cases 100 --capture sys
	$(call IN_CHECKS,races) $(PYTEST) --backend simt --cases 20

cuda-check: environment
	@$(BIN)/python tools/cuda_check.py

wheel: environment
	@mkdir -p build && rm -rf build/wheel/lib* && echo 'building the wheel (log: build/wheel.log)'
	@TAPS_PIN_TORCH=1 $(BIN)/python -m pip wheel -v --no-deps --no-build-isolation --wheel-dir dist . >build/wheel.log 2>&1 \
		|| { cat build/wheel.log; exit 1; }
	@ls -l dist

bench: build
	@mkdir -p out/bench
	PYTHON=$(BIN)/python sh benchmarks/runs/ops.sh --output out/bench/ops.json
	PYTHON=$(BIN)/python sh benchmarks/runs/decode.sh --output out/bench/decode.json

lint: lint-style lint-types lint-cxx

lint-style: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: environment
	$(BIN)/mypy

lint-cxx: environment
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(STAMPS)
	rm -f taps_ext/*.so
	find taps_ext python_tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
