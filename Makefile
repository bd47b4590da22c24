# `make demo` installs into .venv and runs the main job on the embedded default; `make test` installs and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slurm lint install clean

demo: install
	$(BIN)/alignlab compare experiment=demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/slurm

# On a real Slurm of virtual nodes, beside any other on this machine. Needs root, and installs Debian's packages.
test-slurm: export ALIGNLAB_SLURM = /tmp/alignlab-test-slurm
test-slurm: export ALIGNLAB_SLURM_CONF = $(ALIGNLAB_SLURM)/etc
test-slurm: export ALIGNLAB_SLURM_PORT = 21817
test-slurm: export SLURM_CONF = $(ALIGNLAB_SLURM_CONF)/slurm.conf
test-slurm: $(VENV)/.test
	slurm/local-cluster.sh start
	$(BIN)/python -m pytest tests/slurm; status=$$?; slurm/local-cluster.sh wipe; exit $$status

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.install

$(VENV)/.install: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("alignlab needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
