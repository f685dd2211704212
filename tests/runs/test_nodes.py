"""``start_node``, ``complete_node``, ``skip_node`` and ``fail_node``."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy.orm import Session

from gathering_pipeline import (
    NodeStatus,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.errors import (
    IllegalTransitionError,
    NodeNotReadyError,
)
from tests.support.runs import counters, done, started, statuses, store


def test_start_node_not_ready_names_what_it_waits_for(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session)
    with refuses(NodeNotReadyError) as caught:
        runs.start_node(run_id, "d")
    assert (caught.value.run_id, caught.value.node_id, caught.value.waiting_for) == (run_id, "d", ("b", "c"))
    runs.record(run_id, [done("a"), done("b")])
    with refuses(NodeNotReadyError) as caught:
        runs.start_node(run_id, "d")
    assert caught.value.waiting_for == ("c",)
    assert "c" in str(caught.value)
    runs.skip_node(run_id, "c")
    assert runs.start_node(run_id, "d").status == NodeStatus.RUNNING


def test_node_call_on_pending_run_raises_illegal_transition(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = runs.create(store(session, "a")).id
    moves: dict[str, Callable[[], object]] = {
        "running": lambda: runs.start_node(run_id, "a"),
        "completed": lambda: runs.complete_node(run_id, "a"),
        "skipped": lambda: runs.skip_node(run_id, "a"),
        "failed": lambda: runs.fail_node(run_id, "a", "late"),
    }
    for requested, move in moves.items():
        with refuses(IllegalTransitionError) as caught:
            move()
        error = caught.value
        assert (error.entity, error.id, error.current) == ("node run", f"{run_id}/a", "pending")
        assert error.requested == requested
        assert "its run is pending" in str(error)
    assert runs.ready_nodes(run_id) == []


def test_skip_node_skips_nodes_behind_it_only_when_all_predecessors_are_skipped(
    runs: RunRepository, session: Session
) -> None:
    run_id = started(runs, session, "t>l t>r l>l2 l2>join r>join l>x x>y y>join2 l2>join2")
    runs.record(run_id, [done("t")])
    assert runs.skip_node(run_id, "l").node_id == "l"
    assert statuses(runs, run_id) == {
        **dict.fromkeys(["l", "l2", "x", "y", "join2"], "skipped"),
        **dict.fromkeys(["r", "join"], "pending"),
        "t": "completed",
    }
    assert [node.node_id for node in runs.ready_nodes(run_id)] == ["r"]
    runs.advance(run_id)
    assert [node.node_id for node in runs.advance(run_id, [done("r")]).started] == ["join"]
    assert runs.advance(run_id, [done("join")]).started == ()
    assert runs.get(run_id).status == RunStatus.COMPLETED


def test_start_node_after_permanent_failure_raises_not_ready(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a b c>d e>f g", retry_backoff_base=0)
    run_id = runs.start(runs.create(pipeline).id).id
    for name in ("a", "b", "c", "e"):
        runs.start_node(run_id, name)
    assert runs.fail_node(run_id, "e", "later again").status == NodeStatus.PENDING
    runs.fail_node(run_id, "b", "the first", retryable=False)
    runs.fail_node(run_id, "a", "the second", retryable=False)
    with refuses(NodeNotReadyError) as caught:  # g has no predecessors
        runs.start_node(run_id, "g")
    assert (caught.value.waiting_for, "'b' failed" in str(caught.value)) == ((), True)
    # what is under way goes on: c runs, e waits for its retry
    assert [node.node_id for node in runs.ready_nodes(run_id)] == ["e"]
    assert [node.node_id for node in runs.advance(run_id, [done("c")]).started] == ["e"]
    with refuses(IllegalTransitionError):
        runs.finish(run_id)
    assert runs.advance(run_id, [done("e")]).started == ()
    run = runs.get(run_id)
    assert (run.status, run.error_message, run.failed_node) == ("failed", "the first", "b")
    assert statuses(runs, run_id) == {
        **dict.fromkeys("ab", "failed"),
        **dict.fromkeys("ce", "completed"),
        **dict.fromkeys("dfg", "cancelled"),
    }
    assert counters(raw, pipeline) == (1, 0, 1)


def test_finish_after_several_failures_reports_first_in_execution_order(runs: RunRepository, session: Session) -> None:
    names = [f"n{at}" for at in range(40)]
    for seed in range(5):
        run_id = runs.create(store(session, " ".join(names))).id
        results = [done(name, "failed", error=f"error of {name}") for name in names[7:]]
        random.Random(seed).shuffle(results)
        runs.record(run_id, [*results, *(done(name) for name in names[:7])])
        run = runs.finish(run_id)
        assert (run.failed_node, run.error_message) == ("n7", "error of n7")
