# One environment for everything: .venv with Python 3.12 and the exact versions of constraints.txt.
#
#   make serve ARGS="--port 50077"      installs what the server needs, then starts it
#   make test ARGS="-k scheduler"       installs the development packages too, then runs the tests
#   make serve EXTRAS=gpu ARGS="--gpu"  an accelerator's packages as well: gpu, tpu or aot
#
# Packages are only ever added to .venv. Name the EXTRAS again after constraints.txt has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ARGS ?=
EXTRAS ?=

VENV := .venv
PYTHON := $(VENV)/bin/python
# uv from the PATH if there is one that runs, else our own, which touches no other Python.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .venv-uv/bin/uv)
# Progress bars where somebody watches, one line a phase elsewhere.
QUIET := $(shell test -t 2 || echo --quiet)

comma := ,
RUNTIME := $(VENV)/.runtime$(if $(EXTRAS),-$(EXTRAS))
DEVELOPMENT := $(VENV)/.development$(if $(EXTRAS),-$(EXTRAS))
PACKAGING := pyproject.toml setup.cfg constraints.txt
define install
	@echo "setup: packages of jaxinfer$(if $(1),[$(1)]), versions from constraints.txt"
	@$(UV) pip install $(QUIET) --python $(PYTHON) --constraints constraints.txt \
	    --editable '.$(if $(1),[$(1)])'
	@touch $@
endef

.PHONY: help setup serve test lint proto lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1  \2/p' Makefile

setup: $(DEVELOPMENT) ## make .venv with all packages, those for development included
	@echo "setup: .venv is ready"

serve: $(RUNTIME) ## start the server; ARGS are its flags
	@exec $(PYTHON) scripts/serve.py $(ARGS)

test: $(DEVELOPMENT) ## run the tests; ARGS are pytest's
	@$(PYTHON) -m pytest $(ARGS)

lint: $(DEVELOPMENT) ## ruff, pyright, import contracts, stubs up to date
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/pyright
	@$(VENV)/bin/lint-imports
	@$(PYTHON) scripts/build_proto.py --check

proto: $(DEVELOPMENT) ## regenerate the committed protobuf stubs
	@$(PYTHON) scripts/build_proto.py

# All extras, all platforms; prints no index address. Review the difference before committing it.
lock: | $(UV) ## resolve constraints.txt anew, to the newest versions allowed
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.12 --all-extras \
	    --no-annotate --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml

clean: ## remove .venv and everything made by tools
	@rm -rf $(VENV) .venv-uv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis \
	    .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): $(PACKAGING) | $(PYTHON)
	$(call install,$(EXTRAS))

$(DEVELOPMENT): $(PACKAGING) | $(PYTHON)
	$(call install,dev$(if $(EXTRAS),$(comma)$(EXTRAS)))

# With pip in it (--seed): models are fetched by uv or pip, and uv may be on nobody's PATH.
$(PYTHON): | $(UV)
	@echo "setup: Python $$(cat .python-version) in $(VENV)"
	@$(UV) venv --quiet --clear --seed --python "$$(cat .python-version)" $(VENV)

# A private environment also works where pip may not install anything (PEP 668) or is missing;
# without the venv module, pip can still unpack uv into a folder of ours.
.venv-uv/bin/uv:
	@echo "setup: uv in .venv-uv"
	@rm -rf .venv-uv
	@if python3 -m venv .venv-uv >/dev/null 2>&1; then \
	    .venv-uv/bin/python -m pip install --quiet uv; \
	elif ! python3 -m pip install --quiet --target .venv-uv uv; then \
	    rm -rf .venv-uv; \
	    echo "setup: no uv on the PATH, and python3 has neither venv nor pip to get it:" \
	        "install uv, then run make again" >&2; \
	    exit 1; \
	fi
