# Two commands need nothing but Python 3.10 or later: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
JOBS ?= 2
STEPS ?=

VENV := .venv
XLA := .venv-xla
# Another torch, in an environment of its own: `make test-torch TORCH=2.14.1`.
TORCH ?= $(shell sed -n 's/^torch==//p' requirements-newest.txt)
OTHER := .venv-torch-$(TORCH)
SUITES ?= tests/backends tests/engine tests/policy tests/modules tests/compat tests/ranks tests/integrations
BIN := $(VENV)/bin
# Two test workers on two cores: one thread each.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help test demo test-xla test-torch lint format types floors docs clean

help:
	@echo "make demo      train a small GPT on 2 ranks three times and compare: none, torch, distckpt"
	@echo "make test      lint, types, import floors, tests"
	@echo "make test-xla  the XLA suite on torch 2.9 + torch-xla 2.9 (a 3 GB download the first time)"
	@echo "make test-torch TORCH=$(TORCH)  what depends on torch, on any torch from 2.9 on (again 3 GB)"
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

NO_WHEEL := import sys; sys.version_info < (3, 11) and (2, 15) <= tuple(map(int, "$(TORCH)".split(".")[:2])) and \
	sys.exit("torch $(TORCH) has no wheel for Python 3.10: make test-torch PYTHON=python3.11, or TORCH=2.14.1")
$(OTHER)/.installed: pyproject.toml constraints-dev.txt
	@$(PYTHON) -c '$(NO_WHEEL)'
	$(PYTHON) -m venv $(OTHER)
	sed 's/^torch==[^ ;]*/torch==$(TORCH)/' constraints-dev.txt >$(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,hf]' -c $(OTHER)/constraints.txt
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

test-torch: $(OTHER)/.installed
	$(ONE) $(OTHER)/bin/python -m pytest -q -n $(JOBS) -m "not slow" $(SUITES)

clean:
	rm -rf $(VENV) $(XLA) .venv-torch-* build dist site .pytest_cache .ruff_cache
