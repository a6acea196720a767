# `make demo`, `make serve` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run tests side by side: one for each processor, or a number.
WORKERS ?= logical
# Of `make fuzz`.
SEED ?= 0
# They come with packages that the tests import, and start slowly.
UNUSED_PLUGINS := -p no:langsmith_plugin -p no:schemathesis

.PHONY: demo serve test fuzz bases runtimes lint docs setup setup-dev clean

demo: setup
	$(BIN)/loracast demo examples/manual.pdf

# The page and the API for your own library, until Ctrl-C.
serve: setup
	$(BIN)/loracast serve

# One thread for each worker: more of them only wait for each other. Processes that tests start find modules compiled.
test: setup-dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal \
	  $(UNUSED_PLUGINS)

# Damaged files and requests for a few minutes; a run goes on where the last one of the seed ended.
fuzz: setup-dev
	for target in adapter hypernetwork checkpoint document http; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $$target --count 100000 --seconds 120 --seed $(SEED) || exit 1; \
	done

# One training for each type of base; writes a table into docs/any-base.md.
bases: setup-dev
	$(BIN)/python -m pytest tests/bases

runtimes: setup-dev
	$(BIN)/python -m pytest tests/runtimes -s

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages as a site, in build/site: every broken link or name is an error (but not with --quiet, which counts none).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/loracast pull
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV)
