"""What a worker makes of the nodes of a run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from gathering_pipeline import (
    Database,
    DatabaseSettings,
    EventRepository,
    NodeContext,
    NodeResult,
    NodeStatus,
    PermanentError,
    RunRepository,
    RunStatus,
    Worker,
)
from tests.support.workers import made, new_run, outcome, run_once

pytestmark = pytest.mark.once  # a worker calls the repositories, which tests/runs shows on both servers

KINDS = pytest.mark.parametrize("kind", ["async", "sync", "partial"])


def of_kind(kind: str, handle: Callable[[NodeContext], Any]) -> Callable[[NodeContext], Any]:
    async def handle_async(context: NodeContext) -> Any:
        await asyncio.sleep(0)
        return handle(context)

    async def handle_more(_: int, context: NodeContext) -> Any:
        return await handle_async(context)

    if kind == "partial":  # whether that is a coroutine function is seen only by what it returns
        more = partial(handle_more, 1)
        return lambda context: more(context)
    return handle_async if kind == "async" else handle


@KINDS
def test_handler_gets_its_context_and_its_output_is_stored(database: Database, kind: str) -> None:
    run_id = new_run(database, "t>a a>p p>b", {"t": {"type": "trigger"}, "p": {"type": "parallel"}})
    seen: list[NodeContext] = []

    def handle(context: NodeContext) -> dict[str, Any]:
        seen.append(context)
        with database.session() as session:
            RunRepository(session).append_log(context.run.id, context.node.id, token=context.token)
        return {"node": context.node.id}

    run_once(made(database, of_kind(kind, handle), name="ada"))
    run, nodes = outcome(database, run_id)
    assert (run.status, run.worker_id, run.claim_count) == (RunStatus.COMPLETED, "ada", 1)
    assert {name: node.output_data for name, node in nodes.items()} == {
        "t": {},
        "a": {"node": "a"},
        "p": {"a": {"node": "a"}},
        "b": {"node": "b"},
    }
    first, last = seen
    assert (first.run.id, first.run.trigger_data, first.attempt) == (run_id, {"by": "test"}, 1)
    assert first.config == first.node.config == {"action": "do"}
    assert (first.inputs, last.inputs) == ({"t": {}}, {"p": {"a": {"node": "a"}}})
    assert not first.cancelled.is_set()
    with database.session() as session:
        assert [line.entry for line in RunRepository(session).logs(run_id)] == ["a", "b"]


def test_concurrency_limits_handlers_and_a_delay_takes_no_slot(database: Database) -> None:
    run_ids = [new_run(database, "a b c d>e", {"d": {"type": "delay", "config": {"seconds": 0.3}}}) for _ in range(3)]
    running, most, begun = 0, 0, time.monotonic()

    async def handle(_context: NodeContext) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    run_once(made(database, handle, concurrency=2))
    assert most == 2
    for run_id in run_ids:
        run, nodes = outcome(database, run_id)
        assert run.status is RunStatus.COMPLETED
        assert nodes["d"].duration_ms >= 290
    assert time.monotonic() - begun < 30


def test_sync_handlers_run_at_the_same_time(database: Database) -> None:
    new_run(database, "a b c")
    together = threading.Barrier(3)
    run_once(made(database, lambda _: together.wait(30) and None, concurrency=3))
    assert not together.broken


@KINDS
def test_exception_is_retried_and_permanent_error_is_not(database: Database, kind: str) -> None:
    run_id = new_run(database, "a", retry_backoff_base=0.05, max_retries_per_node=2)
    other_id = new_run(database, "b")

    def handle(context: NodeContext) -> dict[str, Any]:
        if context.node.id == "b":
            raise PermanentError("never")
        if context.attempt < 3:
            raise ConnectionError("not yet")
        return {"attempt": context.attempt}

    run_once(made(database, of_kind(kind, handle)))
    run, nodes = outcome(database, run_id)
    assert (run.status, run.lapsed_claims) == (RunStatus.COMPLETED, 0)
    assert (nodes["a"].retry_count, nodes["a"].output_data) == (2, {"attempt": 3})
    with database.session() as session:
        retries = [event for event in EventRepository(session).read(run_id=run_id).items if "retrying" in event.type]
    assert [event.data["error"] for event in retries] == ["ConnectionError: not yet"] * 2
    run, nodes = outcome(database, other_id)
    assert (run.status, run.error_message, nodes["b"].retry_count) == (RunStatus.FAILED, "never", 0)


def test_retry_that_comes_due_while_another_node_runs_is_not_delayed(database: Database) -> None:
    """And what starts meanwhile doesn't let it be forgotten."""
    run_id = new_run(database, "x y>z", retry_backoff_base=0.1)

    async def handle(context: NodeContext) -> None:
        if context.node.id == "x" and context.attempt == 1:
            await asyncio.sleep(0.02)
            raise ConnectionError("not yet")
        await asyncio.sleep({"x": 0, "y": 0.05, "z": 1.5}[context.node.id])

    run_once(made(database, handle))
    run, nodes = outcome(database, run_id)
    assert (run.status, run.claim_count) == (RunStatus.COMPLETED, 1)
    assert nodes["x"].completed_at is not None
    assert nodes["z"].completed_at is not None
    assert nodes["x"].completed_at < nodes["z"].completed_at - timedelta(seconds=0.5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"x": float("nan")}, "output.x"),
        ({"x": {1, 2}}, "output.x"),
        ({"x": "\0"}, "output.x"),
        (7, "the handler returned int"),
        (NodeResult(node_id="other", status="completed"), "a result of node 'other'"),
        (NodeResult(node_id="b", status="skipped"), "a node that was started can't be skipped"),
    ],
)
def test_outcome_that_cannot_be_stored_fails_the_node_and_no_other(
    database: Database, returned: Any, message: str
) -> None:
    run_id = new_run(database, "a b c")

    async def handle(context: NodeContext) -> Any:
        return returned if context.node.id == "b" else {"fine": True}

    run_once(made(database, handle))
    run, nodes = outcome(database, run_id)
    assert run.status is RunStatus.FAILED
    assert message in (run.error_message or "")
    assert {name: node.status.value for name, node in nodes.items()} == {
        "a": "completed",
        "b": "failed",
        "c": "completed",
    }
    assert nodes["b"].retry_count == 0


def test_handler_that_exits_or_cancels_itself_fails_its_node_alone(database: Database) -> None:
    run_id = new_run(database, "a b c", max_retries_per_node=0)

    async def handle(context: NodeContext) -> None:
        if context.node.id == "a":
            raise SystemExit(3)
        if context.node.id == "b":
            raise asyncio.CancelledError

    run_once(made(database, handle))
    assert {name: node.error_message for name, node in outcome(database, run_id)[1].items()} == {
        "a": "SystemExit: 3",
        "b": "CancelledError: ",
        "c": None,
    }


def test_node_result_of_a_handler_is_reported_as_it_is(database: Database) -> None:
    run_id = new_run(database, "a>b c", retry_backoff_base=0)

    async def handle(context: NodeContext) -> NodeResult:
        if context.node.id == "c" and context.attempt == 1:
            return NodeResult(node_id="c", status="failed", error="once more")
        return NodeResult(node_id=context.node.id, status="completed", output={"x": 1}, duration_ms=7)

    run_once(made(database, handle))
    run, nodes = outcome(database, run_id)
    assert run.status is RunStatus.COMPLETED
    assert [nodes[name].duration_ms for name in "abc"] == [7, 7, 7]
    assert nodes["c"].retry_count == 1


def test_partial_worker_fails_nodes_that_it_has_no_handler_for(database: Database) -> None:
    run_id = new_run(database, "a>b", {"b": {"type": "agent"}})
    other_id = new_run(database, "a>b", {"b": {"type": "agent"}})
    served = outcome(database, run_id)[0].pipeline_id
    handlers: dict[str, Callable[[NodeContext], Awaitable[None] | None]] = {"action": lambda _: None}
    run_once(Worker(database, handlers, partial=True, pipelines=[served]))
    assert outcome(database, run_id)[0].error_message == "the worker has no handler for nodes of type agent"
    assert outcome(database, other_id)[0].status is RunStatus.PENDING


def test_handlers_may_replace_what_types_do_without_one(database: Database) -> None:
    run_id = new_run(database, "t>d", {"t": {"type": "trigger"}, "d": {"type": "delay", "config": {"seconds": 3600}}})
    types = ["trigger", "delay", "agent", "action", "condition"]
    handlers = dict.fromkeys(types, lambda context: {"by": context.node.type})
    run_once(Worker(database, handlers))
    assert [node.output_data for node in outcome(database, run_id)[1].values()] == [{"by": "trigger"}, {"by": "delay"}]


def test_results_that_come_together_are_one_report(database: Database) -> None:
    run_id = new_run(database, "t>a t>b t>c t>d a>e b>e c>e d>e", {"t": {"type": "trigger"}})
    together = asyncio.Barrier(4)

    async def handle(context: NodeContext) -> None:
        if context.node.id != "e":
            await together.wait()

    run_once(made(database, handle))
    assert {node.status for node in outcome(database, run_id)[1].values()} == {NodeStatus.COMPLETED}
    with database.session() as session:
        events = EventRepository(session).read(run_id=run_id).items
    transactions = [event.cursor.split("-")[2] for event in events if event.type == "pipeline_node.completed"]
    assert [transactions.count(transaction) for transaction in dict.fromkeys(transactions)] == [1, 4, 1]


def test_worker_run_once_leaves_no_run_that_can_be_claimed(database: Database) -> None:
    run_ids = [new_run(database, "a>b") for _ in range(12)]
    run_once(made(database, lambda _: None, concurrency=1))
    assert {outcome(database, run_id)[0].status for run_id in run_ids} == {RunStatus.COMPLETED}


def test_reports_of_many_runs_share_commits(database: Database) -> None:
    run_ids = [new_run(database, "a>b") for _ in range(24)]
    together = asyncio.Barrier(24)
    inputs: list[Any] = []

    async def handle(context: NodeContext) -> dict[str, int]:
        await together.wait()
        inputs.append(context.inputs)
        return {"run": context.run.id}

    run_once(made(database, handle, concurrency=24))
    assert {outcome(database, run_id)[0].status for run_id in run_ids} == {RunStatus.COMPLETED}
    assert sorted(given["a"]["run"] for given in inputs if given) == run_ids
    with database.session() as session:
        events = EventRepository(session).read(limit=1000).items
    transactions = {event.cursor.split("-")[2] for event in events if event.type == "pipeline_node.completed"}
    assert len(transactions) < 24  # of 48 reports


def test_reports_of_many_runs_fit_a_small_pool(database_url: str) -> None:
    settings = DatabaseSettings(pool_size=2, max_overflow=0, pool_timeout=timedelta(seconds=2))
    with Database(database_url, settings=settings) as small:
        run_ids = [new_run(small, "a>b", max_retries_per_node=0) for _ in range(8)]
        together = asyncio.Barrier(8)

        async def handle(context: NodeContext) -> None:
            if context.node.id == "a":
                await together.wait()
                if context.run.id == run_ids[0]:  # a report that is sent by itself
                    raise PermanentError("no")

        run_once(made(small, handle, concurrency=8))
        ends = [outcome(small, run_id)[0].status for run_id in run_ids]
    assert ends == [RunStatus.FAILED, *[RunStatus.COMPLETED] * 7]
