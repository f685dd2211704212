"""The paths on which pipelines are written without the repositories."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import Dialect, Engine, insert, update
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from gathering_pipeline import InvalidPipelineError, Pipeline
from tests.support import servers

DIALECT: Dialect = PGDialect()  # type: ignore[no-untyped-call]

Row = dict[str, Any]
"""Columns of a pipeline; all rows of a call have the same ones, ``id`` among them."""


@dataclass
class Stage:
    """A database, and ways to it."""

    url: str
    engine: Engine
    raw: psycopg.Connection


Write = Callable[[list[Row]], None]
"""Stores these rows, all or none."""

WritePath = Callable[[Stage], AbstractContextManager[Write]]


class RefusedByPsqlError(Exception):
    """What psql says; the argument is the SQLSTATE."""


def _incomplete(row: Row) -> bool:
    return bool(row.get("status", "draft") != "active")


def by_session(save: Callable[[Session, list[Pipeline]], None]) -> WritePath:
    """Objects, in one way or another."""

    @contextmanager
    def by_objects(stage: Stage) -> Iterator[Write]:
        def write(rows: list[Row]) -> None:
            with Session(stage.engine) as session, session.begin():
                save(session, [Pipeline(**copy.deepcopy(row), allow_incomplete=_incomplete(row)) for row in rows])

        yield write

    return by_objects


@contextmanager
def by_insert(stage: Stage) -> Iterator[Write]:
    def write(rows: list[Row]) -> None:
        with Session(stage.engine) as session, session.begin():
            for incomplete in (False, True):
                if some := [copy.deepcopy(row) for row in rows if _incomplete(row) == incomplete]:
                    session.execute(insert(Pipeline), some, execution_options={"allow_incomplete": incomplete})

    yield write


@contextmanager
def by_core(stage: Stage) -> Iterator[Write]:
    def write(rows: list[Row]) -> None:
        with stage.engine.begin() as connection:
            connection.execute(Pipeline.__table__.insert(), rows)  # type: ignore[attr-defined]

    yield write


@contextmanager
def by_core_update(stage: Stage) -> Iterator[Write]:
    table = Pipeline.__table__

    def write(rows: list[Row]) -> None:
        with stage.engine.begin() as connection:
            for row in rows:
                connection.execute(update(table).where(table.c.id == row["id"]).values(row))  # type: ignore[arg-type]

    yield write


def as_json(value: Any) -> str:
    """JSON as another program would write it: as it is, and a number that no float holds with its exponent."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text.replace("Infinity", "1e400")


def _texts(row: Row) -> Row:
    return {key: as_json(value) if key in ("nodes", "edges") else value for key, value in row.items()}


@contextmanager
def by_copy(stage: Stage) -> Iterator[Write]:
    def write(rows: list[Row]) -> None:
        with stage.raw.cursor().copy(f"COPY circle.pipelines ({', '.join(rows[0])}) FROM STDIN") as copying:
            for row in rows:
                copying.write_row([*_texts(row).values()])

    yield write


INSERT = "INSERT INTO circle.pipelines ({names}) VALUES ({values})"
UPSERT = INSERT + " ON CONFLICT (id) DO UPDATE SET {changes}"
UPDATE = (
    "UPDATE circle.pipelines SET {changes} FROM (SELECT {cast}) EXCLUDED ({names}) WHERE pipelines.id = EXCLUDED.id"
)
MERGE = """MERGE INTO circle.pipelines USING (VALUES ({cast})) EXCLUDED ({names}) ON pipelines.id = EXCLUDED.id
    WHEN MATCHED THEN UPDATE SET {changes} WHEN NOT MATCHED THEN INSERT ({names}) VALUES ({theirs})"""


def statement(sql: str, role: str = "origin") -> WritePath:
    """One statement a row."""

    @contextmanager
    def by_sql(stage: Stage) -> Iterator[Write]:
        def write(rows: list[Row]) -> None:
            types = {key: Pipeline.__table__.c[key].type.compile(DIALECT) for key in rows[0]}
            parts = {
                "names": ", ".join(rows[0]),
                "values": ", ".join(f"%({key})s" for key in rows[0]),
                "cast": ", ".join(f"%({key})s::{types[key]}" for key in rows[0]),
                "theirs": ", ".join(f"EXCLUDED.{key}" for key in rows[0]),
                "changes": ", ".join(f"{key} = EXCLUDED.{key}" for key in rows[0] if key != "id"),
            }
            with stage.raw.transaction(), stage.raw.cursor() as cursor:
                cursor.execute(f"SET LOCAL session_replication_role = {role}")
                cursor.executemany(sql.format(**parts), [_texts(row) for row in rows])

        yield write

    return by_sql


@contextmanager
def by_psql(stage: Stage) -> Iterator[Write]:
    """One psql for all; the values are its variables."""
    with subprocess.Popen(
        servers.psql(stage.url), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as program:
        to, back = program.stdin, program.stderr
        assert to is not None
        assert back is not None

        def write(rows: list[Row]) -> None:
            to.write("\\set VERBOSITY sqlstate\nBEGIN;\n\\warn answer :SQLSTATE\n")
            names = ", ".join(rows[0])
            for row in rows:
                for key, value in _texts(row).items():
                    quoted = str(value).replace("\\", "\\\\").replace("'", "\\'")
                    to.write(f"\\set {key} '{quoted}'\n")
                values = ", ".join("NULL" if value is None else f":'{key}'" for key, value in row.items())
                to.write(f"INSERT INTO circle.pipelines ({names}) VALUES ({values});\n\\warn answer :SQLSTATE\n")
            to.write("COMMIT;\n\\warn answer :SQLSTATE\n")
            to.flush()
            answers: list[str] = []
            while len(answers) < len(rows) + 2:
                line = back.readline()
                assert line, "psql went away"
                answers += [line.split()[1]] if line.startswith("answer ") else []
            if refused := [answer for answer in answers if answer != "00000"]:
                raise RefusedByPsqlError(refused[0])

        yield write
        to.close()


INSERTING: dict[str, WritePath] = {
    "session.add": by_session(Session.add_all),
    "bulk_save_objects": by_session(Session.bulk_save_objects),
    "insert(Pipeline)": by_insert,
    "Core": by_core,
    "COPY": by_copy,
    "MERGE": statement(MERGE),
    "ON CONFLICT": statement(UPSERT),
    "psql": by_psql,
    "a replica": statement(INSERT, "replica"),
}
"""What stores new pipelines; ``MERGE`` and ``ON CONFLICT`` update those that are there."""

UPDATING: dict[str, WritePath] = {
    "MERGE": statement(MERGE),
    "ON CONFLICT": statement(UPSERT),
    "UPDATE": statement(UPDATE),
    "UPDATE of a replica": statement(UPDATE, "replica"),
    "UPDATE of Core": by_core_update,
}

BY_HOOK = ("session.add", "insert(Pipeline)")
"""Where the hook answers, before SQL is sent."""


def refusal(write: Write, rows: list[Row]) -> InvalidPipelineError | psycopg.Error | RefusedByPsqlError | None:
    """The error with which a path refuses these rows; None if it stores them."""
    try:
        write(rows)
    except (InvalidPipelineError, psycopg.Error, RefusedByPsqlError) as error:
        return error
    except DBAPIError as error:
        if not isinstance(error.orig, psycopg.Error):
            raise
        return error.orig
    return None


def sqlstate(error: Exception) -> str:
    """The SQLSTATE of a refusal, or the name of our own error."""
    if isinstance(error, psycopg.Error):
        return str(error.sqlstate)
    return str(error) if isinstance(error, RefusedByPsqlError) else type(error).__name__
