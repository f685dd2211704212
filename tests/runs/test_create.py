"""``RunRepository.create``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from gathering_pipeline import (
    PipelineRepository,
    PipelineStatus,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.errors import (
    IdempotencyConflictError,
    InvalidDataError,
    InvalidPipelineError,
    PipelineInactiveError,
    PipelineNotFoundError,
    RunNotFoundError,
)
from tests.support.databases import scalar, unguarded
from tests.support.graphs import graph
from tests.support.runs import claim_token, clock, counters, done, store


def test_create_active_pipeline_returns_pending_run_with_all_nodes(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "x a>b a>c b>d c>d")
    since = clock(raw)
    data = {"n": 1, "text": "ü€😀", "list": [1.5, None, {"x": False}]}
    run = runs.create(pipeline, data)
    assert (run.status, run.pipeline_id, run.pipeline_version, run.trigger_data) == ("pending", pipeline, 1, data)
    assert (run.logs, claim_token(raw, run.id), run.lease_expires_at, run.started_at, run.completed_at) == (
        [],
        0,
        None,
        None,
        None,
    )
    assert run == runs.get(run.id)
    nodes = runs.nodes(run.id)
    assert [(n.node_id, n.position, n.predecessors, n.successors) for n in nodes] == [
        ("x", 0, [], []),
        ("a", 1, [], [2, 3]),
        ("b", 2, [1], [4]),
        ("c", 3, [1], [4]),
        ("d", 4, [2, 3], []),
    ]
    assert {(n.status, n.node_type, n.retry_count, n.run_id) for n in nodes} == {("pending", "action", 0, run.id)}
    stored = PipelineRepository(session).get(pipeline)
    assert (stored.run_count, stored.success_count, stored.error_count) == (1, 0, 0)
    assert stored.last_run is not None
    assert since <= stored.last_run <= clock(raw)
    assert runs.create(pipeline).trigger_data == {}


def test_create_missing_pipeline_raises_not_found(runs: RunRepository, refuses: Callable[..., Any]) -> None:
    for missing in (1, 0, -1, 2**31, 2**40, 2**63 - 1):
        with refuses(PipelineNotFoundError) as caught:
            runs.create(missing)
        assert caught.value.pipeline_id == missing


@pytest.mark.parametrize("status", [PipelineStatus.PAUSED, PipelineStatus.DRAFT])
def test_create_inactive_pipeline_raises_inactive(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], status: PipelineStatus
) -> None:
    pipeline = store(session, status=status)
    with refuses(PipelineInactiveError) as caught:
        runs.create(pipeline)
    assert (caught.value.pipeline_id, caught.value.status) == (pipeline, status)


@pytest.mark.parametrize(
    ("nodes", "edges", "code"),
    [
        (graph("a b")[0], graph("a>b b>a")[1], "cycle"),
        (graph("a")[0], graph("a>b")[1], "unknown_target"),
        (graph("a")[0] * 2, [], "duplicate_node"),
        (*graph("a>b"), "no_version"),  # sound, but never compiled
        ([{"id": "a", "type": "robot", "name": "A"}], [], "invalid_type"),
        ({}, [], "not_a_list"),
    ],
)
def test_create_broken_graph_raises_invalid_pipeline(
    runs: RunRepository,
    raw: psycopg.Connection,
    refuses: Callable[..., Any],
    nodes: object,
    edges: object,
    code: str,
) -> None:
    with unguarded(raw, "pipelines"):
        row = raw.execute(
            "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('old', 'active', %s, %s) RETURNING id",
            [json.dumps(nodes), json.dumps(edges)],
        ).fetchone()
    assert row is not None
    with refuses(InvalidPipelineError) as caught:
        runs.create(row[0])
    assert [(issue.severity, issue.code) for issue in caught.value.issues] == [("error", code)]


def test_create_in_the_role_of_a_replica_names_the_cause(runs: RunRepository, session: Session) -> None:
    session.execute(text("SET session_replication_role = replica"))
    try:
        pipeline = store(session)
        with pytest.raises(InvalidPipelineError, match="compiled: session_replication_role is replica, .* reset it"):
            runs.create(pipeline)
    finally:
        session.execute(text("RESET session_replication_role"))


def test_create_empty_graph_raises_invalid_pipeline(
    runs: RunRepository, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    row = raw.execute("INSERT INTO circle.pipelines (name, status) VALUES ('empty', 'draft') RETURNING id").fetchone()
    with unguarded(raw, "pipelines"):
        raw.execute("UPDATE circle.pipelines SET status = 'active'")
    assert row is not None
    with refuses(InvalidPipelineError) as caught:
        runs.create(row[0])
    assert [issue.code for issue in caught.value.issues] == ["no_nodes"]


def test_create_with_used_idempotency_key_returns_first_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline, other = store(session), store(session)
    first = runs.create(pipeline, {"n": 1}, idempotency_key="k")
    assert runs.create(pipeline, {"n": 1.0}, idempotency_key="k", priority=3) == first
    runs.start(first.id)
    assert runs.create(pipeline, {"n": 1}, idempotency_key="k").status == RunStatus.RUNNING
    PipelineRepository(session).pause(pipeline)
    assert runs.create(pipeline, {"n": 1}, idempotency_key="k").id == first.id
    with pytest.raises(PipelineInactiveError):
        runs.create(pipeline, idempotency_key="another")
    assert runs.create(other, idempotency_key="k").id != first.id
    assert counters(raw, pipeline) == (1, 0, 0)
    assert len(runs.nodes(first.id)) == 4
    longest = "k" * 255
    assert runs.create(other, idempotency_key=longest).idempotency_key == longest


def test_create_with_the_key_of_other_data_is_refused(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a")
    first = runs.create(pipeline, {"n": 1}, idempotency_key="k")
    session.commit()
    calls: list[Callable[[], object]] = [
        lambda: runs.create(pipeline, {"n": 2}, idempotency_key="k"),
        lambda: runs.create(pipeline, idempotency_key="k"),
        lambda: runs.create(pipeline, {"n": 2}, idempotency_key="k", unless_live=True),
        lambda: runs.record_run(pipeline, [done("a")], {"n": 2}, idempotency_key="k"),
    ]
    for call in calls:
        with refuses(IdempotencyConflictError) as caught:
            call()
        assert (caught.value.run_id, caught.value.pipeline_id, caught.value.key) == (first.id, pipeline, "k")
    with pytest.raises(psycopg.Error) as raised:
        raw.execute("SELECT circle.create_run(%s, '{}', 'k')", [pipeline])
    assert raised.value.sqlstate == "PL014"


def test_create_unless_live_returns_the_live_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline, other = store(session, "a"), store(session, "a")
    runs.create(other)
    runs.cancel(runs.create(pipeline).id)
    first = runs.create(pipeline, {"n": 1}, unless_live=True)
    assert runs.create(pipeline, {"n": 2}, unless_live=True) == first
    runs.advance(first.id)
    PipelineRepository(session).pause(pipeline)
    assert runs.create(pipeline, unless_live=True).status == RunStatus.RUNNING
    PipelineRepository(session).activate(pipeline)
    runs.advance(first.id, [done("a")])
    second = runs.create(pipeline, unless_live=True, run_at=clock(raw) + timedelta(hours=1))
    assert second.id != first.id
    assert runs.create(pipeline, unless_live=True) == second
    assert runs.create(pipeline, unless_live=True, idempotency_key="k") == second
    assert runs.create(pipeline).id != second.id
    assert counters(raw, pipeline) == (4, 1, 0)


def test_create_with_tags_stores_them(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    pipeline = store(session, "a")
    tags = {"customer": "Ü 7", "k" * 100: "v" * 255}
    assert runs.tags(runs.create(pipeline, tags=tags).id) == tags
    assert runs.tags(runs.create(pipeline, tags={}).id) == {}
    assert runs.tags(runs.create(pipeline).id) == {}
    with pytest.raises(RunNotFoundError):
        runs.tags(-1)
    session.commit()
    wrong: list[tuple[Any, str]] = [
        ({"": "v"}, "must have 1 to 100 characters"),
        ({"k" * 101: "v"}, "must have 1 to 100 characters"),
        ({"k": ""}, r"tags\['k'\] must have 1 to 255 characters"),
        ({"k": "v" * 256}, r"tags\['k'\] must have 1 to 255 characters"),
        ({"k": 1}, r"tags\['k'\] must be a string, not int"),
        ({1: "v"}, "must be a string, not int"),
        ({"k": "\0"}, "NUL"),
        (["k"], "tags must be a mapping of texts, not list"),
    ]
    for given, message in wrong:
        with refuses(InvalidDataError) as caught:
            runs.create(pipeline, tags=given)
        assert re.search(message, str(caught.value)), (given, caught.value)


def test_tags_end_with_their_run(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = runs.create(store(session, "a"), tags={"k": "v"})
    runs.append_log(run.id, "entry")
    runs.cancel(run.id)
    session.commit()
    assert runs.purge(timedelta(0)).deleted == 1
    session.commit()
    assert (
        scalar(raw, "SELECT (SELECT count(*) FROM circle.pipeline_run_tags) + count(*) FROM circle.pipeline_run_logs")
        == 0
    )
