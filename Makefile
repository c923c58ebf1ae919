# Refold's commands for developers. `make help` lists them; README.md tells which to try first.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export REFOLD_CACHE ?= $(HOME)/.cache/refold
# kind, kubectl and helm, where hack/kind had to build them
export PATH := $(REFOLD_CACHE)/bin:$(PATH)
# Else each of the processes that tests start compiles all that it imports: 4 s of CPU in place of 1.3
unexport PYTHONDONTWRITEBYTECODE
UV := $(REFOLD_CACHE)/uv/bin/uv
PYTHON := .venv/bin/python
PYTEST := .venv/bin/pytest
# Test processes at once, each with servers of its own; a file's tests stay together
WORKERS ?= 2
AT_ONCE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Where tests failed, these once more, one at a time: on a busy machine two at once may outlast a test's patience. The first
# failure stays in the output, and is a defect of the test at least
AGAIN := || { [ $$? = 1 ] && echo "==> some failed: these once more, one at a time" && $(PYTEST) --lf --lfnf=none -v

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  \033[1mmake %-13s\033[0m %s\n", $$1, $$2}'

## --- on the machine ---

$(UV):
	@echo "installing uv into $(REFOLD_CACHE)/uv (10 s once)"
	@python3 -m venv $(REFOLD_CACHE)/uv && $(REFOLD_CACHE)/uv/bin/pip install -q uv==0.13.9

.venv/.done: pyproject.toml uv.lock $(UV)
	@echo "installing the locked dependencies into .venv (10 s)"
	@$(UV) sync --frozen --quiet && touch $@

.PHONY: venv
venv: .venv/.done ## Make .venv with the locked dependencies

.PHONY: servers
servers: ## Install what local test servers need: PostgreSQL, a JDK, Maven
	@hack/servers/install.sh

.PHONY: tools
tools: ## Provide kind, kubectl and helm (those of the machine, or built once)
	@hack/kind/tools.sh

.PHONY: lint
lint: venv ## Style, types, layers and shell scripts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck -x hack/kind/*.sh hack/kind/build/*.sh hack/servers/*.sh

.PHONY: unit
unit: venv tools ## Tests without servers
	$(PYTEST) $(AT_ONCE) tests/unit

.PHONY: integration
integration: venv servers ## Tests with real PostgreSQL, Kafka and Redis on 127.0.0.1
	$(PYTEST) $(AT_ONCE) tests/integration $(AGAIN) tests/integration; }

.PHONY: attack-briefly
attack-briefly: venv servers ## Attack each invariant briefly
	$(PYTEST) tests/attack

ATTACK_LOG := docs/attack/$(shell date -u +%Y-%m-%d).log
ATTACKS := $(addprefix tests/integration/test_eventstore_,model.py description.py fuzz.py)

.PHONY: attack
attack: venv servers ## Attack each invariant at length (about an hour); the log goes to docs/attack/
	@rm -f $(ATTACK_LOG)
	REFOLD_DISTURBANCES=112 REFOLD_ATTACK_LOG=$(ATTACK_LOG) $(PYTEST) -v tests/attack
	REFOLD_EXAMPLES=400 $(PYTEST) -v $(ATTACKS) 2>&1 | tee /dev/stderr | tail -n 1 | tr -d '=' | \
	  sed 's|^|400 examples in each of $(notdir $(ATTACKS)):|' >> $(ATTACK_LOG)

.PHONY: bench
bench: venv servers ## Measure beside the machine's limits (WORKLOAD=append-32 ARGS='--runs 3'; without: all, into docs/bench/)
	@$(PYTHON) -m bench $(WORKLOAD) $(if $(WORKLOAD)$(ARGS),,--into docs/bench) $(ARGS)

.PHONY: bench-report
bench-report: venv ## Draw docs/bench's plots and table again from its results.jsonl
	@$(PYTHON) -m bench.report docs/bench

## --- on a kind cluster ---

.PHONY: cluster
cluster: ## A kind cluster (context kind-refold), without Refold
	@hack/kind/up.sh

.PHONY: up
up: venv cluster ## A kind cluster with Refold installed; leaves it running
	@hack/kind/install.sh

.PHONY: demo
demo: up ## From nothing to a table of rows: flights of 2013 (DEMO_MONTHS=12: the whole year)
	@$(PYTHON) -m examples.flights.demo

.PHONY: e2e
e2e: up ## Tests on the kind cluster
	$(PYTEST) tests/e2e $(AGAIN) tests/e2e; }

.PHONY: e2e-upgrade
e2e-upgrade: up ## On the kind cluster, whose Refold is installed anew: from 0.1.0 to this release, back, and to it again
	REFOLD_UPGRADE=1 $(PYTEST) -s tests/e2e/test_upgrade_from_0_1_0.py

.PHONY: e2e-autoscalers
e2e-autoscalers: up ## On the kind cluster, with metrics-server and KEDA (built once, 30 min): what they scale
	@hack/kind/autoscalers.sh
	REFOLD_AUTOSCALERS=1 $(PYTEST) tests/e2e/test_autoscalers.py

.PHONY: down
down: ## Delete the kind cluster
	@hack/kind/down.sh

## --- all ---

.PHONY: test
test: lint unit cluster integration attack-briefly e2e ## Everything that CI runs, from an empty machine
