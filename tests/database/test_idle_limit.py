"""``idle_limit``: connections that a pool doesn't need are closed; those that a session holds are not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from gathering_pipeline import AsyncRunRepository, Database, DatabaseSettings, idle
from tests.support.forks import in_child

pytestmark = pytest.mark.once  # connections are closed by this package

SPARE, LIMIT = 0.1, 0.8
LIMIT_S = 30
CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "SPARE_SECONDS", SPARE)


@pytest.fixture
def limited(database_url: str) -> Any:
    settings = DatabaseSettings().model_copy(update={"idle_limit": timedelta(seconds=LIMIT)})
    with Database(database_url, settings=settings) as database:
        yield database


def connections(raw: psycopg.Connection) -> int:
    row = raw.execute(CONNECTIONS).fetchone()
    assert row is not None
    return int(row[0])


def until_none(raw: psycopg.Connection) -> list[int]:
    """The numbers of connections that follow one another until there is none."""
    found: list[int] = []
    deadline = time.monotonic() + LIMIT_S
    while found[-1:] != [0]:
        assert time.monotonic() < deadline, found
        if (number := connections(raw)) not in found[-1:]:
            found.append(number)
        time.sleep(0.01)
    return found


def hold(database: Database, number: int) -> None:
    """Use several connections at once."""
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(database.session(autocommit=True)).scalar(text("SELECT 1"))


def test_unused_connections_are_closed_but_one_then_that_one(limited: Database, raw: psycopg.Connection) -> None:
    hold(limited, 5)
    numbers = until_none(raw)
    assert numbers[0] == 5
    assert numbers[-2:] == [1, 0]
    hold(limited, 15)  # more than the pool keeps
    assert limited.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool
    until_none(raw)
    assert limited.health().ok


def test_used_connections_stay(limited: Database, raw: psycopg.Connection) -> None:
    with limited.session(autocommit=True) as held:
        pid = held.scalar(text("SELECT pg_backend_pid()"))
        time.sleep(2 * LIMIT)
        assert held.scalar(text("SELECT pg_backend_pid()")) == pid
    until = time.monotonic() + 2 * LIMIT
    while time.monotonic() < until:
        with limited.session(autocommit=True) as used:
            assert used.scalar(text("SELECT pg_backend_pid()")) == pid
        time.sleep(SPARE / 2)


def test_calls_of_many_threads_get_their_answers_meanwhile(limited: Database) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for _ in range(60):
            with limited.session(autocommit=True) as session:
                if session.scalar(text("SELECT CAST(:number AS int)"), {"number": number}) != number:
                    wrong.append(number)
            time.sleep(SPARE / 4 * (number % 3))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert wrong == []
    assert limited.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_async_connections_are_closed_by_their_loop(limited: Database, raw: psycopg.Connection) -> None:
    async def use(are_used: asyncio.Barrier, are_counted: asyncio.Event) -> None:
        async with limited.async_session(autocommit=True) as session:
            await session.execute(text("SELECT 1"))
            await are_used.wait()
            await are_counted.wait()

    async def until(number: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while connections(raw) != number:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def work() -> None:
        are_used, are_counted = asyncio.Barrier(6), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(use(are_used, are_counted))
            await are_used.wait()
            assert connections(raw) == 5
            are_counted.set()
        await until(1)
        await until(0)
        assert limited.async_engine.sync_engine.pool.checkedin() == 0  # type: ignore[attr-defined]
        async with limited.async_session(autocommit=True) as session:
            assert await AsyncRunRepository(session).counts()
        await limited.adispose()

    def run(steps: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run(steps())

    run(work)
    run(work)  # in another loop


def test_thread_ends_with_the_last_connection(limited: Database) -> None:
    hold(limited, 2)
    assert closing_thread() is not None
    deadline = time.monotonic() + LIMIT_S
    while closing_thread() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hold(limited, 1)
    assert closing_thread() is not None


def closing_thread() -> threading.Thread | None:
    found = [thread for thread in threading.enumerate() if thread.name == "closes idle connections"]
    assert len(found) < 2
    return found[0] if found else None


def test_forked_child_closes_its_own_connections(
    limited: Database, database_url: str, connect: Callable[[str], psycopg.Connection]
) -> None:
    hold(limited, 3)
    assert closing_thread() is not None

    def work() -> list[int]:
        assert closing_thread() is None
        with connect(database_url) as own:
            hold(limited, 3)
            return until_none(own)

    assert max(in_child(work)) >= 3
    assert limited.health().ok
