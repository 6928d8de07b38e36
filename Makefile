# `make demo`, `make test`, and `make ladder` for device code without a GPU. Each makes .venv when it is absent and
# installs pinned versions.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
RUN := OMP_WAIT_POLICY=passive $(BIN)/python

.PHONY: demo test ladder lint bench clean

demo: .venv/installed
	$(RUN) -m bdengine.cli demo

test: lint
	$(RUN) -m pytest -m "not slow and not ladder"

# docs/gpu-without-a-gpu.md says what each rung proves.
ladder: .venv/installed
	$(RUN) -m pytest tests/triton tests/csrc tests/cuda $(wildcard tests/benchmarks/test_resources*.py) tests/ptx tests/mutants

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
