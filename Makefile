# Every target sets up the environment first if it is missing or out of date: make demo, make test, …
PYTHON ?= python3
VENV ?= .venv
# Tests run side by side, one thread each.
PYTEST_ARGS ?= -n 2 --dist loadgroup

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
# What has to hold with the oldest libraries too: all that docs/compatibility.md names, the core, cropping, and GLUE.
CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,architectures cases_runs checkpoints checks cli comparative_losses \
	controls cropping data dropout faults glue low_memory models_without_dropout other_randomness recompute run shares stacked step \
	tasks text_classification trainer training_args variants versions ways_of_training))
READY_OLDEST := $(VENV)-oldest/.ready
READY_FLOOR := $(VENV)-floor/.ready
READY_RECIPES := $(VENV)-recipes/.ready

.PHONY: help env demo test test-oldest test-floor soak test-recipes test-cuda lint format typecheck bench docs dist

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: $(READY) ## the environment in $(VENV)

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,prf]'
	touch $@

demo: $(READY) ## train a small model as baseline and with two ablations: a table and runs/demo/losses.png
	$(BIN)/python examples/demo/demo.py

test: $(READY) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

$(READY_OLDEST): setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-oldest.txt \
		-e '.[test-core]' torch==2.13.0
	touch $@

test-oldest: $(READY_OLDEST) ## the core suite with the oldest libraries that setup.cfg allows, but for torch
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(PYTEST_ARGS) $(CORE_TESTS)

$(READY_FLOOR): setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-oldest.txt \
		-e '.[test-core]' torch==2.6.0
	touch $@

test-floor: $(READY_FLOOR) ## the same with the oldest torch, whose wheel brings several GB of CUDA
	OMP_NUM_THREADS=1 $(VENV)-floor/bin/python -m pytest $(PYTEST_ARGS) $(CORE_TESTS)

$(READY_RECIPES): setup.cfg constraints-recipes.txt
	$(PYTHON) -m venv $(VENV)-recipes
	$(VENV)-recipes/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-recipes.txt \
		-e '.[test-core]' trl sentence-transformers lightning setuptools wheel
	DS_BUILD_OPS=0 $(VENV)-recipes/bin/python -m pip install --disable-pip-version-check --quiet \
		-c constraints-recipes.txt --no-build-isolation deepspeed
	touch $@

soak: $(READY) ## trainings of 3,000 steps: memory, objects, hooks, modes and step times from first to last
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --override-ini addopts= -q -s tests/slow

test-recipes: $(READY_RECIPES) ## trainers of TRL and sentence-transformers, Accelerate, Lightning, DeepSpeed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)-recipes/bin/python -m pytest -q tests/recipes

test-cuda: $(READY) ## what needs a GPU of NVIDIA; skipped where there is none
	$(BIN)/python -m pytest -q tests/cuda

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff write its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY) ## step times, memory and saves against what one would run instead, into docs/performance.md
	$(BIN)/python benchmarks/bench_steps.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/bench_saves.py

docs: $(READY) ## the documentation in site/; fails on a broken link or reference
	$(BIN)/python -m mkdocs build --strict

dist: $(READY) ## sdist and wheel in dist/, checked; the wheel, in a fresh environment, runs the demo
	rm -rf dist $(VENV)-dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/scripts/check_release.py dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt "$$(ls dist/*.whl)[plot]"
	$(VENV)-dist/bin/python examples/demo/demo.py
