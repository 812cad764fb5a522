# `make demo` and `make test` set everything up on a fresh machine, then run. Nothing else has to be done by hand.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

.PHONY: help setup setup-dev servers demo serve test test-fast lint lock proto bench bench-peers bench-report chaos mutants kernels gpu-check clean

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

demo: setup  ## a broker, the service, real prompts and their tokens, in some minutes the first time
	@$(BIN)/sluice demo

serve: setup  ## a broker and the service until Ctrl-C; prints what to try
	@$(BIN)/sluice serve --embedded

servers: setup-dev  ## fetch and build what the tests run against (model, Kafka, Jaeger), once
	@$(BIN)/python -m tests.servers.prepare

WORKERS ?= 2
test: servers  ## every test, files side by side in 2 workers (WORKERS=…), each with a broker of its own unless one is named
	@$(BIN)/python -m pytest $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile)

lint: setup-dev  ## style, types, import contracts, generated code
	@$(BIN)/ruff format --check --quiet . || { echo "ruff format . would change files" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/python -m tests.proto_drift
	@echo "lint: clean"

bench: servers  ## the benchmarks, as JSON on standard output (about 15 minutes)
	@$(BIN)/python -m tests.bench

bench-peers: setup-dev  ## against llama.cpp, vLLM and transformers, as JSON on standard output (built first, 10 minutes and 7 GB once)
	@$(BIN)/python -m tests.bench.peers.build || echo "the benchmark goes on without them and says so" >&2
	@$(BIN)/python -m tests.bench.peers

$(VENV)/.report: deploy/report.lock | $(UV)
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r deploy/report.lock
	@touch $@

bench-report: setup-dev $(VENV)/.report  ## RESULTS="file.json ..." as one page with its picture, OUT.md and OUT.png
	@$(BIN)/python -m tests.bench.published --out $(or $(OUT),tests/bench/results/report) $(or $(RESULTS),$(error set RESULTS to the JSON files))

CHAOS ?=
chaos: servers  ## replicas and brokers killed, stopped and cut off by plan, what is left judged; CHAOS="--prompts 20000 --seed 3 …"
	@$(BIN)/python -m tests.chaos $(CHAOS)

mutants: servers  ## faults planted in the commit protocol, which the judge of `make chaos` must find
	@$(BIN)/python -m tests.chaos.hunt

kernels: setup-dev  ## compile every Triton kernel for sm_80, sm_90 and sm_100; registers, spills, shared memory
	@$(BIN)/python -m tests.bench.compile_report

gpu-check:  ## on a GPU machine: correctness of every kernel and model, figures of kernels and engine, as three JSON objects
	@python3 -m tests.bench.gpu_models
	@python3 -m tests.bench.gpu_check
	@python3 -m tests.bench.gpu_engine

setup: $(VENV)/.runtime  ## the virtual environment, runtime only
setup-dev: $(VENV)/.dev  ## the virtual environment with test tools

lock: | $(UV)  ## pin every dependency anew (hashes, no index lines)
	@$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --python-version 3.11 \
	    --custom-compile-command "make lock" -o deploy/runtime.lock pyproject.toml
	@$(UV) pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
	    --custom-compile-command "make lock" -c deploy/runtime.lock --extra dev -o deploy/dev.lock pyproject.toml
	@$(UV) pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
	    --custom-compile-command "make lock" -c deploy/runtime.lock --extra report -o deploy/report.lock pyproject.toml

proto: setup-dev  ## generate the protobuf code anew
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. schemas/v1/inference.proto schemas/v1/events.proto
	@$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. schemas/v1/inference.proto

clean:  ## remove what make made here (caches under ~/.cache/sluice stay)
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build tests/bench/out
