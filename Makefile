# Plain make (3.81 and later) and a POSIX shell; everything else lives in .venv, which is made from the pinned requirements.
.PHONY: help up test soak bench images lint docs
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip install --disable-pip-version-check
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml coordinator/pyproject.toml)
ENGINE := docker
ARGS :=
# Test files run side by side, three at a time: most of them wait for something, so that is right for two cores too.
JOBS := 3

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

up: .venv/.made ## set-up, then a coordinator with its dashboard and a local worker (options of `rma up` in ARGS)
	@exec .venv/bin/rma up $(ARGS)

test: lint ## set-up, linters, then every test this machine can run (options of pytest in ARGS, JOBS=0: one by one)
	$(PYTHON) -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder $(ARGS)

soak: .venv/.made-dev ## the tests that take minutes to hours: RMA_SOAK_S seconds each; RMA_SEED replays what one printed
	$(PYTHON) -m pytest -m soak --timeout=7200 -s $(ARGS)

bench: .venv/.made-dev ## every measurement in bench/
	@set -e; for script in bench/[!_]*.py; do echo "== $$script"; $(PYTHON) -m "bench.$$(basename "$$script" .py)" $(ARGS); done

images: .venv/.made ## container images of containers/* (ENGINE=docker|podman, BASE=image, PUSH=registry/prefix)
	$(PYTHON) containers/build.py --engine "$(ENGINE)" --base "$(BASE)" --push "$(PUSH)" $(ARGS)

lint: .venv/.made-dev ## ruff and mypy, the latter for macOS and Windows too
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy --platform darwin --cache-dir .mypy_cache/darwin rma_core
	$(PYTHON) -m mypy --platform win32 --cache-dir .mypy_cache/win32 rma_core

docs: .venv/.made-dev ## write the reference from the code, then run every snippet of README.md and docs/
	$(PYTHON) docs/generate.py
	$(PYTHON) -m pytest tests/test_docs.py $(ARGS)

.venv/.made: requirements.txt $(PROJECTS) | $(PYTHON)
	$(PIP) -r requirements.txt
	@touch $@

.venv/.made-dev: requirements.txt requirements-dev.txt $(PROJECTS) $(wildcard containers/*/pyproject.toml) | $(PYTHON)
	$(PIP) -r requirements-dev.txt
	@touch .venv/.made $@

# A Python without ensurepip (Debian's, when python3-venv is missing) would make a .venv without pip: pass it over.
$(PYTHON):
	@for python in python3.13 python3.12 python3.11 python3; do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    echo "making .venv with $$python"; "$$python" -m venv --clear .venv && exit; rm -rf .venv; exit 1; \
	done; \
	echo "RMA needs Python 3.11 or newer with its venv module, and finds none here. Install it, for example with" >&2; \
	echo "'brew install python@3.13' (macOS) or 'apt install python3.11 python3-venv' (Debian, Ubuntu)." >&2; exit 1
