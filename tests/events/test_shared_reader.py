"""``alisten`` of many clients: they share one connection, and each has every event once, in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import timedelta

import psycopg
import pytest

from gathering_pipeline import AsyncRunRepository, Database, PipelineEvent, RunRepository, listening
from gathering_pipeline.errors import RunNotFoundError
from gathering_pipeline.listening import AsyncEvents
from tests.support.events import read_all
from tests.support.forks import in_child
from tests.support.runs import store

pytestmark = pytest.mark.once  # the reader is this package's; tests/events/test_reads.py has its statement

POLL = timedelta(seconds=0.02)
LIMIT_S = 60
CONNECTIONS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
READERS = CONNECTIONS + " AND query ~ 'LISTEN|page_of_events' AND query !~ 'advance|claim'"


@pytest.fixture
def pipeline(database: Database) -> int:
    with database.session() as session:
        return store(session, "a>b")


@asynccontextmanager
async def calls(database: Database) -> AsyncIterator[AsyncRunRepository]:
    async with database.async_session(autocommit=True) as session:
        yield AsyncRunRepository(session)


async def take(events: AsyncEvents, number: int) -> list[PipelineEvent]:
    return [await asyncio.wait_for(anext(events), LIMIT_S) for _ in range(number)]


def cancelled_run(database: Database, pipeline: int) -> int:
    """A run with two events."""
    with database.session() as session:
        runs = RunRepository(session)
        return runs.cancel(runs.start(runs.create(pipeline).id).id).id


def new_run(database: Database, pipeline: int) -> int:
    with database.session() as session:
        return RunRepository(session).create(pipeline).id


def all_events(database: Database) -> list[PipelineEvent]:
    with database.session() as session:
        return read_all(session)


def test_alisten_200_clients_use_one_more_connection_and_see_each_event_once(
    database: Database, raw: psycopg.Connection, pipeline: int
) -> None:
    """Some begin at the oldest event, some at a later one, some follow one run; events come while they join."""
    for _ in range(20):
        cancelled_run(database, pipeline)
    old = all_events(database)
    chance = random.Random(7)

    async def client(after: PipelineEvent | None, run_id: int | None) -> list[str]:
        seen = []
        async with aclosing(database.alisten(run_id, after.cursor if after else None, POLL)) as events:
            async for event in events:
                seen.append(event.cursor)
                if event.node_id == "b" and run_id is None:
                    break
        return seen

    async def work() -> tuple[list[list[str]], int]:
        async with database:
            async with AsyncExitStack() as warm:
                for _ in range(listening.READS + 1):  # and one for the calls below
                    await (await warm.enter_async_context(database.async_session())).connection()
            before = len(raw.execute(CONNECTIONS).fetchall())
            async with calls(database) as runs, asyncio.TaskGroup() as group:
                last = (await runs.start((await runs.create(pipeline)).id)).id
                tasks = []
                for number in range(200):
                    tasks.append(
                        group.create_task(client(chance.choice([None, *old]), last if number % 5 == 0 else None))
                    )
                    if number % 10 == 0:
                        ended = await runs.start((await runs.create(pipeline)).id)
                        await runs.cancel(ended.id)
                        await asyncio.sleep(0.005)
                more = len(raw.execute(CONNECTIONS).fetchall()) - before
                await runs.advance(last)
                await runs.advance(last, [{"node_id": "a", "status": "completed"}])
                await runs.advance(last, [{"node_id": "b", "status": "completed"}])
            return [task.result() for task in tasks], more

    seen, more = asyncio.run(work())
    assert more <= 1
    events = all_events(database)
    (end,) = [place for place, event in enumerate(events) if event.node_id == "b" and event.type.endswith("started")]
    of_last = [event.cursor for event in events if event.run_id == events[end].run_id]
    chance = random.Random(7)
    for number, cursors in enumerate(seen):
        after = chance.choice([None, *old])
        place = events.index(after) + 1 if after else 0
        assert cursors == (of_last if number % 5 == 0 else [event.cursor for event in events[place : end + 1]])


def test_alisten_slow_client_stops_no_other_and_misses_nothing(
    database: Database, pipeline: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PAGE", 5)
    monkeypatch.setattr(listening, "KEPT", 10)
    cancelled_run(database, pipeline)

    async def work() -> tuple[list[PipelineEvent], list[PipelineEvent], int]:
        async with (
            database,
            aclosing(database.alisten(poll=POLL)) as slow,
            aclosing(database.alisten(poll=POLL)) as quick,
        ):
            first, other = await take(slow, 2), await take(quick, 2)
            waiting = asyncio.create_task(take(slow, 1))  # has joined, and takes one event more
            for _ in range(40):
                await asyncio.to_thread(cancelled_run, database, pipeline)
            other += await take(quick, 80)
            first += await waiting
            kept = len(listening.feed_of(database.async_engine)._events)
            first += await take(slow, 79)
            return first, other, kept

    slow, quick, kept = asyncio.run(work())
    assert [event.cursor for event in slow] == [event.cursor for event in quick]
    assert [event.cursor for event in quick] == [event.cursor for event in all_events(database)]
    assert kept <= 20


def test_alisten_after_reader_was_terminated_goes_on(
    database: Database, raw: psycopg.Connection, pipeline: int
) -> None:
    cancelled_run(database, pipeline)

    async def work() -> list[list[PipelineEvent]]:
        async with database, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(aclosing(database.alisten(poll=POLL))) for _ in range(5)]
            seen = [await take(client, 2) for client in clients]
            for _ in range(3):
                later = [asyncio.create_task(take(client, 2)) for client in clients]
                await asyncio.sleep(0.05)
                raw.execute(f"SELECT pg_terminate_backend(pid) FROM ({READERS}) c")
                await asyncio.to_thread(cancelled_run, database, pipeline)
                seen = [events + await task for events, task in zip(seen, later, strict=True)]
            return seen

    for events in asyncio.run(work()):
        assert [event.cursor for event in events] == [event.cursor for event in all_events(database)]


def test_alisten_last_client_to_leave_ends_the_reader(
    database: Database, raw: psycopg.Connection, pipeline: int
) -> None:
    cancelled_run(database, pipeline)

    async def work() -> None:
        async with database:
            before = len(asyncio.all_tasks())
            clients = [database.alisten(poll=POLL) for _ in range(3)]
            for client in clients:
                await take(client, 2)
                joined = asyncio.create_task(take(client, 1))
                await asyncio.sleep(0.1)
                joined.cancel()
                await asyncio.wait([joined])
                await client.aclose()
                assert len(asyncio.all_tasks()) == before
            # the pool's own connection is left
            assert len(raw.execute(READERS + " AND query ~ 'LISTEN'").fetchall()) == 0

    asyncio.run(work())


def test_alisten_with_a_shorter_poll_does_not_wait_for_a_longer_one(database: Database, pipeline: int) -> None:
    cancelled_run(database, pipeline)

    async def work() -> None:
        async with database, aclosing(database.alisten(poll=timedelta(hours=1))) as patient:
            await take(patient, 2)
            waiting = asyncio.create_task(take(patient, 1))
            await asyncio.sleep(0.1)
            async with aclosing(database.alisten(poll=POLL)) as hasty:
                await take(hasty, 2)
                soon = asyncio.create_task(take(hasty, 1))
                await asyncio.sleep(0.1)
                await asyncio.to_thread(cancelled_run, database, pipeline)
                assert (await soon)[0].cursor == (await waiting)[0].cursor

    asyncio.run(work())


def of_sync(database: Database, run_id: int, after: str | None = None) -> list[PipelineEvent]:
    return list(database.listen(run_id, after, POLL))


def of_async(database: Database, run_id: int, after: str | None = None) -> list[PipelineEvent]:
    async def work() -> list[PipelineEvent]:
        async with database:
            return [event async for event in database.alisten(run_id, after, POLL)]

    return asyncio.run(asyncio.wait_for(work(), LIMIT_S))


BOTH = pytest.mark.parametrize("events_of", [of_sync, of_async], ids=["listen", "alisten"])
EventsOf = Callable[..., list[PipelineEvent]]


@BOTH
def test_listen_to_a_run_ends_with_it(database: Database, pipeline: int, events_of: EventsOf) -> None:
    run_id = cancelled_run(database, pipeline)
    cancelled_run(database, pipeline)
    events = events_of(database, run_id)
    assert [(event.run_id, event.ends_run) for event in events] == [(run_id, False), (run_id, True)]
    assert [event.cursor for event in events_of(database, run_id, events[0].cursor)] == [events[1].cursor]
    assert events_of(database, run_id, events[1].cursor) == []


@BOTH
def test_listen_to_a_run_that_goes_on_ends_when_it_ends(database: Database, pipeline: int, events_of: EventsOf) -> None:
    run_id = new_run(database, pipeline)

    async def work() -> list[PipelineEvent]:
        with database.session(autocommit=True) as session:
            listener = asyncio.create_task(asyncio.to_thread(events_of, database, run_id))
            await asyncio.sleep(0.3)
            RunRepository(session).start(run_id)
            await asyncio.sleep(0.1)
            RunRepository(session).fail(run_id, "boom")
        return await asyncio.wait_for(listener, LIMIT_S)

    events = asyncio.run(work())
    assert [event.type.value for event in events] == ["pipeline_run.started", "pipeline_run.failed"]


@BOTH
def test_listen_to_an_unknown_run_raises_at_once(database: Database, events_of: EventsOf) -> None:
    for run_id in (77, 2**70):
        with pytest.raises(RunNotFoundError):
            events_of(database, run_id)


@BOTH
def test_listen_to_a_purged_run_yields_what_is_kept(database: Database, pipeline: int, events_of: EventsOf) -> None:
    run_id = cancelled_run(database, pipeline)
    with database.session() as session:
        assert RunRepository(session).purge(timedelta(0)).deleted == 1
    events = events_of(database, run_id)
    assert len(events) == 2
    with pytest.raises(RunNotFoundError):
        events_of(database, run_id, events[-1].cursor)


@BOTH
def test_listen_to_a_run_that_is_deleted_raises(
    database: Database,
    raw: psycopg.Connection,
    pipeline: int,
    monkeypatch: pytest.MonkeyPatch,
    events_of: EventsOf,
) -> None:
    monkeypatch.setattr(listening, "RUN_CHECK", 0.1)
    run_id = new_run(database, pipeline)

    async def work() -> None:
        listener = asyncio.create_task(asyncio.to_thread(events_of, database, run_id))
        await asyncio.sleep(0.3)
        assert not listener.done()
        raw.execute("DELETE FROM circle.pipelines")
        await asyncio.wait_for(listener, LIMIT_S)

    with pytest.raises(RunNotFoundError):
        asyncio.run(work())


def test_alisten_in_a_forked_child_has_a_reader_of_its_own(database: Database, pipeline: int) -> None:
    run_id = cancelled_run(database, pipeline)

    async def parent() -> None:
        async with database, aclosing(database.alisten(poll=POLL)) as events:
            seen = await take(events, 2)
            waiting = asyncio.create_task(take(events, 2))
            await asyncio.sleep(0.1)
            assert in_child(lambda: [event.cursor for event in of_async(database, run_id)]) == [
                event.cursor for event in seen
            ]
            await asyncio.to_thread(cancelled_run, database, pipeline)
            assert len({event.cursor for event in seen + await waiting}) == 4

    asyncio.run(parent())
