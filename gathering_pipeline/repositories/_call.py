"""How repositories talk to the database: one statement a call, and its errors as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, scoped_session

from gathering_pipeline.errors import (
    CommitIndeterminateError,
    DatabaseUnavailableError,
    IllegalTransitionError,
    IntegrityViolationError,
    InvalidCursorError,
    InvalidDataError,
    InvalidPipelineError,
    Issue,
    LeaseLostError,
    NodeNotReadyError,
    NodeRunNotFoundError,
    PipelineError,
    PipelineInactiveError,
    PipelineInUseError,
    PipelineNotFoundError,
    RunNotFoundError,
    SchemaRevisionError,
    StaleVersionError,
    TransactionAbortedError,
    shorten,
)
from gathering_pipeline.hooks import check_storable_json
from gathering_pipeline.json_values import MAX_DEPTH, expect, show
from gathering_pipeline.lifecycle import PipelineStatus, RunStatus
from gathering_pipeline.models import Page, PipelineRead, RunRead

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", RunRead, PipelineRead)

MAX_BIGINT = 2**63 - 1
MAX_ID = 10**100
MAX_DURATION = timedelta(days=36_500)

# SQLSTATEs of the functions and triggers in schema circle; their DETAIL is a JSON object with the error's arguments
_ERRORS: dict[str, type[PipelineError]] = {
    "PL001": IllegalTransitionError,
    "PL002": PipelineNotFoundError,
    "PL003": RunNotFoundError,
    "PL004": NodeRunNotFoundError,
    "PL005": NodeNotReadyError,
    "PL006": PipelineInactiveError,
    "PL007": LeaseLostError,
    "PL009": StaleVersionError,
    "PL010": PipelineInUseError,
}
_UNDEFINED = {"3F000", "42P01", "42703", "42883"}
"""SQLSTATEs of a schema, table, column or function that is not there."""


class Repository:
    """What every repository has: a session."""

    def __init__(self, session: Session) -> None:
        hint = f"'with database.session() as session:' gives one; Async{type(self).__name__} takes an AsyncSession"
        expect(session, (Session, scoped_session), "session", hint)
        self._session = session


class Query(str):
    """A statement that writes nothing: when the connection breaks under it, nothing is open."""

    __slots__ = ()


def call(session: Session, sql: str, parameters: Mapping[str, Any]) -> list[Any]:
    """Run one statement in the session's transaction, after what the session still has to write; return its rows.

    It goes to the session's own driver connection: for statements as quick as these, SQLAlchemy's result around each
    would take as long as the statement.

    Raises:
        PipelineError: The typed form of what the database refused.
        psycopg.Error: Whatever else it said; ``is_transient`` tells whether to run the transaction again.
    """
    parameters = _in_range(parameters)
    with connected(session, reads=isinstance(sql, Query)) as connection:
        cursor = connection.connection.cursor()
        try:
            cursor.execute(sql, parameters)
            return list(cursor.fetchall())
        finally:
            cursor.close()


@contextmanager
def connected(session: Session, *, reads: bool = False) -> Iterator[Connection]:  # noqa: C901 - a branch for each way in which a call can end
    """Give the session's connection, after what the session still has to write, and raise its errors as ours.

    Those that are none of ours pass.
    """
    connection: Connection | None = None
    driver: Any = None
    writing = True
    try:
        connection = session.connection()
        driver = connection.connection.driver_connection
        session.flush()
        writing = not reads
        yield connection
    except (psycopg.Error, DBAPIError) as error:
        original = error.orig if isinstance(error, DBAPIError) else error
        if connection is not None and driver.closed:
            if not connection.invalidated:
                # as SQLAlchemy does it: the others in the pool are older than the break, and not handed out again
                connection.engine.pool._invalidate(connection.connection, error)  # noqa: SLF001
                connection.invalidate(error)
            broken = f"the connection broke: {shorten(str(original).strip(), 200)}"
            if driver.autocommit:
                session.rollback()  # of nothing: it lets the next call have another connection
            if not (driver.autocommit and writing):
                raise DatabaseUnavailableError(broken) from error
            raise CommitIndeterminateError(f"{broken}; the call may have been done or not") from error
        known = translate(original) if isinstance(original, psycopg.Error) else None
        # what is flushed may be the caller's own
        ours = not isinstance(error, DBAPIError) or "circle." in (error.statement or "")
        if ours and isinstance(original, psycopg.Error) and _misses_ours(original):
            known = SchemaRevisionError(missing=original.diag.message_primary or "")
        if known is None:
            raise
        raise known from error
    except PendingRollbackError as error:
        raise TransactionAbortedError from error
    except PoolTimeout as error:
        raise DatabaseUnavailableError(
            "no connection became free in the pool: try again, or make pool_size or max_overflow larger"
        ) from error
    except BaseException as error:
        if connection is not None and not isinstance(error, Exception):
            connection.invalidate(error)  # an interrupt: the statement may still be under way
            if driver is not None and driver.autocommit:
                session.rollback()  # of nothing: it lets the next call have another connection
        raise


def _misses_ours(error: psycopg.Error) -> bool:
    """Whether what is undefined is of our schema, not what a trigger of others looks for. Names are not translated."""
    told = error.diag.message_primary or ""
    if error.sqlstate == "42703":  # of a column its name is told, but not its schema: the function that asked has one
        lines = (error.diag.context or "").splitlines()
        told = next((line for line in lines if line.startswith("PL/pgSQL") and '"' not in line), "circle")
    # of a function without its arguments, whose types may be ours
    return error.sqlstate in _UNDEFINED and "circle" in told.partition("(")[0]


def _in_range(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Answer for ids and tokens that no BIGINT holds: they exist nowhere."""
    for name, error in (("run_id", RunNotFoundError), ("pipeline_id", PipelineNotFoundError)):
        if name in parameters and storable_id(parameters[name], name) != parameters[name]:
            raise error(parameters[name])
    token = parameters.get("token")
    return parameters if token is None else {**parameters, "token": storable_id(token, "token")}


def read(session: Session, schema: type[M], sql: str, **parameters: Any) -> list[M]:
    """Run one statement whose rows are JSON texts, and parse each."""
    return [schema.model_validate_json(row[0]) for row in call(session, sql, parameters)]


def translate(error: psycopg.Error) -> PipelineError | None:
    """Name a database error by its SQLSTATE and constraint; ``None`` where it is none of ours."""
    sqlstate = error.sqlstate or ""
    if sqlstate == "25P02":
        return TransactionAbortedError()
    diagnostics = error.diag
    if sqlstate == "PL008":
        issues = json.loads(diagnostics.message_detail or "{}")["issues"]
        return InvalidPipelineError([Issue("error", **issue) for issue in issues])
    if sqlstate in _ERRORS:
        return _ERRORS[sqlstate](**json.loads(diagnostics.message_detail or "{}"))
    if sqlstate.startswith("23"):
        return IntegrityViolationError(diagnostics.constraint_name or "", diagnostics.message_primary or "")
    if sqlstate.startswith("22"):
        return InvalidDataError(diagnostics.message_primary or "the database can't hold a value")
    return None


def page(session: Session, schema: type[R], sql: str, after: int | None, limit: int, **parameters: Any) -> Page[R]:
    """Read one page by keyset: as fast at its end as at its beginning.

    Args:
        session: The session.
        schema: What a row becomes.
        sql: The statement, newest first, with ``%(after)s`` for the id before which the page begins, and ``%(limit)s``.
        after: Id of the last row of the page before.
        limit: Most rows of the page.
        parameters: The other values.

    Raises:
        InvalidCursorError: ``after`` is no cursor of a page.
    """
    if after is not None and (isinstance(after, bool) or not isinstance(after, int)):
        raise InvalidCursorError(f"after must be the next_cursor of a page, not {show(after)}")
    start = MAX_BIGINT if after is None else min(max(after, 0), MAX_BIGINT)
    found = read(session, schema, sql, after=start, limit=positive(limit, "limit") + 1, **parameters)
    return Page(items=tuple(found[:limit]), next_cursor=found[limit - 1].id if len(found) > limit else None)


def storable_id(value: object, name: str) -> int:
    """Check an id, a version or a token, and give it as the database can look it up: -1, which none is, beyond BIGINT.

    Raises:
        InvalidDataError: It is no whole number, or one too long for a message.
    """
    if type(value) is not int or not -MAX_ID < value < MAX_ID:
        raise InvalidDataError(f"{name} must be a whole number below 10^100, not {show(value)}")
    return value if -MAX_BIGINT <= value <= MAX_BIGINT else -1


def to_json(value: object, path: str, depth: int = MAX_DEPTH) -> str | None:
    """Write JSON for a JSONB parameter; ``None`` is SQL's NULL.

    Raises:
        InvalidDataError: JSONB can't hold the value; the message names the path.
    """
    if value is None:
        return None
    check_storable_json(value, path, depth)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def valid_text(value: str | None, name: str, limit: int | None = None, *, optional: bool = False) -> str | None:
    """Check that PostgreSQL can hold a text.

    Raises:
        InvalidDataError: It is no text, has a NUL or a lone surrogate, or more than ``limit`` characters.
    """
    if value is None and optional:
        return None
    if not isinstance(value, str):
        raise InvalidDataError(f"{name} must be a string, not {type(value).__name__}")
    check_storable_json(value, name)
    if limit is not None and not 0 < len(value) <= limit:
        raise InvalidDataError(f"{name} must have 1 to {limit} characters, not {len(value)}")
    return value


def valid_status(kind: type[RunStatus | PipelineStatus], status: str | None) -> str | None:
    """Check the name of a status; ``None`` is none."""
    try:
        return None if status is None else kind(status).value
    except ValueError:
        raise InvalidDataError(f"status must be one of {', '.join(kind)}, not {show(status)}") from None


def flag(value: object, name: str) -> bool:
    """Check a yes or no: NULL would be neither to the database."""
    if not isinstance(value, bool):
        raise InvalidDataError(f"{name} must be True or False, not {show(value)}")
    return value


def positive(value: object, name: str) -> int:
    """Check a count of rows."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31 - 1:
        raise InvalidDataError(f"{name} must be a whole number from 1 to {2**31 - 2}, not {show(value)}")
    return value


def seconds(value: object, name: str, *, zero: bool = False) -> float:
    """Check a duration."""
    if not isinstance(value, timedelta) or value < timedelta(0) or not (value or zero) or value > MAX_DURATION:
        span = f"{'from' if zero else 'above'} 0 and at most {MAX_DURATION.days} days"
        raise InvalidDataError(f"{name} must be a timedelta {span}, not {show(value)}")
    return value.total_seconds()
