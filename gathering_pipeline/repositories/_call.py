"""The way from a repository to the database and back: one statement a call, rows as read models, typed errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import psycopg
from psycopg.pq import TransactionStatus
from pydantic import BaseModel
from sqlalchemy import BigInteger, Connection, Engine, any_, inspect, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError, PendingRollbackError, UnboundExecutionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import QueryableAttribute, Session, scoped_session

from gathering_pipeline.arguments import check_count, check_cursor, check_type
from gathering_pipeline.connections import (
    TRANSLATED_SCHEMA,
    AsyncDirectConnection,
    AsyncInheritedConnection,
    DirectConnection,
    InheritedConnection,
    Rows,
    Statement,
    direct,
    translates_schema,
)
from gathering_pipeline.errors import (
    CommitIndeterminateError,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    ForkedConnectionError,
    IdempotencyConflictError,
    IdsExhaustedError,
    IllegalTransitionError,
    IntegrityViolationError,
    InvalidDataError,
    InvalidPipelineError,
    IsolationLevelError,
    Issue,
    IssueCode,
    LeaseLostError,
    NodeNotReadyError,
    NodeRunNotFoundError,
    PipelineError,
    PipelineInactiveError,
    PipelineInUseError,
    PipelineNotFoundError,
    ReadOnlySessionError,
    RunNotFoundError,
    RunOverError,
    SchemaRevisionError,
    StaleVersionError,
    StatementCancelledError,
    TransactionAbortedError,
    TransactionConflictError,
    has_stale_plan,
    shorten,
)
from gathering_pipeline.models import Page, PipelineRead, RunSummary
from gathering_pipeline.orm import Base, Pipeline, PipelineNodeRun, PipelineRun
from gathering_pipeline.repositories._log import log_change, log_fault

M = TypeVar("M", bound=BaseModel)
P = TypeVar("P", RunSummary, PipelineRead)
A = ParamSpec("A")
R = TypeVar("R")
T = TypeVar("T")

_DRIVER = "psycopg"
READING = "gathering_pipeline.reading"
"""Key in the ``info`` of a session for reads only."""

# --- ways to the database --------------------------------------------------------------------------------------------


class AsyncRepository:
    """Base of the async repositories, which are the source of the sync ones: their methods await one statement each."""

    def __init__(self, session: AsyncSession | async_scoped_session[AsyncSession]) -> None:
        name = type(self).__name__.removeprefix("Async")
        hint = f"'async with database.async_session() as session:' gives one; {name} takes a Session"
        check_type(session, (AsyncSession, async_scoped_session), "session", hint)
        self._transport: _Transport = _Awaiting(session)

    async def _rows(self, statement: Statement, **parameters: Any) -> Rows:
        """Send one statement, after a flush, and return its rows.

        Raises:
            PipelineError: What the database refused, typed.
            psycopg.Error: An error of the database that this package doesn't define, as of a trigger of the host.
        """
        try:
            rows = await self._transport.send(statement, parameters)
        except Exception as error:
            log_fault(statement, parameters, error)
            raise
        if not statement.read_only:
            log_change(statement, parameters, rows)
        return rows

    async def _read(self, model: type[M], statement: Statement, **parameters: Any) -> list[M]:
        """Send one statement whose rows are JSON objects, and parse each row.

        One text a row is parsed in one go, which is far quicker than sixteen columns through the driver and validation.
        """
        return [model.model_validate_json(row or "null") for row in await self._rows(statement, **parameters)]

    async def _values(self, statement: Statement, **parameters: Any) -> list[Any]:
        """Send one statement whose rows are JSON, and parse each row."""
        return [json.loads(row or "null") for row in await self._rows(statement, **parameters)]

    async def _page(
        self, model: type[P], statement: Statement, after: int | None, limit: int, **parameters: Any
    ) -> Page[P]:
        """Read one page by keyset: the last page is as fast as the first.

        Args:
            model: Model of a row.
            statement: A statement that reads newest first, with ``%(after)s`` for the id below which the page starts,
                and ``%(limit)s``.
            after: ``next_cursor`` of the page before.
            limit: Most rows of the page.
            parameters: The statement's other parameters.

        Raises:
            InvalidCursorError: ``after`` is not the cursor of a page.
        """
        start, size = check_cursor(after), check_count(limit, "limit")
        rows = await self._read(model, statement, after=start, limit=size + 1, **parameters)
        return Page(items=tuple(rows[:size]), next_cursor=rows[size - 1].id if len(rows) > size else None)


class Repository:
    """Base of the sync repositories: the methods of the async one, run on a sync session, where nothing waits."""

    _source: type[AsyncRepository]

    def __init__(self, session: Session | scoped_session[Session]) -> None:
        hint = f"'with database.session() as session:' gives one; Async{type(self).__name__} takes an AsyncSession"
        check_type(session, (Session, scoped_session), "session", hint)
        self._bind(_Blocking(session))

    def _bind(self, transport: _Transport) -> None:
        self._calls = self._source.__new__(self._source)
        self._calls._transport = transport  # noqa: SLF001 - the two classes are one piece


def blocking(method: Callable[Concatenate[Any, A], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Repository, A], R]:
    """Make the sync twin of an async repository's method, with the same arguments, result and errors."""

    @wraps(method)
    def twin(self: Repository, /, *args: A.args, **kwargs: A.kwargs) -> R:
        try:
            call = method(self._calls, *args, **kwargs)  # binds the arguments only: nothing runs before finish()
        except TypeError as error:
            name = f"{type(self).__name__}.{method.__name__}"
            raise TypeError(str(error).replace(method.__qualname__, name)) from None
        return finish(call)

    return twin


def iterating(
    method: Callable[Concatenate[Any, A], AsyncIterator[R]],
) -> Callable[Concatenate[Repository, A], Iterator[R]]:
    """Make the sync twin of an async repository's method that yields."""

    @wraps(method)
    def twin(self: Repository, /, *args: A.args, **kwargs: A.kwargs) -> Iterator[R]:
        items = method(self._calls, *args, **kwargs)
        with suppress(StopAsyncIteration):
            while True:
                yield finish(_next(items))

    return twin


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)


def finish(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that never waits, because its statements are sent on a sync session."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    coroutine.close()
    raise AssertionError(f"{coroutine!r} waited")


class _Transport(Protocol):
    """Sends statements on a session."""

    @property
    def autocommit(self) -> bool:
        """Whether each statement is known to be a transaction of its own."""
        ...

    async def send(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        """Send one statement, after a flush, and return its rows."""
        ...

    async def run(self, action: Callable[[Session], T]) -> T:
        """Run what needs the session itself, such as a statement of the ORM."""
        ...


class _Blocking:
    """Sends statements on a sync session."""

    def __init__(self, session: Session | scoped_session[Session]) -> None:
        self._session = session

    @property
    def autocommit(self) -> bool:
        return _is_autocommit(self._session)

    async def send(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        _refuse_write(self._session, statement)
        rows = _send(self._session, statement, parameters)
        if changed := _changed(self._session, statement, parameters):
            refresh(self._session, changed, deletes=statement.deletes)
        return rows

    async def run(self, action: Callable[[Session], T]) -> T:
        """Run what needs the session itself, such as a statement of the ORM."""
        return action(self._session)  # type: ignore[arg-type]  # a scoped_session has the methods of its session


class _Awaiting:
    """Sends statements on an async session; those that go to the driver directly need no greenlet."""

    def __init__(self, session: AsyncSession | async_scoped_session[AsyncSession]) -> None:
        self._session = session
        self._checkout: tuple[Session, Connection] | None = None

    @property
    def autocommit(self) -> bool:
        return _is_autocommit(self._current().sync_session)

    async def send(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        session = self._current()
        _refuse_write(session.sync_session, statement)
        connection = self._checked_out(session.sync_session)
        if connection is None:
            connection = await session.run_sync(self._check_out)
        driver = direct(connection)
        if not isinstance(driver, AsyncDirectConnection):
            rows = await session.run_sync(_send, statement, parameters)
        else:
            rows = await self._fetch(session, connection, driver, statement, parameters)
        if changed := _changed(session.sync_session, statement, parameters):
            await session.run_sync(refresh, changed, deletes=statement.deletes)
        return rows

    @staticmethod
    async def _fetch(
        session: AsyncSession,
        connection: Connection,
        driver: AsyncDirectConnection,
        statement: Statement,
        parameters: Mapping[str, Any],
    ) -> Rows:
        try:
            return await driver.fetch(statement, parameters)
        except BaseException as error:
            failure = await session.run_sync(_failure, connection, driver, error, may_write=not statement.read_only)
            if failure is error:
                raise
            raise failure from error

    async def run(self, action: Callable[[Session], T]) -> T:
        return await self._current().run_sync(action)

    def _current(self) -> AsyncSession:
        """The session; of a scoped one that of the current task."""
        return self._session() if isinstance(self._session, async_scoped_session) else self._session

    def _check_out(self, session: Session) -> Connection:
        with connected(session) as connection:
            self._checkout = session, connection
            return connection

    def _checked_out(self, session: Session) -> Connection | None:
        """The session's connection, if it still has it, and nothing to flush: both would have to wait."""
        owner, connection = self._checkout or (None, None)
        if owner is not session or connection is None:  # a scoped session is another one in each task
            return None
        if connection.closed or connection.invalidated or not session.in_transaction():
            return None
        return None if session.new or session.dirty or session.deleted else connection


class Apart:
    """Sends each statement on a session of its own, which is opened for it."""

    autocommit = True

    def __init__(self, open_session: Callable[[], AbstractAsyncContextManager[AsyncSession]]) -> None:
        self._open_session = open_session

    async def send(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        """Send one statement and return its rows."""
        async with self._open_session() as session:
            return await _Awaiting(session).send(statement, parameters)

    async def run(self, action: Callable[[Session], T]) -> T:
        """Run what needs the session itself."""
        async with self._open_session() as session:
            return await session.run_sync(action)


class ApartBlocking:
    """The sync twin of ``Apart``."""

    autocommit = True

    def __init__(self, open_session: Callable[[], AbstractContextManager[Session]]) -> None:
        self._open_session = open_session

    async def send(self, statement: Statement, parameters: Mapping[str, Any]) -> Rows:
        """Send one statement and return its rows."""
        with self._open_session() as session:
            return _send(session, statement, parameters)

    async def run(self, action: Callable[[Session], T]) -> T:
        """Run what needs the session itself."""
        with self._open_session() as session:
            return action(session)


def _refuse_write(session: Session | scoped_session[Session], statement: Statement) -> None:
    """Refuse a call that may write in a session for reads, also where it would find nothing to write."""
    if not statement.read_only and READING in session.info:
        raise ReadOnlySessionError


def _send(session: Session | scoped_session[Session], statement: Statement, parameters: Mapping[str, Any]) -> Rows:
    with connected(session, read_only=statement.read_only) as connection:
        driver = direct(connection)
        if isinstance(driver, DirectConnection):
            rows = driver.fetch(statement, parameters)
        else:
            try:
                rows = [row[0] for row in connection.exec_driver_sql(statement.sql, dict(parameters))]
            except DBAPIError as error:
                raise error.orig or error from error  # one statement has one error, whichever way it went
    return rows


@contextmanager
def connected(session: Session | scoped_session[Session], *, read_only: bool = False) -> Iterator[Connection]:
    """Flush the session and give its connection; raise the database's errors as errors of this package.

    An error that this package doesn't define passes unchanged.

    Args:
        session: The session.
        read_only: The block writes nothing.
    """
    connection: Connection | None = None
    driver: Any = None
    may_write = True  # the flush may
    try:
        connection = session.connection(bind_arguments={"bind": _bind(session)})
        _refuse_translated_schema(connection)
        driver = connection.connection.driver_connection
        session.flush()
        may_write = not read_only
        yield connection
    except BaseException as error:
        failure = _failure(session, connection, driver, error, may_write=may_write)
        if failure is error:
            raise
        raise failure from error


def _is_autocommit(session: Session | scoped_session[Session]) -> bool:
    return _bind(session).get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def _refuse_translated_schema(connection: Connection) -> None:
    """Refuse a map that renames the schema: SQLAlchemy's statements would use another one than those sent directly."""
    if translates_schema(connection.get_execution_options()):
        raise ConfigurationError(TRANSLATED_SCHEMA)


def _bind(session: Session | scoped_session[Session]) -> Engine | Connection:
    """The engine, or connection, that the session uses for the ORM classes.

    Raises:
        ConfigurationError: The session has none, or its driver is not psycopg.
    """
    try:
        bind = session.get_bind(Pipeline)
    except UnboundExecutionError:
        raise ConfigurationError(
            "the session has no engine: make it by Session(engine) or database.session()"
        ) from None
    dialect = bind.dialect
    if dialect.driver != _DRIVER:
        raise ConfigurationError(
            f"the session's engine uses the driver {dialect.driver} ({dialect.name}+{dialect.driver}):"
            f" make the engine with postgresql+{_DRIVER}://"
        )
    return bind


def _failure(  # noqa: C901, PLR0911 - each kind of error has its end
    session: Session | scoped_session[Session],
    connection: Connection | None,
    driver: Any,
    error: BaseException,
    *,
    may_write: bool,
) -> BaseException:
    """Give up a connection that can't be used any more, and return the error to raise."""
    if isinstance(error, CommitIndeterminateError):
        if connection is not None and driver.closed:
            _discard(connection, error)
            _begin_anew(session, driver)
        return error
    if isinstance(error, (psycopg.Error, DBAPIError)):
        if isinstance(driver, (InheritedConnection, AsyncInheritedConnection)):  # the call began before the fork
            return ForkedConnectionError()
        if connection is not None and driver is not None and driver.closed:
            _discard(connection, error)
            broken = _broken_connection(error, outcome_unknown=driver.autocommit and may_write)
            _begin_anew(session, driver)
            return broken
        if connection is None and isinstance(getattr(error, "orig", error), psycopg.OperationalError):
            return _broken_connection(error, outcome_unknown=False)  # the server ended it before anything was sent
        return (read_only_failure(error) if READING in session.info else None) or _typed(error) or error
    if isinstance(error, PendingRollbackError):
        return TransactionAbortedError()
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailableError(
            "no connection became free in the pool: try again, or raise pool_size or max_overflow"
        )
    if isinstance(error, Exception) or connection is None or driver is None:
        return error
    # an interrupt: the driver has cancelled the statement, or closed the connection where that failed
    if driver.closed or driver.info.transaction_status == TransactionStatus.ACTIVE:
        connection.invalidate(error)
        _begin_anew(session, driver)
    return error


def _discard(connection: Connection, error: BaseException) -> None:
    """Remove a broken connection from the pool, as SQLAlchemy does after errors of its own statements."""
    if not connection.invalidated:
        # the pool's other connections are older than the break: none is handed out again
        connection.engine.pool._invalidate(connection.connection, error)  # noqa: SLF001
        connection.invalidate(error)


def _begin_anew(session: Session | scoped_session[Session], driver: Any) -> None:
    """In autocommit mode let the next call take another connection; there is nothing to roll back."""
    if driver is not None and driver.autocommit:
        session.rollback()


# --- objects of the session ------------------------------------------------------------------------------------------

_ROWS: dict[type[Base], QueryableAttribute[int]] = {
    Pipeline: Pipeline.id,
    PipelineRun: PipelineRun.id,
    PipelineNodeRun: PipelineNodeRun.id,
}
"""The ORM classes and their primary keys."""


def _changed(
    session: Session | scoped_session[Session], statement: Statement, parameters: Mapping[str, Any]
) -> list[Base]:
    """The session's objects whose rows a call may have changed. No call on runs edits a pipeline.

    What is expired is read anew in any case.
    """
    # a call with trigger_data creates a run, and changes no other row
    if not session.identity_map or statement.read_only or "trigger_data" in parameters:
        return []
    run_id, deleted = parameters.get("run_id"), parameters.get("pipeline_id")
    changed: list[Base] = []
    for row in session.identity_map.values():
        loaded = row.__dict__
        if (
            (isinstance(row, Pipeline) and deleted is not None and loaded.get("id") == deleted)
            or (isinstance(row, PipelineRun) and "id" in loaded and run_id in (None, loaded["id"]))
            or (isinstance(row, PipelineNodeRun) and "run_id" in loaded and run_id in (None, loaded["run_id"]))
        ):
            changed.append(row)
    return changed


def refresh(session: Session | scoped_session[Session], rows: Iterable[Base], *, deletes: bool = False) -> None:
    """Let objects of the session show their rows as they are after a call.

    They are read at once, by a statement a class: objects of an async session, and detached ones, can't be read when
    they are used. After a call that ``deletes`` an object leaves the session if its row isn't found.

    Raises:
        PipelineError: They could not be read, and so the transaction is lost. In autocommit the call had succeeded:
            then they are expired.
    """
    if isinstance(session, scoped_session):
        session = session()
    left = {inspect(row).key: row for row in rows}
    # a rollback to a savepoint undoes the change: SQLAlchemy then expires what it knows as altered
    session._register_altered(inspect(row) for row in left.values())  # noqa: SLF001
    try:
        with connected(session, read_only=True):
            for read in _read_anew(session, left):
                left.pop(inspect(read).key, None)
    except PipelineError:
        if session.get_bind(Pipeline).get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            raise
        deletes = False
    for row in left.values():
        if deletes:
            session.expunge(row)
        else:
            session.expire(row)


def _read_anew(session: Session | scoped_session[Session], rows: Mapping[Any, Base]) -> Iterator[Base]:
    for class_, key in _ROWS.items():
        if ids := [identity[0] for mapped, identity, _ in rows if issubclass(mapped, class_)]:
            statement = select(class_).where(key == any_(literal(ids, ARRAY(BigInteger))))
            yield from session.scalars(statement.execution_options(populate_existing=True))


# --- errors ----------------------------------------------------------------------------------------------------------

# SQLSTATEs raised by functions and triggers of the schema; DETAIL is a JSON object with the arguments of the error
_BY_SQLSTATE: dict[str, type[PipelineError]] = {
    "PL001": IllegalTransitionError,
    "PL002": PipelineNotFoundError,
    "PL003": RunNotFoundError,
    "PL004": NodeRunNotFoundError,
    "PL005": NodeNotReadyError,
    "PL006": PipelineInactiveError,
    "PL007": LeaseLostError,
    "PL009": StaleVersionError,
    "PL010": PipelineInUseError,
    "PL011": IsolationLevelError,
    "PL012": RunOverError,
    "PL014": IdempotencyConflictError,
}
_INVALID_PIPELINE = "PL008"  # DETAIL has the issues
_UNKNOWN_BRANCH = "PL013"
_TRANSACTION_ABORTED = "25P02"
_UNDEFINED = {"3F000", "42P01", "42703", "42883"}  # schema, table, column, function
_UNDEFINED_COLUMN = "42703"
_INSUFFICIENT_PRIVILEGE = "42501"
_READ_ONLY = "25006"
_ENDED_IDLE = {"57P05", "25P03"}  # the server ended an idle session: it did nothing of what was sent
# Errors that the server may raise in any statement: by SQLSTATE, else by its class. What is left passes unchanged.
_OF_ANY_STATEMENT: dict[str, tuple[type[PipelineError], str]] = {
    _READ_ONLY: (
        DatabaseUnavailableError,
        "the server or the session is read-only: connect to the primary, or unset default_transaction_read_only",
    ),
    "2200H": (IdsExhaustedError, "a table has used up its ids: run gathering-pipeline db widen"),
    "55P03": (TransactionConflictError, "a lock did not become free: run the transaction again"),
    "57014": (StatementCancelledError, "the statement was cancelled"),
    "08P01": (DatabaseError, "client and server or pooler understand each other wrongly"),
    "08": (DatabaseUnavailableError, "the server can't reach another one"),
    "22": (InvalidDataError, "the database can't hold a value"),
    "40": (TransactionConflictError, "another transaction was in the way: run the transaction again"),
    "53": (DatabaseUnavailableError, "the server lacks disk space, memory or another resource"),
    "54": (InvalidDataError, "a value is too large for the database"),
    "58": (DatabaseUnavailableError, "the server can't read or write a file, or met another error of its system"),
}


def translate(error: psycopg.Error) -> PipelineError | None:  # noqa: PLR0911 - one a kind of error
    """Make the typed error for a database error, by its SQLSTATE and constraint.

    Returns:
        The error; ``None`` where this package defines none.
    """
    sqlstate, diagnostics = error.sqlstate or "", error.diag
    if has_stale_plan(sqlstate, diagnostics.source_function):
        reason = shorten(diagnostics.message_primary or "", 200)
        return TransactionConflictError(f"a table got other columns: run the transaction again ({reason})")
    if sqlstate == _TRANSACTION_ABORTED:
        return TransactionAbortedError()
    if sqlstate == _INVALID_PIPELINE:
        issues = json.loads(diagnostics.message_detail or "{}")["issues"]
        return InvalidPipelineError([_issue(**issue) for issue in issues])
    if sqlstate == _UNKNOWN_BRANCH:
        return InvalidDataError(diagnostics.message_primary or "")
    if sqlstate in _BY_SQLSTATE:
        return _BY_SQLSTATE[sqlstate](**json.loads(diagnostics.message_detail or "{}"))
    if sqlstate.startswith("23"):  # integrity constraint violation
        return IntegrityViolationError(diagnostics.constraint_name or "", diagnostics.message_primary or "")
    return _of_any_statement(error)


def read_only_failure(error: psycopg.Error | DBAPIError) -> ReadOnlySessionError | None:
    """Make the typed error for a write in a session for reads; ``None`` for any other error."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return ReadOnlySessionError() if getattr(original, "sqlstate", None) == _READ_ONLY else None


def commit_failure(error: DBAPIError) -> PipelineError | None:
    """Make the typed error for a commit that failed; ``None`` for what deferred constraints and triggers refused."""
    if error.connection_invalidated:
        return _broken_connection(error, outcome_unknown=True, during="commit")
    failure = _of_any_statement(error.orig) if isinstance(error.orig, psycopg.Error) else None
    return failure if isinstance(failure, DatabaseError) else None


def _of_any_statement(error: psycopg.Error) -> PipelineError | None:
    sqlstate = error.sqlstate or ""
    found = _OF_ANY_STATEMENT.get(sqlstate) or _OF_ANY_STATEMENT.get(sqlstate[:2])
    return found and found[0](f"{found[1]} ({shorten(error.diag.message_primary or '', 200)})")


def _issue(code: str, loc: list[str | int], **texts: str | None) -> Issue:
    known = IssueCode(code) if code in set(IssueCode) else IssueCode.UNKNOWN_RULE
    return Issue(known.severity, known, loc=tuple(loc), **texts)  # type: ignore[arg-type]  # the message is a string


def _typed(error: psycopg.Error | DBAPIError) -> PipelineError | None:
    """``translate``, and what depends on whether the statement was one on this schema."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(original, psycopg.Error):
        return None
    # what a flush sends may be about the caller's own tables
    about_schema = not isinstance(error, DBAPIError) or "circle." in (error.statement or "")
    if about_schema and _lacks_part_of_schema(original):
        return SchemaRevisionError(missing=original.diag.message_primary or "")
    if about_schema and original.sqlstate == _INSUFFICIENT_PRIVILEGE:
        reason = shorten(original.diag.message_primary or "", 200)
        return ConfigurationError(f"the role lacks a right ({reason}): docs/operations.md has the rights of a service")
    return translate(original)


def _lacks_part_of_schema(error: psycopg.Error) -> bool:
    """Whether an undefined object belongs to schema circle. The names in messages are the same in every language."""
    if error.sqlstate not in _UNDEFINED or has_stale_plan(error.sqlstate, error.diag.source_function):
        return False
    text = error.diag.message_primary or ""
    if error.sqlstate == _UNDEFINED_COLUMN:
        # the message has no schema: the schema of the function is in the context, after lines that quote expressions
        lines = (error.diag.context or "").splitlines()
        text = next((line for line in lines if line.startswith("PL/pgSQL") and '"' not in line), "circle")
    # without a function's arguments: their types may be of schema circle in a function that is not
    return "circle" in text.partition("(")[0]


def _broken_connection(
    error: psycopg.Error | DBAPIError, *, outcome_unknown: bool, during: str = "call"
) -> PipelineError:
    """Make the error for a broken connection.

    Args:
        error: The driver's error, or SQLAlchemy's around it.
        outcome_unknown: Whether the server may have committed what was sent, unless the error proves the opposite.
        during: What was sent: ``call`` or ``commit``.
    """
    original = error.orig if isinstance(error, DBAPIError) else error
    message = f"the connection broke during the {during}: {shorten(str(original).strip(), 200)}"
    if outcome_unknown and getattr(original, "sqlstate", None) not in _ENDED_IDLE:
        return CommitIndeterminateError(f"{message}; its outcome is unknown")
    return DatabaseUnavailableError(message)
