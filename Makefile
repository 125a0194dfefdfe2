# Everything a person or CI runs. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
# Processes of `make test`
JOBS ?= 2
# Of `make bench` and `make proof`
DEVICE ?= cpu
PLANS ?= demo bccd-scratch bccd-public few-labels voc320 ablation
# More options for the training of the demo's weights, e.g. DEMO_ARGS='--device 0'
DEMO_ARGS ?=

RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help setup dev format lint types test-fast test demo bench proof demo-weights readme reliability clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

setup: $(INSTALLED) ## make .venv and install requirements.txt; PYTHON=python3.12 picks the Python

dev: $(INSTALLED_DEV) ## setup, and what tests and linters need

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make setup: there is no '$(PYTHON)'; name a Python from 3.10 to 3.13: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "make setup: needs Python 3.10 to 3.13 and \"$(PYTHON)\" is %d.%d; name another: make setup PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make setup: this Python cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# pip asks the network only for what is missing, so these work offline once all is there.
$(INSTALLED): requirements.txt constraints.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements.txt
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	$(INSTALL) -r requirements-dev.txt
	@touch $@

format: $(INSTALLED_DEV) ## fix formatting and import order
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

lint: $(INSTALLED_DEV) ## style, limits, layout and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

types: $(INSTALLED_DEV) ## mypy, strict
	$(VENV)/bin/mypy

# As many processes as cores compute, each with one thread: with more they wait for one another.
test test-fast: export OMP_NUM_THREADS = 1

test-fast: $(INSTALLED_DEV) ## the tests that take no time
	$(RUN) -m pytest -m "not slow" $(PYTEST_ARGS)

test: $(INSTALLED_DEV) ## all tests, linters and types among them
	$(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

demo: $(INSTALLED) ## distil a small student on a generated set, score it, draw boxes (minutes)
	$(RUN) -m experiments.demo

bench: $(INSTALLED) ## time steps, loader, evaluation, start and memory on this machine; DEVICE=0 for a GPU (minutes)
	$(RUN) -m benchmarks.step --device $(DEVICE)
	$(RUN) -m benchmarks.memory --device $(DEVICE)
	$(RUN) -m benchmarks.loader
	$(RUN) -m benchmarks.evaluation --device $(DEVICE)
	$(RUN) -m benchmarks.detection --device $(DEVICE)
	$(RUN) -m utils.datasets.demo --out datasets/demo
	$(RUN) -m benchmarks.startup

proof: $(INSTALLED) ## repeat the experiments of docs/experiments.md that are not recorded yet (hours; DEVICE=0 for a GPU)
	$(RUN) -m experiments.run $(PLANS) --device $(DEVICE)

# The teacher sees more pictures of the same kind than its student: the same generator, further on.
# The student's start is trained plainly, on the demo set itself.
DEMO_TRAINING := --data data/demo.yaml --weights '' --img 320 --batch-size 16 --optimizer AdamW \
	--hyp data/hyp.demo.yaml --cache ram --seed 0 --project runs/demo-weights --exist-ok

demo-weights: $(INSTALLED) ## make weights/demo_teacher.pt and demo_student.pt again (40 minutes on two cores)
	mkdir -p weights
	$(RUN) -m utils.datasets.demo --out datasets/demo-teacher --train 1600
	$(RUN) train.py $(DEMO_TRAINING) --data-dir datasets/demo-teacher --cfg models/demo-teacher.yaml --epochs 24 \
		--name teacher $(DEMO_ARGS)
	cp runs/demo-weights/teacher/weights/best.pt weights/demo_teacher.pt
	$(RUN) -m utils.datasets.demo --out datasets/demo
	$(RUN) train.py $(DEMO_TRAINING) --cfg models/demo-student.yaml --epochs 40 --name student $(DEMO_ARGS)
	cp runs/demo-weights/student/weights/best.pt weights/demo_student.pt

readme: $(INSTALLED) ## write the option tables of README.md anew
	$(RUN) -m utils.config.readme README.md

reliability: $(INSTALLED_DEV) ## write docs/reliability.md anew from the tests
	$(RUN) -m tests.reliability

clean: ## remove the caches of Python and of the tools; runs, data and weights stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
