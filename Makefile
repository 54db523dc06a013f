# One command sets up and runs the main job, one sets up and passes the tests.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: quickstart test test-oldest style check clean

quickstart: $(VENV)/.installed  ## train a small model with memory and its twin without, compare, save, reload
	$(BIN)/python examples/quickstart.py

test: check  ## style, then all tests on two processes
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-oldest:  ## the same with the oldest versions that setup.py allows
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

check: $(VENV)/.installed  ## what CI says about style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.py pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test,examples]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest out
