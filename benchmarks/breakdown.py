"""Where the time of a call goes: ``python -m benchmarks.breakdown``.

Median microseconds of a call: the floor's bare statement, and the statement of a repository's call sent by psycopg, by
SQLAlchemy and by the repository itself; then the repository's calls on databases that lack a kind of guard each, which
shows what it costs. Commits don't wait for the disk, so that the time of the program shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any, LiteralString, NamedTuple, ParamSpec, TypeVar

import psycopg
from sqlalchemy.orm import Session

from benchmarks import floor
from benchmarks.command_line import add_size_option, remove_database_settings
from benchmarks.databases import Databases, Server, open_server
from benchmarks.floor import OUTPUT, Connection
from benchmarks.graphs import chain
from benchmarks.runs import completed
from benchmarks.table import Size
from gathering_pipeline import RunRepository

NODES = 200
ROUNDS = 3

FLOOR_CALLS = {
    floor.CREATE_RUN: "create",
    floor.START_NODE: "start_node",
    floor.COMPLETE_NODE: "complete_node",
    floor.END_RUN: "finish",
}

CHECKS = """
    ALTER TABLE circle.pipeline_runs DROP CONSTRAINT ck_pipeline_runs_leased,
        DROP CONSTRAINT pipeline_runs_status_check;
    ALTER TABLE circle.pipeline_node_runs DROP CONSTRAINT ck_pipeline_node_runs_due,
        DROP CONSTRAINT pipeline_node_runs_status_check"""
ROW_GUARDS = """
    CREATE OR REPLACE TRIGGER pipeline_runs_before BEFORE INSERT ON circle.pipeline_runs
        FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();
    ALTER TABLE circle.pipeline_runs DISABLE TRIGGER pipeline_runs_same_status;
    ALTER TABLE circle.pipeline_node_runs DISABLE TRIGGER pipeline_node_runs_before,
        DISABLE TRIGGER pipeline_node_runs_before_insert, DISABLE TRIGGER pipeline_node_runs_same_status"""
"""All but the one that gives a new run its version."""
COUNTERS = """
    CREATE OR REPLACE FUNCTION circle.count_runs(
        p_pipeline_id integer, p_old text, p_new text, p_number bigint DEFAULT 1
    ) RETURNS void LANGUAGE plpgsql AS 'BEGIN END'"""
JUDGES = """
    ALTER TABLE circle.pipeline_runs DISABLE TRIGGER pipeline_runs_after_insert,
        DISABLE TRIGGER pipeline_runs_after_update;
    ALTER TABLE circle.pipeline_node_runs DISABLE TRIGGER pipeline_node_runs_after_insert,
        DISABLE TRIGGER pipeline_node_runs_after_update"""
WITHOUT = {
    "all guards": "SELECT",
    "without CHECKs": CHECKS,
    "without guards of rows": ROW_GUARDS,
    "without counters": COUNTERS,
    "without events, judges, counters": JUDGES,
    "without any": f"{CHECKS}; {ROW_GUARDS}; {JUDGES}",
}
"""Kinds of guards, and the statements that take each off."""

P = ParamSpec("P")
T = TypeVar("T")
Send = Callable[[str, Mapping[str, Any]], tuple[Any, ...] | None]
"""Sends a statement with its parameters and returns the first row."""


class Stopwatch:
    """Collects the times of calls by name.

    Attributes:
        times: Seconds of each call.
        name: Name of the call under way, or of the last one.
    """

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.name = ""

    def __call__(self, name: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something and record how long it took."""
        self.name = name
        begin = perf_counter()
        result = action(*args, **kwargs)
        self.times.setdefault(name, []).append(perf_counter() - begin)
        return result

    def microseconds(self) -> dict[str, float]:
        """The median of each name."""
        return {name: statistics.median(times) * 1e6 for name, times in self.times.items()}


class Sent(NamedTuple):
    """A statement that a repository sent."""

    call: str
    statement: str
    parameters: Mapping[str, Any]


def record_statements(session: Session, run: Callable[[RunRepository, Stopwatch], None]) -> list[Sent]:
    """The statements that the repository sends in a run, one for each call."""
    sent: list[Sent] = []
    stopwatch = Stopwatch()

    class RecordingCursor(psycopg.Cursor[tuple[Any, ...]]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> RecordingCursor:
            sent.append(Sent(stopwatch.name, query, dict(params)))
            return super().execute(query, params, **options)

    connection = session.connection().connection.driver_connection
    assert isinstance(connection, psycopg.Connection)
    usual = connection.cursor_factory
    connection.cursor_factory = RecordingCursor
    try:
        run(RunRepository(session), stopwatch)
    finally:
        connection.cursor_factory = usual
    assert len(sent) == sum(map(len, stopwatch.times.values())), "a call is more than one statement"
    return sent


def replay(sent: list[Sent], send: Send, stopwatch: Stopwatch) -> None:
    """Send the statements of a run again, for a new run."""
    run_id: int | None = None
    for call, statement, parameters in sent:
        values = {name: run_id if name == "run_id" else value for name, value in parameters.items()}
        row = stopwatch(call, send, statement, values)
        if run_id is None:
            assert row is not None
            run_id = json.loads(row[0])["id"]


def floor_run(connection: Connection, pipeline_id: int, count: int, stopwatch: Stopwatch) -> None:
    """A run by the floor's script."""

    def execute(query: LiteralString, params: tuple[Any, ...], /) -> psycopg.Cursor[tuple[Any, ...]]:
        return stopwatch(FLOOR_CALLS[query], connection.execute, query, params)

    floor.record_run(execute, pipeline_id, count)


def run_by_steps(pipeline_id: int, count: int, runs: RunRepository, stopwatch: Stopwatch) -> None:
    """A run by our repository, step by step."""
    run = stopwatch("create", runs.create, pipeline_id)
    stopwatch("start", runs.start, run.id)
    for at in range(count):
        stopwatch("start_node", runs.start_node, run.id, f"node-{at}")
        stopwatch("complete_node", runs.complete_node, run.id, f"node-{at}", OUTPUT)
    stopwatch("finish", runs.finish, run.id)


def run_by_advance(pipeline_id: int, count: int, runs: RunRepository, stopwatch: Stopwatch) -> None:
    """A run by our repository, by ``advance`` on a chain."""
    run = stopwatch("create", runs.create, pipeline_id)
    step = stopwatch("first", runs.advance, run.id)
    for at in range(count):
        name = "advance" if at < count - 1 else "last"
        step = stopwatch(name, runs.advance, run.id, [completed(node) for node in step.started])


def measure(databases: Databases, size: Size) -> Iterator[tuple[str, dict[str, float]]]:
    """Each way to send the calls of a run, with the median microseconds of each call."""
    count, rounds = size.count(NODES), size.repeats(ROUNDS)
    pipeline = databases.store(chain(count))
    session, base = databases.session, databases.floor
    steps = partial(run_by_steps, pipeline.ours, count)
    advance = partial(run_by_advance, pipeline.ours, count)
    recorded_steps, recorded_advance = record_statements(session, steps), record_statements(session, advance)
    with floor.connect(databases.our_url) as raw:

        def by_psycopg(statement: str, parameters: Mapping[str, Any]) -> tuple[Any, ...] | None:
            return raw.execute(statement.encode(), parameters).fetchone()

        def by_sqlalchemy(statement: str, parameters: Mapping[str, Any]) -> tuple[Any, ...] | None:
            row = session.connection().exec_driver_sql(statement, dict(parameters)).fetchone()
            return None if row is None else tuple(row)

        def round_trips(stopwatch: Stopwatch) -> None:
            for at in range(2 * count):
                stopwatch("round trip", raw.execute, "SELECT %s::int", (at,))

        ways: dict[str, Callable[[Stopwatch], None]] = {
            "SELECT 1": round_trips,
            "floor": partial(floor_run, base, pipeline.floor, count),
            "psycopg, functions": partial(replay, recorded_steps, by_psycopg),
            "SQLAlchemy, functions": partial(replay, recorded_steps, by_sqlalchemy),
            "repository": partial(steps, databases.runs),
            "psycopg, advance_run": partial(replay, recorded_advance, by_psycopg),
            "SQLAlchemy, advance_run": partial(replay, recorded_advance, by_sqlalchemy),
            "repository.advance": partial(advance, databases.runs),
        }
        for connection in (raw, base):
            connection.execute("SET synchronous_commit = off", prepare=False)
        session.connection().exec_driver_sql("SET synchronous_commit = off")
        stopwatches = {name: Stopwatch() for name in ways}
        for turn in range(-1, rounds):
            for name, way in ways.items():
                way(stopwatches[name] if turn >= 0 else Stopwatch())
    yield from ((name, stopwatch.microseconds()) for name, stopwatch in stopwatches.items())
    own_session = Stopwatch()
    for _ in range(5 * rounds):
        own_session("SELECT 1", _select_in_session, databases)
    yield "a session for each call", own_session.microseconds()


def _select_in_session(databases: Databases) -> None:
    with databases.database.session(autocommit=True) as session:
        session.connection().exec_driver_sql("SELECT 1")


def measure_guards(server: Server, size: Size) -> Iterator[tuple[str, dict[str, float]]]:
    """The median microseconds of each call of the repository, on databases that lack a kind of guard each, in turns."""
    count, rounds = size.count(NODES), size.repeats(ROUNDS)
    with ExitStack() as stack:
        ways: dict[str, list[Callable[[Stopwatch], None]]] = {}
        for name, statement in WITHOUT.items():
            databases = stack.enter_context(server.databases())
            pipeline_id = databases.store(chain(count)).ours
            connection = databases.session.connection()
            for each in (*statement.split(";"), "SET synchronous_commit = off"):
                connection.exec_driver_sql(each)
            ways[name] = [partial(run, pipeline_id, count, databases.runs) for run in (run_by_steps, run_by_advance)]
        stopwatches = {name: Stopwatch() for name in ways}
        for turn in range(-1, rounds):
            for name, runs in ways.items():
                for run in runs:
                    run(stopwatches[name] if turn >= 0 else Stopwatch())
        yield from ((name, stopwatch.microseconds()) for name, stopwatch in stopwatches.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.breakdown", description="Where the time of a call goes."
    )
    add_size_option(parser)
    size: Size = parser.parse_args(arguments).size
    remove_database_settings()
    with open_server() as server, server.databases() as databases:
        for name, figures in itertools.chain(measure(databases, size), measure_guards(server, size)):
            print(f"{name:<34}" + "".join(f"{call:>14} {time:>6.0f}" for call, time in figures.items()), flush=True)


if __name__ == "__main__":
    main()
