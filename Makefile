.DEFAULT_GOAL := help
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
JOBS     ?= 2
ARGS     ?=
RESULTS  := benchmarks/results
BIN      := $(VENV)/bin
# Python compiles what is imported; to compile all of torch and transformers takes longer than to unpack it.
INSTALL   = $(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) -c constraints.txt

# The GPU targets take a PYTHON named by the caller as it is, without a virtual environment
# and without an install: `make test-gpu PYTHON=python3` on a machine that has torch.
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(BIN)/python
GPU_TEST   := $(VENV)/.test
GPU_BENCH  := $(VENV)/.package
else
GPU_PYTHON := $(PYTHON)
endif

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "CEM needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.package: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	@echo "installing the package into $(VENV) ..."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.%: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	@echo "installing the package and its $* extra into $(VENV) ..."
	@$(INSTALL) -e '.[$*]'
	@touch $@

demo: $(VENV)/.lm  ## set up and run the demo
	$(BIN)/cem demo $(ARGS)

test: $(VENV)/.test  ## set up and run the tests; ARGS='-m "not slow"' for the quick ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-long: $(VENV)/.test  ## ten thousand trials against certificates and bounds, processes that are killed: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m long -rP $(ARGS)

test-gpu: $(GPU_TEST)  ## the whole suite on a GPU; ARGS='-m gpu' for what needs one
	CEM_DEVICE=cuda $(GPU_PYTHON) -m pytest --junitxml=$(RESULTS)/tests-cuda.xml $(ARGS)

bench: $(VENV)/.package  ## time the derived layers against hand-written ones; ARGS='--out FILE.json'
	$(BIN)/python -m benchmarks.layers $(ARGS)

bench-space: $(VENV)/.package  ## time diagonals, recursion, linear attention and decoding
	$(BIN)/python -m benchmarks.space $(ARGS)

bench-gpu: $(GPU_BENCH)  ## the same on a GPU in float32, in bfloat16 and compiled, each to its own result file
	$(GPU_PYTHON) -m benchmarks.layers --device cuda --out $(RESULTS)/cuda.json $(ARGS)
	$(GPU_PYTHON) -m benchmarks.layers --device cuda --dtype bfloat16 --out $(RESULTS)/cuda-bfloat16.json $(ARGS)
	$(GPU_PYTHON) -m benchmarks.layers --device cuda --dtype bfloat16 --compile --only speed \
		--out $(RESULTS)/cuda-bfloat16-compiled.json --readme $(ARGS)

parity: $(VENV)/.test  ## train energy models beside Llama on a CPU; goes on where it was stopped
	$(BIN)/python -m benchmarks.parity cpu $(ARGS)

parity-gpu: $(GPU_TEST)  ## the same with 25 and 124 million parameters on a GPU
	$(GPU_PYTHON) -m benchmarks.parity gpu-25m gpu-124m $(ARGS)

studies: $(VENV)/.test  ## train small models that differ in one choice; goes on where it was stopped
	$(BIN)/python -m benchmarks.studies ties half llama together $(ARGS)

allocation: $(VENV)/.test  ## train four small models and take rank away where it costs least
	$(BIN)/python -m benchmarks.allocation $(ARGS)

lint: $(VENV)/.dev  ## set up and run the static checks
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell

clean:  ## remove what the other commands made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache

.PHONY: help demo test test-long test-gpu bench bench-space bench-gpu parity parity-gpu studies allocation lint clean
