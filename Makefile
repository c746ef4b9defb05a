# make repro: text to model. make test: the tests. Both build .venv first.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup repro test lint check bench smoke certify
.DELETE_ON_ERROR:

setup: .venv/.ready

.venv/.ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 3; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

repro: setup
	@dvc repro
	@echo
	@cat metrics/summary.md

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
