# `make train` and `make test` are the two commands; each sets up its own environment the first time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test bench lint types docs format clean

train: $(VENV)/.installed  ## BandPO training of a small language model: table, plots, report, saved model
	$(BIN)/bandpo train $(ARGS)

test: $(VENV)/.installed  ## all tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.installed  ## paired timings, one table, benchmarks/results.json
	$(BIN)/python -m pytest benchmarks -q -s -p no:xdist -o python_files='bench_*.py' -o pythonpath=benchmarks -o filterwarnings= $(ARGS)

lint: $(VENV)/.installed  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## pyright, strict on the core
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs-installed  ## the documentation site, in site/
	$(BIN)/zensical build --clean --strict

# torch comes first, by the constraints' version: another package asking for "any torch" would fetch gigabytes for CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site runs .pytest_cache .ruff_cache .hypothesis
