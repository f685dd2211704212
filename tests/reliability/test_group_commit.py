"""``Database.group_commit``: every caller gets its own answer, whatever happens to others."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import wraps
from typing import Any

import psycopg
import pytest

from gathering_pipeline import (
    AsyncRunRepository,
    Database,
    NodeExecutionResult,
    PipelineError,
    RunRepository,
    is_transient,
)
from gathering_pipeline.errors import (
    CommitIndeterminateError,
    DatabaseUnavailableError,
    LeaseLostError,
    NodeRunNotFoundError,
    RunNotFoundError,
    RunOverError,
)
from tests.support.databases import Connect
from tests.support.graphs import chain
from tests.support.runs import LEASE, done, store

RUNS = int(os.environ.get("GATHERING_RUNS", "60"))
"""Runs of a test that takes them to their ends; ``make reliability`` raises it."""


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test, and close its connections in its loop."""

    @wraps(test)
    def run(database: Database, **fixtures: Any) -> None:
        async def both() -> None:
            async with database:
                await test(database=database, **fixtures)

        asyncio.run(both())

    return run


@pytest.fixture
def pipeline(database: Database) -> int:
    with database.session() as session:
        return store(session, chain(4))


def create(database: Database, pipeline: int, count: int) -> list[int]:
    with database.session(autocommit=True) as session:
        return [RunRepository(session).create(pipeline).id for _ in range(count)]


def is_consistent(raw: psycopg.Connection) -> bool:
    """Statuses, events and counters tell the same."""
    rows = raw.execute(
        """SELECT r.id FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
           WHERE r.status = 'completed' AND n.status <> 'completed'
           UNION ALL
           SELECT n.run_id FROM circle.pipeline_node_runs n WHERE n.status = 'completed' AND 1 <> (
               SELECT count(*) FROM circle.pipeline_events e
               WHERE e.run_id = n.run_id AND e.node_id = n.node_id AND e.type = 'pipeline_node.completed')
           UNION ALL
           SELECT sum(c.completed)::bigint FROM circle.pipeline_counters c
           HAVING sum(c.completed) <> (SELECT count(*) FROM circle.pipeline_runs WHERE status = 'completed')"""
    ).fetchall()
    return rows == []


async def take_to_end(runs: AsyncRunRepository, run_id: int, token: int | None = None) -> None:
    step = await runs.advance(run_id, token=token)
    while step.started:
        step = await runs.advance(run_id, [done(node.node_id) for node in step.started], token=token)
    assert step.status == "completed"


@in_a_loop
async def test_async_callers_share_commits(database: Database, pipeline: int, raw: psycopg.Connection) -> None:
    ids = create(database, pipeline, RUNS)
    xact = "SELECT count(DISTINCT xid::text) FROM circle.pipeline_events WHERE node_id IS NOT NULL"
    async with database.group_commit() as runs:
        await asyncio.gather(*(take_to_end(runs, run_id) for run_id in ids))
        assert (await runs.get(ids[0])).status == "completed"  # other calls are sent by themselves
    commits = raw.execute(xact).fetchone()
    assert commits is not None
    assert commits[0] < RUNS * 5 / 4
    assert is_consistent(raw)


def test_threads_share_commits(database: Database, pipeline: int, raw: psycopg.Connection) -> None:
    ids = create(database, pipeline, RUNS)

    with database.group_commit() as runs, ThreadPoolExecutor(8) as threads:

        def execute(run_id: int) -> str:
            step = runs.advance(run_id)
            while step.started:
                step = runs.advance(run_id, [done(node.node_id) for node in step.started])
            return step.status

        assert set(threads.map(execute, ids)) == {"completed"}
        assert runs.get(ids[0]).status == "completed"
    assert is_consistent(raw)


@in_a_loop
async def test_refused_call_raises_its_own_error_and_disturbs_none(
    database: Database, pipeline: int, raw: psycopg.Connection
) -> None:
    """Random refusals, cancelled callers, repeats and lost leases among good calls."""
    chance = random.Random(20261127)
    ids = create(database, pipeline, RUNS)
    with database.session(autocommit=True) as session:
        tokens = {run.id: run.token for run in RunRepository(session).claim("worker", LEASE, RUNS // 2)}
    outcomes: Counter[str] = Counter()

    async def refused(kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as caught:
            await call
        assert caught.type is kind
        outcomes[kind.__name__] += 1

    async def execute(runs: AsyncRunRepository, run_id: int) -> None:
        token = tokens.get(run_id)
        step = await runs.advance(run_id, token=token)
        while step.started:
            (node,) = step.started
            trouble = chance.randrange(5)
            if trouble == 0:
                await refused(NodeRunNotFoundError, runs.advance(run_id, [done("nowhere")], token=token))
            elif trouble == 1:
                await refused(LeaseLostError, runs.advance(run_id, [done(node.node_id)], token=7))
            elif trouble == 2:
                await refused(RunNotFoundError, runs.advance(10**9, [done("a")]))
            elif trouble == 3 and token is not None:
                task = asyncio.create_task(runs.advance(run_id, [done(node.node_id)], token=token))
                await asyncio.sleep(chance.choice([0, 0, 0.002]))
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                outcomes["cancelled"] += 1  # sent or not: the report, sent again, gives the answer
            step = await runs.advance(run_id, [done(node.node_id)], token=token)
        await refused(RunOverError, runs.advance(run_id, token=token))

    async with database.group_commit() as runs, asyncio.timeout(120):
        await asyncio.gather(*(execute(runs, run_id) for run_id in ids))
    assert {"NodeRunNotFoundError", "LeaseLostError", "RunNotFoundError", "cancelled"} <= set(outcomes)
    assert raw.execute("SELECT DISTINCT status FROM circle.pipeline_runs").fetchall() == [("completed",)]
    assert is_consistent(raw)


@in_a_loop
async def test_locked_run_keeps_only_its_own_caller_waiting(
    database: Database, pipeline: int, database_url: str, connect: Connect
) -> None:
    ids = create(database, pipeline, 64)
    other = connect(database_url)
    other.autocommit = False
    other.execute("SELECT FROM circle.pipeline_runs WHERE id = %s FOR UPDATE", [ids[0]])
    async with database.group_commit() as runs:
        waiting = asyncio.create_task(take_to_end(runs, ids[0]))
        await asyncio.wait_for(asyncio.gather(*(take_to_end(runs, run_id) for run_id in ids[1:])), 60)
        assert not waiting.done()
        other.rollback()
        await asyncio.wait_for(waiting, 20)


def kill(raw: psycopg.Connection) -> int:
    """End every other session of the database; how many there were."""
    return len(
        raw.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        ).fetchall()
    )


@in_a_loop
async def test_broken_connection_is_told_to_those_who_were_sent(
    database: Database, pipeline: int, raw: psycopg.Connection
) -> None:
    """Every caller whose call was under way gets an error; with the token of a claim it repeats the report."""
    create(database, pipeline, 200)
    with database.session(autocommit=True) as session:
        claimed = RunRepository(session).claim("worker", LEASE, 200)
    outcomes: Counter[str] = Counter()

    async def execute(runs: AsyncRunRepository, run_id: int, token: int) -> None:
        results: list[NodeExecutionResult] = []
        while True:
            try:
                step = await runs.advance(run_id, results, token=token)
            except (CommitIndeterminateError, DatabaseUnavailableError) as error:
                outcomes[type(error).__name__] += 1
                await asyncio.sleep(0.01)
                continue
            started = step.started or step.running
            if not started:
                assert step.status == "completed"
                return
            results = [done(node.node_id, output={"by": run_id}) for node in started]

    async with database.group_commit() as runs, asyncio.timeout(60):
        tasks = [asyncio.create_task(execute(runs, run.id, run.token)) for run in claimed]
        while outcomes["CommitIndeterminateError"] < 3 and not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
            await asyncio.to_thread(kill, raw)
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    assert outcomes["CommitIndeterminateError"] > 0
    assert raw.execute("SELECT DISTINCT status FROM circle.pipeline_runs").fetchall() == [("completed",)]
    assert is_consistent(raw)


@in_a_loop
async def test_calls_are_answered_when_the_block_ends(database: Database, pipeline: int) -> None:
    ids = create(database, pipeline, 16)
    async with database.group_commit() as runs:
        tasks = [asyncio.create_task(runs.advance(run_id)) for run_id in ids]
        await asyncio.sleep(0)
    steps = await asyncio.gather(*tasks)
    assert [len(step.started) for step in steps] == [1] * 16
    with pytest.raises(PipelineError, match="closed") as closed:
        await runs.advance(ids[0], [done("n0")])
    assert not is_transient(closed.value)
    block = database.group_commit()
    with pytest.raises(ZeroDivisionError):
        async with block as runs:
            tasks = [asyncio.create_task(runs.advance(run_id, [done("n0")])) for run_id in ids]
            await asyncio.sleep(0)
            raise ZeroDivisionError
    assert [len(step.started) for step in await asyncio.gather(*tasks)] == [1] * 16


def test_threads_are_answered_when_the_block_ends(database: Database, pipeline: int) -> None:
    ids = create(database, pipeline, 16)
    with ThreadPoolExecutor(16) as threads:
        with database.group_commit() as runs:
            calls = [threads.submit(runs.advance, run_id) for run_id in ids]
            while not any(call.done() for call in calls):
                pass
        outcomes = [call.exception() or len(call.result().started) for call in calls]
    # each was sent, or told that it was too late
    assert all(outcome == 1 or isinstance(outcome, PipelineError) for outcome in outcomes)
    assert 1 in outcomes


def test_thread_gets_its_own_error(database: Database, pipeline: int) -> None:
    ids = create(database, pipeline, 8)
    with database.group_commit() as runs, ThreadPoolExecutor(16) as threads:
        good = [threads.submit(runs.advance, run_id) for run_id in ids]
        bad = [threads.submit(runs.advance, 10**9 + at) for at in range(8)]
        assert [len(call.result().started) for call in good] == [1] * 8
        for at, call in enumerate(bad):
            error = call.exception()
            assert isinstance(error, RunNotFoundError)
            assert error.run_id == 10**9 + at
        # options are those of advance
        assert runs.advance(ids[0], [done("n0", output={"x": 1})], inputs=True).started[0].inputs == {"n0": {"x": 1}}
