"""Runs, recorded by our repositories and by the floor's script."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.pool import Pool
from multiprocessing.synchronize import Barrier
from time import perf_counter

import psycopg

from benchmarks import floor
from benchmarks.databases import Databases
from benchmarks.floor import OUTPUT, fetch_value
from benchmarks.graphs import chain, fan_out
from benchmarks.table import Row, Size, compare, timed
from gathering_pipeline import AsyncRunRepository, Database, NodeExecutionResult, RunRepository, StartedNode

LEASE = timedelta(minutes=1)


# One run by each way of the repository


def step_through(runs: RunRepository, run_id: int, count: int, token: int | None = None) -> None:
    """Start and complete each node, and end the run: 2n + 1 calls."""
    for at in range(count):
        runs.start_node(run_id, f"node-{at}", token=token)
        runs.complete_node(run_id, f"node-{at}", OUTPUT, token=token)
    runs.finish(run_id, token=token)


def advance_through(runs: RunRepository, run_id: int, token: int | None = None) -> None:
    """Report the nodes that were started and start their successors, to the run's end: on a chain n + 1 calls."""
    step = runs.advance(run_id, token=token)
    while step.started:
        step = runs.advance(run_id, [completed(node) for node in step.started], token=token)


def completed(node: StartedNode) -> NodeExecutionResult:
    """The result of a node."""
    return NodeExecutionResult(node_id=node.node_id, status="completed", output=OUTPUT, duration_ms=5)


def run_by_steps(runs: RunRepository, pipeline_id: int, count: int) -> None:
    """Create a run and take it to its end step by step: 2n + 3 calls."""
    run = runs.create(pipeline_id)
    runs.start(run.id)
    step_through(runs, run.id, count)


def run_by_advance(runs: RunRepository, pipeline_id: int) -> None:
    """Create a run and take it to its end by ``advance``."""
    advance_through(runs, runs.create(pipeline_id).id)


def run_by_record(runs: RunRepository, pipeline_id: int, count: int) -> None:
    """Create a run, report all its nodes and end it: 1 call."""
    results = [
        NodeExecutionResult(node_id=f"node-{at}", status="completed", output=OUTPUT, duration_ms=5)
        for at in range(count)
    ]
    runs.record_run(pipeline_id, results)


# One worker


def steps(databases: Databases, size: Size) -> Iterator[Row]:
    """A run, step by step."""
    for full_count, repeats in ((10, 80), (100, 15)):
        count = size.count(full_count)
        pipeline = databases.store(chain(count))
        figures = compare(
            partial(run_by_steps, databases.runs, pipeline.ours, count),
            partial(floor.record_run, databases.floor.execute, pipeline.floor, count),
            size.repeats(repeats),
        )
        name = f"record a run of {count} nodes, step by step"
        yield Row.of_times(name, figures.ours, figures.floor, 1.6, ratio=figures.ratio)


def advance(databases: Databases, size: Size) -> Iterator[Row]:
    """A run by ``advance``."""
    for shape, graph, full_count, repeats, bar in (
        ("a chain", chain, 10, 80, 1.25),
        ("a chain", chain, 100, 15, 1.15),
        ("a fan-out", fan_out, 100, 15, 0.3),
    ):
        count = size.count(full_count)
        pipeline = databases.store(graph(count))
        figures = compare(
            partial(run_by_advance, databases.runs, pipeline.ours),
            partial(floor.record_run, databases.floor.execute, pipeline.floor, count),
            size.repeats(repeats),
        )
        name = f"the same by advance, {shape} of {count}"
        yield Row.of_times(name, figures.ours, figures.floor, bar, ratio=figures.ratio)


def record(databases: Databases, size: Size) -> Iterator[Row]:
    """A run in one batch."""
    for full_count, repeats, bar in ((10, 80, 3.5), (100, 15, 9.0)):
        count = size.count(full_count)
        pipeline = databases.store(chain(count))
        figures = compare(
            partial(run_by_record, databases.runs, pipeline.ours, count),
            partial(floor.record_run, databases.floor.execute, pipeline.floor, count),
            size.repeats(repeats),
        )
        name = f"the same, reported afterwards in one call, {count} nodes"
        yield Row.of_rates(name, 1 / figures.ours, 1 / figures.floor, bar, ratio=1 / figures.ratio)


def create(databases: Databases, size: Size) -> Iterator[Row]:
    """A run with its nodes, against as many bare rows."""
    base = databases.floor
    base.execute("CREATE TABLE public.source (run_id int, node_id text, node_type text)", prepare=False)
    for full_count, repeats, bar in ((10, 150, 1.4), (1_000, 25, 1.3), (10_000, 7, 2.0)):
        count = size.count(full_count)
        pipeline = databases.store(chain(count))
        base.execute("TRUNCATE public.source", prepare=False)
        base.execute(
            "WITH run AS (INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (%s) RETURNING id)"
            " INSERT INTO public.source SELECT id, 'node-' || at, 'agent' FROM run, generate_series(1, %s) at",
            (pipeline.floor, count),
            prepare=False,
        )
        base.execute("ANALYZE public.source", prepare=False)
        insert = (
            "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type)"
            " SELECT run_id, node_id, node_type FROM public.source"
        )
        figures = compare(
            partial(databases.runs.create, pipeline.ours), partial(base.execute, insert), size.repeats(repeats)
        )
        name = f"create a run of {count} nodes, to bare rows"
        yield Row.of_times(name, figures.ours, figures.floor, bar, ratio=figures.ratio)


def write_ahead_log(databases: Databases, size: Size) -> Iterator[Row]:
    """Bytes of write-ahead log, without the full pages that follow a checkpoint."""
    runs, base, count = databases.runs, databases.floor, size.count(100)
    pipeline = databases.store(chain(count))

    def kilobytes(action: Callable[[], object]) -> float:
        sizes = []
        for turn in range(-2, size.repeats(7)):
            before = fetch_value(base.execute("SELECT pg_current_wal_insert_lsn()"))
            action()
            written = fetch_value(base.execute("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", (before,)))
            if turn >= 0:
                sizes.append(float(written))
        return statistics.median(sizes) / 1000

    theirs = kilobytes(partial(floor.record_run, base.execute, pipeline.floor, count))
    actions: tuple[tuple[str, Callable[[], object], float], ...] = (
        ("step by step", partial(run_by_steps, runs, pipeline.ours, count), 2.2),
        ("by advance", partial(run_by_advance, runs, pipeline.ours), 2.0),
        ("by record", partial(run_by_record, runs, pipeline.ours, count), 1.4),
    )
    for what, action, bar in actions:
        ours = kilobytes(action)
        name = f"write-ahead log of a run of {count} nodes, {what}"
        yield Row(name, f"{ours:.0f} kB", f"{theirs:.0f} kB", ours / theirs, bar)


def round_trips(databases: Databases, size: Size) -> Iterator[Row]:
    """Round trips; the floor's figure is the number allowed."""
    connection = databases.session.connection().connection.driver_connection
    assert isinstance(connection, psycopg.Connection)
    for full_count in (10, 100):
        count = size.count(full_count)
        pipeline = databases.store(chain(count))
        actions: tuple[tuple[str, Callable[[], object], int], ...] = (
            ("step by step", partial(run_by_steps, databases.runs, pipeline.ours, count), 2 * count + 3),
            ("by advance on a chain", partial(run_by_advance, databases.runs, pipeline.ours), count + 2),
            ("by record", partial(run_by_record, databases.runs, pipeline.ours, count), 1),
        )
        for what, action, allowed in actions:
            for _ in range(8):  # statements are prepared by then
                action()
            counted = count_round_trips(connection, action)
            name = f"round trips of a run of {count} nodes, {what}"
            yield Row(name, str(counted), f"{allowed} allowed", counted / allowed, 1)


def count_round_trips(connection: psycopg.Connection[object], action: Callable[[], object]) -> int:
    """Count the requests to the server during an action: libpq's trace shows every message that ends a request."""
    with tempfile.TemporaryFile() as trace:
        connection.pgconn.trace(trace.fileno())
        try:
            action()
        finally:
            connection.pgconn.untrace()
        trace.seek(0)
        fields = [line.rstrip().split(b"\t") for line in trace]
    return sum(line[1] == b"F" and line[3] in (b"Sync", b"Query") for line in fields if len(line) > 3)


# Eight workers, each a process

WORKERS = 8
SECONDS = 3.0
ROUNDS = 3
NODES = 10


def workers(databases: Databases, size: Size) -> Iterator[Row]:
    """Workers that create, claim and execute runs, against as many connections of the floor's script."""
    number, count = size.count(WORKERS), size.count(NODES)
    with _processes(number) as pool:

        def runs_per_second(target: Callable[..., float], url: str, ids: list[int]) -> float:
            arguments = [(url, ids[at % len(ids)], at, count, size) for at in range(number)]
            return sum(pool.starmap(target, arguments, chunksize=1))

        for what, many in ((f"{number} pipelines", number), ("one pipeline", 1)):
            stored = [databases.store(chain(count)) for _ in range(many)]
            ours, floors = [pipeline.ours for pipeline in stored], [pipeline.floor for pipeline in stored]
            rounds = [
                (
                    runs_per_second(_floor_worker, databases.floor_url, floors),
                    runs_per_second(_steps_worker, databases.our_url, ours),
                    runs_per_second(_advance_worker, databases.our_url, ours),
                )
                for _ in range(size.repeats(ROUNDS))
            ]
            for at, how, bar in ((1, "step by step", 0.6), (2, "by advance", 0.7)):
                yield Row.of_rates(
                    f"{number} workers on {what}, {count} nodes {how}",
                    statistics.median(figures[at] for figures in rounds),
                    statistics.median(figures[0] for figures in rounds),
                    bar,
                    ratio=statistics.median(figures[at] / figures[0] for figures in rounds),
                )
    statement = "SELECT count(*) FROM circle.pipeline_runs WHERE claim_count > 1"
    twice: int = databases.session.connection().exec_driver_sql(statement).scalar_one()
    yield Row("runs that were claimed twice", str(twice), "0", float(twice), 0)


BACKLOG = 1_000_000
"""Pending runs that can't be claimed."""
QUEUES = 1_000
"""Active pipelines; the runs that can be claimed are of a tenth of them."""
BACKLOGS = {
    # the paused ones are new pipelines
    "paused and delayed": """
        WITH paused AS (
            INSERT INTO circle.pipelines (name, status, nodes, edges)
            SELECT 'paused', 'paused', p.nodes, p.edges FROM circle.pipelines p RETURNING id
        ), ids AS MATERIALIZED (SELECT array_agg(id) AS ids FROM paused)
        INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version, status, run_at, waits_until)
        SELECT CASE WHEN d.due IS NULL THEN i.ids[1 + n %% cardinality(i.ids)]
                    ELSE %(first)s + n / 10 %% %(queues)s END, 1, 'pending', d.due, d.due
        FROM ids i, generate_series(1, %(backlog)s) n
        CROSS JOIN LATERAL (SELECT CASE WHEN n %% 10 = 0 THEN now() + interval '1 day' END) d (due)""",
    "full": """
        WITH full_ones AS (
            UPDATE circle.pipelines SET max_running = 1
            WHERE id >= %(first)s + %(open)s AND id < %(first)s + %(queues)s RETURNING id
        ), running AS (
            INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version, status, started_at)
            SELECT id, 1, 'running', now() FROM full_ones
        )
        INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version, status)
        SELECT %(first)s + %(open)s + n %% (%(queues)s - %(open)s), 1, 'pending'
        FROM generate_series(1, %(backlog)s) n""",
}


def claims(databases: Databases, size: Size) -> Iterator[Row]:
    """Claims with a backlog of which nothing can be claimed, to the same claims before it was there."""
    repeats, queues = size.repeats(300), size.count(QUEUES)
    first = databases.store(chain(3)).ours
    numbers = {"first": first, "queues": queues, "open": max(1, queues // 10), "backlog": size.count(BACKLOG)}
    with floor.connect(databases.our_url) as connection:
        connection.execute(
            "INSERT INTO circle.pipelines (name, status, nodes, edges) SELECT p.name, p.status, p.nodes, p.edges"
            " FROM circle.pipelines p, generate_series(2, %(queues)s)",
            numbers,
        )
        connection.execute(
            "SELECT count(circle.create_run(%(first)s + n %% %(open)s)) FROM generate_series(1, %(number)s) n",
            numbers | {"number": 3 * (repeats + 5)},
        )

        def seconds() -> float:
            connection.execute("VACUUM ANALYZE circle.pipeline_runs, circle.pipelines", prepare=False)
            return statistics.median(
                [timed(lambda: databases.runs.claim("worker", LEASE)) for _ in range(repeats + 5)][5:]
            )

        plain = seconds()
        connection.execute("SET session_replication_role = replica", prepare=False)
        for (what, statement), bar in zip(BACKLOGS.items(), (1.5, 2), strict=True):
            connection.execute(statement.encode(), numbers, prepare=False)
            name = f"claim with {numbers['backlog']:,} {what} runs, to none"
            yield Row.of_times(name, seconds(), plain, bar)


def creators(databases: Databases, size: Size) -> Iterator[Row]:
    """Processes that create runs of one pipeline, against as many that create runs of a pipeline each."""
    number, count = size.count(WORKERS), size.count(NODES)
    many = [databases.store(chain(count)).ours for _ in range(number)]
    with _processes(number) as pool:

        def rate(ids: list[int]) -> float:
            arguments = [(databases.our_url, ids[at % len(ids)], size) for at in range(number)]
            return sum(pool.starmap(_creator, arguments, chunksize=1))

        rounds = [(rate(many[:1]), rate(many)) for _ in range(size.repeats(ROUNDS))]
    yield Row.of_rates(
        f"{number} creators on one pipeline, to {number} on {number}",
        statistics.median(one for one, _ in rounds),
        statistics.median(each for _, each in rounds),
        0.8,
        ratio=statistics.median(one / each for one, each in rounds),
    )


def group(databases: Databases, size: Size) -> Iterator[Row]:
    """Tasks that execute runs by one group commit, against the floor's script on eight connections."""
    number, count = size.count(WORKERS), size.count(NODES)
    pipeline = databases.store(chain(count))
    with _processes(number) as pool:
        arguments = [(databases.floor_url, pipeline.floor, at, count, size) for at in range(number)]
        for tasks, bar in ((8, 0.9), (64, 2.3), (256, 3.0)):
            rounds = []
            for _ in range(size.repeats(ROUNDS)):
                base = sum(pool.starmap(_floor_worker, arguments, chunksize=1))
                made = max(tasks, int(base * 5 * size.seconds(SECONDS)) + tasks)
                ids = [databases.runs.create(pipeline.ours).id for _ in range(made)]
                rounds.append((asyncio.run(_gathered(databases.our_url, ids, tasks)), base))
            yield Row.of_rates(
                f"group commit: {tasks} tasks, chains of {count}, to {number} connections",
                statistics.median(ours for ours, _ in rounds),
                statistics.median(base for _, base in rounds),
                bar,
                ratio=statistics.median(ours / base for ours, base in rounds),
            )


async def _gathered(url: str, run_ids: list[int], tasks: int) -> float:
    """Runs per second of tasks that take runs to their ends."""
    waiting = iter(run_ids)

    async def execute(runs: AsyncRunRepository) -> None:
        for run_id in waiting:
            step = await runs.advance(run_id)
            while step.started:
                step = await runs.advance(run_id, [completed(node) for node in step.started])

    async with Database(url) as database, database.group_commit() as runs:
        begin = perf_counter()
        await asyncio.gather(*(execute(runs) for _ in range(tasks)))
        return len(run_ids) / (perf_counter() - begin)


@contextmanager
def _processes(number: int) -> Iterator[Pool]:
    """Processes whose work begins at the same moment."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(number, _set_barrier, (context.Barrier(number),)) as pool:
        yield pool
        pool.close()
        pool.join()


_barrier: Barrier


def _set_barrier(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 - a pool can pass it in no other way
    _barrier = barrier


def _rate(action: Callable[[], object], size: Size) -> float:
    """How often per second an action can be done, when all processes begin at once."""
    for _ in range(size.repeats(6)):
        action()
    _barrier.wait()
    begin, done = perf_counter(), 0
    while True:
        action()
        done += 1
        spent = perf_counter() - begin
        if spent >= size.seconds(SECONDS):
            return done / spent


def _floor_worker(url: str, pipeline_id: int, _at: int, count: int, size: Size) -> float:
    with floor.connect(url) as connection:
        return _rate(partial(floor.record_run, connection.execute, pipeline_id, count), size)


def _steps_worker(url: str, pipeline_id: int, at: int, count: int, size: Size) -> float:
    def execute(runs: RunRepository, run_id: int, token: int | None) -> None:
        step_through(runs, run_id, count, token)

    return _worker(url, pipeline_id, at, execute, size)


def _advance_worker(url: str, pipeline_id: int, at: int, _count: int, size: Size) -> float:
    return _worker(url, pipeline_id, at, advance_through, size)


def _creator(url: str, pipeline_id: int, size: Size) -> float:
    with Database(url) as database, database.session(autocommit=True) as session:
        return _rate(partial(RunRepository(session).create, pipeline_id), size)


def _worker(
    url: str, pipeline_id: int, at: int, execute: Callable[[RunRepository, int, int | None], None], size: Size
) -> float:
    with Database(url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)

        def once() -> None:
            runs.create(pipeline_id)
            for run in runs.claim(f"worker-{at}", LEASE):
                execute(runs, run.id, run.token)

        return _rate(once, size)
