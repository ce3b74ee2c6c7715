# `make demo` and `make test` set up everything they need on a machine with Python 3.11 to 3.13, git and make.
# The tokenizer rustbpe is built if cargo of Rust 1.88 or newer is installed; without it everything but nanochat works.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.ready
READY := $(VENV)/.rustbpe
CARGO := $(firstword $(shell command -v cargo 2>/dev/null) $(wildcard $(HOME)/.cargo/bin/cargo))
RUST := $(if $(CARGO),$(shell PATH="$(dir $(CARGO)):$$PATH" $(CARGO) --version 2>/dev/null | awk '{split($$2, v, "."); print (v[1] > 1 || v[2] >= 88)}'))
ifneq ($(RUST),1)
CARGO :=
endif
CRATE := $(wildcard rustbpe/Cargo.* rustbpe/pyproject.toml rustbpe/rustbpe.pyi rustbpe/src/*.rs rustbpe/src/*/*.rs)
PILOT_DATA ?= $(abspath $(wildcard ../shared/data))
export PILOT_DATA

# Run cargo in the crate, if there is cargo.
cargo = $(if $(CARGO),cd rustbpe && PATH="$(dir $(CARGO)):$$PATH" PYO3_PYTHON="$(CURDIR)/$(BIN)/python" $(CARGO) $(1),@true)

.PHONY: help setup demo test test-slow fuzz lint format bench lock clean

help:
	@echo "make demo       train a GPT-2 on real text with two miners on this machine, and compare with plain training"
	@echo "make test       run the tests (minutes);  make test-slow  run the slow ones"
	@echo "make fuzz       feed over a million hostile inputs to the parsers of untrusted bytes (minutes)"
	@echo "make lint       run ruff and mypy;        make format     format the code with ruff"
	@echo "make bench      measure every figure of the docs, into bench/results.jsonl"
	@echo "make lock       compile requirements.txt from pyproject.toml"

setup: $(READY)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"make: {sys.executable} is Python {v[0]}.{v[1]}; Pilot needs 3.11 to 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	@echo "make: installing the packages of requirements.txt, 3 GB of them to download the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes --requirement requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(INSTALLED)

# If the build fails, the next make tries again.
$(READY): $(INSTALLED) $(CRATE)
ifdef CARGO
	@echo "make: building rustbpe, the tokenizer (a minute)"
	@rm -rf build/wheels
	@if PATH="$(dir $(CARGO)):$$PATH" $(BIN)/maturin build --quiet --release --locked --manifest-path rustbpe/Cargo.toml \
			--interpreter $(BIN)/python --out build/wheels \
		&& $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-index --reinstall build/wheels/*.whl; \
	then touch $(READY); else echo "make: rustbpe was not built; everything but nanochat works"; fi
else
	@echo "make: no cargo of 1.88 or newer, so nanochat's tokenizer is not built; install Rust from https://rustup.rs and run make setup"
endif

demo: $(READY)
	$(BIN)/python src/validator.py --config experiments/demo.json

test: $(READY)
	$(call cargo,test --quiet --locked)
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(call cargo,fmt --check)
	$(call cargo,clippy --quiet --locked --all-targets --all-features -- -D warnings)

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(call cargo,fmt)

bench: $(READY)
	$(BIN)/python -m bench

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra test --universal --generate-hashes --python-version 3.11 \
		--no-emit-index-url --quiet --output-file requirements.txt

clean:
	rm -rf $(VENV) build rustbpe/target src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
