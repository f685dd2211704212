"""Handlers: the functions that execute nodes, what they get, and the results that come of what they return or raise."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from gathering_pipeline import (
    ClaimedRun,
    InvalidDataError,
    NodeExecutionResult,
    PermanentError,
    PipelineNode,
    RunRead,
    StartedNode,
)

T = TypeVar("T")
Handler = Callable[["NodeContext"], object]
"""Returns, or returns a coroutine that returns, a dict, a ``NodeResult``, a bool, a text or None."""
Result = dict[str, Any]
"""What ``advance`` takes."""

NODE_TYPES: frozenset[str] = frozenset(get_args(PipelineNode.model_fields["type"].annotation))
DELAY = "delay"
NEEDED = NODE_TYPES - {"trigger", "parallel", DELAY}
"""Types of nodes that need a handler. A delay waits without one, and the others complete at once."""

MAX_TEXT = 10_000
"""Longest error text in characters."""


class Cancellation(threading.Event):
    """Set once the handlers of a run have to stop; for threads and for tasks.

    ``is_set()`` asks, ``wait(timeout)`` blocks a thread, and ``await wait_async()`` a task.
    """

    def __init__(self) -> None:
        super().__init__()
        self._for_tasks = asyncio.Event()

    def set(self) -> None:
        """Wake all that wait; called in the event loop."""
        super().set()
        self._for_tasks.set()

    async def wait_async(self) -> None:
        """Wait until it is set."""
        await self._for_tasks.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeContext:
    """What a handler gets: one attempt of a node.

    Attributes:
        run: The run as it was claimed; its input is ``run.trigger_data``.
        node: The node in the run's graph. Other attempts get the same object: don't change it.
        inputs: The outputs of the completed predecessors, by node id.
        attempt: Number of the attempt, 1 for the first.
        cancelled: Set once the result is of no use any more: the run was cancelled or timed out, another worker holds
            it, or this worker stops. An async handler is cancelled then; a sync one has to look.
    """

    run: RunRead
    node: PipelineNode
    inputs: Mapping[str, Any]
    attempt: int
    cancelled: Cancellation

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the node."""
        return self.node.config

    @property
    def token(self) -> int | None:
        """The token of the claim, which calls on the run need, such as ``append_log``; None: nobody has claimed it."""
        return self.run.token if isinstance(self.run, ClaimedRun) else None


def check_handlers(handlers: Mapping[str, Handler], needed: Iterable[str]) -> dict[str, Handler]:
    """Check the handlers of node types.

    Raises:
        InvalidDataError: They are no mapping of node types to functions, or one that is needed is missing.
    """
    if not isinstance(handlers, Mapping):
        raise InvalidDataError(f"handlers must be a dict of node types and functions, not {type(handlers).__name__}")
    for node_type, handler in handlers.items():
        if node_type not in NODE_TYPES:
            raise InvalidDataError(
                f"handlers[{node_type!r:.100}] is for no type of nodes; these are {', '.join(sorted(NODE_TYPES))}"
            )
        if not callable(handler):
            raise InvalidDataError(f"handlers[{node_type!r}] must be a function, not {type(handler).__name__}")
    if missing := sorted(set(needed) - handlers.keys()):
        raise InvalidDataError(f"handlers has no function for nodes of type {', '.join(missing)}")
    return dict(handlers)


# --- results ---------------------------------------------------------------------------------------------------------


def result_of(outcome: object, started: StartedNode) -> Result:
    """Make the result to report from what a handler returned.

    Raises:
        PermanentError: It can't be one.
    """
    result: Result = {"node_id": started.node_id, "status": "completed", "attempt": started.attempt}
    if isinstance(outcome, NodeExecutionResult):
        if outcome.node_id != started.node_id:
            raise PermanentError(f"the handler returned a result of node {outcome.node_id!r:.100}")
        if outcome.status == "skipped":  # would be refused, and the node executed again and again
            raise PermanentError("the handler returned skipped: a node that was started can't be skipped")
        return outcome.model_dump(exclude_unset=True) | {"attempt": started.attempt}
    if isinstance(outcome, bool | str):
        return result | {"branch": outcome}
    if isinstance(outcome, Mapping):
        return result | {"output": dict(outcome)}
    if outcome is not None:
        raise PermanentError(
            f"the handler returned {type(outcome).__name__}: a dict, a NodeResult, a bool, a label or None is expected"
        )
    return result


def failure_of(error: BaseException, node_id: str, attempt: int) -> Result:
    """Make the result to report from what a handler raised: retryable unless it is a ``PermanentError``."""
    is_permanent = isinstance(error, PermanentError)
    text = _message(error) if is_permanent else f"{type(error).__name__}: {_message(error)}"
    storable = text[:MAX_TEXT].replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return {
        "node_id": node_id,
        "status": "failed",
        "attempt": attempt,
        "error": storable,
        "retryable": not is_permanent,
    }


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - of a class of a user, and the failure is to be reported
        return "its message can't be read"


def result_without_handler(node: PipelineNode, started: StartedNode) -> Result:
    """Make the result of a node whose type has no handler: its inputs are its output."""
    if node.type in NEEDED:
        error = PermanentError(f"the worker has no handler for nodes of type {node.type}")
        return failure_of(error, node.id, started.attempt)
    return result_of(started.inputs or {}, started)


# --- slots and threads -----------------------------------------------------------------------------------------------


class Slots:
    """One for each handler that may run at the same time.

    Attributes:
        free: How many are free.
    """

    def __init__(self, number: int) -> None:
        self.free = number
        self._semaphore = asyncio.Semaphore(number)

    async def acquire(self) -> None:
        """Wait for a slot."""
        await self._semaphore.acquire()
        self.free -= 1

    def release(self) -> None:
        """Give a slot back."""
        self.free += 1
        self._semaphore.release()


async def in_thread(call: Callable[[], T], at_end: Callable[[], None]) -> T:
    """Run a function in a thread of its own.

    If it is cancelled, the thread goes on, and neither the event loop nor the end of the process waits for it.

    Args:
        call: The function.
        at_end: Called in the event loop when the function has ended, whether or not its result is waited for.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        at_end()
        if answer.cancelled():
            return
        if error is None:
            answer.set_result(result)  # type: ignore[arg-type]  # without an error there is a result
        else:
            answer.set_exception(error)

    def work() -> None:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = context.run(call)
        except BaseException as error:  # noqa: BLE001 - it is raised where the function was called
            failure = RuntimeError(f"{type(error).__name__}: {_message(error)}")
            if isinstance(error, Exception) and not isinstance(error, StopIteration):  # others would end more than that
                failure = error
        with suppress(RuntimeError):  # the loop is closed: nothing waits
            loop.call_soon_threadsafe(settle, result, failure)

    context = contextvars.copy_context()
    try:
        threading.Thread(target=work, name="handler of a node", daemon=True).start()
    except RuntimeError:  # the process has too many threads
        at_end()
        raise
    return await answer
