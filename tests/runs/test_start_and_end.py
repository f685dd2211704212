"""``start``, ``complete``, ``finish``, ``fail`` and ``cancel`` of a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    NodeStatus,
    RunRead,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.errors import (
    IllegalTransitionError,
    RunOverError,
)
from tests.support.runs import clock, counters, done, started, statuses, store


def test_run_step_by_step_stores_times_and_data(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    run = runs.create(pipeline)
    since = clock(raw)
    run = runs.start(run.id)
    assert run.status == RunStatus.RUNNING
    assert run.started_at is not None
    assert since <= run.started_at <= clock(raw)
    state = runs.start_node(run.id, "a", {"in": [1]})
    assert (state.run_id, state.node_id, state.node_type, state.status) == (run.id, "a", "action", "running")
    assert (state.attempt, state.available_at, state.error_message) == (1, None, None)
    node = runs.nodes(run.id)[0]
    assert (node.status, node.input_data, node.output_data, node.node_id) == ("running", {"in": [1]}, {}, "a")
    assert node.started_at is not None
    assert runs.get(run.id).current_node == "a"
    assert runs.complete_node(run.id, "a", {"out": 2}).status == NodeStatus.COMPLETED
    node = runs.nodes(run.id)[0]
    assert (node.status, node.input_data, node.output_data) == ("completed", {"in": [1]}, {"out": 2})
    assert node.completed_at is not None
    assert node.started_at is not None
    assert node.duration_ms == pytest.approx((node.completed_at - node.started_at) / timedelta(milliseconds=1), abs=1)
    runs.start_node(run.id, "b")
    assert runs.get(run.id).current_node == "b"
    runs.complete_node(run.id, "b")
    run = runs.complete(run.id)
    assert (run.status, run.error_message) == ("completed", None)
    assert run.completed_at is not None
    assert run.started_at is not None
    assert run.completed_at >= run.started_at
    assert run == runs.get(run.id)
    assert counters(raw, pipeline) == (1, 1, 0)


@pytest.mark.parametrize(
    ("how", "ended", "counted"),
    [
        (lambda runs, run_id: runs.complete(run_id), RunStatus.COMPLETED, (1, 1, 0)),
        (lambda runs, run_id: runs.finish(run_id), RunStatus.COMPLETED, (1, 1, 0)),
        (lambda runs, run_id: runs.fail(run_id, "broken"), RunStatus.FAILED, (1, 0, 1)),
        (lambda runs, run_id: runs.cancel(run_id, "enough"), RunStatus.CANCELLED, (1, 0, 0)),
    ],
)
def test_end_of_run_counts_once_and_refuses_further_calls(
    runs: RunRepository,
    session: Session,
    raw: psycopg.Connection,
    refuses: Callable[..., Any],
    how: Callable[[RunRepository, int], RunRead],
    ended: RunStatus,
    counted: tuple[int, int, int],
) -> None:
    pipeline = store(session, "a")
    run_id = runs.start(runs.create(pipeline).id).id
    runs.record(run_id, [done("a")])
    run = how(runs, run_id)
    assert (run.status, counters(raw, pipeline)) == (ended, counted)
    # terminal: no call changes it, and nothing is counted again
    for call, requested in (
        (lambda: runs.start(run_id), "running"),
        (lambda: runs.complete(run_id), "completed"),
        (lambda: runs.finish(run_id), "completed"),
        (lambda: runs.fail(run_id, "late"), "failed"),
        (lambda: runs.cancel(run_id), "cancelled"),
        (lambda: runs.advance(run_id), "running"),
        (lambda: runs.record(run_id, []), "running"),
    ):
        with refuses(RunOverError) as caught:
            call()
        error = caught.value
        assert (error.entity, error.id, error.current, error.requested) == ("run", run_id, ended, requested)
        assert (error.status, error.error) == (ended, run.error_message)
        assert datetime.fromisoformat(error.completed_at) == run.completed_at
    moves: dict[str, Callable[[], object]] = {
        "running": lambda: runs.start_node(run_id, "a"),
        "completed": lambda: runs.complete_node(run_id, "a"),
        "skipped": lambda: runs.skip_node(run_id, "a"),
        "failed": lambda: runs.fail_node(run_id, "a", "late"),
    }
    for requested, move in moves.items():
        with refuses(RunOverError) as caught:
            move()
        error = caught.value
        assert (error.entity, error.id, error.status, error.requested) == ("run", run_id, ended, requested)


def test_fail_or_cancel_run_cancels_live_nodes(runs: RunRepository, session: Session) -> None:
    for end, status in ((runs.fail, "failed"), (runs.cancel, "cancelled")):
        for begun in (True, False):
            run_id = runs.create(store(session)).id
            if begun:
                runs.advance(run_id)
                runs.advance(run_id, [done("a")])
            run = end(run_id, "because")
            assert (run.status, run.error_message) == (status, "because")
            assert statuses(runs, run_id) == {
                "a": "completed" if begun else "cancelled",
                "b": "cancelled",
                "c": "cancelled",
                "d": "cancelled",
            }
            assert all(node.completed_at is not None for node in runs.nodes(run_id))
    assert runs.cancel(runs.create(store(session)).id).error_message is None


def test_complete_with_live_or_failed_node_raises_illegal_transition(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    pending = runs.create(store(session, "a")).id
    with refuses(IllegalTransitionError) as caught:
        runs.complete(pending)
    assert (caught.value.current, caught.value.requested) == ("pending", "completed")
    run_id = started(runs, session, "a b c d")
    steps: list[Callable[[], object]] = [
        lambda: runs.record(run_id, [done("a"), done("b", "skipped"), done("c", "cancelled")]),
        lambda: runs.start_node(run_id, "d"),
        lambda: runs.fail_node(run_id, "d", "broken", retryable=False),
    ]
    for step in steps:
        with refuses(IllegalTransitionError) as caught:
            runs.complete(run_id)
        assert (caught.value.entity, caught.value.id) == ("run", run_id)
        assert (caught.value.current, caught.value.requested) == ("running", "completed")
        step()
    with refuses(IllegalTransitionError):
        runs.complete(run_id)
    assert runs.finish(run_id).status == RunStatus.FAILED


def test_finish_with_running_ready_or_retried_node_raises_illegal_transition(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a>b")
    run_id = runs.create(pipeline).id
    with refuses(IllegalTransitionError) as caught:  # pending
        runs.finish(run_id)
    assert caught.value.current == "pending"
    runs.start(run_id)
    for step in (
        lambda: runs.start_node(run_id, "a"),  # a was ready
        lambda: runs.fail_node(run_id, "a", "once"),  # a was running
        lambda: runs.record(run_id, [done("a")]),  # a was to be retried
        lambda: runs.skip_node(run_id, "b"),  # b was ready
    ):
        with refuses(IllegalTransitionError) as caught:
            runs.finish(run_id)
        assert (caught.value.current, caught.value.requested) == ("running", "completed")
        step()
    assert runs.finish(run_id).status == RunStatus.COMPLETED
    assert counters(raw, pipeline) == (1, 1, 0)


def test_finish_cancels_nodes_behind_a_cancelled_node(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a>b b>c x")
    runs.record(run_id, [done("a", "cancelled"), done("x")])
    assert runs.finish(run_id).status == RunStatus.CANCELLED
    assert statuses(runs, run_id) == {"a": "cancelled", "b": "cancelled", "c": "cancelled", "x": "completed"}
