"""``PipelineRepository``, versions of a graph, and the graph that the database compiles against Python's order."""

# pyright: reportArgumentType=false, reportCallIssue=false
# psycopg wants literal SQL; this file puts some of its own together.

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    IntegrityViolationError,
    InvalidCursorError,
    InvalidDataError,
    InvalidPipelineError,
    Pipeline,
    PipelineCreate,
    PipelineDefinition,
    PipelineError,
    PipelineInactiveError,
    PipelineInUseError,
    PipelineNode,
    PipelineNotFoundError,
    PipelineRead,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunNotFoundError,
    RunRepository,
    RunStatus,
    StaleVersionError,
    get_execution_order,
    is_transient,
)
from tests.servers import Server
from tests.servers import connect as open_connection

Connect = Callable[[str], psycopg.Connection]

EMPTY = """DELETE FROM circle.pipelines; DELETE FROM circle.pipeline_version_nodes;
    SELECT setval('circle.pipelines_id_seq', 1, false), setval('circle.pipeline_runs_id_seq', 1, false)"""

TRIGGER = {"id": "t", "type": "trigger", "name": "T"}
AGENT = {"id": "a", "type": "agent", "name": "A", "config": {"agent_id": 7, "task": "review"}}
UNFINISHED = {"id": "a", "type": "agent", "name": "A", "config": {}}
DELAY = {"id": "d", "type": "delay", "name": "D"}
EDGE = {"id": "e", "from": "t", "to": "a"}
NODES, EDGES = [TRIGGER, AGENT], [EDGE]
CYCLE = [EDGE, {"id": "f", "from": "a", "to": "t"}]


@pytest.fixture(scope="module")
def module_url(server: Server, template: str) -> Iterator[str]:
    name = server.create(template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture
def database_url(module_url: str) -> Iterator[str]:
    """One database for all of these many tests, emptied after each."""
    yield module_url
    with open_connection(module_url) as connection:
        connection.execute(EMPTY)


@pytest.fixture
def pipelines(session: Session) -> PipelineRepository:
    return PipelineRepository(session)


@pytest.fixture
def each(database: Database) -> Iterator[Session]:
    """A session in which every call is a transaction of its own."""
    with database.session(autocommit=True) as session:
        yield session


def new(name: str = "p", **more: Any) -> PipelineCreate:
    return PipelineCreate(**{"name": name, "nodes": NODES, "edges": EDGES, **more})


def count(raw: psycopg.Connection, table: str = "pipelines") -> int:
    row = raw.execute(f"SELECT count(*) FROM circle.{table}").fetchone()
    assert row is not None
    return int(row[0])


# --- create and get --------------------------------------------------------------------------------------------------


def test_create_returns_what_is_stored(each: Session) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(description="d", timeout_seconds=None, retry_backoff_max=2.5, status="active"))
    assert made == pipelines.get(made.id)
    assert made.model_dump(exclude={"id", "created_at", "updated_at"}) == {
        "name": "p",
        "description": "d",
        "status": PipelineStatus.ACTIVE,
        "nodes": NODES,
        "edges": EDGES,
        "version": 1,
        "timeout_seconds": None,
        "max_retries_per_node": 3,
        "retry_backoff_base": 1.0,
        "retry_backoff_max": 2.5,
        "run_count": 0,
        "success_count": 0,
        "error_count": 0,
        "last_run": None,
    }
    assert made.created_at is not None
    assert made.created_at > before
    assert isinstance(made.definition, PipelineDefinition)
    with pytest.raises(ValidationError):
        made.name = "frozen"  # type: ignore[misc]


def test_create_takes_pydantic_objects(pipelines: PipelineRepository) -> None:
    definition = PipelineDefinition.from_json(NODES, EDGES)
    made = pipelines.create(PipelineCreate(name="p", nodes=definition.nodes, edges=definition.edges))
    assert (made.nodes, made.edges) == (NODES, EDGES)
    assert made.definition == definition


def test_create_refuses_a_bad_graph_with_every_issue(each: Session, raw: psycopg.Connection) -> None:
    bad = new(nodes=[TRIGGER, UNFINISHED, DELAY, DELAY], edges=[*CYCLE, {"id": "g", "from": "t", "to": "ghost"}])
    with pytest.raises(InvalidPipelineError) as refused:
        PipelineRepository(each).create(bad)
    assert {(issue.code, issue.node_id, issue.edge_id) for issue in refused.value.issues} == {
        ("missing_config", "a", None),
        ("duplicate_node", "d", None),
        ("unknown_target", None, "g"),
        ("cycle", "t", None),
    }
    assert "Pipeline contains a cycle: t -> a -> t" in str(refused.value)
    assert isinstance(refused.value, ValueError)
    assert count(raw) == 0


def test_create_never_commits(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(ZeroDivisionError), database.session() as session:
        PipelineRepository(session).create(new())
        raise ZeroDivisionError
    assert count(raw) == 0


def test_create_of_a_draft(each: Session) -> None:
    pipelines = PipelineRepository(each)
    for nodes, edges in (([], []), ([TRIGGER, UNFINISHED], EDGES)):
        with pytest.raises(InvalidPipelineError):
            pipelines.create(new(nodes=nodes, edges=edges))
        with pytest.raises(InvalidPipelineError):
            pipelines.create(new(nodes=nodes, edges=edges, status="active"), allow_incomplete=True)
        made = pipelines.create(new(nodes=nodes, edges=edges), allow_incomplete=True)
        assert (made.status, made.nodes, made.edges) == ("draft", nodes, edges)
        with pytest.raises(InvalidPipelineError):
            pipelines.activate(made.id)
        with pytest.raises(PipelineInactiveError):
            RunRepository(each).create(made.id)
    with pytest.raises(InvalidPipelineError, match="cycle"):
        pipelines.create(new(nodes=[TRIGGER, UNFINISHED], edges=CYCLE), allow_incomplete=True)


def test_get_of_what_is_not_there(pipelines: PipelineRepository) -> None:
    for missing in (1, 0, -1, 2**31, 2**62):
        with pytest.raises(PipelineNotFoundError, match=f"pipeline {missing} does not exist") as refused:
            pipelines.get(missing)
        assert isinstance(refused.value, LookupError)


# --- search ----------------------------------------------------------------------------------------------------------


def pages(search: Callable[..., Any], **filters: Any) -> list[list[str]]:
    found, after = [], None
    while True:
        page = search(after=after, **filters)
        found.append([item.name for item in page.items])
        after = page.next_cursor
        if after is None:
            return found


def test_search_goes_through_every_page_newest_first(pipelines: PipelineRepository) -> None:
    for index in range(7):
        pipelines.create(new(f"p{index}", status=("active", "draft", "paused")[index % 3]))
    assert pages(pipelines.search, limit=3) == [["p6", "p5", "p4"], ["p3", "p2", "p1"], ["p0"]]
    assert pages(pipelines.search, limit=7) == [["p6", "p5", "p4", "p3", "p2", "p1", "p0"]]
    assert pages(pipelines.search, limit=2, status=PipelineStatus.ACTIVE) == [["p6", "p3"], ["p0"]]
    assert pages(pipelines.search, name="P5") == [["p5"]]
    assert pages(pipelines.search, name="p", status=PipelineStatus.PAUSED) == [["p5", "p2"]]
    assert pages(pipelines.search, name="absent") == [[]]


def test_pages_stay_as_they_are_while_pipelines_come_and_go(pipelines: PipelineRepository) -> None:
    ids = [pipelines.create(new(f"p{index}")).id for index in range(6)]
    first = pipelines.search(limit=3)
    pipelines.create(new("newer"))
    pipelines.delete(ids[3])  # the cursor's own row
    pipelines.delete(ids[1])
    assert [item.name for item in pipelines.search(after=first.next_cursor, limit=3).items] == ["p2", "p0"]


def test_search_takes_names_literally(pipelines: PipelineRepository) -> None:
    for name in ("100%", "100", "a_b", "ab", "C:\\x", "it's", "Ä", "%(name)s"):
        pipelines.create(new(name))
    for name, expected in (
        ("0%", ["100%"]),
        ("_", ["a_b"]),
        ("\\", ["C:\\x"]),
        ("'", ["it's"]),
        ("%(name)s", ["%(name)s"]),
        ("%s", []),
        ("AB", ["ab"]),
    ):
        assert pages(pipelines.search, name=name) == [expected]


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3", None, 2**31])
def test_search_refuses_a_limit_that_is_none(pipelines: PipelineRepository, limit: Any) -> None:
    with pytest.raises(InvalidDataError, match="limit"):
        pipelines.search(limit=limit)


def test_search_refuses_other_arguments_that_are_none(pipelines: PipelineRepository) -> None:
    with pytest.raises(PipelineError):
        pipelines.search(status="archived")  # type: ignore[arg-type]
    with pytest.raises(InvalidDataError, match="name"):
        pipelines.search(name="a\0b")
    with pytest.raises((InvalidCursorError, InvalidDataError)):
        pipelines.search(after="x")  # type: ignore[arg-type]
    assert pipelines.search(name="", after=2**40).items == ()


def test_one_bad_row_does_not_break_a_page(pipelines: PipelineRepository, raw: psycopg.Connection) -> None:
    pipelines.create(new("good"))
    pipelines._session.commit()
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER ALL")
    raw.execute("""INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('bad', '{"a": 1}', '"x"')""")
    raw.execute("ALTER TABLE circle.pipelines ENABLE TRIGGER ALL")
    page = pipelines.search()
    assert [item.name for item in page.items] == ["bad", "good"]
    assert page.items[0].nodes == {"a": 1}
    with pytest.raises(InvalidPipelineError):
        _ = page.items[0].definition


# --- update ----------------------------------------------------------------------------------------------------------


def test_update_writes_the_given_fields_only(each: Session, raw: psycopg.Connection) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(description="d", timeout_seconds=60))
    changed = pipelines.update(made.id, PipelineUpdate(name="q", timeout_seconds=None))
    assert changed.updated_at is not None
    assert made.updated_at is not None
    assert changed.updated_at > made.updated_at
    assert changed == pipelines.get(made.id)
    kept = {"name", "timeout_seconds", "updated_at"}
    assert changed.model_dump(exclude=kept) == made.model_dump(exclude=kept)
    assert (changed.name, changed.timeout_seconds, changed.version) == ("q", None, 1)
    # beside another writer's field
    raw.execute("UPDATE circle.pipelines SET run_count = 5")
    assert pipelines.update(made.id, PipelineUpdate(description=None)).run_count == 5
    assert pipelines.update(made.id, PipelineUpdate()).name == "q"


def test_a_new_graph_is_a_new_version_and_the_same_graph_is_none(each: Session, raw: psycopg.Connection) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    assert pipelines.update(made.id, PipelineUpdate(nodes=NODES, edges=EDGES, name="q")).version == 1
    assert pipelines.update(made.id, PipelineUpdate(nodes=[*NODES, DELAY])).version == 2
    assert pipelines.update(made.id, PipelineUpdate(edges=[])).version == 3
    rows = raw.execute(
        "SELECT version, nodes, edges, node_count FROM circle.pipeline_versions ORDER BY version"
    ).fetchall()
    assert rows == [(1, NODES, EDGES, 2), (2, [*NODES, DELAY], EDGES, 3), (3, [*NODES, DELAY], [], 3)]


def test_versions_are_never_changed(each: Session, raw: psycopg.Connection) -> None:
    PipelineRepository(each).create(new())
    for table in ("pipeline_versions", "pipeline_version_nodes"):
        for role in ("origin", "replica"):
            raw.execute(f"SET session_replication_role = {role}")
            with pytest.raises(psycopg.errors.IntegrityConstraintViolation):
                raw.execute(f"UPDATE circle.{table} SET version = 9")
    raw.execute("RESET session_replication_role")
    # nor is the number set by hand
    raw.execute("UPDATE circle.pipelines SET version = 9")
    assert raw.execute("SELECT version FROM circle.pipelines").fetchone() == (1,)


def test_expected_version_guards_the_graph(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    changed = pipelines.update(made.id, PipelineUpdate(nodes=[TRIGGER], edges=[]), expected_version=1)
    assert changed.version == 2
    for changes in (
        PipelineUpdate(nodes=NODES, edges=EDGES),
        PipelineUpdate(name="q"),
        PipelineUpdate(status="active"),
    ):
        with pytest.raises(StaleVersionError) as refused:
            pipelines.update(made.id, changes, expected_version=1)
        assert (refused.value.pipeline_id, refused.value.expected, refused.value.current) == (made.id, 1, 2)
    assert pipelines.get(made.id) == changed
    # the name is no part of the graph
    pipelines.update(made.id, PipelineUpdate(name="q"))
    assert pipelines.update(made.id, PipelineUpdate(name="r"), expected_version=2).name == "r"


def test_of_two_editors_with_one_version_one_wins(database: Database) -> None:
    with database.session() as session:
        made = PipelineRepository(session).create(new())
    barrier, answers = threading.Barrier(4), []

    def edit(index: int) -> None:
        with database.session() as session:
            barrier.wait()
            changes = PipelineUpdate(nodes=[{**TRIGGER, "name": f"editor {index}"}], edges=[])
            try:
                PipelineRepository(session).update(made.id, changes, expected_version=1)
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


def test_update_refuses_a_bad_graph_whichever_half_is_given(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    for changes, sentence in (
        (PipelineUpdate(edges=CYCLE), "cycle"),
        (PipelineUpdate(nodes=[TRIGGER]), "references unknown target node"),
        (PipelineUpdate(nodes=[TRIGGER, TRIGGER], edges=[]), "Duplicate node id"),
        (PipelineUpdate(nodes=[]), "at least one node"),
        (PipelineUpdate(nodes=[TRIGGER, UNFINISHED]), "missing its task"),
        (PipelineUpdate(nodes=[], edges=[]), "at least one node"),
    ):
        with pytest.raises(InvalidPipelineError, match=sentence):
            pipelines.update(made.id, changes)
    assert pipelines.get(made.id) == made


def test_update_of_a_draft(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(nodes=[], edges=[]), allow_incomplete=True)
    with pytest.raises(InvalidPipelineError):
        pipelines.update(made.id, PipelineUpdate(nodes=[UNFINISHED]))
    changed = pipelines.update(made.id, PipelineUpdate(nodes=[UNFINISHED]), allow_incomplete=True)
    assert changed.version == 2
    with pytest.raises(InvalidPipelineError):
        pipelines.update(made.id, PipelineUpdate(status="active"), allow_incomplete=True)
    with pytest.raises(InvalidPipelineError):
        pipelines.update(made.id, PipelineUpdate(nodes=[UNFINISHED], edges=[], status="active"), allow_incomplete=True)
    assert pipelines.update(made.id, PipelineUpdate(nodes=[AGENT], status="active")).status == "active"


def test_an_active_pipeline_does_not_become_incomplete(each: Session) -> None:
    """3.2: making an incomplete pipeline active is refused; so is making an active one incomplete."""
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(status="active"))
    for changes in (PipelineUpdate(nodes=[], edges=[]), PipelineUpdate(nodes=[TRIGGER, UNFINISHED])):
        with pytest.raises(InvalidPipelineError):
            pipelines.update(made.id, changes, allow_incomplete=True)
    assert pipelines.get(made.id) == made
    both = PipelineUpdate(nodes=[], edges=[], status="paused")
    assert pipelines.update(made.id, both, allow_incomplete=True).status == "paused"


def test_update_of_what_is_not_there(pipelines: PipelineRepository) -> None:
    for call in (
        lambda: pipelines.update(1, PipelineUpdate(name="x")),
        lambda: pipelines.update(1, PipelineUpdate(name="x"), expected_version=3),
        lambda: pipelines.update(1, PipelineUpdate(status=PipelineStatus.ACTIVE)),
        lambda: pipelines.update(1, PipelineUpdate()),
        lambda: pipelines.activate(1),
        lambda: pipelines.pause(1),
        lambda: pipelines.delete(1),
        lambda: pipelines.delete(1, force=True),
    ):
        with pytest.raises(PipelineNotFoundError):
            call()
        pipelines._session.rollback()


def test_numbers_that_no_column_holds_are_not_there(each: Session) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    for missing in (2**31, 2**63, -(2**63) - 1, 10**30):
        for call in (pipelines.get, pipelines.activate, pipelines.pause, pipelines.delete):
            with pytest.raises(PipelineNotFoundError, match=f"pipeline {missing} does not exist"):
                call(missing)
        with pytest.raises(PipelineNotFoundError):
            pipelines.update(missing, PipelineUpdate(name="q"), expected_version=missing)
        with pytest.raises(StaleVersionError, match=f"is at version 1, not {missing}:"):
            pipelines.update(made.id, PipelineUpdate(name="q"), expected_version=missing)
    assert pipelines.get(made.id) == made


@pytest.mark.parametrize("bad", ["1", True, 1.0, [1], 10**5000], ids=lambda bad: type(bad).__name__)
def test_an_id_that_is_no_number(each: Session, bad: Any) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new())
    for call in (pipelines.get, pipelines.activate, pipelines.pause, pipelines.delete):
        with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
            call(bad)
    with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
        pipelines.update(bad, PipelineUpdate(name="q"))
    with pytest.raises(InvalidDataError, match="^expected_version must be a whole number"):
        pipelines.update(made.id, PipelineUpdate(name="q"), bad)
    assert pipelines.get(made.id) == made


# --- activate and pause ----------------------------------------------------------------------------------------------


def test_activate_and_pause(each: Session) -> None:
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


def test_a_refused_activation_writes_nothing(each: Session, raw: psycopg.Connection) -> None:
    """One that was active before there were checks: the database checks what becomes active."""
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER pipelines_accept")
    insert = "INSERT INTO circle.pipelines (name, status, nodes) VALUES ('old', 'active', %s) RETURNING id"
    ((pipeline_id,),) = raw.execute(insert, [json.dumps([TRIGGER, UNFINISHED])]).fetchall()
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept")
    before = PipelineRepository(each).get(pipeline_id)
    with pytest.raises(InvalidPipelineError, match="agent_id"):
        PipelineRepository(each).activate(pipeline_id)
    assert PipelineRepository(each).get(pipeline_id) == before


def test_a_draft_whose_activation_is_refused_is_kept(database: Database, raw: psycopg.Connection) -> None:
    with database.session() as session:
        made = PipelineRepository(session).create(new(nodes=[], edges=[]), allow_incomplete=True)
        with pytest.raises(InvalidPipelineError):
            PipelineRepository(session).activate(made.id)
    assert raw.execute("SELECT status FROM circle.pipelines").fetchall() == [("draft",)]


@pytest.mark.parametrize("broken", [False, True])
def test_an_edit_between_is_checked_too(database: Database, raw: psycopg.Connection, broken: bool) -> None:
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


# --- delete ----------------------------------------------------------------------------------------------------------


def test_delete_takes_everything_along(each: Session, raw: psycopg.Connection) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new(status="active"))
    other = pipelines.create(new("other", status="active"))
    for pipeline in (made, other):
        run = runs.create(pipeline.id)
        runs.cancel(run.id)
    pipelines.update(made.id, PipelineUpdate(nodes=[TRIGGER], edges=[]))
    pipelines.delete(made.id)
    for table, left in (
        *(("pipelines", 1), ("pipeline_runs", 1), ("pipeline_node_runs", 2)),
        *(("pipeline_versions", 1), ("pipeline_version_nodes", 2)),
    ):
        assert count(raw, table) == left, table
    with pytest.raises(PipelineNotFoundError):
        pipelines.get(made.id)


def test_delete_of_a_pipeline_in_use_needs_force(each: Session) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new(status="active"))
    live = [runs.create(made.id).id, runs.start(runs.create(made.id).id).id]
    runs.cancel(runs.create(made.id).id)
    with pytest.raises(PipelineInUseError) as refused:
        pipelines.delete(made.id)
    assert (refused.value.pipeline_id, refused.value.live_runs) == (made.id, 2)
    assert [runs.get(run).status for run in live] == ["pending", "running"]
    pipelines.delete(made.id, force=True)
    for run in live:
        with pytest.raises(RunNotFoundError):
            runs.complete_node(run, "t")


def test_delete_beside_those_who_create_runs(database: Database, raw: psycopg.Connection) -> None:
    """Whoever creates runs all the time keeps nobody from deleting, and learns that the pipeline is gone."""
    errors: list[BaseException] = []
    for _ in range(6):
        with database.session() as session:
            pipeline = PipelineRepository(session).create(new(status="active")).id
        created: list[int] = []

        def create(pipeline: int = pipeline, created: list[int] = created) -> None:
            with database.session(autocommit=True) as session:
                runs = RunRepository(session)
                try:
                    while True:
                        created.append(runs.create(pipeline).id)
                        runs.start(created[-1])
                except (PipelineNotFoundError, RunNotFoundError):
                    pass
                except BaseException as error:  # noqa: BLE001 - whatever it is
                    errors.append(error)

        threads = [threading.Thread(target=create) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(created) < 6 and not errors:
            time.sleep(0.001)
        with database.session(autocommit=True) as session:
            with pytest.raises(PipelineInUseError):
                PipelineRepository(session).delete(pipeline)
            PipelineRepository(session).delete(pipeline, force=True)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert count(raw, "pipeline_runs") == count(raw, "pipeline_node_runs") == count(raw, "pipeline_version_nodes") == 0


@pytest.mark.parametrize("force", [False, True])
def test_those_who_delete_at_once(database: Database, force: bool) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(new()).id
    barrier, answers = threading.Barrier(3), []

    def delete() -> None:
        with database.session(autocommit=True) as session:
            barrier.wait()
            try:
                PipelineRepository(session).delete(pipeline, force=force)
            except PipelineNotFoundError:
                answers.append("not found")
            except Exception as error:  # noqa: BLE001 - whatever it is
                answers.append(f"{error!r} {is_transient(error)}")
            else:
                answers.append("deleted")

    threads = [threading.Thread(target=delete) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == ["deleted", "not found", "not found"]


# --- fields ----------------------------------------------------------------------------------------------------------


def test_a_schema_that_was_made_without_validation_is_checked_all_the_same(
    each: Session, raw: psycopg.Connection
) -> None:
    made = PipelineRepository(each).create(new())
    for field in (
        {"name": ""},
        {"timeout_seconds": -1},
        {"nodes": None},
        {"retry_backoff_base": float("nan")},
    ):
        whole = {**new().model_dump(), "nodes": NODES, "edges": EDGES, **field}
        with pytest.raises((InvalidPipelineError, IntegrityViolationError)):
            PipelineRepository(each).create(PipelineCreate.model_construct(**whole))
        with pytest.raises((InvalidPipelineError, IntegrityViolationError)):
            PipelineRepository(each).update(made.id, PipelineUpdate.model_construct(**field))
    assert count(raw) == 1


# --- every file of real input ----------------------------------------------------------------------------------------


def shared(folder: str) -> list[Path]:
    """Files beside the checkout; there are none elsewhere."""
    root = Path(__file__).parents[2]
    found = (root.parent / "shared" / "data" / folder, root / "shared" / "data" / folder)
    return sorted(path for place in found for path in place.glob("*.json"))


EXPECTED = {
    "agent_made_fan_out": "accepted",
    "api_nulls_daily_report": "accepted",
    "editor_code_review": "accepted",
    "draft_empty": "draft",
    "draft_unfinished": "draft",
    "bad_cycle": "refused",
    "bad_dangling_and_duplicate": "refused",
    "bad_long_id": "refused",
    # only configuration is missing, but it says that it is active
    "bad_config": "refused",
}
SENTENCES = {
    "draft_empty": ["Pipeline must have at least one node"],
    "draft_unfinished": ["agent_id", "task"],
    "bad_cycle": ["Pipeline contains a cycle: a -> b -> c -> a"],
    "bad_dangling_and_duplicate": ["Duplicate node id 'a'", "Edge 'e1' references unknown target node: 'ghost'"],
    "bad_long_id": ["longer than 100 characters"],
    "bad_config": ["agent_id", "task"],
}
needs_data = pytest.mark.skipif(not shared("pipelines"), reason="the shared data is not beside this checkout")


@needs_data
@pytest.mark.parametrize("path", shared("pipelines"), ids=lambda path: path.stem)
def test_real_pipelines_get_the_answer_expected(path: Path, each: Session, raw: psycopg.Connection) -> None:
    source = json.loads(path.read_text(encoding="utf-8"))
    pipelines = PipelineRepository(each)
    data = PipelineCreate(**source)
    expected = EXPECTED[path.stem]
    if expected == "accepted":
        made = pipelines.create(data)
    else:
        for sentence in SENTENCES[path.stem]:
            with pytest.raises(InvalidPipelineError, match=sentence):
                pipelines.create(data)
        if expected == "refused":
            with pytest.raises(InvalidPipelineError):
                pipelines.create(data, allow_incomplete=True)
            each.add(Pipeline(**source, allow_incomplete=True))
            with pytest.raises(InvalidPipelineError):
                each.flush()
            each.rollback()
            assert count(raw) == 0
            return
        made = pipelines.create(data, allow_incomplete=True)
    stored = pipelines.get(made.id)
    assert {key: getattr(stored, key) for key in source} == source  # not one byte of the JSON is rewritten
    if expected == "accepted":
        pipelines.activate(made.id)
        run = RunRepository(each).create(made.id)
        nodes = [node.node_id for node in RunRepository(each).nodes(run.id)]
        assert nodes == get_execution_order(stored.definition)


# --- runs keep their version -----------------------------------------------------------------------------------------


def test_runs_under_way_keep_the_graph_that_they_began_with(each: Session) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new(status="active"))
    old = runs.create(made.id)
    pipelines.update(made.id, PipelineUpdate(nodes=[DELAY, TRIGGER], edges=[{"id": "x", "from": "t", "to": "d"}]))
    fresh = runs.create(made.id)
    assert (old.pipeline_version, fresh.pipeline_version) == (1, 2)
    assert [node.node_id for node in runs.nodes(old.id)] == ["t", "a"]
    assert [node.node_id for node in runs.nodes(fresh.id)] == ["t", "d"]
    assert [node.id for node in runs.definition(old.id).nodes] == ["t", "a"]
    assert [node.id for node in runs.definition(fresh.id).nodes] == ["d", "t"]
    steps = []
    started = runs.advance(old.id)
    while started:
        steps.append([node.node_id for node in started])
        started = runs.advance(old.id, [{"node_id": node.node_id, "status": "completed"} for node in started])
    assert steps == [["t"], ["a"]]
    assert runs.get(old.id).status == RunStatus.COMPLETED
    assert pipelines.get(made.id).success_count == 1


# --- what the database compiles --------------------------------------------------------------------------------------


def graph(nodes: list[str], edges: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return (
        [{"id": node, "type": "delay", "name": node} for node in nodes],
        [{"id": f"e{index}", "from": source, "to": target} for index, (source, target) in enumerate(edges)],
    )


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes in any order; edges in any order, some of them twice."""
    size = draw(st.integers(1, 25))
    ids = [f"n{number}" for number in range(size)]
    pair = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(lambda ends: ends[0] < ends[1])
    edges = draw(st.lists(pair, max_size=60)) if size > 1 else []
    edges += draw(st.lists(st.sampled_from(edges), max_size=5)) if edges else []
    order = list(ids) if draw(st.booleans()) else draw(st.permutations(ids))
    return order, [(ids[source], ids[target]) for source, target in draw(st.permutations(edges))]


def compiled(raw: psycopg.Connection, nodes: list[Any], edges: list[Any]) -> list[tuple[Any, ...]]:
    """What a raw insert compiles."""
    statement = "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('p', %s, %s) RETURNING id"
    row = raw.execute(statement, [json.dumps(nodes), json.dumps(edges)]).fetchone()
    query = """SELECT position, node_id, node_type, predecessors, successors FROM circle.pipeline_version_nodes
        WHERE pipeline_id = %s AND version = 1 ORDER BY position"""
    return raw.execute(query, row).fetchall()


def by_python(nodes: list[Any], edges: list[Any]) -> list[tuple[Any, ...]]:
    definition = PipelineDefinition.from_json(nodes, edges)
    order = get_execution_order(definition)
    place = {node: position for position, node in enumerate(order)}
    ends = {(place[edge.from_node], place[edge.to_node]) for edge in definition.edges}
    return [
        (
            at,
            node,
            definition.node_map[node].type,
            sorted(source for source, target in ends if target == at),
            sorted(target for source, target in ends if source == at),
        )
        for at, node in enumerate(order)
    ]


@pytest.fixture(scope="module")
def scratch(module_url: str) -> Iterator[psycopg.Connection]:
    """A connection for many examples; each one is rolled back."""
    with open_connection(module_url) as connection:
        yield connection


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dag=dags())
def test_the_database_compiles_what_python_orders(scratch: psycopg.Connection, dag: Any) -> None:
    nodes, edges = graph(*dag)
    with scratch.transaction(force_rollback=True):
        assert compiled(scratch, nodes, edges) == by_python(nodes, edges)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dag=dags(), data=st.data())
def test_neither_sorts_what_has_a_cycle(scratch: psycopg.Connection, dag: Any, data: st.DataObject) -> None:
    nodes, edges = dag
    ring = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=6, unique=True))
    edges = data.draw(st.permutations([*edges, *zip(ring, [*ring[1:], ring[0]], strict=True)]))
    made = graph(nodes, edges)
    with pytest.raises(InvalidPipelineError, match="cycle"):
        get_execution_order(PipelineDefinition.from_json(*made))
    with pytest.raises(psycopg.Error, match="Pipeline contains a cycle: ") as refused, scratch.transaction():
        compiled(scratch, *made)
    assert refused.value.sqlstate == "PL008"
    # what it shows is a cycle of this graph, in the direction of its edges
    shown = (refused.value.diag.message_primary or "").partition(": ")[2].split(" -> ")
    assert shown[0] == shown[-1]
    assert set(pairwise(shown)) <= set(edges)
    assert count(scratch) == 0


def test_ids_of_any_script_are_told_apart_and_keep_their_order(raw: psycopg.Connection) -> None:
    ids = [
        "é",
        "e\u0301",
        "E",
        "e",
        "ß",
        "ss",
        "\u212b",
        "Å",
        "日本",
        "🦉",
        "a b",
        "a\tb",
        "'",
        '"',
        "\\",
        "%",
        "{",
        "x" * 100,
    ]
    edges = list(pairwise(ids))
    random.Random(7).shuffle(edges)
    for nodes in (ids, ids[::-1]):
        assert compiled(raw, *graph(nodes, edges)) == by_python(*graph(nodes, edges))


def test_large_graphs(raw: psycopg.Connection) -> None:
    rng = random.Random(11)
    ids = [f"node-{number}" for number in range(2_000)]
    edges = [(ids[at], ids[at + 1]) for at in range(1_000)]
    edges += [(ids[a], ids[b]) for a, b in (sorted(rng.sample(range(2_000), 2)) for _ in range(4_000))]
    shuffled = rng.sample(ids, len(ids))
    for nodes in (ids, shuffled):
        start = time.monotonic()
        assert compiled(raw, *graph(nodes, edges)) == by_python(*graph(nodes, edges))
        assert time.monotonic() - start < 10
    with pytest.raises(psycopg.Error, match=r"cycle: .* -> \.\.\. \(\d+ nodes\) -> ") as refused:
        compiled(raw, *graph(ids, [(ids[at], ids[(at + 1) % 2_000]) for at in range(2_000)]))
    assert refused.value.sqlstate == "PL008"
    assert len(str(refused.value)) < 3_000


@pytest.mark.skipif(not shared("workflows"), reason="the shared data is not beside this checkout")
@pytest.mark.parametrize("path", shared("workflows"), ids=lambda path: path.stem)
def test_real_workflows_compile_to_the_same_order(path: Path, each: Session, raw: psycopg.Connection) -> None:
    source = json.loads(path.read_text(encoding="utf-8"))
    nodes, edges = source["nodes"], source["edges"]
    assert compiled(raw, nodes, edges) == by_python(nodes, edges)
    rng = random.Random(3)
    rng.shuffle(nodes)
    rng.shuffle(edges)
    assert compiled(raw, nodes, edges) == by_python(nodes, edges)
    made = PipelineRepository(each).create(
        PipelineCreate(name=source["name"], nodes=nodes, edges=edges, status="active")
    )
    run = RunRepository(each).create(made.id)
    order = get_execution_order(made.definition)
    assert [node.node_id for node in RunRepository(each).nodes(run.id)] == order


def test_what_the_database_refuses_is_raised_as_ours(each: Session) -> None:
    """A half of a graph, of which the hook can't see the other: the compiler's answer, with its place."""
    made = PipelineRepository(each).create(new())
    with pytest.raises(InvalidPipelineError) as refused:
        PipelineRepository(each).update(made.id, PipelineUpdate(nodes=[TRIGGER]))
    (issue,) = refused.value.issues
    assert (issue.code, issue.edge_id, issue.message) == (
        "unknown_target",
        "e",
        "Edge 'e' references unknown target node: 'a'",
    )


def test_read_models_can_be_written_as_json(pipelines: PipelineRepository) -> None:
    made = pipelines.create(new())
    assert PipelineRead.model_validate_json(made.model_dump_json()) == made
    assert isinstance(made.definition.nodes[0], PipelineNode)
