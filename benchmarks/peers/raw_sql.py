"""GatheRing's own statements at revision 007: they write the run and the pipeline's counters, and no node runs.

A node is two updates of the run: ``current_node`` when it starts, the whole of ``logs`` when it ends. With the two
counters that is 2n + 4 statements, each its own commit, prepared as the floor's are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg

from benchmarks.graphs import chain
from benchmarks.peers.interface import Task

RECORDED: LiteralString = (
    "SELECT coalesce(sum(jsonb_array_length(logs)), 0)::int FROM circle.pipeline_runs WHERE status = 'completed'"
)

_CREATE_PIPELINE: LiteralString = (
    "INSERT INTO circle.pipelines (name, description, status, nodes, edges)"
    " VALUES ('bench', '', 'active', %s, %s) RETURNING id"
)
_CREATE_RUN: LiteralString = (
    "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs)"
    " VALUES (%s, 'running', CURRENT_TIMESTAMP, %s, '[]') RETURNING id"
)
_COUNT_RUN: LiteralString = (
    "UPDATE circle.pipelines SET run_count = run_count + 1, last_run = CURRENT_TIMESTAMP WHERE id = %s"
)
_START_NODE: LiteralString = "UPDATE circle.pipeline_runs SET current_node = %s WHERE id = %s"
_END_NODE: LiteralString = "UPDATE circle.pipeline_runs SET logs = %s WHERE id = %s"
_END_RUN: LiteralString = (
    "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = CURRENT_TIMESTAMP WHERE id = %s"
)
_COUNT_SUCCESS: LiteralString = "UPDATE circle.pipelines SET success_count = success_count + 1 WHERE id = %s"


@contextmanager
def prepare(task: Task) -> Iterator[Callable[[], object]]:
    """Store the pipeline."""
    with psycopg.connect(task.url, autocommit=True) as connection:
        connection.prepare_threshold = 0
        nodes, edges = chain(task.count)
        pipeline_id = _fetch_id(connection.execute(_CREATE_PIPELINE, (json.dumps(nodes), json.dumps(edges))))
        yield lambda: _record(connection, pipeline_id, task)


def _record(connection: psycopg.Connection[tuple[Any, ...]], pipeline_id: int, task: Task) -> None:
    run_id = _fetch_id(connection.execute(_CREATE_RUN, (pipeline_id, "{}")))
    connection.execute(_COUNT_RUN, (pipeline_id,))
    logs: list[dict[str, object]] = []
    for at in range(task.count):
        connection.execute(_START_NODE, (f"node-{at}", run_id))
        logs.append({"node_id": f"node-{at}", "status": "completed", "output": task.output, "duration_ms": 5})
        connection.execute(_END_NODE, (json.dumps(logs), run_id))
    connection.execute(_END_RUN, (run_id,))
    connection.execute(_COUNT_SUCCESS, (pipeline_id,))


def _fetch_id(cursor: psycopg.Cursor[tuple[Any, ...]]) -> int:
    row = cursor.fetchone()
    assert row is not None
    identity: int = row[0]
    return identity
