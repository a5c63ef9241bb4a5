# Everything here starts from `python3` and the package registries: the environment is made, and made again when
# pyproject.toml or the interpreter changes. `make PYTHON=python3.13 test` picks another interpreter.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile
WHEELS ?= .whl
GPU_JSON ?= gpu.json

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
STAMP = $(VENV)/.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:
.PHONY: help demo test test-all campaign gpu lint docs tutorials dist clean FORCE

help: ## show this list
	@echo "make TARGET [PYTHON=python3] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "The first target builds the environment: several GB and some minutes, mostly for torch."

demo: $(STAMP)-run ## predict on a synthetic section, offline; writes ./demo
	$(BIN)/histosge demo

test: $(STAMP)-test ## run the tests but the slow tenth (PYTEST_ARGS='-k geometry' runs some of them)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)
	@echo "The slow tests were left out: make test-all runs them, too."

test-all: $(STAMP)-test ## run all of the tests, as CI does
	$(BIN)/python -m pytest $(PYTEST_ARGS)

campaign: $(STAMP)-test ## run the faults, kills and damaged files of tests/campaign whole, not in their short form
	$(BIN)/python -m pytest tests/campaign --campaign $(PYTEST_ARGS)

gpu: ## tests and benchmarks of a GPU, with PYTHON as it is and wheels in WHEELS (.whl); writes GPU_JSON (gpu.json)
	@site="$$(mktemp -d)" && trap 'rm -rf "$$site"' EXIT && if [ -d "$(WHEELS)" ]; then $(PYTHON) -m pip install \
	  --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$$site" "$(WHEELS)"/*.whl; fi && \
	PYTHONPATH="$(CURDIR)/src:$$site" $(PYTHON) benchmarks/gpu.py --all --json "$(GPU_JSON)"

lint: $(STAMP)-lint ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)-doc ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

tutorials: $(STAMP)-tutorial ## run the notebooks of tutorials/; an error or a warning in one is an error
	$(BIN)/python tutorials/run.py

dist: $(STAMP)-release ## build wheel and source archive into dist/, check them, and run the demo from the wheel alone
	rm -rf dist
	$(BIN)/python -m build --installer pip --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python recipe/try_wheel.py dist

clean: ## remove what the other targets made, the environment too
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	rm -rf demo dist build docs/_build docs/generated .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests docs benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# The file holds the interpreter (its version and place) and this folder. It is rewritten, and so newer than the stamps
# below, only when one of them has changed.
$(STAMP)-venv: FORCE
	@now="$$($(PYTHON) -c 'import sys; print(sys.version.split()[0], sys.base_prefix)') $(CURDIR)" \
	  || { echo "PYTHON=$(PYTHON) does not run: name a Python 3.11 or newer, as in make PYTHON=python3.12." >&2; exit 1; }; \
	if [ "$$(cat "$@" 2>/dev/null)" = "$$now" ] && "$(BIN)/python" -c '' 2>/dev/null; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "histosge needs Python 3.11 or newer; $(PYTHON) is $${now%% *}: name another, as in make PYTHON=python3.12." >&2; exit 1; }; \
	if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "VENV=$(VENV) exists and is no virtual environment: name another folder." >&2; exit 1; fi; \
	echo "$(VENV): new environment with Python $${now%% *}"; \
	rm -rf "$(VENV)" && $(PYTHON) -m venv "$(VENV)" && $(PIP) install --quiet --upgrade pip && echo "$$now" > "$@"

$(STAMP)-run: $(STAMP)-venv pyproject.toml
	$(PIP) install -e .
	@touch $@

$(STAMP)-test $(STAMP)-lint $(STAMP)-doc $(STAMP)-tutorial $(STAMP)-release: $(STAMP)-%: $(STAMP)-run
	$(PIP) install -e . --group $*
	@touch $@

FORCE:
