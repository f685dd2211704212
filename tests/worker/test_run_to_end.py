"""``testing.run_to_end``: a run without a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    InvalidDataError,
    LeaseLostError,
    NodeContext,
    NodeStatus,
    PermanentError,
    PipelineError,
    RunOverError,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.testing import run_to_end
from tests.support.workers import new_run

pytestmark = pytest.mark.once  # it calls the repositories, which tests/runs shows on both servers


@pytest.fixture
def runs(database: Database) -> Iterator[RunRepository]:
    with database.session(autocommit=True) as session:
        yield RunRepository(session)


def test_run_to_end_executes_nodes_in_order_in_this_thread(database: Database, runs: RunRepository) -> None:
    nodes = {"t": {"type": "trigger"}, "p": {"type": "parallel"}, "c": {"type": "condition"}}
    run_id = new_run(database, "t>p p>a p>b a>c b>c c>d", nodes)
    seen: list[tuple[str, dict[str, Any], int]] = []

    def handle(context: NodeContext) -> dict[str, Any]:
        seen.append((context.node.id, dict(context.inputs), threading.get_ident()))
        return {"by": context.node.id}

    async def decide(context: NodeContext) -> bool:
        handle(context)
        return True

    run = run_to_end(runs, run_id, {"action": handle, "condition": decide})
    assert run.status is RunStatus.COMPLETED
    assert [(name, list(inputs)) for name, inputs, _ in seen] == [
        ("a", ["p"]),
        ("b", ["p"]),
        ("c", ["a", "b"]),
        ("d", ["c"]),
    ]
    assert {thread for _, _, thread in seen} == {threading.get_ident()}


@pytest.mark.parametrize("autocommit", [True, False])
def test_run_to_end_waits_for_nothing(database: Database, autocommit: bool) -> None:
    run_id = new_run(
        database, "a>d d>b", {"d": {"type": "delay", "config": {"seconds": 3600}}}, retry_backoff_base=600.0
    )
    attempts: list[int] = []

    def handle(context: NodeContext) -> None:
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise ConnectionError

    begun = time.monotonic()
    with database.session(autocommit=autocommit) as session:
        assert run_to_end(RunRepository(session), run_id, {"action": handle}).status is RunStatus.COMPLETED
    assert attempts == [1, 2, 3, 1, 2, 3]
    assert time.monotonic() - begun < 60


def test_run_to_end_with_failures_ends_as_with_a_worker(database: Database, runs: RunRepository) -> None:
    def handle(context: NodeContext) -> None:
        raise PermanentError("never") if context.node.id == "b" else ValueError("no")

    run = run_to_end(runs, new_run(database, "b"), {"action": handle})
    assert (run.status, run.error_message) == (RunStatus.FAILED, "never")
    run_id = new_run(database, "a>c", max_retries_per_node=1)
    run = run_to_end(runs, run_id, {"action": handle})
    assert (run.status, run.error_message) == (RunStatus.FAILED, "ValueError: no")
    assert [(node.status, node.retry_count) for node in runs.nodes(run_id)] == [
        (NodeStatus.FAILED, 1),
        (NodeStatus.CANCELLED, 0),
    ]


def test_run_to_end_raises_what_a_test_asserts_in_a_handler(database: Database, runs: RunRepository) -> None:
    def handle(context: NodeContext) -> None:
        assert context.node.id == "b", "the wrong node"

    with pytest.raises(AssertionError, match="the wrong node"):
        run_to_end(runs, new_run(database, "a"), {"action": handle})


def test_run_to_end_returns_when_a_handler_cancels_the_run(database: Database, runs: RunRepository) -> None:
    def handle(context: NodeContext) -> None:
        runs.cancel(context.run.id)

    run = run_to_end(runs, new_run(database, "a>b"), {"action": handle})
    assert run.status is RunStatus.CANCELLED


def test_run_to_end_refuses_what_it_cannot_execute(database: Database, runs: RunRepository) -> None:
    run_id = new_run(database, "a>b", {"b": {"type": "agent"}})
    with pytest.raises(InvalidDataError, match="no function for nodes of type agent"):
        run_to_end(runs, run_id, {"action": lambda _: None})
    with pytest.raises(InvalidDataError, match="output.x"):
        run_to_end(runs, run_id, {"action": lambda _: {"x": object()}, "agent": lambda _: None})
    with pytest.raises(PipelineError, match=f"run {run_id} doesn't go on: nodes that run elsewhere: a"):
        run_to_end(runs, run_id, {"action": lambda _: None, "agent": lambda _: None})
    runs.cancel(run_id)
    with pytest.raises(RunOverError):
        run_to_end(runs, run_id, {"action": lambda _: None, "agent": lambda _: None})
    claimed_id = new_run(database, "a")
    assert runs.claim("worker", timedelta(minutes=1))[0].id == claimed_id
    with pytest.raises(LeaseLostError):
        run_to_end(runs, claimed_id, {"action": lambda _: None})


def test_run_to_end_in_one_transaction_is_undone_with_it(database: Database, session: Session) -> None:
    run_id = new_run(database, "a")
    assert run_to_end(RunRepository(session), run_id, {"action": lambda _: None}).status is RunStatus.COMPLETED
    session.rollback()
    assert RunRepository(session).get(run_id).status is RunStatus.PENDING
