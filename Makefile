# Refold's commands for developers. `make help` lists them.
SHELL := /usr/bin/env bash
.DEFAULT_GOAL := help
.SHELLFLAGS := -euo pipefail -c
CACHE := $(or $(REFOLD_CACHE),$(HOME)/.cache/refold)
UV := $(CACHE)/uv/bin/uv
RUN := .venv/bin/

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}'

$(UV):
	@echo "installing uv into $(CACHE)/uv (10 s once)"
	@python3 -m venv $(CACHE)/uv && $(CACHE)/uv/bin/pip install -q uv==0.13.9

.venv/.done: pyproject.toml uv.lock $(UV)
	@echo "installing the locked dependencies into .venv (10 s)"
	@$(UV) sync --frozen --quiet && touch $@

.PHONY: venv
venv: .venv/.done ## Create .venv with the locked dependencies

.PHONY: lint
lint: venv ## Style, types and layers
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

.PHONY: unit
unit: venv ## Tests of pure functions
	$(RUN)pytest tests/unit

.PHONY: test
test: lint unit ## Everything that CI runs
