PYTHON ?= python3
# What MLX computes on: cpu (on macOS that means Metal too) or cuda.
BACKEND ?= cpu
VENV := .venv
# Other people's trainers, to measure against.
PEERS := .venv-peers
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test fault-test bench bench-sweep lint format constraints doctor clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.run ## Make .venv with all that the stages need

demo: setup ## Fetch the default base model, run the whole pipeline, show the result
	@dvc repro
	@python -m stages show

test: $(VENV)/.dev lint ## Lint, check types, run the tests
	@python -m pytest

fault-test: $(VENV)/.dev ## Kill training at 20 random moments and compare what it ends in
	@python -m tests.support.faults

bench: setup $(PEERS)/.done ## Measure beside mlx_lm.lora and PEFT (DATA=dir SET=key=value QUICK=1)
	@python -m benchmarks.bench --peers $(CURDIR)/$(PEERS)/bin/python $(if $(QUICK),--quick) \
	  $(if $(DATA),--data $(DATA)) $(if $(SET),--set '$(SET)')

bench-sweep: setup ## Time six experiments against six runs of mlx_lm.lora
	@python -m benchmarks.sweep

lint: $(VENV)/.dev ## Lint and check types
	@ruff format --check .
	@ruff check .
	@mypy

format: $(VENV)/.dev ## Format the code and mend what lint can mend
	@ruff format .
	@ruff check --fix .

constraints: $(VENV)/.dev ## Choose the newest versions anew (then run the tests, and commit both)
	@python -m pip install --quiet uv
	@{ echo '# The exact versions that a result is reproducible with. Made by `make constraints`.'; \
	   uv pip compile --quiet --universal --no-annotate --no-header --no-emit-index-url --upgrade \
	     --extra cpu --extra datasets --extra near-duplicates --extra dev pyproject.toml | sed -e '/jsfetch/d' -e '/win32/d' -e "s/ ; sys_platform != 'emscripten'//"; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@names=$$(sed -n 's/^\([a-z].*\): .*/\1/p' versions.yaml | paste -s -d '|' -); \
	  { grep '^#' versions.yaml; sed -nE "s/^($$names)==([^ ;]+).*/\1: \2/p" constraints.txt; } > versions.yaml.new
	@mv versions.yaml.new versions.yaml

doctor: setup ## Show what this machine has
	@python -m stages doctor

clean: ## Remove .venv and everything that the pipeline made here (the store of base models stays)
	rm -rf $(VENV) $(PEERS) .dvc/cache .dvc/tmp data/prepared data/tokens .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf artifacts/adapter artifacts/evaluate artifacts/merged artifacts/samples artifacts/timing \
	  artifacts/cache artifacts/checkpoints

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[$(BACKEND)]'
	@touch $@

$(PEERS)/.done: benchmarks/peers.txt constraints.txt | $(BIN)/python
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/peers.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[$(BACKEND),dev]'
	@touch $@ $(VENV)/.run
