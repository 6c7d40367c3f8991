# Every target sets the project up first where that is needed: `make test` in a fresh clone is enough.
PYTHON ?= python3
# What to hand on to the program that a target runs, e.g. `make test ARGS="-k schedule"`.
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
CODE := setup.py sparse_compile passes kernels tests $(wildcard docs/_site examples benchmarks)

.PHONY: help setup demo test test-all test-oldest lint typecheck support docs bench kernels-report dist clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 18

setup: $(STAMP) ## make .venv with the exact versions of requirements.lock and install the project into it, editable

# torch goes first: nothing else may choose its build.
$(STAMP): pyproject.toml setup.py requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(STAMP) ## fine-tune a small model dense and sparse, and compare (a few minutes, no download)
	$(BIN)/python examples/finetune.py $(ARGS)

test: $(STAMP) ## run the tests that a change needs, two at a time (at most 8 minutes on two cores)
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(STAMP) ## run all tests: the sweeps over models, examples and long compilations as well
	$(BIN)/pytest --numprocesses 2 --dist loadfile $(ARGS)

# The oldest versions that are admitted, in an environment of their own. PyPI serves the old torch for Linux as a CUDA
# build alone (gigabytes); the index of PyTorch has it for CPUs: name it in PIP_EXTRA_INDEX_URL. OLDEST_TORCH picks
# another build (`2.11.0` where CUDA is wanted, or on macOS).
OLDEST := .venv-oldest
OLDEST_TORCH ?= 2.11.0+cpu
OLDEST_STAMP := $(OLDEST)/.set-up-$(OLDEST_TORCH)

test-oldest: $(OLDEST_STAMP) ## run the fast tests on torch 2.11 and transformers 5.17, the oldest that are admitted
	$(OLDEST)/bin/pytest --numprocesses 2 --dist loadfile -m "not slow" $(ARGS)

$(OLDEST_STAMP): pyproject.toml setup.py requirements-oldest.lock
	$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet "torch==$(OLDEST_TORCH)" || { \
		echo "test-oldest: no torch $(OLDEST_TORCH) to be had here (pip's message is above). Set PIP_EXTRA_INDEX_URL to" \
			"PyTorch's index of CPU builds, or OLDEST_TORCH to a version that your index serves." >&2; exit 1; }
	$(OLDEST)/bin/python -m pip install --quiet --requirement requirements-oldest.lock
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(MAKE) --no-print-directory typecheck

# mypy maps a file to a module by its path and knows no package-dir, so it reads the packages through links laid out
# as they are imported. Without this it would take sparse_compile.passes for a missing module and check against Any.
TYPING := build/typing
typecheck: $(STAMP)
	@rm -rf $(TYPING) && mkdir -p $(TYPING)/sparse_compile
	@ln -s $(CURDIR)/sparse_compile/* $(CURDIR)/passes $(CURDIR)/kernels $(TYPING)/sparse_compile
	@echo mypy --package sparse_compile
	@cd $(TYPING) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		--python-executable $(CURDIR)/$(BIN)/python --package sparse_compile \
		| sed -E 's#^sparse_compile/(passes|kernels)/#\1/#'

support: $(STAMP) ## write docs/support.md from the tests
	$(BIN)/python tests/support/support_table.py

# The tools of the site are in an environment of their own, so that `make setup` stays lean. The package is not in it:
# the reference is read from the sources.
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.set-up

docs: $(DOCS_STAMP) ## build the documentation as a site into build/site; a warning, such as a broken link, is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict $(ARGS)

$(DOCS_STAMP): requirements-docs.lock
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement requirements-docs.lock
	touch $@

bench: $(STAMP) ## time a training step against eager PEFT and plain Inductor
	$(BIN)/python benchmarks/cpu.py --quick $(ARGS)

kernels-report: $(STAMP) ## compile the generated GPU kernels and print registers, shared memory and spills
	$(BIN)/python benchmarks/kernels_report.py $(ARGS)

# Tools of a release are no part of .venv: what they need would fix versions of what is tested.
RELEASE := build/release
RELEASE_STAMP := $(RELEASE)/.set-up

dist: $(RELEASE_STAMP) ## build the sdist and the wheel into dist/, and check them and CITATION.cff
	rm -rf dist
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	$(RELEASE)/bin/cffconvert --validate

$(RELEASE_STAMP): requirements-release.lock
	$(PYTHON) -m venv --clear $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --requirement requirements-release.lock
	touch $@

clean: ## remove build products and caches (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
