"""Reports that are sent again, because their answer was lost, and reports that come too late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from gathering_pipeline import Database, NodeResult, NodeStatus, RunRepository, RunStatus
from gathering_pipeline.errors import IllegalTransitionError, InvalidDataError, LeaseLostError, RunOverError
from tests.support.databases import contents
from tests.support.runs import claimed, done, lose_lease, started, statuses, store


def make_due(raw: psycopg.Connection) -> None:
    raw.execute("UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp() WHERE available_at IS NOT NULL")


def test_repeated_report_changes_nothing(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session, "a>d b c>e", max_retries_per_node=1)
    token = run.token
    calls: list[Callable[[], Any]] = [
        lambda: runs.start_node(run.id, "a", token=token),
        lambda: runs.complete_node(run.id, "a", {"x": 1}, token=token),
        lambda: runs.start_node(run.id, "b", token=token),
        lambda: runs.fail_node(run.id, "b", "no", attempt=1, token=token),
        lambda: runs.fail_node(run.id, "b", "no", token=token),
        lambda: runs.skip_node(run.id, "c", token=token),
        lambda: runs.skip_node(run.id, "e", token=token),  # the store skipped it with c
        lambda: runs.record(run.id, [done("a", output={"x": 1}), done("d", output={"y": 2})], token=token),
    ]
    for call in calls:
        first = call()
        before = contents(raw)
        assert call() == first
        assert contents(raw) == before
    assert statuses(runs, run.id) == {
        "a": "completed",
        "d": "completed",
        "b": "pending",
        "c": "skipped",
        "e": "skipped",
    }


def test_repeat_with_another_result_is_refused(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "a b", max_retries_per_node=3)
    token = run.token
    runs.start_node(run.id, "a", token=token)
    runs.fail_node(run.id, "a", "first", token=token)
    make_due(raw)
    runs.start_node(run.id, "a", token=token)
    with refuses(IllegalTransitionError) as caught:
        runs.complete_node(run.id, "a", {"late": 1}, attempt=1, token=token)
    assert "attempt 1 has ended" in str(caught.value)
    runs.fail_node(run.id, "a", "first", attempt=1, token=token)  # late, but the attempt did fail
    assert statuses(runs, run.id)["a"] == "running"
    runs.complete_node(run.id, "a", {"x": 1}, attempt=2, token=token)
    with refuses(IllegalTransitionError) as caught:
        runs.complete_node(run.id, "a", {"x": 2}, token=token)
    assert "completed with another output" in str(caught.value)
    for late in (
        lambda: runs.complete_node(run.id, "a", {"x": 1}, attempt=1, token=token),
        lambda: runs.complete_node(run.id, "a", {"x": 1}, attempt=7, token=token),
        lambda: runs.fail_node(run.id, "a", "no", token=token),
        lambda: runs.skip_node(run.id, "a", token=token),
        lambda: runs.start_node(run.id, "a", token=token),
        # one refused result refuses all
        lambda: runs.record(run.id, [done("a", output={"x": 2}), done("b")], token=token),
    ):
        with refuses(IllegalTransitionError):
            late()
    runs.record(run.id, [done("a", output={"x": 1}), done("b")], token=token)


def test_repeat_without_a_token_has_one_winner(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session, "a b")
    runs.complete_node(run_id, "a", {"x": 1})
    with refuses(IllegalTransitionError):
        runs.complete_node(run_id, "a", {"x": 1})
    with refuses(IllegalTransitionError):
        runs.record(run_id, [done("a", output={"x": 1})])
    runs.skip_node(run_id, "b")
    assert runs.skip_node(run_id, "b").status == NodeStatus.SKIPPED


def test_failed_attempt_that_waits_can_fail_for_good(runs: RunRepository, session: Session) -> None:
    unclaimed = started(runs, session, "a", retry_backoff_base=60)
    runs.start_node(unclaimed, "a")
    assert runs.fail_node(unclaimed, "a", "no").status == NodeStatus.PENDING
    assert runs.fail_node(unclaimed, "a", "no").status == NodeStatus.FAILED  # without a token it is a second report
    run = claimed(runs, session, "a", retry_backoff_base=60)
    runs.start_node(run.id, "a", token=run.token)
    assert runs.fail_node(run.id, "a", "no", token=run.token).status == NodeStatus.PENDING
    assert runs.fail_node(run.id, "a", "no", token=run.token).status == NodeStatus.PENDING
    assert runs.fail_node(run.id, "a", "for good", retryable=False, token=run.token).status == NodeStatus.FAILED


def test_repeated_advance_tells_what_is_running(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session, "a>b a>c x")
    token = run.token
    first = runs.advance(run.id, token=token)
    assert [node.node_id for node in first.started] == ["a", "x"]
    second = runs.advance(run.id, [done("a", output={"v": 1})], token=token)
    assert [node.node_id for node in second.started] == ["b", "c"]
    events = raw.execute("SELECT count(*) FROM circle.pipeline_events").fetchone()
    again = runs.advance(run.id, [done("a", output={"v": 1})], token=token)
    assert sorted((node.node_id, node.attempt) for node in again.started) == [("b", 1), ("c", 1), ("x", 1)]
    assert raw.execute("SELECT count(*) FROM circle.pipeline_events").fetchone() == events
    both = runs.advance(run.id, [done("a"), done("b")], token=token)  # one is new
    assert sorted(node.node_id for node in both.started) == ["c", "x"]
    assert statuses(runs, run.id)["b"] == "completed"


def test_terminal_run_repeats_the_call_that_ended_it(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "a")
    token = run.token
    runs.advance(run.id, token=token)
    ended = runs.advance(run.id, [done("a", output={"x": 1})], token=token)
    assert ended.status == RunStatus.COMPLETED
    assert runs.advance(run.id, [done("a", output={"x": 1})], token=token) == ended
    assert runs.finish(run.id, token=token) == runs.complete(run.id, token=token) == runs.get(run.id)
    for call in (
        lambda: runs.advance(run.id, token=token),
        lambda: runs.fail(run.id, "late", token=token),
        lambda: runs.finish(run.id),
        lambda: runs.cancel(run.id),
        lambda: runs.start(run.id, token=token),
    ):
        with refuses(RunOverError):
            call()
    with refuses(RunOverError):
        runs.advance(run.id, [done("a", output={"x": 2})], token=token)
    with refuses(LeaseLostError):
        runs.advance(run.id, [done("a", output={"x": 1})], token=token + 1)


def test_stale_worker_is_refused_even_if_its_report_matches(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "a b")
    runs.complete_node(run.id, "a", {"x": 1}, token=run.token)
    lose_lease(raw, run.id)
    runs.recover()
    for call in (
        lambda: runs.complete_node(run.id, "a", {"x": 1}, token=run.token),
        lambda: runs.advance(run.id, [done("a", output={"x": 1})], token=run.token),
        lambda: runs.skip_node(run.id, "a", token=run.token),
        lambda: runs.release(run.id, token=run.token),
    ):
        with refuses(LeaseLostError):
            call()


def test_results_are_retried_as_they_say(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run_id = runs.create(store(session, "a b c", max_retries_per_node=1)).id
    runs.advance(run_id)
    failed = {"status": "failed", "error": "no"}
    step = runs.advance(
        run_id, [{"node_id": "a", "retryable": False} | failed, {"node_id": "b", "attempt": 1} | failed], retry=True
    )
    nodes = {node.node_id: node for node in runs.nodes(run_id)}
    assert {name: node.status.value for name, node in nodes.items()} == {"a": "failed", "b": "pending", "c": "running"}
    assert nodes["b"].retry_count == 1
    assert (step.started, [node.node_id for node in step.running]) == ((), ["c"])
    assert step.next_due == nodes["b"].available_at
    make_due(raw)
    (b,) = runs.advance(run_id, [NodeResult(node_id="c", status="failed", error="x", retryable=True)]).started
    assert (b.node_id, b.attempt) == ("b", 2)


def test_started_nodes_have_the_outputs_of_their_predecessors(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a>j b>j s>j")
    (a, b, s) = runs.advance(run_id, inputs=True).started
    assert [node.inputs for node in (a, b, s)] == [{}, {}, {}]
    runs.advance(run_id, [done("a", output={"v": [1]}), done("b", output={"w": 2})], inputs=True)
    (j,) = runs.advance(run_id, [done("s", output={})], inputs=True).started
    assert j.inputs == {"a": {"v": [1]}, "b": {"w": 2}, "s": {}}


@pytest.mark.parametrize("bad", [0, -1, True, "1", 1.5, 2**40])
def test_bad_attempt_raises_invalid_data(runs: RunRepository, session: Session, bad: Any) -> None:
    run_id = started(runs, session, "a")
    calls: list[Callable[[], object]] = [
        lambda: runs.complete_node(run_id, "a", attempt=bad),
        lambda: runs.fail_node(run_id, "a", "x", attempt=bad),
    ]
    for call in calls:
        with pytest.raises(InvalidDataError, match="attempt"):
            call()


def test_calls_on_the_run_repeat_too(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session, "a b")
    token = run.token
    assert runs.start(run.id, token=token) == runs.get(run.id)
    results = [done("a"), done("b", "cancelled")]
    runs.record(run.id, results, token=token)
    ended = runs.finish(run.id, token=token)
    assert ended.status == RunStatus.CANCELLED
    before = contents(raw)
    assert runs.finish(run.id, token=token) == ended
    runs.record(run.id, results, token=token)
    assert contents(raw) == before


def test_repeat_waits_for_the_standby_like_a_write(database: Database) -> None:
    """It takes a transaction number, so that its commit is one that is replicated."""
    with database.session() as session:
        runs = RunRepository(session)
        pipeline = store(session, "a")
        runs.create(pipeline, idempotency_key="k")
        run = claimed(runs, session, "a")
        runs.complete_node(run.id, "a", token=run.token)
        recorded = runs.record_run(pipeline, [done("a")], idempotency_key="r")
    calls: list[Callable[[RunRepository], object]] = [
        lambda runs: runs.create(pipeline, idempotency_key="k"),
        lambda runs: runs.record_run(pipeline, [done("a")], idempotency_key="r"),
        lambda runs: runs.complete_node(run.id, "a", token=run.token),
        lambda runs: runs.start(run.id, token=run.token),
    ]
    assert recorded.status == RunStatus.COMPLETED
    for call in calls:
        with database.session() as session:
            call(RunRepository(session))
            taken = session.execute(text("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")).scalar_one()
            assert taken
