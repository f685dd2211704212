"""Versions of a graph, and runs that keep theirs."""

import threading
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    PipelineNotFoundError,
    PipelineRepository,
    PipelineUpdate,
    RunRepository,
    RunStatus,
    StaleVersionError,
)
from tests.support.databases import Connect
from tests.support.graphs import DELAY, EDGES, NODES, TRIGGER
from tests.support.pipelines import new


def test_update_graph_adds_version_only_when_it_differs(each: Session, raw: psycopg.Connection) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    assert pipelines.update(made.id, PipelineUpdate(nodes=NODES, edges=EDGES, name="q")).version == 1
    assert pipelines.update(made.id, PipelineUpdate(nodes=[*NODES, DELAY])).version == 2
    assert pipelines.update(made.id, PipelineUpdate(edges=[])).version == 3
    rows = raw.execute(
        "SELECT version, nodes, edges, node_count FROM circle.pipeline_versions ORDER BY version"
    ).fetchall()
    assert rows == [(1, NODES, EDGES, 2), (2, [*NODES, DELAY], EDGES, 3), (3, [*NODES, DELAY], [], 3)]


def test_update_stored_version_by_sql_is_refused(each: Session, raw: psycopg.Connection) -> None:
    PipelineRepository(each).create(new())
    for role in ("origin", "replica"):
        raw.execute(f"SET session_replication_role = {role}")
        for change in ("version = 9", "compiled = '{}'", "nodes = '[]'", "node_count = node_count"):
            with pytest.raises(psycopg.errors.IntegrityConstraintViolation):
                raw.execute(f"UPDATE circle.pipeline_versions SET {change}")
    raw.execute("RESET session_replication_role")
    # nor is the number set by hand
    raw.execute("UPDATE circle.pipelines SET version = 9")
    assert raw.execute("SELECT version FROM circle.pipelines").fetchone() == (1,)


def test_delete_version_at_older_snapshot_than_its_run_is_refused(
    database: Database, raw: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(new(status="active")).id
    older = connect(database_url)
    with database.session() as creating:
        run_id = RunRepository(creating).create(pipeline).id
        with database.session() as session:
            PipelineRepository(session).update(pipeline, PipelineUpdate(edges=[]))
        older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        older.execute("SELECT count(*) FROM circle.pipeline_runs")
    with pytest.raises(psycopg.Error) as refused:
        older.execute("DELETE FROM circle.pipeline_versions WHERE version = 1")
    assert refused.value.sqlstate == "PL011"
    with database.session() as session:
        assert len(RunRepository(session).definition(run_id).edges) == len(EDGES)


def test_update_concurrently_with_one_revision_succeeds_once(database: Database) -> None:
    with database.session() as session:
        made = PipelineRepository(session).create(new())
    barrier, answers = threading.Barrier(4), []

    def edit(index: int) -> None:
        with database.session() as session:
            barrier.wait()
            changes = PipelineUpdate(nodes=[{**TRIGGER, "name": f"editor {index}"}], edges=[])
            try:
                PipelineRepository(session).update(made.id, changes, expected_revision=1)
            except StaleVersionError as error:
                answers.append(error.current)
                session.rollback()
            else:
                answers.append(0)

    threads = [threading.Thread(target=edit, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == [0, 2, 2, 2]


def test_update_graph_leaves_running_runs_on_their_version(each: Session) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new(status="active"))
    old = runs.create(made.id)
    pipelines.update(made.id, PipelineUpdate(nodes=[DELAY, TRIGGER], edges=[{"id": "x", "from": "t", "to": "d"}]))
    fresh = runs.create(made.id)
    assert (old.pipeline_version, fresh.pipeline_version) == (1, 2)
    assert [node.node_id for node in runs.nodes(old.id)] == ["t", "a"]
    assert [node.node_id for node in runs.nodes(fresh.id)] == ["t", "d"]
    assert [node.id for node in runs.definition(old.id).nodes] == ["t", "a"]
    definition = runs.definition(fresh.id)
    assert [node.id for node in definition.nodes] == ["d", "t"]
    assert [(edge.from_node, edge.to_node) for edge in definition.edges] == [("t", "d")]
    steps = []
    started = runs.advance(old.id).started
    while started:
        steps.append([node.node_id for node in started])
        started = runs.advance(old.id, [{"node_id": node.node_id, "status": "completed"} for node in started]).started
    assert steps == [["t"], ["a"]]
    assert runs.get(old.id).status == RunStatus.COMPLETED
    assert pipelines.get(made.id).success_count == 1


def test_versions_are_read_in_pages_and_purged_when_unused(each: Session, raw: psycopg.Connection) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new(status="active"))
    run = runs.create(made.id)
    for count in (0, 1, 0):
        pipelines.update(made.id, PipelineUpdate(edges=EDGES[:count]))
    each.commit()
    first = pipelines.versions(made.id, limit=3)
    assert [version.version for version in first.items] == [4, 3, 2]
    (last,) = pipelines.versions(made.id, first.next_cursor).items
    assert (last.version, last.node_count) == (1, len(NODES))
    assert pipelines.definition(made.id, 2).edges == []
    assert pipelines.definition(made.id, 1) == runs.definition(run.id)
    assert pipelines.purge_versions(timedelta(hours=1)) == 0
    assert pipelines.purge_versions(timedelta(0), limit=1) == 1
    assert pipelines.purge_versions(timedelta(0)) == 1
    each.commit()
    assert [version.version for version in pipelines.versions(made.id).items] == [4, 1]
    for read in (
        lambda: pipelines.versions(-1),
        lambda: pipelines.definition(made.id, 2),
        lambda: pipelines.definition(-1, 1),
    ):
        with pytest.raises(PipelineNotFoundError):
            read()


def test_purge_of_versions_spares_one_of_which_a_run_is_being_created(
    database: Database, raw: psycopg.Connection
) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(new(status="active")).id
    with database.session() as creating:
        run_id = RunRepository(creating).create(pipeline).id  # of version 1
        with database.session() as session:
            PipelineRepository(session).update(pipeline, PipelineUpdate(edges=[]))
        deleted: list[int] = []

        def purge() -> None:
            with database.session() as session:
                deleted.append(PipelineRepository(session).purge_versions(timedelta(0)))

        thread = threading.Thread(target=purge)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()  # it waits for the creator
    thread.join()
    assert deleted == [0]
    with database.session() as session:
        assert RunRepository(session).definition(run_id).edges != []
