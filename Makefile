# Two commands matter: `make demo` (fresh machine to a trained tiny model) and `make test`.
# Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
WHEEL_VENV := .venv-wheel

.PHONY: install demo test nightly fuzz check check-wheel clean

install: $(VENV)/installed

# torch goes first and alone, and a constraint keeps it: a package that pulls its own torch would fetch gigabytes.
# Without a GPU the small CPU build is taken where the package index has it.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null; then \
	    $(BIN)/pip install --quiet torch==$(TORCH); \
	else \
	    $(BIN)/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH); \
	fi
	$(BIN)/pip freeze | grep '^torch==' > $(VENV)/constraints.txt || echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: check
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# All of it: the slow tests too, properties on new cases each time, and a hundred thousand damaged files, of which
# `make test` tries 2,000.
nightly: check
	DFT_HYPOTHESIS=nightly $(BIN)/pytest -n 2 --dist worksteal
	$(MAKE) fuzz

fuzz: install
	DFT_FUZZ_CASES=100000 $(BIN)/pytest -n 2 tests/prep/test_fuzz.py tests/external/test_fuzz_shared.py

# The base install alone: no torch, no transformers, no datasets.
check-wheel:
	rm -rf dist $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(WHEEL_VENV)/bin/pip install --quiet dist/*.whl
	$(WHEEL_VENV)/bin/python tests/check_wheel.py

clean:
	rm -rf $(VENV) $(WHEEL_VENV) dist demo_run
