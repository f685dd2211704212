"""``Database.wait_for_run`` and ``await_for_run``."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from gathering_pipeline import (
    Database,
    InvalidDataError,
    RunNotFoundError,
    RunRead,
    RunRepository,
    RunStatus,
    WaitTimeoutError,
)
from tests.support.runs import started

SOON = timedelta(seconds=20)


@pytest.fixture
def run_id(database: Database) -> int:
    with database.session() as session:
        return started(RunRepository(session), session, "a")


def end(database: Database, run_id: int) -> None:
    time.sleep(0.2)
    with database.session() as session:
        RunRepository(session).cancel(run_id, "enough")


def wait_async(database: Database, run_id: int, timeout: timedelta) -> RunRead:
    async def go() -> RunRead:
        try:
            return await database.await_for_run(run_id, timeout)
        finally:
            await database.adispose()

    return asyncio.run(go())


@pytest.mark.parametrize("wait", [Database.wait_for_run, wait_async])
def test_wait_returns_the_run_that_ended(
    database: Database, run_id: int, wait: Callable[[Database, int, timedelta], RunRead]
) -> None:
    ending = threading.Thread(target=end, args=(database, run_id))
    ending.start()
    run = wait(database, run_id, SOON)
    ending.join()
    assert (run.id, run.status, run.error_message) == (run_id, RunStatus.CANCELLED, "enough")
    assert wait(database, run_id, timedelta(0)) == run


@pytest.mark.parametrize("wait", [Database.wait_for_run, wait_async])
def test_wait_ends_with_its_time(
    database: Database, run_id: int, wait: Callable[[Database, int, timedelta], RunRead]
) -> None:
    for timeout in (timedelta(0), timedelta(seconds=0.2)):
        with pytest.raises(WaitTimeoutError, match=f"run {run_id} is still running"):
            wait(database, run_id, timeout)
    with pytest.raises(RunNotFoundError):
        wait(database, -1, SOON)
    with pytest.raises(InvalidDataError):
        wait(database, run_id, timedelta(seconds=-1))
