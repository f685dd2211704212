"""Where the time of a call goes: ``python -m benchmarks.breakdown``.

Microseconds a call, median: the floor's bare statement, our SQL function called by psycopg, by SQLAlchemy, and by the
repository. Commits don't wait for the disk here, so that what the program does can be seen.
"""

# ruff: noqa: SLF001 - the private statements are what it measures

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import psycopg

from benchmarks.runs import OUTPUT, OUTPUT_JSON, done
from benchmarks.stage import Stage, chain, connect, database, open_stage, store
from gathering_pipeline import RunRepository
from gathering_pipeline.repositories import runs as sql

NODES = 200
ROUNDS = 3


class Clock:
    """Collects the times of calls by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def __call__(self, name: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do something and note how long it took."""
        begin = time.perf_counter()
        result = action(*args, **kwargs)
        self.times.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    def show(self, title: str) -> None:
        """Print the medians."""
        figures = {name: statistics.median(values) * 1e6 for name, values in self.times.items()}
        print(f"{title:<34}" + "".join(f"{name:>14} {figure:>6.0f}" for name, figure in figures.items()), flush=True)


def floor_run(connection: psycopg.Connection[Any], pipeline_id: int, clock: Clock) -> None:
    """The floor, statement by statement."""
    execute = connection.execute
    row = clock(
        "create",
        lambda: execute(
            "INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data)"
            " VALUES (%s, 'running', clock_timestamp(), %s) RETURNING id",
            (pipeline_id, "{}"),
        ).fetchone(),
    )
    for at in range(NODES):
        node = clock(
            "start_node",
            lambda n=f"node-{at}": execute(
                "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, started_at)"
                " VALUES (%s, %s, 'agent', 'running', clock_timestamp()) RETURNING id",
                (row[0], n),
            ).fetchone(),
        )
        clock(
            "complete_node",
            execute,
            "UPDATE circle.pipeline_node_runs SET status = 'completed', output_data = %s, duration_ms = %s,"
            " completed_at = clock_timestamp() WHERE id = %s",
            (OUTPUT_JSON, 5, node[0]),
        )
    clock(
        "finish",
        execute,
        "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = clock_timestamp(), duration_seconds = %s"
        " WHERE id = %s",
        (1, row[0]),
    )


def _created(clock: Clock, call: Callable[[str, dict[str, Any]], Any], pipeline_id: int) -> dict[str, Any]:
    row = clock("create", call, sql._CREATE, {"pipeline_id": pipeline_id, "trigger_data": "{}", "key": None})
    return {"run_id": json.loads(row[0])["id"], "token": None}


def function_run(call: Callable[[str, dict[str, Any]], Any], pipeline_id: int, clock: Clock) -> None:
    """Our SQL, called by whatever ``call`` is."""
    run_id = _created(clock, call, pipeline_id)
    clock("start", call, sql._START, run_id)
    for at in range(NODES):
        node = run_id | {"node_id": f"node-{at}", "data": None}
        clock("start_node", call, sql._START_NODE, node)
        clock("complete_node", call, sql._COMPLETE_NODE, node | {"data": OUTPUT_JSON})
    clock("finish", call, sql._FINISH, run_id)


def repository_run(runs: RunRepository, pipeline_id: int, clock: Clock) -> None:
    """Our API, step by step."""
    run = clock("create", runs.create, pipeline_id)
    clock("start", runs.start, run.id)
    for at in range(NODES):
        clock("start_node", runs.start_node, run.id, f"node-{at}")
        clock("complete_node", runs.complete_node, run.id, f"node-{at}", OUTPUT)
    clock("finish", runs.finish, run.id)


def advance_function_run(call: Callable[[str, dict[str, Any]], Any], pipeline_id: int, clock: Clock) -> None:
    """``advance_run`` on a chain, called by whatever ``call`` is."""
    run_id = _created(clock, call, pipeline_id)
    clock("first", call, sql._ADVANCE, run_id | {"results": "[]"})
    for at in range(NODES):
        results = f'[{{"node_id":"node-{at}","status":"completed","output":{OUTPUT_JSON},"duration_ms":5}}]'
        clock("advance" if at < NODES - 1 else "last", call, sql._ADVANCE, run_id | {"results": results})


def advance_run(runs: RunRepository, pipeline_id: int, clock: Clock) -> None:
    """``advance`` on a chain."""
    run = runs.create(pipeline_id)
    started = clock("first", runs.advance, run.id)
    for at in range(NODES):
        name = "advance" if at < NODES - 1 else "last"
        started = clock(name, runs.advance, run.id, [done(node) for node in started])


def show(stage: Stage, pipeline_id: int) -> None:
    """Print every level for a pipeline."""
    base, raw = connect(stage.floor), connect(stage.ours)
    db = database(stage)

    def by_psycopg(statement: str, parameters: dict[str, Any]) -> Any:
        return raw.execute(statement, parameters).fetchone()

    levels: dict[str, Clock] = {}
    with db.session(autocommit=True) as session:
        runs = RunRepository(session)

        def by_sqlalchemy(statement: str, parameters: dict[str, Any]) -> Any:
            return session.connection().exec_driver_sql(statement, parameters).fetchone()

        actions: dict[str, Callable[[Clock], Any]] = {
            "SELECT 1": lambda clock: [
                clock("round trip", raw.execute, "SELECT %s::int", (at,)) for at in range(NODES * 2)
            ],
            "floor": lambda clock: floor_run(base, pipeline_id, clock),
            "psycopg, functions": lambda clock: function_run(by_psycopg, pipeline_id, clock),
            "SQLAlchemy, functions": lambda clock: function_run(by_sqlalchemy, pipeline_id, clock),
            "repository": lambda clock: repository_run(runs, pipeline_id, clock),
            "psycopg, advance_run": lambda clock: advance_function_run(by_psycopg, pipeline_id, clock),
            "SQLAlchemy, advance_run": lambda clock: advance_function_run(by_sqlalchemy, pipeline_id, clock),
            "repository.advance": lambda clock: advance_run(runs, pipeline_id, clock),
        }
        for turn in range(ROUNDS + 1):
            for name, action in actions.items():
                action(levels.setdefault(name, Clock()) if turn else Clock())
    with db.session() as session:
        for _ in range(ROUNDS * 5):
            # its own session a call, as a service has it
            def one() -> None:
                with db.session(autocommit=True) as own:
                    own.connection().exec_driver_sql("SELECT 1")

            levels.setdefault("a session of its own", Clock())("SELECT 1", one)
    for name, clock in levels.items():
        clock.show(name)
    base.close()
    raw.close()


def main() -> None:
    """Print the table."""
    with open_stage() as stage:
        for url in (stage.ours, stage.floor):
            with connect(url) as connection:
                row = connection.execute("SELECT current_database()").fetchone()
                assert row is not None
                connection.execute(f"ALTER DATABASE {row[0]} SET synchronous_commit = off", prepare=False)
        show(stage, store(stage, chain(NODES)))


if __name__ == "__main__":
    main()
