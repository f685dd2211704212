"""Engines and sessions: the one place that makes an engine."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from gathering_pipeline import embedded, listening, migrations
from gathering_pipeline.arguments import check_type
from gathering_pipeline.errors import (
    CommitIndeterminateError,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    TransactionAbortedError,
    shorten,
)
from gathering_pipeline.listening import POLL, AsyncEvents, Events
from gathering_pipeline.settings import DatabaseSettings, parse_url

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.errors import Diagnostic
    from sqlalchemy.engine import URL, Engine

logger = logging.getLogger(__name__)

RV = TypeVar("RV")
E = TypeVar("E", "Engine", AsyncEngine)

OLDEST_SERVER = 15
PROBE_SECONDS = 3
"""Longest wait for the sign of life of a silent server."""


class Database:
    """A PostgreSQL database: its engines, made on first use, and sessions.

    Use it as a context manager, also as an async one, or call ``dispose`` (``adispose``) when you are done.

    Args:
        url: ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``. None: what the settings say, and when they say nothing
            the embedded server, which is started on first use.
        settings: Pool size, timeouts and the like; by default read from the environment.

    Raises:
        ConfigurationError: The URL is not one of PostgreSQL, or there is neither a URL nor an embedded server.
    """

    def __init__(self, url: str | URL | None = None, *, settings: DatabaseSettings | None = None) -> None:
        beside: dict[str, None] = {} if url is None else {"database_url": None}  # nobody reads the environment's then
        self.settings = DatabaseSettings.load(**beside) if settings is None else settings
        check_type(self.settings, DatabaseSettings, "settings", "DatabaseSettings(pool_size=...) makes them")
        self._url = self.settings.url() if url is None else parse_url(url)
        if self._url is None and not embedded.installed():
            raise ConfigurationError(embedded.MISSING)
        direct = self.settings.migration_url if url is None else None
        self._direct = None if direct is None else direct.get_secret_value()
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self._async_engine: AsyncEngine | None = None
        self._autocommit: dict[type, tuple[Any, Any]] = {}

    @property
    def url(self) -> str:
        """The URL, with its password hidden."""
        return self._resolve().render_as_string(hide_password=True)

    def __repr__(self) -> str:
        return f"Database({'embedded' if self._url is None else self.url!r})"

    @property
    def engine(self) -> Engine:
        """The engine for sync sessions; connecting raises the errors of ``session``."""
        with self._lock:
            if self._engine is None:
                url = self._resolve()
                self._engine = create_engine(url, **self._engine_arguments(url))
                event.listen(self._engine, "do_connect", _connect)
            return self._engine

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine for async sessions. Use it in one event loop only, as any async engine."""
        with self._lock:
            if self._async_engine is None:
                url = self._resolve()
                arguments = self._engine_arguments(url)
                arguments["connect_args"]["async_creator_fn"] = _aconnect
                self._async_engine = create_async_engine(url, **arguments)
            return self._async_engine

    @contextmanager
    def session(self, *, autocommit: bool = False) -> Iterator[Session]:
        """A session that commits when its block ends well and rolls back otherwise.

        Args:
            autocommit: Every call is a transaction of its own and one round trip: no BEGIN, no COMMIT. What was done
                stays done when the block fails later.

        Raises:
            ConfigurationError: The server refuses the connection, is too old, or has an encoding other than UTF8.
            DatabaseUnavailableError: There is no server, or it takes no connection now.
            TransactionAbortedError: The block went on after an error that had ended the transaction, and ended well.
            CommitIndeterminateError: It is open whether the commit holds.
        """
        engine = self._in_autocommit(self.engine) if autocommit else self.engine
        with Session(engine, expire_on_commit=False, close_resets_only=False) as session:
            yield session
            _commit(session, autocommit)

    @asynccontextmanager
    async def async_session(self, *, autocommit: bool = False) -> AsyncIterator[AsyncSession]:
        """The async twin of ``session``."""
        engine = self._in_autocommit(self.async_engine) if autocommit else self.async_engine
        async with AsyncSession(engine, expire_on_commit=False, close_resets_only=False) as session:
            yield session
            await session.run_sync(_commit, autocommit)

    def listen(self, run_id: int | None = None, after: str | None = None, poll: timedelta = POLL) -> Events:
        """Follow the events for ever, each once, in the order of ``EventRepository.read``, past restarts of the server.

        Args:
            after: The ``cursor`` of the last event that was dealt with; ``None``: from the oldest that is kept.
            poll: How often to look; after ``SELECT circle.notify_events(true)`` commits end the wait.

        Raises:
            InvalidCursorError: ``after`` is no cursor of this database.
            DatabaseUnavailableError: There is no server to begin with; later it is waited for.
        """
        return listening.listen(self.engine, run_id, after, poll)

    def alisten(self, run_id: int | None = None, after: str | None = None, poll: timedelta = POLL) -> AsyncEvents:
        """The async twin of ``listen``."""
        return listening.alisten(self.async_engine, run_id, after, poll)

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema to a revision; see ``migrations.upgrade`` for the errors."""
        with nullcontext(self) if self._direct is None else Database(self._direct, settings=self.settings) as database:
            migrations.upgrade(database.engine, revision)

    def check(self) -> None:
        """Make sure that the schema is at the revision of this code.

        Raises:
            SchemaRevisionError: It is at another one; the message tells the command to run.
        """
        with self.engine.connect() as connection:
            migrations.check(connection)

    def dispose(self) -> None:
        """Close every connection that is not in use. The object can be used again."""
        with self._lock:
            sync, asynchronous = self._engine, self._async_engine
            self._engine = self._async_engine = None
        if sync is not None:
            sync.dispose()
        if asynchronous is not None:
            # To close psycopg's async connections takes a loop, but not the one that opened them.
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

    def _in_autocommit(self, engine: E) -> E:
        # kept, because to derive it takes as long as a statement
        if self._autocommit.get(type(engine), (None, None))[0] is not engine:
            self._autocommit[type(engine)] = (engine, engine.execution_options(isolation_level="AUTOCOMMIT"))
        derived: E = self._autocommit[type(engine)][1]
        return derived

    def _resolve(self) -> URL:
        with self._lock:
            if self._url is None:
                server = embedded.start(self.settings.data_dir)
                # a warning, because who forgot the variable sees an empty database, and nobody shows what is less
                logger.warning("no database URL is set: using the embedded PostgreSQL in %s", server.data_dir)
                self._url = parse_url(server.url)
            return self._url

    def _engine_arguments(self, url: URL) -> dict[str, Any]:
        limit = self.settings.answer_timeout
        return {
            "pool_size": self.settings.pool_size,
            "max_overflow": self.settings.max_overflow,
            "pool_timeout": self.settings.pool_timeout.total_seconds(),
            "use_native_hstore": False,  # else one more query on the first connection
            "connect_args": self.settings.connect_arguments(url) | {"answer_timeout": limit and limit.total_seconds()},
        }


def _commit(session: Session, autocommit: bool) -> None:
    try:
        if not autocommit:
            session.flush()  # by itself: a connection that breaks here leaves nothing open
        try:
            session.commit()
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            message = "the connection broke during the commit: it may have been done or not"
            raise CommitIndeterminateError(message) from error
    except PendingRollbackError as error:
        raise TransactionAbortedError from error


# psycopg's connections, which also notice a server that is silent for good, and a commit that is none.


@dataclass(slots=True)
class _Watch:
    """What a connection watches for; shared by its notice handler and its waits."""

    answer_timeout: float | None = None
    unconfirmed: bool = False

    def notice(self, diagnostic: Diagnostic) -> None:
        # A commit whose wait for the synchronous standby was cancelled is reported as success, with this warning only.
        # The text may be translated; the function of the server that sends it is not.
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self.unconfirmed = True

    def over(self, pgconn: pq.abc.PGconn, steps: PQGen[RV]) -> PQGen[RV]:
        """Pass a wait's steps through; psycopg resumes it at least ten times a second, also when nothing arrived."""
        self.unconfirmed = False  # the commit of a wait that was interrupted is none of this one's
        try:
            wanted = next(steps)
            since, probe = monotonic(), None
            while True:
                ready = yield wanted
                if ready:
                    since, probe = monotonic(), None
                elif self.answer_timeout is not None and monotonic() - since > self.answer_timeout:
                    if probe is None:
                        probe = _Probe(pgconn)
                    elif probe.alive is True:
                        since, probe = monotonic(), None
                    elif probe.alive is False:
                        pgconn.finish()
                        raise psycopg.OperationalError(
                            "the server gives no sign of life: it hangs, or the network is cut"
                        )
                wanted = steps.send(ready)
        except StopIteration as stop:
            self.confirm()
            result: RV = stop.value
            return result
        except psycopg.Error as error:
            self.confirm(error)
            raise

    def confirm(self, cause: Exception | None = None) -> None:
        if self.unconfirmed:
            self.unconfirmed = False
            raise CommitIndeterminateError(
                "the commit is done on this server, but its standby did not confirm it: a failover may lose it"
            ) from cause


class _Probe:
    """Asks in a thread whether the server of a connection still talks; PQping needs no credentials."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self.alive: bool | None = None
        host = (pgconn.hostaddr or pgconn.host).decode()
        where = make_conninfo(host=host, port=pgconn.port.decode(), connect_timeout=PROBE_SECONDS)
        threading.Thread(target=self._ask, args=(where.encode(),), daemon=True).start()

    def _ask(self, where: bytes) -> None:
        self.alive = pq.PGconn.ping(where) in (pq.Ping.OK, pq.Ping.REJECT)


class _Connection(psycopg.Connection[Any]):
    watch = _Watch()

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        return super().wait(self.watch.over(self.pgconn, gen), interval, timeout)

    def commit(self) -> None:
        with _no_silent_rollback(self.pgconn):
            super().commit()


class _AsyncConnection(psycopg.AsyncConnection[Any]):
    watch = _Watch()

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:  # noqa: ASYNC109 - as psycopg has it
        return await super().wait(self.watch.over(self.pgconn, gen), interval, timeout)

    async def commit(self) -> None:
        with _no_silent_rollback(self.pgconn):
            await super().commit()


@contextmanager
def _no_silent_rollback(pgconn: pq.abc.PGconn) -> Iterator[None]:
    """The server answers the COMMIT of a transaction that an error has ended with a ROLLBACK, and no error."""
    aborted = pgconn.transaction_status == pq.TransactionStatus.INERROR
    yield
    if aborted:
        raise TransactionAbortedError


def _connect(_dialect: object, _record: object, _args: object, arguments: dict[str, Any]) -> _Connection:
    rest = dict(arguments)
    watch = _Watch(rest.pop("answer_timeout"))
    try:
        connection = _Connection.connect(**rest)
    except psycopg.Error as error:
        raise _refusal(error, rest) from error
    return _checked(connection, watch)


async def _aconnect(*_args: object, **arguments: Any) -> _AsyncConnection:
    watch = _Watch(arguments.pop("answer_timeout"))
    try:
        connection = await _AsyncConnection.connect(**arguments)
    except psycopg.Error as error:
        raise await asyncio.to_thread(_refusal, error, arguments) from error
    return _checked(connection, watch)


C = TypeVar("C", _Connection, _AsyncConnection)


def _checked(connection: C, watch: _Watch) -> C:
    version, encoding = connection.info.server_version, connection.info.parameter_status("server_encoding")
    problem = None
    if version < OLDEST_SERVER * 10_000:
        problem = f"the server is PostgreSQL {version // 10_000}: {OLDEST_SERVER} or later is needed"
    elif encoding != "UTF8":
        problem = f"the database's encoding is {encoding}: create it with ENCODING 'UTF8'"
    if problem is not None:
        connection.pgconn.finish()
        raise ConfigurationError(problem)
    connection.watch = watch
    connection.add_notice_handler(watch.notice)
    return connection


def _refusal(error: psycopg.Error, arguments: dict[str, Any]) -> DatabaseError:
    """Say in one sentence why there is no connection.

    libpq keeps the SQLSTATE of a refused connection to itself. What can be told without the text is whether a server is
    there: it asked for a password, or answers a ping.
    """
    if not isinstance(error, psycopg.OperationalError):
        return ConfigurationError(f"the database URL can't be used: {shorten(str(error).strip(), 200)}")
    host, port = arguments.get("host", "the local socket"), arguments.get("port", 5432)
    where = f"any of {host}" if ":" in str(port) or "," in str(host) else f"the PostgreSQL server at {host}:{port}"
    asked = error.pgconn is not None and (error.pgconn.used_password or error.pgconn.needs_password)
    if not asked and not isinstance(error, psycopg.errors.ConnectionTimeout):
        known = {name: arguments[name] for name in ("host", "port", "hostaddr") if name in arguments}
        answer = pq.PGconn.ping(make_conninfo(**known, connect_timeout=PROBE_SECONDS).encode())
        if answer == pq.Ping.REJECT:
            return DatabaseUnavailableError(f"{where} takes no connections now: it starts or stops, try again")
        asked = answer == pq.Ping.OK
    if not asked:
        return DatabaseUnavailableError(f"no answer from {where}: start it, or correct the URL's host and port")
    words = shorten(str(error).strip().splitlines()[-1].rpartition("FATAL:")[2].strip(), 200)
    # this passes by itself; there is nothing but the text to tell it by
    if "too many" in words or "connection slots" in words:
        return DatabaseUnavailableError(
            f"{where} has no free connection ({words}): try again, or make the pools smaller"
        )
    return ConfigurationError(f"{where} refuses the connection ({words}): correct the URL's user, password or database")
