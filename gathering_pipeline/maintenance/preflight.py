"""``preflight``: the locks of an upgrade, the size of the locked tables, and the sessions that block it now.

``locks.json``, next to the revisions, lists the strongest lock that each step of an upgrade took on each table that
existed before the step, as ``pg_locks`` showed it. ``make generated`` writes it; a test compares it with the revisions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.engine import Connection

from gathering_pipeline import migrations, migrator
from gathering_pipeline.errors import SchemaRevisionError

MODES = [
    *("ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "SHARE ROW EXCLUSIVE"),
    *("EXCLUSIVE", "ACCESS EXCLUSIVE"),
]
"""From the weakest to the strongest. https://www.postgresql.org/docs/current/explicit-locking.html"""

_CONFLICTS = {
    "ROW EXCLUSIVE": MODES[4:],
    "SHARE UPDATE EXCLUSIVE": MODES[3:],
    "SHARE": ["ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", *MODES[5:]],
    "SHARE ROW EXCLUSIVE": MODES[2:],
    "EXCLUSIVE": MODES[1:],
    "ACCESS EXCLUSIVE": MODES,
}


@dataclass(frozen=True, slots=True)
class Lock:
    """The strongest lock that a step takes on a table, at most.

    Attributes:
        table: With its schema.
        mode: As in PostgreSQL's manual; SHARE and stronger block writers.
        rows: Rows of the table as its statistics estimate them; None if it was never analysed.
        bytes: Size of the table on disk, without its indexes.
    """

    table: str
    mode: str
    rows: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A pending step of an upgrade; ``locks`` are those on existing tables."""

    revision: str
    title: str
    locks: tuple[Lock, ...]


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session that the upgrade would wait for, or a state of the database that the upgrade refuses.

    Attributes:
        label: The session or prepared transaction; ``circle.alembic_version`` if its row is missing.
        seconds: Age of its transaction; None if this role may not see it, or there is none.
        reason: The locks it holds, and its current statement.
    """

    label: str
    seconds: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """The steps of an upgrade, and what blocks it now."""

    revision: str | None
    target: str
    steps: tuple[PendingStep, ...]
    blockers: tuple[Blocker, ...]


class StepLocks(NamedTuple):
    """A row of ``locks.json``. Tables are named without their schema.

    Attributes:
        revision: The revision of the step.
        title: Its title.
        locks: The strongest mode by table. Modes of readers, below ROW EXCLUSIVE, are left out.
        if_small: The same for a step that builds an index of a table below ``migrator.SMALL_TABLE``; empty for others.
    """

    revision: str
    title: str
    locks: dict[str, str]
    if_small: dict[str, str]


_TABLES = """
SELECT relname, nullif(reltuples, -1)::bigint, CASE
    WHEN EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
                 WHERE l.relation = c.oid AND l.mode = 'AccessExclusiveLock')
    THEN relpages * current_setting('block_size')::bigint  -- the estimate, because measuring would wait for the lock
    ELSE pg_relation_size(oid) END
FROM pg_class c WHERE relnamespace = to_regnamespace('circle') AND relkind IN ('r', 'p')
"""
# A concurrent index build waits for every older transaction of the database, whatever it holds.
_BLOCKERS = """
WITH held AS (
    SELECT l.pid, format('holds %s on circle.%s', m.mode, c.relname) AS what
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation AND c.relnamespace = to_regnamespace('circle')
    CROSS JOIN LATERAL (
        SELECT upper(regexp_replace(left(l.mode, -4), '([a-z])([A-Z])', '\\1 \\2', 'g')) AS mode) m
    JOIN jsonb_to_recordset(:conflicts) AS n (tab text, mode text) ON n.tab = c.relname AND n.mode = m.mode
    WHERE l.locktype = 'relation' AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL
    SELECT pid, 'is another migrator' FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND (classid::bigint << 32 | objid::bigint) = :migration_lock
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL
    SELECT pid, 'has an open transaction' FROM pg_stat_activity
    WHERE :builds AND datname = current_database() AND xact_start < clock_timestamp() - interval '1 second'
)
SELECT coalesce('session ' || h.pid, 'a prepared transaction (pg_prepared_xacts)'),
       extract(epoch FROM clock_timestamp() - a.xact_start)::float,
       concat_ws('; ', string_agg(DISTINCT h.what, ', '), 'user ' || a.usename,
                 'application ' || nullif(a.application_name, ''), a.state,
                 'query started at ' || date_trunc('second', a.query_start), left(a.query, 100))
FROM held h LEFT JOIN pg_stat_activity a ON a.pid = h.pid
WHERE h.pid IS DISTINCT FROM pg_backend_pid()
GROUP BY h.pid, a.xact_start, a.usename, a.application_name, a.state, a.query_start, a.query ORDER BY 2 DESC NULLS FIRST
"""


def preflight(connection: Connection) -> Preflight:
    """Look ahead at an upgrade of this database to head. Takes no lock and changes nothing.

    Raises:
        SchemaRevisionError: The schema is at a revision that this code doesn't know.
    """
    found, head, order = migrations.current(connection), migrations.head(), migrations.revisions()
    if found is not None and found not in order:
        raise SchemaRevisionError(found, head)
    done = [] if found is None else order[: order.index(found) + 1]
    tables = {table: (rows, size) for table, rows, size in connection.execute(text(_TABLES))}
    pending: list[PendingStep] = []
    conflicts: set[tuple[str, str]] = set()
    builds = False
    for step in step_locks():
        if step.revision in done:
            continue
        locks: list[Lock] = []
        for table, mode in step.locks.items():
            if table in tables:
                rows, size = tables[table]
                needed = step.if_small[table] if step.if_small and size < migrator.SMALL_TABLE else mode
                builds = builds or (bool(step.if_small) and needed == mode)
                locks.append(Lock(f"circle.{table}", needed, rows, size))
                conflicts |= {(table, conflicting) for conflicting in _CONFLICTS[needed]}
        pending.append(PendingStep(step.revision, step.title, tuple(locks)))
    values = {
        "conflicts": json.dumps([{"tab": table, "mode": mode} for table, mode in conflicts]),
        "migration_lock": migrator.MIGRATION_LOCK,
        "builds": builds,
    }
    blockers = [Blocker(*row) for row in connection.execute(text(_BLOCKERS), values)] if pending else []
    if hint := migrator.missing_revision_hint(connection):
        blockers.insert(0, Blocker("circle.alembic_version", None, hint))
    return Preflight(found, head, tuple(pending), tuple(blockers))


def step_locks() -> list[StepLocks]:
    """The locks of all steps of an upgrade from an empty database, in their order."""
    rows = json.loads((migrator.scripts() / "locks.json").read_text(encoding="utf-8"))
    return [StepLocks(*row) for row in rows]
