"""``RunRepository.advance``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
    RunStatus,
    Step,
)
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    IllegalTransitionError,
)
from tests.support.databases import contents
from tests.support.runs import counters, done, statuses, store


def test_advance_diamond_starts_ready_nodes_and_ends_the_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session)
    run_id = runs.create(pipeline).id
    (a,) = runs.advance(run_id).started
    assert (a.node_id, a.node_type, a.attempt, a.inputs) == ("a", "action", 1, None)
    assert statuses(runs, run_id)["a"] == "running"
    step = runs.advance(run_id)  # a runs: there is nothing to do
    assert (step.status, step.started, step.next_due) == ("running", (), None)
    assert [node.node_id for node in step.running] == ["a"]
    b, c = runs.advance(run_id, [done("a", output={"x": 1}, duration_ms=7, retry_count=2)]).started
    assert (b.node_id, c.node_id) == ("b", "c")
    assert runs.get(run_id).current_node == "c"
    node = runs.nodes(run_id)[0]
    assert (node.status, node.output_data, node.duration_ms, node.retry_count) == ("completed", {"x": 1}, 7, 2)
    assert runs.advance(run_id, [{"node_id": "c", "status": "completed"}]).started == ()
    with refuses(IllegalTransitionError):
        runs.advance(run_id, [done("b"), done("c")])
    (d,) = runs.advance(run_id, [done("b")]).started
    assert d.node_id == "d"
    assert runs.advance(run_id, [done("d")]) == Step(status=RunStatus.COMPLETED)
    run = runs.get(run_id)
    assert (run.status, counters(raw, pipeline)) == ("completed", (1, 1, 0))


def test_advance_after_failed_node_ends_the_run_once_nothing_runs(runs: RunRepository, session: Session) -> None:
    run_id = runs.create(store(session)).id
    runs.advance(run_id)
    runs.advance(run_id, [done("a")])
    assert runs.advance(run_id, [done("b", "failed", error="no luck")]).started == ()
    assert runs.get(run_id).status == RunStatus.RUNNING  # c still runs
    assert runs.advance(run_id, [done("c")]).started == ()
    run = runs.get(run_id)
    assert (run.status, run.error_message, statuses(runs, run_id)["d"]) == ("failed", "no luck", "cancelled")


def test_advance_with_retries_starts_the_due_ones_only(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = runs.create(store(session, "a b", retry_backoff_base=60)).id
    runs.advance(run_id)
    runs.fail_node(run_id, "a", "x")
    runs.fail_node(run_id, "b", "x")
    assert runs.advance(run_id).started == ()
    raw.execute("UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp() WHERE node_id = 'b'")
    (node,) = runs.advance(run_id).started
    assert (node.node_id, node.attempt) == ("b", 2)
    assert runs.advance(run_id, [done("b")]).started == ()
    assert runs.get(run_id).status == RunStatus.RUNNING


def test_advance_rolled_back_changes_nothing(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        run_id = RunRepository(session).create(store(session)).id
    before = contents(raw)
    with database.session() as session:
        runs = RunRepository(session)
        assert [node.node_id for node in runs.advance(run_id).started] == ["a"]
        assert len(runs.advance(run_id, [done("a")]).started) == 2
        assert contents(raw) == before  # not visible to others yet
        session.rollback()
    assert contents(raw) == before


def test_advance_starts_what_became_ready_by_other_calls(runs: RunRepository, session: Session) -> None:
    run_id = runs.create(store(session, "a>b c")).id
    runs.advance(run_id)
    runs.complete_node(run_id, "a")
    assert [node.node_id for node in runs.advance(run_id, [done("c")]).started] == ["b"]


def test_node_without_a_position_is_in_the_answer(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = runs.create(store(session, "a")).id
    runs.advance(run_id)
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (%s, 'q', 'agent')", [run_id]
    )
    step = runs.advance(run_id)
    assert [node.node_id for node in step.started] == ["q"]
    assert [node.node_id for node in runs.advance(run_id).running] == ["a", "q"]
    assert runs.advance(run_id, [done("a"), done("q")]).status == RunStatus.COMPLETED


def test_wide_layers_are_started_once(runs: RunRepository, session: Session) -> None:
    layer = range(150)
    spec = " ".join(f"a{one}>b{other}" for one in layer for other in layer)
    run_id = runs.create(store(session, spec)).id
    assert len(runs.advance(run_id).started) == len(layer)
    assert runs.advance(run_id, [done(f"a{at}") for at in layer[1:]]).started == ()
    assert len(runs.advance(run_id, [done("a0")]).started) == len(layer)
