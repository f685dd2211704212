"""What is read, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.stage import Row, Stage, chain, connect, database, duel, milliseconds, store
from gathering_pipeline import NodeRunRead, PipelineRead, PipelineRepository, RunRead, RunRepository

HISTORY = 100_000


def imports(_stage: Stage) -> Iterator[Row]:
    """The time of the import statement, each in a fresh process."""

    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)  # noqa: S603

    pairs = [
        (seconds("from gathering_pipeline import validate_pipeline_dag"), seconds("from pydantic import BaseModel"))
        for _ in range(13)
    ][1:]
    mine, other, ratio = (
        sorted(values)[len(pairs) // 2] for values in (*zip(*pairs, strict=True), [a / b for a, b in pairs])
    )
    yield Row("import validate_pipeline_dag, to pydantic", milliseconds(mine), milliseconds(other), ratio, 1.5)
    loaded = "from gathering_pipeline import validate_pipeline_dag; import sys; sys.exit('sqlalchemy' in sys.modules)"
    code = subprocess.run([sys.executable, "-c", loaded], check=False).returncode  # noqa: S603
    yield Row("modules of SQLAlchemy that it loads", "some" if code else "none", "none", float(code), 0)


def load(stage: Stage) -> Iterator[Row]:
    """A pipeline of 1,000 nodes."""
    db = database(stage)
    pipeline_id = store(stage, chain(1_000))
    columns = ", ".join(PipelineRead.model_fields)
    with connect(stage.ours) as base, db.session(autocommit=True) as session:
        pipelines = PipelineRepository(session)

        def fetch() -> Any:
            return base.execute(f"SELECT {columns} FROM circle.pipelines WHERE id = %s", (pipeline_id,)).fetchone()

        mine, other, ratio = duel(lambda: pipelines.get(pipeline_id), fetch, 100)
    yield Row("load a pipeline of 1,000 nodes", milliseconds(mine), milliseconds(other), ratio, 1.5)


def history(stage: Stage) -> Iterator[Row]:
    """Views of a history of 100,000 runs with 10 nodes each."""
    db = database(stage)
    pipeline_id = store(stage, chain(10))
    with connect(stage.ours) as base, db.session(autocommit=True) as session:
        _fill(base, pipeline_id)
        runs = RunRepository(session)
        row = base.execute("SELECT max(id) FROM circle.pipeline_runs").fetchone()
        assert row is not None
        middle = row[0] - HISTORY // 2
        run_columns, node_columns = ", ".join(RunRead.model_fields), ", ".join(NodeRunRead.model_fields)

        def latest() -> Any:
            return base.execute(f"SELECT {run_columns} FROM circle.pipeline_runs ORDER BY id DESC LIMIT 50").fetchall()

        def one() -> Any:
            return (
                base.execute(f"SELECT {run_columns} FROM circle.pipeline_runs WHERE id = %s", (middle,)).fetchone(),
                base.execute(
                    f"SELECT {node_columns} FROM circle.pipeline_node_runs WHERE run_id = %s ORDER BY position",
                    (middle,),
                ).fetchall(),
            )

        def counts() -> Any:
            return base.execute("SELECT status, count(*) FROM circle.pipeline_runs GROUP BY status").fetchall()

        for name, ours, bare, repeats in (
            ("latest 50 of 100,000 runs", lambda: runs.search(limit=50), latest, 100),
            ("one run of 100,000 with its nodes", lambda: (runs.get(middle), runs.nodes(middle)), one, 100),
            ("counts by status of 100,000 runs", runs.counts, counts, 30),
        ):
            mine, other, ratio = duel(ours, bare, repeats)
            yield Row(name, milliseconds(mine), milliseconds(other), ratio, 1.5)


def _fill(base: Any, pipeline_id: int) -> None:
    """Write the history at once; as a replica, so that nothing is done for each row that a run would do."""
    base.execute("SET session_replication_role = replica", prepare=False)
    base.execute(
        """
        WITH run AS (
            INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version, status, started_at, completed_at,
                                              created_at, trigger_data)
            SELECT %(pipeline)s, 1, (ARRAY['completed', 'completed', 'completed', 'failed', 'cancelled'])[1 + at %% 5],
                   at.began, at.began + interval '3 s', at.began, '{"branch": "main"}'
            FROM (SELECT at, clock_timestamp() - make_interval(secs => 100000 - at) AS began
                  FROM generate_series(1, %(runs)s) at) at (at, began)
            RETURNING id, started_at
        )
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, position, predecessors, successors,
                                               output_data, started_at, completed_at, duration_ms)
        SELECT run.id, v.node_id, v.node_type, 'completed', v.position, v.predecessors, v.successors,
               '{"text": "All done, nothing to add."}', run.started_at, run.started_at + interval '1 s', 1000
        FROM run, circle.pipeline_version_nodes v WHERE v.pipeline_id = %(pipeline)s
        """,
        {"pipeline": pipeline_id, "runs": HISTORY},
        prepare=False,
    )
    base.execute("RESET session_replication_role", prepare=False)
    for table in ("pipeline_runs", "pipeline_node_runs"):
        base.execute(f"VACUUM ANALYZE circle.{table}", prepare=False)
