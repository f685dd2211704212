"""A fork gives each process connections of its own, and leaves the parent's alone."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from gathering_pipeline import (
    AsyncPipelineRepository,
    Database,
    DatabaseSettings,
    ForkedConnectionError,
    Pipeline,
    PipelineRepository,
    RunRepository,
    connections,
    is_transient,
    migrations,
)
from tests.support.forks import LIMIT_S, Child, end, fork, in_child
from tests.support.pipelines import new
from tests.support.runs import store
from tests.support.servers import connect
from tests.support.sessions import driver_connection, names

pytestmark = pytest.mark.once

# Leaves a block in a child in one way, while the parent's transaction is open; the parent commits then. Each parent is a
# process of its own, and ends as a program does; one program imports the package for all of them.
LEAVING = """
import asyncio, gc, os, signal, sys
from gathering_pipeline import AsyncPipelineRepository, Database, PipelineRepository
from tests.support.forks import LIMIT_S
from tests.support.pipelines import new

gc.freeze()  # what is imported need not be examined at each end
while line := sys.stdin.readline():
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()

signal.alarm(LIMIT_S)
url, block, way, folder = line.split()
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
database = Database(url)

def leave():
    if os.fork():
        return os.wait()[1]
    if way == "exit":
        sys.exit(7)
    if way == "_exit":
        os._exit(7)
    raise ZeroDivisionError("in the child")

def sync(**options):
    with database.session(**options) as session:
        PipelineRepository(session).create(new("parent"))
        print(os.waitstatus_to_exitcode(leave()), flush=True)

def savepoint():
    with database.session() as session:
        with session.begin_nested():
            PipelineRepository(session).create(new("parent"))
            print(os.waitstatus_to_exitcode(leave()), flush=True)

async def asynchronous():
    async with database.async_session() as session:
        await AsyncPipelineRepository(session).create(new("parent"))
        print(os.waitstatus_to_exitcode(leave()), flush=True)

def group():
    with database.group_commit() as runs, database.session() as session:
        PipelineRepository(session).create(new("parent"))
        print(os.waitstatus_to_exitcode(leave()), flush=True)

if block == "sync":
    sync()
elif block == "autocommit":
    sync(autocommit=True)
elif block == "savepoint":
    savepoint()
elif block == "group":
    group()
else:
    asyncio.run(asynchronous())
print("end", flush=True)
"""
FEW = DatabaseSettings(pool_size=1, max_overflow=0, pool_timeout=timedelta(seconds=3))


@pytest.fixture(scope="module")
def leaving() -> Iterator[Callable[..., int]]:
    """Runs ``LEAVING`` and returns its exit code."""
    command = [sys.executable, "-c", LEAVING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:

        def run(*words: str | Path) -> int:
            assert program.stdin is not None
            assert program.stdout is not None
            print(*words, file=program.stdin, flush=True)
            return int(program.stdout.readline())

        yield run


@pytest.mark.parametrize("way", ["exit", "_exit", "raise"])
@pytest.mark.parametrize("block", ["sync", "autocommit", "savepoint", "group", "async"])
def test_child_that_leaves_an_inherited_block_leaves_the_parents_transaction(
    leaving: Callable[..., int], database_url: str, raw: psycopg.Connection, tmp_path: Path, block: str, way: str
) -> None:
    code = leaving(database_url, block, way, tmp_path)
    output, errors = ((tmp_path / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert (code, output.split()) == (0, ["1" if way == "raise" else "7", "end"]), errors
    assert names(raw) == ["parent"]
    lines = errors.splitlines()
    if sqlalchemy.__version__.startswith("2.0"):  # it reports an async connection that a child leaves to its parent
        lines = [line for line in lines if "clean up non-checked-in connection" not in line]
    if way == "raise":
        assert lines[-1] == "ZeroDivisionError: in the child"
    else:
        assert lines == []


def test_session_in_child_works_and_leaves_the_parents(database: Database, raw: psycopg.Connection) -> None:
    def work() -> tuple[str, int]:
        with database.session() as other:
            PipelineRepository(other).create(new("child"))
            return other.connection().exec_driver_sql("SHOW transaction_isolation").scalar_one(), backend(database)

    with database.session() as session:
        PipelineRepository(session).create(new("parent"))
        before = driver_connection(session).info.backend_pid
        isolation, child = in_child(work)
        assert isolation == "read committed"
        assert child != before
        assert driver_connection(session).info.backend_pid == before
    assert sorted(names(raw)) == ["child", "parent"]


def backend(database: Database) -> int:
    with database.session() as session:
        return driver_connection(session).info.backend_pid


def test_every_call_on_an_inherited_session_raises(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        pipelines = PipelineRepository(session)
        pipeline = pipelines.create(new("parent")).id
        loaded = session.get_one(Pipeline, pipeline)

        def change() -> None:
            loaded.name = "changed in the child"
            session.flush()

        def nested() -> None:
            with session.begin_nested():
                pipelines.get(pipeline)

        calls: list[Callable[[], Any]] = [
            lambda: pipelines.get(pipeline),
            lambda: pipelines.create(new("child")),
            lambda: session.connection().exec_driver_sql("SELECT 1"),
            lambda: session.get_one(Pipeline, pipeline, populate_existing=True),
            nested,
            session.commit,
            lambda: driver_connection(session).execute("SELECT 1"),
            driver_connection(session).commit,
            change,
        ]
        for call in calls:
            with pytest.raises(ForkedConnectionError, match="forked") as caught:
                in_child(call)
            assert caught.type is ForkedConnectionError
    assert names(raw) == ["parent"]


def test_block_that_succeeds_in_child_raises(database: Database, raw: psycopg.Connection) -> None:
    """The child has to learn that its commit stored nothing."""

    def body() -> None:
        with database.session() as session:
            PipelineRepository(session).create(new("parent"))
            child.append(fork())

    child: list[int] = []
    failure = None
    try:
        body()
    except ForkedConnectionError as error:
        failure = error
    finally:
        if child == [0]:
            os._exit(3 if failure is not None else 4)
    assert end(child[0]) == 3
    assert failure is None
    assert names(raw) == ["parent"]


def test_inherited_session_is_usable_after_its_rollback(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        PipelineRepository(session).create(new("parent"))

        def work() -> None:
            session.rollback()
            PipelineRepository(session).create(new("child"))
            session.commit()

        in_child(work)
    assert sorted(names(raw)) == ["child", "parent"]


def test_inherited_session_collected_in_child_sends_nothing(database: Database, raw: psycopg.Connection) -> None:
    holder = [database.session()]
    session = holder[0].__enter__()
    PipelineRepository(session).create(new("parent"))
    held: list[Any] = [session]
    del session

    def work() -> None:
        held[0].close()
        held.clear()
        holder.clear()
        gc.collect()

    in_child(work)
    PipelineRepository(held[0]).create(new("parent, too"))
    holder[0].__exit__(None, None, None)
    assert names(raw) == ["parent", "parent, too"]


def test_children_that_read_at_once_get_their_own_answers(database: Database) -> None:
    with database.session() as session:
        ids = [PipelineRepository(session).create(new(f"p{number}")).id for number in range(3)]
    database.check()

    def read(pipeline: int) -> int:
        wrong = 0
        for _ in range(70):
            with database.session(autocommit=True) as session:
                wrong += PipelineRepository(session).get(pipeline).id != pipeline
        return wrong

    children = [Child(lambda pipeline=pipeline: read(pipeline)) for pipeline in ids[:2]]  # type: ignore[misc]
    assert read(ids[2]) == 0
    assert [child.result() for child in children] == [0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_sockets_of_the_parent_are_closed_in_child(database_url: str) -> None:
    """No lock, no session stays on the server because a child lives on."""
    with Database(database_url) as database:
        with database.session() as session:
            checked_out = driver_connection(session).pgconn.socket
            with database.session() as other:
                pooled = driver_connection(other).pgconn.socket
            listener = database.listen(poll=timedelta(milliseconds=1))
            PipelineRepository(session).search()
            listening = connections.open_second_connection(session.connection())
            descriptors = [checked_out, pooled, listening.pgconn.socket]

            def targets() -> list[str]:
                return [str(Path(f"/proc/self/fd/{descriptor}").readlink()) for descriptor in descriptors]

            assert all(target.startswith("socket:") for target in targets())
            assert in_child(targets) == [os.devnull] * 3
            listening.close()
            listener.close()


def test_child_at_its_limit_of_descriptors_is_cut_off(database: Database, raw: psycopg.Connection) -> None:
    import resource

    with database.session() as session:
        PipelineRepository(session).create(new("parent"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        reader, writer = os.pipe()
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        try:
            while True:
                try:
                    taken.append(os.dup(reader))
                except OSError:
                    break
            pid = fork()
            if pid == 0:
                try:
                    session.rollback()
                finally:
                    os._exit(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in [*taken, reader, writer]:
                os.close(descriptor)
        assert end(pid) == 0
    assert names(raw) == ["parent"]


def test_locks_that_a_thread_held_are_free_in_child(database_url: str) -> None:
    """The thread that would release them does not exist in the child."""
    with Database(database_url, settings=FEW) as database:
        database.check()
        pool: Any = database.engine.pool
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with (
                database._main._lock,
                migrations._alembic,
                pool._overflow_lock,
                pool._pool.mutex,
                pool.dispatch.connect._get_exec_once_mutex(),
            ):
                held.set()
                release.wait(LIMIT_S)

        def work() -> None:
            database.check()
            with database.session() as session:
                assert session.connection().exec_driver_sql("SELECT 1").scalar() == 1
            assert migrations._alembic.acquire(blocking=False)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(LIMIT_S)
        try:
            in_child(work)
        finally:
            release.set()
            thread.join(LIMIT_S)


def test_inherited_session_is_left_while_a_thread_held_the_pool(database_url: str) -> None:
    with Database(database_url, settings=FEW) as database, database.session() as session:
        session.connection()
        pool: Any = database.engine.pool
        driver = driver_connection(session)
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with pool._pool.mutex, driver.lock:
                held.set()
                release.wait(LIMIT_S)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(LIMIT_S)
        try:
            in_child(session.close)
            with pytest.raises(ForkedConnectionError):
                in_child(session.commit)
        finally:
            release.set()
            thread.join(LIMIT_S)


def test_full_pool_of_the_parent_is_empty_in_child(database_url: str) -> None:
    with Database(database_url, settings=FEW) as database, database.session() as session:
        session.connection()
        assert in_child(lambda: backend(database)) > 0


def test_engine_taken_before_the_fork_works_in_child(database: Database) -> None:
    engine, derived = database.engine, database.engine.execution_options(isolation_level="AUTOCOMMIT")

    def pid(of: Any) -> int:
        with of.connect() as connection:
            return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

    before = {pid(engine), pid(derived)}
    assert in_child(lambda: pid(engine)) not in before
    assert in_child(lambda: pid(derived)) not in before
    assert {pid(engine), pid(derived)} == before


def test_child_of_a_child_has_connections_of_its_own(database: Database, raw: psycopg.Connection) -> None:
    def work(depth: int) -> list[int]:
        with database.session() as session:
            PipelineRepository(session).create(new(f"depth {depth}"))
            below = in_child(lambda: work(depth + 1)) if depth < 2 else []
            return [driver_connection(session).info.backend_pid, *below]

    assert len(set(work(0))) == 3
    assert sorted(names(raw)) == ["depth 0", "depth 1", "depth 2"]


def test_listener_of_the_parent_raises_in_child_and_goes_on(database: Database) -> None:
    with database.session() as session:
        runs = RunRepository(session)
        run = runs.create(store(session, "a>b"))
        runs.advance(run.id)
    with closing(database.listen(poll=timedelta(seconds=0.05))) as events:
        first = next(events)
        with pytest.raises(ForkedConnectionError):  # even for an event that was read before the fork
            in_child(lambda: next(events))
        in_child(events.close)
        second = next(events)
        assert (first.run_id, second.run_id) == (run.id, run.id)

        def reads() -> list[str]:
            with closing(database.listen()) as own:
                return [next(own).cursor, next(own).cursor]

        assert in_child(reads) == [first.cursor, second.cursor]
        with pytest.raises(ForkedConnectionError):
            in_child(lambda: next(events))
        with database.session() as session:
            RunRepository(session).cancel(run.id)
        assert next(events).run_id == run.id


def test_listener_thread_of_the_parent_goes_on(database: Database) -> None:
    seen: list[str] = []
    with database.session() as session:
        run = RunRepository(session).create(store(session, "a>b"))
        RunRepository(session).advance(run.id)

    def follow() -> None:
        with closing(database.listen(poll=timedelta(seconds=0.02))) as events:
            for event in events:
                seen.append(event.type.value)
                if "cancelled" in event.type.value:
                    return

    thread = threading.Thread(target=follow)
    thread.start()
    for _ in range(10):
        assert in_child(lambda: backend(database)) > 0
    with database.session() as session:
        RunRepository(session).cancel(run.id)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert len(seen) == 3


def test_async_sessions_of_parent_and_child(database: Database, raw: psycopg.Connection) -> None:
    async def child() -> str:
        async with database:
            async with database.async_session() as session:
                await AsyncPipelineRepository(session).create(new("child"))
            async with database.group_commit() as runs:
                with pytest.raises(Exception, match="does not exist"):
                    await runs.get(999)
            return "done"

    async def parent() -> None:
        async with database:
            async with database.async_session() as session:
                pipelines = AsyncPipelineRepository(session)
                made = await pipelines.create(new("parent"))

                async def inherited() -> None:
                    await pipelines.get(made.id)

                async def committed() -> None:
                    await session.commit()

                async def left() -> None:
                    await session.rollback()
                    await session.close()

                for work in (inherited, committed):
                    with pytest.raises(ForkedConnectionError):
                        in_child(lambda work=work: asyncio.run(work()))  # type: ignore[misc]
                in_child(lambda: asyncio.run(left()))
                assert in_child(lambda: asyncio.run(child())) == "done"
                assert (await pipelines.get(made.id)).name == "parent"
            assert in_child(lambda: asyncio.run(child())) == "done"
            in_child(database.dispose)

    asyncio.run(parent())
    assert sorted(names(raw)) == ["child", "child", "parent"]


def test_child_of_a_loop_cancels_no_statement_of_the_parent(database: Database) -> None:
    """A cancelled wait asks the server to cancel: here the statement of the parent."""

    async def sleep() -> int:
        async with database.async_session() as session:
            await session.connection()
            started.set()
            result = await (await session.connection()).exec_driver_sql("SELECT 1 FROM pg_sleep(1.5)")
            return int(result.scalar_one())

    async def parent() -> None:
        async with database:
            task = asyncio.create_task(sleep())
            await started.wait()
            await asyncio.sleep(0.3)

            def cancel() -> None:
                task.cancel()
                coroutine: Any = task.get_coro()
                try:
                    coroutine.throw(asyncio.CancelledError)
                except BaseException:  # noqa: BLE001 - how it ends in the child is its own affair
                    return

            in_child(cancel)
            assert await asyncio.wait_for(task, LIMIT_S) == 1

    started = asyncio.Event()
    asyncio.run(parent())


def test_async_listener_of_the_parent_raises_in_child_and_goes_on(database: Database) -> None:
    with database.session() as session:
        run = RunRepository(session).create(store(session, "a>b"))
        RunRepository(session).advance(run.id)

    async def parent() -> None:
        async with database:
            events = database.alisten(poll=timedelta(seconds=0.05))
            first = await anext(events)

            async def following() -> None:
                await anext(events)

            with pytest.raises(ForkedConnectionError):
                in_child(lambda: asyncio.run(following()))
            assert (await anext(events)).run_id == first.run_id
            await events.aclose()

    asyncio.run(parent())


def test_async_connection_that_a_task_opens_survives_a_fork(database_url: str) -> None:
    """The child's cleanup must not take the half-open socket out of the parent's selector."""

    async def parent() -> None:
        async with Database(database_url) as database:

            async def connect_one() -> int:
                async with database.async_session() as session:
                    return int((await (await session.connection()).exec_driver_sql("SELECT 1")).scalar_one())

            for steps in range(12):
                task = asyncio.create_task(connect_one())
                for _ in range(steps):
                    await asyncio.sleep(0)

                def leave(task: asyncio.Task[int] = task) -> None:
                    coroutine: Any = task.get_coro()
                    try:
                        coroutine.throw(asyncio.CancelledError)
                    except BaseException:  # noqa: BLE001 - how it ends in the child is its own affair
                        return

                in_child(leave)
                assert await asyncio.wait_for(task, LIMIT_S) == 1
                await database.adispose()

    asyncio.run(parent())


# Forks when it reads a line, while a thread opens a connection.
CONNECTING = f"""
import os, sys, threading, time
from gathering_pipeline import Database
threading.Thread(target=Database(sys.argv[1]).check, daemon=True).start()
sys.stdin.readline()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep({LIMIT_S})
"""


def test_connection_that_a_thread_opens_ends_with_the_parent() -> None:
    """The server sees the end of a killed parent although its child lives on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u:p@127.0.0.1:{silent.getsockname()[1]}/d"
        command = [sys.executable, "-c", CONNECTING, url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            silent.settimeout(LIMIT_S)
            accepted, _ = silent.accept()
            with accepted:
                accepted.settimeout(LIMIT_S)
                assert accepted.recv(1)  # the opening waits for an answer
                print(file=parent.stdin, flush=True)
                child = int(parent.stdout.readline())
                parent.kill()
                try:
                    accepted.settimeout(5)
                    while accepted.recv(4096):
                        pass
                finally:
                    os.kill(child, signal.SIGKILL)


def test_group_commit_of_the_parent_raises_in_child(database: Database) -> None:
    with database.session() as session:
        pipeline = store(session, "a>b")
    with database.group_commit() as runs:
        run = runs.create(pipeline)
        for call in (
            lambda: runs.advance(run.id),
            lambda: runs.get(run.id),
            lambda: runs.advance(run.id, retry=True),
            lambda: runs.create(pipeline),
        ):
            with pytest.raises(ForkedConnectionError):
                in_child(call)
        in_child(lambda: runs.__exit__(None, None, None))

        def work() -> int:
            with database.group_commit() as own:
                return len(own.advance(own.create(pipeline).id).started)

        assert in_child(work) == 1
        assert len(runs.advance(run.id).started) == 1


def test_group_commit_forked_under_load_answers_every_call(database: Database) -> None:
    """A child forks while other threads lead, wait and hold the lock."""
    with database.session() as session:
        pipeline = store(session, " ".join(f"n{at}" for at in range(3)))
        ids = [RunRepository(session).create(pipeline).id for _ in range(60)]
    with database.group_commit() as runs:
        errors: list[BaseException] = []

        def advance(mine: list[int]) -> None:
            try:
                for run in mine:
                    assert len(runs.advance(run).started) == 3
            except BaseException as error:  # noqa: BLE001 - reported below
                errors.append(error)

        threads = [threading.Thread(target=advance, args=(ids[at::4],)) for at in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            with pytest.raises(ForkedConnectionError):
                in_child(lambda: runs.advance(ids[0]))
            in_child(lambda: runs.__exit__(None, None, None))
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert errors == []


def test_async_group_commit_of_the_parent_raises_in_child(database: Database) -> None:
    with database.session() as session:
        pipeline = store(session, "a>b")

    async def parent() -> None:
        async with database, database.group_commit() as runs:
            run = await runs.create(pipeline)

            async def advance() -> None:
                await runs.advance(run.id)

            async def read() -> None:
                await runs.get(run.id)

            async def leave() -> None:
                await runs.__aexit__(None, None, None)

            for work in (advance, read):
                with pytest.raises(ForkedConnectionError):
                    in_child(lambda work=work: asyncio.run(work()))  # type: ignore[misc]
            in_child(lambda: asyncio.run(leave()))
            assert len((await runs.advance(run.id)).started) == 1

    asyncio.run(parent())


def count_names(database: Database, results: Any) -> None:
    with database.session() as session:
        results.put(len(PipelineRepository(session).search().items))


def test_multiprocessing_with_fork_shares_no_connection(database: Database) -> None:
    context = multiprocessing.get_context("fork")
    with database.session() as session:
        PipelineRepository(session).create(new("parent"))
        session.commit()
        PipelineRepository(session).create(new("not yet"))
        results = context.Queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            workers = [context.Process(target=count_names, args=(database, results)) for _ in range(3)]
            for worker in workers:
                worker.start()
        assert [results.get(timeout=LIMIT_S) for _ in workers] == [1, 1, 1]
        for worker in workers:
            worker.join(LIMIT_S)
            assert worker.exitcode == 0
    with database.session() as session:
        assert len(PipelineRepository(session).search().items) == 2


# A server that loads the application, and then forks workers that serve at once; each reads what it was asked for.
PRELOADING = """
import os, sys
from gathering_pipeline import Database, PipelineRepository
from tests.support.pipelines import new

database = Database(sys.argv[1])
database.check()
with database.session() as session:
    ids = [PipelineRepository(session).create(new(f"p{number}")).id for number in range(4)]
workers = []
for pipeline in ids:
    worker = os.fork()
    if worker == 0:
        for _ in range(30):
            with database.session() as session:
                assert PipelineRepository(session).get(pipeline).id == pipeline
        database.dispose()
        sys.exit()
    workers.append(worker)
    database.check()
print([os.waitpid(worker, 0)[1] for worker in workers])
database.dispose()
"""


def test_preloading_server_shares_no_connection(database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELOADING, database_url],
        capture_output=True,
        text=True,
        timeout=LIMIT_S * 2,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[0, 0, 0, 0]", "")


def test_forked_connection_error_is_picklable_and_not_transient() -> None:
    error = pickle.loads(pickle.dumps(ForkedConnectionError()))  # noqa: S301 - made here
    assert type(error) is ForkedConnectionError
    assert str(error) == str(ForkedConnectionError())
    assert not is_transient(error)


def test_disposed_database_is_not_kept(database_url: str) -> None:
    database = Database(database_url)
    database.check()
    kept = weakref.ref(database)
    database.dispose()
    del database
    gc.collect()
    assert kept() is None


def test_connections_of_the_parent_end_with_it(database_url: str, raw: psycopg.Connection) -> None:
    """The server drops the session of a killed parent although its child lives on."""
    program = f"""
import os, signal, time
from gathering_pipeline import Database, PipelineRepository
from tests.support.pipelines import new
with Database({database_url!r}).session() as session:
    PipelineRepository(session).create(new("lost"))
    session.connection().exec_driver_sql("LOCK circle.pipelines IN ACCESS EXCLUSIVE MODE")
    child = os.fork()
    if child == 0:
        time.sleep({LIMIT_S})
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert parent.wait(LIMIT_S) == -signal.SIGKILL
        with connect(database_url) as other:
            other.execute("SELECT set_config('lock_timeout', %s, false)", [f"{LIMIT_S // 2}s"])
            assert other.execute("SELECT count(*) FROM circle.pipelines").fetchone() == (0,)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()
    assert names(raw) == []
