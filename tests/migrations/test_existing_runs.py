"""Runs that were there before revision 011, and what a downgrade keeps of those after it."""

from __future__ import annotations

import json
from datetime import timedelta

import psycopg

from gathering_pipeline import Database, RunRepository, RunStatus, migrations
from gathering_pipeline.maintenance.doctor import doctor
from tests.support.databases import Connect, scalar
from tests.support.runs import done, store

RUN = """
INSERT INTO circle.pipelines (name, status, nodes) VALUES ('p', 'active', '[{"id": "a", "type": "trigger", "name": "A"}]');
INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at) VALUES (1, 'running', now()), (1, 'completed', now());
INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, error_message, completed_at)
VALUES (1, 'a', 'trigger', 'failed', 'no luck', now())"""


def test_upgrade_notes_what_failed_and_counts_what_is_there(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw = connect(empty_database_url)
    raw.execute(RUN)
    migrations.upgrade(empty_database_url)
    with Database(empty_database_url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)
        counted = runs.counts()
        assert (counted[RunStatus.RUNNING], counted[RunStatus.COMPLETED]) == (1, 1)
        run = runs.finish(1)
        assert (run.status, run.failed_node, run.error_message) == ("failed", "a", "no luck")


def test_downgrade_keeps_the_counts(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    with Database(database_url) as database, database.session(autocommit=True) as session:
        runs, pipeline = RunRepository(session), store(session, "a")
        for _ in range(3):
            runs.record_run(pipeline, [done("a")])
        runs.recover()  # folds what is there
        runs.record_run(pipeline, [done("a", "failed")])
    migrations.downgrade(database_url, "010_graph")
    kept = raw.execute(
        "SELECT run_count, success_count, error_count, last_run IS NOT NULL FROM circle.pipelines"
    ).fetchall()
    assert kept == [(4, 3, 1, True)]
    migrations.upgrade(database_url)
    assert scalar(raw, "SELECT sum(completed) FROM circle.pipeline_counters") == 3


def test_upgrade_of_a_sequence_with_another_name(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw: psycopg.Connection = connect(empty_database_url)
    raw.execute("ALTER SEQUENCE circle.pipeline_runs_id_seq RENAME TO numbers")
    raw.execute(RUN)
    migrations.upgrade(empty_database_url)
    assert (
        scalar(raw, "SELECT seqtypid::regtype::text FROM pg_sequence WHERE seqrelid = 'circle.numbers'::regclass")
        == "bigint"
    )


def test_pipelines_from_before_get_their_branches(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw = connect(empty_database_url)
    nodes = [{"id": name, "type": "parallel", "name": name} for name in "cyns"]
    edges = [
        {"id": "y", "from": "c", "to": "y", "condition": True},  # as JSON of before the checks may have it
        {"id": "n", "from": "c", "to": "n", "condition": " FALSE"},
        {"id": "s", "from": "c", "to": "s", "condition": None},
    ]
    raw.execute(
        "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('p', 'active', %s, %s)",
        [json.dumps(nodes), json.dumps(edges)],
    )
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (1)")
    migrations.upgrade(empty_database_url)
    assert scalar(raw, "SELECT branches FROM circle.pipeline_version_nodes WHERE position = 0") == {
        "true": [1],
        "false": [2],
    }
    with Database(empty_database_url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)
        assert [node.node_id for node in runs.advance(1).started] == ["c"]
        results = [{"node_id": "c", "status": "completed", "branch": True}]
        assert [node.node_id for node in runs.advance(1, results).started] == ["y", "s"]
        assert doctor(database.engine)[0].code == "broken_graph"  # the condition is no text


def test_node_runs_from_before_take_every_edge(database_url: str, connect: Connect) -> None:
    raw = connect(database_url)
    with Database(database_url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)
        run_id = runs.create(store(session, "c>y=true c>n=false y>z")).id
        runs.advance(run_id)
        runs.complete_node(run_id, "c", branch=True)
    migrations.downgrade(database_url, "010_graph")
    migrations.upgrade(database_url)
    with Database(database_url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)
        assert scalar(raw, "SELECT count(untaken) FROM circle.pipeline_node_runs") == 0
        assert [node.node_id for node in runs.advance(run_id).started] == ["y"]  # n is skipped already
        assert [node.node_id for node in runs.advance(run_id, [done("y")]).started] == ["z"]


def test_pending_runs_from_before_are_bound_to_their_graph(empty_database_url: str, connect: Connect) -> None:
    migrations.upgrade(empty_database_url, "007_pipeline_execution")
    raw = connect(empty_database_url)
    raw.execute(
        """
        INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES
            ('good', 'active', '[{"id": "a", "type": "trigger", "name": "A"}]', '[]'),
            ('a cycle', 'active', '[{"id": "a", "type": "trigger", "name": "A"}]', '[{"id": "e", "from": "a", "to": "a"}]');
        INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (1, 'pending'), (1, 'running'), (2, 'pending')"""
    )
    migrations.upgrade(empty_database_url)
    bound = raw.execute("SELECT pipeline_version FROM circle.pipeline_runs ORDER BY id").fetchall()
    assert bound == [(1,), (None,), (None,)]
    with Database(empty_database_url) as database, database.session(autocommit=True) as session:
        runs = RunRepository(session)
        (claimed,) = runs.claim("w", timedelta(minutes=1), 5)
        assert [node.node_id for node in runs.nodes(claimed.id)] == ["a"]
        assert runs.finish(2).status == "completed"  # its writer keeps no nodes
        assert ("unversioned_runs", "circle.pipeline_runs") in [
            (finding.code, finding.object) for finding in doctor(database.engine)
        ]
        raw.execute("UPDATE circle.pipelines SET edges = '[]'")
        doctor(database.engine, repair=True)
        assert "unversioned_runs" not in [finding.code for finding in doctor(database.engine)]
        assert [run.id for run in runs.claim("w", timedelta(minutes=1), 5)] == [3]
