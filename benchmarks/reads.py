"""What reads cost, and the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from psycopg import sql
from pydantic import BaseModel

from benchmarks import floor
from benchmarks.databases import Databases
from benchmarks.floor import Connection, fetch_value
from benchmarks.graphs import chain
from benchmarks.table import Row, Size, compare, milliseconds, timed
from gathering_pipeline import NodeRunRead, PipelineRead, PipelineRepository, RunRead
from gathering_pipeline.migrator import steps

RUNS = 100_000
"""Runs of the history; each has 10 nodes."""


def imports(_databases: Databases, size: Size) -> Iterator[Row]:
    """The time of the import statement, each in a new process."""

    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)  # noqa: S603

    warm_up = size.repeats(2) - 1
    pairs = [
        (seconds("from gathering_pipeline import validate_pipeline_dag"), seconds("from pydantic import BaseModel"))
        for _ in range(warm_up + size.repeats(12))
    ][warm_up:]
    yield Row.of_times(
        "import validate_pipeline_dag, to pydantic",
        statistics.median(ours for ours, _ in pairs),
        statistics.median(base for _, base in pairs),
        1.5,
        ratio=statistics.median(ours / base for ours, base in pairs),
    )
    loaded = "from gathering_pipeline import validate_pipeline_dag; import sys; sys.exit('sqlalchemy' in sys.modules)"
    code = subprocess.run([sys.executable, "-c", loaded], check=False).returncode  # noqa: S603
    yield Row("modules of SQLAlchemy that it loads", "some" if code else "none", "none", float(code), 0)


def load(databases: Databases, size: Size) -> Iterator[Row]:
    """A pipeline of 1,000 nodes."""
    count = size.count(1_000)
    pipeline_id = databases.store(chain(count)).ours
    pipelines = PipelineRepository(databases.session)
    statement = sql.SQL("SELECT {} FROM circle.pipelines WHERE id = %s").format(_columns(PipelineRead))
    with floor.connect(databases.our_url) as base:
        figures = compare(
            lambda: pipelines.get(pipeline_id),
            lambda: base.execute(statement, (pipeline_id,)).fetchone(),
            size.repeats(100),
        )
    yield Row.of_times(f"load a pipeline of {count} nodes", figures.ours, figures.floor, 1.5, ratio=figures.ratio)


def history(databases: Databases, size: Size) -> Iterator[Row]:
    """Views of a history of 100,000 runs with 10 nodes each."""
    count = size.count(RUNS)
    pipeline_id = databases.store(chain(size.count(10))).ours
    runs = databases.runs
    with floor.connect(databases.our_url) as base:
        fill_history(base, pipeline_id, count)
        middle: int = fetch_value(base.execute("SELECT max(id) FROM circle.pipeline_runs")) - count // 2
        select_latest = sql.SQL("SELECT {} FROM circle.pipeline_runs ORDER BY id DESC LIMIT 50").format(
            _columns(RunRead)
        )
        select_run = sql.SQL("SELECT {} FROM circle.pipeline_runs WHERE id = %s").format(_columns(RunRead))
        select_nodes = sql.SQL("SELECT {} FROM circle.pipeline_node_runs WHERE run_id = %s ORDER BY position").format(
            _columns(NodeRunRead)
        )

        def latest() -> object:
            return base.execute(select_latest).fetchall()

        def one() -> object:
            return base.execute(select_run, (middle,)).fetchone(), base.execute(select_nodes, (middle,)).fetchall()

        views: tuple[tuple[str, Callable[[], object], Callable[[], object], int, float], ...] = (
            (f"latest 50 of {count:,} runs", lambda: runs.search(limit=50), latest, 100, 1.2),
            (f"one run of {count:,} with its nodes", lambda: (runs.get(middle), runs.nodes(middle)), one, 100, 1.2),
        )
        for name, ours, bare, repeats, bar in views:
            figures = compare(ours, bare, size.repeats(repeats))
            yield Row.of_times(name, figures.ours, figures.floor, bar, ratio=figures.ratio)
        constant: tuple[tuple[str, Callable[[], object]], ...] = (
            ("counts", runs.counts),
            ("statistics", lambda: runs.statistics(pipeline_id)),
        )
        for name, call in constant:
            call()
            taken = statistics.median(timed(call) for _ in range(size.repeats(50)))
            yield Row(f"{name} at {count:,} runs", milliseconds(taken), "5 ms allowed", taken / 0.005, 1)


def _columns(model: type[BaseModel]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, model.model_fields))


def fill_history(connection: Connection, pipeline_id: int, runs: int) -> None:
    """Write ended runs with their nodes at once; as a replica, so that no trigger fires for each row."""
    parameters: dict[str, Any] = {"pipeline": pipeline_id, "runs": runs}
    connection.execute("SET session_replication_role = replica", prepare=False)
    connection.execute(
        """
        WITH run AS (
            INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version, status, started_at, completed_at,
                                              created_at, trigger_data)
            SELECT %(pipeline)s, 1, (ARRAY['completed', 'completed', 'completed', 'failed', 'cancelled'])[1 + at %% 5],
                   at.began, at.began + interval '3 s', at.began, '{"branch": "main"}'
            FROM (SELECT at, clock_timestamp() - make_interval(secs => %(runs)s - at) AS began
                  FROM generate_series(1, %(runs)s) at) at (at, began)
            RETURNING id, started_at
        )
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, position, predecessors, successors,
                                               output_data, started_at, completed_at, duration_ms)
        SELECT run.id, v.node_id, v.node_type, 'completed', v.position, v.predecessors, v.successors,
               '{"text": "All done, nothing to add."}', run.started_at, run.started_at + interval '1 s', 1000
        FROM run, circle.pipeline_version_nodes v WHERE v.pipeline_id = %(pipeline)s
        """,
        parameters,
        prepare=False,
    )
    connection.execute("RESET session_replication_role", prepare=False)
    for step in steps("011_lifecycle"):
        if step.title == "pipeline_counters: count the existing runs":
            connection.execute(step.sql.encode(), prepare=False)
    connection.execute("VACUUM ANALYZE circle.pipeline_runs, circle.pipeline_node_runs", prepare=False)
