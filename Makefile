# Two commands matter: `make demo` (fresh machine to a trained tiny model) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test check check-wheel clean

install: $(VENV)/installed
