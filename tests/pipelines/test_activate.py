"""``activate`` and ``pause``."""

import json
import threading
from datetime import UTC, datetime

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    InvalidPipelineError,
    Pipeline,
    PipelineInactiveError,
    PipelineRead,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunRepository,
)
from tests.support.databases import unguarded
from tests.support.graphs import TRIGGER, UNFINISHED
from tests.support.pipelines import new


def test_activate_and_pause_change_status(each: Session) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new())
    with pytest.raises(PipelineInactiveError) as refused:
        runs.create(made.id)
    assert (refused.value.pipeline_id, refused.value.status) == (made.id, "draft")
    assert pipelines.activate(made.id).status == pipelines.activate(made.id).status == PipelineStatus.ACTIVE
    run = runs.create(made.id)
    paused = pipelines.pause(made.id)
    assert (paused.status, paused.version, paused.run_count) == ("paused", 1, 1)
    with pytest.raises(PipelineInactiveError, match="paused"):
        runs.create(made.id)
    assert runs.start(run.id).status == "running"  # those under way go on
    assert pipelines.pause(made.id).status == "paused"


def test_status_changed_at_is_the_time_of_the_last_change(each: Session, raw: psycopg.Connection) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    assert made.status_changed_at is not None
    active = pipelines.activate(made.id)
    paused = pipelines.pause(made.id)
    assert active.status_changed_at is not None
    assert paused.status_changed_at is not None
    assert made.status_changed_at < active.status_changed_at < paused.status_changed_at
    renamed = pipelines.update(made.id, PipelineUpdate(name="q", status=PipelineStatus.PAUSED))
    assert renamed.status_changed_at == paused.status_changed_at
    raw.execute("UPDATE circle.pipelines SET status_changed_at = '2020-01-01 00:00:00+00'")  # the database decides
    assert pipelines.get(made.id) == renamed


def test_status_changed_at_of_an_older_row_is_none_until_it_changes(each: Session, raw: psycopg.Connection) -> None:
    with unguarded(raw, "pipelines"):
        raw.execute("INSERT INTO circle.pipelines (name) VALUES ('old')")
    pipelines = PipelineRepository(each)
    (old,) = pipelines.search().items
    assert old.status_changed_at is None
    assert pipelines.update(old.id, PipelineUpdate(name="q")).status_changed_at is None
    assert pipelines.pause(old.id).status_changed_at is not None


def test_status_changed_at_of_an_object_is_the_databases(database: Database) -> None:
    nodes = [TRIGGER]
    with database.session() as session:
        given = datetime(2020, 1, 1, tzinfo=UTC)
        pipeline = Pipeline(name="p", nodes=nodes, status_changed_at=given)
        session.add(pipeline)
        session.flush()
        first = pipeline.status_changed_at
        assert first is not None
        assert first > given
        pipeline.status_changed_at = given
        pipeline.name = "q"
        session.flush()
        assert pipeline.status_changed_at == first
        pipeline.status = "paused"
        session.flush()
        assert PipelineRead.model_validate(pipeline, from_attributes=True).status_changed_at != first


def test_activate_broken_graph_writes_nothing(each: Session, raw: psycopg.Connection) -> None:
    """One that was active before there were checks: the database checks what becomes active."""
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    insert = "INSERT INTO circle.pipelines (name, status, nodes) VALUES ('old', 'active', %s) RETURNING id"
    ((pipeline_id,),) = raw.execute(insert, [json.dumps([TRIGGER, UNFINISHED])]).fetchall()
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept")
    before = PipelineRepository(each).get(pipeline_id)
    with pytest.raises(InvalidPipelineError, match="agent_id"):
        PipelineRepository(each).activate(pipeline_id)
    assert PipelineRepository(each).get(pipeline_id) == before


def test_activate_incomplete_draft_keeps_the_draft(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        made = PipelineRepository(session).create(new(nodes=[], edges=[]), allow_incomplete=True)
        with pytest.raises(InvalidPipelineError):
            PipelineRepository(session).activate(made.id)
    assert raw.execute("SELECT status FROM circle.pipelines").fetchall() == [("draft",)]


@pytest.mark.parametrize("broken", [False, True])
def test_activate_while_graph_is_edited_checks_the_new_graph(
    database: Database, raw: psycopg.Connection, broken: bool
) -> None:
    """The editor holds the row: ``activate`` has read the old graph, and waits for the row to write."""
    with database.session() as session:
        made = PipelineRepository(session).create(new())
    answers: list[object] = []

    def activate() -> None:
        with database.session(autocommit=True) as session:
            try:
                answers.append(PipelineRepository(session).activate(made.id).version)
            except InvalidPipelineError as error:
                answers.append(str(error))

    thread = threading.Thread(target=activate)
    nodes = [TRIGGER, UNFINISHED] if broken else [TRIGGER]
    with raw.transaction():
        raw.execute("UPDATE circle.pipelines SET nodes = %s, edges = '[]'", [json.dumps(nodes)])
        thread.start()
        waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        while not raw.execute(waiting).fetchone():
            raw.execute("SELECT pg_stat_clear_snapshot()")
    thread.join(30)
    assert len(answers) == 1
    assert ("agent_id" in str(answers[0])) if broken else (answers == [2])
    expected = "draft" if broken else "active"
    assert raw.execute("SELECT status, version FROM circle.pipelines").fetchall() == [(expected, 2)]
