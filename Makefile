# Two commands need nothing but Python 3.10 or later: `make demo` and `make test`. Each makes its own environment.
# 3.11 comes first because its torch is the smallest download; then whatever `python3` is, then what else is there.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
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
# Each worker takes whole stretches of the suite, so that what the tests of a file share is made by one of them.
WORKERS := -n $(JOBS) --dist worksteal

.PHONY: help test demo gpu test-xla test-torch lint format types floors docs clean

help:
	@echo "make demo      train a small GPT on 2 ranks three times and compare: none, torch, distckpt"
	@echo "make test      lint, types, import floors, tests"
	@echo "make test-xla  the XLA suite on torch 2.9 + torch-xla 2.9 (a 3 GB download the first time)"
	@echo "make test-torch TORCH=$(TORCH)  what depends on torch, on any torch from 2.9 on (again 3 GB)"
	@echo "make gpu       the CUDA tests and benchmarks with the torch of this machine's python3, under nine minutes"
	@echo "make docs      the pages of docs/ as a site in site/"
	@echo "make format    ruff format and the fixes ruff can make"

comma := ,
OLD := import sys; v = sys.version_info[:3]; v >= (3, 10) or \
	sys.exit("distckpt needs Python 3.10 or later; %s is %d.%d.%d: make PYTHON=/path/to/python3.12" % ((sys.executable,) + v))

# $(call install,VENV,EXTRAS,WHAT FOR,CONSTRAINTS): pip's own words go to a file, and are shown when it fails.
define install
	@$(or $(PYTHON),python3) -c '$(OLD)'
	@echo "installing $(3) into $(1): minutes the first time, torch is a large download (pip's words: $(1)/install.log)"
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --disable-pip-version-check -e '.$(2)' -c $(4) >$(1)/install.log 2>&1 \
		|| { cat $(1)/install.log; exit 1; }
	@touch $@
endef

$(VENV)/.demo: pyproject.toml constraints-dev.txt
	$(call install,$(VENV),[cli],what the demo needs,constraints-dev.txt)

$(VENV)/.dev: pyproject.toml constraints-dev.txt
	$(call install,$(VENV),[dev],what the tests need,constraints-dev.txt)
	@touch $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints-dev.txt
	$(call install,$(VENV),[docs],what the site needs,constraints-dev.txt)

$(XLA)/.dev: pyproject.toml constraints-xla.txt
	$(call install,$(XLA),[test$(comma)xla],torch 2.9 with torch-xla and what the tests need,constraints-xla.txt)

NO_WHEEL := import sys; sys.version_info < (3, 11) and (2, 15) <= tuple(map(int, "$(TORCH)".split(".")[:2])) and \
	sys.exit("torch $(TORCH) has no wheel for Python 3.10: make test-torch PYTHON=python3.11, or TORCH=2.14.1")
$(OTHER)/.dev: pyproject.toml constraints-dev.txt
	@$(PYTHON) -c '$(NO_WHEEL)'
	@mkdir -p $(OTHER)
	@sed 's/^torch==[^ ;]*/torch==$(TORCH)/' constraints-dev.txt >$(OTHER)/constraints.txt
	$(call install,$(OTHER),[test$(comma)hf],torch $(TORCH) and what the tests need,$(OTHER)/constraints.txt)

test: lint types floors
	$(ONE) $(BIN)/python -m pytest -q $(WORKERS) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

floors: $(VENV)/.dev
	PYTHONPATH=.:backends $(BIN)/lint-imports --no-cache
	$(BIN)/python tests/floors.py

# What a GPU machine has is enough: torch and pytest.
gpu:
	python3 benchmarks/gpu.py

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.demo
	$(ONE) $(BIN)/torchrun --standalone --nproc_per_node 2 launch/train.py --compare $(if $(STEPS),--steps $(STEPS))

test-xla: $(XLA)/.dev
	$(ONE) PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -q $(WORKERS) -m "xla and not slow"
	$(ONE) PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -q $(WORKERS) -m "not xla and not slow" \
		tests/backends tests/engine tests/policy tests/modules tests/compat tests/ranks

test-torch: $(OTHER)/.dev
	$(ONE) $(OTHER)/bin/python -m pytest -q $(WORKERS) -m "not slow" $(SUITES)

clean:
	rm -rf $(VENV) $(XLA) .venv-torch-* build dist site .pytest_cache .ruff_cache
