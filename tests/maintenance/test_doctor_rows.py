"""The doctor and rows that contradict one another."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import threading
import time
from datetime import timedelta

import psycopg

from gathering_pipeline.database import Database
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.repositories.runs import RunRepository
from tests.support.databases import Connect, scalar
from tests.support.doctor import NODE_RUNS, NODES, RUNS, age, found, outcomes, pipeline


def test_repair_counters_raises_and_never_lowers(database: Database, raw: psycopg.Connection) -> None:
    behind, ahead = pipeline(database, runs=4), pipeline(database, runs=1)
    with database.session() as session:
        runs = RunRepository(session)
        runs.cancel(1)
        runs.start(2)
        runs.fail(2, "no")
        runs.start(3)
        runs.record(3, [{"node_id": node["id"], "status": "completed"} for node in NODES])
        runs.finish(3)
    count = "SELECT run_count, success_count, error_count FROM circle.pipelines WHERE id = %s"
    before = raw.execute(count, (behind,)).fetchone()
    assert found(database) == []
    raw.execute(
        "UPDATE circle.pipelines SET run_count = 2, success_count = 0, error_count = 0 WHERE id = %s", (behind,)
    )
    raw.execute("UPDATE circle.pipelines SET run_count = 50, success_count = 40 WHERE id = %s", (ahead,))
    assert found(database) == [], "who writes past our functions counts new runs up a moment later"
    age(raw)
    assert found(database) == [("counters", f"circle.pipelines id {behind}")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert raw.execute(count, (behind,)).fetchone() == before
    assert raw.execute(count, (ahead,)).fetchone() == (50, 40, 0)
    assert found(database) == []


def test_repair_counters_while_writers_work_is_exact(database: Database, raw: psycopg.Connection) -> None:
    target = pipeline(database, runs=300)
    stop = threading.Event()

    def write() -> None:
        with database.session(autocommit=True) as session:
            while not stop.is_set():
                RunRepository(session).create(target)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    repaired = 0
    for _ in range(10):
        age(raw)
        raw.execute("UPDATE circle.pipelines SET run_count = 0")
        repaired += sum(finding.outcome == "repaired" for finding in doctor(database.engine, repair=True))
    stop.set()
    for writer in writers:
        writer.join()
    assert repaired > 0
    counted = raw.execute(f"SELECT run_count, (SELECT count(*) FROM {RUNS}) FROM circle.pipelines").fetchone()
    assert counted is not None
    assert counted[0] <= counted[1], "a run that began during the recount is not counted twice"
    age(raw)
    doctor(database.engine, repair=True)
    counted = raw.execute(f"SELECT run_count, (SELECT count(*) FROM {RUNS}) FROM circle.pipelines").fetchone()
    assert counted is not None
    assert counted[0] == counted[1], "and none is lost"


def test_repair_counters_counts_without_row_lock(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=1)
    age(raw)
    raw.execute("UPDATE circle.pipelines SET run_count = 0")
    (finding,) = doctor(database.engine)
    with raw.transaction():
        plan = "\n".join(line for (line,) in raw.execute("EXPLAIN " + finding.repair[0]))
    assert "LockRows" not in plan
    assert "FOR NO KEY UPDATE" not in finding.repair[0]


def test_terminal_runs_with_live_nodes_are_repaired(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=3)
    raw.execute("SET session_replication_role = replica")  # as a subscription or a restore writes
    raw.execute(f"UPDATE {RUNS} SET status = 'cancelled' WHERE id = 1")
    raw.execute(f"UPDATE {RUNS} SET status = 'running' WHERE id = 2")
    raw.execute(f"UPDATE {RUNS} SET status = 'completed' WHERE id = 2")
    assert found(database) == [("live_nodes", f"{RUNS} id 1"), ("live_nodes", f"{RUNS} id 2")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    states = f"SELECT run_id, status, count(*), count(completed_at) FROM {NODE_RUNS} GROUP BY 1, 2 ORDER BY 1"
    assert raw.execute(states).fetchall() == [(1, "cancelled", 3, 3), (2, "cancelled", 3, 3), (3, "pending", 3, 0)]
    assert found(database) == []


def test_expired_leases_are_repaired(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=250)
    with database.session() as session:
        runs = RunRepository(session)
        claimed = runs.claim("gone", timedelta(milliseconds=1), limit=230)
        kept = runs.claim("here", timedelta(minutes=5), limit=1)
    raw.execute(f"UPDATE {RUNS} SET claim_count = 50 WHERE id = %s", (claimed[9].id,))
    for run in claimed[:5]:
        raw.execute("SELECT count(*) FROM circle.advance_run(%s, '[]', %s)", (run.id, run.claim_token))
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.severity) == ("expired_leases", "warning")
    assert "on 230 running runs" in finding.message
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    status = f"SELECT status, count(*) FROM {RUNS} GROUP BY 1 ORDER BY 1"
    assert raw.execute(status).fetchall() == [("pending", 249), ("running", 1)]
    held = raw.execute(f"SELECT id, worker_id FROM {RUNS} WHERE status = 'running'").fetchall()
    assert held == [(kept[0].id, "here")]
    retried = f"SELECT count(DISTINCT run_id) FROM {NODE_RUNS} WHERE retry_count = 1 AND status = 'pending'"
    assert raw.execute(retried).fetchone() == (5,)


def test_transaction_that_withholds_events_is_reported(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str, admin: psycopg.Connection
) -> None:
    pipeline(database)
    reader, writer = connect(database_url), connect(database_url)
    with reader.transaction(), writer.transaction():
        reader.execute("SELECT FROM circle.pipelines")  # has no id: holds nothing back
        writer.execute("UPDATE circle.pipelines SET description = 'long'")
        time.sleep(0.3)
        assert found(database) == [], "young ones are as they should be"
        (finding,) = doctor(database.engine, held_for=0.2)
    assert (finding.code, finding.severity, finding.repair) == ("feed_held_back", "warning", ())
    assert finding.object == f"session {writer.info.backend_pid}"
    assert "SET description = 'long'" in finding.message
    # the oldest counts, in whichever database of the cluster it is
    with admin.transaction():
        admin.execute("SELECT pg_current_xact_id()")
        time.sleep(0.3)
        assert (("feed_held_back", f"session {admin.info.backend_pid}")) in found(database, held_for=0.2)
    assert found(database, held_for=0.2) == []


def test_ids_past_half_their_range_are_reported(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', 1073741823)")
    assert found(database) == []
    raw.execute("SELECT setval('circle.pipeline_runs_id_seq', 1073741824)")
    raw.execute("SELECT setval('circle.pipeline_node_runs_id_seq', 3000000000)")  # a bigint
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.object, finding.outcome) == ("ids", "circle.pipeline_runs.id", None)
    assert "1073741824 of 2147483647" in finding.message


def test_broken_and_uncompiled_graphs_are_reported_and_repaired(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SET session_replication_role = replica")
    insert = "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('p', %s, %s, %s) RETURNING id"
    fine = scalar(raw, insert, ("active", '[{"id": "a", "type": "trigger", "name": "A"}]', "[]"))
    raw.execute(insert, ("draft", '[{"id": "a", "type": "agent", "name": "A"}]', "[]"))
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    cycle = '[{"id": "e", "from": "a", "to": "a"}]'
    broken = [
        raw.execute(insert, values).fetchone()
        for values in [
            ("active", '[{"id": "a", "type": "agent", "name": "A"}]', "[]"),
            ("draft", '[{"id": "a", "type": "trigger", "name": "A"}]', cycle),
            ("draft", "{}", "[]"),
            ("draft", '[{"id": "a", "type": "trigger", "name": "A", "config": {"x": 1e5000}}]', "[]"),
            (
                "draft",
                '[{"id": "a", "type": "trigger", "name": "A", "config": {"x": ' + "[" * 5000 + "]" * 5000 + "}}]",
                "[]",
            ),
        ]
    ]
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept")
    assert found(database) == [
        *[("not_compiled", f"circle.pipelines id {fine + offset}") for offset in range(2)],
        *[("broken_graph", f"circle.pipelines id {row[0]}") for row in broken if row],
    ]
    findings = doctor(database.engine, repair=True)
    assert [finding.outcome for finding in findings] == ["repaired"] * 2 + [None] * 5
    assert "cycle" in findings[3].message
    assert max(len(finding.message) for finding in findings) < 400
    with database.session() as session:
        assert len(RunRepository(session).nodes(RunRepository(session).create(fine).id)) == 1


def test_null_graph_is_reported(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("SET session_replication_role = replica")
    raw.execute("ALTER TABLE circle.pipelines ALTER nodes DROP NOT NULL, DISABLE TRIGGER pipelines_accept")
    raw.execute("INSERT INTO circle.pipelines (name, nodes) VALUES ('p', NULL)")
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept")
    assert ("broken_graph", "circle.pipelines id 1") in found(database)


def test_versions_without_all_nodes_are_repaired(database: Database, raw: psycopg.Connection) -> None:
    short, long = pipeline(database), pipeline(database)
    content = "SELECT * FROM circle.pipeline_version_nodes ORDER BY pipeline_id, position"
    versions = "SELECT * FROM circle.pipeline_versions ORDER BY pipeline_id"
    clean = raw.execute(content).fetchall(), raw.execute(versions).fetchall()
    raw.execute("DELETE FROM circle.pipeline_version_nodes WHERE (pipeline_id, position) = (%s, 1)", (short,))
    raw.execute("INSERT INTO circle.pipeline_version_nodes VALUES (%s, 1, 9, 'z', 'agent', '{}', '{}')", (long,))
    expected = [("incomplete_version", f"circle.pipeline_versions {made}, 1") for made in (short, long)]
    assert found(database) == expected
    findings = doctor(database.engine, repair=True)
    assert [finding.message for finding in findings] == ["it has 2 of its 3 nodes", "it has 4 of its 3 nodes"]
    assert outcomes(findings) == {"repaired"}
    assert (raw.execute(content).fetchall(), raw.execute(versions).fetchall()) == clean
    with database.session() as session:
        RunRepository(session).create(short)


def test_events_of_another_cluster_are_repaired(database: Database, raw: psycopg.Connection) -> None:
    raw.execute(
        """CREATE TABLE IF NOT EXISTS circle.pipeline_events (
            id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
            run_id integer, node_id text, type text NOT NULL, data jsonb, created_at timestamptz DEFAULT now())"""
    )
    insert = "INSERT INTO circle.pipeline_events (run_id, type, xid) SELECT 1, 'pipeline_run.started', {} RETURNING id"
    written = [
        raw.execute(insert.format(xid)).fetchone()
        # of the restored ones some lie ahead of this cluster, some don't; the last is its own
        for xid in ("'800'::xid8", "'1000000000'::xid8", "'801'::xid8", "'1000000001'::xid8", "pg_current_xact_id()")
    ]
    order = "SELECT id FROM circle.pipeline_events e ORDER BY e.xid, id"
    own = "SELECT id, xid::text FROM circle.pipeline_events e ORDER BY e.id DESC LIMIT 1"
    newest = raw.execute(own).fetchone()
    assert raw.execute(order).fetchall() != written
    assert found(database) == [("foreign_events", "circle.pipeline_events")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert raw.execute(order).fetchall() == written, "as they happened"
    assert raw.execute(own).fetchone() == newest, "a reader may have seen it already"
