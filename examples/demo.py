"""A tour on a database of its own: ``python -m examples.demo``.

The tour stores a pipeline, shows how a broken pipeline is refused, and lets two worker processes execute runs. It
checks what it prints, and exits with 1 if a check fails.
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
    PipelineEvent,
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
TIMEOUT_SECONDS = 30.0
SHELL_PREFIXES = ("DATABASE_URL", "GATHERING_", "PG")
"""Variables of the shell that name another database, or change how a database is used."""


class DemoError(Exception):
    """A check of the tour failed."""


def check(condition: object, message: str) -> None:
    """Stop the tour unless a condition holds."""
    if not condition:
        raise DemoError(message)


def wait_until(condition: Callable[[], bool], message: str) -> None:
    """Wait for a condition; stop the tour after ``TIMEOUT_SECONDS``."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        check(time.monotonic() < deadline, message)
        time.sleep(0.1)


def load_pipeline(name: str) -> PipelineCreate:
    """Read a pipeline from a file of this folder."""
    return PipelineCreate(**json.loads((HERE / name).read_text(encoding="utf-8")))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers are right-aligned."""
    lines = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    right = [all(cell == "" or isinstance(cell, (int, float)) for cell in column) for column in zip(*rows, strict=True)]
    for line in (list(header), ["-" * width for width in widths], *lines):
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        print("  " + "  ".join(cells).rstrip())
    print()


@contextmanager
def temporary_server() -> Iterator[str]:
    """The URL of an embedded PostgreSQL, which is removed at the end."""
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
def running_workers(database: Database) -> Iterator[None]:
    """Two worker processes; at the end each receives SIGTERM and has to exit with 0."""
    processes = [start_worker(database, name) for name in WORKERS]
    try:
        wait_until(lambda: connected_programs(database) >= set(WORKERS), "the workers do not start")
        yield
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for name, process in zip(WORKERS, processes, strict=True):
            check(process.wait(10) == 0, f"worker {name} did not exit with 0")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start_worker(database: Database, name: str) -> subprocess.Popen[bytes]:
    """Start a worker process; ``name`` is also the name of its connections."""
    url = database.engine.url.update_query_dict({"application_name": name})
    return subprocess.Popen(  # noqa: S603 - a program of this folder
        [sys.executable, "-m", "examples.worker", "--name", name, "--concurrency", "2"],
        cwd=HERE.parent,
        env=os.environ | {"GATHERING_DATABASE_URL": url.render_as_string(hide_password=False)},
    )


def connected_programs(database: Database) -> set[str]:
    """The names of the programs that are connected to the database."""
    statement = "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
    with database.engine.connect() as connection:
        return set(connection.scalars(text(statement)))


def store_pipelines(database: Database) -> PipelineRead:
    """Store the valid pipeline; the broken one is refused."""
    with database.session() as session:
        pipelines = PipelineRepository(session)
        pipeline = pipelines.create(load_pipeline("code_review.json"))
        print(f"Stored {pipeline.name!r} as pipeline {pipeline.id}, version {pipeline.version}.")
        try:
            pipelines.create(load_pipeline("broken.json"))
        except InvalidPipelineError as error:
            print(f"Refused 'broken.json': {error}\n")
            check("cycle: review -> fix -> retest -> review" in str(error), "the cycle is not in the message")
        else:
            raise DemoError("the cyclic pipeline was stored")
        stored = [found.id for found in pipelines.search().items]
        check(stored == [pipeline.id], "something else was stored")
    return pipeline


def wait_for_end(database: Database, run_ids: Sequence[int]) -> list[RunRead]:
    """Wait until the runs are completed."""
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        wait_until(lambda: runs.counts()[RunStatus.COMPLETED] == len(run_ids), "the runs do not complete")
        return [runs.get(run_id) for run_id in run_ids]


def read_events(database: Database, run_id: int) -> tuple[PipelineEvent, ...]:
    """The events of a terminal run. An event can be read once no older transaction of the server is open."""
    with database.session(autocommit=True) as session:
        events = EventRepository(session)
        wait_until(
            lambda: any(event.ends_run for event in events.read(run_id=run_id).items),
            f"the last event of run {run_id} does not arrive",
        )
        return events.read(run_id=run_id).items


def print_runs(runs: Sequence[RunRead], nodes: Sequence[NodeRunRead]) -> None:
    """Print the runs, and the nodes of the first one."""
    header = ("run", "status", "worker", "claims", "seconds")
    print_table(header, [(run.id, run.status, run.worker_id, run.claim_count, duration_seconds(run)) for run in runs])
    begin = runs[0].started_at
    assert begin is not None
    print(f"Run {runs[0].id}, node by node (milliseconds):\n")
    print_table(
        ("node", "type", "status", "retries", "started at", "duration"),
        [
            (node.node_id, node.node_type, node.status, node.retry_count, began, node.duration_ms)
            for node in nodes
            for began in [round((node.started_at - begin).total_seconds() * 1000) if node.started_at else ""]
        ],
    )


def duration_seconds(run: RunRead) -> float:
    """Duration of a terminal run."""
    assert run.started_at is not None
    assert run.completed_at is not None
    return round((run.completed_at - run.started_at).total_seconds(), 2)


def tour(url: str) -> None:
    """The whole tour, on an empty database.

    Args:
        url: SQLAlchemy URL of the database.

    Raises:
        DemoError: A check failed.
    """
    with Database(url) as database:
        database.upgrade()
        database.check()
        print("Upgraded the schema to head.")
        pipeline = store_pipelines(database)
        with running_workers(database):
            with database.session() as session:
                run_ids = [RunRepository(session).create(pipeline.id, {"branch": f"topic-{n}"}).id for n in range(RUNS)]
            print(f"Created {RUNS} runs for two workers, {' and '.join(WORKERS)}.\n", flush=True)
            runs = wait_for_end(database, run_ids)
        print(flush=True)
        with database.session() as session:
            repository = RunRepository(session)
            nodes = [repository.nodes(run_id) for run_id in run_ids]
            counted = PipelineRepository(session).get(pipeline.id)
        history = read_events(database, run_ids[0])
    print_runs(runs, nodes[0])
    print(f"Its events, as examples.follow prints them (the last 4 of {len(history)}):\n")
    for event in history[-4:]:
        print(f"  {follow.format_event(event)}")
    print()
    check(history[0].type == EventType.PIPELINE_RUN_STARTED, "the first event is not the start of the run")
    check(history[-1].type == EventType.PIPELINE_RUN_COMPLETED, "the last event is not the end of the run")
    check({run.worker_id for run in runs} == set(WORKERS), "one worker executed all runs")
    check(not any(run.lapsed_claims for run in runs), "a worker lost a run")
    check((counted.run_count, counted.success_count, counted.error_count) == (RUNS, RUNS, 0), "the counters are wrong")
    skipped = {"ask", "remind"}
    for of_run in nodes:
        check(len(of_run) == len(pipeline.nodes), "a node is missing")
        for node in of_run:
            expected = NodeStatus.SKIPPED if node.node_id in skipped else NodeStatus.COMPLETED
            check(node.status is expected, f"{node.node_id} is {node.status}, not {expected}")
            check(
                node.retry_count == (node.node_id == "security"), f"{node.node_id} was retried {node.retry_count} times"
            )


def main() -> int:
    """Take the tour; the exit status says whether all checks passed."""
    for name in [name for name in os.environ if name.startswith(SHELL_PREFIXES)]:
        del os.environ[name]
    begun = time.monotonic()
    try:
        with temporary_server() as url:
            print(f"Started the embedded PostgreSQL in {time.monotonic() - begun:.1f} s.")
            tour(url)
    except DemoError as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    print(f"All checks passed, in {time.monotonic() - begun:.1f} s.")
    print("Next: docs/first-steps.md stores and runs a pipeline of your own.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
