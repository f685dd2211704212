"""Relationships: loaded explicitly, read only, and no part of what a flush writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, aliased, joinedload, selectinload
from sqlalchemy.orm.exc import StaleDataError

from gathering_pipeline import Database, Pipeline, PipelineNodeRun, PipelineRun, RunRepository
from tests.support.databases import scalar
from tests.support.runs import store

pytestmark = pytest.mark.once  # relationships are loaded by SQLAlchemy


@pytest.fixture
def two(session: Session) -> list[int]:
    """Two pipelines with two runs each, of two nodes each."""
    pipelines = [store(session, "b>a") for _ in range(2)]
    for pipeline in pipelines * 2:
        RunRepository(session).create(pipeline)
    session.commit()
    session.expunge_all()
    return pipelines


@contextmanager
def statements(session: Session) -> Iterator[list[str]]:
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(session.get_bind(), "before_cursor_execute", note)
    yield sent
    event.remove(session.get_bind(), "before_cursor_execute", note)


def test_relationships_load_what_is_named_in_few_statements(session: Session, two: list[int]) -> None:
    with statements(session) as sent:
        loaded = session.scalars(
            select(Pipeline)
            .order_by(Pipeline.id)
            .options(
                selectinload(Pipeline.runs).options(
                    joinedload(PipelineRun.pipeline),
                    selectinload(PipelineRun.node_runs).joinedload(PipelineNodeRun.run),
                )
            )
        ).all()
        found = [[(run.pipeline, [node.node_id for node in run.node_runs]) for run in each.runs] for each in loaded]
    assert len(sent) == 3
    assert [each.id for each in loaded] == two
    assert found == [[(pipeline, ["b", "a"])] * 2 for pipeline in loaded]
    for run in loaded[0].runs:
        assert [node.run for node in run.node_runs] == [run, run]


def test_access_to_what_is_not_loaded_raises(session: Session, two: list[int], database_url: str) -> None:
    run = session.scalars(select(PipelineRun).limit(1)).one()
    for row, name in ((session.get_one(Pipeline, two[0]), "runs"), (run, "pipeline"), (run, "node_runs")):
        with pytest.raises(InvalidRequestError, match="lazy='raise'"):
            getattr(row, name)

    async def load() -> list[str]:
        async with Database(database_url) as database, database.async_session() as opened:
            one = await opened.get_one(PipelineRun, run.id)
            with pytest.raises(InvalidRequestError, match="lazy='raise'"):
                _ = one.node_runs
            await opened.refresh(one, ["node_runs"])
            return [node.node_id for node in one.node_runs]

    assert asyncio.run(load()) == ["b", "a"]


def test_delete_leaves_the_cascade_to_the_database(session: Session, raw: psycopg.Connection, two: list[int]) -> None:
    for run in session.scalars(select(PipelineRun)):
        RunRepository(session).cancel(run.id)
    session.commit()
    gone = session.scalars(
        select(Pipeline)
        .where(Pipeline.id == two[0])
        .options(selectinload(Pipeline.runs).selectinload(PipelineRun.node_runs))
    ).one()
    with statements(session) as sent:
        session.delete(gone)
        session.commit()
    assert [statement.split()[:3] for statement in sent] == [["DELETE", "FROM", "circle.pipelines"]]
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_runs") == 2
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_node_runs") == 4


Other = aliased(PipelineRun)
WAYS: dict[str, tuple[Any, Any]] = {
    "joined": (PipelineRun, joinedload(PipelineRun.pipeline).load_only(Pipeline.name)),
    "selectin": (PipelineRun, selectinload(PipelineRun.pipeline).load_only(Pipeline.name)),
    "of an alias": (Other, joinedload(Other.pipeline).load_only(Pipeline.name)),
}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("way", WAYS)
def test_flush_of_a_related_pipeline_that_was_edited_meanwhile_raises(
    session: Session, raw: psycopg.Connection, way: str
) -> None:
    """``revision`` is loaded, whatever ``load_only`` names."""
    entity, option = WAYS[way]
    pipeline = session.scalars(select(entity).options(option).limit(1)).one().pipeline
    raw.execute("UPDATE circle.pipelines SET name = 'theirs'")
    pipeline.name = "mine"
    with pytest.raises(StaleDataError):
        session.flush()
    session.rollback()
