# `make quickstart` and `make test` each do all the set-up they need, from a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help quickstart test test-fast check clean

help:
	@echo "make quickstart   environment, data, weights, both training stages, evaluation, an answer about a picture"
	@echo "make test         the whole test suite (CPU, offline)"
	@echo "make test-fast    without the tests that take minutes"
	@echo "make check        lint and formatting"
	@echo "make clean        remove the environment and outputs"

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python -m minigpt4.embedded.quickstart

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) output build *.egg-info
