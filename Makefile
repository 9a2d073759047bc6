# `make demo`, `make test` and `make lint` need python3 with venv, and nothing else: they make .venv and install into it what is
# missing. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply.

BIN := .venv/bin
# Three sets of packages: what the demo needs, what tests and linting need besides, and the consumers of exports. Tests of an
# export whose consumer is missing are skipped; test-all installs every consumer that constraints.txt pins.
INSTALLED := .venv/.installed
TOOLS := .venv/.tools
CONSUMERS := .venv/.consumers
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint clean

# Kernels of an older processor, which add products of two 8-bit operands in 16 bits, on any x86 one.
SATURATING := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## quantize the reference model and compare: table, pictures and checkpoint in demo-output/
	@$(BIN)/diffquant demo --out demo-output

test: $(TOOLS) ## run the tests, in some minutes
	@$(PYTEST) -m "not long"

test-all: $(CONSUMERS) ## run the long tests too, and all others once more on kernels that saturate
	@$(PYTEST)
	@$(SATURATING) $(PYTEST) -m "not long"

lint: $(TOOLS) ## style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

clean: ## remove what the other targets made, except .venv
	@rm -rf demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself: the pinned version decides which build everything else has to fit.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv (once; some minutes)"
	@test -x $(BIN)/python || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "python3 here is older than 3.11, which diffquant needs; make .venv with a newer one: uv venv --seed --python 3.12 .venv"; \
		exit 1; }
	@test -x $(BIN)/pip || python3 -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable '.[evaluate]'
	@touch $@

$(TOOLS): $(INSTALLED)
	@$(PIP) --editable '.[dev]'
	@touch $@

$(CONSUMERS): $(TOOLS)
	@$(PIP) --editable '.[dev,consumers]'
	@touch $@
