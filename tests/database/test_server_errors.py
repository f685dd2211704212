"""Errors of the server itself: each has a class of this package, and is transient or not."""

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from gathering_pipeline import (
    AsyncRunRepository,
    ConfigurationError,
    Database,
    DatabaseUnavailableError,
    IdsExhaustedError,
    InvalidDataError,
    PipelineRepository,
    RunRepository,
    StatementCancelledError,
    TransactionConflictError,
    is_transient,
)
from gathering_pipeline.errors import DatabaseError
from tests.support.sessions import KEPT, Blocker, names, new_run, run_async

RAISED = [
    ("08006", DatabaseUnavailableError, True),
    ("08P01", DatabaseError, False),
    ("25006", DatabaseUnavailableError, True),
    ("40001", TransactionConflictError, True),
    ("40P01", TransactionConflictError, True),
    ("42501", ConfigurationError, False),
    ("53100", DatabaseUnavailableError, True),
    ("53200", DatabaseUnavailableError, True),
    ("53300", DatabaseUnavailableError, True),
    ("54000", InvalidDataError, False),
    ("54001", InvalidDataError, False),
    ("55P03", TransactionConflictError, True),
    ("57014", StatementCancelledError, False),
    ("58030", DatabaseUnavailableError, True),
    ("2200H", IdsExhaustedError, False),
]


def trigger(sqlstate: str, *, deferred: bool = False) -> str:
    """SQL: every insert of a run fails with a SQLSTATE, at once or at the commit."""
    kind = "CREATE CONSTRAINT TRIGGER f AFTER INSERT" if deferred else "CREATE TRIGGER f BEFORE INSERT"
    return f"""
        CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'the cause' USING ERRCODE = '{sqlstate}'; END $$;
        {kind} ON circle.pipeline_runs {"DEFERRABLE INITIALLY DEFERRED" if deferred else ""}
            FOR EACH ROW EXECUTE FUNCTION public.f()"""


@pytest.mark.parametrize(("sqlstate", "kind", "transient"), RAISED, ids=[row[0] for row in RAISED])
def test_call_with_error_of_the_server_raises_its_class(
    database: Database, raw: psycopg.Connection, sqlstate: str, kind: type[DatabaseError], transient: bool
) -> None:
    async def work() -> None:
        async with database.async_session() as session:
            with pytest.raises(kind, match="the cause") as caught:
                await AsyncRunRepository(session).create(pipeline)
            assert (caught.type, is_transient(caught.value)) == (kind, transient)
            await session.rollback()

    with database.session() as session:
        pipeline = PipelineRepository(session).create(KEPT).id
    raw.execute(trigger(sqlstate).encode())
    with database.session(autocommit=True) as session:
        with pytest.raises(kind, match="the cause") as caught:
            RunRepository(session).create(pipeline)
        assert isinstance(caught.value.__cause__, psycopg.Error)
        assert caught.value.__cause__.sqlstate == sqlstate
        assert (caught.type, is_transient(caught.value)) == (kind, transient)
        assert is_transient(caught.value.__cause__) == transient
    run_async(database, work)


def test_commit_with_full_disk_raises_database_unavailable(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(KEPT).id
    raw.execute(trigger("53100", deferred=True).encode())
    with pytest.raises(DatabaseUnavailableError, match="lacks disk space"), database.session() as session:
        RunRepository(session).create(pipeline)


def test_call_in_read_only_session_raises_database_unavailable(database: Database) -> None:
    with database.session() as session:
        session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DatabaseUnavailableError, match="read-only: connect to the primary") as caught:
            PipelineRepository(session).create(KEPT)
        assert is_transient(caught.value)
        session.rollback()


def test_call_past_its_time_limit_raises_statement_cancelled(
    database: Database, blocker: Callable[[], Blocker]
) -> None:
    run_id = new_run(database)
    holder = blocker()
    with database.session() as session:
        session.execute(text("SET LOCAL statement_timeout = 50"))
        with pytest.raises(StatementCancelledError, match="statement timeout"):
            RunRepository(session).start(run_id)
        session.rollback()
    holder.end()


def test_create_without_ids_left_raises_ids_exhausted(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(KEPT).id
    raw.execute("ALTER SEQUENCE circle.pipeline_runs_id_seq MAXVALUE 9")
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', 9)")
    with database.session() as session:
        with pytest.raises(IdsExhaustedError, match="pipeline_runs_id_seq") as caught:
            RunRepository(session).create(pipeline)
        assert not isinstance(caught.value, ValueError)
        session.rollback()


def test_autocommit_write_after_idle_session_timeout_was_not_done(database: Database, raw: psycopg.Connection) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=True) as session:
            await session.execute(text("SET idle_session_timeout = 20"))
            time.sleep(0.3)  # noqa: ASYNC251 - the connection has to be idle
            with pytest.raises(DatabaseUnavailableError, match="idle-session timeout") as caught:
                await AsyncRunRepository(session).start(run_id)
            assert is_transient(caught.value)
            await AsyncRunRepository(session).start(run_id)  # by another connection

    run_id = new_run(database)
    with database.session(autocommit=True) as session:
        session.execute(text("SET idle_session_timeout = 20"))
        time.sleep(0.3)
        with pytest.raises(DatabaseUnavailableError, match="idle-session timeout"):
            PipelineRepository(session).create(KEPT)
    run_async(database, work)
    assert names(raw) == ["kept"]


def test_commit_after_idle_transaction_timeout_was_not_done(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(DatabaseUnavailableError, match="during the commit: .*idle-in-transaction timeout"):
        with database.session() as session:
            PipelineRepository(session).create(KEPT)
            session.execute(text("SET idle_in_transaction_session_timeout = 20"))  # last: a busy machine may be slow
            time.sleep(0.3)
    assert names(raw) == []


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runs: runs.complete_node(1, "a", {"x": ["y" * 600, "z" * 600]}), "output.x has 1,207 bytes as JSON"),
        (lambda runs: runs.create(1, "\u00e9" * 600), "trigger_data has 1,202 bytes as JSON"),
        (lambda runs: runs.create(1, ("y" * 1200,)), r"trigger_data\[0\] has 1,202 bytes"),
        (
            lambda runs: runs.record(1, [{"node_id": "a", "status": "completed", "output": {"x": "y" * 1200}}]),
            r"results\[0\].output.x has 1,202 bytes as JSON: the database holds at most 1,000",
        ),
        (
            lambda runs: runs.record(1, [{"node_id": "a", "status": "completed", "output": {"x": "y" * 600}}] * 2),
            "results has 1,[0-9]+ bytes as JSON",
        ),
        (lambda runs: runs.fail(1, "y" * 1200), "error has 1,200 bytes: the database holds at most 1,000"),
    ],
)
def test_call_with_too_large_value_is_refused_before_it_is_sent(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[RunRepository], Any], message: str
) -> None:
    for module in ("json_values", "arguments"):
        monkeypatch.setattr(f"gathering_pipeline.{module}.MAX_BYTES", 1000)
    with Database("postgresql://localhost:1/name") as nowhere, nowhere.session() as session:
        with pytest.raises(InvalidDataError, match=message):
            call(RunRepository(session))


def test_limit_is_what_jsonb_holds(raw: psycopg.Connection) -> None:
    from gathering_pipeline.json_values import MAX_BYTES

    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="jsonb string") as caught:
        raw.execute("SELECT length(to_jsonb(repeat('x', %s))::text)", [MAX_BYTES + 1])
    assert f"{MAX_BYTES} bytes" in str(caught.value.diag.message_detail)
