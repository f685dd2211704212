"""ORM objects of a session after calls of repositories in the same session."""

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, inspect, select, text
from sqlalchemy.orm import ORMExecuteState, Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    AsyncPipelineRepository,
    AsyncRunRepository,
    Database,
    Pipeline,
    PipelineNodeRun,
    PipelineRepository,
    PipelineRun,
    PipelineUpdate,
    RunReport,
    RunRepository,
    StatementCancelledError,
)
from tests.support.graphs import NODES
from tests.support.pipelines import new

pytestmark = pytest.mark.once  # the objects of a session are kept by SQLAlchemy

LEASE = timedelta(seconds=30)
ONLY = [{"id": "t", "type": "trigger", "name": "T"}]


@pytest.fixture
def made(database: Database) -> int:
    with database.session() as session:
        return PipelineRepository(session).create(new(status="active")).id


@pytest.fixture(params=["Database", "autocommit", "Session", "scoped_session"])
def any_session(request: pytest.FixtureRequest, database: Database, database_url: str) -> Any:
    engine = create_engine(database_url, poolclass=NullPool)
    if request.param in ("Database", "autocommit"):
        with database.session(autocommit=request.param == "autocommit") as session:
            yield session
    elif request.param == "Session":
        with Session(engine) as session:
            yield session
    else:
        scoped = scoped_session(sessionmaker(engine))
        yield scoped
        scoped.remove()


def test_edit_shows_in_the_session(any_session: Session, made: int) -> None:
    pipeline = any_session.get_one(Pipeline, made)
    pipelines = PipelineRepository(any_session)
    pipelines.update(made, PipelineUpdate(nodes=ONLY, edges=[], name="q"), expected_revision=pipeline.revision)
    assert (pipeline.name, pipeline.nodes, pipeline.version, pipeline.revision) == ("q", ONLY, 2, 2)
    pipelines.pause(made)
    assert (pipeline.status, pipeline.revision) == ("paused", 3)
    pipeline.nodes.append({**ONLY[0], "id": "u"})  # still tracked, and no stale revision
    any_session.flush()
    assert pipeline.revision == 4
    pipelines.activate(made)
    assert (pipeline.status, pipeline.revision) == ("active", 5)


def test_transitions_show_in_the_session(any_session: Session, made: int) -> None:
    runs = RunRepository(any_session)
    run = any_session.get_one(PipelineRun, runs.create(made).id)
    other = any_session.get_one(PipelineRun, runs.create(made).id)
    nodes = any_session.scalars(
        select(PipelineNodeRun).where(PipelineNodeRun.run_id == run.id).order_by(PipelineNodeRun.position)
    ).all()
    assert (run.status, [node.status for node in nodes]) == ("pending", ["pending", "pending"])
    token = runs.claim("w", LEASE)[0].token
    assert (run.status, run.worker_id, other.status) == ("running", "w", "pending")
    runs.advance(run.id, token=token)
    assert [node.status for node in nodes] == ["running", "pending"]
    runs.complete_node(run.id, "t", {"x": 1}, token=token)
    assert (nodes[0].status, nodes[0].output_data) == ("completed", {"x": 1})
    runs.cancel(run.id)
    assert (run.status, run.completed_at is not None, [node.status for node in nodes]) == (
        "cancelled",
        True,
        ["completed", "cancelled"],
    )
    assert runs.advance_many([RunReport(other.id)]) != [None]
    assert other.status == "running"


def test_object_of_deleted_row_leaves_the_session(any_session: Session, made: int) -> None:
    run_id = RunRepository(any_session).create(made).id
    pipeline, run = any_session.get_one(Pipeline, made), any_session.get_one(PipelineRun, run_id)
    node = any_session.scalars(select(PipelineNodeRun)).first()
    PipelineRepository(any_session).delete(made, force=True)
    for row in (pipeline, run, node):
        assert inspect(row).detached
    assert (pipeline.name, run.status) == ("p", "pending")  # as they were
    assert any_session.get(Pipeline, made) is None


def test_objects_can_be_read_after_the_session(database: Database, made: int) -> None:
    with database.session() as session:
        pipeline = session.get_one(Pipeline, made)
        PipelineRepository(session).update(made, PipelineUpdate(name="q"))
    assert (pipeline.name, pipeline.revision) == ("q", 2)


def test_other_runs_and_reads_send_nothing_more(database: Database, made: int) -> None:
    with database.session() as session:
        runs = RunRepository(session)
        first, second = runs.create(made).id, runs.create(made).id
        pipeline, run = session.get_one(Pipeline, made), session.get_one(PipelineRun, first)
        sent: list[str] = []

        @event.listens_for(session, "do_orm_execute")
        def note(state: Any) -> None:
            sent.append(str(state.statement))

        for call in (runs.get, runs.nodes, runs.start):
            call(second)
        runs.create(made)
        assert sent == []
        runs.start(first)
        assert len(sent) == 1
        assert (pipeline.name, run.status) == ("p", "running")


def test_async_objects_need_no_lazy_load(database: Database, made: int) -> None:
    async def go() -> None:
        for autocommit in (False, True):
            async with database.async_session(autocommit=autocommit) as session:
                pipelines, runs = AsyncPipelineRepository(session), AsyncRunRepository(session)
                pipeline = await session.get_one(Pipeline, made)
                await pipelines.update(made, PipelineUpdate(name=f"{autocommit}"))
                assert pipeline.name == f"{autocommit}"
                run_id = (await runs.create(made)).id
                run = await session.get_one(PipelineRun, run_id)
                nodes = (await session.scalars(select(PipelineNodeRun).where(PipelineNodeRun.run_id == run_id))).all()
                await runs.advance(run_id)
                assert (run.status, sorted(node.status for node in nodes)) == ("running", ["pending", "running"])
                await runs.cancel(run_id)
                assert (run.status, {node.status for node in nodes}) == ("cancelled", {"cancelled"})
                pipeline.description = "edited"
                await session.flush()
                await session.rollback()
        async with database.async_session() as session:
            pipeline = await session.get_one(Pipeline, made)
            await AsyncPipelineRepository(session).delete(made, force=True)
            assert (pipeline.nodes, inspect(pipeline).detached) == (NODES, True)
        await database.adispose()

    asyncio.run(go())
    assert isinstance(database, Database)


def test_objects_of_an_application_are_left_alone(engine_of_test: Engine, made: int, raw: psycopg.Connection) -> None:
    with Session(engine_of_test) as session:
        pipeline = session.get_one(Pipeline, made)
        raw.execute("UPDATE circle.pipelines SET description = 'another writer'")
        run_id = RunRepository(session).create(made).id
        RunRepository(session).start(run_id)
        assert pipeline.description is None  # only what a call may have changed is read


@pytest.fixture
def engine_of_test(database_url: str) -> Any:
    made = create_engine(database_url, poolclass=NullPool)
    yield made
    made.dispose()


def test_call_on_runs_leaves_the_revision_of_an_edit_alone(any_session: Session, database: Database, made: int) -> None:
    """Another session has edited the pipeline: what this one makes of the old graph is refused."""
    pipeline = any_session.get_one(Pipeline, made)
    mine = [*pipeline.nodes, {**ONLY[0], "id": "mine"}]
    with database.session() as other:
        PipelineRepository(other).update(made, PipelineUpdate(nodes=ONLY, edges=[]))
    runs = RunRepository(any_session)
    runs.claim("w", LEASE)
    runs.recover()
    runs.purge(timedelta(days=1))
    pipeline.nodes = mine
    with pytest.raises(StaleDataError):
        any_session.flush()
    any_session.rollback()


def test_rollback_to_savepoint_shows_in_the_session(database: Database, made: int) -> None:
    with database.session() as session:
        run = session.get_one(PipelineRun, RunRepository(session).create(made).id)
        pipeline = session.get_one(Pipeline, made)
        inner = session.begin_nested()
        RunRepository(session).start(run.id)
        PipelineRepository(session).update(made, PipelineUpdate(name="inner"))
        assert (run.status, pipeline.name) == ("running", "inner")
        inner.rollback()
        assert (run.status, pipeline.name, pipeline.revision) == ("pending", "p", 1)
        pipeline.name = "outer"
        session.flush()


def test_refresh_that_fails_is_an_error_of_the_call(database: Database, made: int, raw: psycopg.Connection) -> None:
    """In a transaction, which it has ended."""
    with database.session() as session:
        RunRepository(session).create(made)
    run = None
    with pytest.raises(StatementCancelledError), database.session() as session:
        run = session.get_one(PipelineRun, 1)
        session.execute(text("SET LOCAL statement_timeout = '50ms'"))

        @event.listens_for(session, "do_orm_execute")
        def wait(_state: ORMExecuteState) -> None:
            session.connection().exec_driver_sql("SELECT pg_sleep(1)")

        RunRepository(session).claim("w", LEASE)
    assert run is not None
    assert raw.execute("SELECT status FROM circle.pipeline_runs").fetchall() == [("pending",)]


def test_connection_that_breaks_before_the_refresh_is_replaced(
    database: Database, made: int, raw: psycopg.Connection
) -> None:
    """In autocommit the call has succeeded by then."""
    with database.session(autocommit=True) as session:
        run = session.get_one(PipelineRun, RunRepository(session).create(made).id)
        (pid,) = session.execute(text("SELECT pg_backend_pid()")).one()

        @event.listens_for(session, "do_orm_execute", once=True)
        def end(_state: ORMExecuteState) -> None:
            raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

        assert [claimed.id for claimed in RunRepository(session).claim("w", LEASE)] == [run.id]
        assert run.status == "running"
        assert RunRepository(session).get(run.id).status == "running"


def test_objects_of_a_block_that_raised_can_be_read(database: Database, database_url: str) -> None:
    with database.session() as session:
        PipelineRepository(session).create(new("kept"))

    def refuse(session: Session) -> None:
        raise LookupError(session.scalars(select(Pipeline)).one())

    with pytest.raises(LookupError) as caught, database.session() as session:
        refuse(session)
    assert caught.value.args[0].name

    async def work() -> None:
        async with Database(database_url) as own, own.async_session() as opened:
            await opened.run_sync(refuse)

    with pytest.raises(LookupError) as caught:
        asyncio.run(work())
    assert caught.value.args[0].name
