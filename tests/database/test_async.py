"""The async repositories are the sync ones: every method, the same arguments, the same answers."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from datetime import timedelta
from itertools import chain
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    AsyncEventRepository,
    AsyncPipelineRepository,
    AsyncRunRepository,
    Database,
    EventRepository,
    IllegalTransitionError,
    InvalidPipelineError,
    NodeStatus,
    PipelineCreate,
    PipelineInactiveError,
    PipelineNotFoundError,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunNotFoundError,
    RunRepository,
    RunStatus,
    StaleVersionError,
)

pytestmark = pytest.mark.once  # the async calls send what the sync ones send

PAIRS = [
    (PipelineRepository, AsyncPipelineRepository),
    (RunRepository, AsyncRunRepository),
    (EventRepository, AsyncEventRepository),
]
NODES: list[dict[str, Any]] = [
    {"id": "t", "type": "trigger", "name": "T"},
    {"id": "a", "type": "agent", "name": "A", "config": {"agent_id": 1, "task": "x"}},
    {"id": "b", "type": "delay", "name": "B"},
    {"id": "c", "type": "parallel", "name": "C"},
]
EDGES = [
    {"id": "1", "from": "t", "to": "a"},
    {"id": "2", "from": "t", "to": "b"},
    {"id": "3", "from": "a", "to": "c"},
    {"id": "4", "from": "b", "to": "c"},
]
CYCLE = [*EDGES, {"id": "5", "from": "c", "to": "t"}]


def public(of: type[Any]) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(of).items() if callable(value) and not name.startswith("_")}


def run(database: Database, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        async with database:
            await work()

    asyncio.run(go())


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=lambda of: of.__name__)
def test_async_repository_has_every_method(sync: type[Any], asynchronous: type[Any]) -> None:
    assert list(public(asynchronous)) == list(public(sync))
    for name, method in public(asynchronous).items():
        assert method.__name__ == name
        assert method.__doc__ == public(sync)[name].__doc__


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=lambda of: of.__name__)
def test_async_method_has_the_same_signature(sync: type[Any], asynchronous: type[Any]) -> None:
    for name, method in public(sync).items():
        twin = public(asynchronous)[name]
        assert inspect.signature(twin).parameters == inspect.signature(method).parameters, name


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=lambda of: of.__name__)
def test_tokens_and_idempotency_keys_are_keyword_only(sync: type[Any], asynchronous: type[Any]) -> None:
    for method in (*public(sync).values(), *public(asynchronous).values()):
        for parameter in inspect.signature(method).parameters.values():
            if parameter.name in {"token", "idempotency_key"}:
                assert parameter.kind is parameter.KEYWORD_ONLY, method.__qualname__


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=lambda of: of.__name__)
def test_async_method_calls_its_sync_method(sync: type[Any], asynchronous: type[Any], database: Database) -> None:
    """With no arguments at all each complains as the sync one does, by its own name."""

    async def work() -> None:
        async with database.async_session() as session:
            for name, method in public(sync).items():
                required = [
                    parameter
                    for parameter in list(inspect.signature(method).parameters.values())[1:]
                    if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
                ]
                if required:
                    with pytest.raises(
                        TypeError, match=rf"{sync.__name__}\.{name}\(\) missing {len(required)} required"
                    ):
                        await getattr(asynchronous(session), name)()

    run(database, work)


# --- end to end ------------------------------------------------------------------------------------------------------


def test_async_pipeline_calls_answer_like_sync(database: Database) -> None:
    async def work() -> None:
        async with database.async_session() as session:
            pipelines = AsyncPipelineRepository(session)
            made = await pipelines.create(PipelineCreate(name="p", nodes=NODES, edges=EDGES))
            assert await pipelines.get(made.id) == made
            draft = await pipelines.create(PipelineCreate(name="d"), allow_incomplete=True)
            page = await pipelines.search(limit=1)
            assert [item.id for item in page.items] == [draft.id]
            assert [item.id for item in (await pipelines.search(after=page.next_cursor)).items] == [made.id]
            changed = await pipelines.update(made.id, PipelineUpdate(edges=EDGES[:1]), expected_revision=1)
            assert changed.version == 2
            assert (await pipelines.activate(made.id)).status == "active"
            assert (await pipelines.pause(made.id)).status == "paused"
            await pipelines.delete(draft.id)
        async with database.async_session(autocommit=True) as session:
            pipelines = AsyncPipelineRepository(session)
            with pytest.raises(InvalidPipelineError, match="cycle"):
                await pipelines.create(PipelineCreate(name="p", nodes=NODES, edges=CYCLE))
            with pytest.raises(StaleVersionError):
                await pipelines.update(made.id, PipelineUpdate(name="q"), 1)
            with pytest.raises(PipelineNotFoundError):
                await pipelines.get(draft.id)
            with pytest.raises(PipelineInactiveError):
                await AsyncRunRepository(session).create(made.id)

    run(database, work)


def test_async_run_step_by_step_answers_like_sync(database: Database) -> None:
    async def work() -> None:
        async with database.async_session(autocommit=True) as session:
            pipelines, runs = AsyncPipelineRepository(session), AsyncRunRepository(session)
            data = PipelineCreate(
                name="p", nodes=NODES, edges=EDGES, status=PipelineStatus.ACTIVE, retry_backoff_base=0
            )
            pipeline = await pipelines.create(data)
            made = await runs.create(pipeline.id, {"by": "test"}, idempotency_key="k")
            assert (await runs.create(pipeline.id, {"by": "test"}, idempotency_key="k")).id == made.id
            (claimed,) = await runs.claim("worker", timedelta(minutes=1))
            assert (claimed.id, claimed.status) == (made.id, RunStatus.RUNNING)
            token = claimed.token
            await runs.heartbeat(made.id, timedelta(minutes=2), token=token)
            await runs.start_node(made.id, "t", {"in": 1}, token=token)
            assert (await runs.complete_node(made.id, "t", {"out": 1}, token=token)).status is NodeStatus.COMPLETED
            assert next(node for node in await runs.nodes(made.id) if node.node_id == "t").output_data == {"out": 1}
            assert [node.node_id for node in await runs.ready_nodes(made.id)] == ["a", "b"]
            await runs.start_node(made.id, "a", token=token)
            assert (await runs.fail_node(made.id, "a", "once", token=token)).status == NodeStatus.PENDING
            await runs.start_node(made.id, "a", token=token)
            await runs.complete_node(made.id, "a", token=token)
            await runs.skip_node(made.id, "b", token=token)
            await runs.append_log(made.id, {"m": "hello"}, token=token)
            started = (await runs.advance(made.id, token=token)).started
            assert [node.node_id for node in started] == ["c"]
            assert (await runs.advance(made.id, [{"node_id": "c", "status": "completed"}], token=token)).started == ()
            ended = await runs.get(made.id)
            assert (ended.status, ended.failed_node) == (RunStatus.COMPLETED, None)
            assert [entry.entry for entry in await runs.logs(made.id)] == [{"m": "hello"}]
            assert [run.id async for run in runs.iterate(pipeline.id, batch=1)] == [made.id]
            assert {node.node_id: (node.status, node.retry_count) for node in await runs.nodes(made.id)} == {
                "t": ("completed", 0),
                "a": ("completed", 1),
                "b": ("skipped", 0),
                "c": ("completed", 0),
            }
            assert [node.id for node in (await runs.definition(made.id)).nodes] == ["t", "a", "b", "c"]
            with pytest.raises(IllegalTransitionError):
                await runs.cancel(made.id)
            assert (await runs.counts())[RunStatus.COMPLETED] == 1
            assert (await runs.statistics(pipeline.id)).success_rate == 1
            found = (await runs.search(status=RunStatus.COMPLETED)).items
            assert [run.id for run in found] == [ended.id]
            assert (await runs.recover(), await runs.expire()) == ([], [])
            assert (await runs.purge(timedelta(0))).deleted == 1
            with pytest.raises(RunNotFoundError):
                await runs.get(made.id)

    run(database, work)


def test_async_workers_in_one_loop_share_the_runs(database: Database) -> None:
    """Each with a session of its own; each node is started by one of them."""

    async def work() -> None:
        async with database.async_session() as session:
            made = await AsyncPipelineRepository(session).create(
                PipelineCreate(name="p", nodes=NODES, edges=EDGES, status=PipelineStatus.ACTIVE)
            )
            ids = [(await AsyncRunRepository(session).create(made.id)).id for _ in range(8)]

        async def worker(name: str) -> list[int]:
            done = []
            async with database.async_session(autocommit=True) as session:
                runs = AsyncRunRepository(session)
                while claimed := await runs.claim(name, timedelta(minutes=1)):
                    (mine,) = claimed
                    started = (await runs.advance(mine.id, token=mine.token)).started
                    while started:
                        results = [{"node_id": node.node_id, "status": "completed"} for node in started]
                        started = (await runs.advance(mine.id, results, token=mine.token)).started
                    done.append(mine.id)
            return done

        done = await asyncio.gather(*(worker(f"w{number}") for number in range(4)))
        assert sorted(chain.from_iterable(done)) == ids
        async with database.async_session() as session:
            assert (await AsyncRunRepository(session).counts())[RunStatus.COMPLETED] == 8

    run(database, work)


def test_async_block_that_fails_commits_nothing(database: Database, raw: psycopg.Connection) -> None:
    async def work() -> None:
        with pytest.raises(ZeroDivisionError):
            async with database.async_session() as session:
                await AsyncPipelineRepository(session).create(PipelineCreate(name="p", nodes=NODES, edges=EDGES))
                raise ZeroDivisionError

    run(database, work)
    assert raw.execute("SELECT count(*) FROM circle.pipelines").fetchone() == (0,)


def test_async_repository_on_own_sessionmaker_works(database_url: str, raw: psycopg.Connection) -> None:
    async def go() -> None:
        engine = create_async_engine(database_url, poolclass=NullPool)
        async with async_sessionmaker(engine).begin() as session:
            made = await AsyncPipelineRepository(session).create(PipelineCreate(name="p", nodes=NODES, edges=EDGES))
            await AsyncPipelineRepository(session).activate(made.id)
            created = await AsyncRunRepository(session).create(made.id)
            await AsyncRunRepository(session).record(
                created.id, [{"node_id": node["id"], "status": "completed"} for node in NODES]
            )
            assert (await AsyncRunRepository(session).finish(created.id)).status == RunStatus.COMPLETED
        await engine.dispose()

    asyncio.run(go())
    assert raw.execute("SELECT status FROM circle.pipeline_runs").fetchall() == [("completed",)]
