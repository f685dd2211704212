"""Runs, recorded by our repositories and by the floor: a psycopg script that checks nothing, 2n + 2 bare statements."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import psycopg

from benchmarks.stage import Row, Stage, chain, connect, database, duel, fan_out, floor, milliseconds, store, worker
from gathering_pipeline import Database, NodeExecutionResult, NodeRunRead, RunRepository

Connection = psycopg.Connection[tuple[Any, ...]]

OUTPUT = {"text": "All done, nothing to add.", "tokens": 321}
OUTPUT_JSON = json.dumps(OUTPUT)
LEASE = timedelta(minutes=1)


# The floor


def floor_run(connection: Connection, pipeline_id: int, count: int) -> None:
    """Record a run of ``count`` nodes in 2n + 2 statements, each its own commit."""
    execute = connection.execute
    row = execute(
        "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data)"
        " VALUES (%s, 'running', clock_timestamp(), %s) RETURNING id",
        (pipeline_id, "{}"),
    ).fetchone()
    assert row is not None
    run_id = row[0]
    for at in range(count):
        row = execute(
            "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at)"
            " VALUES (%s, %s, 'agent', 'running', clock_timestamp()) RETURNING id",
            (run_id, f"node-{at}"),
        ).fetchone()
        assert row is not None
        execute(
            "UPDATE circle.pipeline_node_runs SET status = 'completed', output_data = %s, duration_ms = %s,"
            " completed_at = clock_timestamp() WHERE id = %s",
            (OUTPUT_JSON, 5, row[0]),
        )
    execute(
        "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = clock_timestamp(), duration_seconds = %s"
        " WHERE id = %s",
        (1, run_id),
    )


# Ours


def by_steps(runs: RunRepository, run_id: int, count: int, token: int | None = None) -> None:
    """Start and complete each node, and end the run: 2n + 1 calls."""
    for at in range(count):
        runs.start_node(run_id, f"node-{at}", token=token)
        runs.complete_node(run_id, f"node-{at}", OUTPUT, token=token)
    runs.finish(run_id, token=token)


def by_advance(runs: RunRepository, run_id: int, token: int | None = None) -> None:
    """Report what was started and start what follows, until nothing is left: on a chain n + 1 calls."""
    started = runs.advance(run_id, token=token)
    while started:
        started = runs.advance(run_id, [done(node) for node in started], token=token)


def done(node: NodeRunRead) -> NodeExecutionResult:
    """The result of a node."""
    return NodeExecutionResult(node_id=node.node_id, status="completed", output=OUTPUT, duration_ms=5)


def steps_run(runs: RunRepository, pipeline_id: int, count: int) -> None:
    """One run, step by step: 2n + 3 calls."""
    run = runs.create(pipeline_id)
    runs.start(run.id)
    by_steps(runs, run.id, count)


def advance_run(runs: RunRepository, pipeline_id: int) -> None:
    """One run by ``advance``."""
    by_advance(runs, runs.create(pipeline_id).id)


def record_run(runs: RunRepository, pipeline_id: int, count: int) -> None:
    """One run, reported in one batch: 3 calls."""
    results = [
        NodeExecutionResult(node_id=f"node-{at}", status="completed", output=OUTPUT, duration_ms=5)
        for at in range(count)
    ]
    run = runs.create(pipeline_id)
    runs.record(run.id, results)
    runs.finish(run.id)


# The rows


def steps(stage: Stage) -> Iterator[Row]:
    """Step by step."""
    runs, base = worker(stage), floor(stage)
    for count, repeats in ((10, 80), (100, 15)):
        pipeline_id = store(stage, chain(count))
        mine, other, ratio = duel(
            partial(steps_run, runs, pipeline_id, count),
            partial(floor_run, base, pipeline_id, count),
            repeats,
        )
        yield Row(f"record a run of {count} nodes, step by step", milliseconds(mine), milliseconds(other), ratio, 1.5)


def advance(stage: Stage) -> Iterator[Row]:
    """By ``advance``."""
    runs, base = worker(stage), floor(stage)
    for what, graph, repeats, bar in (
        ("a chain of 10", chain(10), 80, 1.2),
        ("a chain of 100", chain(100), 15, 1.2),
        ("a fan-out of 100", fan_out(100), 15, 0.4),
    ):
        pipeline_id, count = store(stage, graph), len(graph[0])
        mine, other, ratio = duel(
            partial(advance_run, runs, pipeline_id), partial(floor_run, base, pipeline_id, count), repeats
        )
        yield Row(f"the same by advance, {what}", milliseconds(mine), milliseconds(other), ratio, bar)


def record(stage: Stage) -> Iterator[Row]:
    """In one batch."""
    runs, base = worker(stage), floor(stage)
    for count, repeats, bar in ((10, 80, 3.0), (100, 15, 12.0)):
        pipeline_id = store(stage, chain(count))
        mine, other, ratio = duel(
            partial(record_run, runs, pipeline_id, count),
            partial(floor_run, base, pipeline_id, count),
            repeats,
        )
        ours, theirs = f"{1 / mine:.0f}/s", f"{1 / other:.0f}/s"
        yield Row(f"the same by record in one batch, {count} nodes", ours, theirs, 1 / ratio, bar, more_is_better=True)


def create(stage: Stage) -> Iterator[Row]:
    """A run with its nodes, against as many bare rows."""
    runs, base = worker(stage), floor(stage)
    base.execute("CREATE TABLE IF NOT EXISTS public.source (run_id int, node_id text, node_type text)", prepare=False)
    for count, repeats in ((10, 150), (1_000, 25), (10_000, 7)):
        pipeline_id = store(stage, chain(count))
        base.execute("TRUNCATE public.source", prepare=False)
        base.execute(
            "WITH run AS (INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (%s) RETURNING id)"
            " INSERT INTO public.source SELECT id, 'node-' || at, 'agent' FROM run, generate_series(1, %s) at",
            (pipeline_id, count),
            prepare=False,
        )
        base.execute("ANALYZE public.source", prepare=False)

        def ours(p: int = pipeline_id) -> None:
            runs.create(p)

        def bare() -> None:
            base.execute(
                "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type)"
                " SELECT run_id, node_id, node_type FROM public.source"
            )

        mine, other, ratio = duel(ours, bare, repeats)
        yield Row(f"create a run of {count} nodes, to bare rows", milliseconds(mine), milliseconds(other), ratio, 2)


def wal(stage: Stage) -> Iterator[Row]:
    """Bytes of write-ahead log, without the full pages that follow a checkpoint."""
    runs, base = worker(stage), floor(stage)
    pipeline_id = store(stage, chain(100))

    def written(action: Callable[[], object]) -> float:
        sizes = []
        for turn in range(9):
            before = base.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
            action()
            row = base.execute("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", before).fetchone()
            assert row is not None
            if turn > 1:
                sizes.append(float(row[0]))
        return statistics.median(sizes) / 1000

    base_kb = written(lambda: floor_run(base, pipeline_id, 100))
    for what, action in (
        ("step by step", lambda: steps_run(runs, pipeline_id, 100)),
        ("by advance", lambda: advance_run(runs, pipeline_id)),
        ("by record", lambda: record_run(runs, pipeline_id, 100)),
    ):
        mine = written(action)
        name = f"write-ahead log of a run of 100 nodes, {what}"
        yield Row(name, f"{mine:.0f} kB", f"{base_kb:.0f} kB", mine / base_kb, 2)


def trips(stage: Stage) -> Iterator[Row]:
    """Round trips; the floor's figure is the number allowed."""
    runs = worker(stage)
    for count in (10, 100):
        pipeline_id = store(stage, chain(count))
        actions: tuple[tuple[str, Callable[[], None], int], ...] = (
            ("step by step", partial(steps_run, runs, pipeline_id, count), 2 * count + 3),
            ("by advance on a chain", partial(advance_run, runs, pipeline_id), count + 2),
            ("by record", partial(record_run, runs, pipeline_id, count), 3),
        )
        for what, action, allowed in actions:
            for _ in range(8):  # statements are prepared by then
                action()
            counted = _round_trips(runs, action)
            name = f"round trips of a run of {count} nodes, {what}"
            yield Row(name, str(counted), f"{allowed} allowed", counted / allowed, 1)


def _round_trips(runs: RunRepository, action: Callable[[], object]) -> int:
    """How often libpq asks the server while an action runs: its trace shows every message that ends a request."""
    connection = runs._session.connection().connection.driver_connection  # noqa: SLF001
    assert isinstance(connection, psycopg.Connection)
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


def workers(stage: Stage) -> Iterator[Row]:
    """Eight workers that create, claim and run, against eight connections of the floor."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(WORKERS, _take, (context.Barrier(WORKERS),)) as pool:

        def throughput(target: Callable[..., int], url: str, ids: list[int]) -> float:
            each = pool.starmap(target, [(url, ids[at % len(ids)], at) for at in range(WORKERS)], chunksize=1)
            return sum(each) / SECONDS

        for what, many in (("8 pipelines", WORKERS), ("one pipeline", 1)):
            ids = [store(stage, chain(10)) for _ in range(many)]
            rounds = [
                (
                    throughput(_floor_worker, stage.floor, ids),
                    throughput(_steps_worker, stage.ours, ids),
                    throughput(_advance_worker, stage.ours, ids),
                )
                for _ in range(ROUNDS)
            ]
            for at, how in ((1, "step by step"), (2, "by advance")):
                ours, theirs = (f"{statistics.median(figures[side] for figures in rounds):.0f}/s" for side in (at, 0))
                ratio = statistics.median(figures[at] / figures[0] for figures in rounds)
                yield Row(f"8 workers on {what}, 10 nodes {how}", ours, theirs, ratio, 0.7, more_is_better=True)
    with database(stage).session() as session:
        more = "SELECT count(*) FROM circle.pipeline_runs WHERE claim_count > 1"
        twice = session.connection().exec_driver_sql(more)
        count: int = twice.scalar_one()
    yield Row("runs that two of them got", str(count), "0", float(count), 0)


_barrier: Barrier


def _take(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 - a pool can hand it over in no other way
    _barrier = barrier


def _count(action: Callable[[], object]) -> int:
    """How often an action can be done, when all processes begin at once."""
    for _ in range(6):
        action()
    _barrier.wait()
    end, count = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end:
        action()
        count += 1
    return count


def _floor_worker(url: str, pipeline_id: int, _at: int) -> int:
    with connect(url) as connection:
        return _count(lambda: floor_run(connection, pipeline_id, 10))


def _steps_worker(url: str, pipeline_id: int, at: int) -> int:
    return _worker(url, pipeline_id, at, lambda runs, run_id, token: by_steps(runs, run_id, 10, token))


def _advance_worker(url: str, pipeline_id: int, at: int) -> int:
    return _worker(url, pipeline_id, at, by_advance)


def _worker(url: str, pipeline_id: int, at: int, execute: Callable[[RunRepository, int, int], None]) -> int:
    with Database(url) as db, db.session(autocommit=True) as session:
        runs = RunRepository(session)

        def once() -> None:
            runs.create(pipeline_id)
            for run in runs.claim(f"worker-{at}", LEASE):
                execute(runs, run.id, run.claim_token)

        return _count(once)
