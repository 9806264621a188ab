# make demo and make test are all the set-up there is: each makes the environment and builds the native module first,
# and a second run does neither. What it takes: Python 3.10 or later with venv and headers, a C++ compiler, make.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0

BIN         := $(VENV)/bin
STAMPS      := $(VENV)/.stamps
ENVIRONMENT := $(STAMPS)/environment
BUILT       := $(STAMPS)/built
STAND_IN    := $(STAMPS)/stand-in
CHECKED     := $(STAMPS)/checked-
TOOLKIT     := tools/cuda_toolkit.py
SIMT        := $(shell find python_tests/simt -type f 2>/dev/null)
NATIVE      := $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE) $(SIMT))
PYTEST      := $(BIN)/python -m pytest python_tests
LIBRARY      = $(shell $${CXX:-c++} -print-file-name=$(1))
IN_CHECKS    = TAPS_SIMT_LIBRARY="$(CURDIR)/build/$(1)/taps_ext/_simt$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"

.DEFAULT_GOAL := help
.PHONY: help environment build stand-in demo test test-all sanitize cuda-check wheel bench lint lint-style lint-types \
        lint-cxx format clean

help:
	@echo 'make demo      build, then show two specialist drafters and their compositions on the embedded models'
	@echo 'make test      build, then run the tests (at most 8 minutes on 2 cores)'
	@echo 'make test-all  the same with the long property runs'
	@echo 'make sanitize  the op tests with every kernel on the host, under address, undefined-behaviour and race checks'
	@echo 'make cuda-check  every kernel through nvcc, where there is one: no spills, stack frames or warnings'
	@echo 'make wheel     a wheel for the torch of $(VENV), in dist'
	@echo 'make bench     time the ops and a decode step; the figures go to out/bench'
	@echo 'make lint      ruff, mypy and clang-format, changing nothing;  make format  lets them change files'
	@echo 'make build     the environment ($(VENV)) and the native module;  make clean  removes what was built'
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH)'

environment: $(ENVIRONMENT)
build: $(BUILT)

# torch comes before the package, which compiles against it: hence no build isolation. TAPS_NO_EXT leaves the
# compiling to the build stamp, which recompiles only the files that changed.
$(ENVIRONMENT): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "taps_ext needs Python 3.10 or later: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo 'this Python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'making the environment in $(VENV); torch is a large download'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja packaging '$(TORCH)'
	TAPS_NO_EXT=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@mkdir -p $(STAMPS) && rm -f $(BUILT) && touch $@

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
	$(PYTEST)

test-all: build stand-in
	$(PYTEST) --long

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
