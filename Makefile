# Each target sets up what it needs in .venv. On a machine with an NVIDIA driver pip takes its own choice of
# torch; elsewhere constraints-cpu.txt names a release, and PIP_FLAGS can point pip at the CPU build:
#   make demo PIP_FLAGS="--extra-index-url URL"      (URL: PyTorch's index of CPU builds, see README)

PYTHON ?= python3
PIP_FLAGS ?=
CONSTRAINTS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) $(CONSTRAINTS)
TESTS ?= tests

# Threads that wait by spinning slow every other process down, and the tests start some.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-long test-service lint docs format clean

demo: .venv/.run
	$(BIN)/wuerstchen generate --grid --out demo.png \
	  "a 3D render of a purple camel on a blue background" \
	  "a flat illustration of a red apple" \
	  "a black glyph of a tree on a yellow background" \
	  "a noto emoji of a cat" \
	  "a twemoji of a rocket on a black background" \
	  "a 3D render of a green car" \
	  "a flat illustration of a pizza on a pink background" \
	  "a noto emoji of a smiling face" \
	  "a 3D render of an umbrella on an orange background"

# A worker per core: torch's own threads would compete with the other workers.
test test-long test-service: export OMP_NUM_THREADS ?= 1

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile $(TESTS)

# The long tests: whole runs with several processes and kills at every place, notebooks, and those of test-service.
test-long: .venv/.dev
	$(BIN)/python -m pytest -m "slow and not gpu" -n auto --maxprocesses 4 --dist loadfile $(TESTS)

# Those of the service alone: 2,000 made-up requests.
test-service: .venv/.dev
	$(BIN)/python -m pytest -m "slow and not gpu" tests/serve

lint: .venv/.dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none src

# build/docs/site/index.html: the guides and the API reference. A link that leads nowhere is an error.
docs: .venv/.docs
	$(BIN)/python scripts/stage_docs.py
	$(BIN)/zensical build --strict

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .cache build/docs demo.png

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("wuerstchen needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# torch comes first: what comes after is content with the one that is there.
.venv/.run: pyproject.toml constraints-cpu.txt | .venv/bin/python
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

.venv/.dev: .venv/.run
	$(INSTALL) -e ".[train,dev]"
	touch $@

.venv/.docs: .venv/.run
	$(INSTALL) -e ".[docs]"
	touch $@
