# make quickstart   one iteration on this machine, with a real model
# make test         the tests of every change
# make test-all     all tests, including slow ones and clean installations (as root)
# make check        format and fix files, then check types
# make lint         the same checks, changing nothing
# make docs         the documentation as a site, in site/
#
# make install-driver | install-worker | install-generation   a locked environment in VENV, as in the images
# make lock         update all locks to the newest versions that pyproject.toml allows
# make test-latest  the unit tests with the newest versions, without changing a lock
#
# PYTHON=python3.12 selects the interpreter, TORCH=cpu or TORCH=cuda the build of torch (see requirements/README.md).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
TORCH_VERSION := 2.13.0
UV_VERSION := 0.13.9
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED = $(PIP) --no-deps --require-hashes --requirement

define NEW_VENV
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Montessori needs Python 3.11 or newer; make PYTHON=python3.x")'
$(PYTHON) -m venv $(BIN:/bin=)
endef

# pip finds the CPU build only in a mirror or wheel folder that has it; otherwise uv gets it from PyTorch's index.
define INSTALL_TORCH
@$(BIN)/python -c 'from importlib.metadata import version; version, _, build = version("torch").partition("+"); assert version == "$(TORCH_VERSION)" and (build, "$(TORCH)") != ("cpu", "cuda")' 2>/dev/null \
 || if [ $(TORCH) = cuda ]; then $(BIN)/python -m pip uninstall --quiet --yes torch; $(PIP) torch==$(TORCH_VERSION); \
 else $(PIP) --no-deps torch==$(TORCH_VERSION)+cpu 2>/dev/null \
  || { $(PIP) uv==$(UV_VERSION) && $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend cpu torch==$(TORCH_VERSION); }; fi
endef

.PHONY: quickstart test test-all test-latest lint check docs install-driver install-worker install-generation lock clean

quickstart: $(VENV)/.local-$(TORCH)
	$(BIN)/montessori model fetch smollm2-135m
	$(BIN)/montessori run quickstart

# Tests are distributed by file, because tests of a file share servers and models. (xdist 3.8 ignores groups with pytest 9.2.)
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --continue-interrupted

test: lint
	$(BIN)/python $(PYTEST) --durations 25

test-all: lint $(VENV)-vllm/.ready
	$(BIN)/python $(PYTEST) --all --durations 50
	tests/system/install/clean_install.sh

test-latest: BIN = $(VENV)-latest/bin
test-latest:
	$(NEW_VENV)
	$(INSTALL_TORCH)
	$(PIP) --upgrade --upgrade-strategy eager --editable '.[dev]' torch==$(TORCH_VERSION)
	$(BIN)/python -m pytest --numprocesses 2 tests/unit --deselect tests/unit/test_versions.py

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.local-$(TORCH): requirements/local.lock pyproject.toml Makefile
	@echo "Installing the locked environment into $(VENV) (2 GB on disk, $(TORCH) build of torch)"
	$(NEW_VENV)
	$(LOCKED) $<
	$(INSTALL_TORCH)
	$(PIP) --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.local-*
	touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.local-$(TORCH)
	$(LOCKED) $<
	touch $@

# vLLM pins other versions of torch and fastapi, so it has a separate environment, as on a cluster.
$(VENV)-vllm/.ready: BIN = $(@D)/bin
$(VENV)-vllm/.ready: requirements/generation-cpu.lock Makefile
	$(NEW_VENV)
	$(LOCKED) $<
	$(INSTALL_TORCH)
	touch $@

# Building the documentation does not need torch.
$(VENV)/.docs: requirements/dev.lock pyproject.toml
	$(NEW_VENV)
	$(LOCKED) $<
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Install Montessori last and without dependencies, so that only locked packages are installed.
install-driver install-worker install-generation: install-%: requirements/%.lock
	$(NEW_VENV)
	$(LOCKED) $<
	$(PIP) --no-deps .

UV := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --custom-compile-command 'make lock'
NO_CUDA := --config-file requirements/no-cuda.toml --no-emit-package torch --constraint $(VENV)/torch.txt

lock: $(VENV)/.dev
	$(PIP) uv==$(UV_VERSION)
	echo torch==$(TORCH_VERSION) >$(VENV)/torch.txt
	$(UV) $(NO_CUDA) pyproject.toml --extra dev --output-file requirements/dev.lock
	$(UV) $(NO_CUDA) pyproject.toml --extra local --constraint requirements/dev.lock --output-file requirements/local.lock
	$(UV) pyproject.toml --constraint requirements/dev.lock --output-file requirements/driver.lock
	$(UV) pyproject.toml --constraint requirements/dev.lock --constraint $(VENV)/torch.txt --extra benchmarks --output-file requirements/worker.lock
	$(UV) $(NO_CUDA) requirements/generation-cpu.in --output-file requirements/generation-cpu.lock
	$(UV) requirements/generation.in --output-file requirements/generation.lock

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-latest build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
