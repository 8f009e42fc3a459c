# Commands for a fresh machine:
#   make pretrain   trains the default policy and leaves a video of the robot it drives
#   make test       runs the tests, the linter and the type checker
#   make docs       builds the documentation into site/
# Each makes a virtual environment of its own if there is none.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# pip compiles the modules one after another; this does it on all cores, some files of other Pythons aside.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

.PHONY: help pretrain test lint docs docs-serve clean

help:
	@sed -n '1,5p' Makefile

pretrain: $(VENV)/.train
	$(BIN)/python scripts/pretrain.py run_dir=runs/pretrain/$$(date +%Y-%m-%d_%H-%M-%S) $(ARGS)

test: $(VENV)/.dev
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[train,mujoco]"
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@$(COMPILE)
	@touch $@ $(VENV)/.train $(VENV)/.docs

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	@$(COMPILE)
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
