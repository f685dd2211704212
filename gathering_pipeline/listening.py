"""The loops behind ``Database.listen`` and ``Database.alisten``: poll, wait, reconnect.

A sync listener keeps one connection. The async listeners of a process share one: a reader reads each new event once and
keeps the last of them (``Feed``). A listener reads by itself, through the pool, until it has come to what the reader
keeps; from then on it takes the events from there. One that falls further behind reads by itself again. So nobody waits
for a slow listener, and what it has not taken yet needs no memory.

The connection is kept so that a notification (off by default, see ``circle.notify_events``) can end a wait early. No
listener depends on notifications: behind a pooler that drops them, and on a standby, it polls.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psycopg
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from gathering_pipeline.arguments import check_duration
from gathering_pipeline.connections import check_asyncio
from gathering_pipeline.errors import DatabaseError, ForkedConnectionError, PipelineError, is_transient
from gathering_pipeline.events import EventPage, PipelineEvent
from gathering_pipeline.repositories import AsyncEventRepository, EventRepository
from gathering_pipeline.repositories.events import order_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

logger = logging.getLogger(__name__)

Events = Generator[PipelineEvent, None, None]
AsyncEvents = AsyncGenerator[PipelineEvent, None]

POLL = timedelta(seconds=0.5)
PAGE = 500
KEPT = 4 * PAGE
"""Events that the reader keeps for listeners, at least; at most twice as many."""
READS = 4
"""Connections of the pool that async listeners use at most to read by themselves."""
PAUSE = 0.25
"""Seconds between attempts to get a new connection; half of it to one and a half, at random."""
RUN_CHECK = 30.0
"""Seconds after which a listener to one run asks whether the run still exists: no event tells that it was deleted."""
LISTEN = "LISTEN circle_events"
REFUSED = psycopg.errors.ReadOnlySqlTransaction
"""What a standby answers to LISTEN: it is polled."""
ERRORS = (PipelineError, psycopg.Error, exc.DBAPIError, exc.TimeoutError)


class _Position:
    """State of a listener that outlives its connections: position in the events, and whether a read has succeeded."""

    def __init__(self, run_id: int | None, after: str | None, poll: timedelta) -> None:
        self.wait = check_duration(poll, "poll")
        self.run_id = run_id
        self.after = after
        self.started = self.caught_up = False
        self._check_run_at = 0.0
        self._pid = os.getpid()

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the next read."""
        return {"after": self.after, "limit": PAGE, "run_id": self.run_id}

    def asks_for_run(self, page: EventPage) -> bool:
        """Whether to ask if the run goes on, because there was nothing else to read."""
        if self.seconds_to_check() != 0 or len(page.items) == PAGE or any(event.ends_run for event in page.items):
            return False
        self._check_run_at = time.monotonic() + RUN_CHECK
        return True

    def seconds_to_check(self) -> float | None:
        """Seconds until the listener asks whether its run goes on; None: it listens to all runs."""
        return None if self.run_id is None else max(self._check_run_at - time.monotonic(), 0)

    def passed(self, event: PipelineEvent) -> bool:
        """Go on after an event that was yielded; whether it is the last one.

        Raises:
            ForkedConnectionError: The process was forked: parent and child would both process each event from here on.
        """
        self._check_process()
        return self.run_id is not None and event.ends_run

    def can_reconnect(self, error: Exception) -> bool:
        """Whether to reconnect after an error: a read has succeeded before, and the error may be temporary."""
        self._check_process()
        if not (self.started and _may_pass(error)):
            return False
        logger.warning("listening was interrupted and reconnects: %s", error)
        return True

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedConnectionError


def _may_pass(error: Exception) -> bool:
    gone = isinstance(error, (DatabaseError, exc.TimeoutError)) or is_transient(error)
    return gone or (isinstance(error, psycopg.OperationalError) and error.sqlstate is None)


def _pause() -> float:
    return PAUSE * random.uniform(0.5, 1.5)  # noqa: S311 - no secret


def listen(engine: Engine, run_id: int | None, after: str | None, poll: timedelta) -> Events:
    """See ``Database.listen``."""
    position = _Position(run_id, after, poll)
    while True:
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                try:
                    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
                    with suppress(REFUSED):
                        driver.execute(LISTEN)
                    while True:
                        with Session(connection) as session:
                            events = EventRepository(session)
                            page = events.read(**position.arguments)
                            position.started = True
                            asks = position.asks_for_run(page)
                            if run_id is not None and asks and events.is_over(run_id, page.next_cursor):
                                return
                        for event in page.items:
                            position.after = event.cursor
                            yield event
                            if position.passed(event):
                                return
                        position.after = page.next_cursor
                        if len(page.items) < PAGE:
                            for _ in driver.notifies(timeout=position.wait, stop_after=1):
                                pass
                finally:
                    connection.invalidate()  # don't return a LISTENing connection to the pool
        except ERRORS as error:
            if not position.can_reconnect(error):
                raise
        time.sleep(_pause())


class Feed:
    """What the async listeners of one engine share: the reader, and the events that it has read last.

    All of it happens in one event loop, so nothing is locked.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._place = os.getpid(), asyncio.get_running_loop()
        self._own_reads = asyncio.Semaphore(READS)
        self._polls: list[float] = []
        self._poll = 0.0
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._events: list[PipelineEvent] = []
        self._orders: list[tuple[int, int]] = []
        self._cursor = ""
        self._begin: tuple[int, int] = 0, 0

    def is_of_caller(self) -> bool:
        """Whether it belongs to the process and event loop of the caller."""
        return self._place == (os.getpid(), asyncio.get_running_loop())

    @asynccontextmanager
    async def joined(self, poll: float) -> AsyncIterator[None]:
        """Count as a listener in a block: the last one to leave ends the reader."""
        self._polls.append(poll)
        if self._is_running() and poll < self._poll:  # it may be in a long wait
            self._restart()
        try:
            yield
        finally:
            if self._place[0] == os.getpid():  # in a forked child the reader is the parent's
                self._polls.remove(poll)
                if not self._polls and self._reader is not None:
                    reader, self._reader = self._reader, None
                    reader.cancel()
                    await asyncio.wait([reader])

    async def page(self, position: _Position) -> tuple[EventPage, bool]:
        """Get the next events of a listener; tell as well whether its run has no further event."""
        after = position.after
        if position.caught_up and after and not self._is_running():
            self._start(after)
        while position.caught_up and after and self._holds(after) and position.seconds_to_check() != 0:
            page = self._take(after, position.run_id)
            if page.items:
                return page, False
            position.after = after = page.next_cursor
            with suppress(TimeoutError):
                async with asyncio.timeout(position.seconds_to_check()):
                    await self._news.wait()
        async with self._own_reads, AsyncSession(self._autocommit, close_resets_only=False) as session:
            events = AsyncEventRepository(session)
            page = await events.read(**position.arguments)
            position.started = True
            asks = position.asks_for_run(page)
            over = position.run_id is not None and asks and await events.is_over(position.run_id, page.next_cursor)
        position.caught_up = len(page.items) < PAGE
        return page, over

    def _holds(self, cursor: str) -> bool:
        """Whether the reader runs and every event after a cursor is, or will be, among those that it keeps."""
        return self._is_running() and self._begin <= order_of(cursor)

    def _take(self, after: str, run_id: int | None) -> EventPage:
        """The events after a cursor, of one run or of all, among those that the reader keeps."""
        place = bisect_right(self._orders, order_of(after))
        own = tuple(event for event in self._events[place:] if run_id in (None, event.run_id))
        return EventPage(items=own, next_cursor=max(self._cursor, after, key=order_of))

    def _is_running(self) -> bool:
        return self._reader is not None and not self._reader.done()

    def _start(self, cursor: str) -> None:
        self._events, self._orders = [], []
        self._cursor, self._begin = cursor, order_of(cursor)
        self._restart()

    def _restart(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self._poll = min(self._polls)
        self._reader = asyncio.create_task(self._read(), name="reader of events")

    async def _read(self) -> None:
        try:
            while True:
                try:
                    await self._read_on_one_connection()
                except ERRORS as error:
                    logger.warning("the shared reader of events was interrupted: %s", error)
                    await asyncio.sleep(_pause())
                    if not _may_pass(error):
                        return  # its listeners read by themselves, and raise what is theirs
        finally:
            self._wake()

    async def _read_on_one_connection(self) -> None:
        async with self._autocommit.connect() as connection:
            try:
                driver: psycopg.AsyncConnection[Any]
                driver = (await connection.get_raw_connection()).driver_connection  # type: ignore[assignment]
                with suppress(REFUSED):
                    await driver.execute(LISTEN)
                while True:
                    async with AsyncSession(connection) as session:
                        page = await AsyncEventRepository(session).read(self._cursor, PAGE)
                    self._publish(page)
                    if len(page.items) < PAGE:
                        async for _ in driver.notifies(timeout=self._poll, stop_after=1):
                            pass
            finally:
                await connection.invalidate()

    def _publish(self, page: EventPage) -> None:
        if page.next_cursor == self._cursor:
            return
        self._events += page.items
        self._orders += [order_of(event.cursor) for event in page.items]
        self._cursor = page.next_cursor
        if (surplus := len(self._events) - KEPT) > KEPT:
            self._begin = self._orders[surplus - 1]
            del self._events[:surplus], self._orders[:surplus]
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


_feeds: WeakKeyDictionary[AsyncEngine, Feed] = WeakKeyDictionary()


def feed_of(engine: AsyncEngine) -> Feed:
    """What the async listeners of an engine share in this process and event loop."""
    feed = _feeds.get(engine)
    if feed is None or not feed.is_of_caller():
        feed = _feeds[engine] = Feed(engine)
    return feed


async def alisten(engine: AsyncEngine, run_id: int | None, after: str | None, poll: timedelta) -> AsyncEvents:
    """See ``Database.alisten``."""
    check_asyncio()
    position = _Position(run_id, after, poll)
    feed = feed_of(engine)
    async with feed.joined(position.wait):
        while True:
            try:
                page, over = await feed.page(position)
            except ERRORS as error:
                if not position.can_reconnect(error):
                    raise
                await asyncio.sleep(_pause())
                continue
            for event in page.items:
                position.after = event.cursor
                yield event
                if position.passed(event):
                    return
            position.after = page.next_cursor
            if over:
                return
