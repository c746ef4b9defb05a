# make repro: from text to model. make test: run the tests. Both create .venv first.
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# DVC asks for the user's name; a container may run under a number that has none
export LOGNAME := $(or $(LOGNAME),$(USER),$(shell id -un 2> /dev/null || id -u))
# git sets these for its hooks; they may name another repository
unexport GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_PREFIX

.PHONY: setup _place repro report heal preset experiments sweep ablations plots test test-torch lint lock check bench bench-gpu lm-eval smoke certify soak
.DELETE_ON_ERROR:

setup: .venv/.ready .dvc/plots-page.html

# .ready holds the path of .venv that its programs have in their first lines (#!)
_place:
	@[ ! -s .venv/.ready ] || [ "$$(cat .venv/.ready)" = "$$(cd .venv && pwd -P)" ] || \
		{ echo "error: .venv was made as $$(cat .venv/.ready) and then moved or copied, so its programs do not start; run: rm -r .venv && make setup" >&2; exit 3; }

.venv/.ready: requirements.txt constraints.txt | _place
	@[ -x .venv/bin/python ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 3; }
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: .venv has a Python older than 3.11; run: rm -r .venv && make setup" >&2; exit 3; }
	@.venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null 2>&1 || \
		{ echo "error: .venv has no pip and ensurepip cannot install it; run: rm -r .venv && make setup" >&2; exit 3; }
	$(PIP_INSTALL) -r requirements.txt
	@(cd .venv && pwd -P) > $@

# tests and linters need more packages than a run
.venv/.ready-dev: requirements-dev.txt .venv/.ready
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

# the page that `dvc plots` fills: it contains Vega, which DVC's own page loads from the network
.dvc/plots-page.html: .venv/.ready tools/report/plots.py tools/report/plots.html tools/report/vega.py
	@python -m tools.report.plots --template
	@python -m tools.heal
	@dvc config --local plots.html_template plots-page.html

repro: setup heal
	@python -m stages.check
	@dvc repro
	@echo
	@cat metrics/summary.md
	@python -m tools.report

# write all results of a run to one page, metrics/report.html; beside another run: make report REV=main
report: setup
	@python -m tools.report $(if $(REV),--compare $(REV))

# draw every curve as SVG and on one page; several runs in one chart: make plots REV="workspace NAME"
plots: REV ?= workspace
plots: setup
	@python -m tools.report.plots $(REV)

# repair what a killed DVC left torn; then every dvc command works again
heal: setup
	@python -m tools.heal

# write a preset to params.yaml: make preset NAME=smoke; NAME=default restores the shipped settings
preset: setup
	@python -m tools.preset $(NAME)

# list experiments below their baseline, with results and the settings that differ; of another commit: REV=main~1
experiments: setup
	@python -m tools.experiments $(REV)

# run a grid of settings and seeds as DVC experiments, one after the other, and compare them:
#   make sweep SET='train.lr=3e-3,6e-3 train.weight_decay=0,0.1' SEEDS=1,2,3,4,5
sweep: SET ?= train.lr=3e-3,6e-3,1.2e-2
sweep: SEEDS ?= 1,2,3
sweep: setup heal
	@python -m tools.experiments.sweep $(SET) train.seed=$(SEEDS)

# train without each part of the model, over seeds, and write docs/ABLATIONS.md: make ablations SEEDS=1,2,3
ablations: SEEDS ?= 1,2,3,4,5
ablations: setup heal
	@python -m tools.experiments.ablations --seeds $(SEEDS)

test: setup .venv/.ready-dev
	@pytest

# run the tests that use torch under another version of it, in an environment with only what training needs:
#   make test-torch VERSION=2.11.0 [PYTHON=python3.12]
# Without a GPU, LM_TEST_DEVICE=cpu runs the tests of tests/test_gpu.py on the CPU
VERSION ?= 2.11.0
TORCH_TESTS = acceptance ahead benchmarks checkpoint decoder evaluate excerpt functional generate gpu history inputs \
	launch model optim parallel plan presets processes resume rng run sample schedule sharded stages train
test-torch: .venv-torch-$(VERSION)/.ready
	@$(<D)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		export LM_TEST_DEVICE="$${LM_TEST_DEVICE:-cpu}"; \
		$(<D)/bin/python -m pytest -o addopts='-p no:anyio --strict-markers -q' -m 'not soak' $(TORCH_TESTS:%=tests/test_%.py)

.venv-torch-$(VERSION)/.ready: requirements-train.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(VERSION) -r requirements-train.txt
	@touch $@

lint: setup .venv/.ready-dev
	@ruff format --check .
	@ruff check .
	@mypy

# check that dvc.lock belongs to this code and these settings; needs no data
lock: setup
	@python -m tools.lock

check: lint lock test

# measure training speed beside nanoGPT, Hugging Face and the machine's limit: make bench NANOGPT=/path/to/clone
bench: export NANOGPT ?= nanoGPT
bench: setup
	@python -m benchmarks.throughput

# measure all that is promised on a GPU, in eight minutes: equal bits, speed and memory beside nanoGPT, MFU.
# Uses .venv if there is one, else the python in PATH. Try it on any machine: make bench-gpu DEVICE=cpu TINY=1
bench-gpu: export NANOGPT ?= nanoGPT
bench-gpu: DEVICE ?= cuda
bench-gpu:
	@$$(command -v python || echo $(PYTHON)) -m benchmarks.gpu --device $(DEVICE) $(if $(TINY),--tiny) $(if $(OUT),--out $(OUT))

# evaluate the exported model in lm-evaluation-harness, which gets an environment of its own (1.8 GB)
lm-eval: setup .venv-lm-eval/.ready
	@python -m benchmarks.harness

.venv-lm-eval/.ready: requirements-lm-eval.txt constraints.txt
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lm-eval.txt -c constraints.txt
	@touch $@

# run a small real `dvc repro` in a fresh clone
smoke: setup
	@.ci/smoke

# run everything again in a fresh clone: it must give the committed dvc.lock, bit for bit
certify: setup
	@.ci/certify

# kill `dvc repro` at random moments and compare the final results: make soak SECONDS=1800
soak: SECONDS ?= 600
soak: setup .venv/.ready-dev
	@python -m tests.soak --seconds $(SECONDS)
