# `make` alone lists the targets. Everything happens in a virtual environment of its own, made on first use.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PGBOUNCER := $(shell PATH=$$PATH:/usr/sbin command -v pgbouncer)
WORKERS ?= auto
# What depends on no server, or starts its own; single files have the marker "once".
ONCE := benchmarks cli documentation examples reliability unit
# What a statement answers doesn't depend on the pooler: these modules send the statements of others with other data.
NOT_POOLED := $(addprefix runs/test_,arguments branches explain recorded_workflows repeats retries stuck) \
	$(addprefix pipelines/test_,arguments recorded_pipelines revisions unknown_keys)
# A session takes the rights on the folder of temporary files from others, and so from the servers that another part started in it.
PYTEST := PYTEST_DEBUG_TEMPROOT=$$(mktemp -d) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test parts lint types pytest pytest-all pytest-embedded pytest-pgbouncer lowest reliability migration-load widen-load chaos ha fuzz bench bench-peers \
	format generated pictures docs build smoke clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## The virtual environment, with the package and its tools

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV), with the tools of the tests: one to six minutes on first use"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## A tour on a database of its own
	$(BIN)/python -m examples.demo

# Each part prints once it is done, and a part that fails stops no other. What depends on the server is run on both kinds.
test: setup ## Every check of a change: lint, types, tests on PostgreSQL
	@$(MAKE) --no-print-directory parts PARTS="lint types"

pytest: setup ## The tests, on each kind of server that is there, and through PgBouncer
	@$(MAKE) --no-print-directory parts

parts: setup
	@parts="pytest-all"; \
	if [ "$$($(BIN)/python -m tests.support.servers)" = container ]; then parts="$$parts pytest-embedded"; fi; \
	parts="$$parts $(PARTS)"; \
	if [ -n "$(PGBOUNCER)" ]; then parts="$$parts pytest-pgbouncer"; \
		else echo "pgbouncer is not installed: nothing is tested through it"; fi; \
	echo "running" $$parts; \
	$(MAKE) --no-print-directory --keep-going --jobs 3 --output-sync=target $$parts

lint: setup ## ruff, and the floors of the package
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: setup ## mypy and pyright, over the Python of the README and the pages, too
	$(BIN)/mypy
	$(BIN)/python -m tests.support.pages .mypy_cache/pages
	$(BIN)/mypy .mypy_cache/pages
	$(BIN)/pyright

pytest-all: setup ## All tests once, with coverage
	$(BIN)/coverage erase
	COVERAGE_FILE="$(CURDIR)/.coverage" COVERAGE_PROCESS_START="$(CURDIR)/pyproject.toml" $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

pytest-embedded: setup ## The tests that depend on the server, on the embedded one
	GATHERING_TEST_SERVER=embedded $(PYTEST) -m "not once" $(patsubst %,--ignore tests/%,$(ONCE))

pytest-pgbouncer: setup ## What uses the repositories, through PgBouncer in transaction mode (the program has to be there)
	GATHERING_TEST_POOLER="$(PGBOUNCER)" $(PYTEST) \
		tests/runs tests/pipelines tests/database/test_async.py tests/database/test_direct.py \
		$(patsubst %,--ignore tests/%.py,$(NOT_POOLED))

lowest: setup ## The tests of calls and units with the lowest versions that are declared, in an environment of its own
	@test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(BIN)/python -m tests.support.lowest > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-lowest/constraints.txt -e '.[dev]'
	$(VENV)-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/unit tests/runs tests/pipelines tests/graphs \
		tests/events tests/database tests/migrations/test_revisions.py

reliability: setup ## The races and kills of the tests in their long form; takes minutes
	GATHERING_ROUNDS=300 GATHERING_RUNS=500 GATHERING_EXAMPLES=300 GATHERING_EVENTS=100000 GATHERING_KILLS=50 GATHERING_CALLS=60000 \
		GATHERING_BRANCHED=2000 GATHERING_DATABASES=50 $(BIN)/python -m pytest tests/reliability tests/cli/test_many.py

migration-load: setup ## Each revision up and down while four writers work, on 5,000,000 runs; takes a quarter of an hour and 20 GB
	GATHERING_MIGRATION_RUNS=$${GATHERING_MIGRATION_RUNS:-5000000} \
		$(BIN)/python -m pytest tests/reliability/test_migration_load.py --show-capture=no

widen-load: setup ## Ids become BIGINT while callers work, on 5,000,000 runs; takes half an hour and 20 GB
	GATHERING_WIDEN_RUNS=$${GATHERING_WIDEN_RUNS:-5000000} \
		$(BIN)/python -m pytest tests/reliability/test_widening.py --show-capture=no

chaos: setup ## A table of faults from outside: failovers, frozen servers, cut networks, full disks; takes ten minutes
	GATHERING_CHAOS=$${GATHERING_CHAOS:-15} $(BIN)/python -m pytest -n 0 tests/reliability/test_chaos.py --show-capture=no

ha: setup ## Patroni, etcd and HAProxy from Debian's packages, unpacked for the time: workers through switchovers and failovers
	$(BIN)/python -m tests.ha

fuzz: setup ## 20,000 random graphs on every write path, and an hour of odd definitions
	GATHERING_GRAPHS=20000 GATHERING_SEED=$${GATHERING_SEED:-$$(date +%s)} $(BIN)/python -m pytest tests/reliability/test_fuzz.py -s
	GATHERING_EXAMPLES=100000 $(BIN)/python -m pytest tests/unit/test_fuzz_definition.py

bench: setup ## Times, as ratios to a hand-written script in the same run
	$(BIN)/python -m benchmarks

bench-peers: setup ## A run in other stores, next to ours; installs each into an environment of its own
	$(BIN)/python -m benchmarks.peers --environments $(VENV)/peers

format: setup ## Put the sources into their form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

generated: setup ## Write alembic/catalog.json, alembic/locks.json and the help texts in docs/cli.md anew
	$(BIN)/python -m tests.generated

pictures: setup ## Take the pictures of the pages, of a run that is executed meanwhile; needs a Chromium
	$(BIN)/python -m tests.pictures

docs: setup ## The pages, in build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

build: setup ## The source archive, and the wheel that is made of it, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

smoke: build ## Wheel and source archive in fresh environments, used: make smoke PYTHONS="/path/to/python3.11 /path/to/python3.13"
	$(BIN)/python -m tests.smoke $(PYTHONS)

clean: ## What was made here, the virtual environment included
	rm -rf $(VENV) $(VENV)-lowest build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
