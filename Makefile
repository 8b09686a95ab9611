# make demo     set up everything and split the two pictures that ship with the repository
# make studio   set up everything and open the web page
# make test     set up everything and run lint, type check and the quick tests
# make test-slow     the tests that take more than three seconds each
# make test-studio   the tests of the web page, in a browser
# make setup    only the environment in .venv, without what the tests need
# make torture  half an hour of kills, damaged inputs, flipped bits and full disks (docs/reliability.md)
# make gpu      the tests that need an NVIDIA card
# make clean    remove .venv and what was built
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet -c constraints.txt

# Without an NVIDIA driver the CPU build of torch is asked for: the default wheel on Linux carries
# gigabytes of CUDA libraries.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo --extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup tools demo studio test test-slow test-studio torture gpu lint clean

setup: $(VENV)/.ready

tools: $(VENV)/.tools

# Most of torch and transformers is never imported. Compiling what is, by importing it, takes a minute less than all.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --retries 1 $(TORCH_INDEX) torch
	$(PIP) --no-compile -e .
	PYTHONDONTWRITEBYTECODE= TRANSFORMERS_VERBOSITY=error $(BIN)/python -c 'import unziplora.methods.unziplora.demo'
	touch $@

$(VENV)/.tools: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/unziplora demo --out runs/demo

studio: setup
	$(PIP) -e '.[studio]'
	$(BIN)/unziplora studio

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: tools
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# A browser on the PATH is used; otherwise Debian's Chromium is installed where that is permitted. What fails in the
# browser is tried once more: on a busy machine a page may answer too late.
test-studio: tools
	$(PIP) -e '.[studio]'
	@command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; \
	} || { echo 'make test-studio needs a browser: install Chromium or Chrome' >&2; exit 1; }
	$(BIN)/python -m pytest tests/studio -m 'not browser and not torture and not gpu'
	$(BIN)/python -m pytest tests/studio -m browser || $(BIN)/python -m pytest tests/studio -m browser --last-failed

torture: tools
	$(BIN)/python -m reliability
	$(BIN)/python -m pytest -m torture

gpu: tools
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist
