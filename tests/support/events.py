"""Steps that tests of events share."""

from __future__ import annotations

import psycopg
from sqlalchemy.orm import Session

from gathering_pipeline import EventRepository, PipelineEvent
from tests.support.runs import store

NODE = "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%s, %s, 'action', %s) RETURNING id"


def stored(raw: psycopg.Connection) -> list[tuple[str | None, str]]:
    """Node and type of all events, in the order in which they are read."""
    return raw.execute("SELECT node_id, type FROM circle.pipeline_events ORDER BY xid, id").fetchall()


def forget(raw: psycopg.Connection) -> None:
    raw.execute("TRUNCATE circle.pipeline_events")


def names(events: tuple[PipelineEvent, ...] | list[PipelineEvent]) -> list[str]:
    return [f"{event.node_id or 'run'} {event.type.partition('.')[2]}" for event in events]


def read_all(session: Session, run_id: int | None = None) -> list[PipelineEvent]:
    return list(EventRepository(session).read(run_id=run_id, limit=10_000).items)


def raw_run(raw: psycopg.Connection, session: Session, status: str = "running") -> int:
    pipeline_id = store(session)
    session.commit()
    row = raw.execute(
        "INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, %s) RETURNING id", [pipeline_id, status]
    ).fetchone()
    assert row is not None
    run_id: int = row[0]
    return run_id
