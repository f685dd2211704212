"""Calls on a database without the schema, or with an older one."""

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from gathering_pipeline import (
    AsyncEventRepository,
    AsyncPipelineRepository,
    Database,
    EventRepository,
    PipelineRepository,
    RunRepository,
    SchemaRevisionError,
    is_transient,
)
from tests.support.sessions import KEPT, new_run, run_async

pytestmark = pytest.mark.once  # the names and codes of missing objects are the same on each server

COMMANDS = r"'alembic upgrade head', 'gathering-pipeline db upgrade' or Database\(\).upgrade\(\)"


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("revision", [None, "007_pipeline_execution", "010_graph"])
def test_call_without_schema_object_names_the_commands(
    empty_database_url: str, revision: str | None, autocommit: bool
) -> None:
    calls: list[Callable[[Session], object]] = [
        lambda session: RunRepository(session).start(1),
        lambda session: PipelineRepository(session).get(1),
    ]
    acalls: list[Callable[[AsyncSession], Coroutine[Any, Any, object]]] = [
        lambda session: AsyncPipelineRepository(session).get(1)
    ]
    if revision != "010_graph":  # which has the log of events
        calls += [
            lambda session: EventRepository(session).read(),
            lambda session: PipelineRepository(session).create(KEPT),
        ]
        acalls += [lambda session: AsyncEventRepository(session).read()]

    async def work() -> None:
        for acall in acalls:
            with pytest.raises(SchemaRevisionError, match=rf"lacks .*: run {COMMANDS}"):
                async with database.async_session(autocommit=autocommit) as session:
                    await acall(session)

    with Database(empty_database_url) as database:
        if revision is not None:
            database.upgrade(revision)
        for call in calls:
            with pytest.raises(SchemaRevisionError, match=rf"lacks .*: run {COMMANDS}") as caught:
                with database.session(autocommit=autocommit) as session:
                    call(session)
            assert caught.value.missing
            assert not is_transient(caught.value)
        run_async(database, work)


def test_missing_table_of_the_caller_passes_unchanged(database: Database) -> None:
    class Theirs(DeclarativeBase):
        pass

    class Missing(Theirs):
        __tablename__ = "missing"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ProgrammingError, match="missing"), database.session() as session:
        session.add(Missing(id=1))
        RunRepository(session).counts()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("INSERT INTO audit_log VALUES (1)", 'relation "audit_log"'),
        ("INSERT INTO audit.log VALUES (1)", 'relation "audit.log"'),
        ("PERFORM audit(NEW.id)", r"function audit\((integer|bigint)\)"),
        ("PERFORM mine FROM pg_class", 'column "mine"'),
        ("PERFORM NEW.mine", 'has no field "mine"'),
        ("IF NEW.mine THEN NULL; END IF", 'has no field "mine"'),
        ("SELECT 1 INTO NEW.mine", 'has no field "mine"'),
        ("PERFORM audit(NEW)", r"function audit\(circle\.pipeline"),
        ("PERFORM p.mine FROM circle.pipelines p", "column p.mine"),
    ],
)
def test_missing_object_in_trigger_of_the_caller_passes_unchanged(
    database: Database, raw: psycopg.Connection, body: str, message: str
) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(KEPT).id
    function = (
        f"CREATE FUNCTION public.audited() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NEW; END $$"
    )
    raw.execute(function.encode())
    trigger = "CREATE TRIGGER audited AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION public.audited()"
    for table in ("circle.pipelines", "circle.pipeline_runs"):
        raw.execute(trigger.format(table).encode())
    with pytest.raises(psycopg.ProgrammingError, match=message), database.session() as session:
        RunRepository(session).create(pipeline)
    with pytest.raises(ProgrammingError, match=message), database.session() as session:
        PipelineRepository(session).create(KEPT)


@pytest.mark.parametrize(
    ("column", "call"),
    [
        ("pipeline_runs DROP worker_id", lambda session: RunRepository(session).claim("w", timedelta(seconds=9))),
        # as a field of a trigger's NEW
        ("pipeline_runs DROP lease_expires_at", lambda session: RunRepository(session).start(1)),
        ("pipelines DROP description", lambda session: PipelineRepository(session).create(KEPT)),
        ("pipeline_runs DROP id", lambda session: RunRepository(session).get(1)),
    ],
)
def test_missing_column_of_the_schema_names_the_commands(
    database: Database, raw: psycopg.Connection, column: str, call: Callable[[Session], object]
) -> None:
    new_run(database)
    raw.execute(f"ALTER TABLE circle.{column} CASCADE".encode())
    with pytest.raises(SchemaRevisionError), database.session() as session:
        call(session)
