"""What a database holds, how it is emptied, and how rows get past the guards."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from tests.support.servers import connect

Connect = Callable[[str], psycopg.Connection]
"""The fixture ``connect``."""

ADVISORY_LOCKS = """
SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
WHERE l.locktype = 'advisory' AND d.datname = current_database()"""
"""Counts the advisory locks of this database; other databases of the server may have some, too."""


def scalar(raw: psycopg.Connection, statement: str, parameters: Sequence[object] = ()) -> Any:
    """The first column of the first row."""
    row = raw.execute(statement, parameters).fetchone()
    assert row is not None
    return row[0]


def contents(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    """All rows of all tables."""
    tables = (
        *("pipelines", "pipeline_runs", "pipeline_node_runs", "pipeline_versions"),
        *("pipeline_events", "pipeline_counters", "pipeline_run_tags", "pipeline_run_logs", "pipeline_run_history"),
    )
    return [
        row for table in tables for row in raw.execute(f"SELECT t::text FROM circle.{table} t ORDER BY 1").fetchall()
    ]


@contextmanager
def unguarded(raw: psycopg.Connection, table: str) -> Iterator[None]:
    """Without the triggers of a table: what is written now was written by an older release."""
    triggers = raw.execute(
        "SELECT tgname, tgenabled::text FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal",
        [f"circle.{table}"],
    ).fetchall()
    raw.execute(f"ALTER TABLE circle.{table} DISABLE TRIGGER USER")
    yield
    for name, enabled in triggers:
        raw.execute(f"ALTER TABLE circle.{table} ENABLE {'ALWAYS' if enabled == 'A' else ''} TRIGGER {name}")


def delete_rows(raw: psycopg.Connection) -> None:
    """Delete every row, and let ids begin at 1 again; of few rows quicker than TRUNCATE or a new database."""
    raw.execute(
        """DELETE FROM circle.pipelines; DELETE FROM circle.pipeline_counters; DELETE FROM circle.pipeline_events; DELETE FROM circle.pipeline_sweep;
        SELECT setval(format('circle.%s_id_seq', name), 1, false)
        FROM unnest(ARRAY['pipelines', 'pipeline_runs', 'pipeline_node_runs', 'pipeline_events']) name"""
    )


def empty(url: str) -> None:
    """``delete_rows`` of a database."""
    with connect(url) as raw:
        delete_rows(raw)
