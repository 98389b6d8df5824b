# Two commands need nothing but Python 3.10 or later: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
JOBS ?= 2
STEPS ?=

VENV := .venv
XLA := .venv-xla
BIN := $(VENV)/bin
# Two test workers on two cores: one thread each.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help test demo gpu test-xla lint format types floors docs clean

help:
	@echo "make demo      train a small GPT on 2 ranks three times and compare: none, torch, distckpt"
	@echo "make test      lint, types, import floors, tests"
	@echo "make test-xla  the XLA suite on torch 2.9 + torch-xla 2.9 (a 3 GB download the first time)"
	@echo "make gpu       the CUDA tests and benchmarks with the torch of this machine's python3, under nine minutes"
	@echo "make docs      the pages of docs/ as a site in site/"
	@echo "make format    ruff format and the fixes ruff can make"

$(VENV)/.installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints-dev.txt
	@touch $@

$(XLA)/.installed: pyproject.toml constraints-xla.txt
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,xla]' -c constraints-xla.txt
	@touch $@

test: lint types floors
	$(ONE) $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

floors: $(VENV)/.installed
	PYTHONPATH=.:backends $(BIN)/lint-imports --no-cache

# What a GPU machine has is enough: torch and pytest.
gpu:
	python3 benchmarks/gpu.py

docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.installed
	$(ONE) $(BIN)/torchrun --standalone --nproc_per_node 2 launch/train.py --compare $(if $(STEPS),--steps $(STEPS))

test-xla: $(XLA)/.installed
	$(ONE) PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -q -n $(JOBS) -m "xla and not slow"
	$(ONE) PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -q -n $(JOBS) -m "not xla and not slow" \
		tests/backends tests/engine tests/policy tests/modules tests/compat tests/ranks

clean:
	rm -rf $(VENV) $(XLA) build dist site .pytest_cache .ruff_cache
