# `make demo` and `make test` are all the set-up there is: each makes .venv when it is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Another torch than the newest, in a new .venv, for example: make tests TORCH="torch==2.11.*"
TORCH ?=
# Further arguments, for example: make demo DEMO_ARGS="--seed 3"
DEMO_ARGS ?=
TEST_ARGS ?=
# Test files at a time, each with one thread; 0 for one after another in one process.
TEST_WORKERS ?= 2
BENCH_ARGS ?=
# Byte code is written also where the shell says otherwise: some thirty processes of the tests import the same files.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types tests test-long versions docs bench gpu endurance clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Train on the digits beside the controls, five seeds; results go to runs/demo (more arguments: DEMO_ARGS).
	rm -rf runs/demo
	$(BIN)/metapl train digits --compare --seeds 0-4 --steps 2000 --out runs/demo $(DEMO_ARGS)

test: lint ## Lint, format check, types, tests and doctests (more arguments for pytest: TEST_ARGS).
	$(BIN)/mypy > $(VENV)/mypy.txt 2>&1 & types=$$!; \
	  $(PYTEST) -m "not long and not docs" $(TEST_ARGS); \
	  tests=$$?; wait $$types; types=$$?; cat $(VENV)/mypy.txt; exit $$((tests || types))

lint: $(STAMP) ## Lint and format check alone.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Types alone.
	$(BIN)/mypy

tests: $(STAMP) ## Tests and doctests alone.
	$(PYTEST) -m "not long and not docs" $(TEST_ARGS)

test-long: $(STAMP) ## The tests that take many seconds, which make test leaves out.
	$(PYTEST) -m long $(TEST_ARGS)

versions: $(STAMP) ## The library's tests on torch 2.11, on one between and on the newest, each in an environment that is kept.
	TEST_WORKERS=$(TEST_WORKERS) $(BIN)/nox -- $(TEST_ARGS)

docs: $(STAMP) ## Build the documentation into site/, with warnings as errors; run its code, check its tables.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(PYTEST) -m docs $(TEST_ARGS)

bench: $(STAMP) ## Measure what each mode costs (more arguments: BENCH_ARGS).
	$(BIN)/python benchmarks/modes.py $(BENCH_ARGS)

gpu: $(STAMP) ## On a GPU, nine minutes of tests and measurements, which the next call goes on from (more arguments: BENCH_ARGS).
	$(BIN)/python benchmarks/gpu.py --out runs/gpu $(BENCH_ARGS)

endurance: $(STAMP) ## Try kills, damaged files and damaged pictures by the hundred (more arguments: BENCH_ARGS).
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/endurance.py $(BENCH_ARGS)

clean: ## Remove the environments, caches, site/ and runs/demo; other runs stay.
	rm -rf $(VENV) .nox runs/demo build site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch and torchvision are resolved together, so that pip picks builds that match. Tools that check
# the code are those of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "metapl needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH),'$(TORCH)') --editable '.[dev]'
	@touch $@
