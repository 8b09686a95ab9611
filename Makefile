# make demo   set up everything and split the two pictures that ship with the repository
# make test   set up everything and run lint, type check and tests
# make setup  only the environment in .venv
# make slow   the tests that take longer; with an NVIDIA card also: .venv/bin/pytest -m gpu
# make clean  remove .venv and what was built
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Without an NVIDIA driver the CPU build of torch is asked for: the default wheel on Linux carries
# gigabytes of CUDA libraries.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo --extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup demo test slow lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH_INDEX) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/unziplora demo --out runs/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build dist
