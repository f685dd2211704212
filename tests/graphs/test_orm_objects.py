"""``Pipeline.definition``, edits in place, and statements that the hook leaves alone."""

import asyncio
import copy

import psycopg
import pytest
from sqlalchemy import (
    bindparam,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
    PipelineDefinition,
    PipelineEdge,
    PipelineNode,
    PipelineRun,
)
from tests.support.graphs import AGENT, BACK, CYCLIC, EDGE, GOOD, TRIGGER, values
from tests.support.orm_writes import Run, stored

pytestmark = pytest.mark.once


def test_definition_reads_and_replaces_the_graph(session: Session, raw: psycopg.Connection) -> None:
    pipeline = Pipeline(**values())
    assert [node.id for node in pipeline.definition.nodes] == ["t", "a"]
    session.add(pipeline)
    session.commit()
    definition = pipeline.definition
    assert definition.node_map["a"].config["agent_id"] == 7
    assert pipeline.nodes == GOOD[0]
    definition.nodes.append(PipelineNode(id="d", type="delay", name="D"))
    definition.edges.append(PipelineEdge(id="f", from_node="a", to_node="d"))
    pipeline.definition = definition
    session.commit()
    session.refresh(pipeline)
    name, nodes, edges = stored(raw)[0]
    assert (name, nodes[:2], edges[:1]) == ("p", *GOOD)
    assert nodes[2] == {"id": "d", "type": "delay", "name": "D"}
    assert edges[1] == {"id": "f", "from": "a", "to": "d"}
    assert pipeline.version == 2
    assert pipeline.definition == definition


def test_pipeline_with_definition_stores_its_graph(session: Session, raw: psycopg.Connection) -> None:
    session.add(Pipeline(name="p", definition=PipelineDefinition.from_json(*copy.deepcopy(GOOD))))
    session.commit()
    assert stored(raw) == [("p", *GOOD)]


def test_edit_in_place_is_detected_and_checked(run: Run, raw: psycopg.Connection) -> None:
    def build(session: Session) -> None:
        pipeline = Pipeline(name="p")
        pipeline.nodes.append(TRIGGER)
        session.add(pipeline)
        session.flush()
        pipeline.nodes.append(AGENT)
        pipeline.edges.append(EDGE)

    run(build)
    assert stored(raw) == [("p", *GOOD)]

    def edit(session: Session) -> None:
        pipeline = session.get_one(Pipeline, 1)
        pipeline.edges.append(BACK)

    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(edit)

    def other_edits(session: Session) -> None:
        pipeline = session.get_one(Pipeline, 1)
        del pipeline.edges[0]
        pipeline.nodes[1] = {**AGENT, "name": "renamed"}
        pipeline.nodes.extend([PipelineNode(id="d", type="delay", name="D")])
        pipeline.nodes.sort(key=lambda node: node["id"] if isinstance(node, dict) else node.id)

    run(other_edits)
    assert [node["id"] for node in stored(raw)[0][1]] == ["a", "d", "t"]
    assert stored(raw)[0][1][0]["name"] == "renamed"
    assert raw.execute(
        "SELECT version, (SELECT count(*) FROM circle.pipeline_versions) FROM circle.pipelines"
    ).fetchone() == (
        3,
        3,
    )


def test_flush_leaves_object_equal_to_row(session: Session) -> None:
    pipeline = Pipeline(name="p", nodes=[PipelineNode(id="t", type="trigger", name="T")], edges=[])
    session.add(pipeline)
    session.flush()
    assert pipeline.nodes == [{"id": "t", "type": "trigger", "name": "T"}]
    session.expire(pipeline)
    assert pipeline.nodes == [{"id": "t", "type": "trigger", "name": "T"}]


def test_statement_on_other_table_or_select_is_left_alone(session: Session, pipeline_id: int) -> None:
    session.execute(insert(PipelineRun).values(pipeline_id=pipeline_id, status="running"))
    session.execute(update(PipelineRun).values(current_node="t"))
    assert session.scalars(select(Pipeline.name)).all() == ["p"]
    assert session.execute(text("UPDATE circle.pipelines SET description = 'x' RETURNING id")).scalar() == pipeline_id


def test_insert_bound_parameter_is_checked(session: Session, raw: psycopg.Connection) -> None:
    statement = insert(Pipeline).values(name=literal("p"), nodes=bindparam("graph"), edges=bindparam("more"))
    with pytest.raises((InvalidPipelineError, DBAPIError)):
        session.execute(statement, {"graph": CYCLIC[0], "more": CYCLIC[1]})
    session.rollback()
    assert stored(raw) == []


def test_async_session_calls_are_checked(database_url: str, raw: psycopg.Connection) -> None:
    async def go() -> None:
        engine = create_async_engine(database_url, poolclass=NullPool)
        async with AsyncSession(engine) as session:
            session.add(Pipeline(**values(CYCLIC)))
            with pytest.raises(InvalidPipelineError):
                await session.commit()
            await session.rollback()
            with pytest.raises(InvalidPipelineError):
                await session.execute(insert(Pipeline), [values(), values(CYCLIC)])
            with pytest.raises(InvalidPipelineError):
                await session.execute(update(Pipeline).values(nodes=[]))
            await session.execute(insert(Pipeline), [values(name="kept")])
            await session.commit()
        await engine.dispose()

    asyncio.run(go())
    assert stored(raw) == [("kept", *GOOD)]
