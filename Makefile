# Each target sets up what it needs: a virtual environment in .venv with everything installed. Two to see first:
#   make demo    the whole pipeline on generated data on the CPU
#   make test    every CPU test but the slow ones (make test-slow runs those)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell for v in 3.13 3.12 3.11 3; do command -v python$$v >/dev/null && \
	python$$v -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && \
	{ echo python$$v; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow test-gpu gpu-check bench lint format clean

setup: $(READY)

$(READY): setup.py VERSION $(wildcard kernels/mmd2v_kernels/*.[ch])
	@test -n "$(PYTHON)" || { echo "Found no Python 3.11, 3.12 or 3.13 that can make virtual environments (modules" \
		"venv and ensurepip; Debian and Ubuntu: apt install python3-venv). Or: make PYTHON=/path/to/python"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing mmd2v and what it needs into $(VENV) (torch alone is several GB; this takes minutes once)"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@# A test computes every recall with it; its own requirements, which that needs none of, hold webdataset back.
	$(BIN)/python -m pip install --quiet --no-deps clip_benchmark==1.6.2
	@touch $@

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" launch/demo.sh

# A file at a time on each of two processes: most tests wait for processes of their own.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	$(BIN)/python benchmarks/retrieval/run.py --out benchmarks/results/retrieval.csv
	@test -x $(VENV)/torchscale/bin/python || benchmarks/kernels/peer_environment.sh $(VENV)/torchscale $(BIN)/python
	$(VENV)/torchscale/bin/python benchmarks/kernels/expert_mlp.py --out benchmarks/results/expert_mlp.csv

# All that needs a GPU, in eight minutes; needs torch and Triton alone: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check:
	benchmarks/kernels/gpu_check.sh benchmarks/results/gpu $(GPU_PYTHON)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
