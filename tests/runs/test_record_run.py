"""``RunRepository.record_run``: a run that is reported afterwards, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import RunRepository, RunStatus
from gathering_pipeline.errors import (
    IllegalTransitionError,
    InvalidPipelineError,
    NodeRunNotFoundError,
    PipelineInactiveError,
    PipelineNotFoundError,
)
from tests.support.databases import unguarded
from tests.support.events import names, read_all
from tests.support.runs import counters, done, statuses, store

SPEC = "a>b a>c b>d c>d"


def test_record_run_stores_the_run_as_steps_would(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, SPEC)
    results = [done(name, output={"of": name}, duration_ms=7) for name in "dcba"]
    run = runs.record_run(pipeline, results, {"why": 1})
    assert (run.status, run.trigger_data, run.pipeline_version) == ("completed", {"why": 1}, 1)
    assert run == runs.get(run.id)
    nodes = runs.nodes(run.id)
    assert [(node.node_id, node.output_data, node.duration_ms) for node in nodes] == [
        (name, {"of": name}, 7) for name in "abcd"
    ]
    assert all(node.started_at is not None and node.completed_at is not None for node in nodes)
    assert counters(raw, pipeline) == (1, 1, 0)
    assert runs.counts()[RunStatus.COMPLETED] == 1
    assert names(read_all(session, run.id)) == [
        *("run started", "a completed", "b completed", "c completed", "d completed", "run completed")
    ]


@pytest.mark.parametrize(
    ("results", "ended", "found"),
    [
        (
            [done("a"), done("b", "failed", error="no luck")],
            ("failed", "no luck", "b"),
            {"a": "completed", "b": "failed", "c": "cancelled", "d": "cancelled"},
        ),
        (
            [done("a"), done("b", "skipped"), done("c", "skipped")],
            ("completed", None, None),
            {"a": "completed", "b": "skipped", "c": "skipped", "d": "skipped"},
        ),
        (
            [done("a"), done("b", "cancelled"), done("c")],
            ("cancelled", None, None),
            {"a": "completed", "b": "cancelled", "c": "completed", "d": "cancelled"},
        ),
        ([done("a", "skipped")], ("completed", None, None), dict.fromkeys("abcd", "skipped")),
    ],
)
def test_record_run_ends_as_finish_would(
    runs: RunRepository,
    session: Session,
    results: list[Any],
    ended: tuple[str, str | None, str | None],
    found: dict[str, str],
) -> None:
    run = runs.record_run(store(session, SPEC), results)
    assert (run.status, run.error_message, run.failed_node) == ended
    assert statuses(runs, run.id) == found


def test_record_run_refused_stores_nothing(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    active, paused = store(session, SPEC), store(session, SPEC, status="paused")
    with refuses(NodeRunNotFoundError):
        runs.record_run(active, [done("a"), done("nowhere")])
    with refuses(IllegalTransitionError) as caught:
        runs.record_run(active, [done("a"), done("b"), done("a", "skipped")])
    assert "more than one result" in str(caught.value)
    with refuses(IllegalTransitionError) as caught:
        runs.record_run(active, [done("a"), done("b")])
    assert "nodes c could have started, and have no result" in str(caught.value)
    with refuses(PipelineInactiveError):
        runs.record_run(paused, [done("a")])
    with refuses(PipelineNotFoundError):
        runs.record_run(10**6, [done("a")])


def test_record_run_of_empty_graph_raises_invalid_pipeline(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a")
    with unguarded(raw, "pipelines"):
        raw.execute("UPDATE circle.pipelines SET nodes = '[]', version = 2")
    with refuses(InvalidPipelineError):
        runs.record_run(pipeline, [])


def test_record_run_with_used_key_returns_the_first_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a")
    first = runs.record_run(pipeline, [done("a")], idempotency_key="k")
    assert runs.record_run(pipeline, [done("a", "failed")], idempotency_key="k") == first
    assert counters(raw, pipeline) == (1, 1, 0)
    runs.create(pipeline, idempotency_key="l")
    with pytest.raises(IllegalTransitionError, match="created to be executed"):
        runs.record_run(pipeline, [done("a")], idempotency_key="l")
