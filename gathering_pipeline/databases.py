"""``Databases``: many ordinary databases, of one tenant or one share of the pipelines each.

Each call is one statement on one database, so guards, leases, transactions and cursors stay exact; nothing spans
databases. A database that has nothing to claim, or that can't be used, is asked again after a pause that doubles.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self, TypeVar

import psycopg
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from gathering_pipeline.arguments import check_duration, check_type
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    ConfigurationError,
    DatabaseError,
    ForkedConnectionError,
    InvalidCursorError,
    InvalidDataError,
    shorten,
)
from gathering_pipeline.events import EventPage, PipelineEvent
from gathering_pipeline.forks import renew_in_child
from gathering_pipeline.listening import PAGE, POLL
from gathering_pipeline.models import ClaimedRun, RunRead
from gathering_pipeline.repositories import AsyncEventRepository, AsyncRunRepository, EventRepository
from gathering_pipeline.repositories._call import finish
from gathering_pipeline.repositories.grouped import calls_on
from gathering_pipeline.settings import DatabaseSettings
from gathering_pipeline.urls import parse_url

R = TypeVar("R", bound=RunRead)

logger = logging.getLogger(__name__)

IDLE_LIMIT = timedelta(seconds=30)
"""``idle_limit`` where the settings have none."""
SHORTEST_PAUSE = 0.1
"""Seconds until a database that had nothing to claim is asked again, at first."""
SHORTEST_BACKOFF = 1.0
"""Seconds until a database that failed is tried again, at first."""
FAILURES = (DatabaseError, psycopg.Error, DBAPIError)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What ``Databases.recover``, ``expire`` or ``sweep`` did.

    Attributes:
        runs: The runs that were released or ended, each with the name of its database.
        failed: Why a database was not swept, by its name; it may have failed before, and was left alone this time.
    """

    runs: tuple[tuple[str, RunRead], ...]
    failed: Mapping[str, Exception]


class Databases:
    """Many databases, each opened on first use: ``databases[name]`` is a ``Database``.

    Use it as a sync or async context manager, or call ``dispose`` or ``adispose`` at the end. Threads and tasks may
    share it. After ``os.fork`` each process has connections of its own, as with ``Database``.

    A database that nobody uses has at most one connection of this process after a second (one more if both sync and
    async calls were made), and none after ``idle_limit``.

    A database that fails keeps the others waiting for its own ``connect_timeout``, or, where an open connection falls
    silent, ``answer_timeout`` plus 3 s. It is left alone then for a second, and after each further failure twice as
    long, up to ``longest_backoff``.

    Args:
        urls: The URL of each database by its name.
        settings: Of every database; None: read from the environment, without its URLs. ``idle_limit`` is 30 s unless
            they set it.
        longest_pause: Longest time for which ``claim`` leaves a database alone that had nothing to claim. The first
            pause is 0.1 s, each further one twice as long; all vary by half, so that workers don't ask at once.
        longest_backoff: Longest time for which a database is left alone that failed.

    Raises:
        ConfigurationError: A URL or a variable can't be used, or there is no URL; the message has the name.
        InvalidDataError: Another argument can't be used.
    """

    def __init__(
        self,
        urls: Mapping[str, str | URL],
        *,
        settings: DatabaseSettings | None = None,
        longest_pause: timedelta = timedelta(seconds=5),
        longest_backoff: timedelta = timedelta(seconds=60),
    ) -> None:
        check_type(urls, Mapping, "urls", "{'a': 'postgresql://...'} has one")
        if not urls:
            raise ConfigurationError("there is no database: urls is empty")
        found = settings or DatabaseSettings.load(database_url=None)
        self.settings = found.model_copy(update={"idle_limit": found.idle_limit or IDLE_LIMIT})
        pause, backoff = (
            check_duration(longest_pause, "longest_pause"),
            check_duration(longest_backoff, "longest_backoff"),
        )
        self._places = [
            _Place(
                _check_name(name),
                parse_url(url, f"the URL of {name}"),
                _Pause(SHORTEST_PAUSE, pause),
                _Pause(SHORTEST_BACKOFF, backoff),
            )
            for name, url in urls.items()
        ]
        self._by_name = {place.name: place for place in self._places}
        self._turn = random.randrange(len(self._places))  # noqa: S311 - so that workers begin at different ones
        self._lock = threading.Lock()
        renew_in_child(self, Databases._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        for place in self._places:
            place.is_tried = False  # by a thread of the parent

    def __getitem__(self, name: str) -> Database:
        """The database with this name.

        Raises:
            ConfigurationError: There is none.
        """
        place = self._by_name.get(name)
        if place is None:
            raise ConfigurationError(
                f"there is no database {name!r}: there are {shorten(', '.join(self._by_name), 500)}"
            )
        with self._lock:
            if place.database is None:
                place.database = Database(place.url, settings=self.settings)
            return place.database

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._by_name)

    def __len__(self) -> int:
        """The number of databases."""
        return len(self._places)

    def __repr__(self) -> str:
        return f"Databases({shorten(', '.join(self._by_name), 200)})"

    # --- claims and sweeps ---

    def claim(
        self, worker_id: str, lease: timedelta, limit: int = 1, *, max_claims: int = 10
    ) -> list[tuple[str, ClaimedRun]]:
        """Claim runs of the next database that has some; see ``RunRepository.claim``.

        The databases take turns: each call begins after the one at which the last call ended. A database that had
        nothing to claim or failed is passed over until its pause is over, so a call that finds nothing costs little.

        Args:
            worker_id: Name of the worker, at most 255 characters.
            lease: How long the claim lasts without ``heartbeat``.
            limit: Most runs to claim.
            max_claims: For the sweep that a claim begins with: a run whose lease ran out so often fails.

        Returns:
            The claimed runs, each with the name of its database, which is the same for all of a call. Empty: wait a
            moment, and call again.
        """
        return finish(self._claim(_blocking, lambda runs: runs.claim(worker_id, lease, limit, max_claims=max_claims)))

    async def aclaim(
        self, worker_id: str, lease: timedelta, limit: int = 1, *, max_claims: int = 10
    ) -> list[tuple[str, ClaimedRun]]:
        """The async twin of ``claim``."""
        return await self._claim(_awaiting, lambda runs: runs.claim(worker_id, lease, limit, max_claims=max_claims))

    def end_pauses(self) -> None:
        """Let the next ``claim`` ask the databases, too, that had nothing to claim a moment ago."""
        with self._lock:
            for place in self._places:
                place.pause.end()

    def recover(self, limit: int = 60, max_claims: int = 10) -> SweepResult:
        """Release runs whose lease expired, in every database that can be used; see ``RunRepository.recover``.

        Claims do so, too, in the databases that they ask. A call opens a connection to each database.
        """
        return finish(self._sweep(_blocking, lambda runs: runs.recover(limit, max_claims)))

    async def arecover(self, limit: int = 60, max_claims: int = 10) -> SweepResult:
        """The async twin of ``recover``."""
        return await self._sweep(_awaiting, lambda runs: runs.recover(limit, max_claims))

    def expire(self, limit: int = 60) -> SweepResult:
        """End runs that are past their time limit, in every database that can be used; see ``RunRepository.expire``.

        Claims do so, too, as for ``recover``.
        """
        return finish(self._sweep(_blocking, lambda runs: runs.expire(limit)))

    async def aexpire(self, limit: int = 60) -> SweepResult:
        """The async twin of ``expire``."""
        return await self._sweep(_awaiting, lambda runs: runs.expire(limit))

    def sweep(self, limit: int = 30, max_claims: int = 10) -> SweepResult:
        """Do as ``recover`` and ``expire``, in turns with all workers of each database; see ``RunRepository.sweep``."""
        return finish(self._sweep(_blocking, lambda runs: runs.sweep(limit, max_claims)))

    async def asweep(self, limit: int = 30, max_claims: int = 10) -> SweepResult:
        """The async twin of ``sweep``."""
        return await self._sweep(_awaiting, lambda runs: runs.sweep(limit, max_claims))

    async def _claim(self, send: _Send, call: _Call[ClaimedRun]) -> list[tuple[str, ClaimedRun]]:
        for _ in self._places:
            with self._lock:
                place = self._places[self._turn]
                self._turn = (self._turn + 1) % len(self._places)
            if place.pause.is_over and place.can_be_tried:
                with place.attempt():
                    if runs := await send(self[place.name], call):
                        place.pause.end()
                        return [(place.name, run) for run in runs]
                    place.pause.lengthen()
        return []

    async def _sweep(self, send: _Send, call: _Call[RunRead]) -> SweepResult:
        swept: list[tuple[str, RunRead]] = []
        failed: dict[str, Exception] = {}
        for place in self._places:
            if place.can_be_tried:
                with place.attempt():
                    if runs := await send(self[place.name], call):
                        place.pause.end()  # they may be claimed now
                        swept += [(place.name, run) for run in runs]
            if place.failure is not None:
                failed[place.name] = place.failure
        return SweepResult(tuple(swept), failed)

    # --- events ---

    def listen(
        self, after: Mapping[str, str] | None = None, poll: timedelta = POLL
    ) -> Generator[tuple[str, PipelineEvent], None, None]:
        """Yield every event of every database once, forever; survives restarts of the servers.

        The events of one database come in the order of ``EventRepository.read``; between databases there is no order.
        The databases are read one after the other, ``poll`` after the last read of each.

        Args:
            after: The ``cursor`` of the last event that was processed, by the name of its database; a database that it
                doesn't have is read from its oldest stored event.
            poll: Pause between two reads of a database.

        Yields:
            The name of the database, and the event.

        Raises:
            InvalidCursorError: A cursor is not one of its database; the message has the name.
            InvalidDataError: ``after`` has a name that is no database.
            ForkedConnectionError: The process was forked since the first event; only the parent can go on.
        """
        feed = _Feed(self._by_name, after, poll)
        while True:
            for place in feed.due():
                pages = []
                with place.attempt(), feed.named_errors(place), self[place.name].session(autocommit=True) as session:
                    pages.append(EventRepository(session).read(feed.cursors.get(place.name), PAGE))
                for page in pages:
                    for event in page.items:
                        yield place.name, event
                        feed.was_processed(place, event)
                    feed.was_read(place, page)
            time.sleep(feed.pause())

    async def alisten(
        self, after: Mapping[str, str] | None = None, poll: timedelta = POLL
    ) -> AsyncGenerator[tuple[str, PipelineEvent], None]:
        """The async twin of ``listen``."""
        feed = _Feed(self._by_name, after, poll)
        while True:
            for place in feed.due():
                pages = []
                with place.attempt(), feed.named_errors(place):
                    async with self[place.name].async_session(autocommit=True) as session:
                        pages.append(await AsyncEventRepository(session).read(feed.cursors.get(place.name), PAGE))
                for page in pages:
                    for event in page.items:
                        yield place.name, event
                        feed.was_processed(place, event)
                    feed.was_read(place, page)
            await asyncio.sleep(feed.pause())

    # --- the end ---

    def dispose(self) -> None:
        """Close all idle connections. The object can be used again."""
        with ExitStack() as stack:
            for place in self._places:
                if place.database is not None:
                    stack.callback(place.database.dispose)

    async def adispose(self) -> None:
        """``dispose`` without blocking the event loop."""
        async with AsyncExitStack() as stack:
            for place in self._places:
                if place.database is not None:
                    stack.push_async_callback(place.database.adispose)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.adispose()


# --- one database ----------------------------------------------------------------------------------------------------

_Call = Callable[[AsyncRunRepository], Coroutine[Any, Any, list[R]]]


class _Send(Protocol):
    """Makes a call on the runs of a database."""

    def __call__(self, database: Database, call: _Call[R], /) -> Coroutine[Any, Any, list[R]]: ...


async def _blocking(database: Database, call: _Call[R]) -> list[R]:
    """Never waits, so that ``finish`` can run it."""
    with database.session(autocommit=True) as session:
        return await call(calls_on(session))


async def _awaiting(database: Database, call: _Call[R]) -> list[R]:
    async with database.async_session(autocommit=True) as session:
        return await call(AsyncRunRepository(session))


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidDataError(f"the names in urls must be strings that are not empty, not {name!r}")
    return name


class _Pause:
    """A pause that doubles each time; it varies by half, so that the processes don't end theirs at the same moment."""

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest, self._longest = min(shortest, longest), longest
        self._seconds = 0.0
        self.until = 0.0

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def lengthen(self) -> float:
        """Begin the next pause, and return its length in seconds."""
        self._seconds = min(max(2 * self._seconds, self._shortest), self._longest)
        seconds = self._seconds * random.uniform(0.5, 1)  # noqa: S311 - only spreads the calls
        self.until = time.monotonic() + seconds
        return seconds

    def end(self) -> None:
        self._seconds = self.until = 0.0


@dataclass(slots=True)
class _Place:
    """A database, and when it may be asked again.

    Attributes:
        pause: Since it had nothing to claim.
        backoff: Since it failed.
        failure: Why the last call failed; ``None``: it succeeded.
        is_tried: Whether a call tries just now if it works again: the others don't wait for that.
    """

    name: str
    url: URL
    pause: _Pause
    backoff: _Pause
    database: Database | None = None
    failure: Exception | None = None
    is_tried: bool = False

    @property
    def can_be_tried(self) -> bool:
        return not self.is_tried and self.backoff.is_over

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Note whether a call succeeds; an error of the database goes no further."""
        self.is_tried = self.failure is not None
        try:
            yield
        except FAILURES as error:
            self.failure = error
            pause = self.backoff.lengthen()
            logger.warning("database %s failed, next attempt in %.1f s: %s", self.name, pause, error)
        else:
            self.failure = None
            self.backoff.end()
        finally:
            self.is_tried = False


class _Feed:
    """State of a loop over the events: the position in each database, and when it is read next."""

    def __init__(self, places: Mapping[str, _Place], after: Mapping[str, str] | None, poll: timedelta) -> None:
        self._poll = check_duration(poll, "poll")
        self.cursors: dict[str, str] = dict(after or {})
        if unknown := self.cursors.keys() - places.keys():
            raise InvalidDataError(f"after has a cursor of {min(unknown)!r}, which is no database: leave it out")
        self._places = list(places.values())
        self._next = dict.fromkeys(places, 0.0)
        self._pid = os.getpid()

    def due(self) -> Iterator[_Place]:
        for place in self._places:
            if place.can_be_tried and time.monotonic() >= self._next[place.name]:
                yield place

    def was_processed(self, place: _Place, event: PipelineEvent) -> None:
        """Raise in a forked child: parent and child would both process each event from here on."""
        if os.getpid() != self._pid:
            raise ForkedConnectionError
        self.cursors[place.name] = event.cursor

    def was_read(self, place: _Place, page: EventPage) -> None:
        self.cursors[place.name] = page.next_cursor
        self._next[place.name] = time.monotonic() + (self._poll if len(page.items) < PAGE else 0)

    def pause(self) -> float:
        """Seconds until the next database is to be read."""
        times = (max(self._next[place.name], place.backoff.until) for place in self._places if not place.is_tried)
        return min(max(min(times, default=math.inf) - time.monotonic(), 0), self._poll)

    @contextmanager
    def named_errors(self, place: _Place) -> Iterator[None]:
        try:
            yield
        except InvalidCursorError as error:
            raise InvalidCursorError(f"{place.name}: {error}") from error
