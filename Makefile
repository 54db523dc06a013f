# One command sets up and runs the main job, one sets up and passes the tests.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile
OLDEST := 5.17.0
TESTS ?= not slow

.PHONY: quickstart evidence test test-oldest test-matrix test-upstream run-tests backbones trials faults fuzz kills soak style check docs notebooks build clean

quickstart: $(VENV)/.installed  ## train a small model with memory and its twin without, compare, save, reload
	$(BIN)/python examples/quickstart.py

evidence: $(VENV)/.installed  ## the six experiments of docs/evidence.md with tiny models, and a page of what came out, in out/evidence/ (minutes)
	mkdir -p out/evidence && cp docs/evidence.md out/evidence/evidence.md
	$(ONE_THREAD) $(BIN)/python -m experiments run --preset quick --results out/evidence
	$(ONE_THREAD) $(BIN)/python -m experiments report --preset quick --results out/evidence --page out/evidence/evidence.md

test: check run-tests  ## style, types and documentation, then all but the slow tests on two processes

test-oldest:  ## with the oldest versions that setup.py allows, the tests that depend on versions
	$(MAKE) run-tests TESTS="not slow and not any_version" VENV=.venv-$(OLDEST) CONSTRAINTS=constraints/transformers-$(OLDEST).txt

test-matrix:  ## all tests, slow ones too, with every tested version of transformers, each in an environment of its own; prints a table
	$(PYTHON) tests/version_matrix.py

test-upstream: $(VENV)/.installed-upstream  ## transformers' own common tests, with memory beside the bare backbone
	$(BIN)/python tests/upstream

backbones: $(VENV)/.installed  ## memory on every causal language model of the newest and the oldest transformers; writes docs/backbones.md (half an hour)
	$(MAKE) $(VENV)-$(OLDEST)/.installed VENV=$(VENV)-$(OLDEST) CONSTRAINTS=constraints/transformers-$(OLDEST).txt
	failed=0; for python in $(BIN) $(VENV)-$(OLDEST)/bin; do \
		$(ONE_THREAD) HF_HUB_OFFLINE=1 $$python/python benchmarks/backbones.py --write || failed=1; done; exit $$failed

run-tests: $(VENV)/.installed
	$(PYTEST) -m "$(TESTS)" $(PYTEST_ARGS)

# Files run in the order of their names: by their number of tests, those with one long test would come last, one process alone at work.
trials: $(VENV)/.installed-trl  ## the slow tests: trials of docs/reliability.md in short, compilation, whole scripts (minutes)
	$(PYTEST) --no-loadscope-reorder -m slow $(PYTEST_ARGS)

# The trials of docs/reliability.md at length; `make trials` runs short ones. Each prints its seed, and what goes there.
faults: $(VENV)/.installed  ## the trials of tests/faults, those that draw at random with a hundred times as many rounds (hours)
	$(ONE_THREAD) ENGRAM_TRIALS=100 $(BIN)/python -m pytest -n 2 tests/faults $(PYTEST_ARGS)

fuzz: $(VENV)/.installed  ## 100,000 mutated files (an hour)
	$(ONE_THREAD) $(BIN)/python tests/faults/fuzzing.py --count 100000 $(TRIAL_ARGS)

kills: $(VENV)/.installed  ## 100 kills each of convert, export, quantize, demo, saving and writing facts (a quarter of an hour)
	$(ONE_THREAD) $(BIN)/python tests/faults/kills.py --count 100 $(TRIAL_ARGS)

soak: $(VENV)/.installed  ## 20 minutes of mixed requests on mapped tables, adapters switched between them
	$(ONE_THREAD) $(BIN)/python tests/faults/soak.py --minutes 20 $(TRIAL_ARGS)

check: $(VENV)/.installed docs  ## what CI says about style, prose, types and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/tools/check_prose.py
	mkdir -p .mypy_packages && ln -sfn .. .mypy_packages/engram_hf && ln -sfn ../cli .mypy_packages/engram_cli
	$(BIN)/mypy

style: $(VENV)/.installed  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Python compiles what is imported; pip would compile every file of torch and transformers, which takes longer.
$(VENV)/.installed: setup.py pyproject.toml $(CONSTRAINTS) $(wildcard constraints/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS) -e ".[test,examples,quantize]"
	touch $@

$(VENV)/.installed-trl: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[trl]"
	touch $@

$(VENV)/.installed-upstream: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[upstream]"
	touch $@

docs: .venv-docs/.installed  ## the documentation site, in out/site; a warning is an error, and no network is needed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

notebooks: $(VENV)/.installed-notebooks  ## runs the notebooks and stores what they print
	$(ONE_THREAD) $(BIN)/python docs/tools/run_notebooks.py

# Needs neither torch nor transformers: the reference is read from the sources. The list is complete, so nothing is resolved.
.venv-docs/.installed: constraints/docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r constraints/docs.txt
	touch $@

$(VENV)/.installed-notebooks: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[notebooks]"
	touch $@

build: $(VENV)/.installed  ## sdist and wheel, in dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) .venv-* .upstream .mypy_packages .mypy_cache out
