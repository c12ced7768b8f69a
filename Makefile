# demo: the whole way on the packaged sample. test: every test. check: format, lint, types, import contracts.
# Each installs into .venv what it needs, once per state of pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Benchmarks are run by hand, so a name that is gone would show late: that is looked for, and peers' types are not.
LOOSELY := --config-file= --cache-dir=.mypy_cache/benchmarks --ignore-missing-imports \
  --disable-error-code=arg-type --disable-error-code=call-overload --disable-error-code=operator
STATE := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test check

demo: .venv/.train-$(STATE)
	$(BIN)/edgetune demo

test: .venv/.test-$(STATE)
	$(BIN)/python -m pytest

check: .venv/.test-$(STATE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=benchmarks:tests:examples/web $(BIN)/mypy $(LOOSELY) benchmarks
	$(BIN)/lint-imports

.venv/.%-$(STATE):
	@echo "installing into .venv; the first time this downloads some hundred MB"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	rm -f .venv/.$*-*
	touch $@
