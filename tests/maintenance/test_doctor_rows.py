"""The doctor and rows that contradict one another."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import threading
import time
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy.engine import make_url

from gathering_pipeline.database import Database
from gathering_pipeline.errors import InvalidCursorError
from gathering_pipeline.maintenance.doctor import doctor
from gathering_pipeline.repositories.events import EventRepository
from gathering_pipeline.repositories.runs import RunRepository
from tests.support.databases import Connect, scalar, unguarded
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
    raw.execute("SELECT circle.fold_counters()")
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

    both = f"SELECT (circle.counted(p)).run_count, (SELECT count(*) FROM {RUNS}) FROM circle.pipelines p"
    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    repaired = 0
    for _ in range(10):
        age(raw)
        raw.execute("SELECT circle.fold_counters()")
        raw.execute("UPDATE circle.pipelines SET run_count = 0")
        repaired += sum(finding.outcome == "repaired" for finding in doctor(database.engine, repair=True))
    stop.set()
    for writer in writers:
        writer.join()
    assert repaired > 0
    counted = raw.execute(both).fetchone()
    assert counted is not None
    assert counted[0] <= counted[1], "a run that began during the recount is not counted twice"
    age(raw)
    doctor(database.engine, repair=True)
    counted = raw.execute(both).fetchone()
    assert counted is not None
    assert counted[0] == counted[1], "and none is lost"


def test_repair_counters_counts_without_row_lock(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=1)
    age(raw)
    raw.execute("SELECT circle.fold_counters()")
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
    assert found(database) == [
        ("status_counters", "circle.pipelines id 1"),  # which a publisher would replicate
        ("live_nodes", f"{RUNS} id 1"),
        ("live_nodes", f"{RUNS} id 2"),
    ]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    states = f"SELECT run_id, status, count(*), count(completed_at) FROM {NODE_RUNS} GROUP BY 1, 2 ORDER BY 1"
    assert raw.execute(states).fetchall() == [(1, "cancelled", 3, 3), (2, "cancelled", 3, 3), (3, "pending", 3, 0)]
    assert found(database) == []


def test_pending_run_with_running_node_is_repaired(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=2)
    with unguarded(raw, "pipeline_node_runs"):
        raw.execute(f"UPDATE {NODE_RUNS} SET status = 'running', started_at = now() WHERE (run_id, node_id) = (1, 'a')")
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.object) == ("live_nodes", f"{RUNS} id 1")
    assert finding.message == "it is pending, but 1 of its nodes are running"
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert raw.execute(f"SELECT DISTINCT status FROM {NODE_RUNS}").fetchall() == [("pending",)]
    with database.session() as session:
        (run, *_) = RunRepository(session).claim("w", timedelta(minutes=1))
        assert [node.node_id for node in RunRepository(session).ready_nodes(run.id)] == ["a"]


def test_untaken_of_no_successors_is_repaired(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=4)
    with database.session() as session:
        runs = RunRepository(session)
        for run_id in (1, 2, 3):
            runs.start(run_id)
            runs.complete_node(run_id, "a", branch=run_id != 1)
    assert found(database) == []
    with unguarded(raw, "pipeline_node_runs"):
        raw.execute(f"UPDATE {NODE_RUNS} SET untaken = '{{0,2,9,NULL}}' WHERE (run_id, node_id) = (2, 'a')")
        raw.execute(f"UPDATE {NODE_RUNS} SET untaken = '{{7}}' WHERE (run_id, node_id) IN ((3, 'a'), (4, 'a'))")
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.severity, finding.object) == ("wrong_untaken", "error", NODE_RUNS)
    assert finding.message == "untaken of 3 rows isn't of successors of a completed node: ids 4, 7, 10"
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    stored = raw.execute(f"SELECT run_id, untaken FROM {NODE_RUNS} WHERE node_id = 'a' ORDER BY run_id").fetchall()
    assert stored == [(1, [1, 2]), (2, [2]), (3, None), (4, None)]
    assert found(database) == []
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation):
        raw.execute(f"UPDATE {NODE_RUNS} SET untaken = '{{1}}'")


def test_live_run_with_missing_nodes_is_reported(database: Database, raw: psycopg.Connection) -> None:
    made = pipeline(database, runs=2)
    raw.execute(f"INSERT INTO {RUNS} (pipeline_id, status) VALUES (%s, 'running')", (made,))  # keeps no node runs
    with unguarded(raw, "pipeline_node_runs"):
        raw.execute(f"DELETE FROM {NODE_RUNS} WHERE (run_id, node_id) = (2, 'c')")
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.object, finding.outcome) == ("missing_nodes", f"{RUNS} id 2", None)
    assert finding.message == "it is pending, and has 2 of the 3 nodes of its version"
    with database.session() as session:
        RunRepository(session).cancel(2)
    assert found(database) == []


def test_expired_leases_are_repaired(database: Database, raw: psycopg.Connection) -> None:
    pipeline(database, runs=250)
    with database.session() as session:
        runs = RunRepository(session)
        claimed = runs.claim("gone", timedelta(milliseconds=1), limit=230)
        kept = runs.claim("here", timedelta(minutes=5), limit=1)
    raw.execute(f"UPDATE {RUNS} SET claim_count = 50 WHERE id = %s", (claimed[9].id,))
    for run in claimed[:5]:
        raw.execute("SELECT circle.advance_run(%s, '[]', %s, true, false)", (run.id, run.token))
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
    raw.execute("SELECT setval('circle.pipelines_id_seq', 1073741823)")
    assert found(database) == []
    raw.execute("SELECT setval('circle.pipelines_id_seq', 1073741824)")
    raw.execute("SELECT setval('circle.pipeline_node_runs_id_seq', 3000000000)")  # a BIGINT
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.object, finding.outcome) == ("ids", "circle.pipelines.id", None)
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


def test_status_counters_while_writers_work_are_exact(database: Database, raw: psycopg.Connection) -> None:
    target, other = pipeline(database, runs=50), pipeline(database, runs=1)
    stop = threading.Event()

    def write() -> None:
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            while not stop.is_set():
                run = runs.create(target)
                runs.start(run.id)
                runs.cancel(run.id)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        for turn in range(5):
            raw.execute(
                """INSERT INTO circle.pipeline_counters (pipeline_id, pending, failed)
                VALUES (%s, 7, -3), (%s, -1, 0)""",  # what a session with disabled triggers leaves
                (target, other),
            )
            raw.execute("SELECT circle.add_up_counters()")
            findings = doctor(database.engine, repair=True)
            assert {finding.object for finding in findings if finding.code == "status_counters"} == {
                f"circle.pipelines id {made}" for made in (target, other)
            }, turn
            assert outcomes(findings) == {"repaired"}
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert found(database) == []
    with database.session() as session:
        counts = {status.value: number for status, number in RunRepository(session).counts().items()}
    rows = raw.execute(f"SELECT status, count(*) FROM {RUNS} GROUP BY 1").fetchall()
    assert counts == dict.fromkeys(counts, 0) | dict(rows)


def test_status_counters_names_the_differences(database: Database, raw: psycopg.Connection) -> None:
    made = pipeline(database, runs=2)
    with unguarded(raw, "pipeline_runs"):
        raw.execute(f"DELETE FROM {RUNS}")
    raw.execute("INSERT INTO circle.pipeline_counters (pipeline_id, timeout) VALUES (%s, -1)", (made,))
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.object) == ("status_counters", f"circle.pipelines id {made}")
    assert finding.message == "the numbers of its runs by status are wrong: pending by -2, timeout by 1"
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []


def test_counters_that_are_not_added_up_yet_are_no_finding(database: Database, raw: psycopg.Connection) -> None:
    made = pipeline(database, runs=3)
    age(raw)
    columns = "SELECT run_count FROM circle.pipelines WHERE id = %s"
    assert (scalar(raw, columns, (made,)), found(database)) == (0, [])
    raw.execute("SELECT circle.fold_counters()")
    assert (scalar(raw, columns, (made,)), found(database)) == (3, [])


COMPILED = "SELECT pipeline_id, version, node_count, compiled::text FROM circle.pipeline_versions ORDER BY 1, 2"


def test_versions_with_other_nodes_than_compiled_are_repaired(database: Database, raw: psycopg.Connection) -> None:
    made = [pipeline(database) for _ in range(4)]
    clean = raw.execute(COMPILED).fetchall()
    with unguarded(raw, "pipeline_versions"):
        for change, number in zip(
            (
                "compiled = compiled[:2], node_count = 2",  # fewer
                "compiled = compiled || compiled[1], node_count = 4",  # more
                "compiled[2] = ROW('b', 'parallel', '{}', '{}', NULL)::circle.compiled_node",  # an edge less
                "node_count = 9",
            ),
            made,
            strict=True,
        ):
            raw.execute(f"UPDATE circle.pipeline_versions SET {change} WHERE pipeline_id = %s", (number,))
    assert found(database) == [("miscompiled_version", f"circle.pipeline_versions {number}, 1") for number in made]
    findings = doctor(database.engine, repair=True)
    assert outcomes(findings) == {"repaired"}
    assert found(database) == []
    assert raw.execute(COMPILED).fetchall() == clean
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="immutable"):
        raw.execute("UPDATE circle.pipeline_versions SET node_count = 1")
    with database.session() as session:
        assert len(RunRepository(session).nodes(RunRepository(session).create(made[0]).id)) == 3


def test_repair_of_versions_needs_no_superuser(database: Database, raw: psycopg.Connection, database_url: str) -> None:
    pipeline(database, runs=1)
    with unguarded(raw, "pipeline_versions"):
        raw.execute("UPDATE circle.pipeline_versions SET compiled = compiled[:1]")
    with unguarded(raw, "pipelines"):
        raw.execute("UPDATE circle.pipelines SET nodes = nodes || %s", ('[{"id":"d","type":"delay","name":"D"}]',))
    role = f"gathering_test_owner_{time.monotonic_ns()}"
    raw.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x' IN ROLE {raw.info.user}".encode())  # an owner, no superuser
    try:
        with Database(make_url(database_url).set(username=role, password="x")) as owned:
            findings = doctor(owned.engine, repair=True)
            assert [finding.code for finding in findings] == ["not_compiled", "miscompiled_version"]
            assert outcomes(findings) == {"repaired"}
            assert found(owned) == []
    finally:
        raw.execute(f"DROP ROLE {role}".encode())


def test_version_with_invalid_graph_is_reported(database: Database, raw: psycopg.Connection) -> None:
    first, second = pipeline(database), pipeline(database)
    for number in (first, second):  # a new version, so that this one is an old one
        raw.execute("UPDATE circle.pipelines SET edges = '[]' WHERE id = %s", (number,))
    with unguarded(raw, "pipeline_versions"):
        raw.execute("""UPDATE circle.pipeline_versions SET edges = '[{"id": "e", "from": "a", "to": "a"}]'
                       WHERE (pipeline_id, version) = (%s, 1)""", (first,))  # fmt: skip
        raw.execute("UPDATE circle.pipeline_versions SET node_count = 7 WHERE pipeline_id = %s", (second,))
    findings = doctor(database.engine)
    assert [(finding.severity, finding.object) for finding in findings] == [
        ("warning", f"circle.pipeline_versions {first}, 1"),
        ("error", f"circle.pipeline_versions {second}, 1"),
        ("error", f"circle.pipeline_versions {second}, 2"),
    ]
    assert findings[0].message == "its graph is invalid: Pipeline contains a cycle: a -> a"
    assert [finding.outcome for finding in doctor(database.engine, repair=True)] == ["repaired"] * 2 + [None]


def test_graph_without_its_version_gets_one(database: Database, raw: psycopg.Connection) -> None:
    """The graph of a pipeline was changed while the triggers were disabled."""
    made, _ = pipeline(database, runs=1), pipeline(database)
    with unguarded(raw, "pipelines"):
        raw.execute("UPDATE circle.pipelines SET edges = '[]' WHERE id = %s", (made,))
    assert found(database) == [("not_compiled", f"circle.pipelines id {made}")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    versions = "SELECT version, edges = '[]' FROM circle.pipeline_versions WHERE pipeline_id = %s ORDER BY 1"
    assert raw.execute(versions, (made,)).fetchall() == [(1, False), (2, True)]
    with database.session() as session:
        assert RunRepository(session).create(made).pipeline_version == 2
    assert found(database) == []


def test_clock_behind_the_tokens_is_reported(database: Database, raw: psycopg.Connection) -> None:
    """As where a copy is restored to a server whose clock is wrong: tokens only grow, to at most the clock."""
    pipeline(database, runs=3)
    assert found(database) == []
    with unguarded(raw, "pipeline_runs"):
        raw.execute(
            "UPDATE circle.pipeline_runs SET claim_token = (extract(epoch FROM now()) + 90 * n) * 1000000"
            " FROM (SELECT id AS i, row_number() OVER (ORDER BY id) - 1 AS n FROM circle.pipeline_runs) r WHERE id = i"
        )
    (finding,) = doctor(database.engine, repair=True)
    _, second, _ = (row[0] for row in raw.execute("SELECT id FROM circle.pipeline_runs ORDER BY id"))
    assert (finding.code, finding.object, finding.outcome) == (
        "clock_behind",
        f"circle.pipeline_runs id {second}",
        None,
    )
    assert finding.message.startswith("2 runs have fencing tokens up to 00:0"), finding.message


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
    with database.session() as session:
        cursors = [event.cursor for event in EventRepository(session).read().items]
    assert len(cursors) == 3
    assert raw.execute(order).fetchall() != written
    assert found(database) == [("foreign_events", "circle.pipeline_events")]
    assert outcomes(doctor(database.engine, repair=True)) == {"repaired"}
    assert found(database) == []
    assert raw.execute(order).fetchall() == written, "as they happened"
    with database.session() as session:
        assert len(EventRepository(session).read().items) == 5
        for cursor in cursors:  # events stand before it now that its reader has not seen
            with pytest.raises(InvalidCursorError):
                EventRepository(session).read(cursor)
