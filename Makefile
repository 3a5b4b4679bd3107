# `make run` and `make test` need Python 3.11, pip and make; everything else they set up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
READY = $(VENV)/.ready

run: $(READY)  ## train HatLLM on MovieLens-100K beside models that only count and its untrained self
	$(VENV)/bin/python run_hatllm.py demo

test: $(READY)  ## the whole test suite
	$(VENV)/bin/python -m pytest

check: $(READY)  ## style, and types of the public face
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)  ## the tables of docs/performance.md, memory.md and scaling.md
	$(VENV)/bin/python benchmarks/training.py
	$(VENV)/bin/python benchmarks/speed.py
	$(VENV)/bin/python benchmarks/optimisations.py
	$(VENV)/bin/python benchmarks/machine.py
	$(VENV)/bin/python benchmarks/classic.py
	$(VENV)/bin/python benchmarks/loading.py
	$(VENV)/bin/python benchmarks/head.py
	$(VENV)/bin/python benchmarks/memory.py
	$(VENV)/bin/python benchmarks/scaling.py

$(READY): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $(READY)

clean:  ## remove the virtual environment and caches; runs/ and dataset/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.PHONY: run test check bench clean
