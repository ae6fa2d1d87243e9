# `make train` and `make test` are the two commands; each sets up its own environment the first time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test test-verl test-hosts test-browser bench fuzz evidence lint types docs notebook format clean

train: $(VENV)/.installed  ## BandPO training of a small language model: table, plots, report, saved model
	$(BIN)/bandpo train $(ARGS)

test: $(VENV)/.installed test-verl test-hosts  ## all tests; those in other hosts' code run first, in processes of their own
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-verl: $(VENV)-verl/.installed
	$(VENV)-verl/bin/python -m pytest tests/contract_verl -q -p no:cacheprovider -o filterwarnings=default

test-hosts: $(VENV)/.installed $(VENV)-verl/.installed  ## our adapters in the hosts' own wheels (HOSTS=skyrl for one; STRICT=1: the records must be fresh)
	$(BIN)/python tests/hosts/run.py --main $(BIN)/python --verl $(VENV)-verl/bin/python $(addprefix --only ,$(HOSTS))
	$(if $(STRICT),STRICT=1 $(BIN)/python -m pytest tests/hosts -q -p no:cacheprovider)

test-browser: $(VENV)/.installed  ## reports and the explorer in a headless Chromium; `make test` skips these where there is none
	$(BIN)/python -m pytest tests/browser

fuzz: $(VENV)/.installed  ## nightly: a million bad inputs, none of which may crash, hang or pass as good
	HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz/fuzz.py $(ARGS)

bench: $(VENV)/.installed  ## paired timings, one table, benchmarks/results.json
	$(BIN)/python -m pytest benchmarks -q -s -p no:xdist -o python_files='bench_*.py' -o pythonpath=benchmarks -o filterwarnings= $(ARGS)

evidence: $(VENV)/.installed  ## an hour or more: the full comparison, and the evidence page made from it
	$(BIN)/bandpo compare --preset full --evidence docs $(ARGS)

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

# verl wants an older transformers than TRL; the last line is what its training loop imports beside its own requirements.
$(VENV)-verl/.installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VENV)-verl
	$(VENV)-verl/bin/python -m pip install --quiet -c constraints-verl.txt torch
	$(VENV)-verl/bin/python -m pip install --quiet -c constraints-verl.txt -e '.[verl]' pytest hypothesis \
		TransferQueue cachetools pyzmq msgspec fastapi uvicorn
	touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

notebook: $(VENV)/.docs-installed  ## examples/first_steps.ipynb from examples/first_steps.py
	$(BIN)/jupytext --to ipynb --update-metadata '{"jupytext": null}' examples/first_steps.py

clean:
	rm -rf $(VENV) $(VENV)-verl .hosts site runs .pytest_cache .ruff_cache .hypothesis
