# `make demo`, `make serve` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What looks at the dependencies has an environment of its own, so that it is none of them.
TOOLS := build/tools
# Processes that run tests side by side: one more than processors, since some tests wait for other processes.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
# Of `make fuzz`.
SEED ?= 0
# They come with packages that the tests import, and start slowly; hypothesis would import trio for its plugin.
UNUSED_PLUGINS := -p no:langsmith_plugin -p no:schemathesis -p no:anyio -p no:asyncio
# One thread for each worker: more of them only wait for each other. Processes that tests start find modules compiled.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= HYPOTHESIS_NO_PLUGINS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 \
  --dist worksteal $(UNUSED_PLUGINS) $(COVERAGE)

.PHONY: demo serve test test-shipped fuzz bases runtimes lint docs lock audit sbom setup setup-dev clean

demo: setup
	$(BIN)/loracast demo examples/manual.pdf

# The page and the API for your own library, until Ctrl-C.
serve: setup
	$(BIN)/loracast serve

test: setup-dev
	$(TESTS) -m 'not base and not browser and not recipe'

# What ships: the weights with README's examples and the tutorial, recipes at full size, and the page in Chromium.
test-shipped: setup-dev
	$(TESTS) -m 'base or browser or recipe'

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
	$(BIN)/lint-imports

# The pages as a site, in build/site: every broken link or name is an error (but not with --quiet, which counts none).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What CI installs, by hash. Made anew after a change of the dependencies, and to take newer releases (UPGRADE=--upgrade).
lock: $(TOOLS)/.installed
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra dev --extra docs --universal --python-version 3.11 \
	  --generate-hashes --overrides requirements/overrides.txt --no-emit-index-url --no-annotate $(UPGRADE) \
	  --custom-compile-command "make lock" --quiet --output-file requirements/ci.txt

# Known vulnerabilities of what the lock names.
audit: $(TOOLS)/.installed
	$(TOOLS)/bin/python .ci/audit

# The bill of materials of what users install (CycloneDX), in build/sbom.json.
sbom: $(TOOLS)/.installed
	rm -rf build/installed && $(PYTHON) -m venv --without-pip build/installed
	$(PYTHON) -m pip --python build/installed/bin/python install --quiet .
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file build/sbom.json build/installed/bin/python

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

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet 'cyclonedx-bom>=7' 'pip-audit>=2.9' 'uv>=0.8'
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS)
