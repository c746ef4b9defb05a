# make repro: text to model. make test: the tests. Both build .venv first.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup repro heal sweep test lint check bench smoke certify soak
.DELETE_ON_ERROR:

setup: .venv/.ready

.venv/.ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 3; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

repro: setup heal
	@dvc repro
	@echo
	@cat metrics/summary.md

# put right what a killed DVC left torn; then any dvc command goes on
heal: setup
	@python -m stages.heal

# a grid of settings and seeds as DVC experiments, one after the other, and what they show:
#   make sweep SET='train.lr=3e-3,6e-3 train.weight_decay=0,0.1' SEEDS=1,2,3,4,5
sweep: SET ?= train.lr=3e-3,6e-3,1.2e-2
sweep: SEEDS ?= 1,2,3
sweep: setup heal
	@python -m stages.sweep $(SET) train.seed=$(SEEDS)

test: setup
	@pytest

lint: setup
	@ruff format --check .
	@ruff check .
	@mypy

check: lint test

# ours beside a plain PyTorch loop, one run
bench: setup
	@python -m benchmarks.throughput

# a small real `dvc repro` in a fresh clone
smoke: setup
	@.ci/smoke

# everything again in a fresh clone must give the committed dvc.lock, bit for bit
certify: setup
	@.ci/certify

# kill `dvc repro` at random moments and compare what it ends in: make soak SECONDS=1800
soak: SECONDS ?= 600
soak: setup
	@python -m tests.soak --seconds $(SECONDS)
