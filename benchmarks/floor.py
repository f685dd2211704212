"""The floor: a psycopg script that checks nothing, counts nothing and sends no events.

It records a run of n nodes in 2n + 2 bare statements, prepared, each its own commit: create the run, start and complete
each node, end the run.
"""

from __future__ import annotations

import json
from typing import Any, LiteralString, Protocol

import psycopg
from sqlalchemy.engine import make_url

Connection = psycopg.Connection[tuple[Any, ...]]

OUTPUT = {"text": "All done, nothing to add.", "tokens": 321}
"""Output of every node, on both sides."""
OUTPUT_JSON = json.dumps(OUTPUT)

CREATE_RUN: LiteralString = (
    "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data)"
    " VALUES (%s, 'running', clock_timestamp(), %s) RETURNING id"
)
START_NODE: LiteralString = (
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at)"
    " VALUES (%s, %s, 'agent', 'running', clock_timestamp()) RETURNING id"
)
COMPLETE_NODE: LiteralString = (
    "UPDATE circle.pipeline_node_runs SET status = 'completed', output_data = %s, duration_ms = %s,"
    " completed_at = clock_timestamp() WHERE id = %s"
)
END_RUN: LiteralString = (
    "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = clock_timestamp(), duration_seconds = %s"
    " WHERE id = %s"
)


class Execute(Protocol):
    """``Connection.execute``, or a function that measures it."""

    def __call__(self, query: LiteralString, params: tuple[Any, ...], /) -> psycopg.Cursor[tuple[Any, ...]]:
        """Execute a statement."""
        ...


def connect(url: str) -> Connection:
    """Open an autocommit connection that prepares every statement at its first use."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg.connect(plain, autocommit=True)
    connection.prepare_threshold = 0
    return connection


def record_run(execute: Execute, pipeline_id: int, count: int) -> None:
    """Record a run of ``count`` nodes in 2n + 2 statements."""
    run_id = fetch_value(execute(CREATE_RUN, (pipeline_id, "{}")))
    for at in range(count):
        node_run_id = fetch_value(execute(START_NODE, (run_id, f"node-{at}")))
        execute(COMPLETE_NODE, (OUTPUT_JSON, 5, node_run_id))
    execute(END_RUN, (1, run_id))


def fetch_value(cursor: psycopg.Cursor[tuple[Any, ...]]) -> Any:
    """The first column of the one row."""
    row = cursor.fetchone()
    assert row is not None
    return row[0]
