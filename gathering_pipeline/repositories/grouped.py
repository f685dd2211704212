"""Group commit: ``advance`` of many concurrent callers in one statement and one commit.

A call that finds nothing under way is sent at once, as any call. Calls that arrive meanwhile are gathered: those that
wait go together into the next statement. Tasks have two statements under way, with half of the calls each, so that the
server executes one while the process handles the answers to the other; threads have one, and one of a lone caller. So a
lone caller pays nothing, and under load each commit carries many calls. What ``advance_many`` leaves out, its caller
sends by itself, on another connection; so a locked run keeps nobody waiting but its own caller.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, ExitStack
from functools import partial
from typing import Any, Generic, NoReturn, Self, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from gathering_pipeline.errors import (
    CommitIndeterminateError,
    DatabaseUnavailableError,
    ForkedConnectionError,
    PipelineError,
)
from gathering_pipeline.forks import renew_in_child
from gathering_pipeline.models import NodeExecutionResult, Step
from gathering_pipeline.repositories._call import Apart, ApartBlocking, finish
from gathering_pipeline.repositories.runs import AsyncRunRepository, EncodedReport, RunRepository, encode_report

OpenSession = Callable[[], AbstractContextManager[Session]]
OpenAsyncSession = Callable[[], AbstractAsyncContextManager[AsyncSession]]
Results = Iterable[NodeExecutionResult | Mapping[str, Any]]

LARGEST_BATCH = 256
"""Most calls of a statement; more would take longer than the commit that they share."""

CONNECTIONS = 2
"""Connections of the tasks of a group commit."""
SMALLEST_SHARE = 4
"""So many calls share a commit rather than a connection."""

_CLOSED = "the group commit is closed: call inside its block"

F = TypeVar("F", asyncio.Future[Step | None], Future[Step | None])


class _Queue(Generic[F]):
    """Calls that wait to be sent, each with the future of its answer; ``None`` as answer: send it by yourself."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[EncodedReport, F]] = deque()

    def __bool__(self) -> bool:
        """Whether a call waits whose caller still does."""
        return any(not answer.done() for _, answer in self._waiting)

    def add(self, report: EncodedReport, answer: F) -> None:
        self._waiting.append((report, answer))

    def take_batch(self, most: int = LARGEST_BATCH, apart_from: int | None = None) -> list[tuple[EncodedReport, F]]:
        """Take the calls of the next statement: one for each run at most, and none whose caller doesn't wait any more.

        Args:
            most: Number of calls.
            apart_from: A run that the statement has already.
        """
        batch: dict[int, tuple[EncodedReport, F]] = {}
        left: deque[tuple[EncodedReport, F]] = deque()
        while self._waiting and len(batch) < min(most, LARGEST_BATCH):
            report, answer = self._waiting.popleft()
            if answer.done():
                continue
            if report.run_id in batch or report.run_id == apart_from:
                left.append((report, answer))
            else:
                batch[report.run_id] = report, answer
        self._waiting.extendleft(reversed(left))
        return list(batch.values())

    def fail(self, message: str) -> None:
        """Answer every call that still waits: nothing of it was sent."""
        while self._waiting:
            _, answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(PipelineError(message))


def _refuse() -> NoReturn:
    raise ForkedConnectionError


def _answer(batch: Sequence[tuple[EncodedReport, F]], steps: Sequence[Step | None]) -> None:
    for (_, answer), step in zip(batch, steps, strict=True):
        if not answer.done():
            answer.set_result(step)


def _fail(batch: Sequence[tuple[EncodedReport, F]], error: BaseException) -> None:
    """Give each call an error of its own: one object, raised by many callers, would mix up their tracebacks."""
    for _, answer in batch:
        if not answer.done():
            kind = type(error) if isinstance(error, DatabaseUnavailableError) else CommitIndeterminateError
            one = kind(str(error) or "the call was interrupted: its outcome is unknown")
            one.__cause__ = error
            answer.set_exception(one)


# --- async -----------------------------------------------------------------------------------------------------------


class AsyncGroupCommit(AsyncRunRepository):
    """An ``AsyncRunRepository`` for many tasks at once: ``advance`` is gathered, each other call is sent by itself.

    Every call is a transaction of its own; its answer comes after the commit that holds it. A caller that is cancelled
    before its call is sent takes it out. If the connection breaks, exactly the calls that were sent raise
    ``CommitIndeterminateError``. In a forked child every call raises ``ForkedConnectionError``.
    """

    def __init__(self, open_session: OpenAsyncSession) -> None:
        self._transport = Apart(open_session)
        self._open_session = open_session
        self._queue: _Queue[asyncio.Future[Step | None]] = _Queue()
        self._opened = AsyncExitStack()
        self._is_open = False
        self._idle: list[AsyncRunRepository] = []
        self._calls = 0
        self._senders: set[asyncio.Task[None]] = set()
        self._closed = asyncio.Event()
        self._inherited: tuple[object, ...] = ()
        renew_in_child(self, AsyncGroupCommit._give_up)

    def _give_up(self) -> None:
        """Leave everything to the parent process, and refuse calls."""
        # kept: to drop the last reference to a session would end it here
        self._inherited = self._idle, self._opened, self._senders, self._queue, self._closed
        self._is_open = False
        self._opened, self._queue, self._idle, self._senders, self._calls = AsyncExitStack(), _Queue(), [], set(), 0
        self._transport = Apart(_refuse)

    async def __aenter__(self) -> Self:
        """Open the connections."""
        try:
            for _ in range(CONNECTIONS):
                session = await self._opened.enter_async_context(self._open_session())
                self._idle.append(AsyncRunRepository(session))
        except BaseException:
            await self._opened.aclose()
            raise
        self._is_open = True
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Answer what was called, and close the connections."""
        self._is_open = False  # no call begins any more
        try:
            if self._calls:
                await self._closed.wait()
        finally:
            self._queue.fail(_CLOSED)
            senders = list(self._senders)  # none, unless the wait was cancelled
            for sender in senders:
                sender.cancel()
            try:
                if senders:
                    await asyncio.wait(senders)
            finally:
                await self._opened.aclose()

    async def advance(
        self, run_id: int, results: Results = (), *, retry: bool = False, inputs: bool = False, token: int | None = None
    ) -> Step:
        """Do as ``AsyncRunRepository.advance``, in one commit with the calls of other tasks."""
        report = encode_report(run_id, results, token, retry=retry, inputs=inputs)
        if not self._is_open:
            raise ForkedConnectionError if self._inherited else PipelineError(_CLOSED)
        self._calls += 1
        try:
            return await self._gathered(report) or await self._advance(report)
        finally:
            self._calls -= 1
            self._tell_if_closed()

    def _tell_if_closed(self) -> None:
        if not self._is_open and not self._calls:
            self._closed.set()

    async def _gathered(self, report: EncodedReport) -> Step | None:
        """Send a call, or have it sent with others; ``None``: it has to be sent by itself."""
        if self._calls == 1 and self._idle:
            lone = self._idle.pop()
            try:
                return await lone._advance(report)  # noqa: SLF001 - the two are one piece
            finally:
                self._idle.append(lone)
                self._send_waiting()
        answer: asyncio.Future[Step | None] = asyncio.get_running_loop().create_future()
        self._queue.add(report, answer)
        self._send_waiting()
        return await answer

    def _send_waiting(self) -> None:
        if self._idle and self._queue:
            runs = self._idle.pop()
            sender = asyncio.create_task(self._send_batches(runs))
            self._senders.add(sender)
            sender.add_done_callback(partial(self._give_back, runs))

    def _give_back(self, runs: AsyncRunRepository, sender: asyncio.Task[None]) -> None:
        """Let the connection of a sender that has ended, or was cancelled before it began, be used again."""
        self._senders.discard(sender)
        self._idle.append(runs)
        if not sender.cancelled():
            self._send_waiting()

    async def _send_batches(self, runs: AsyncRunRepository) -> None:
        # a share of all calls, so that the others are sent, or their callers go on, meanwhile
        while batch := self._queue.take_batch(max(SMALLEST_SHARE, -(-self._calls // CONNECTIONS))):
            self._send_waiting()
            try:
                _answer(batch, await runs._advance_many([report for report, _ in batch]))  # noqa: SLF001
            except (CommitIndeterminateError, DatabaseUnavailableError) as error:
                _fail(batch, error)
            except Exception:  # noqa: BLE001 - nothing was changed: each gets its own answer, or its own error
                _answer(batch, [None] * len(batch))
            except BaseException as error:
                _fail(batch, error)
                raise
            await asyncio.sleep(0)  # the callers go on, and what they call at once is sent together


# --- threads ---------------------------------------------------------------------------------------------------------


class GroupCommit(RunRepository):
    """A ``RunRepository`` for many threads at once; see ``AsyncGroupCommit``.

    One of the threads whose calls wait leads: it sends its own call and those of all others that wait. When they have
    their answers, another one leads.
    """

    def __init__(self, open_session: OpenSession) -> None:
        self._bind(ApartBlocking(open_session))
        self._open_session = open_session
        self._queue: _Queue[Future[Step | None]] = _Queue()
        self._opened = ExitStack()
        self._lone: AsyncRunRepository | None = None
        self._batches: AsyncRunRepository | None = None
        self._is_lone = self._is_led = False
        self._changed = threading.Condition()
        self._inherited: tuple[object, ...] = ()
        renew_in_child(self, GroupCommit._give_up)

    def _give_up(self) -> None:
        """Leave everything to the parent process, and refuse calls."""
        # kept: to drop the last reference to a session would end it here
        self._inherited = self._lone, self._batches, self._opened, self._queue
        self._lone = self._batches = None
        self._opened, self._queue, self._changed = ExitStack(), _Queue(), threading.Condition()
        self._is_lone = self._is_led = False
        self._bind(ApartBlocking(_refuse))

    def __enter__(self) -> Self:
        """Open a connection for gathered calls, and one for a lone call."""
        try:
            self._lone = calls_on(self._opened.enter_context(self._open_session()))
            self._batches = calls_on(self._opened.enter_context(self._open_session()))
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        """Answer what was called, and close the connections."""
        try:
            with self._changed:
                self._lone = None  # no call begins any more
                self._changed.wait_for(lambda: not (self._is_lone or self._is_led or self._queue))
        finally:
            with self._changed:
                self._queue.fail(_CLOSED)
                self._changed.notify_all()
            self._opened.close()

    def advance(
        self, run_id: int, results: Results = (), *, retry: bool = False, inputs: bool = False, token: int | None = None
    ) -> Step:
        """Do as ``RunRepository.advance``, in one commit with the calls of other threads."""
        report = encode_report(run_id, results, token, retry=retry, inputs=inputs)
        if self._lone is None:
            raise ForkedConnectionError if self._inherited else PipelineError(_CLOSED)
        if step := self._gathered(report):
            return step
        with self._open_session() as session:
            return finish(calls_on(session)._advance(report))  # noqa: SLF001 - the two are one piece

    def _gathered(self, report: EncodedReport) -> Step | None:
        """Send a call, or wait until another thread has sent it; ``None``: it has to be sent by itself."""
        answer: Future[Step | None] = Future()
        batch: list[tuple[EncodedReport, Future[Step | None]]] = []
        alone = leads = False
        try:  # an interrupt can come between any two lines
            with self._changed:
                lone = self._lone
                if lone is None:  # closed since
                    raise PipelineError(_CLOSED)
                alone = not self._is_lone and not self._is_led
                if alone:
                    self._is_lone = True
                else:
                    self._queue.add(report, answer)
            if alone:
                return finish(lone._advance(report))  # noqa: SLF001
            with self._changed:
                self._changed.wait_for(lambda: answer.done() or not self._is_led)
                if answer.done():
                    return answer.result()
                answer.cancel()  # takes the call out of the queue
                leads = self._is_led = True
                batch = self._queue.take_batch(apart_from=report.run_id)
            return self._lead(report, batch)
        finally:
            with self._changed:
                answer.cancel()
                if alone:
                    self._is_lone = False
                if leads:
                    self._is_led = False
                _fail(batch, CommitIndeterminateError("the thread that sent the call was interrupted"))
                self._changed.notify_all()

    def _lead(self, report: EncodedReport, others: list[tuple[EncodedReport, Future[Step | None]]]) -> Step | None:
        assert self._batches is not None, "the block was entered"
        reports = [report, *(other for other, _ in others)]
        try:
            step, *steps = finish(self._batches._advance_many(reports))  # noqa: SLF001
        except (CommitIndeterminateError, DatabaseUnavailableError) as error:
            with self._changed:
                _fail(others, error)
            raise
        except Exception:  # noqa: BLE001 - nothing was changed: each gets its own answer, or its own error
            with self._changed:
                _answer(others, [None] * len(others))
            return None
        except BaseException as error:
            with self._changed:
                _fail(others, error)
            raise
        with self._changed:
            _answer(others, steps)
        return step


def calls_on(session: Session) -> AsyncRunRepository:
    """The repository behind a sync one: its coroutines never wait."""
    calls = RunRepository(session)._calls  # noqa: SLF001
    assert isinstance(calls, AsyncRunRepository), "that is its source"
    return calls
