"""Engines and psycopg connections: how a server is reached, checked, probed and watched, and the direct way to it."""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import psycopg
from psycopg import generators, pq
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from gathering_pipeline.arguments import check_type
from gathering_pipeline.errors import (
    CommitIndeterminateError,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    ForkedConnectionError,
    TransactionAbortedError,
    has_stale_plan,
    shorten,
)
from gathering_pipeline.forks import call_in_child, detach, renew_in_child
from gathering_pipeline.idle import close_idle
from gathering_pipeline.settings import DatabaseSettings

if TYPE_CHECKING:
    from psycopg.abc import PQGen, PQGenConn
    from psycopg.errors import Diagnostic
    from sqlalchemy.engine import URL, Connection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

RV = TypeVar("RV")

OLDEST_SERVER = 15
PROBE_SECONDS = 3
"""Longest wait for the answer of a server that is probed."""

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""What a client sends that asks for encryption; the server answers by one byte, before any authentication."""


# Engines


def open_engine(url: URL, settings: DatabaseSettings) -> Engine:
    """Make an engine; connecting raises ``ConfigurationError`` and ``DatabaseUnavailableError``."""
    engine = create_engine(url, **_engine_arguments(url, settings))
    event.listen(engine, "do_connect", _Connector().connect)
    _watch_pool(engine, settings)
    return engine


@contextmanager
def temporary_engine(url: URL, settings: DatabaseSettings) -> Iterator[Engine]:
    """Make an engine for a block, and close its connections at the end."""
    engine = open_engine(url, settings)
    try:
        yield engine
    finally:
        engine.dispose()


def open_async_engine(url: URL, settings: DatabaseSettings) -> AsyncEngine:
    """Make an async engine; connecting raises ``ConfigurationError`` and ``DatabaseUnavailableError``."""
    arguments = _engine_arguments(url, settings)
    arguments["connect_args"]["async_creator_fn"] = _Connector().connect_async
    engine = create_async_engine(url, **arguments)
    _watch_pool(engine.sync_engine, settings)
    return engine


def _watch_pool(engine: Engine, settings: DatabaseSettings) -> None:
    event.listen(engine, "checkout", _replace_dead)
    renew_in_child(engine, _renew_pool)
    if settings.idle_limit is not None:
        close_idle(engine, settings.idle_limit.total_seconds())


def url_of(engine: Engine | None, async_engine: AsyncEngine | None) -> URL:
    """Check the engines of a program, and return the URL of one of them.

    Raises:
        InvalidDataError: One is not an engine, or not of its kind.
        ConfigurationError: One has another driver than psycopg, or renames the schema.
    """
    urls = []
    for given, kind, name in ((engine, Engine, "engine"), (async_engine, AsyncEngine, "async_engine")):
        if given is not None:
            check_type(given, kind, name, f"create_{name}('postgresql+psycopg://...') makes one")
            check_usable(given, name)
            urls.append(given.url)
    return urls[0]


def check_usable(given: Engine | AsyncEngine | Connection, name: str) -> None:
    """Check that an engine or a connection of a program can be used.

    Raises:
        ConfigurationError: It has another driver than psycopg, or renames the schema.
    """
    if given.dialect.driver != "psycopg":
        raise ConfigurationError(
            f"the driver of {name} is {given.dialect.driver}: this package needs psycopg, as postgresql+psycopg://"
        )
    if translates_schema(given.get_execution_options()):
        raise ConfigurationError(TRANSLATED_SCHEMA)


def refuse_failed_commits(engine: Engine | AsyncEngine) -> None:
    """Let the commit of a transaction that has failed raise, as that of this package's connections does."""
    event.listen(engine.sync_engine if isinstance(engine, AsyncEngine) else engine, "commit", _refuse_failed_commit)


def _refuse_failed_commit(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    if driver.pgconn.transaction_status == pq.TransactionStatus.INERROR:
        connection.connection.rollback()  # SQLAlchemy returns the connection to the pool without another one
        raise TransactionAbortedError


def _renew_pool(engine: Engine) -> None:
    """Give the engine of a forked child an empty pool.

    The sessions of the parent still return their connections to the old pool: it gets locks that no thread holds.
    """
    old: Any = engine.pool
    new: Any = old.recreate()
    for event_of_pool in (new.dispatch.first_connect, new.dispatch.connect):
        if getattr(event_of_pool, "_exec_once_mutex", None) is not None:
            event_of_pool._exec_once_mutex = None  # noqa: SLF001 - SQLAlchemy has no call for it
    engine.pool = new
    old._pool, old._overflow_lock = new.recreate()._pool, threading.Lock()  # noqa: SLF001


def _replace_dead(connection: Any, entry: ConnectionPoolEntry, _fairy: PoolProxiedConnection) -> None:
    """Let the pool connect anew if a connection died while it was idle: nothing was sent, so nothing is lost.

    No round trip: the socket of a connection that the server or the network closed can be read. So can one on which the
    server told something, such as a changed parameter; that one is given up, too, because the end may follow.
    """
    if not entry.info.get("used"):  # it is new
        entry.info["used"] = True
        return
    pgconn: pq.abc.PGconn = getattr(connection, "driver_connection", connection).pgconn
    if pgconn.status != pq.ConnStatus.OK:
        raise DisconnectionError
    ready = select.poll()
    ready.register(pgconn.socket, select.POLLIN)
    if ready.poll(0):
        raise DisconnectionError


def _engine_arguments(url: URL, settings: DatabaseSettings) -> dict[str, Any]:
    limit = settings.answer_timeout
    return {
        "pool_size": settings.pool_size,
        "max_overflow": settings.max_overflow,
        "pool_timeout": settings.pool_timeout.total_seconds(),
        "pool_use_lifo": settings.idle_limit is not None,
        "isolation_level": "READ COMMITTED",  # the level of the lifecycle
        "use_native_hstore": False,  # saves a query on the first connection
        "connect_args": connect_arguments(url, settings) | {"answer_timeout": limit and limit.total_seconds()},
    }


def _number_of_hosts(url: URL) -> int:
    """How many hosts the URL names; libpq waits ``connect_timeout`` for each of them."""
    named = url.normalized_query.get("host") or (url.host or "",)
    return sum(len(hosts.split(",")) for hosts in named)


def connect_arguments(url: URL, settings: DatabaseSettings) -> dict[str, Any]:
    """Return keyword arguments for psycopg: the settings, except those that the URL sets; its ``options`` come last."""
    arguments: dict[str, Any] = {
        "connect_timeout": max(int(settings.connect_timeout.total_seconds()) // _number_of_hosts(url), 1),
        "tcp_user_timeout": int(settings.tcp_user_timeout.total_seconds() * 1000),
        "keepalives": 1,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "client_encoding": "utf8",
        "fallback_application_name": "gathering_pipeline",
    }
    options: dict[str, str] = {}
    if settings.statement_timeout is not None:
        milliseconds = int(settings.statement_timeout.total_seconds() * 1000)
        # of two values for one parameter the server uses the later one
        own = url.normalized_query.get("options") or (os.environ.get("PGOPTIONS", ""),)
        options = {"options": " ".join((f"-c statement_timeout={milliseconds}", *own)).strip()}
    arguments = {name: value for name, value in arguments.items() if name not in url.query}
    return arguments | options | {"prepare_threshold": settings.prepare_threshold}


# Connections that detect a silent server and a commit that was not confirmed


@dataclass(slots=True)
class _Watchdog:
    """State of a connection that its notice handler and its waits share."""

    answer_timeout: float | None = None
    unconfirmed: bool = False

    def notice(self, diagnostic: Diagnostic) -> None:
        # If the wait for the synchronous standby is cancelled, the server reports success with this warning. Its text
        # may be translated; the name of the server's function is not.
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self.unconfirmed = True

    def wait(self, pgconn: pq.abc.PGconn, steps: PQGen[RV]) -> PQGen[RV]:
        """Forward the steps of a wait; psycopg resumes it at least ten times a second, even if nothing arrived."""
        self.unconfirmed = False  # a warning from an interrupted wait does not belong to this one
        try:
            wanted = next(steps)
            since, probe = monotonic(), None
            while True:
                ready = yield wanted
                if ready:
                    since, probe = monotonic(), None
                elif self.answer_timeout is not None and monotonic() - since > self.answer_timeout:
                    if probe is None:
                        probe = _Probe.of(pgconn)
                    elif probe.alive is True:
                        since, probe = monotonic(), None
                    elif probe.alive is False:
                        pgconn.finish()
                        raise psycopg.OperationalError(
                            "the server gives no sign of life: it hangs, or the network is cut"
                        )
                wanted = steps.send(ready)
        except StopIteration as stop:
            self.raise_if_unconfirmed()
            result: RV = stop.value
            return result
        except psycopg.Error as error:
            self.raise_if_unconfirmed(error)
            raise

    def raise_if_unconfirmed(self, cause: Exception | None = None) -> None:
        if self.unconfirmed:
            self.unconfirmed = False
            raise CommitIndeterminateError(
                "the transaction was committed on this server, but its standby did not confirm it: a failover may lose"
                " it"
            ) from cause


class _Probe:
    """Asks a server for a sign of life in a thread, by a socket of its own; no credentials are needed.

    libpq has a ping, too, but the whole process would stand still during it: its wrapper keeps the interpreter's lock.

    Attributes:
        alive: Whether the server answered; ``None`` as long as it isn't known.
    """

    _under_way: ClassVar[dict[tuple[str, int], _Probe]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, address: tuple[str, int]) -> None:
        self.alive: bool | None = None
        self._address = address

    @classmethod
    def of(cls, pgconn: pq.abc.PGconn) -> _Probe:
        """The probe of a connection's server; connections that wait for the same one share it."""
        address = ((pgconn.hostaddr or pgconn.host).decode(), int(pgconn.port))
        with cls._lock:
            probe = cls._under_way.get(address)
            if probe is None:
                probe = cls._under_way[address] = cls(address)
                threading.Thread(target=probe._ask, name="probe of a server", daemon=True).start()
        return probe

    @classmethod
    def forget(cls) -> None:
        """Begin anew in a forked child, which no thread follows into."""
        cls._lock, cls._under_way = threading.Lock(), {}

    def _ask(self) -> None:
        try:
            with self._open() as asked:
                asked.sendall(_SSL_REQUEST)
                alive = asked.recv(1) != b""
        except OSError:
            alive = False
        with self._lock:
            self._under_way.pop(self._address, None)
        self.alive = alive

    def _open(self) -> socket.socket:
        host, port = self._address
        if not host.startswith(("/", "@")):
            return socket.create_connection((host, port), timeout=PROBE_SECONDS)
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        local.settimeout(PROBE_SECONDS)
        path = f"{host}/.s.PGSQL.{port}"
        try:
            local.connect(path.replace("@", "\0", 1) if host.startswith("@") else path)
        except OSError:
            local.close()
            raise
        return local


call_in_child(_Probe.forget)


# The direct way: a statement is sent by libpq itself. psycopg's cursor takes longer than a short statement.


class Statement:
    """A SQL statement of a repository. Each of its rows is one text, as a rule JSON.

    Attributes:
        sql: The statement, with parameters named ``%(name)s``, as SQLAlchemy and psycopg take it.
        read_only: It writes nothing: a connection that breaks during it leaves no outcome unknown.
        deletes: It may delete rows of which the session has objects.
    """

    __slots__ = ("_numbered", "_parameters", "deletes", "read_only", "sql")

    def __init__(self, sql: str, *, read_only: bool = False, deletes: bool = False) -> None:
        self.sql = sql
        self.read_only = read_only
        self.deletes = deletes
        self._parameters = tuple(dict.fromkeys(re.findall(r"%\((\w+)\)s", sql)))
        numbers = {name: f"${number}" for number, name in enumerate(self._parameters, 1)}
        self._numbered = re.sub(r"%\((\w+)\)s", lambda match: numbers[match[1]], sql).encode()

    def __repr__(self) -> str:
        return f"Statement({self.sql!r})"


_ENCODE: dict[type, Callable[[Any], bytes | None]] = {
    str: str.encode,
    int: b"%d".__mod__,
    float: lambda value: repr(value).encode(),
    bool: lambda value: b"true" if value else b"false",
    type(None): lambda _: None,
}
_IDLE, _INTRANS = pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS
_PIPELINE_OFF = pq.PipelineStatus.OFF
_UTF8 = (b"UTF8", b"utf8")  # a pooler may repeat what the client sent
_COMMAND_OK, _TUPLES_OK = pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK
_SQLSTATE, _SOURCE_FUNCTION = pq.DiagnosticField.SQLSTATE, pq.DiagnosticField.SOURCE_FUNCTION
_BEGIN_SESSION = (
    b"SELECT pg_catalog.set_config('default_transaction_isolation', 'read committed', false)"
    b" WHERE pg_catalog.pg_backend_pid() = $1::int4"
)
Rows = list[str | None]


class _Direct(psycopg.BaseConnection[Any]):
    """What sync and async connections share: the steps of a statement, which the connection's own ``wait`` runs.

    A statement that is run often is prepared under a name, but in autocommit only: after a rollback or DDL psycopg may
    deallocate every prepared statement of the session. Behind a pooler nothing is prepared
    (``prepare_threshold`` is None).
    """

    watchdog: _Watchdog

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        renew_in_child(self, _give_up)
        self._uses: dict[Statement, int] = {}
        self._names: dict[Statement, bytes] = {}
        self._named = 0

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        """Connect as psycopg does, and remember the descriptor meanwhile: another thread or task may fork."""
        steps, handshake = super()._connect_gen(conninfo), _Handshake()
        try:
            wanted = next(steps)
            while True:
                handshake.remember(wanted[0])
                ready = yield wanted
                wanted = steps.send(ready)
        except StopIteration as stop:
            connection: Self = stop.value
            return connection

    def is_direct(self) -> bool:
        """Whether a statement may be sent now: no BEGIN is due, and no pipeline, COPY or stream is open."""
        pgconn = self.pgconn
        status = pgconn.transaction_status
        return (
            (status == _INTRANS or (status == _IDLE and self.autocommit))
            and pgconn.pipeline_status == _PIPELINE_OFF
            and pgconn.parameter_status(b"client_encoding") in _UTF8
        )

    def _steps(self, statement: Statement, parameters: Mapping[str, Any]) -> Generator[Any, Any, Rows]:
        values: list[Any] = []
        for name in statement._parameters:  # noqa: SLF001 - the two are one piece
            value = parameters[name]
            encode = _ENCODE.get(type(value)) or _ENCODE[str if isinstance(value, str) else int]
            values.append(encode(value))
        if not self.autocommit:
            return self._rows((yield from self._unnamed(statement, values)))
        result = yield from self._perhaps_prepared(statement, values)
        if result.status != _TUPLES_OK and self._is_stale(result):
            self._uses.clear()
            self._names.clear()
            result = yield from self._unnamed(statement, values)  # in autocommit the refused statement left nothing
        return self._rows(result)

    def _perhaps_prepared(self, statement: Statement, values: list[Any]) -> Generator[Any, Any, pq.abc.PGresult]:
        name = self._names.get(statement)
        if name is None:
            uses = self._uses[statement] = self._uses.get(statement, 0) + 1
            if self.prepare_threshold is None or uses <= self.prepare_threshold:
                return (yield from self._unnamed(statement, values))
            name = yield from self._prepare(statement)
        self.pgconn.send_query_prepared(name, values)
        result: pq.abc.PGresult = (yield from generators.execute(self.pgconn))[-1]
        return result

    def begin_session(self) -> Generator[Any, Any, None]:
        """Set the isolation level, or prepare nothing if a pooler is between.

        Then the server's process is not the one that was announced, and a setting would be left to other clients.
        """
        if self.prepare_threshold is None:
            return
        self.pgconn.send_query_params(_BEGIN_SESSION, [b"%d" % self.pgconn.backend_pid])
        result = (yield from generators.execute(self.pgconn))[-1]
        if result.status != _TUPLES_OK or not result.ntuples:
            self.prepare_threshold = None

    def _unnamed(self, statement: Statement, values: list[Any]) -> Generator[Any, Any, pq.abc.PGresult]:
        self.pgconn.send_query_params(statement._numbered, values)  # noqa: SLF001
        result: pq.abc.PGresult = (yield from generators.execute(self.pgconn))[-1]
        return result

    def _prepare(self, statement: Statement) -> Generator[Any, Any, bytes]:
        self._named += 1  # a name is never used again: the server may still know it
        name = b"gathering_%d" % self._named
        self.pgconn.send_prepare(name, statement._numbered)  # noqa: SLF001
        result = (yield from generators.execute(self.pgconn))[-1]
        if result.status != _COMMAND_OK:
            raise psycopg.errors.error_from_result(result, "utf-8")
        self._names[statement] = name
        return name

    @staticmethod
    def _is_stale(result: pq.abc.PGresult) -> bool:
        """Whether a prepared statement is gone (DEALLOCATE, DISCARD), or DDL changed the columns of a table."""
        sqlstate, source = result.error_field(_SQLSTATE) or b"", result.error_field(_SOURCE_FUNCTION) or b""
        return sqlstate == b"26000" or has_stale_plan(sqlstate.decode(), source.decode())

    def _watched(self, steps: PQGen[RV]) -> PQGen[RV]:
        """Forward the steps of a wait, and prepare anew what psycopg prepared before DDL: it would fail each time."""
        try:
            return (yield from self.watchdog.wait(self.pgconn, steps))
        except psycopg.Error as error:
            if has_stale_plan(error.sqlstate, error.diag.source_function):
                self._prepared.clear()
            raise

    @staticmethod
    def _rows(result: pq.abc.PGresult) -> Rows:
        if result.status != _TUPLES_OK:
            raise psycopg.errors.error_from_result(result, "utf-8")
        get = result.get_value
        return [None if (value := get(row, 0)) is None else value.decode() for row in range(result.ntuples)]


class _Handshake:
    """The socket of a connection that is being opened."""

    def __init__(self) -> None:
        self._descriptor, self._inode = -1, -1
        renew_in_child(self, _Handshake.detach)

    def remember(self, descriptor: int) -> None:
        self._descriptor, self._inode = descriptor, os.fstat(descriptor).st_ino

    def detach(self) -> None:
        with suppress(OSError):  # it was closed, or nothing was opened yet
            if os.fstat(self._descriptor).st_ino == self._inode:  # the number was not given to another file
                detach(self._descriptor)


class DirectConnection(_Direct, psycopg.Connection[Any]):
    """The sync connection of ``Database``."""

    watchdog = _Watchdog()

    def fetch(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        """Send a statement and return the first column of its rows, as text.

        Raises:
            psycopg.Error: The class, SQLSTATE and diagnostics are those of psycopg's cursor.
        """
        with self.lock:
            return self.wait(self._steps(statement, parameters))

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait as psycopg does, under the watchdog."""
        return super().wait(self._watched(gen), interval, timeout)

    def commit(self) -> None:
        """Commit; raise ``TransactionAbortedError`` if the transaction has failed."""
        with _no_silent_rollback(self.pgconn):
            super().commit()


class AsyncDirectConnection(_Direct, psycopg.AsyncConnection[Any]):
    """The async connection of ``Database``."""

    watchdog = _Watchdog()

    async def fetch(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        """The async twin of ``DirectConnection.fetch``."""
        async with self.lock:
            return await self.wait(self._steps(statement, parameters))

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:  # noqa: ASYNC109 - psycopg's signature
        """Wait as psycopg does, under the watchdog."""
        return await super().wait(self._watched(gen), interval, timeout)

    async def commit(self) -> None:
        """Commit; raise ``TransactionAbortedError`` if the transaction has failed."""
        with _no_silent_rollback(self.pgconn):
            await super().commit()


@contextmanager
def _no_silent_rollback(pgconn: pq.abc.PGconn) -> Iterator[None]:
    """Raise if the transaction has failed: the server answers its COMMIT with a ROLLBACK and no error."""
    aborted = pgconn.transaction_status == pq.TransactionStatus.INERROR
    yield
    if aborted:
        raise TransactionAbortedError


# Connections of the parent process, in a forked child


class _Inherited(psycopg.BaseConnection[Any]):
    """What sync and async connections of the parent share: leaving one succeeds, and every call is refused.

    It counts as closed, so that nothing is cancelled, too: the statement is the parent's.
    """

    @property
    def closed(self) -> bool:
        return True

    def _check_connection_ok(self) -> None:
        """Let SQLAlchemy make a cursor: the cursor refuses the statement."""

    def _set_autocommit(self, value: bool) -> None:
        """Change nothing: SQLAlchemy resets a connection that it takes back."""

    def _set_isolation_level(self, value: object) -> None:
        """Change nothing, see ``_set_autocommit``."""

    def _set_read_only(self, value: object) -> None:
        """Change nothing, see ``_set_autocommit``."""


class _InheritedCursor(psycopg.Cursor[Any]):
    def execute(self, query: Any, *_args: Any, **_options: Any) -> Self:
        if not _undoes(query):
            raise ForkedConnectionError
        return self


class _AsyncInheritedCursor(psycopg.AsyncCursor[Any]):
    async def execute(self, query: Any, *_args: Any, **_options: Any) -> Self:
        if not _undoes(query):
            raise ForkedConnectionError
        return self


def _undoes(query: object) -> bool:
    """Whether a statement is the end of a ``begin_nested`` block that failed: in the child nothing has to be undone."""
    return isinstance(query, str) and query.startswith("ROLLBACK TO SAVEPOINT")


class InheritedConnection(_Inherited, DirectConnection):
    """A sync connection of the parent process."""

    inherited_cursor_factory = _InheritedCursor

    def wait(self, *_args: Any, **_options: Any) -> Any:
        """Refuse to send anything."""
        raise ForkedConnectionError

    def rollback(self) -> None:
        """Do nothing: the transaction is the parent's."""

    def close(self) -> None:
        """Do nothing: the parent closes its connection."""


class AsyncInheritedConnection(_Inherited, AsyncDirectConnection):
    """An async connection of the parent process."""

    inherited_cursor_factory = _AsyncInheritedCursor

    async def wait(self, *_args: Any, **_options: Any) -> Any:
        """Refuse to send anything."""
        raise ForkedConnectionError

    async def rollback(self) -> None:
        """Do nothing: the transaction is the parent's."""

    async def close(self) -> None:
        """Do nothing: the parent closes its connection."""

    async def set_autocommit(self, value: bool) -> None:
        """Change nothing, see ``InheritedConnection``."""

    async def set_isolation_level(self, value: object) -> None:
        """Change nothing, see ``InheritedConnection``."""

    async def set_read_only(self, value: object) -> None:
        """Change nothing, see ``InheritedConnection``."""


def _give_up(connection: Any) -> None:
    """Leave a connection of psycopg to the parent process: detach the socket, and refuse calls.

    libpq may not close it here: that sends a message, and takes locks where the connection is encrypted.
    """
    with suppress(psycopg.Error):  # it is closed
        detach(connection.pgconn.socket)
    is_async = isinstance(connection, psycopg.AsyncConnection)
    connection.lock = asyncio.Lock() if is_async else threading.Lock()
    connection.__class__ = AsyncInheritedConnection if is_async else InheritedConnection
    connection.cursor_factory = connection.inherited_cursor_factory


# Connecting


class _Connector:
    """Makes the connections of an engine.

    Attributes:
        connected: Whether one was made: from then on a refusal is no fault of the configuration.
    """

    def __init__(self) -> None:
        self.connected = False

    def connect(self, _dialect: object, _record: object, _args: object, arguments: dict[str, Any]) -> DirectConnection:
        rest = dict(arguments)
        watchdog = _Watchdog(rest.pop("answer_timeout"))
        connection = None
        try:
            connection = DirectConnection.connect(**rest)
            _check(connection, watchdog)
            connection.wait(connection.begin_session())
        except psycopg.Error as error:
            raise self._failure(error, connection, rest) from error
        except BaseException:
            _close(connection)
            raise
        self.connected = True
        return connection

    async def connect_async(self, *_args: object, **arguments: Any) -> AsyncDirectConnection:
        check_asyncio()
        watchdog = _Watchdog(arguments.pop("answer_timeout"))
        connection = None
        try:
            connection = await AsyncDirectConnection.connect(**arguments)
            _check(connection, watchdog)
            await connection.wait(connection.begin_session())
        except psycopg.Error as error:
            raise self._failure(error, connection, arguments) from error
        except BaseException:
            _close(connection)
            raise
        self.connected = True
        return connection

    def _failure(
        self,
        error: psycopg.Error,
        connection: DirectConnection | AsyncDirectConnection | None,
        arguments: dict[str, Any],
    ) -> DatabaseError:
        _close(connection)
        return _connect_error(error, arguments, connected_before=self.connected)


def _close(connection: DirectConnection | AsyncDirectConnection | None) -> None:
    if connection is not None:
        connection.pgconn.finish()


def check_asyncio() -> None:
    """Check that an event loop of asyncio runs.

    Raises:
        ConfigurationError: None does, as under trio.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise ConfigurationError(
            "the async API needs an event loop of asyncio, and none is running: start the program by asyncio.run(),"
            " or anyio's backend 'asyncio', not by trio"
        ) from error


def _check(connection: DirectConnection | AsyncDirectConnection, watchdog: _Watchdog) -> None:
    """Refuse a server that is too old or a database in another encoding, and attach the watchdog."""
    version, encoding = connection.info.server_version, connection.info.parameter_status("server_encoding")
    problem = None
    if version < OLDEST_SERVER * 10_000:
        problem = f"the server is PostgreSQL {version // 10_000}: {OLDEST_SERVER} or later is needed"
    elif encoding != "UTF8":
        problem = f"the database's encoding is {encoding}: create it with ENCODING 'UTF8'"
    if problem is not None:
        raise ConfigurationError(problem)
    connection.watchdog = watchdog
    connection.add_notice_handler(watchdog.notice)


# What a server says that starts, stops or is promoted.
_TEMPORARY = re.compile("starting up|shutting down|in recovery|not yet accepting|terminating connection")
# What a server says of a role, password, database or rule that the URL has wrong. libpq gives no SQLSTATE of a refusal.
_WRONG_URL = re.compile(
    "authentication failed|does not exist|no pg_hba.conf entry|pg_hba.conf rejects|not permitted|permission denied"
    "|no password supplied|no PostgreSQL user name|no such (user|database)|not currently accepting connections"
    "|unsupported startup parameter|unsupported frontend protocol|server does not support SSL|certificate|no encryption"
    "|invalid value for parameter|unrecognized configuration parameter|invalid command-line argument"
    "|outside the valid range"
)


def _connect_error(error: psycopg.Error, arguments: dict[str, Any], *, connected_before: bool) -> DatabaseError:
    """Return the error that says in one sentence why there is no connection.

    Configuration is at fault only where that is sure: a server that starts, stops or is promoted refuses connections in
    many words. In another language than English a refusal counts as temporary unless the server asked for a password.
    """
    if not isinstance(error, psycopg.OperationalError):
        return ConfigurationError(f"the database URL can't be used: {shorten(str(error).strip(), 200)}")
    host, port = arguments.get("host", "the local socket"), arguments.get("port", 5432)
    where = f"any of {host}" if ":" in str(port) or "," in str(host) else f"the PostgreSQL server at {host}:{port}"
    *_, last_attempt = str(error).rpartition("connection to server")
    _, answered, reason = last_attempt.strip().rpartition("FATAL:")
    lines = reason.strip().splitlines() or [""]
    reason = shorten(lines[0 if answered else -1], 200)  # a DETAIL and a HINT may follow
    # a temporary condition; only the text identifies it
    if "too many" in reason or "connection slots" in reason:
        return DatabaseUnavailableError(
            f"{where} has no free connection ({reason}): try again, or make the pools smaller"
        )
    asked = error.pgconn is not None and (error.pgconn.used_password or error.pgconn.needs_password)
    if not connected_before and (_WRONG_URL.search(reason) or (asked and answered and not _TEMPORARY.search(reason))):
        return ConfigurationError(
            f"{where} refuses the connection ({reason}): correct the URL's user, password, database or options"
        )
    if answered:
        return DatabaseUnavailableError(f"{where} takes no connections now ({reason}): try again")
    if other_role := re.search("(session is |server is )(not )?(read-only|in hot standby)", reason):
        return DatabaseUnavailableError(f"{where} has not the role that the URL asks for ({other_role[0]}): try again")
    return DatabaseUnavailableError(f"no answer from {where}: start it, or correct the URL's host and port")


TRANSLATED_SCHEMA = (
    "schema_translate_map renames schema circle, which functions and triggers know by that name only: leave it out"
)


def translates_schema(options: Mapping[str, Any]) -> bool:
    """Whether the execution options of a connection or engine rename schema circle."""
    renamed: Mapping[str | None, str | None] = options.get("schema_translate_map") or {}
    return renamed.get("circle", "circle") != "circle"


def direct(connection: Connection) -> DirectConnection | AsyncDirectConnection | None:
    """The driver's connection if a statement may go to it directly, past SQLAlchemy and psycopg's cursor.

    None where something listens to statements (echo, tracing, error trackers), where the connection or its cursors are
    of other classes, and before BEGIN: then the statement goes through SQLAlchemy.
    """
    driver: Any = connection.connection.driver_connection
    if type(driver) not in _CURSORS or driver.cursor_factory is not _CURSORS[type(driver)]:
        return None
    engine_events, dialect_events = connection.dispatch, connection.dialect.dispatch
    if (
        connection._echo  # noqa: SLF001 - the engine's ``echo`` or its logger's level
        or engine_events.before_cursor_execute
        or engine_events.after_cursor_execute
        or dialect_events.do_execute
        or dialect_events.handle_error
    ):
        return None
    usable: DirectConnection | AsyncDirectConnection | None = driver if driver.is_direct() else None
    return usable


_CURSORS: dict[type, type] = {DirectConnection: psycopg.Cursor, AsyncDirectConnection: psycopg.AsyncCursor}


def open_second_connection(connection: Connection) -> psycopg.Connection[Any]:
    """Open another connection to the same database, in autocommit and outside of the pool.

    It is a sync connection even if ``connection`` belongs to an async engine, so that a thread can use it.

    Raises:
        DatabaseUnavailableError: The server takes no second connection.
    """
    try:
        if connection.dialect.is_async:
            info = connection.connection.driver_connection.info  # type: ignore[union-attr]
            address = {"host": info.host, "hostaddr": info.hostaddr, "port": info.port, "password": info.password}
            other = psycopg.connect(**info.get_parameters() | address, autocommit=True)
            renew_in_child(other, _give_up)
            return other
        pooled = connection.engine.pool.recreate().connect()  # connects as the caller's engine does
        second = pooled.driver_connection
        pooled.detach()
        assert isinstance(second, psycopg.Connection)
        second.autocommit = True
    except psycopg.OperationalError as error:
        reason = shorten(str(error).strip(), 200)
        raise DatabaseUnavailableError(
            f"cannot open the second connection that monitors waiting sessions: {reason}"
        ) from error
    return second
