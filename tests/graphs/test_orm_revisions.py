"""``Pipeline.revision`` as the version counter of SQLAlchemy: an edit of what was changed meanwhile is refused."""

import asyncio
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, bindparam, insert, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, defer, load_only, mapped_column, undefer
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import NullPool

from gathering_pipeline import InvalidPipelineError, Pipeline, PipelineNodeRun, PipelineRun
from tests.support.graphs import CYCLIC, DELAY, GOOD, NODES, TRIGGER, values
from tests.support.orm_writes import Run, by_each_update

pytestmark = pytest.mark.once


def state(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    return raw.execute("SELECT name, version, revision FROM circle.pipelines ORDER BY id").fetchall()


@by_each_update
def test_update_returns_to_the_object_what_the_trigger_counted(
    write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection
) -> None:
    def work(session: Session) -> None:
        pipeline = session.get_one(Pipeline, pipeline_id)
        assert (pipeline.version, pipeline.revision) == (1, 1)
        for count, row in enumerate(({"name": "a"}, {"nodes": [TRIGGER], "edges": []}, {"run_count": 5}), 2):
            write(session, pipeline_id, row)
            session.flush()
            assert (pipeline.version, pipeline.revision) == (min(count - 1, 2), min(count, 3))
        pipeline.name = "b"

    run(work)
    assert state(raw) == [("b", 2, 4)]


@pytest.mark.parametrize(
    "options",
    [[], [load_only(Pipeline.nodes)], [defer("*"), undefer(Pipeline.nodes)], [undefer(Pipeline.revision)]],
    ids=["none", "load_only", "defer", "undefer"],
)
def test_second_of_two_sessions_that_edit_is_refused(
    options: list[Any], engine: Engine, pipeline_id: int, raw: psycopg.Connection
) -> None:
    with Session(engine) as first, Session(engine) as second:
        mine, yours = (session.scalars(select(Pipeline).options(*options)).one() for session in (first, second))
        mine.nodes.append(DELAY)
        yours.nodes.append({**DELAY, "id": "other"})
        first.commit()
        with pytest.raises(StaleDataError):
            second.commit()
        second.rollback()
        yours.nodes.append({**DELAY, "id": "other"})
        second.commit()
        assert [node["id"] for node in mine.nodes] == ["t", "a", "d", "other"]
    assert state(raw) == [("p", 3, 3)]
    assert pipeline_id


def test_delete_of_what_was_edited_meanwhile_is_refused(
    engine: Engine, pipeline_id: int, raw: psycopg.Connection
) -> None:
    with Session(engine) as session:
        pipeline = session.get_one(Pipeline, pipeline_id)
        raw.execute("UPDATE circle.pipelines SET name = 'edited'")
        session.delete(pipeline)
        with pytest.raises(StaleDataError):
            session.flush()
        session.rollback()
        session.delete(session.get_one(Pipeline, pipeline_id))
        session.commit()
    assert state(raw) == []


def test_counters_bumped_meanwhile_refuse_no_edit(engine: Engine, pipeline_id: int, raw: psycopg.Connection) -> None:
    with Session(engine) as session:
        pipeline = session.get_one(Pipeline, pipeline_id)
        raw.execute("UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now(), updated_at = now()")
        pipeline.name = "q"
        session.commit()
        assert pipeline.run_count == 1
    assert state(raw) == [("q", 1, 2)]


def test_merge_of_a_detached_object_compares_its_revision(
    engine: Engine, pipeline_id: int, raw: psycopg.Connection
) -> None:
    with Session(engine, expire_on_commit=False) as session:
        detached = session.get_one(Pipeline, pipeline_id)
    raw.execute("UPDATE circle.pipelines SET description = 'edited'")
    detached.name = "q"
    with Session(engine) as session:
        with pytest.raises(StaleDataError):
            session.merge(detached)
        session.add(detached)
        with pytest.raises(StaleDataError):
            session.commit()
        session.rollback()
        session.merge(Pipeline(id=pipeline_id, name="r"))  # without a revision: whatever is stored
        session.commit()
    assert state(raw) == [("r", 1, 3)]


def test_bulk_update_with_and_without_revisions(run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    raw.execute("INSERT INTO circle.pipelines (name) VALUES ('other')")
    rows: list[dict[str, Any]] = [{"id": pipeline_id, "name": "a"}, {"id": 2, "name": "b", "timeout_seconds": None}]
    run(lambda session: session.execute(update(Pipeline), rows))
    assert state(raw) == [("a", 1, 2), ("b", 1, 2)]
    run(lambda session: session.execute(update(Pipeline), [{**row, "name": "c", "revision": 2} for row in rows]))
    assert state(raw) == [("c", 1, 3), ("c", 1, 3)]
    for stale in (
        [{**row, "name": "d", "revision": 2} for row in rows],
        [{"id": 1, "name": "d"}, {"id": 2, "name": "d", "revision": 2}],
        [{"id": 1, "name": "d"}, {"id": 77, "name": "d"}],
    ):
        with pytest.raises(StaleDataError):
            run(lambda session, rows: session.execute(update(Pipeline), rows), stale)
    with pytest.raises(InvalidRequestError, match="primary key"):
        run(lambda session: session.execute(update(Pipeline), [{"name": "d"}]))
    with pytest.raises(InvalidPipelineError):
        run(lambda session: session.execute(update(Pipeline), [{"id": 1, "nodes": CYCLIC[0], "edges": CYCLIC[1]}]))
    assert state(raw) == [("c", 1, 3), ("c", 1, 3)]


def test_bulk_update_with_conditions_and_expressions(run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    statement = update(Pipeline).where(Pipeline.name == bindparam("old")).values(run_count=Pipeline.run_count + 1)
    options = {"synchronize_session": None}
    for old in ("p", "another"):
        row = {"id": pipeline_id, "old": old, "description": old}
        run(lambda session, row=row: session.execute(statement, [row], execution_options=options))
    assert raw.execute("SELECT description, run_count, revision FROM circle.pipelines").fetchall() == [("p", 1, 2)]


def test_bulk_mappings_need_the_revision_as_documented(
    engine: Engine, pipeline_id: int, raw: psycopg.Connection
) -> None:
    with Session(engine) as session:
        session.bulk_update_mappings(Pipeline, [{"id": pipeline_id, "name": "a", "revision": 1}])
        session.commit()
        with pytest.raises(StaleDataError):
            session.bulk_update_mappings(Pipeline, [{"id": pipeline_id, "name": "b", "revision": 1}])
        session.rollback()
        pipeline = session.get_one(Pipeline, pipeline_id)
        session.expunge(pipeline)
        pipeline.name = "c"
        session.bulk_save_objects([pipeline])
        session.commit()
        with pytest.raises(StaleDataError):
            session.bulk_save_objects([pipeline])
    assert state(raw) == [("c", 1, 3)]


def test_update_that_sets_a_stale_revision_is_refused(
    engine: Engine, pipeline_id: int, raw: psycopg.Connection
) -> None:
    with Session(engine) as session:
        session.execute(update(Pipeline).values(name="a", revision=1))
        with pytest.raises(DBAPIError) as refused:
            session.execute(update(Pipeline).values(name="b", revision=1))
        assert getattr(refused.value.orig, "sqlstate", None) == "PL009"
    assert state(raw) == [("p", 1, 1)]
    assert pipeline_id


def test_async_objects_show_what_triggers_changed(database_url: str, pipeline_id: int) -> None:
    async def go() -> None:
        engine = create_async_engine(database_url, poolclass=NullPool)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            pipeline = await session.get_one(Pipeline, pipeline_id)
            pipeline.nodes.append(DELAY)
            await session.flush()
            assert (pipeline.version, pipeline.revision) == (2, 2)
            await session.execute(update(Pipeline).where(Pipeline.id == pipeline_id).values(name="q"))
            assert (pipeline.name, pipeline.revision) == ("q", 3)
            await session.execute(update(Pipeline), [{"id": pipeline_id, "name": "r"}])
            assert (pipeline.name, pipeline.revision) == ("r", 4)
            await session.execute(update(Pipeline), [{"id": pipeline_id, "name": "s", "revision": 4}])
            assert (pipeline.name, pipeline.revision) == ("s", 5)
            pipeline.name = "t"
            await session.commit()
            assert pipeline.revision == 6
            run = PipelineRun(pipeline_id=pipeline_id, status="running")
            session.add(run)
            await session.flush()
            assert (run.pipeline_version, run.started_at is not None, run.completed_at) == (2, True, None)
            node = PipelineNodeRun(run_id=run.id, node_id="t", node_type="trigger", status="running")
            session.add(node)
            await session.flush()
            node.status = "completed"
            await session.flush()
            assert node.completed_at is not None
            await session.execute(update(PipelineRun).where(PipelineRun.id == run.id).values(status="failed"))
            assert (run.status, run.completed_at is not None) == ("failed", True)
            for by_flush in (True, False):
                run = PipelineRun(pipeline_id=pipeline_id, status="running")
                session.add(run)
                await session.flush()
                node = PipelineNodeRun(run_id=run.id, node_id="t", node_type="trigger")
                session.add(node)
                await session.flush()
                if by_flush:
                    run.status = "cancelled"
                    await session.flush()
                else:
                    await session.execute(update(PipelineRun), [{"id": run.id, "status": "cancelled"}])
                assert (run.status, node.status, node.completed_at is not None) == ("cancelled", "cancelled", True)
        await engine.dispose()

    asyncio.run(go())


def test_run_shows_what_triggers_completed(session: Session, pipeline_id: int) -> None:
    run = PipelineRun(pipeline_id=pipeline_id)
    session.add(run)
    session.flush()
    assert (run.pipeline_version, run.started_at) == (1, None)
    run.status = "running"
    session.flush()
    assert run.started_at is not None
    run.status = "cancelled"
    session.flush()
    assert run.completed_at is not None


def test_flush_of_a_status_shows_in_other_objects(run: Run, pipeline_id: int) -> None:
    def work(session: Session) -> None:
        started, other = (PipelineRun(pipeline_id=pipeline_id, status="running") for _ in range(2))
        session.add_all([started, other])
        session.flush()
        first, second = (
            PipelineNodeRun(run_id=started.id, node_id=node_id, node_type="agent", status="running") for node_id in "ta"
        )
        session.add_all([first, second])
        session.flush()
        first.status, first.error_message = "failed", "because"
        session.flush()
        assert (started.__dict__.get("status"), started.failed_node) in ((None, "t"), ("running", "t"))
        started.status = "failed"
        session.flush()
        assert (second.status, second.completed_at is not None, other.status) == ("cancelled", True, "running")

    run(work)


def test_new_object_has_revision_and_version(run: Run) -> None:
    def work(session: Session) -> None:
        pipeline = Pipeline(**values())
        session.add(pipeline)
        session.flush()
        assert "revision" in pipeline.__dict__
        assert (pipeline.version, pipeline.revision, pipeline.nodes) == (1, 1, NODES)
        assert (pipeline.nodes, pipeline.edges) == GOOD

    run(work)


def test_deferred_revision_is_read_by_the_flush(engine: Engine, pipeline_id: int, raw: psycopg.Connection) -> None:
    with Session(engine) as session:
        pipeline = session.scalars(select(Pipeline).options(defer(Pipeline.revision))).one()
        assert "revision" not in pipeline.__dict__
        pipeline.name = "q"
        session.commit()
    assert state(raw) == [("q", 1, 2)]
    assert pipeline_id


def test_numbers_that_were_given_come_back_as_stored(run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    def work(session: Session) -> None:
        pipeline = Pipeline(**values(name="a"), version=5, revision=7)
        session.add(pipeline)
        session.flush()
        assert (pipeline.version, pipeline.revision) == (1, 1)
        pipeline.version = 9
        pipeline.name = "b"
        session.flush()
        assert (pipeline.version, pipeline.revision) == (1, 2)
        started = PipelineRun(pipeline_id=pipeline_id, pipeline_version=9)
        session.add(started)
        session.flush()
        assert started.pipeline_version == 1

    run(work)
    assert state(raw) == [("p", 1, 1), ("b", 1, 2)]


def test_statements_of_an_application_are_left_alone(session: Session) -> None:
    class Own(DeclarativeBase):
        pass

    class Item(Own):
        __tablename__ = "own_items"
        id: Mapped[int] = mapped_column(primary_key=True)
        trigger_data: Mapped[dict[Any, Any]] = mapped_column(JSONB)

    Own.metadata.create_all(session.connection())
    session.execute(insert(Item).values(id=1, trigger_data={1: 2}))
    session.execute(insert(Item), [{"id": 2, "trigger_data": {}}])
    item = session.get_one(Item, 1)
    session.execute(update(Item), [{"id": 1, "trigger_data": {"a": 1}}])
    assert item.trigger_data == {"a": 1}
    assert session.scalars(select(Item.id).options().order_by(Item.id)).all() == [1, 2]
    session.rollback()
