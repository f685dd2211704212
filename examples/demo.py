"""A tour on a database of its own: ``python -m examples.demo``.

Stores a pipeline, shows a broken one refused, and has two worker processes run it. Exits with 1 if anything is not as
the tour says.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text

from examples import follow
from gathering_pipeline import (
    Database,
    EventRepository,
    EventType,
    InvalidPipelineError,
    NodeRunRead,
    NodeStatus,
    PipelineCreate,
    PipelineRead,
    PipelineRepository,
    RunRead,
    RunRepository,
    RunStatus,
    embedded,
)

HERE = Path(__file__).parent
RUNS = 6
WORKERS = ("ada", "grace")
LONGEST_SECONDS = 30.0
OTHERS = ("DATABASE_URL", "GATHERING_", "PG")
"""Variables of the shell that could lead to another database, or change how it is used."""


class NotAsPromisedError(Exception):
    """The tour went wrong."""


def expect(condition: object, otherwise: str) -> None:
    """Stop the tour unless something holds."""
    if not condition:
        raise NotAsPromisedError(otherwise)


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    """Stop the tour unless something comes to hold before long."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        expect(time.monotonic() < deadline, otherwise)
        time.sleep(0.1)


def example(name: str) -> PipelineCreate:
    """Read a pipeline beside this file."""
    return PipelineCreate(**json.loads((HERE / name).read_text(encoding="utf-8")))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers stand to the right."""
    lines = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    right = [all(cell == "" or isinstance(cell, (int, float)) for cell in column) for column in zip(*rows, strict=True)]
    for line in (list(head), ["-" * width for width in widths], *lines):
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        print("  " + "  ".join(cells).rstrip())
    print()


@contextmanager
def temporary_server() -> Iterator[str]:
    """The URL of an embedded PostgreSQL that leaves nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="gathering-demo-"))
    try:
        server = embedded.start(folder / "data")
        try:
            yield server.url
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def workers(database: Database, url: str) -> Iterator[None]:
    """Two worker processes; in the end each is told to stop, and has to do so cleanly."""
    processes = [
        subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "examples.worker", "--name", name],
            cwd=HERE.parent,
            env=os.environ | {"GATHERING_DATABASE_URL": f"{url}&application_name={name}"},
        )
        for name in WORKERS
    ]
    try:
        wait_until(lambda: connected(database) >= set(WORKERS), "the workers do not start")
        yield
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for name, process in zip(WORKERS, processes, strict=True):
            expect(process.wait(10) == 0, f"worker {name} did not stop cleanly")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def connected(database: Database) -> set[str]:
    """The names under which programs are connected to the server."""
    with database.engine.connect() as connection:
        return set(connection.scalars(text("SELECT application_name FROM pg_stat_activity")))


def store(database: Database) -> PipelineRead:
    """Store the good pipeline; the bad one is refused."""
    with database.session() as session:
        pipelines = PipelineRepository(session)
        pipeline = pipelines.create(example("code_review.json"))
        print(f"Stored {pipeline.name!r} as pipeline {pipeline.id}, version {pipeline.version}.")
        try:
            pipelines.create(example("broken.json"))
        except InvalidPipelineError as error:
            print(f"Refused 'broken.json': {error}\n")
            expect("cycle: review -> fix -> retest -> review" in str(error), "the cycle is not in the message")
        else:
            raise NotAsPromisedError("the cyclic pipeline was stored")
        stored = [found.id for found in pipelines.search().items]
        expect(stored == [pipeline.id], "something else was stored")
    return pipeline


def wait_for_end(database: Database, run_ids: Sequence[int]) -> list[RunRead]:
    """Wait until the runs are over."""
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        wait_until(lambda: runs.counts()[RunStatus.COMPLETED] == len(run_ids), "the runs do not complete")
        return [runs.get(run_id) for run_id in run_ids]


def show(runs: Sequence[RunRead], nodes: Sequence[NodeRunRead]) -> None:
    """Print the runs, and the nodes of the first one."""
    head = ("run", "status", "worker", "claims", "seconds")
    table(head, [(run.id, run.status, run.worker_id, run.claim_count, took(run)) for run in runs])
    begin = runs[0].started_at
    assert begin is not None
    print(f"Run {runs[0].id}, node by node (milliseconds):\n")
    table(
        ("node", "type", "status", "retries", "began at", "took"),
        [
            (node.node_id, node.node_type, node.status, node.retry_count, began, node.duration_ms)
            for node in nodes
            for began in [round((node.started_at - begin).total_seconds() * 1000) if node.started_at else ""]
        ],
    )


def took(run: RunRead) -> float:
    """Duration of a run that is over, in seconds."""
    assert run.started_at is not None
    assert run.completed_at is not None
    return round((run.completed_at - run.started_at).total_seconds(), 2)


def tour(url: str) -> None:
    """The whole tour."""
    with Database(url) as database:
        database.upgrade()
        database.check()
        print("Upgraded the schema to head.")
        pipeline = store(database)
        with workers(database, url):
            with database.session() as session:
                run_ids = [RunRepository(session).create(pipeline.id, {"branch": f"topic-{n}"}).id for n in range(RUNS)]
            print(f"Created {RUNS} runs for two workers, {' and '.join(WORKERS)}.\n", flush=True)
            runs = wait_for_end(database, run_ids)
        print(flush=True)
        with database.session() as session:
            repository = RunRepository(session)
            nodes = [repository.nodes(run_id) for run_id in run_ids]
            history = EventRepository(session).read(run_id=run_ids[0]).items
            counted = PipelineRepository(session).get(pipeline.id)
    show(runs, nodes[0])
    print(f"Its events, as examples.follow prints them (the last 4 of {len(history)}):\n")
    for event in history[-4:]:
        print(f"  {follow.line(event)}")
    print()
    expect(history[0].type == EventType.PIPELINE_RUN_STARTED, "the first event is not the start")
    expect(history[-1].type == EventType.PIPELINE_RUN_COMPLETED, "the last event is not the end")
    expect({run.worker_id for run in runs} == set(WORKERS), "one worker did all the work")
    expect(all(run.claim_count == 1 for run in runs), "a run was claimed twice")
    expect((counted.run_count, counted.success_count, counted.error_count) == (RUNS, RUNS, 0), "the counters are wrong")
    skipped = {"ask", "remind"}
    for of_run in nodes:
        expect(len(of_run) == len(pipeline.nodes), "a node is missing")
        for node in of_run:
            expected = NodeStatus.SKIPPED if node.node_id in skipped else NodeStatus.COMPLETED
            expect(node.status is expected, f"{node.node_id} is {node.status}, not {expected}")
            expect(node.retry_count == (node.node_id == "security"), f"{node.node_id} was retried {node.retry_count} x")


def main() -> int:
    """Run the tour and tell how it went."""
    for name in [name for name in os.environ if name.startswith(OTHERS)]:
        del os.environ[name]
    begun = time.monotonic()
    try:
        with temporary_server() as url:
            print(f"Started the embedded PostgreSQL in {time.monotonic() - begun:.1f} s.")
            tour(url)
    except NotAsPromisedError as error:
        print(f"Not as promised: {error}", file=sys.stderr)
        return 1
    print(f"Everything as promised, in {time.monotonic() - begun:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
