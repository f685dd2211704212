"""A refused call ends the transaction of its session."""

from contextlib import suppress

import psycopg
import pytest
from sqlalchemy.exc import InternalError
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncPipelineRepository,
    AsyncRunRepository,
    Database,
    IntegrityViolationError,
    PipelineRepository,
    PipelineRun,
    RunNotFoundError,
    RunRepository,
    TransactionAbortedError,
    is_transient,
)
from tests.support.sessions import KEPT, names, run_async

pytestmark = pytest.mark.once  # what a session allows after a refused call is decided by this package


def test_session_block_after_swallowed_refusal_raises_aborted(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(TransactionAbortedError, match=r"begin_nested\(\).*autocommit=True"):
        with database.session() as session:
            PipelineRepository(session).create(KEPT)
            with suppress(RunNotFoundError):
                RunRepository(session).start(1)
    assert names(raw) == []
    with database.session() as session:  # the connection is as good as before
        PipelineRepository(session).create(KEPT)
    assert names(raw) == ["kept"]


def test_async_session_block_after_swallowed_refusal_raises_aborted(
    database: Database, raw: psycopg.Connection
) -> None:
    async def work() -> None:
        with pytest.raises(TransactionAbortedError):
            async with database.async_session() as session:
                await AsyncPipelineRepository(session).create(KEPT)
                with suppress(RunNotFoundError):
                    await AsyncRunRepository(session).start(1)
        assert names(raw) == []
        async with database.async_session() as session:
            await AsyncPipelineRepository(session).create(KEPT)

    run_async(database, work)
    assert names(raw) == ["kept"]


def test_commit_after_swallowed_refusal_raises_aborted(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        PipelineRepository(session).create(KEPT)
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        with pytest.raises(TransactionAbortedError):
            session.commit()
        session.rollback()
        PipelineRepository(session).create(KEPT.model_copy(update={"name": "second"}))
    assert names(raw) == ["second"]


def test_call_after_refusal_raises_aborted(database: Database) -> None:
    with pytest.raises(TransactionAbortedError) as caught, database.session() as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        RunRepository(session).counts()
    assert not is_transient(caught.value)


def test_flush_refused_ends_the_transaction(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(TransactionAbortedError), database.session() as session:
        PipelineRepository(session).create(KEPT)
        session.add(PipelineRun(pipeline_id=0))
        with pytest.raises(IntegrityViolationError) as refused:
            RunRepository(session).counts()
        assert refused.value.constraint == "pipeline_runs_pipeline_id_fkey"
        with pytest.raises(TransactionAbortedError):
            RunRepository(session).counts()
    assert names(raw) == []


def test_call_after_rollback_succeeds(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        session.rollback()
    with database.session() as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        session.rollback()
        PipelineRepository(session).create(KEPT)
    assert names(raw) == ["kept"]


def test_unused_session_needs_no_server() -> None:
    with Database("postgresql://localhost:1/name") as database, database.session() as session:
        assert session.in_transaction() is False


def test_autocommit_call_after_refusal_succeeds(database: Database, raw: psycopg.Connection) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=True) as session:
            with suppress(RunNotFoundError):
                await AsyncRunRepository(session).start(1)
            await AsyncPipelineRepository(session).create(KEPT)
            with suppress(RunNotFoundError):
                await AsyncRunRepository(session).start(1)

    with database.session(autocommit=True) as session:
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
        PipelineRepository(session).create(KEPT)
        with suppress(RunNotFoundError):
            RunRepository(session).start(1)
    run_async(database, work)
    assert names(raw) == ["kept", "kept"]


def test_refusal_in_savepoint_keeps_the_transaction(database: Database, raw: psycopg.Connection) -> None:
    def refused(session: Session) -> None:
        with pytest.raises(RunNotFoundError), session.begin_nested():
            PipelineRepository(session).create(KEPT.model_copy(update={"name": "lost"}))
            RunRepository(session).start(1)

    async def work() -> None:
        async with database.async_session() as session:
            await AsyncPipelineRepository(session).create(KEPT)
            with pytest.raises(RunNotFoundError):
                async with session.begin_nested():
                    await AsyncPipelineRepository(session).create(KEPT.model_copy(update={"name": "lost"}))
                    await AsyncRunRepository(session).start(1)
            await AsyncPipelineRepository(session).create(KEPT)

    with database.session() as session:
        PipelineRepository(session).create(KEPT)
        refused(session)
        PipelineRepository(session).create(KEPT)
    run_async(database, work)
    assert names(raw) == ["kept"] * 4


def test_savepoint_block_after_swallowed_refusal_raises_aborted(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(TransactionAbortedError), database.session() as session:
        PipelineRepository(session).create(KEPT)
        with pytest.raises(InternalError, match="aborted"), session.begin_nested():
            with suppress(RunNotFoundError):
                RunRepository(session).start(1)
    assert names(raw) == []
