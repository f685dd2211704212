"""Tells before an upgrade which locks it will take, on how much, and who is in the way now."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.engine import Connection

from gathering_pipeline import migrations
from gathering_pipeline.errors import SchemaRevisionError
from gathering_pipeline.migrations import SMALL_TABLE, Step

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
    "ACCESS EXCLUSIVE": MODES,
}

_MILD = {
    r"ADD CONSTRAINT \w+\s+FOREIGN KEY": "SHARE ROW EXCLUSIVE",
    r"(ENABLE|DISABLE) (ALWAYS )?TRIGGER": "SHARE ROW EXCLUSIVE",
    r"VALIDATE CONSTRAINT": "SHARE UPDATE EXCLUSIVE",
    r"(SET|RESET) \(": "SHARE UPDATE EXCLUSIVE",
}
"""What ALTER TABLE does under less than ACCESS EXCLUSIVE, if it does nothing else."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that a step takes at most.

    Attributes:
        table: With its schema.
        mode: As PostgreSQL's manual names it; from SHARE on it makes writers wait.
        rows: Rows of the table as its statistics estimate them; None where it was never analysed or is not there yet.
        bytes: Size of the table on disk, without its indexes.
    """

    table: str
    mode: str
    rows: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A step of an upgrade that is still to come; ``locks`` are those on tables that are there already."""

    revision: str
    what: str
    locks: tuple[Lock, ...]


@dataclass(frozen=True, slots=True)
class Blocker:
    """Somebody whom the upgrade would have to wait for, or what refuses it.

    Attributes:
        who: The session or prepared transaction; ``circle.alembic_version`` where it lacks its row.
        seconds: Age of its transaction; None where this role may not see it, or there is none.
        why: What it holds, and what it does.
    """

    who: str
    seconds: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """What an upgrade will do, and who is in its way."""

    revision: str | None
    target: str
    steps: tuple[Pending, ...]
    blockers: tuple[Blocker, ...]


_TABLES = """
SELECT 'circle.' || relname, nullif(reltuples, -1)::bigint, CASE
    WHEN EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
                 WHERE l.relation = c.oid AND l.mode = 'AccessExclusiveLock')
    THEN relpages * current_setting('block_size')::bigint  -- as far as the statistics know: to measure it would wait
    ELSE pg_relation_size(oid) END
FROM pg_class c WHERE relnamespace = to_regnamespace('circle') AND relkind IN ('r', 'p')
"""
# A concurrent build of an index waits for every older transaction of the database, whatever it holds.
_BLOCKERS = """
WITH held AS (
    SELECT l.pid, format('holds %s on circle.%s', m.mode, c.relname) AS what
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation AND c.relnamespace = to_regnamespace('circle')
    CROSS JOIN LATERAL (
        SELECT upper(regexp_replace(left(l.mode, -4), '([a-z])([A-Z])', '\\1 \\2', 'g')) AS mode) m
    JOIN jsonb_to_recordset(:conflicts) AS n (tab text, mode text) ON n.tab = 'circle.' || c.relname AND n.mode = m.mode
    WHERE l.locktype = 'relation' AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL
    SELECT pid, 'is another migrator' FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND (classid::bigint << 32 | objid::bigint) = :migrator
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL
    SELECT pid, 'has an open transaction' FROM pg_stat_activity
    WHERE :builds AND datname = current_database() AND xact_start < clock_timestamp() - interval '1 second'
)
SELECT coalesce('session ' || h.pid, 'a prepared transaction (pg_prepared_xacts)'),
       extract(epoch FROM clock_timestamp() - a.xact_start)::float,
       concat_ws('; ', string_agg(DISTINCT h.what, ', '), 'user ' || a.usename,
                 'application ' || nullif(a.application_name, ''), a.state,
                 'query begun at ' || date_trunc('second', a.query_start), left(a.query, 100))
FROM held h LEFT JOIN pg_stat_activity a ON a.pid = h.pid
WHERE h.pid IS DISTINCT FROM pg_backend_pid()
GROUP BY h.pid, a.xact_start, a.usename, a.application_name, a.state, a.query_start, a.query ORDER BY 2 DESC NULLS FIRST
"""


def preflight(connection: Connection) -> Preflight:
    """What an upgrade to head would do to this database now; nothing is locked or changed to find out.

    Raises:
        SchemaRevisionError: The schema is at a revision that this code doesn't know.
    """
    found, head, order = migrations.current(connection), migrations.head(), migrations.revisions()
    if found is not None and found not in order:
        raise SchemaRevisionError(found, head)
    tables = {table: (rows, size) for table, rows, size in connection.execute(text(_TABLES))}
    pending, conflicts, builds = [], set(), False
    for revision in order[order.index(found) + 1 if found is not None else 0 :]:
        for step in migrations.steps(revision):
            taken = {table: mode for table, mode in locks(step).items() if table in tables}
            if step.is_index:
                taken = {t: "SHARE" if tables[t][1] < SMALL_TABLE else mode for t, mode in taken.items()}
                builds = builds or "SHARE UPDATE EXCLUSIVE" in taken.values()
            pending.append(Pending(revision, step.what, tuple(Lock(t, mode, *tables[t]) for t, mode in taken.items())))
            conflicts |= {(table, mode) for table, needed in taken.items() for mode in _CONFLICTS[needed]}
    values = {
        "conflicts": json.dumps([{"tab": table, "mode": mode} for table, mode in conflicts]),
        "migrator": migrations.MIGRATOR,
        "builds": builds,
    }
    blockers = [Blocker(*row) for row in connection.execute(text(_BLOCKERS), values)] if pending else []
    if lost := migrations.lost(connection):
        blockers.insert(0, Blocker("circle.alembic_version", None, lost))
    return Preflight(found, head, tuple(pending), tuple(blockers))


def locks(step: Step) -> dict[str, str]:
    """The strongest lock on each table that a step names, whichever of its branches is taken.

    Left out are those of readers, which conflict with nothing but ACCESS EXCLUSIVE.
    """
    found: dict[str, str] = {}
    for table, mode in _statements(step.sql):
        found[table] = max(mode, found.get(table, mode), key=MODES.index)
    return found


def _statements(sql: str) -> Iterator[tuple[str, str]]:
    # A step's own statements and those of its DO blocks. Bodies of functions run later; those in SQL are planned now.
    sql = re.sub(r"--.*", "", sql)
    sql = re.sub(r"CREATE OR REPLACE FUNCTION[^$]*?LANGUAGE plpgsql[^$]*\$\$.*?\$\$", "", sql, flags=re.DOTALL)
    for table, change in re.findall(r"\bALTER TABLE (circle\.\w+)([^;]*);", sql):
        actions = re.split(r",\s*(?=(?:ADD|ALTER|DROP|VALIDATE|ENABLE|DISABLE|SET|RESET|RENAME)\b)", change.strip())
        for action in actions:
            yield table, next((mode for kind, mode in _MILD.items() if re.match(kind, action)), "ACCESS EXCLUSIVE")
    # both ends of a foreign key
    for table in re.findall(r"\bREFERENCES (circle\.\w+)", sql):
        yield table, "SHARE ROW EXCLUSIVE"
    for table in re.findall(r"\bTRIGGER \w+[^;]*?\bON (circle\.\w+)", sql):
        yield table, "SHARE ROW EXCLUSIVE"
    for concurrently, table in re.findall(r"\bCREATE (?:UNIQUE )?INDEX (CONCURRENTLY )?[^;]*?\bON (circle\.\w+)", sql):
        yield table, "SHARE UPDATE EXCLUSIVE" if concurrently else "SHARE"
    for table in re.findall(r"\b(?:UPDATE|INSERT INTO|DELETE FROM) (circle\.\w+)", sql):
        yield table, "ROW EXCLUSIVE"
    for index in re.findall(r"\bDROP INDEX (?:IF EXISTS )?circle\.(\w+)", sql):
        yield _table_of(index), "ACCESS EXCLUSIVE"


def _table_of(index: str) -> str:
    built = rf"INDEX CONCURRENTLY IF NOT EXISTS {index}\s+ON (circle\.\w+)"
    every = "\n".join(step.sql for revision in migrations.revisions() for step in migrations.steps(revision))
    return str(re.findall(built, every)[0])
