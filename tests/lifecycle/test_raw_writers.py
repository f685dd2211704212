"""GatheRing's own raw SQL works at head, also while the repositories write."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from gathering_pipeline import PipelineRepository, PipelineUpdate, RunRepository, RunStatus, migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import IllegalTransitionError, InvalidPipelineError, PipelineInactiveError, is_transient
from tests.support.databases import unguarded
from tests.support.graphs import chain, graph
from tests.support.runs import done, store
from tests.support.servers import connect

CREATE_PIPELINE = """
INSERT INTO circle.pipelines (name, description, status, nodes, edges)
VALUES (%(name)s, %(description)s, %(status)s, %(nodes)s, %(edges)s) RETURNING *"""
CREATE_RUN = """
INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at, trigger_data, logs)
VALUES (%(id)s, 'running', NOW(), %(data)s, '[]') RETURNING *"""
TOGGLE = """
UPDATE circle.pipelines SET status = CASE WHEN status = 'active' THEN 'paused' ELSE 'active' END, updated_at = NOW()
WHERE id = %(id)s RETURNING status"""
COUNT_RUN = "UPDATE circle.pipelines SET run_count = run_count + 1, last_run = NOW() WHERE id = %(id)s"
COUNT_SUCCESS = "UPDATE circle.pipelines SET success_count = success_count + 1 WHERE id = %(id)s"
COUNT_ERROR = "UPDATE circle.pipelines SET error_count = error_count + 1 WHERE id = %(id)s"
INDEXES = (
    "CREATE INDEX IF NOT EXISTS idx_pipelines_status ON circle.pipelines(status)",
    "CREATE INDEX IF NOT EXISTS idx_pipeline_runs_pipeline_id ON circle.pipeline_runs(pipeline_id)",
    "CREATE INDEX IF NOT EXISTS idx_pipeline_runs_status ON circle.pipeline_runs(status)",
)
ENDS = {
    "bare": "UPDATE circle.pipeline_runs SET status = %(status)s WHERE id = %(id)s",
    "with times": (
        "UPDATE circle.pipeline_runs SET status = %(status)s, completed_at = NOW(), error_message = %(error)s,"
        " duration_seconds = EXTRACT(EPOCH FROM (NOW() - started_at))::int WHERE id = %(id)s"
    ),
    "only while it runs": (
        "UPDATE circle.pipeline_runs SET status = %(status)s, completed_at = CURRENT_TIMESTAMP"
        " WHERE id = %(id)s AND status = 'running'"
    ),
    "with logs": (
        "UPDATE circle.pipeline_runs SET status = %(status)s, logs = logs || '[{\"m\": 1}]', current_node = NULL"
        " WHERE id = %(id)s"
    ),
}


def rows(raw: psycopg.Connection, sql: str, **parameters: Any) -> list[dict[str, Any]]:
    return raw.cursor(row_factory=dict_row).execute(sql, parameters).fetchall()


def new_pipeline(raw: psycopg.Connection, spec: str = "a>b", status: str = "active") -> int:
    nodes, edges = graph(spec)
    fields = {"name": "raw", "description": None, "status": status}
    (row,) = rows(raw, CREATE_PIPELINE, **fields, nodes=json.dumps(nodes), edges=json.dumps(edges))
    number: int = row["id"]
    return number


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("status", [status for status in RunStatus if status.is_terminal])
def test_raw_run_from_start_to_end_is_counted_and_timed(raw: psycopg.Connection, status: RunStatus, end: str) -> None:
    pipeline = new_pipeline(raw)
    (run,) = rows(raw, CREATE_RUN, id=pipeline, data='{"a": 1}')
    assert (run["status"], run["pipeline_version"], run["completed_at"]) == ("running", 1, None)
    assert rows(raw, "SELECT * FROM circle.pipeline_node_runs") == []
    raw.execute(COUNT_RUN, {"id": pipeline})
    raw.execute("UPDATE circle.pipeline_runs SET current_node = 'a', logs = '[{\"m\": 0}]' WHERE id = %s", [run["id"]])
    raw.execute(ENDS[end], {"id": run["id"], "status": status, "error": "why"})
    raw.execute(COUNT_SUCCESS if status == "completed" else COUNT_ERROR, {"id": pipeline})
    (ended,) = rows(raw, "SELECT * FROM circle.pipeline_runs")
    assert ended["status"] == status
    assert ended["completed_at"] >= ended["started_at"]
    assert ended["duration_seconds"] == 0
    assert ended["error_message"] == ("why" if end == "with times" else None)
    # it raises its counters itself, and no other code does
    good = int(status == "completed")
    assert rows(raw, "SELECT run_count, success_count, error_count FROM circle.pipelines") == [
        {"run_count": 1, "success_count": good, "error_count": 1 - good}
    ]
    raw.execute("UPDATE circle.pipeline_runs SET logs = logs || '[{\"late\": 1}]'")
    with pytest.raises(psycopg.Error) as caught:
        raw.execute("UPDATE circle.pipeline_runs SET status = 'completed'")
    assert caught.value.sqlstate == "PL001"


def test_raw_run_of_draft_or_broken_graph_is_stored(raw: psycopg.Connection) -> None:
    paused = new_pipeline(raw, status="paused")
    with unguarded(raw, "pipelines"):
        broken = new_pipeline(raw, "a>b b>a")
    for pipeline, version in ((paused, 1), (broken, None)):
        (run,) = rows(raw, CREATE_RUN, id=pipeline, data="{}")
        assert run["pipeline_version"] == version
        raw.execute(COUNT_RUN, {"id": pipeline})
        raw.execute(ENDS["bare"], {"id": run["id"], "status": "completed"})


def test_raw_update_of_graph_and_status_compiles_versions(raw: psycopg.Connection, database: Database) -> None:
    pipeline = new_pipeline(raw)
    assert rows(raw, TOGGLE, id=pipeline) == [{"status": "paused"}]
    with pytest.raises(PipelineInactiveError), database.session() as session:
        RunRepository(session).create(pipeline)
    assert rows(raw, TOGGLE, id=pipeline) == [{"status": "active"}]
    nodes, edges = graph("a>b b>c")
    raw.execute(
        "UPDATE circle.pipelines SET nodes = %s, edges = %s, updated_at = CURRENT_TIMESTAMP WHERE id = %s",
        [json.dumps(nodes), json.dumps(edges), pipeline],
    )
    raw.execute("UPDATE circle.pipelines SET name = 'renamed', description = 'x' WHERE id = %s", [pipeline])
    with database.session() as session:
        run = RunRepository(session).create(pipeline)
        assert (run.pipeline_version, len(RunRepository(session).nodes(run.id))) == (2, 3)
    raw.execute("DELETE FROM circle.pipelines WHERE id = %s", [pipeline])
    assert rows(raw, "SELECT * FROM circle.pipeline_runs") == []


def test_raw_insert_of_finished_nodes_is_stored(raw: psycopg.Connection) -> None:
    (run,) = rows(raw, CREATE_RUN, id=new_pipeline(raw), data="{}")
    for at, status in enumerate(("completed", "failed", "skipped", "cancelled")):
        raw.execute(
            "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, input_data, output_data,"
            " started_at, completed_at, duration_ms) VALUES (%s, %s, 'agent', %s, '{}', '{}', NOW(), NOW(), %s)",
            [run["id"], f"n{at}", status, at * 10],
        )
    raw.execute(ENDS["bare"], {"id": run["id"], "status": "failed"})
    assert [row["duration_ms"] for row in rows(raw, "SELECT * FROM circle.pipeline_node_runs ORDER BY id")] == [
        0,
        10,
        20,
        30,
    ]


@pytest.mark.parametrize("call", ["finish", "advance"])
@pytest.mark.parametrize(
    ("a", "b", "end"),
    [
        ("completed", "completed", RunStatus.COMPLETED),
        ("skipped", "skipped", RunStatus.COMPLETED),
        ("completed", "cancelled", RunStatus.CANCELLED),
        ("cancelled", None, RunStatus.CANCELLED),
    ],
)
def test_call_after_raw_insert_of_finished_nodes_ends_the_run(
    raw: psycopg.Connection, database: Database, call: str, a: str, b: str | None, end: RunStatus
) -> None:
    run_id = rows(raw, CREATE_RUN, id=new_pipeline(raw), data="{}")[0]["id"]
    for node_id, status in {"a": a, "b": b}.items():
        if status is not None:
            raw.execute(
                "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%s, %s, 'agent', %s)",
                [run_id, node_id, status],
            )
    with database.session(autocommit=True) as session:
        assert getattr(RunRepository(session), call)(run_id).status == end
        assert [node.position for node in RunRepository(session).nodes(run_id)] == [0, 1]


TOO_DEEP, TOO_LARGE = "[" * 65 + "]" * 65, '{"k": [1e309]}'
WRITES_OF_JSON = {
    "a run's insert": "INSERT INTO circle.pipeline_runs (pipeline_id, status, trigger_data) VALUES (%(id)s, 'pending', %(json)s)",
    "its data": "UPDATE circle.pipeline_runs SET trigger_data = %(json)s WHERE id = %(run)s",
    "its logs": "UPDATE circle.pipeline_runs SET logs = logs || %(json)s::jsonb WHERE id = %(run)s",
    "a node's insert": "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, input_data)"
    " VALUES (%(run)s, 'x', 'agent', 'pending', %(json)s)",
    "its input": "UPDATE circle.pipeline_node_runs SET input_data = %(json)s WHERE run_id = %(run)s",
    "its output": "UPDATE circle.pipeline_node_runs SET output_data = %(json)s WHERE run_id = %(run)s",
}


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize("write", WRITES_OF_JSON)
def test_raw_insert_of_unreadable_json_is_refused(
    raw: psycopg.Connection, database: Database, write: str, role: str
) -> None:
    pipeline = new_pipeline(raw)
    with database.session() as session:
        run = RunRepository(session).create(pipeline).id
        session.commit()
    raw.execute(f"SET session_replication_role = {role}")
    try:
        for bad in (TOO_DEEP, TOO_LARGE):
            with pytest.raises(psycopg.errors.CheckViolation, match="nested deeper than 64, or a number") as refused:
                raw.execute(WRITES_OF_JSON[write], {"id": pipeline, "run": run, "json": bad})
            assert "_json" in (refused.value.diag.constraint_name or "")
        good = "[" * 64 + "1.7976931348623157e308, null" + "]" * 64
        raw.execute(WRITES_OF_JSON[write], {"id": pipeline, "run": run, "json": good})
    finally:
        raw.execute("RESET session_replication_role")
    with database.session() as session:
        assert run in {found.id for found in RunRepository(session).search(pipeline_id=pipeline).items}
        assert len(RunRepository(session).nodes(run)) >= 2


@pytest.mark.parametrize("bad", [TOO_DEEP, TOO_LARGE])
def test_update_run_with_older_unreadable_json_succeeds(raw: psycopg.Connection, database: Database, bad: str) -> None:
    pipeline = new_pipeline(raw)
    with database.session() as session:
        stepwise, recorded = (RunRepository(session).create(pipeline).id for _ in range(2))
    tables = {"pipeline_runs": "trigger_data", "pipeline_node_runs": "input_data"}
    for table, column in tables.items():
        with unguarded(raw, table):
            raw.execute(f"UPDATE circle.{table} SET {column} = %s", (bad,))
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        for run in (stepwise, recorded):
            runs.start(run)
            runs.append_log(run, {"m": 1})
        runs.start_node(stepwise, "a")
        for node in "ab":
            runs.complete_node(stepwise, node, {"x": 1})
        runs.record(recorded, [{"node_id": node, "status": "completed", "output": {"x": 1}} for node in "ab"])
        for run in (stepwise, recorded):
            assert runs.finish(run).status == RunStatus.COMPLETED
    with unguarded(raw, "pipeline_runs"):
        raw.execute(
            "UPDATE circle.pipeline_runs SET logs = jsonb_build_array(%s::jsonb) WHERE id = %s", (bad, stepwise)
        )
    with database.session() as session:  # the new entry is good
        RunRepository(session).append_log(stepwise, {"m": 2})
    raw.execute("UPDATE circle.pipeline_runs SET logs = '[]'")
    for table, column in (("pipeline_runs", "logs"), ("pipeline_node_runs", "output_data")):
        with pytest.raises(psycopg.errors.CheckViolation):  # what changes is checked together with what doesn't
            raw.execute(f"UPDATE circle.{table} SET {tables[table]} = {tables[table]}, {column} = %s", (bad,))


def test_repositories_read_and_end_raw_runs(raw: psycopg.Connection, database: Database) -> None:
    pipeline = new_pipeline(raw)
    first, second, third = (rows(raw, CREATE_RUN, id=pipeline, data="{}")[0]["id"] for _ in range(3))
    with database.session(autocommit=True) as session:
        runs = RunRepository(session)
        assert runs.recover() == []  # they have no lease
        assert runs.nodes(first) == []
        assert list(runs.definition(first).node_map) == ["a", "b"]
        # a run never succeeds without its nodes: it gets those of its version
        for end in (runs.complete, runs.finish):
            with pytest.raises(IllegalTransitionError):
                end(first)
        assert [node.node_id for node in runs.advance(first).started] == ["a"]
        assert [node.node_id for node in runs.advance(first, [done("a")]).started] == ["b"]
        assert runs.advance(first, [done("b")]).status == RunStatus.COMPLETED
        raw.execute(
            "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type) VALUES (%s, 'b', 'agent')", [second]
        )
        assert [node.node_id for node in runs.advance(second).started] == [
            "b"
        ]  # a writer's own row has no predecessors
        raw.execute("UPDATE circle.pipeline_node_runs SET status = 'completed' WHERE run_id = %s", [second])
        assert [node.node_id for node in runs.advance(second).started] == ["a"]
        assert runs.advance(second, [done("a")]).status == RunStatus.COMPLETED
        assert [node.position for node in runs.nodes(second)] == [0, 1]
        raw.execute("UPDATE circle.pipelines SET timeout_seconds = 1")
        raw.execute("UPDATE circle.pipeline_runs SET started_at = NOW() - interval '5 s' WHERE id = %s", [third])
        assert [run.id for run in runs.expire()] == [third]


def test_upgrade_database_in_use_keeps_raw_writers_working(
    empty_database_url: str, connect: Callable[[str], psycopg.Connection]
) -> None:
    """What revision 006 describes, filled with what its writers left behind, broken graphs and NULLs included."""
    migrations.upgrade(empty_database_url, "006_pipelines")
    raw = connect(empty_database_url)
    sound = new_pipeline(raw)
    broken = new_pipeline(raw, "a>b b>a")
    raw.execute("UPDATE circle.pipelines SET run_count = NULL WHERE id = %s", [broken])
    (under_way,) = (row["id"] for row in rows(raw, CREATE_RUN, id=sound, data="{}"))
    (over,) = (row["id"] for row in rows(raw, CREATE_RUN, id=broken, data="{}"))
    raw.execute("UPDATE circle.pipeline_runs SET status = 'completed' WHERE id = %s", [over])
    migrations.upgrade(empty_database_url)

    for statement in INDEXES:
        raw.execute(statement)
    raw.execute(COUNT_RUN, {"id": broken})
    assert rows(raw, TOGGLE, id=broken) == [{"status": "paused"}]
    raw.execute("UPDATE circle.pipelines SET description = 'still editable' WHERE id = %s", [broken])
    (run,) = rows(raw, CREATE_RUN, id=broken, data="{}")
    assert run["pipeline_version"] is None
    for run_id in (run["id"], under_way):
        raw.execute(ENDS["with times"], {"id": run_id, "status": "completed", "error": None})
    with Database(empty_database_url) as database, database.session(autocommit=True) as session:
        runs, pipelines = RunRepository(session), PipelineRepository(session)
        assert pipelines.get(broken).run_count == 1
        assert runs.get(over).completed_at is not None
        with pytest.raises(InvalidPipelineError) as caught:
            runs.definition(over)
        assert [issue.code for issue in caught.value.issues] == ["no_version"]
        nodes, edges = graph("a>b")
        pipelines.update(broken, PipelineUpdate(nodes=nodes, edges=edges))  # repaired
        for pipeline in (sound, broken):
            pipelines.activate(pipeline)
            assert len(runs.nodes(runs.create(pipeline).id)) == 2


@pytest.mark.parametrize("in_one_transaction", [False, True])
def test_create_index_if_not_exists_while_repositories_write_succeeds(
    database: Database, raw: psycopg.Connection, database_url: str, in_one_transaction: bool
) -> None:
    with database.session() as session:
        pipeline = store(session, chain(4))
    before = rows(
        raw, "SELECT indexrelid::int, indisvalid FROM pg_index WHERE indrelid::regclass::text LIKE 'circle.%%'"
    )
    stop = Event()

    def request() -> int:
        times = 0
        with connect(database_url) as connection:
            connection.execute("SET deadlock_timeout = '20ms'")  # so that the test needn't wait a second for each
            connection.autocommit = not in_one_transaction
            while not stop.is_set():
                try:
                    for statement in INDEXES:
                        connection.execute(statement)
                    connection.commit()
                    times += 1
                except psycopg.Error as error:
                    # three locks in one transaction, against those of create(): one of the two may have to go again
                    if not (in_one_transaction and is_transient(error)):
                        raise
                    connection.rollback()
        return times

    def write() -> int:
        again = 0
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            for _ in range(20):
                try:
                    run_id = runs.create(pipeline).id
                    nodes = runs.advance(run_id).started
                    while nodes:
                        nodes = runs.advance(run_id, [done(node.node_id) for node in nodes]).started
                except psycopg.Error as error:
                    if not (in_one_transaction and is_transient(error)):
                        raise
                    again += 1
                    session.rollback()
        return again

    with ThreadPoolExecutor(3) as threads:
        requests = threads.submit(request)
        try:
            again = sum(writer.result(timeout=120) for writer in [threads.submit(write) for _ in range(2)])
        finally:
            stop.set()
        assert requests.result(timeout=30) > 10
    with database.session() as session:
        assert RunRepository(session).counts()[RunStatus.COMPLETED] >= 40 - again
    assert again == 0 or in_one_transaction
    after = rows(
        raw, "SELECT indexrelid::int, indisvalid FROM pg_index WHERE indrelid::regclass::text LIKE 'circle.%%'"
    )
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert all(row["indisvalid"] for row in after)
