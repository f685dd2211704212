"""``Database``: its engines, made on first use or given, and its sessions."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from gathering_pipeline import connections, health, listening, migrations, urls
from gathering_pipeline.arguments import check_duration
from gathering_pipeline.errors import (
    ConfigurationError,
    DatabaseError,
    ForkedConnectionError,
    TransactionAbortedError,
    WaitTimeoutError,
    shorten,
)
from gathering_pipeline.forks import renew_in_child
from gathering_pipeline.health import Health
from gathering_pipeline.listening import POLL, AsyncEvents, Events
from gathering_pipeline.metrics import AsyncMetricsReader, Metrics, MetricsReader
from gathering_pipeline.models import RunRead
from gathering_pipeline.repositories._call import READING, commit_failure, read_only_failure
from gathering_pipeline.repositories._log import logger
from gathering_pipeline.repositories.grouped import AsyncGroupCommit, GroupCommit
from gathering_pipeline.repositories.runs import AsyncRunRepository, RunRepository
from gathering_pipeline.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

E = TypeVar("E", Engine, AsyncEngine)

_UNHEALTHY = (DatabaseError, DBAPIError, PoolTimeout)
_EXECUTION_OPTIONS: dict[str, dict[str, Any]] = {
    "autocommit": {"isolation_level": "AUTOCOMMIT"},
    "transaction": {"isolation_level": "READ COMMITTED"},
    "reading": {"isolation_level": "READ COMMITTED", "postgresql_readonly": True},
}
"""Of the engines of sessions."""


class Database:
    """A PostgreSQL database: its engines, made on first use, and its sessions.

    Use it as a sync or async context manager, or call ``dispose`` or ``adispose`` at the end.

    After ``os.fork`` each process has connections of its own: the child opens new sessions, and a call on a session,
    listener or group commit that was open raises ``ForkedConnectionError``.

    A program that has SQLAlchemy engines gives them instead of a URL. They stay its own: they are never disposed here,
    connecting raises what they raise, and after a fork the child has to call ``engine.dispose(close=False)`` itself.
    Calls on them go through SQLAlchemy, which takes longer than on a URL.

    Args:
        url: ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``; an explicit URL overrides the environment. None: the URL
            of the settings, else the embedded server, which is started on first use.
        engine: An engine of the program, for the sync calls, ``upgrade`` and ``check``.
        async_engine: An async engine of the program, for the async calls. A call for whose kind no engine was given
            raises ``ConfigurationError``.
        read_url: Where ``reading`` and ``listen`` read, such as a URL of standbys. None: the URL of the settings if
            that of the database is theirs, too; else the database itself.
        settings: Pool size, timeouts and the like; None: read from the environment.

    Raises:
        ConfigurationError: The URL, an engine or a variable can't be used, or there is neither a URL nor an embedded
            server.
    """

    def __init__(
        self,
        url: str | URL | None = None,
        *,
        engine: Engine | None = None,
        async_engine: AsyncEngine | None = None,
        read_url: str | URL | None = None,
        settings: DatabaseSettings | None = None,
    ) -> None:
        self._explicit_url = url
        self._has_own_engines = engine is None and async_engine is None
        if not self._has_own_engines:
            if url is not None:
                raise ConfigurationError("url and an engine are given: leave one of them out")
            url = connections.url_of(engine, async_engine)
        self._location = urls.locate(url, settings)
        self.settings = self._location.settings
        self._main = self._reader = _Engines(self._location, engine, async_engine)
        if reader := urls.locate_reader(read_url, self._location, is_explicit=url is not None):
            self._reader = _Engines(reader)

    @property
    def url(self) -> str:
        """The URL, with its password hidden."""
        return self._main.url.render_as_string(hide_password=True)

    def __repr__(self) -> str:
        return f"Database({self.url if self._main.is_located else 'embedded'!r})"

    @property
    def engine(self) -> Engine:
        """The engine for sync sessions; connecting raises the errors of ``session``."""
        return self._main.sync

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine for async sessions; like any async engine, it works in one event loop only."""
        return self._main.asynchronous

    def session(self, *, autocommit: bool = False) -> AbstractContextManager[Session]:
        """A session that commits when its block succeeds and rolls back otherwise.

        Args:
            autocommit: Every call is a separate transaction and one round trip: no BEGIN, no COMMIT. A later error in
                the block doesn't undo earlier calls.

        Raises:
            ConfigurationError: The server refuses the connection, is too old, or has an encoding other than UTF8.
            DatabaseUnavailableError: There is no server, or it takes no connections now.
            TransactionAbortedError: The block caught an error that had ended the transaction, and succeeded.
            CommitIndeterminateError: The outcome of the commit is unknown.
            ForkedConnectionError: The process was forked in the block; only the parent can use the session.
        """
        return _open(self._main.for_sessions(self.engine, autocommit=autocommit), autocommit=autocommit)

    def async_session(self, *, autocommit: bool = False) -> AbstractAsyncContextManager[AsyncSession]:
        """The async twin of ``session``."""
        return _open_async(self._main.for_sessions(self.async_engine, autocommit=autocommit), autocommit=autocommit)

    def reading(self) -> AbstractContextManager[Session]:
        """A session for reads only, on ``read_url`` if there is one: history, searches, statistics, events.

        It is one read-only transaction. What a standby shows is behind the database, as a rule by milliseconds: a run
        that was just created may be missing. Take no decision by it: calls that change something look at the database
        itself.

        Raises:
            ReadOnlySessionError: The block writes.
            TransactionConflictError: A call of a repository was cancelled by the standby, to apply a change: read
                again.
            ConfigurationError: As of ``session``; so are the other errors.
        """
        return _open(self._reader.for_reading(self._reader.sync), reading=True)

    def areading(self) -> AbstractAsyncContextManager[AsyncSession]:
        """The async twin of ``reading``."""
        return _open_async(self._reader.for_reading(self._reader.asynchronous), reading=True)

    def group_commit(self) -> GroupCommits:
        """Runs for many concurrent callers, whose ``advance`` calls share statements and commits.

        ``async with database.group_commit() as runs`` gives an ``AsyncRunRepository`` for many tasks,
        ``with database.group_commit() as runs`` a ``RunRepository`` for many threads: call inside the block.

        The answer of a call comes after the commit that holds it; a refused call concerns its caller alone. It takes
        two connections of the pool for ``advance``. What ``advance_many`` leaves out, and every other method, is sent
        by itself on a third.
        """
        return GroupCommits(self)

    def listen(self, run_id: int | None = None, after: str | None = None, poll: timedelta = POLL) -> Events:
        """Yield every event once, in the order of ``EventRepository.read``; survives restarts of the server.

        It keeps one connection of the pool. The events of one run end with the one that ends the run; those of all runs
        have no end.

        It reads on ``read_url`` if there is one. On a standby no commit ends a pause early.

        Args:
            run_id: Only events of this run.
            after: The ``cursor`` of the last event that was processed; None: from the oldest stored event.
            poll: Pause between reads; after ``SELECT circle.notify_events(true)`` a commit ends it early.

        Raises:
            RunNotFoundError: The run doesn't exist, or is deleted before it ends (noticed within half a minute). On a
                standby, where it may come yet, it is waited for.
            InvalidCursorError: ``after`` is not a cursor of this database.
            DatabaseUnavailableError: There is no server at the first read; after that the loop waits for it.
            ForkedConnectionError: The process was forked since the first event; only the parent can go on.
        """
        return listening.listen(self._reader.sync, run_id, after, poll)

    def alisten(self, run_id: int | None = None, after: str | None = None, poll: timedelta = POLL) -> AsyncEvents:
        """The async twin of ``listen``; any number of listeners share one connection, whose reader reads an event once.

        A listener first reads what it has missed, through the pool; so does one that takes its events too slowly. No
        listener waits for another one. The shortest ``poll`` counts.
        """
        return listening.alisten(self._reader.asynchronous, run_id, after, poll)

    def wait_for_run(self, run_id: int, timeout: timedelta) -> RunRead:
        """Wait until a run has ended, and read it. It is asked for up to ten times a second.

        Raises:
            WaitTimeoutError: It is still live when the time is over.
            RunNotFoundError: The run doesn't exist.
        """
        pauses = _Pauses(timeout)
        while True:
            with self.session(autocommit=True) as session:
                run = RunRepository(session).get(run_id)
            if run.completed_at is not None:
                return run
            time.sleep(pauses.next(run))

    async def await_for_run(self, run_id: int, timeout: timedelta) -> RunRead:  # noqa: ASYNC109 - as its twin
        """The async twin of ``wait_for_run``."""
        pauses = _Pauses(timeout)
        while True:
            async with self.async_session(autocommit=True) as session:
                run = await AsyncRunRepository(session).get(run_id)
            if run.completed_at is not None:
                return run
            await asyncio.sleep(pauses.next(run))

    def upgrade(self, revision: str = "head") -> None:
        """Upgrade the schema to a revision; see ``migrations.upgrade`` for the errors."""
        location = self._location
        if self._has_own_engines:
            location = urls.locate(self._explicit_url, self.settings, for_migrations=True)
        if location == self._location:
            migrations.upgrade(self.engine, revision)
            return
        with connections.temporary_engine(location.resolve(), self.settings) as engine:
            migrations.upgrade(engine, revision)

    def check(self) -> None:
        """Check that the schema is at the revision of this code.

        Raises:
            SchemaRevisionError: It is at another one; the message names the command to run.
        """
        with self.engine.connect() as connection:
            migrations.check(connection)

    async def acheck(self) -> None:
        """The async twin of ``check``."""
        async with self.async_engine.connect() as connection:
            await connection.run_sync(migrations.check)

    async def aupgrade(self, revision: str = "head") -> None:
        """``upgrade`` without blocking the event loop; a cancelled call lets the step that is under way end."""
        await asyncio.to_thread(self.upgrade, revision)

    def health(self) -> Health:
        """Tell whether the database can be used now, for the health endpoint of a service; raises no ``DatabaseError``.

        Takes as long as getting a connection; on a dead server or network at most about 20 s with the default limits.
        """
        engine = self.engine
        try:
            with engine.connect() as connection:
                found = health.examine(connection)
        except _UNHEALTHY as error:
            return self._unreachable(engine, error)
        return self._reachable(engine, found)

    async def ahealth(self) -> Health:
        """The async twin of ``health``."""
        engine = self.async_engine
        try:
            async with engine.connect() as connection:
                found = await connection.run_sync(health.examine)
        except _UNHEALTHY as error:
            return self._unreachable(engine.sync_engine, error)
        return self._reachable(engine.sync_engine, found)

    def metrics(self) -> Metrics:
        """Read the numbers that a monitoring system watches; ``.prometheus()`` prints them. One round trip.

        It takes as long with a long history, and reads on ``read_url`` if there is one.

        Raises:
            ConfigurationError: As of ``session``; so are the other errors.
        """
        with _open(self._reader.for_sessions(self._reader.sync, autocommit=True), autocommit=True) as session:
            return MetricsReader(session).read()

    async def ametrics(self) -> Metrics:
        """The async twin of ``metrics``."""
        engine = self._reader.for_sessions(self._reader.asynchronous, autocommit=True)
        async with _open_async(engine, autocommit=True) as session:
            return await AsyncMetricsReader(session).read()

    def _reachable(self, engine: Engine, found: dict[str, Any]) -> Health:
        return Health(reachable=True, **found, **self._pool(engine), expected_revision=migrations.head())

    def _unreachable(self, engine: Engine, error: Exception) -> Health:
        reason = shorten(str(getattr(error, "orig", error)), 500)
        return Health(reachable=False, error=reason, **self._pool(engine), expected_revision=migrations.head())

    @staticmethod
    def _pool(engine: Engine) -> dict[str, Any]:
        pool = engine.pool
        if not isinstance(pool, QueuePool):  # a program's engine may have a pool that doesn't count
            return {"connections_in_use": None, "connections_allowed": None}
        return {"connections_in_use": pool.checkedout(), "connections_allowed": pool.size() + pool._max_overflow}  # noqa: SLF001

    def dispose(self) -> None:
        """Close all idle connections. The object can be used again."""
        self._reader.dispose()
        self._main.dispose()

    async def adispose(self) -> None:
        """``dispose`` without blocking the event loop."""
        await self._reader.adispose()
        await self._main.adispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.adispose()


class _Engines:
    """The sync and the async engine of a database, each made on first use; or those of a program, which owns them."""

    def __init__(
        self, location: urls.Location, engine: Engine | None = None, async_engine: AsyncEngine | None = None
    ) -> None:
        self._location = location
        self._given = engine is not None or async_engine is not None
        self._sync, self._async = engine, async_engine
        self._url: URL | None = None
        self._derived: dict[tuple[type, str], tuple[Any, Any]] = {}
        self._lock = threading.RLock()
        renew_in_child(self, _Engines._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    @property
    def is_located(self) -> bool:
        """Whether the URL is known without starting the embedded server."""
        return (self._location.url or self._url) is not None

    @property
    def url(self) -> URL:
        with self._lock:
            if self._url is None:
                self._url = self._location.resolve()
            return self._url

    @property
    def sync(self) -> Engine:
        with self._lock:
            if self._sync is None:
                self._require_own("sync", "engine=")
                self._sync = connections.open_engine(self.url, self._location.settings)
            return self._sync

    @property
    def asynchronous(self) -> AsyncEngine:
        with self._lock:
            if self._async is None:
                self._require_own("async", "async_engine=")
                self._async = connections.open_async_engine(self.url, self._location.settings)
            return self._async

    def _require_own(self, kind: str, argument: str) -> None:
        if self._given:
            raise ConfigurationError(f"this Database has no engine for {kind} calls: make it with {argument}, too")

    def for_sessions(self, engine: E, *, autocommit: bool) -> E:
        """The engine that a session uses, which has the level of the lifecycle, or autocommit."""
        if autocommit:
            return self._derive(engine, "autocommit")
        return self._derive(engine, "transaction") if self._given else engine

    def for_reading(self, engine: E) -> E:
        """The engine that a session for reads uses, whose transactions are read-only."""
        return self._derive(engine, "reading")

    def _derive(self, engine: E, kind: str) -> E:
        # cached, because deriving an engine takes as long as a statement
        key = type(engine), kind
        if self._derived.get(key, (None, None))[0] is not engine:
            self._derived[key] = engine, engine.execution_options(**_EXECUTION_OPTIONS[kind])
            if self._given:
                connections.refuse_failed_commits(self._derived[key][1])
        derived: E = self._derived[key][1]
        return derived

    def dispose(self) -> None:
        if self._given:
            return
        with self._lock:
            sync, asynchronous = self._sync, self._async
            self._sync = self._async = None
        if sync is not None:
            sync.dispose()
        if asynchronous is not None:
            # Closing psycopg's async connections needs a loop, but not the one that opened them.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(lambda: asyncio.run(asynchronous.dispose())).result()

    async def adispose(self) -> None:
        if self._given:
            return
        with self._lock:
            asynchronous, self._async = self._async, None
        if asynchronous is not None:
            await asynchronous.dispose()
        self.dispose()


class GroupCommits:
    """What ``Database.group_commit`` returns: a context manager, sync and async."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sync: GroupCommit | None = None
        self._async: AsyncGroupCommit | None = None

    def __enter__(self) -> GroupCommit:
        self._sync = GroupCommit(partial(self._database.session, autocommit=True))
        return self._sync.__enter__()

    def __exit__(self, *error: object) -> None:
        assert self._sync is not None, "it was entered"
        self._sync.__exit__(*error)

    async def __aenter__(self) -> AsyncGroupCommit:
        self._async = AsyncGroupCommit(partial(self._database.async_session, autocommit=True))
        return await self._async.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        assert self._async is not None, "it was entered"
        await self._async.__aexit__(*error)


@contextmanager
def _open(engine: Engine, *, autocommit: bool = False, reading: bool = False) -> Iterator[Session]:
    with Session(engine, expire_on_commit=False, close_resets_only=False, info=_info(reading)) as session:
        try:
            yield session
            _commit(session, autocommit)
        except BaseException as error:
            _undo(session)
            if (
                reading and isinstance(error, DBAPIError) and (failure := read_only_failure(error))
            ):  # of a flush, or of SQL of the caller
                raise failure from error
            raise


@asynccontextmanager
async def _open_async(
    engine: AsyncEngine, *, autocommit: bool = False, reading: bool = False
) -> AsyncIterator[AsyncSession]:
    connections.check_asyncio()
    process = os.getpid()
    async with AsyncExitStack() as stack:
        session = AsyncSession(engine, expire_on_commit=False, close_resets_only=False, info=_info(reading))
        stack.push_async_callback(_close, session)
        try:
            try:
                yield session
            finally:
                if os.getpid() != process:  # the loop does not run here, so that the session can't be closed
                    stack.pop_all()
            if os.getpid() != process:
                raise ForkedConnectionError  # noqa: TRY301 - handled as any error of the block
            await session.run_sync(_commit, autocommit)
        except BaseException as error:
            if os.getpid() == process:
                await session.run_sync(_undo)
            if (
                reading and isinstance(error, DBAPIError) and (failure := read_only_failure(error))
            ):  # of a flush, or of SQL of the caller
                raise failure from error
            raise


async def _close(session: AsyncSession) -> None:
    """Close, also if the task is cancelled a second time meanwhile: else the connection would be lost to the pool."""
    closing = asyncio.ensure_future(session.close())
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await closing
        raise


def _info(reading: bool) -> dict[Any, Any] | None:
    return {READING: True} if reading else None


def _undo(session: Session) -> None:
    """Close, as a rollback would expire the objects that the block has loaded.

    Where the connection broke, that fails, has no use, and must not replace the error of the block.
    """
    with suppress(DBAPIError):
        session.close()


def _commit(session: Session, autocommit: bool) -> None:
    try:
        if not autocommit:
            session.flush()  # before the commit: if the connection breaks here, the outcome is known
        try:
            session.commit()
        except DBAPIError as error:
            if failure := commit_failure(error):
                logger.warning("the commit failed: %s: %s", type(failure).__name__, failure)
                raise failure from error
            raise
    except PendingRollbackError as error:
        raise TransactionAbortedError from error


class _Pauses:
    """The pauses of a caller who waits for a run: short ones first, and none beyond the end of its time."""

    def __init__(self, timeout: timedelta) -> None:
        self._ends_at = time.monotonic() + check_duration(timeout, "timeout", allow_zero=True)
        self._pause = 0.02

    def next(self, run: RunRead) -> float:
        """The seconds to wait before the run is read again.

        Raises:
            WaitTimeoutError: The time is over.
        """
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise WaitTimeoutError(run.id, run.status)
        self._pause = min(self._pause * 1.5, left, 0.1)
        return min(self._pause, left)
