"""``Database``: its engines, made on first use, and its sessions."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from gathering_pipeline import connections, health, listening, migrations, urls
from gathering_pipeline.errors import DatabaseError, ForkedConnectionError, TransactionAbortedError, shorten
from gathering_pipeline.forks import renew_in_child
from gathering_pipeline.health import Health
from gathering_pipeline.listening import POLL, AsyncEvents, Events
from gathering_pipeline.repositories._call import commit_failure
from gathering_pipeline.repositories.grouped import AsyncGroupCommit, GroupCommit
from gathering_pipeline.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

E = TypeVar("E", "Engine", AsyncEngine)

_UNHEALTHY = (DatabaseError, DBAPIError, PoolTimeout)


class Database:
    """A PostgreSQL database: its engines, made on first use, and its sessions.

    Use it as a sync or async context manager, or call ``dispose`` or ``adispose`` at the end.

    After ``os.fork`` each process has connections of its own: the child opens new sessions, and a call on a session,
    listener or group commit that was open raises ``ForkedConnectionError``.

    Args:
        url: ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``; an explicit URL overrides the environment. None: the URL
            of the settings, else the embedded server, which is started on first use.
        settings: Pool size, timeouts and the like; None: read from the environment.

    Raises:
        ConfigurationError: The URL or a variable can't be used, or there is neither a URL nor an embedded server.
    """

    def __init__(self, url: str | URL | None = None, *, settings: DatabaseSettings | None = None) -> None:
        self._explicit_url = url
        self._location = urls.locate(url, settings)
        self.settings = self._location.settings
        self._lock = threading.RLock()
        self._url: URL | None = None
        self._engine: Engine | None = None
        self._async_engine: AsyncEngine | None = None
        self._autocommit: dict[type, tuple[Any, Any]] = {}
        renew_in_child(self, Database._renew_lock)

    @property
    def url(self) -> str:
        """The URL, with its password hidden."""
        return self._resolve().render_as_string(hide_password=True)

    def __repr__(self) -> str:
        embedded = self._location.url is None and self._url is None  # showing its URL would start the server
        return f"Database({'embedded' if embedded else self.url!r})"

    @property
    def engine(self) -> Engine:
        """The engine for sync sessions; connecting raises the errors of ``session``."""
        with self._lock:
            if self._engine is None:
                self._engine = connections.open_engine(self._resolve(), self.settings)
            return self._engine

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine for async sessions; like any async engine, it works in one event loop only."""
        with self._lock:
            if self._async_engine is None:
                self._async_engine = connections.open_async_engine(self._resolve(), self.settings)
            return self._async_engine

    @contextmanager
    def session(self, *, autocommit: bool = False) -> Iterator[Session]:
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
        engine = self._in_autocommit(self.engine) if autocommit else self.engine
        with Session(engine, expire_on_commit=False, close_resets_only=False) as session:
            yield session
            _commit(session, autocommit)

    @asynccontextmanager
    async def async_session(self, *, autocommit: bool = False) -> AsyncIterator[AsyncSession]:
        """The async twin of ``session``."""
        connections.check_asyncio()
        engine = self._in_autocommit(self.async_engine) if autocommit else self.async_engine
        process = os.getpid()
        async with AsyncExitStack() as stack:
            session = AsyncSession(engine, expire_on_commit=False, close_resets_only=False)
            await stack.enter_async_context(session)
            try:
                yield session
            finally:
                if os.getpid() != process:  # the loop does not run here, so that the session can't be closed
                    stack.pop_all()
            if os.getpid() != process:
                raise ForkedConnectionError
            await session.run_sync(_commit, autocommit)

    def group_commit(self) -> GroupCommits:
        """Runs for many concurrent callers, whose ``advance`` calls share statements and commits.

        ``async with database.group_commit() as runs`` gives an ``AsyncRunRepository`` for many tasks,
        ``with database.group_commit() as runs`` a ``RunRepository`` for many threads: call inside the block.

        The answer of a call comes after the commit that holds it; a refused call concerns its caller alone. It takes
        two connections of the pool for ``advance``. Every other method, ``advance`` with ``retry`` or ``inputs``, and
        calls on a run that somebody else has locked, are sent by themselves on a third.
        """
        return GroupCommits(self)

    def listen(self, run_id: int | None = None, after: str | None = None, poll: timedelta = POLL) -> Events:
        """Yield every event once, in the order of ``EventRepository.read``; survives restarts of the server.

        It keeps one connection of the pool. The events of one run end with the one that ends the run; those of all runs
        have no end.

        Args:
            run_id: Only events of this run.
            after: The ``cursor`` of the last event that was processed; None: from the oldest stored event.
            poll: Pause between reads; after ``SELECT circle.notify_events(true)`` a commit ends it early.

        Raises:
            RunNotFoundError: The run doesn't exist, or is deleted before it ends (noticed within half a minute).
            InvalidCursorError: ``after`` is not a cursor of this database.
            DatabaseUnavailableError: There is no server at the first read; after that the loop waits for it.
            ForkedConnectionError: The process was forked since the first event; only the parent can go on.
        """
        return listening.listen(self.engine, run_id, after, poll)

    def alisten(self, run_id: int | None = None, after: str | None = None, poll: timedelta = POLL) -> AsyncEvents:
        """The async twin of ``listen``; any number of listeners share one connection, whose reader reads an event once.

        A listener first reads what it has missed, through the pool; so does one that takes its events too slowly. No
        listener waits for another one. The shortest ``poll`` counts.
        """
        return listening.alisten(self.async_engine, run_id, after, poll)

    def upgrade(self, revision: str = "head") -> None:
        """Upgrade the schema to a revision; see ``migrations.upgrade`` for the errors."""
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

    def _reachable(self, engine: Engine, found: dict[str, Any]) -> Health:
        return Health(reachable=True, **found, **self._pool(engine), expected_revision=migrations.head())

    def _unreachable(self, engine: Engine, error: Exception) -> Health:
        reason = shorten(str(getattr(error, "orig", error)), 500)
        return Health(reachable=False, error=reason, **self._pool(engine), expected_revision=migrations.head())

    def _pool(self, engine: Engine) -> dict[str, Any]:
        allowed = self.settings.pool_size + self.settings.max_overflow
        in_use: int = engine.pool.checkedout()  # type: ignore[attr-defined]  # of a QueuePool
        return {"connections_in_use": in_use, "connections_allowed": allowed}

    def dispose(self) -> None:
        """Close all idle connections. The object can be used again."""
        with self._lock:
            sync, asynchronous = self._engine, self._async_engine
            self._engine = self._async_engine = None
        if sync is not None:
            sync.dispose()
        if asynchronous is not None:
            # Closing psycopg's async connections needs a loop, but not the one that opened them.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(lambda: asyncio.run(asynchronous.dispose())).result()

    async def adispose(self) -> None:
        """``dispose`` without blocking the event loop."""
        with self._lock:
            asynchronous, self._async_engine = self._async_engine, None
        if asynchronous is not None:
            await asynchronous.dispose()
        self.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.adispose()

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def _in_autocommit(self, engine: E) -> E:
        # cached, because deriving an engine takes as long as a statement
        if self._autocommit.get(type(engine), (None, None))[0] is not engine:
            self._autocommit[type(engine)] = (engine, engine.execution_options(isolation_level="AUTOCOMMIT"))
        derived: E = self._autocommit[type(engine)][1]
        return derived

    def _resolve(self) -> URL:
        with self._lock:
            if self._url is None:
                self._url = self._location.resolve()
            return self._url


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


def _commit(session: Session, autocommit: bool) -> None:
    try:
        if not autocommit:
            session.flush()  # before the commit: if the connection breaks here, the outcome is known
        try:
            session.commit()
        except DBAPIError as error:
            if failure := commit_failure(error):
                raise failure from error
            raise
    except PendingRollbackError as error:
        raise TransactionAbortedError from error
