# make demo        installs into .venv and runs the main job on the embedded default
# make check       the inner loop of whoever changes something, about a minute: linter, core, algorithms, a run of each kind
# make test        all tests but those of the targets below; needs no GPU, no network and nothing beside this folder
# make test-processes  several processes, launchers, sweeps, what is killed, full memory, wandb
# make test-hostile    bad inputs, full disks, power cuts, fuzzers
# make test-real   those of the above that need real models and data: skipped where ../shared is absent
# make test-slurm  on a real Slurm of virtual nodes on this machine (root, Debian)
# make test-vllm   with a real vLLM server, its build for CPUs
# make guard       the study of performance, small: has anything become slower or larger than recorded?
# make check-gpu   experiments/gpu/check.py: whether all is right on this machine's GPU; DEVICE=cpu does it tiny, on a CPU
# make fake-gpu    every algorithm on a GPU that is not there, by a CUDA build of PyTorch (5.5 GB) in an environment of its own
# make lint        linter, formatter, types
# make newer       which libraries have versions newer than those tested; never fails
# make wheel       builds the wheel, installs it in an empty environment and runs it in an empty folder
# make clean       removes the environments and what was built
#
# Each target installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=  # what is compiled once, tests with pytest's changes too, is kept

.PHONY: demo check test test-processes test-hostile fuzz test-real test-slurm test-vllm vllm guard peers-ppo \
  check-gpu fake-gpu lint newer wheel install clean

demo: install
	$(BIN)/alignlab compare experiment=demo

PYTEST := $(BIN)/python -m pytest
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder  # in the order of tests/conftest.py: the longest first

# One run of each kind: on demonstrations, on pairs, of a reward model, of a process reward model, on scored samples of the
# policy; and what a comparison plans.
EACH_KIND := sft dpo reward_model process_reward_model ppo
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(PYTEST) -q $(TWO_AT_A_TIME) tests/core tests/algorithms tests/test_architecture.py \
	  $(EACH_KIND:%='tests/training/test_loop.py::test_packing_does_not_matter[%]') tests/comparison/test_planning.py

test: $(VENV)/.test
	$(PYTEST) $(TWO_AT_A_TIME) -m 'not processes' --ignore=tests/hostile --ignore=tests/slurm \
	  --ignore=tests/rollout/test_vllm_real.py --ignore=tests/performance/test_guard.py

test-processes: $(VENV)/.test
	$(PYTEST) $(TWO_AT_A_TIME) -m processes --ignore=tests/slurm

test-hostile: $(VENV)/.test
	$(PYTEST) $(TWO_AT_A_TIME) tests/hostile

test-real: $(VENV)/.test
	$(PYTEST) -m real_data tests/benchmarks tests/data tests/models tests/rollout tests/training

# On a real Slurm of virtual nodes, beside any other on this machine. Needs root, and installs Debian's packages.
test-slurm: export ALIGNLAB_SLURM = /tmp/alignlab-test-slurm
test-slurm: export ALIGNLAB_SLURM_CONF = $(ALIGNLAB_SLURM)/etc
test-slurm: export ALIGNLAB_SLURM_PORT = 21817
test-slurm: export SLURM_CONF = $(ALIGNLAB_SLURM_CONF)/slurm.conf
test-slurm: $(VENV)/.test
	slurm/local-cluster.sh start
	$(PYTEST) tests/slurm; status=$$?; slurm/local-cluster.sh wipe; exit $$status

fuzz: export ALIGNLAB_FUZZ ?= 10
fuzz: $(VENV)/.test
	$(PYTEST) --timeout=3600 tests/hostile/test_fuzz.py

guard: $(VENV)/.test
	$(PYTEST) tests/performance/test_guard.py

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
	$(PYTEST) -m component tests/rollout/test_vllm_real.py

vllm: .venv-vllm/.install

# Without dependencies, which are all listed: its package asks for a build of torch, and for three others, that a
# package index need not have and that text does not need.
.venv-vllm/.install: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps --requirement constraints-vllm.txt
	touch $@

DEVICE ?= cuda
check-gpu: $(VENV)/.test
	$(BIN)/python experiments/gpu/check.py --device $(DEVICE)

# The newest torch, whose package for Linux on x86-64 is a CUDA build, beside the other pinned packages.
CUDA_VENV := .venv-cuda
CUDA_TORCH := torch==2.14.1
fake-gpu: $(CUDA_VENV)/.made
	PYTHONPATH=. $(CUDA_VENV)/bin/python experiments/gpu/fake.py
	PYTHONPATH=. $(CUDA_VENV)/bin/python experiments/gpu/flex_kernels.py

$(CUDA_VENV)/.made: constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -v '^torch==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/pip install --quiet $(CUDA_TORCH)
	$(CUDA_VENV)/bin/pip install --quiet --no-deps --requirement $(CUDA_VENV)/constraints.txt
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

newer: $(VENV)/.test
	$(BIN)/python .ci/newer.py

# The package as users get it, by the demo's first minute: a reward model, two algorithms, one seed, a few steps.
LEFT_OUT := models.ranker models.prm $(addprefix algorithms.,rejection_sampling expert_iteration rrhf slic ppo)
FIRST_MINUTE := comparison.seeds=[0] comparison.budget.steps=5 comparison.pairs.rounds=2 comparison.best_of=null \
  benchmark.demonstrations=256 $(LEFT_OUT:%='~comparison.%')
wheel: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build
	set -e; unset PYTHONPATH; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv $$folder/.venv; \
	$$folder/.venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl; \
	cd $$folder; .venv/bin/alignlab --help; .venv/bin/alignlab compare experiment=demo out=demo $(FIRST_MINUTE); \
	test -s demo/leaderboard.json; test -s demo/report.html

# Without --no-compile an installation takes twice as long: what is imported is compiled then, and kept.
install: $(VENV)/.install

$(VENV)/.install: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("alignlab needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.install
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) $(PPO_VENV) $(CUDA_VENV) .venv-vllm build dist *.egg-info
