"""Steps that tests of runs share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy.orm import Session

from gathering_pipeline import (
    ClaimedRun,
    NodeExecutionResult,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    RunRepository,
)
from tests.support.graphs import DIAMOND, graph

LEASE = timedelta(minutes=5)


def store(session: Session, spec: str = DIAMOND, **fields: Any) -> int:
    """An active pipeline's id."""
    nodes, edges = graph(spec)
    fields = {"name": "a pipeline", "status": PipelineStatus.ACTIVE, "nodes": nodes, "edges": edges} | fields
    return PipelineRepository(session).create(PipelineCreate(**fields)).id


def counters(raw: psycopg.Connection, pipeline_id: int) -> tuple[int, int, int]:
    """run_count, success_count, error_count."""
    row = raw.execute(
        "SELECT c.run_count, c.success_count, c.error_count FROM circle.pipelines p, circle.counted(p) c WHERE p.id = %s",
        [pipeline_id],
    ).fetchone()
    assert row is not None
    return row


def clock(raw: psycopg.Connection) -> datetime:
    row = raw.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


def statuses(runs: RunRepository, run_id: int) -> dict[str, str]:
    return {node.node_id: node.status.value for node in runs.nodes(run_id)}


def started(runs: RunRepository, session: Session, spec: str = DIAMOND, **fields: Any) -> int:
    """A running run's id."""
    return runs.start(runs.create(store(session, spec, **fields)).id).id


def claimed(runs: RunRepository, session: Session, spec: str = DIAMOND, **fields: Any) -> ClaimedRun:
    runs.create(store(session, spec, **fields))
    (run,) = runs.claim("worker", LEASE)
    return run


def lose_lease(raw: psycopg.Connection, run_id: int) -> None:
    """As if the lease had run out a second ago."""
    raw.execute(
        "UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE id = %s", [run_id]
    )


def done(node_id: str, status: str = "completed", **fields: Any) -> NodeExecutionResult:
    return NodeExecutionResult.model_validate({"node_id": node_id, "status": status} | fields)


def raised(call: Callable[..., object], *arguments: object) -> str:
    """The class of what a call raises."""
    try:
        call(*arguments)
    except Exception as error:  # noqa: BLE001 - any error is an answer
        return type(error).__name__
    return "nothing"


def claim_token(raw: psycopg.Connection, run_id: int) -> int:
    """The stored token of a run."""
    row = raw.execute("SELECT claim_token FROM circle.pipeline_runs WHERE id = %s", [run_id]).fetchone()
    assert row is not None
    token: int = row[0]
    return token
