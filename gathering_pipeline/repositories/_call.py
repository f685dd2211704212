"""The way from a repository to the database and back: one statement a call, rows as read models, typed errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, scoped_session

from gathering_pipeline.arguments import check_count, check_cursor, check_type
from gathering_pipeline.errors import (
    CommitIndeterminateError,
    DatabaseUnavailableError,
    IllegalTransitionError,
    IntegrityViolationError,
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
from gathering_pipeline.models import Page, PipelineRead, RunRead

M = TypeVar("M", bound=BaseModel)
P = TypeVar("P", RunRead, PipelineRead)

# --- statements ------------------------------------------------------------------------------------------------------


class ReadOnly(str):
    """A statement that writes nothing: a connection that breaks during it leaves no outcome unknown."""

    __slots__ = ()


class Repository:
    """Base of the repositories: a session, and the ways to send a statement in its transaction."""

    def __init__(self, session: Session) -> None:
        hint = f"'with database.session() as session:' gives one; Async{type(self).__name__} takes an AsyncSession"
        check_type(session, (Session, scoped_session), "session", hint)
        self._session = session

    def _rows(self, statement: str, **parameters: Any) -> list[Any]:
        """Send one statement, after a flush, and return its rows.

        The statement goes to the session's driver connection: SQLAlchemy's result would take as long as a statement
        this quick.

        Raises:
            PipelineError: What the database refused, typed.
            psycopg.Error: Any other error of the database; ``is_transient`` says whether to run the transaction again.
        """
        with connected(self._session, read_only=isinstance(statement, ReadOnly)) as connection:
            cursor = connection.connection.cursor()
            try:
                cursor.execute(statement, parameters)
                return list(cursor.fetchall())
            finally:
                cursor.close()

    def _read(self, model: type[M], statement: str, **parameters: Any) -> list[M]:
        """Send one statement whose rows are JSON texts, and parse each row.

        One text a row is parsed in one go, which is far quicker than sixteen columns through the driver and validation.
        """
        return [model.model_validate_json(row[0]) for row in self._rows(statement, **parameters)]

    def _page(self, model: type[P], statement: str, after: int | None, limit: int, **parameters: Any) -> Page[P]:
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
        rows = self._read(model, statement, after=start, limit=size + 1, **parameters)
        return Page(items=tuple(rows[:size]), next_cursor=rows[size - 1].id if len(rows) > size else None)


@contextmanager
def connected(session: Session, *, read_only: bool = False) -> Iterator[Connection]:
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
        connection = session.connection()
        driver = connection.connection.driver_connection
        session.flush()
        may_write = not read_only
        yield connection
    except (psycopg.Error, DBAPIError) as error:
        if connection is not None and driver is not None and driver.closed:
            _discard(connection, error)
            broken = _broken(error, outcome_unknown=driver.autocommit and may_write)
            _begin_anew(session, driver)
            raise broken from error
        typed = _typed(error)
        if typed is None:
            raise
        raise typed from error
    except PendingRollbackError as error:
        raise TransactionAbortedError from error
    except PoolTimeout as error:
        raise DatabaseUnavailableError(
            "no connection became free in the pool: try again, or raise pool_size or max_overflow"
        ) from error
    except BaseException as error:
        if connection is not None and not isinstance(error, Exception):
            connection.invalidate(error)  # interrupted: the server may still be running the statement
            _begin_anew(session, driver)
        raise


def _discard(connection: Connection, error: Exception) -> None:
    """Remove a broken connection from the pool, as SQLAlchemy does after errors of its own statements."""
    if not connection.invalidated:
        # the pool's other connections are older than the break: none is handed out again
        connection.engine.pool._invalidate(connection.connection, error)  # noqa: SLF001
        connection.invalidate(error)


def _begin_anew(session: Session, driver: Any) -> None:
    """In autocommit mode let the next call take another connection; there is nothing to roll back."""
    if driver is not None and driver.autocommit:
        session.rollback()


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
}
_INVALID_PIPELINE = "PL008"  # DETAIL has the issues
_TRANSACTION_ABORTED = "25P02"
_UNDEFINED = {"3F000", "42P01", "42703", "42883"}  # schema, table, column, function
_UNDEFINED_COLUMN = "42703"


def translate(error: psycopg.Error) -> PipelineError | None:
    """Make the typed error for a database error, by its SQLSTATE and constraint.

    Returns:
        The error; ``None`` where this package defines none.
    """
    sqlstate, diagnostics = error.sqlstate or "", error.diag
    if sqlstate == _TRANSACTION_ABORTED:
        return TransactionAbortedError()
    if sqlstate == _INVALID_PIPELINE:
        issues = json.loads(diagnostics.message_detail or "{}")["issues"]
        return InvalidPipelineError([Issue("error", **issue) for issue in issues])
    if sqlstate in _BY_SQLSTATE:
        return _BY_SQLSTATE[sqlstate](**json.loads(diagnostics.message_detail or "{}"))
    if sqlstate.startswith("23"):  # integrity constraint violation
        return IntegrityViolationError(diagnostics.constraint_name or "", diagnostics.message_primary or "")
    if sqlstate.startswith("22"):  # data exception
        return InvalidDataError(diagnostics.message_primary or "the database can't hold a value")
    return None


def _typed(error: psycopg.Error | DBAPIError) -> PipelineError | None:
    original = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(original, psycopg.Error):
        return None
    # what a flush sends may be about the caller's own tables
    about_schema = not isinstance(error, DBAPIError) or "circle." in (error.statement or "")
    if about_schema and _lacks_part_of_schema(original):
        return SchemaRevisionError(missing=original.diag.message_primary or "")
    return translate(original)


def _lacks_part_of_schema(error: psycopg.Error) -> bool:
    """Whether an undefined object belongs to schema circle. The names in messages are the same in every language."""
    if error.sqlstate not in _UNDEFINED:
        return False
    text = error.diag.message_primary or ""
    if error.sqlstate == _UNDEFINED_COLUMN:
        # the message has no schema: the schema of the function is in the context, after lines that quote expressions
        lines = (error.diag.context or "").splitlines()
        text = next((line for line in lines if line.startswith("PL/pgSQL") and '"' not in line), "circle")
    # without a function's arguments: their types may be of schema circle in a function that is not
    return "circle" in text.partition("(")[0]


def _broken(error: psycopg.Error | DBAPIError, *, outcome_unknown: bool) -> PipelineError:
    original = error.orig if isinstance(error, DBAPIError) else error
    message = f"the connection broke: {shorten(str(original).strip(), 200)}"
    if outcome_unknown:
        return CommitIndeterminateError(f"{message}; the outcome of the call is unknown")
    return DatabaseUnavailableError(message)
