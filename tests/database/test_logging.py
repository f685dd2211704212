"""The logger ``gathering_pipeline.calls``: a line for each change, a warning for each fault, and no secrets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncRunRepository,
    Database,
    IllegalTransitionError,
    LeaseLostError,
    PipelineError,
    RunRepository,
)
from tests.support.runs import LEASE, done, store

pytestmark = pytest.mark.once  # lines are written by this package

NAME = "gathering_pipeline.calls"


def of(runs: Any) -> Callable[..., Any]:
    """Makes calls on a repository of either kind in an event loop."""

    async def call(method: str, *arguments: Any, **named: Any) -> Any:
        answer = getattr(runs, method)(*arguments, **named)
        return await answer if isinstance(answer, Awaitable) else answer

    return call


async def move(call: Callable[..., Any], pipeline: int, secrets: list[str]) -> None:
    run = await call("create", pipeline, {"password": "S3CRET"}, idempotency_key="K3Y")
    (claim,) = await call("claim", "w", LEASE)
    token = claim.token
    secrets.append(str(token))
    await call("advance", run.id, token=token)
    await call("complete_node", run.id, "a", {"answer": "S3CRET"}, token=token)
    await call("advance", run.id, [done("b", output={"answer": "S3CRET"})], token=token)
    await call("get", run.id)
    with pytest.raises(IllegalTransitionError):
        await call("cancel", run.id)
    with pytest.raises(LeaseLostError):
        await call("heartbeat", run.id, LEASE, token=1)


@pytest.mark.parametrize("way", ["sync", "async", "SQLAlchemy", "async SQLAlchemy"])
def test_each_change_is_a_line_and_each_fault_a_warning(
    database_url: str, session: Session, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    pipeline = store(session, "a b")
    session.commit()
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    caplog.set_level(logging.DEBUG, NAME)
    secrets = ["S3CRET", "K3Y"]

    async def with_async(database: Database) -> None:
        async with database.async_session(autocommit=True) as opened:
            await move(of(AsyncRunRepository(opened)), pipeline, secrets)
        await database.async_engine.dispose()

    if way == "async":
        asyncio.run(with_async(Database(url)))
    elif way == "async SQLAlchemy":
        engine = create_async_engine(url)
        asyncio.run(with_async(Database(async_engine=engine)))
    else:
        engine_of = {"SQLAlchemy": create_engine(url)}.get(way)
        with Database(engine=engine_of) if engine_of else Database(url) as database:
            with database.session(autocommit=True) as opened:
                asyncio.run(move(of(RunRepository(opened)), pipeline, secrets))
        if engine_of:
            engine_of.dispose()
    lines = [record for record in caplog.records if record.name == NAME]
    assert [(record.levelname, record.getMessage().partition(": run 1 is not")[0]) for record in lines] == [
        ("DEBUG", f"create_run pipeline_id={pipeline}: run 1 is pending"),
        ("DEBUG", "claim_runs worker_id='w': run 1 is running"),
        ("DEBUG", "advance_run run_id=1: running and started 'a', 'b'"),
        ("DEBUG", "complete_node run_id=1 node_id='a': completed"),
        ("DEBUG", "advance_run run_id=1: completed"),
        ("WARNING", lines[-1].getMessage().partition(": run 1 is not")[0]),
    ]
    assert lines[-1].getMessage().startswith("heartbeat_run run_id=1 failed: LeaseLostError: ")
    assert len(secrets) == 3
    assert not any(secret in caplog.text for secret in secrets)


def test_fault_of_the_database_is_a_warning_without_values(
    session: Session, raw: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a trigger of the host, which quotes a row."""
    raw.execute(
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'no room' USING ERRCODE = 'P0001', DETAIL = 'S3CRET'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON circle.pipeline_runs FOR EACH ROW EXECUTE FUNCTION public.refuse()"
    )
    pipeline = store(session)
    with pytest.raises(psycopg.errors.RaiseException), session.begin_nested():
        RunRepository(session).create(pipeline)
    (record,) = [record for record in caplog.records if record.name == NAME]
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"create_run pipeline_id={pipeline} failed: RaiseException: no room"


def test_fault_without_server_is_a_warning_without_the_password(caplog: pytest.LogCaptureFixture) -> None:
    with (
        Database("postgresql://u:S3CRET@localhost:1/d") as database,
        database.session(autocommit=True) as session,
        pytest.raises(PipelineError),
    ):
        RunRepository(session).get(1)
    (record,) = [record for record in caplog.records if record.name == NAME]
    assert record.getMessage().startswith("pipeline_runs run_id=1 failed: DatabaseUnavailableError: ")
    assert "S3CRET" not in caplog.text


def test_line_is_not_made_where_the_level_is_off(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, NAME)
    asked: list[int] = []
    logger = logging.getLogger(NAME)

    def is_enabled_for(level: int) -> bool:
        asked.append(level)
        return False

    monkeypatch.setattr(logger, "isEnabledFor", is_enabled_for)
    pipeline = store(session)
    asked.clear()
    RunRepository(session).create(pipeline)
    assert asked == [logging.DEBUG]
    RunRepository(session).counts()
    assert asked == [logging.DEBUG]
