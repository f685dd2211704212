"""Handlers: what is accepted as one, and the results that come of what it returns or raises."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gathering_pipeline import InvalidDataError, NodeResult, PermanentError, PipelineNode, StartedNode
from gathering_pipeline.worker.handlers import (
    NEEDED,
    Cancellation,
    check_handlers,
    failure_of,
    in_thread,
    result_of,
    result_without_handler,
)

STARTED = StartedNode(node_id="a", node_type="action", attempt=2, inputs={"t": {"x": 1}})
DONE = {"node_id": "a", "status": "completed", "attempt": 2}


@pytest.mark.parametrize(
    ("outcome", "more"),
    [
        (None, {}),
        ({}, {"output": {}}),
        ({"x": 1}, {"output": {"x": 1}}),
        (True, {"branch": True}),
        (False, {"branch": False}),
        ("Yes", {"branch": "Yes"}),
        (NodeResult(node_id="a", status="completed", output={"x": 1}), {"output": {"x": 1}}),
        (
            NodeResult(node_id="a", status="failed", attempt=1, retryable=False),
            {"status": "failed", "retryable": False},
        ),
    ],
)
def test_result_of_an_outcome(outcome: object, more: dict[str, Any]) -> None:
    assert result_of(outcome, STARTED) == DONE | more


@pytest.mark.parametrize("outcome", [1, [1], b"x", object(), NodeResult(node_id="b", status="completed")])
def test_result_of_what_is_no_outcome_is_refused(outcome: object) -> None:
    with pytest.raises(PermanentError, match="the handler returned"):
        result_of(outcome, STARTED)


def test_failure_of_an_exception_is_retryable_and_storable() -> None:
    failed = {"node_id": "a", "status": "failed", "attempt": 2}
    assert failure_of(ValueError("bad"), "a", 2) == failed | {"error": "ValueError: bad", "retryable": True}
    assert failure_of(PermanentError("bad"), "a", 2) == failed | {"error": "bad", "retryable": False}
    assert failure_of(ValueError("\0\ud800" + "x" * 100_000), "a", 2)["error"].startswith("ValueError: \\0\\ud800xx")


class Unreadable:
    def __str__(self) -> str:
        raise AttributeError("text")


@pytest.mark.parametrize("base", [Exception, PermanentError, SystemExit])
def test_failure_whose_message_cannot_be_read_is_reported(base: type[BaseException]) -> None:
    error: BaseException = type("Broken", (Unreadable, base), {})()
    assert "its message can't be read" in failure_of(error, "a", 2)["error"]

    def call() -> None:
        raise error

    async def awaited() -> None:
        await asyncio.wait_for(in_thread(call, lambda: None), 5)

    with pytest.raises(RuntimeError if base is SystemExit else type(error)):
        asyncio.run(awaited())


def test_node_without_handler_passes_its_inputs_on_or_fails() -> None:
    trigger = PipelineNode(id="a", type="parallel", name="A")
    assert result_without_handler(trigger, STARTED) == DONE | {"output": {"t": {"x": 1}}}
    agent = PipelineNode(id="a", type="agent", name="A")
    assert result_without_handler(agent, STARTED)["retryable"] is False


@pytest.mark.parametrize(
    ("handlers", "message"),
    [
        ({}, "handlers has no function for nodes of type action, agent, condition"),
        ({"agent": print, "condition": print}, "of type action"),
        ({"agnet": print}, "handlers\\['agnet'\\] is for no type of nodes; these are action, agent"),
        ({"agent": 1}, "handlers\\['agent'\\] must be a function, not int"),
        ([], "handlers must be a dict"),
    ],
)
def test_handlers_that_lack_a_type_or_are_none_are_refused(handlers: Any, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        check_handlers(handlers, NEEDED)


def test_in_thread_returns_and_raises_what_the_function_does() -> None:
    async def work() -> None:
        ended: list[int] = []
        assert await in_thread(threading.get_ident, lambda: ended.append(1)) != threading.get_ident()
        for error, expected in (
            (ValueError("x"), ValueError),
            (StopIteration(), RuntimeError),
            (SystemExit(), RuntimeError),
            (KeyboardInterrupt(), RuntimeError),
        ):

            def fail(error: BaseException = error) -> None:
                raise error

            with pytest.raises(expected):
                await in_thread(fail, lambda: ended.append(1))
        assert len(ended) == 5

    asyncio.run(work())


def test_in_thread_cancelled_leaves_the_thread_and_tells_its_end() -> None:
    async def work() -> None:
        go, ended = threading.Event(), asyncio.Event()
        call = asyncio.create_task(in_thread(go.wait, ended.set))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert not ended.is_set()
        go.set()
        await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(work())


def test_cancellation_is_seen_by_threads_and_tasks() -> None:
    async def work() -> None:
        cancelled = Cancellation()
        thread = asyncio.create_task(asyncio.to_thread(cancelled.wait, 10))
        task = asyncio.create_task(cancelled.wait_async())
        await asyncio.sleep(0)
        assert not cancelled.is_set()
        cancelled.set()
        assert await thread
        await task

    asyncio.run(work())
