# Two commands do all the set-up on a machine with Python 3.11 to 3.13, git and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PILOT_DATA ?= $(abspath $(wildcard ../shared/data))
export PILOT_DATA

.PHONY: help setup demo test test-slow fuzz lint format bench lock clean

help:
	@echo "make demo       two miners on this machine train a GPT-2 on real text, with the plain baseline beside it"
	@echo "make test       the tests (minutes);  make test-slow  the rest of them"
	@echo "make fuzz       over a million hostile inputs for the parsers of untrusted bytes (minutes)"
	@echo "make lint       ruff and mypy;        make format     let ruff lay the code out"
	@echo "make bench      every figure of the README, into bench/results.jsonl"
	@echo "make lock       compile requirements.txt from pyproject.toml"

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"make: {sys.executable} is Python {v[0]}.{v[1]}; Pilot needs 3.11 to 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.txt
	@$(BIN)/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "pilot.pth").write_text(str(pathlib.Path("src").resolve()) + "\n")'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python src/validator.py --config experiments/demo.json

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)
	$(BIN)/python -m bench

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra test --universal --generate-hashes --python-version 3.11 \
		--no-emit-index-url --quiet --output-file requirements.txt

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
