# `make demo` and `make test` set everything up on a fresh machine, then run. Nothing else has to be done by hand.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

.PHONY: help setup setup-dev lock proto lint test clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Sluice needs Python 3.11 or newer; set PYTHON=…" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.runtime: deploy/runtime.lock pyproject.toml | $(UV)
	@echo "Installing what Sluice runs on (torch is large; a minute or two the first time) …"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r deploy/runtime.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.dev: deploy/dev.lock $(VENV)/.runtime
	@echo "Installing what the tests use …"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r deploy/dev.lock
	@touch $@

setup: $(VENV)/.runtime  ## the virtual environment, runtime only
setup-dev: $(VENV)/.dev  ## the virtual environment with test tools

lock: | $(UV)  ## pin every dependency anew (hashes, no index lines)
	@$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 \
	    --custom-compile-command "make lock" -o deploy/runtime.lock pyproject.toml
	@$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 \
	    --custom-compile-command "make lock" -c deploy/runtime.lock --extra dev -o deploy/dev.lock pyproject.toml

proto: setup-dev  ## generate the protobuf code anew
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. schemas/v1/inference.proto schemas/v1/events.proto
	@$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. schemas/v1/inference.proto

clean:  ## remove what make made here (caches under ~/.cache/sluice stay)
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build tests/bench/out
