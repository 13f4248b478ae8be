PYTHON ?= python3
# What MLX computes on: cpu (on macOS that means Metal too) or cuda.
BACKEND ?= cpu
VENV := .venv
# The same and other people's trainers, PyTorch with PEFT: large, so apart.
PEERS := .venv-peers
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Most tests start processes and wait: a test file to each core. (PARALLEL= runs them one by one.)
PARALLEL ?= -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo experiments test test-peers test-browser test-all fault-test bench bench-sweep lint format docs constraints doctor clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.run .dvc/plots.html ## Make .venv with all that the stages need

demo: setup ## Fetch the default base model, run the whole pipeline, show the result
	@dvc repro
	@python -m stages show

experiments: setup ## Rank the experiments of the last commit, with intervals
	@python -m stages compare --experiments

test: $(VENV)/.dev lint ## Lint, check types, run the tests
	@python -m pytest $(PARALLEL)

test-peers: $(PEERS)/.done ## Run the tests that hold training against PyTorch and PEFT
	@$(PEERS)/bin/python -m pytest -m peers $(PARALLEL)

test-browser: $(VENV)/.dev ## Look at the report in headless Chromium
	@python -m pytest -m browser

test-all: test test-peers test-browser ## Run every test: what .ci/run does

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

format: $(VENV)/.dev ## Format the code and correct what lint can correct
	@ruff format .
	@ruff check --fix .

docs: $(VENV)/.dev ## Write docs/parameters.md anew from params.yaml and its schema
	@python -m docs.make_parameters

constraints: $(VENV)/.dev ## Choose the newest versions anew (then run the tests, and commit both)
	@python -m pip install --quiet uv
	@uv pip compile --quiet --universal --no-annotate --no-header --no-emit-index-url --upgrade --extra cpu --extra datasets \
	  --extra near-duplicates --extra dev --extra peers --output-file constraints.txt.new pyproject.toml
	@{ echo '# The exact versions that a result is reproducible with. Made by `make constraints`.'; \
	   sed -e '/jsfetch/d' -e '/win32/d' -e '/^cuda-/d' -e '/^nvidia-/d' -e '/^triton=/d' -e "s/ ; sys_platform != 'emscripten'//" \
	     constraints.txt.new; } > constraints.txt
	@rm constraints.txt.new
	@names=$$(sed -n 's/^\([a-z].*\): .*/\1/p' versions.yaml | paste -s -d '|' -); \
	  { grep '^#' versions.yaml; sed -nE "s/^($$names)==([^ ;]+).*/\1: \2/p" constraints.txt; } > versions.yaml.new
	@mv versions.yaml.new versions.yaml

doctor: setup ## Show what this machine has
	@python -m stages doctor

# The stages' outputs that DVC caches: metrics and plots are in git, and what `dvc add` tracks is data of the user's own.
REMOVE_OUTPUTS := from dvc.repo import Repo; \
  [out.remove() for stage in Repo().index.stages if stage.cmd for out in stage.outs if out.use_cache]

clean: ## Remove .venv and everything that the pipeline made here (the store of base models stays)
	@if [ -x $(BIN)/python ]; then $(BIN)/python -c '$(REMOVE_OUTPUTS)'; \
	  else echo "There is no $(VENV), so no DVC to ask for the stages' outputs: these stay (make setup clean removes them)"; fi
	rm -rf artifacts/cache artifacts/checkpoints artifacts/timing .dvc/cache .dvc/plots.html .dvc/tmp
	rm -rf $(VENV) $(PEERS) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks stages tests -name __pycache__ -prune -exec rm -rf {} +

# The page that `dvc plots` fills in. .dvc/config names it, and DVC fails without it.
PLOTS_PAGE := $(BIN)/python -m stages.plots

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[$(BACKEND)]'
	@touch $@

.dvc/plots.html: $(VENV)/.run
	@$(PLOTS_PAGE)

$(PEERS)/.done: pyproject.toml constraints.txt | $(BIN)/python
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  '.[$(BACKEND),dev,peers]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[$(BACKEND),dev,browser]'
	@touch $@ $(VENV)/.run
	@$(PLOTS_PAGE)
