# Everything a person types. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
UV ?= $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN = $(UV) run --frozen --no-sync
LEADS ?= 4000
PYTEST_ARGS ?=

.PHONY: help setup demo test test-unit lint types arch bench schemas docs requirements new-service clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}'

.uv/bin/uv:
	@echo "Fetching uv into .uv (not found on this machine)"
	@python3 -m venv .uv 2>/dev/null && .uv/bin/python -m pip install -q "uv>=0.9,<1" \
	  || { rm -rf .uv; python3 -m pip install -q --target .uv "uv>=0.9,<1"; }
	@test -x .uv/bin/uv || { echo "uv could not be fetched: install it (https://docs.astral.sh/uv/) or python3-venv and try again" >&2; exit 1; }

setup: $(if $(findstring .uv/,$(UV)),.uv/bin/uv)  ## Install everything into .venv and fetch Kafka's jars
	@$(UV) sync --frozen --quiet
	@$(RUN) kehu devstack fetch

demo: setup  ## Real leads through the whole suite, with a report to look at (LEADS=all for 45 211)
	@$(RUN) kehu demo --leads $(LEADS)

test: setup  ## All tests, on real PostgreSQL and Kafka
	@$(RUN) pytest $(PYTEST_ARGS)

test-unit: setup  ## The tests that need no infrastructure
	@$(RUN) pytest tests/unit tests/schemas tests/architecture $(PYTEST_ARGS)

lint: setup  ## Style and common mistakes
	@$(RUN) ruff check . && $(RUN) ruff format --check .

types: setup  ## Strict types
	@$(RUN) mypy shared/kehu $(foreach s,$(wildcard services/*),$(s)/$(subst -,_,$(notdir $(s)))) bench

arch: setup  ## Who may import whom
	@$(RUN) lint-imports

bench: setup  ## Every benchmark beside the machine's limit and its peer (BENCH=name for one)
	@$(RUN) python -m bench $(BENCH)

schemas: setup  ## Write the golden files of new event versions
	@$(RUN) kehu docs goldens

docs: setup  ## Generate the reference pages
	@$(RUN) kehu docs all

requirements: setup  ## Each requirement with the tests that cite it
	@$(RUN) kehu docs requirements

new-service: setup  ## A new service with the usual file names (NAME=field-sales)
	@$(RUN) kehu new-service $(NAME)

clean:  ## Remove what was built here (caches outside the checkout stay)
	rm -rf .venv .uv .kehu .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
