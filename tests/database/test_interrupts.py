"""Calls that are interrupted or cancelled."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import text

from gathering_pipeline import (
    AsyncRunRepository,
    Database,
    RunRepository,
    TransactionAbortedError,
)
from tests.support.sessions import Blocker, driver_connection, new_run, run_async

pytestmark = pytest.mark.once


@pytest.mark.parametrize("autocommit", [False, True])
def test_interrupted_call_leaves_its_connection_usable(
    database: Database, blocker: Callable[[], Blocker], autocommit: bool
) -> None:
    run_id = new_run(database)
    with pytest.raises(KeyboardInterrupt), database.session(autocommit=autocommit) as session:
        driver = driver_connection(session)
        session.execute(text("SELECT 1"))
        holder = blocker()
        interrupter = holder.meanwhile(holder.interrupt)
        try:
            RunRepository(session).start(run_id)
        finally:
            assert driver.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.INERROR)
            interrupter.join()
            holder.end()
    with database.session() as session:
        assert RunRepository(session).start(run_id).status == "running"


@pytest.mark.parametrize("autocommit", [False, True])
def test_cancelled_call_leaves_its_connection_usable(
    database: Database, blocker: Callable[[], Blocker], autocommit: bool
) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=autocommit) as session:
            driver = await session.run_sync(driver_connection)
            await session.execute(text("SELECT 1"))
            holder = blocker()
            call = asyncio.ensure_future(AsyncRunRepository(session).start(run_id))
            await asyncio.to_thread(holder.waiter)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert driver.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.INERROR)
            holder.end()
            if not autocommit:
                with pytest.raises(TransactionAbortedError):
                    await AsyncRunRepository(session).counts()
                await session.rollback()
            assert (await AsyncRunRepository(session).start(run_id)).status == "running"

    run_id = new_run(database)
    run_async(database, work)


def test_interrupted_transaction_is_not_committed(
    database: Database, raw: psycopg.Connection, blocker: Callable[[], Blocker]
) -> None:
    run_id = new_run(database)
    with pytest.raises(TransactionAbortedError), database.session() as session:
        session.execute(text("SELECT 1"))
        holder = blocker()
        interrupter = holder.meanwhile(holder.interrupt)
        with suppress(KeyboardInterrupt):
            RunRepository(session).start(run_id)
        interrupter.join()
        holder.end()
    assert raw.execute("SELECT status FROM circle.pipeline_runs").fetchall() == [("pending",)]
