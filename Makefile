# `make demo` and `make test` are all a fresh machine needs: each makes .venv and installs on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed only where the environment has no torch.
TORCH ?= torch==2.13.0
NATIVE := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint format clean

demo: $(VENV)/installed
	$(BIN)/bitkernels demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter csrc/%,$(NATIVE))

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(NATIVE))

$(VENV)/installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[test]"
	touch $@

clean:
	rm -rf build bitkernels/*.so $(VENV)
