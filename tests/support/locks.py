"""Observes in ``pg_locks`` which locks each step of an upgrade takes, for ``alembic/locks.json``."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from gathering_pipeline import migrations, migrator
from gathering_pipeline.maintenance.preflight import MODES, StepLocks
from gathering_pipeline.migrator import Step
from tests.support import servers
from tests.support.servers import Server

_TABLES = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('circle') AND relkind = 'r'"
_HELD = """
SELECT c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.locktype = 'relation' AND l.granted AND l.pid = %s
  AND c.relkind = 'r' AND c.relnamespace = to_regnamespace('circle')
"""
_WAITS_FOR_WRITER = "SELECT FROM pg_locks WHERE locktype = 'virtualxid' AND NOT granted AND pid = %s"

# Rows that the repairs of revision 008 and the compiler of revision 009 work on.
_PIPELINES_AND_RUNS = """
INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES
    ('valid', 'active', '[{"id": "a", "type": "trigger", "name": "A"}]', '[]'),
    ('broken', 'draft', '[{"id": "a", "type": "trigger", "name": "A"}]', '[{"id": "e", "from": "a", "to": "a"}]'),
    ('empty', NULL, NULL, NULL);
INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (1, 'completed'), (1, 'running'), (2, NULL);
"""
_NODE_RUNS = """
INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES
    (1, 'a', 'trigger', 'completed'), (2, 'a', 'trigger', NULL);
"""
_STATES: tuple[tuple[str, ...], ...] = ((), ("006_pipelines",), ("006_pipelines", "007_pipeline_execution"))
"""Databases before the upgrade: empty; with GatheRing's tables; with those after its own execution settings."""


def observe(server: Server) -> list[StepLocks]:
    """Run the upgrade on each state, and return the strongest lock of each step on each table that existed before it.

    Some steps do nothing in one of the states, so the union of all states is what a step takes at most.
    """
    union: dict[int, StepLocks] = {}
    for applied in _STATES:
        with _database(server) as url, servers.connect(url) as raw, servers.connect(url) as second:
            raw.execute("CREATE SCHEMA circle")
            for revision in applied:
                for step in migrator.steps(revision):
                    raw.execute(step.sql.encode())
            _insert_rows(raw, applied)
            number = 0
            for revision in migrations.revisions():
                for step in migrator.steps(revision):
                    locks, if_small = _observe_index(raw, second, step) if step.is_index else (_observe(raw, step), {})
                    before = union.get(number, StepLocks(revision, step.title, {}, {}))
                    union[number] = before._replace(
                        locks=_stronger(before.locks, locks), if_small=_stronger(before.if_small, if_small)
                    )
                    number += 1
                if revision not in applied:
                    _insert_rows(raw, (revision,))
    return [union[number] for number in sorted(union)]


def as_json(rows: list[StepLocks]) -> str:
    """The content of ``locks.json``: a step a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


@contextmanager
def _database(server: Server) -> Iterator[str]:
    name = server.create()
    try:
        yield server.database_url(name)
    finally:
        server.drop(name)


def _insert_rows(raw: psycopg.Connection, applied: tuple[str, ...]) -> None:
    """Insert rows into the tables that these revisions created, while they still take incomplete ones."""
    if "006_pipelines" in applied:
        raw.execute(_PIPELINES_AND_RUNS)
    if "007_pipeline_execution" in applied:
        raw.execute(_NODE_RUNS)


def _observe(raw: psycopg.Connection, step: Step) -> dict[str, str]:
    """Run a step in one transaction, which keeps its locks; without its own commits, which would release some."""
    existing = _existing(raw)
    with raw.transaction():
        raw.execute(re.sub(r"^\s*COMMIT;", "", step.sql, flags=re.MULTILINE).encode())
        return _strongest(raw, raw.info.backend_pid, existing)


def _observe_index(raw: psycopg.Connection, second: psycopg.Connection, step: Step) -> tuple[dict[str, str], ...]:
    """Build an index concurrently while a writer holds it up, and at once: the locks of both ways."""
    existing = _existing(raw)
    with raw.transaction(force_rollback=True):
        raw.execute(step.sql.replace(" CONCURRENTLY", "").encode())
        if_small = _strongest(raw, raw.info.backend_pid, existing)
    locks: dict[str, str] = {}
    builder = threading.Thread(target=second.execute, args=(step.sql.encode(),))
    with raw.transaction():
        for table in existing:
            raw.execute(f"LOCK TABLE circle.{table} IN ROW EXCLUSIVE MODE".encode())
        builder.start()
        deadline = time.monotonic() + 60
        while builder.is_alive() and not locks:  # it ends at once where the index exists
            assert time.monotonic() < deadline
            if raw.execute(_WAITS_FOR_WRITER, (second.info.backend_pid,)).fetchone() is not None:
                locks = _strongest(raw, second.info.backend_pid, existing)
    builder.join()
    return locks, if_small


def _existing(raw: psycopg.Connection) -> list[str]:
    return [name for (name,) in raw.execute(_TABLES)]


def _strongest(raw: psycopg.Connection, pid: int, tables: list[str]) -> dict[str, str]:
    """The strongest mode that a session holds on each table, without those of readers, in the words of the manual."""
    found: dict[str, str] = {}
    for table, name in raw.execute(_HELD, (pid,)):
        mode = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.removesuffix("Lock")).upper()
        if table in tables and MODES.index(mode) >= MODES.index("ROW EXCLUSIVE"):
            found = _stronger(found, {table: mode})
    return found


def _stronger(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """The stronger mode of each table, sorted by table."""
    both = {table: max(one.get(table, mode), mode, key=MODES.index) for table, mode in other.items()}
    return dict(sorted((one | both).items()))
