"""The ways in which SQLAlchemy writes a pipeline."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    Result,
    insert,
    update,
)
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Pipeline,
)

Run = Callable[..., Any]
"""Calls a function with a session, in its transaction, and further arguments."""


def add(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.add(Pipeline(**row))
        session.flush()


def add_all(session: Session, *rows: dict[str, Any]) -> None:
    session.add_all([Pipeline(**row) for row in rows])
    session.flush()


def insert_many(session: Session, *rows: dict[str, Any]) -> None:
    session.execute(insert(Pipeline), list(rows))


def insert_one(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.execute(insert(Pipeline), row)


def insert_values(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.execute(insert(Pipeline).values(**row))


def insert_values_by_column(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.execute(insert(Pipeline).values({getattr(Pipeline, key): value for key, value in row.items()}))


def insert_multi_values(session: Session, *rows: dict[str, Any]) -> None:
    session.execute(insert(Pipeline).values(list(rows)))


def insert_returning(session: Session, *rows: dict[str, Any]) -> None:
    result: Result[Any] = session.execute(insert(Pipeline).returning(Pipeline), list(rows))
    assert [pipeline.name for pipeline in result.scalars()] == [row["name"] for row in rows]


def merge(session: Session, *rows: dict[str, Any]) -> None:
    for row in rows:
        session.merge(Pipeline(**row))
    session.flush()


INSERTS = [
    *(add, add_all, insert_many, insert_one, insert_values, insert_values_by_column, insert_multi_values),
    *(insert_returning, merge),
]


by_each_insert = pytest.mark.parametrize("write", INSERTS, ids=lambda write: write.__name__)


def stored(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    return raw.execute("SELECT name, nodes, edges FROM circle.pipelines ORDER BY id").fetchall()


def by_attribute(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    pipeline = session.get_one(Pipeline, pipeline_id)
    for key, value in row.items():
        setattr(pipeline, key, value)
    session.flush()


def by_where(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    session.execute(update(Pipeline).where(Pipeline.id == pipeline_id).values(**row))


def by_column(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    columns = {getattr(Pipeline, key): value for key, value in row.items()}
    session.execute(update(Pipeline).where(Pipeline.id == pipeline_id).values(columns))


def by_primary_key(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    session.execute(update(Pipeline), [{"id": pipeline_id, **row}])


def by_parameters(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    session.execute(update(Pipeline).where(Pipeline.id == pipeline_id), row)


def by_merge(session: Session, pipeline_id: int, row: dict[str, Any]) -> None:
    pipeline = session.get_one(Pipeline, pipeline_id)
    whole = {"name": pipeline.name, "nodes": list(pipeline.nodes), "edges": list(pipeline.edges)}
    session.merge(Pipeline(id=pipeline_id, **{**whole, **row}))
    session.flush()


UPDATES = [by_attribute, by_where, by_column, by_primary_key, by_parameters, by_merge]


by_each_update = pytest.mark.parametrize("write", UPDATES, ids=lambda write: write.__name__)
