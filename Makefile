# The two commands: `make demo` and `make test`. Each makes .venv when it is absent and installs pinned versions.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
RUN := OMP_WAIT_POLICY=passive $(BIN)/python

.PHONY: demo test lint bench clean

demo: .venv/installed
	$(RUN) -m bdengine.cli demo

test: lint
	$(RUN) -m pytest -m "not slow and not ladder"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks.run

.venv/requirements: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed: .venv/requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info bdkernels/*.so
