"""Every call of ``RunRepository``, each of its errors, and that what is refused changes nothing."""

# Statements are put together from names that stand here, which pyright can't know.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    NodeExecutionResult,
    NodeRunRead,
    NodeStatus,
    PipelineCreate,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunRead,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    IllegalTransitionError,
    InvalidDataError,
    InvalidPipelineError,
    LeaseLostError,
    NodeNotReadyError,
    NodeRunNotFoundError,
    PipelineError,
    PipelineInactiveError,
    PipelineInUseError,
    PipelineNotFoundError,
    RunNotFoundError,
)
from gathering_pipeline.lifecycle import retry_delay
from gathering_pipeline.settings import DatabaseSettings
from tests.servers import Server, connect

LEASE = timedelta(minutes=5)
DIAMOND = "a>b a>c b>d c>d"
WORKFLOWS = Path(__file__).parents[3] / "shared" / "data" / "workflows"

Graph = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def graph(spec: str) -> Graph:
    """The JSON of a graph, from ``"a>b b>c d"``: edges, and nodes that have none; nodes in the order of their names' first use."""
    edges = [edge.split(">") for edge in spec.split() if ">" in edge]
    names = dict.fromkeys(name for item in spec.split() for name in item.split(">"))
    return (
        [{"id": name, "type": "action", "name": name.upper(), "config": {"action": "do"}} for name in names],
        [{"id": f"e{at}", "from": source, "to": target} for at, (source, target) in enumerate(edges)],
    )


def chain(length: int) -> str:
    return " ".join(["n0", *(f"n{at}>n{at + 1}" for at in range(length - 1))])


def store(session: Session, spec: str = DIAMOND, **fields: Any) -> int:
    """An active pipeline's id."""
    nodes, edges = graph(spec)
    fields = {"name": "a pipeline", "status": PipelineStatus.ACTIVE, "nodes": nodes, "edges": edges} | fields
    return PipelineRepository(session).create(PipelineCreate(**fields)).id


def contents(raw: psycopg.Connection) -> list[tuple[Any, ...]]:
    """All rows of all tables."""
    tables = (
        *("pipelines", "pipeline_runs", "pipeline_node_runs", "pipeline_versions", "pipeline_version_nodes"),
        "pipeline_events",
    )
    return [
        row for table in tables for row in raw.execute(f"SELECT t::text FROM circle.{table} t ORDER BY 1").fetchall()
    ]


@contextmanager
def unguarded(raw: psycopg.Connection, table: str) -> Iterator[None]:
    """Without the triggers of a table: what is written now was written by an older release."""
    triggers = raw.execute(
        "SELECT tgname, tgenabled::text FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal",
        [f"circle.{table}"],
    ).fetchall()
    raw.execute(f"ALTER TABLE circle.{table} DISABLE TRIGGER USER")
    yield
    for name, enabled in triggers:
        raw.execute(f"ALTER TABLE circle.{table} ENABLE {'ALWAYS' if enabled == 'A' else ''} TRIGGER {name}")


@pytest.fixture(scope="module")
def shared_database(server: Server, template: str) -> Iterator[str]:
    name = server.create(template)
    yield server.database_url(name)
    server.drop(name)


@pytest.fixture
def database_url(shared_database: str) -> str:
    """Emptied for each test, which is quicker than a new one."""
    with connect(shared_database) as raw:
        raw.execute("DELETE FROM circle.pipelines")
    return shared_database


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """Every call is its own transaction, as an executor has it."""
    with database.session(autocommit=True) as opened:
        yield opened


@pytest.fixture
def runs(session: Session) -> RunRepository:
    return RunRepository(session)


@pytest.fixture
def refuses(raw: psycopg.Connection) -> Callable[..., Any]:
    """``with refuses(Error) as caught``: the error is of exactly this class, and every table is as it was."""

    @contextmanager
    def check(kind: type[PipelineError]) -> Iterator[pytest.ExceptionInfo[Any]]:
        before = contents(raw)
        with pytest.raises(PipelineError) as caught:
            yield caught
        assert caught.type is kind
        assert contents(raw) == before

    return check


def counters(raw: psycopg.Connection, pipeline_id: int) -> tuple[int, int, int]:
    """run_count, success_count, error_count."""
    row = raw.execute(
        "SELECT run_count, success_count, error_count FROM circle.pipelines WHERE id = %s", [pipeline_id]
    ).fetchone()
    assert row is not None
    return row


def clock(raw: psycopg.Connection) -> datetime:
    row = raw.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


def statuses(runs: RunRepository, run_id: int) -> dict[str, str]:
    return {node.node_id: node.status.value for node in runs.nodes(run_id)}


def started(runs: RunRepository, session: Session, spec: str = DIAMOND, **fields: Any) -> int:
    """A running run's id."""
    return runs.start(runs.create(store(session, spec, **fields)).id).id


def claimed(runs: RunRepository, session: Session, spec: str = DIAMOND, **fields: Any) -> RunRead:
    runs.create(store(session, spec, **fields))
    (run,) = runs.claim("worker", LEASE)
    return run


def lose_lease(raw: psycopg.Connection, run_id: int) -> None:
    """As if the lease had run out a second ago."""
    raw.execute(
        "UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE id = %s", [run_id]
    )


def done(node_id: str, status: str = "completed", **fields: Any) -> NodeExecutionResult:
    return NodeExecutionResult.model_validate({"node_id": node_id, "status": status} | fields)


# --- create ------------------------------------------------------------------------------------------------------------


def test_a_new_run_is_pending_with_all_the_nodes_of_its_version(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "x a>b a>c b>d c>d")
    since = clock(raw)
    data = {"n": 1, "text": "ü€😀", "list": [1.5, None, {"x": False}]}
    run = runs.create(pipeline, data)
    assert (run.status, run.pipeline_id, run.pipeline_version, run.trigger_data) == ("pending", pipeline, 1, data)
    assert (run.logs, run.claim_token, run.lease_expires_at, run.started_at, run.completed_at) == (
        [],
        0,
        None,
        None,
        None,
    )
    assert run == runs.get(run.id)
    nodes = runs.nodes(run.id)
    assert [(n.node_id, n.position, n.predecessors, n.successors) for n in nodes] == [
        ("x", 0, [], []),
        ("a", 1, [], [2, 3]),
        ("b", 2, [1], [4]),
        ("c", 3, [1], [4]),
        ("d", 4, [2, 3], []),
    ]
    assert {(n.status, n.node_type, n.retry_count, n.run_id) for n in nodes} == {("pending", "action", 0, run.id)}
    stored = PipelineRepository(session).get(pipeline)
    assert (stored.run_count, stored.success_count, stored.error_count) == (1, 0, 0)
    assert stored.last_run is not None
    assert since <= stored.last_run <= clock(raw)
    assert runs.create(pipeline).trigger_data == {}


def test_a_run_of_a_pipeline_that_is_not_there(runs: RunRepository, refuses: Callable[..., Any]) -> None:
    for missing in (1, 0, -1, 2**31, 2**40, 2**63 - 1):
        with refuses(PipelineNotFoundError) as caught:
            runs.create(missing)
        assert caught.value.pipeline_id == missing


@pytest.mark.parametrize("status", [PipelineStatus.PAUSED, PipelineStatus.DRAFT])
def test_a_run_of_a_pipeline_that_is_not_active(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], status: PipelineStatus
) -> None:
    pipeline = store(session, status=status)
    with refuses(PipelineInactiveError) as caught:
        runs.create(pipeline)
    assert (caught.value.pipeline_id, caught.value.status) == (pipeline, status)


@pytest.mark.parametrize(
    ("nodes", "edges", "code"),
    [
        (graph("a b")[0], graph("a>b b>a")[1], "cycle"),
        (graph("a")[0], graph("a>b")[1], "unknown_target"),
        (graph("a")[0] * 2, [], "duplicate_node"),
        (*graph("a>b"), "no_version"),  # sound, but never compiled
        ([{"id": "a", "type": "robot", "name": "A"}], [], "invalid_node"),
        ({}, [], "invalid_shape"),
    ],
)
def test_a_run_of_a_broken_graph(
    runs: RunRepository,
    raw: psycopg.Connection,
    refuses: Callable[..., Any],
    nodes: object,
    edges: object,
    code: str,
) -> None:
    with unguarded(raw, "pipelines"):
        row = raw.execute(
            "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('old', 'active', %s, %s) RETURNING id",
            [json.dumps(nodes), json.dumps(edges)],
        ).fetchone()
    assert row is not None
    with refuses(InvalidPipelineError) as caught:
        runs.create(row[0])
    assert [(issue.severity, issue.code) for issue in caught.value.issues] == [("error", code)]


def test_a_run_of_an_empty_graph(runs: RunRepository, raw: psycopg.Connection, refuses: Callable[..., Any]) -> None:
    row = raw.execute("INSERT INTO circle.pipelines (name, status) VALUES ('empty', 'draft') RETURNING id").fetchone()
    with unguarded(raw, "pipelines"):
        raw.execute("UPDATE circle.pipelines SET status = 'active'")
    assert row is not None
    with refuses(InvalidPipelineError) as caught:
        runs.create(row[0])
    assert [issue.code for issue in caught.value.issues] == ["no_nodes"]


def test_the_same_key_again_returns_the_first_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline, other = store(session), store(session)
    first = runs.create(pipeline, {"n": 1}, idempotency_key="k")
    assert runs.create(pipeline, {"n": 2}, idempotency_key="k") == first
    runs.start(first.id)
    assert runs.create(pipeline, idempotency_key="k").status == RunStatus.RUNNING
    PipelineRepository(session).pause(pipeline)
    assert runs.create(pipeline, idempotency_key="k").id == first.id
    with pytest.raises(PipelineInactiveError):
        runs.create(pipeline, idempotency_key="another")
    assert runs.create(other, idempotency_key="k").id != first.id
    assert counters(raw, pipeline) == (1, 0, 0)
    assert len(runs.nodes(first.id)) == 4
    longest = "k" * 255
    assert runs.create(other, idempotency_key=longest).idempotency_key == longest


def test_a_run_keeps_the_graph_that_it_began_with(runs: RunRepository, session: Session) -> None:
    pipeline = store(session, "a>b")
    old = runs.create(pipeline)
    nodes, edges = graph("a>b b>c")
    edited = PipelineRepository(session).update(pipeline, PipelineUpdate(nodes=nodes, edges=edges))
    new = runs.create(pipeline)
    assert (edited.version, old.pipeline_version, new.pipeline_version) == (2, 1, 2)
    assert list(statuses(runs, old.id)) == ["a", "b"]
    assert list(statuses(runs, new.id)) == ["a", "b", "c"]
    assert list(runs.definition(old.id).node_map) == ["a", "b"]
    definition = runs.definition(new.id)
    assert [(edge.from_node, edge.to_node) for edge in definition.edges] == [("a", "b"), ("b", "c")]
    with pytest.raises(RunNotFoundError):
        runs.definition(10**6)


# --- run transitions ---------------------------------------------------------------------------------------------------


def test_a_run_step_by_step(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    run = runs.create(pipeline)
    since = clock(raw)
    run = runs.start(run.id)
    assert run.status == RunStatus.RUNNING
    assert run.started_at is not None
    assert since <= run.started_at <= clock(raw)
    node = runs.start_node(run.id, "a", {"in": [1]})
    assert (node.status, node.input_data, node.output_data, node.node_id) == ("running", {"in": [1]}, {}, "a")
    assert node.started_at is not None
    assert runs.get(run.id).current_node == "a"
    node = runs.complete_node(run.id, "a", {"out": 2})
    assert (node.status, node.input_data, node.output_data) == ("completed", {"in": [1]}, {"out": 2})
    assert node.completed_at is not None
    assert node.started_at is not None
    assert node.duration_ms == pytest.approx((node.completed_at - node.started_at) / timedelta(milliseconds=1), abs=1)
    runs.start_node(run.id, "b")
    assert runs.get(run.id).current_node == "b"
    runs.complete_node(run.id, "b")
    run = runs.complete(run.id)
    assert (run.status, run.error_message) == ("completed", None)
    assert run.completed_at is not None
    assert run.started_at is not None
    assert run.completed_at >= run.started_at
    assert run == runs.get(run.id)
    assert counters(raw, pipeline) == (1, 1, 0)


@pytest.mark.parametrize(
    ("how", "ended", "counted"),
    [
        (lambda runs, run_id: runs.complete(run_id), RunStatus.COMPLETED, (1, 1, 0)),
        (lambda runs, run_id: runs.finish(run_id), RunStatus.COMPLETED, (1, 1, 0)),
        (lambda runs, run_id: runs.fail(run_id, "broken"), RunStatus.FAILED, (1, 0, 1)),
        (lambda runs, run_id: runs.cancel(run_id, "enough"), RunStatus.CANCELLED, (1, 0, 0)),
    ],
)
def test_the_ends_of_a_run_and_what_they_count(
    runs: RunRepository,
    session: Session,
    raw: psycopg.Connection,
    refuses: Callable[..., Any],
    how: Callable[[RunRepository, int], RunRead],
    ended: RunStatus,
    counted: tuple[int, int, int],
) -> None:
    pipeline = store(session, "a")
    run_id = runs.start(runs.create(pipeline).id).id
    runs.record(run_id, [done("a")])
    run = how(runs, run_id)
    assert (run.status, counters(raw, pipeline)) == (ended, counted)
    # it is over: nothing moves it any more, and nothing is counted again
    for call, requested in (
        (lambda: runs.start(run_id), "running"),
        (lambda: runs.complete(run_id), "completed"),
        (lambda: runs.finish(run_id), "completed"),
        (lambda: runs.fail(run_id, "late"), "failed"),
        (lambda: runs.cancel(run_id), "cancelled"),
        (lambda: runs.advance(run_id), "running"),
        (lambda: runs.record(run_id, []), "running"),
    ):
        with refuses(IllegalTransitionError) as caught:
            call()
        error = caught.value
        assert (error.entity, error.id, error.current, error.requested) == ("run", run_id, ended, requested)
    moves: dict[str, Callable[[], object]] = {
        "running": lambda: runs.start_node(run_id, "a"),
        "completed": lambda: runs.complete_node(run_id, "a"),
        "skipped": lambda: runs.skip_node(run_id, "a"),
        "failed": lambda: runs.fail_node(run_id, "a", "late"),
    }
    for requested, move in moves.items():
        with refuses(IllegalTransitionError) as caught:
            move()
        error = caught.value
        assert (error.entity, error.id) == ("node run", f"{run_id}/a")
        assert (error.current, error.requested) == ("completed", requested)


def test_fail_and_cancel_take_live_nodes_along(runs: RunRepository, session: Session) -> None:
    for end, status in ((runs.fail, "failed"), (runs.cancel, "cancelled")):
        for begun in (True, False):
            run_id = runs.create(store(session)).id
            if begun:
                runs.advance(run_id)
                runs.advance(run_id, [done("a")])
            run = end(run_id, "because")
            assert (run.status, run.error_message) == (status, "because")
            assert statuses(runs, run_id) == {
                "a": "completed" if begun else "cancelled",
                "b": "cancelled",
                "c": "cancelled",
                "d": "cancelled",
            }
            assert all(node.completed_at is not None for node in runs.nodes(run_id))
    assert runs.cancel(runs.create(store(session)).id).error_message is None


def test_start_needs_a_pending_run(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    run_id = started(runs, session)
    with refuses(IllegalTransitionError) as caught:
        runs.start(run_id)
    assert (caught.value.current, caught.value.requested) == ("running", "running")


def test_complete_needs_every_node_over_and_none_failed(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    pending = runs.create(store(session, "a")).id
    with refuses(IllegalTransitionError) as caught:
        runs.complete(pending)
    assert (caught.value.current, caught.value.requested) == ("pending", "completed")
    run_id = started(runs, session, "a b c d")
    steps: list[Callable[[], object]] = [
        lambda: runs.record(run_id, [done("a"), done("b", "skipped"), done("c", "cancelled")]),
        lambda: runs.start_node(run_id, "d"),
        lambda: runs.fail_node(run_id, "d", "broken", retryable=False),
    ]
    for step in steps:
        with refuses(IllegalTransitionError) as caught:
            runs.complete(run_id)
        assert (caught.value.entity, caught.value.id) == ("run", run_id)
        assert (caught.value.current, caught.value.requested) == ("running", "completed")
        step()
    with refuses(IllegalTransitionError):
        runs.complete(run_id)
    assert runs.finish(run_id).status == RunStatus.FAILED


def test_finish_waits_for_what_is_running_ready_or_retried(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a>b")
    run_id = runs.create(pipeline).id
    with refuses(IllegalTransitionError) as caught:  # pending
        runs.finish(run_id)
    assert caught.value.current == "pending"
    runs.start(run_id)
    for step in (
        lambda: runs.start_node(run_id, "a"),  # a was ready
        lambda: runs.fail_node(run_id, "a", "once"),  # a was running
        lambda: runs.record(run_id, [done("a")]),  # a was to be retried
        lambda: runs.skip_node(run_id, "b"),  # b was ready
    ):
        with refuses(IllegalTransitionError) as caught:
            runs.finish(run_id)
        assert (caught.value.current, caught.value.requested) == ("running", "completed")
        step()
    assert runs.finish(run_id).status == RunStatus.COMPLETED
    assert counters(raw, pipeline) == (1, 1, 0)


def test_what_waits_for_a_cancelled_node_is_cancelled_with_the_end(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a>b b>c x")
    runs.record(run_id, [done("a", "cancelled"), done("x")])
    assert runs.finish(run_id).status == RunStatus.COMPLETED
    assert statuses(runs, run_id) == {"a": "cancelled", "b": "cancelled", "c": "cancelled", "x": "completed"}


def test_logs_are_appended_also_when_the_run_is_over(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = started(runs, session, "a")
    entries = [{"level": "info", "text": "ü"}, "plain", 3, None, [1, [2]], False]
    for entry in entries[:3]:
        runs.append_log(run_id, entry)
    ended = runs.cancel(run_id)
    for entry in entries[3:]:
        runs.append_log(run_id, entry)
    assert runs.get(run_id).logs == entries
    assert runs.get(run_id).completed_at == ended.completed_at
    raw.execute("UPDATE circle.pipeline_runs SET logs = NULL")
    runs.append_log(run_id, "again")
    assert runs.get(run_id).logs == ["again"]


def test_an_entry_lies_one_level_deep_in_the_logs(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session, "a")
    entry: Any = 1
    for _ in range(63):
        entry = [entry]
    runs.append_log(run_id, entry)
    session.commit()
    with refuses(InvalidDataError) as caught:
        runs.append_log(run_id, [entry])
    assert "nested deeper than 64" in str(caught.value)
    assert runs.get(run_id).logs == [entry]


# --- nodes -------------------------------------------------------------------------------------------------------------


def test_a_node_that_is_not_ready_says_what_it_waits_for(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session)
    with refuses(NodeNotReadyError) as caught:
        runs.start_node(run_id, "d")
    assert (caught.value.run_id, caught.value.node_id, caught.value.waiting_for) == (run_id, "d", ("b", "c"))
    runs.record(run_id, [done("a"), done("b")])
    with refuses(NodeNotReadyError) as caught:
        runs.start_node(run_id, "d")
    assert caught.value.waiting_for == ("c",)
    assert "c" in str(caught.value)
    runs.skip_node(run_id, "c")
    assert runs.start_node(run_id, "d").status == NodeStatus.RUNNING


def test_nodes_move_only_while_their_run_is_running(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = runs.create(store(session, "a")).id
    moves: dict[str, Callable[[], object]] = {
        "running": lambda: runs.start_node(run_id, "a"),
        "completed": lambda: runs.complete_node(run_id, "a"),
        "skipped": lambda: runs.skip_node(run_id, "a"),
        "failed": lambda: runs.fail_node(run_id, "a", "late"),
    }
    for requested, move in moves.items():
        with refuses(IllegalTransitionError) as caught:
            move()
        error = caught.value
        assert (error.entity, error.id, error.current) == ("node run", f"{run_id}/a", "pending")
        assert error.requested == requested
        assert "its run is pending" in str(error)
    assert runs.ready_nodes(run_id) == []


def test_illegal_node_transitions(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    run_id = started(runs, session, "a b")
    runs.start_node(run_id, "a")
    with refuses(IllegalTransitionError) as caught:
        runs.start_node(run_id, "a")
    assert (caught.value.current, caught.value.requested) == ("running", "running")
    with refuses(IllegalTransitionError) as caught:
        runs.skip_node(run_id, "a")
    assert (caught.value.current, caught.value.requested) == ("running", "skipped")
    runs.complete_node(run_id, "b", {"kept": 1})  # pending: reported afterwards
    for call in (
        lambda: runs.start_node(run_id, "b"),
        lambda: runs.complete_node(run_id, "b", {"kept": 2}),
        lambda: runs.skip_node(run_id, "b"),
        lambda: runs.fail_node(run_id, "b", "late"),
        lambda: runs.record(run_id, [done("b")]),
        lambda: runs.advance(run_id, [done("b", "failed")]),
    ):
        with refuses(IllegalTransitionError) as caught:
            call()
        assert (caught.value.entity, caught.value.id, caught.value.current) == ("node run", f"{run_id}/b", "completed")


BY_RUN: dict[str, Callable[[RunRepository, int], object]] = {
    "get": lambda runs, run_id: runs.get(run_id),
    "nodes": lambda runs, run_id: runs.nodes(run_id),
    "ready_nodes": lambda runs, run_id: runs.ready_nodes(run_id),
    "definition": lambda runs, run_id: runs.definition(run_id),
    "start": lambda runs, run_id: runs.start(run_id),
    "complete": lambda runs, run_id: runs.complete(run_id),
    "finish": lambda runs, run_id: runs.finish(run_id),
    "fail": lambda runs, run_id: runs.fail(run_id, "x"),
    "cancel": lambda runs, run_id: runs.cancel(run_id),
    "append_log": lambda runs, run_id: runs.append_log(run_id, "x"),
    "start_node": lambda runs, run_id: runs.start_node(run_id, "a"),
    "complete_node": lambda runs, run_id: runs.complete_node(run_id, "a"),
    "skip_node": lambda runs, run_id: runs.skip_node(run_id, "a"),
    "fail_node": lambda runs, run_id: runs.fail_node(run_id, "a", "x"),
    "advance": lambda runs, run_id: runs.advance(run_id),
    "record": lambda runs, run_id: runs.record(run_id, [done("a")]),
    "heartbeat": lambda runs, run_id: runs.heartbeat(run_id, LEASE, token=1),
    "release": lambda runs, run_id: runs.release(run_id, token=1),
}


def raised(call: Callable[..., object], *arguments: object) -> str:
    """The class of what a call raises."""
    try:
        call(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return type(error).__name__
    return "nothing"


def test_an_id_that_no_bigint_holds_is_not_there_either(runs: RunRepository) -> None:
    for missing in (2**63, -(2**63) - 1, 10**30):
        found = {name: raised(call, runs, missing) for name, call in BY_RUN.items()}
        assert found == dict.fromkeys(BY_RUN, "RunNotFoundError")


@pytest.mark.parametrize("bad", ["1", True, 1.0, None, [1], 10**5000], ids=lambda bad: type(bad).__name__)
def test_an_id_or_token_that_is_no_number(runs: RunRepository, session: Session, bad: Any) -> None:
    run_id = started(runs, session, "a")
    for call in BY_RUN.values():
        with pytest.raises(InvalidDataError, match="^run_id must be a whole number"):
            call(runs, bad)
    with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
        runs.create(bad)
    with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
        runs.statistics(bad)
    with pytest.raises(InvalidDataError, match="^limit must be a whole number"):
        runs.search(limit=bad)
    if bad is not None:  # a filter, and a run that nobody claimed
        with pytest.raises(InvalidDataError, match="^pipeline_id must be a whole number"):
            runs.search(bad)
        with pytest.raises(InvalidDataError, match="^token must be a whole number"):
            runs.advance(run_id, token=bad)
    assert runs.get(run_id).status == "running"  # the transaction goes on: no SQL was sent


def test_what_must_be_given_is_not_none(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a")
    nothing: Any = None
    for name, call in {
        "node_id": lambda: runs.start_node(run_id, nothing),
        "error": lambda: runs.fail(run_id, nothing),
        "retryable": lambda: runs.fail_node(run_id, "a", "broken", retryable=nothing),
        "worker_id": lambda: runs.claim(nothing, timedelta(seconds=1)),
    }.items():
        with pytest.raises(InvalidDataError, match=f"^{name} must be "):
            call()
    assert runs.get(run_id).status == "running"


def test_nor_is_such_a_pipeline(runs: RunRepository, refuses: Callable[..., Any]) -> None:
    for missing in (2**63, -(10**30)):
        with refuses(PipelineNotFoundError) as caught:
            runs.create(missing)
        assert caught.value.pipeline_id == missing
        assert runs.statistics(missing).success_rate is None
        assert runs.search(missing).items == ()


def test_what_is_not_there(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    run_id = started(runs, session, "a")
    for missing in (0, -1, 10**6, 2**31, 2**63 - 1):
        for call in BY_RUN.values():
            with refuses(RunNotFoundError) as caught:
                call(runs, missing)
            assert caught.value.run_id == missing
    by_nodes: list[Callable[[str], object]] = [
        lambda node_id: runs.start_node(run_id, node_id),
        lambda node_id: runs.complete_node(run_id, node_id),
        lambda node_id: runs.skip_node(run_id, node_id),
        lambda node_id: runs.fail_node(run_id, node_id, "x"),
        lambda node_id: runs.advance(run_id, [done(node_id)]),
        lambda node_id: runs.record(run_id, [done("a"), done(node_id)]),
    ]
    for node_id in ("b", "", "A", "a ", "x" * 5_000, "'; --", "%s"):
        for by_node in by_nodes:
            with refuses(NodeRunNotFoundError) as caught:
                by_node(node_id)
            assert (caught.value.run_id, caught.value.node_id) == (run_id, node_id)
            assert len(str(caught.value)) < 1_100


@pytest.mark.parametrize(("base", "longest"), [(1.5, 10.0), (0.0, 5.0), (3.0, 2.0), (31_536_000.0, 31_536_000.0)])
def test_a_failed_node_is_retried_with_backoff(
    runs: RunRepository, session: Session, raw: psycopg.Connection, base: float, longest: float
) -> None:
    pipeline = store(session, "a>b", max_retries_per_node=3, retry_backoff_base=base, retry_backoff_max=longest)
    run_id = runs.start(runs.create(pipeline).id).id
    for attempt in range(4):
        runs.start_node(run_id, "a")
        since = clock(raw)
        node = runs.fail_node(run_id, "a", f"error {attempt}")
        assert node.error_message == f"error {attempt}"
        if attempt < 3:
            assert (node.status, node.retry_count, node.completed_at) == ("pending", attempt + 1, None)
            delay = retry_delay(attempt, base, longest)
            assert delay == timedelta(seconds=min(base * 2**attempt, longest))
            assert node.available_at is not None
            assert since + delay <= node.available_at <= clock(raw) + delay
            if delay:
                with pytest.raises(NodeNotReadyError) as caught:
                    runs.start_node(run_id, "a")
                assert caught.value.waiting_for == ()
                assert "retry is due at" in str(caught.value)
                assert runs.ready_nodes(run_id) == []
                assert runs.advance(run_id) == []
                assert runs.get(run_id).status == RunStatus.RUNNING
            raw.execute("UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp() WHERE node_id = 'a'")
    (node, _) = runs.nodes(run_id)
    assert (node.status, node.retry_count, node.available_at) == ("failed", 3, None)
    assert runs.finish(run_id).error_message == "error 3"
    assert counters(raw, pipeline) == (1, 0, 1)


def test_backoff_never_overflows(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    settings = {"max_retries_per_node": 1_000_000, "retry_backoff_base": 31_536_000, "retry_backoff_max": 31_536_000}
    run_id = started(runs, session, "a", **settings)
    for count in (61, 62, 63, 1_023, 1_024, 999_999):
        raw.execute("UPDATE circle.pipeline_node_runs SET retry_count = %s, available_at = NULL", [count])
        runs.start_node(run_id, "a")
        since = clock(raw)
        node = runs.fail_node(run_id, "a", "x")
        assert node.available_at is not None
        assert since + timedelta(days=365) <= node.available_at <= clock(raw) + timedelta(days=365)
        assert node.retry_count == count + 1


def test_no_retry(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a b c", max_retries_per_node=3)
    runs.start_node(run_id, "a")
    runs.start_node(run_id, "b")
    assert runs.fail_node(run_id, "a", "for good", retryable=False).status == NodeStatus.FAILED
    assert runs.fail_node(run_id, "c", "never started").status == NodeStatus.FAILED
    assert runs.fail_node(run_id, "b", "again").status == NodeStatus.PENDING
    none = started(runs, session, "a", max_retries_per_node=0)
    runs.start_node(none, "a")
    assert runs.fail_node(none, "a", "once").status == NodeStatus.FAILED


def test_skipping_goes_on_transitively(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "t>l t>r l>l2 l2>join r>join l>x x>y y>join2 l2>join2")
    runs.record(run_id, [done("t")])
    assert runs.skip_node(run_id, "l").node_id == "l"
    assert statuses(runs, run_id) == {
        **dict.fromkeys(["l", "l2", "x", "y", "join2"], "skipped"),
        **dict.fromkeys(["r", "join"], "pending"),
        "t": "completed",
    }
    assert [node.node_id for node in runs.ready_nodes(run_id)] == ["r"]
    runs.advance(run_id)
    assert [node.node_id for node in runs.advance(run_id, [done("r")])] == ["join"]
    assert runs.advance(run_id, [done("join")]) == []
    assert runs.get(run_id).status == RunStatus.COMPLETED


def test_an_untaken_branch_by_results(runs: RunRepository, session: Session) -> None:
    spec = "t>l t>r l>l2 l2>join r>join"
    for call in (runs.advance, runs.record):
        run_id = started(runs, session, spec)
        runs.advance(run_id)
        call(run_id, [done("t"), done("l", "skipped")])
        assert [statuses(runs, run_id)[name] for name in ("l", "l2", "join")] == ["skipped", "skipped", "pending"]
        assert statuses(runs, run_id)["r"] == ("running" if call == runs.advance else "pending")
    both = started(runs, session, spec)  # named or not, what follows is skipped once
    runs.record(both, [done("t"), done("l", "skipped"), done("l2", "skipped"), done("r", "skipped")])
    assert statuses(runs, both)["join"] == "skipped"
    assert runs.finish(both).status == RunStatus.COMPLETED
    everything = runs.create(store(session, spec)).id
    assert runs.advance(everything, [done("t", "skipped")]) == []
    assert set(statuses(runs, everything).values()) == {"skipped"}
    assert runs.get(everything).status == RunStatus.COMPLETED


def test_after_a_permanent_failure_nothing_new_starts(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session, "a b c>d e>f g", retry_backoff_base=0)
    run_id = runs.start(runs.create(pipeline).id).id
    for name in ("a", "b", "c", "e"):
        runs.start_node(run_id, name)
    assert runs.fail_node(run_id, "e", "later again").status == NodeStatus.PENDING
    runs.fail_node(run_id, "b", "the first", retryable=False)
    runs.fail_node(run_id, "a", "the second", retryable=False)
    with refuses(NodeNotReadyError) as caught:  # g has no predecessors
        runs.start_node(run_id, "g")
    assert (caught.value.waiting_for, "'b' failed" in str(caught.value)) == ((), True)
    # what is under way goes on: c runs, e waits for its retry
    assert [node.node_id for node in runs.ready_nodes(run_id)] == ["e"]
    assert [node.node_id for node in runs.advance(run_id, [done("c")])] == ["e"]
    with refuses(IllegalTransitionError):
        runs.finish(run_id)
    assert runs.advance(run_id, [done("e")]) == []
    run = runs.get(run_id)
    assert (run.status, run.error_message, run.failed_node) == ("failed", "the first", "b")
    assert statuses(runs, run_id) == {
        **dict.fromkeys("ab", "failed"),
        **dict.fromkeys("ce", "completed"),
        **dict.fromkeys("dfg", "cancelled"),
    }
    assert counters(raw, pipeline) == (1, 0, 1)


def test_of_several_failures_in_one_batch_the_first_in_execution_order_is_told(
    runs: RunRepository, session: Session
) -> None:
    names = [f"n{at}" for at in range(40)]
    for seed in range(5):
        run_id = runs.create(store(session, " ".join(names))).id
        results = [done(name, "failed", error=f"error of {name}") for name in names[7:]]
        random.Random(seed).shuffle(results)
        runs.record(run_id, [*results, *(done(name) for name in names[:7])])
        run = runs.finish(run_id)
        assert (run.failed_node, run.error_message) == ("n7", "error of n7")


# --- many nodes in one call --------------------------------------------------------------------------------------------


def test_advance_from_beginning_to_end(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipeline = store(session)
    run_id = runs.create(pipeline).id
    (a,) = runs.advance(run_id)
    assert (a.node_id, a.status, runs.get(run_id).status) == ("a", "running", "running")
    assert runs.advance(run_id) == []  # a runs: there is nothing to do
    b, c = runs.advance(run_id, [done("a", output={"x": 1}, duration_ms=7, retry_count=2)])
    assert (b.node_id, c.node_id) == ("b", "c")
    assert runs.get(run_id).current_node == "c"
    node = runs.nodes(run_id)[0]
    assert (node.status, node.output_data, node.duration_ms, node.retry_count) == ("completed", {"x": 1}, 7, 2)
    assert runs.advance(run_id, [{"node_id": "c", "status": "completed"}]) == []
    with refuses(IllegalTransitionError):
        runs.advance(run_id, [done("b"), done("c")])
    (d,) = runs.advance(run_id, [done("b")])
    assert d.node_id == "d"
    assert d.predecessors == [1, 2]
    assert runs.advance(run_id, [done("d")]) == []
    run = runs.get(run_id)
    assert (run.status, counters(raw, pipeline)) == ("completed", (1, 1, 0))


def test_advance_ends_a_run_that_failed(runs: RunRepository, session: Session) -> None:
    run_id = runs.create(store(session)).id
    runs.advance(run_id)
    runs.advance(run_id, [done("a")])
    assert runs.advance(run_id, [done("b", "failed", error="no luck")]) == []
    assert runs.get(run_id).status == RunStatus.RUNNING  # c still runs
    assert runs.advance(run_id, [done("c")]) == []
    run = runs.get(run_id)
    assert (run.status, run.error_message, statuses(runs, run_id)["d"]) == ("failed", "no luck", "cancelled")


def test_advance_starts_due_retries_and_no_others(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = runs.create(store(session, "a b", retry_backoff_base=60)).id
    runs.advance(run_id)
    runs.fail_node(run_id, "a", "x")
    runs.fail_node(run_id, "b", "x")
    assert runs.advance(run_id) == []
    raw.execute("UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp() WHERE node_id = 'b'")
    (node,) = runs.advance(run_id)
    assert (node.node_id, node.retry_count) == ("b", 1)
    assert runs.advance(run_id, [done("b")]) == []
    assert runs.get(run_id).status == RunStatus.RUNNING


def test_results_are_recorded_all_or_none(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    pending = runs.create(store(session)).id
    running = started(runs, session)
    runs.record(running, [done("a")])
    for run_id in (pending, running):
        for results, error in (
            ([done("b"), done("nowhere")], NodeRunNotFoundError),
            ([done("b"), done("c"), done("b")], IllegalTransitionError),
            ([done("b"), done("b", "skipped")], IllegalTransitionError),
        ):
            for call in (runs.record, runs.advance):
                with refuses(error):
                    call(run_id, results)
    for call in (runs.record, runs.advance):
        with refuses(IllegalTransitionError) as caught:
            call(running, [done("d"), done("a"), done("b")])
        assert (caught.value.id, caught.value.current, caught.value.requested) == (
            f"{running}/a",
            "completed",
            "completed",
        )
    runs.start_node(running, "b")
    with refuses(IllegalTransitionError) as caught:
        runs.record(running, [done("c"), done("b", "skipped")])
    assert (caught.value.id, caught.value.current, caught.value.requested) == (f"{running}/b", "running", "skipped")
    runs.record(running, [])
    runs.record(pending, [])
    assert runs.get(pending).status == RunStatus.RUNNING


def test_record_reports_afterwards(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session)
    run_id = runs.create(pipeline).id
    results = [
        done("d", "cancelled"),
        done("a", output={"x": "y"}, duration_ms=60_000, retry_count=1),
        done("b", "failed", error="no", duration_ms=5),
        done("c", "skipped"),
    ]
    runs.record(run_id, iter(results))
    a, b, c, d = runs.nodes(run_id)
    assert (a.status, a.output_data, a.duration_ms, a.retry_count) == ("completed", {"x": "y"}, 60_000, 1)
    assert a.completed_at is not None
    assert a.started_at is not None
    assert a.completed_at - a.started_at == pytest.approx(timedelta(minutes=1), abs=timedelta(seconds=5))
    assert (b.status, b.error_message, c.status, d.status) == ("failed", "no", "skipped", "cancelled")
    run = runs.finish(run_id)
    assert (run.status, run.error_message, counters(raw, pipeline)) == ("failed", "no", (1, 0, 1))


# --- bad data ----------------------------------------------------------------------------------------------------------

DEEP: list[Any] = []
for _ in range(64):
    DEEP = [DEEP]

BAD_JSON = {
    "NUL": ({"a": ["x", "b\0d"]}, ".a[1]"),
    "a NUL in a key": ({"k\0": 1}, ""),
    "a lone surrogate": ({"a": "\ud800"}, ".a"),
    "NaN": ({"a": float("nan")}, ".a"),
    "infinity": ([0, float("inf")], "[1]"),
    "a huge number": ({"a": {"b": 10**400}}, ".a.b"),
    "a set": ({"a": {1}}, ".a"),
    "bytes": ({"a": b"x"}, ".a"),
    "a datetime": ({"a": datetime(2024, 1, 1, tzinfo=UTC)}, ".a"),
    "a number as a key": ({"a": {1: 2}}, ".a"),
    "too deep": ({"a": DEEP}, ".a"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_what_is_no_json_is_refused_where_it_is(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], what: str
) -> None:
    value, place = BAD_JSON[what]
    pipeline = store(session, "a b")
    run_id = runs.start(runs.create(pipeline).id).id
    runs.start_node(run_id, "b")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("trigger_data", lambda: runs.create(pipeline, value)),
        ("entry", lambda: runs.append_log(run_id, value)),
        ("input_data", lambda: runs.start_node(run_id, "a", value)),
        ("output", lambda: runs.complete_node(run_id, "b", value)),
    ]
    for name, call in calls:
        with refuses(InvalidDataError) as caught:
            call()
        assert name + place in str(caught.value)
    if isinstance(value, dict):
        for results in (runs.advance, runs.record):
            with refuses(InvalidDataError) as caught:
                results(run_id, [done("b"), {"node_id": "a", "status": "completed", "output": value}])
            assert "results" in str(caught.value)


@pytest.mark.parametrize("text", ["a\0b", "\ud800", 7])
def test_what_is_no_text_is_refused(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], text: Any
) -> None:
    pipeline = store(session, "a b")
    run_id = runs.start(runs.create(pipeline).id).id
    runs.start_node(run_id, "b")
    runs.create(pipeline)
    for name, call in (
        ("idempotency_key", lambda: runs.create(pipeline, idempotency_key=text)),
        ("error", lambda: runs.fail(run_id, text)),
        ("reason", lambda: runs.cancel(run_id, text)),
        ("node_id", lambda: runs.start_node(run_id, text)),
        ("node_id", lambda: runs.complete_node(run_id, text)),
        ("node_id", lambda: runs.skip_node(run_id, text)),
        ("node_id", lambda: runs.fail_node(run_id, text, "x")),
        ("error", lambda: runs.fail_node(run_id, "b", text)),
        ("worker_id", lambda: runs.claim(text, LEASE)),
        ("results", lambda: runs.record(run_id, [{"node_id": "a", "status": "failed", "error": text}])),
        ("results", lambda: runs.advance(run_id, [{"node_id": text, "status": "failed"}])),
    ):
        with refuses(InvalidDataError) as caught:
            call()
        assert name in str(caught.value)


def test_arguments_out_of_range(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    pipeline = store(session, "a")
    run = claimed(runs, session, "a")
    token = run.claim_token
    result = {"node_id": "a", "status": "completed"}
    calls: list[Callable[[], object]] = [
        *(lambda key=key: runs.create(pipeline, idempotency_key=key) for key in ("", "k" * 256)),
        *(lambda name=name: runs.claim(name, LEASE) for name in ("", "w" * 256)),
        *(
            lambda lease=lease, call=call: call(lease)
            for lease in (timedelta(0), timedelta(seconds=-1), timedelta.max, 60, None)
            for call in (lambda lease: runs.claim("w", lease), lambda lease: runs.heartbeat(run.id, lease, token=token))
        ),
        *(
            lambda limit=limit, call=call: call(limit)
            for limit in (0, -1, True, 1.5, "1", None, 2**31, 10**30)
            for call in (
                lambda limit: runs.claim("w", LEASE, limit),
                runs.recover,
                runs.expire,
                lambda limit: runs.recover(10, limit),
                lambda limit: runs.purge(timedelta(0), limit),
                lambda limit: runs.search(limit=limit),
            )
        ),
        *(lambda age=age: runs.purge(age) for age in (timedelta(seconds=-1), timedelta.max, 0)),
        lambda: runs.search(status="started"),  # type: ignore[arg-type]
        *(
            lambda wrong=wrong, call=call: call(run.id, [result | wrong], token=token)
            for wrong in (
                {"status": "running"},
                {"status": None},
                {"node_id": None},
                {"node_id": 7},
                {"output": [1]},
                {"duration_ms": -1},
                {"duration_ms": 2**31},
                {"retry_count": -1},
                {"retry_count": 2**31},
                {"retry_count": "many"},
            )
            for call in (runs.record, runs.advance)
        ),
        lambda: runs.record(run.id, [{"status": "completed"}], token=token),
        lambda: runs.record(run.id, ["a"], token=token),  # type: ignore[list-item]
    ]
    for call in calls:
        with refuses(InvalidDataError) as caught:
            call()
        assert len(str(caught.value)) < 1_100


# --- leases ------------------------------------------------------------------------------------------------------------


def test_claims_take_the_oldest_pending_runs(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(6)]
    runs.start(ids[0])
    runs.cancel(ids[2])
    since = clock(raw)
    first = runs.claim("one", LEASE)
    assert [run.id for run in first] == [ids[1]]
    (run,) = first
    assert (run.status, run.worker_id, run.claim_token, run.claim_count) == ("running", "one", 1, 1)
    assert run.lease_expires_at is not None
    assert since + LEASE <= run.lease_expires_at <= clock(raw) + LEASE
    assert run.started_at is not None
    assert [run.id for run in runs.claim("two", LEASE, limit=2)] == ids[3:5]
    assert [run.id for run in runs.claim("two", LEASE, limit=100)] == ids[5:]
    assert runs.claim("two", LEASE, limit=100) == []


def test_heartbeats_extend_the_lease(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run = claimed(runs, session)
    since = clock(raw)
    ends = runs.heartbeat(run.id, timedelta(hours=1), token=run.claim_token)
    assert since + timedelta(hours=1) <= ends <= clock(raw) + timedelta(hours=1)
    assert runs.get(run.id).lease_expires_at == ends
    lose_lease(raw, run.id)  # the token decides, not the clock
    runs.heartbeat(run.id, LEASE, token=run.claim_token)
    assert runs.recover() == []


def test_a_heartbeat_says_why_the_lease_is_lost(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "a")
    for token in (0, run.claim_token + 1, -1, 2**40):
        with refuses(LeaseLostError) as caught:
            runs.heartbeat(run.id, LEASE, token=token)
        assert (caught.value.run_id, caught.value.status) == (run.id, "running")
    runs.cancel(run.id)
    for call in (
        lambda: runs.heartbeat(run.id, LEASE, token=run.claim_token),
        lambda: runs.release(run.id, token=run.claim_token),
    ):
        with refuses(LeaseLostError) as caught:
            call()
        assert (caught.value.run_id, caught.value.status) == (run.id, "cancelled")
    unclaimed = started(runs, session, "a")
    with refuses(LeaseLostError) as caught:
        runs.heartbeat(unclaimed, LEASE, token=0)
    assert caught.value.status == "running"


def test_a_released_run_is_as_good_as_new(runs: RunRepository, session: Session) -> None:
    run = claimed(runs, session)
    runs.advance(run.id, token=run.claim_token)
    runs.advance(run.id, [done("a")], token=run.claim_token)
    given = runs.release(run.id, token=run.claim_token)
    assert (given.status, given.worker_id, given.lease_expires_at, given.claim_count) == ("pending", None, None, 0)
    assert given.claim_token > run.claim_token
    assert given.started_at == run.started_at
    assert statuses(runs, run.id) == {"a": "completed", "b": "pending", "c": "pending", "d": "pending"}
    assert [node.retry_count for node in runs.nodes(run.id)] == [0] * 4
    (again,) = runs.claim("another", LEASE)
    assert (again.id, again.started_at) == (run.id, run.started_at)
    assert again.claim_token > given.claim_token
    assert [node.node_id for node in runs.advance(run.id, token=again.claim_token)] == ["b", "c"]


WRITES: dict[str, Callable[[RunRepository, int, Any], object]] = {
    "start": lambda runs, run_id, token: runs.start(run_id, token=token),
    "complete": lambda runs, run_id, token: runs.complete(run_id, token=token),
    "finish": lambda runs, run_id, token: runs.finish(run_id, token=token),
    "fail": lambda runs, run_id, token: runs.fail(run_id, "late", token=token),
    "append_log": lambda runs, run_id, token: runs.append_log(run_id, "late", token=token),
    "start_node": lambda runs, run_id, token: runs.start_node(run_id, "b", token=token),
    "complete_node": lambda runs, run_id, token: runs.complete_node(run_id, "a", token=token),
    "skip_node": lambda runs, run_id, token: runs.skip_node(run_id, "b", token=token),
    "fail_node": lambda runs, run_id, token: runs.fail_node(run_id, "a", "late", token=token),
    "advance": lambda runs, run_id, token: runs.advance(run_id, [done("a")], token=token),
    "advance alone": lambda runs, run_id, token: runs.advance(run_id, token=token),
    "record": lambda runs, run_id, token: runs.record(run_id, [done("a")], token=token),
    "record nothing": lambda runs, run_id, token: runs.record(run_id, [], token=token),
    "heartbeat": lambda runs, run_id, token: runs.heartbeat(run_id, LEASE, token=-1 if token is None else token),
    "release": lambda runs, run_id, token: runs.release(run_id, token=-1 if token is None else token),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_on_a_claimed_run_needs_the_current_token(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any], name: str
) -> None:
    stale = claimed(runs, session, "a b")
    runs.start_node(stale.id, "a", token=stale.claim_token)
    lose_lease(raw, stale.id)
    assert [run.id for run in runs.recover()] == [stale.id]
    with refuses(LeaseLostError) as caught:  # before the next owner has come
        WRITES[name](runs, stale.id, stale.claim_token)
    assert (caught.value.run_id, caught.value.status) == (stale.id, "pending")
    (run,) = runs.claim("next", LEASE)
    raw.execute("UPDATE circle.pipeline_node_runs SET available_at = NULL")
    runs.start_node(run.id, "a", token=run.claim_token)
    wrong = (None, 0, stale.claim_token, run.claim_token - 1, run.claim_token + 1, -1, 2**63 - 1)
    for token in wrong:
        with refuses(LeaseLostError) as caught:
            WRITES[name](runs, run.id, token)
        assert (caught.value.run_id, caught.value.status) == (run.id, "running")
    if name not in ("start", "complete", "finish"):  # not legal now, but not for want of a lease
        WRITES[name](runs, run.id, run.claim_token)
    else:
        with refuses(IllegalTransitionError):
            WRITES[name](runs, run.id, run.claim_token)


def test_a_token_that_no_bigint_holds_is_a_wrong_one(runs: RunRepository, session: Session) -> None:
    run = claimed(runs, session, "a b")
    for token in (2**63, -(10**30)):
        found = {name: raised(call, runs, run.id, token) for name, call in WRITES.items()}
        assert found == dict.fromkeys(WRITES, "LeaseLostError")


def test_cancel_and_sweeps_need_no_token(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    assert runs.cancel(claimed(runs, session).id).status == RunStatus.CANCELLED
    late = claimed(runs, session, timeout_seconds=1)
    raw.execute(
        "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '2 s' WHERE id = %s", [late.id]
    )
    assert [(run.id, run.status) for run in runs.expire()] == [(late.id, "timeout")]
    assert runs.get(late.id).lease_expires_at is None


def test_recover_counts_a_failed_attempt(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, max_retries_per_node=2, retry_backoff_base=0)
    run_id = runs.create(pipeline).id
    tokens = [0]
    for attempt in range(3):
        (run,) = runs.claim("worker", LEASE)
        tokens.append(run.claim_token)
        assert run.claim_count == attempt + 1
        if attempt == 0:
            runs.advance(run_id, token=run.claim_token)
            runs.advance(run_id, [done("a")], token=run.claim_token)
        else:
            assert [node.node_id for node in runs.advance(run_id, token=run.claim_token)] == ["b", "c"]
        assert runs.recover() == []  # the lease holds
        lose_lease(raw, run_id)
        (recovered,) = runs.recover()
        assert (recovered.id, recovered.lease_expires_at) == (run_id, None)
        tokens.append(recovered.claim_token)
        if attempt < 2:
            assert (recovered.status, recovered.worker_id) == ("pending", None)
            _, b, c, d = runs.nodes(run_id)
            assert [(n.status, n.retry_count) for n in (b, c, d)] == [("pending", attempt + 1)] * 2 + [("pending", 0)]
            assert "lease" in (b.error_message or "")
    recovered = runs.get(run_id)
    assert recovered.status == RunStatus.FAILED
    assert "lease" in (recovered.error_message or "")
    assert statuses(runs, run_id) == {"a": "completed", "b": "failed", "c": "failed", "d": "cancelled"}
    assert counters(raw, pipeline) == (1, 0, 1)
    assert tokens[:-1] == sorted(set(tokens[:-1]))  # they only grow
    assert tokens[-1] >= tokens[-2]


def test_a_run_that_was_claimed_too_often_fails(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a", max_retries_per_node=1_000)
    run_id = runs.create(pipeline).id
    for count in range(1, 11):
        assert [run.claim_count for run in runs.claim("crasher", LEASE)] == [count]
        lose_lease(raw, run_id)
        (run,) = runs.recover()
        assert run.status == ("failed" if count == 10 else "pending")
    assert "10 times" in (runs.get(run_id).error_message or "")
    assert statuses(runs, run_id) == {"a": "cancelled"}
    assert counters(raw, pipeline) == (1, 0, 1)
    runs.create(pipeline)
    runs.claim("crasher", LEASE)
    raw.execute("UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s' WHERE status = 'running'")
    assert [run.status for run in runs.recover(max_claims=1)] == ["failed"]


def test_recover_ends_a_run_whose_worker_died_before_it_said_so(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a")
    run_id = runs.create(pipeline).id
    (run,) = runs.claim("worker", LEASE)
    runs.record(run_id, [done("a")], token=run.claim_token)
    lose_lease(raw, run_id)
    assert [(run.id, run.status) for run in runs.recover()] == [(run_id, "completed")]
    assert counters(raw, pipeline) == (1, 1, 0)


def test_recover_takes_only_what_lost_its_lease(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    without = started(runs, session)
    held = claimed(runs, session)
    lost = [claimed(runs, session).id for _ in range(3)]
    for run_id in lost:
        lose_lease(raw, run_id)
    assert [run.id for run in runs.recover(limit=2)] == lost[:2]
    assert [run.id for run in runs.recover(limit=2)] == lost[2:]
    assert runs.recover() == []
    assert (runs.get(without).status, runs.get(held.id).status) == ("running", "running")


def test_expire(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    limited = store(session, timeout_seconds=100)
    ids = [runs.start(runs.create(limited).id).id for _ in range(3)]
    in_time = runs.start(runs.create(limited).id).id
    waiting = runs.create(limited).id
    unlimited = [started(runs, session, timeout_seconds=limit) for limit in (None, 0)]
    runs.start_node(ids[0], "a")
    raw.execute(
        "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '101 s' WHERE id = ANY (%s)",
        [[*ids, *unlimited]],
    )
    raw.execute(
        "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '90 s' WHERE id = %s", [in_time]
    )
    raw.execute("UPDATE circle.pipeline_runs SET created_at = clock_timestamp() - interval '200 s'")
    expired = runs.expire(limit=2)
    assert [(run.id, run.status) for run in expired] == [(run_id, "timeout") for run_id in ids[:2]]
    assert "100 seconds" in (expired[0].error_message or "")
    assert expired[0].completed_at is not None
    assert expired[0].duration_seconds == pytest.approx(101, abs=5)
    assert set(statuses(runs, ids[0]).values()) == {"cancelled"}
    assert [run.id for run in runs.expire()] == ids[2:]
    assert runs.expire() == []
    assert [runs.get(run_id).status for run_id in (in_time, *unlimited, waiting)] == [*["running"] * 3, "pending"]
    assert counters(raw, limited) == (5, 0, 3)
    # a run that never noted its start: raw, and older than the guards
    raw.execute("UPDATE circle.pipeline_runs SET started_at = NULL WHERE id = %s", [in_time])
    assert [run.id for run in runs.expire()] == [in_time]


def test_a_new_claim_keeps_the_start_and_so_the_timeout(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run = claimed(runs, session, timeout_seconds=100)
    raw.execute("UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '101 s'")
    lose_lease(raw, run.id)
    runs.recover()
    assert runs.expire() == []  # pending: the table of transitions has no way from there to timeout
    runs.claim("next", LEASE)
    assert [expired.id for expired in runs.expire()] == [run.id]


def test_purge(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    ids = [runs.start(runs.create(pipeline).id).id for _ in range(7)]
    for run_id in ids[:6]:
        runs.cancel(run_id)
    with unguarded(raw, "pipeline_runs"):
        raw.execute(
            "UPDATE circle.pipeline_runs SET started_at = started_at - interval '10 days',"
            " completed_at = completed_at - interval '10 days' WHERE id = ANY (%s)",
            [ids[:5]],
        )
    assert runs.purge(timedelta(days=11)) == 0
    assert [runs.purge(timedelta(days=9), limit=2) for _ in range(4)] == [2, 2, 1, 0]
    assert [run.id for run in runs.search().items] == [ids[6], ids[5]]
    assert raw.execute("SELECT count(*) FROM circle.pipeline_node_runs").fetchone() == (4,)
    assert counters(raw, pipeline) == (7, 0, 0)  # purged runs are history
    assert runs.purge(timedelta(0)) == 1
    assert runs.get(ids[6]).status == RunStatus.RUNNING


def test_deleting_a_pipeline_with_live_runs(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    pipelines = PipelineRepository(session)
    pipeline, other = store(session), store(session)
    run = runs.create(pipeline)
    runs.start(runs.create(pipeline).id)
    kept = runs.create(other)
    with refuses(PipelineInUseError) as caught:
        pipelines.delete(pipeline)
    assert (caught.value.pipeline_id, caught.value.live_runs) == (pipeline, 2)
    pipelines.delete(pipeline, force=True)
    with refuses(PipelineNotFoundError) as caught:
        pipelines.delete(pipeline, force=True)
    assert caught.value.pipeline_id == pipeline
    with refuses(RunNotFoundError):
        runs.start(run.id)
    runs.cancel(kept.id)
    pipelines.delete(other)
    raw.execute("DELETE FROM circle.pipeline_events")  # the log keeps what happened until it is purged
    assert contents(raw) == []


# --- reads -------------------------------------------------------------------------------------------------------------


def test_pages_of_the_history(runs: RunRepository, session: Session) -> None:
    one, two = store(session, "a"), store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(10) for pipeline in (one, two)]
    for run_id in ids[::3]:
        runs.start(run_id)
    every = [runs.get(run_id) for run_id in reversed(ids)]
    for filters, expected in (
        ({}, every),
        ({"pipeline_id": one}, [run for run in every if run.pipeline_id == one]),
        ({"status": RunStatus.RUNNING}, [run for run in every if run.status == "running"]),
        (
            {"pipeline_id": two, "status": RunStatus.PENDING},
            [run for run in every if run.pipeline_id == two and run.status == "pending"],
        ),
        ({"status": RunStatus.TIMEOUT}, []),
        ({"pipeline_id": -1}, []),
        ({"pipeline_id": 2**63}, []),
    ):
        for limit in (1, 3, len(expected) or 1, 100):
            pages, cursor = [], None
            while True:
                page = runs.search(**filters, after=cursor, limit=limit)
                pages.append(list(page.items))
                cursor = page.next_cursor
                if cursor is None:
                    break
                runs.create(one)  # new runs don't move the pages that follow
            assert [run for page in pages for run in page if run.id in ids] == expected
            assert all(len(page) <= limit for page in pages)
    assert runs.search(after=0).items == ()
    assert runs.search(after=-(2**63)).items == ()
    assert len(runs.search(after=2**62, limit=1_000).items) > len(ids)


def test_counts_and_statistics(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline, other = store(session, "a"), store(session, "a")
    assert runs.counts() == dict.fromkeys(RunStatus, 0)
    empty = runs.statistics(other)
    assert (empty.runs, empty.success_rate) == (dict.fromkeys(RunStatus, 0), None)
    assert (empty.duration_p50, empty.duration_p95) == (None, None)
    assert runs.statistics(-1) == empty
    for status, count in (("completed", 100), ("failed", 20), ("timeout", 5), ("cancelled", 30)):
        for at in range(1, count + 1):
            run_id = runs.start(runs.create(pipeline).id).id
            raw.execute("DELETE FROM circle.pipeline_node_runs WHERE run_id = %s", [run_id])
            raw.execute(
                "UPDATE circle.pipeline_runs SET status = %s, started_at = '2024-01-01T00:00:00Z',"
                " completed_at = timestamptz '2024-01-01T00:00:00Z' + make_interval(secs => %s) WHERE id = %s",
                [status, at if status == "completed" else 10_000, run_id],
            )
    runs.create(pipeline)
    runs.start(runs.create(other).id)
    read = runs.statistics(pipeline)
    assert read.runs == {"completed": 100, "failed": 20, "timeout": 5, "cancelled": 30, "pending": 1, "running": 0}
    assert read.success_rate == pytest.approx(100 / 125)
    assert (read.duration_p50, read.duration_p95) == (timedelta(seconds=50.5), timedelta(seconds=95.05))
    assert runs.counts() == read.runs | {RunStatus.RUNNING: 1}


# --- real workflows ----------------------------------------------------------------------------------------------------


def workflow(name: str) -> dict[str, Any]:
    path = WORKFLOWS / name
    if not path.exists():
        pytest.skip("the recorded workflows are not here")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


WORKFLOW_NAMES = sorted(path.name for path in WORKFLOWS.glob("*.json")) or ["none"]


def predecessors(flow: dict[str, Any]) -> dict[str, set[str]]:
    before: dict[str, set[str]] = {node["id"]: set() for node in flow["nodes"]}
    for edge in flow["edges"]:
        before[edge["to"]].add(edge["from"])
    return before


def check_replay(runs: RunRepository, run_id: int, flow: dict[str, Any]) -> None:
    assert runs.get(run_id).status == RunStatus.COMPLETED
    recorded = {result["node_id"]: result for result in flow["results"]}
    nodes = runs.nodes(run_id)
    assert {n.node_id: (n.status, n.output_data) for n in nodes} == {
        name: (result["status"], result["output"]) for name, result in recorded.items()
    }
    # 0 is what a result says that tells no duration: then it is measured
    assert all(node.duration_ms == (recorded[node.node_id]["duration_ms"] or node.duration_ms) for node in nodes)
    place = {node.node_id: at for at, node in enumerate(nodes)}
    assert all(place[a] < place[b] for b, before in predecessors(flow).items() for a in before)


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_recorded_workflow_in_one_batch(runs: RunRepository, session: Session, name: str) -> None:
    flow = workflow(name)
    run_id = runs.create(store(session, nodes=flow["nodes"], edges=flow["edges"])).id
    runs.record(run_id, flow["results"])
    runs.finish(run_id)
    check_replay(runs, run_id, flow)


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_recorded_workflow_step_by_step(runs: RunRepository, session: Session, name: str) -> None:
    flow = workflow(name)
    before = predecessors(flow)
    recorded = {result["node_id"]: result for result in flow["results"]}
    chance = random.Random(name)
    run_id = runs.create(store(session, nodes=flow["nodes"], edges=flow["edges"])).id
    running = [node.node_id for node in runs.advance(run_id)]
    assert running == [name for name in statuses(runs, run_id) if not before[name]]
    over: set[str] = set()
    while running:
        chance.shuffle(running)
        batch = [running.pop() for _ in range(chance.randint(1, min(4, len(running))))]
        over |= set(batch)
        follows = runs.advance(run_id, [recorded[node] for node in batch])
        assert all(before[node.node_id] <= over for node in follows)
        running += [node.node_id for node in follows]
    assert over == set(before)
    check_replay(runs, run_id, flow)


# --- round trips -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wire(database_url: str, tmp_path: Path) -> Iterator[tuple[Session, Callable[[], int]]]:
    """A session and the number of round trips that it has made: libpq ends each with a Sync or begins it with a Query."""
    trace = tmp_path / "trace"
    with (
        Database(database_url, settings=DatabaseSettings(pool_size=1)) as database,
        database.session(autocommit=True) as session,
        trace.open("w") as file,
    ):
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        driver.pgconn.trace(file.fileno())
        driver.pgconn.set_trace_flags(psycopg.pq.Trace.SUPPRESS_TIMESTAMPS)

        def count() -> int:
            lines = [line.split("\t") for line in trace.read_text().splitlines()]
            return sum(fields[0] == "F" and fields[2] in ("Sync", "Query") for fields in lines)

        yield session, count
        driver.pgconn.untrace()


@pytest.mark.parametrize("length", [1, 10])
def test_round_trips_of_a_run(wire: tuple[Session, Callable[[], int]], length: int) -> None:
    session, count = wire
    runs = RunRepository(session)
    pipeline = store(session, chain(length))
    step_by_step, by_advance = [], []
    for _ in range(8):  # in the end every statement is prepared, as in a worker that has run for a second
        since = count()
        run_id = runs.create(pipeline).id
        runs.start(run_id)
        for at in range(length):
            runs.start_node(run_id, f"n{at}")
            runs.complete_node(run_id, f"n{at}", {"n": at})
        assert runs.finish(run_id).status == RunStatus.COMPLETED
        step_by_step.append(count() - since)

        since = count()
        run_id = runs.create(pipeline).id
        nodes = runs.advance(run_id)
        while nodes:
            nodes = runs.advance(run_id, [done(node.node_id, output={}) for node in nodes])
        by_advance.append(count() - since)
        assert runs.get(run_id).status == RunStatus.COMPLETED
    assert step_by_step[-1] <= 2 * length + 3
    assert by_advance[-1] <= length + 2

    since = count()
    run_id = runs.create(pipeline).id
    runs.record(run_id, [done(f"n{at}") for at in range(length)])
    runs.finish(run_id)
    assert count() - since == 3


def test_each_call_is_one_round_trip(wire: tuple[Session, Callable[[], int]]) -> None:
    session, count = wire
    runs = RunRepository(session)
    pipeline = store(session, "a b c", retry_backoff_base=0)
    run_id = runs.create(pipeline).id
    (claim,) = runs.claim("w", LEASE)
    token = claim.claim_token
    calls: list[Callable[[], object]] = [
        lambda: runs.create(pipeline, {"x": 1}, idempotency_key="key"),
        lambda: runs.create(pipeline, {"x": 1}, idempotency_key="key"),
        lambda: runs.start_node(run_id, "a", {}, token=token),
        lambda: runs.fail_node(run_id, "a", "x", token=token),
        lambda: runs.ready_nodes(run_id),
        lambda: runs.advance(run_id, token=token),
        lambda: runs.complete_node(run_id, "a", {}, token=token),
        lambda: runs.record(run_id, [done("b")], token=token),
        lambda: runs.append_log(run_id, "x", token=token),
        lambda: runs.heartbeat(run_id, LEASE, token=token),
        lambda: runs.release(run_id, token=token),
        lambda: runs.claim("w", LEASE, 2),
        lambda: runs.recover(),
        lambda: runs.expire(),
        lambda: runs.purge(LEASE),
        lambda: runs.get(run_id),
        lambda: runs.nodes(run_id),
        lambda: runs.definition(run_id),
        lambda: runs.search(),
        lambda: runs.counts(),
        lambda: runs.statistics(pipeline),
        lambda: runs.cancel(run_id),
    ]
    for call in calls:
        since = count()
        call()
        assert count() - since == 1
    with pytest.raises(IllegalTransitionError):
        runs.cancel(run_id)
    since = count()
    with pytest.raises(IllegalTransitionError):
        runs.cancel(run_id)
    assert count() - since <= 2  # one more read is allowed where a call fails


def test_what_a_caller_rolls_back_never_was(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        run_id = RunRepository(session).create(store(session)).id
    before = contents(raw)
    with database.session() as session:
        runs = RunRepository(session)
        assert [node.node_id for node in runs.advance(run_id)] == ["a"]
        nodes: list[NodeRunRead] = runs.advance(run_id, [done("a")])
        assert len(nodes) == 2
        assert contents(raw) == before  # and nobody else sees it yet
        session.rollback()
    assert contents(raw) == before


@pytest.mark.parametrize("call", [RunRepository.advance, RunRepository.record])
def test_a_result_with_an_unknown_key_is_refused_not_cut(session: Session, call: Any) -> None:
    results = [{"node_id": "a", "status": "completed", "outputs": {"text": "lost"}}]
    with pytest.raises(InvalidDataError, match=r"^results\[0\]\.outputs: Extra inputs are not permitted"):
        call(RunRepository(session), 1, results)
