"""``resume``, ``rerun``, ``resume_all`` and ``cancel_all``."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    EventRepository,
    IllegalTransitionError,
    InvalidDataError,
    InvalidPipelineError,
    NodeRunRead,
    PipelineInactiveError,
    PipelineRepository,
    PipelineUpdate,
    RunNotFoundError,
    RunRead,
    RunReport,
    RunRepository,
    RunStatus,
)
from tests.support.databases import Connect, scalar, unguarded
from tests.support.graphs import DIAMOND, graph
from tests.support.runs import LEASE, counters, done, started, statuses, store
from tests.support.sessions import BLOCKED


def failed(runs: RunRepository, session: Session, spec: str = DIAMOND, completed: str = "a", **create: Any) -> int:
    """The id of a run that failed after some of its nodes completed."""
    run_id = runs.create(store(session, spec), **create).id
    runs.record(run_id, [done(name, output={"by": name}) for name in completed])
    runs.fail(run_id, "no luck")
    return run_id


def taken(nodes: list[NodeRunRead]) -> list[str]:
    return [node.node_id for node in nodes if node.taken_from is not None]


@pytest.mark.parametrize("call", ["resume", "rerun"])
@pytest.mark.parametrize(
    "delete",
    [
        "DELETE FROM circle.pipeline_runs WHERE id = %s",
        "SELECT circle.delete_pipeline(pipeline_id, true) FROM circle.pipeline_runs WHERE id = %s",
    ],
    ids=["run", "pipeline"],
)
def test_run_that_is_deleted_meanwhile_does_not_exist(
    call: str,
    delete: LiteralString,
    database: Database,
    runs: RunRepository,
    session: Session,
    raw: psycopg.Connection,
    connect: Connect,
    database_url: str,
) -> None:
    old = failed(runs, session)
    session.commit()
    holder = connect(database_url)
    holder.execute("BEGIN")
    holder.execute(delete, [old])

    def call_again() -> RunRead:
        with database.session() as other:
            again: RunRead = getattr(RunRepository(other), call)(old)
            return again

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(call_again)
        waits = call == "resume" or "pipeline(" in delete  # a rerun doesn't refer to the old run
        while waits and raw.execute(BLOCKED).fetchone() is None:
            time.sleep(0.005)
        if not waits:
            assert answer.result(30).status == RunStatus.PENDING
            return
        holder.execute("COMMIT")
        with pytest.raises(RunNotFoundError):
            answer.result(30)


def test_resume_goes_on_where_the_run_ended(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    old = failed(runs, session, completed="ab", trigger_data={"x": 1}, priority=7, tags={"k": "v"}, idempotency_key="k")
    before = runs.nodes(old)
    run = runs.resume(old)
    assert (run.status, run.resumed_from, run.trigger_data, run.priority) == ("pending", old, {"x": 1}, 7)
    assert (run.idempotency_key, run.run_at, run.failed_node) == (None, None, None)
    assert runs.tags(run.id) == {"k": "v"}
    nodes = runs.nodes(run.id)
    assert taken(nodes) == ["a", "b"]
    for node, other in zip(nodes[:2], before[:2], strict=True):
        assert node == other.model_copy(update={"id": node.id, "run_id": run.id, "taken_from": old})
    assert [(node.status, node.output_data, node.started_at) for node in nodes[2:]] == [("pending", {}, None)] * 2
    assert [node.node_id for node in runs.advance(run.id, inputs=True).started] == ["c"]
    (last,) = runs.advance(run.id, [done("c", output={"by": "c"})], inputs=True).started
    assert last.inputs == {"b": {"by": "b"}, "c": {"by": "c"}}
    assert runs.advance(run.id, [done("d")]).status == RunStatus.COMPLETED
    session.commit()
    events = EventRepository(session).read(run_id=run.id).items
    assert [(event.type, event.node_id) for event in events[:2]] == [
        ("pipeline_run.started", None),
        ("pipeline_node.started", "c"),
    ]
    assert events[0].data == {"resumed_from": old, "taken_over": 2}
    assert runs.nodes(old) == before
    assert counters(raw, run.pipeline_id) == (2, 1, 1)


def test_resume_twice_returns_the_last_of_the_chain(runs: RunRepository, session: Session) -> None:
    old = failed(runs, session, completed="")
    first = runs.resume(old)
    assert runs.resume(old) == first
    runs.record(first.id, [done("a")])
    assert runs.resume(old).status == RunStatus.RUNNING
    runs.cancel(first.id)
    second = runs.resume(old)
    assert (second.resumed_from, taken(runs.nodes(second.id))) == (first.id, ["a"])
    assert runs.resume(first.id) == second
    runs.advance(second.id)
    runs.advance(second.id, [done("b"), done("c")])
    runs.fail(second.id, "again")
    third = runs.resume(first.id)
    nodes = runs.nodes(third.id)
    assert [(node.node_id, node.taken_from) for node in nodes[:3]] == [
        ("a", first.id),
        ("b", second.id),
        ("c", second.id),
    ]
    runs.advance(third.id)
    runs.advance(third.id, [done("d")])
    assert runs.resume(old).status == RunStatus.COMPLETED
    with pytest.raises(IllegalTransitionError, match="only a failed, cancelled or timed-out run can be"):
        runs.resume(third.id)


def test_resume_is_refused(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    live, old = started(runs, session, "a"), failed(runs, session, "a", "")
    paused = failed(runs, session, "a", "")
    PipelineRepository(session).pause(runs.get(paused).pipeline_id)
    without = failed(runs, session, "a", "")
    session.commit()
    with unguarded(raw, "pipeline_runs"):
        raw.execute("UPDATE circle.pipeline_runs SET pipeline_version = NULL WHERE id = %s", [without])
    cases: list[tuple[int, type[Exception], str]] = [
        (live, IllegalTransitionError, "only a failed, cancelled or timed-out run"),
        (paused, PipelineInactiveError, "is paused"),
        (without, InvalidPipelineError, "bound to no version"),
        (-1, RunNotFoundError, "run -1"),
    ]
    for run_id, error, message in cases:
        with refuses(error) as caught:
            runs.resume(run_id)
        assert message in str(caught.value)
    assert runs.resume(old).resumed_from == old


def test_resume_keeps_the_version_and_rerun_takes_the_current(runs: RunRepository, session: Session) -> None:
    old = failed(runs, session, "a>b", "a", tags={"k": "v"}, priority=3)
    pipeline = runs.get(old).pipeline_id
    nodes, edges = graph("x>y y>z")
    PipelineRepository(session).update(pipeline, PipelineUpdate(nodes=nodes, edges=edges))
    resumed, again = runs.resume(old), runs.rerun(old)
    assert (resumed.pipeline_version, list(statuses(runs, resumed.id))) == (1, ["a", "b"])
    assert (again.pipeline_version, statuses(runs, again.id)) == (2, dict.fromkeys("xyz", "pending"))
    assert (again.priority, runs.tags(again.id), again.resumed_from) == (3, {"k": "v"}, None)
    assert runs.rerun(old, idempotency_key="k").id == runs.rerun(again.id, idempotency_key="k").id
    with pytest.raises(RunNotFoundError):
        runs.rerun(-1)


def test_node_is_taken_over_with_its_ancestors_only(runs: RunRepository, session: Session) -> None:
    """An executor may report a node before its predecessors."""
    run_id = runs.create(store(session, "a>b b>c x>c x>y")).id
    runs.record(run_id, [done("b"), done("c"), done("x"), done("y", "skipped")])
    runs.fail(run_id, "no luck")
    assert taken(runs.nodes(runs.resume(run_id).id)) == ["x", "y"]


def test_resume_takes_branches_over(runs: RunRepository, session: Session) -> None:
    nodes, edges = graph("c>t c>f t>j f>j")
    for edge in edges[:2]:
        edge["condition"] = {"t": "true", "f": "false"}[edge["to"]]
    run_id = runs.create(store(session, nodes=nodes, edges=edges)).id
    runs.advance(run_id)
    assert [
        node.node_id for node in runs.advance(run_id, [{"node_id": "c", "status": "completed", "branch": True}]).started
    ] == ["t"]
    runs.fail(run_id, "no luck")
    run = runs.resume(run_id)
    assert statuses(runs, run.id) == {"c": "completed", "t": "pending", "f": "skipped", "j": "pending"}
    assert [node.node_id for node in runs.advance(run.id).started] == ["t"]
    assert [node.node_id for node in runs.advance(run.id, [done("t")]).started] == ["j"]


def test_resumed_run_is_claimed_and_advanced_in_a_batch(runs: RunRepository, session: Session) -> None:
    run = runs.resume(failed(runs, session, "a>b", "a"))
    assert runs.advance_many([RunReport(run.id)]) == [None]
    (held,) = runs.claim("w", LEASE)
    assert held.id == run.id
    assert [node.node_id for node in runs.advance(run.id, token=held.token).started] == ["b"]
    (step,) = runs.advance_many([RunReport(run.id, [done("b")], held.token)])
    assert step is not None
    assert step.status == RunStatus.COMPLETED


def test_resume_when_nothing_is_left_completes(runs: RunRepository, session: Session) -> None:
    run = runs.resume(failed(runs, session, "a>b", "ab"))
    assert runs.advance(run.id).status == RunStatus.COMPLETED


def test_purge_of_the_old_run_leaves_the_resumed_one(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    old = failed(runs, session)
    run = runs.resume(old)
    session.commit()
    assert runs.purge(timedelta(0)).deleted == 1
    session.commit()
    assert runs.get(run.id).resumed_from is None
    assert taken(runs.nodes(run.id)) == ["a"]
    assert [node.node_id for node in runs.advance(run.id).started] == ["b", "c"]


@pytest.mark.parametrize("seed", range(20))
def test_random_run_resumes_to_its_end(runs: RunRepository, session: Session, seed: int) -> None:
    chance = random.Random(seed)
    names = [f"n{at}" for at in range(12)]
    spec = " ".join(f"{a}>{b}" for at, b in enumerate(names) for a in chance.sample(names[:at], min(at, 2)))
    run_id = runs.create(store(session, spec)).id
    executed: list[str] = []
    for _ in range(30):
        step = runs.advance(run_id)
        while step.started:
            if chance.random() < 0.25:
                chance.choice([lambda run_id: runs.fail(run_id, "x"), runs.cancel])(run_id)
                run_id = runs.resume(run_id).id
                break
            node = chance.choice(runs.advance(run_id).started or step.started)
            running = [n.node_id for n in runs.nodes(run_id) if n.status == "running"]
            name = node.node_id if node.node_id in running else running[0]
            executed.append(name)
            step = runs.advance(run_id, [done(name)])
            if not step.started and step.status == "running":
                step = step.model_copy(update={"started": step.running})
        else:
            break
    assert runs.get(run_id).status == RunStatus.COMPLETED
    assert sorted(executed) == sorted(names)  # each once, though the run was resumed


# --- raw writers -------------------------------------------------------------------------------------------------------


def test_raw_writer_forges_no_origin(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    old, other = failed(runs, session), failed(runs, session)
    live = started(runs, session)
    run = runs.resume(old)
    pipeline = run.pipeline_id
    session.commit()
    forged: list[tuple[str, list[object]]] = [
        ("UPDATE circle.pipeline_runs SET resumed_from = %s WHERE id = %s", [other, run.id]),
        ("UPDATE circle.pipeline_runs SET resumed_from = NULL WHERE id = %s", [run.id]),
        ("UPDATE circle.pipeline_runs SET status = 'running', resumed_from = NULL WHERE id = %s", [run.id]),
        ("INSERT INTO circle.pipeline_runs (pipeline_id, resumed_from) VALUES (%s, %s)", [pipeline, other]),
        (
            (
                "INSERT INTO circle.pipeline_runs (pipeline_id, resumed_from)"
                " SELECT pipeline_id, id FROM circle.pipeline_runs WHERE id = %s"
            ),
            [live],
        ),
        ("UPDATE circle.pipeline_node_runs SET taken_from = %s WHERE run_id = %s", [old, run.id]),
        (
            "UPDATE circle.pipeline_node_runs SET status = 'running', taken_from = %s WHERE run_id = %s AND node_id = 'a'",
            [old, live],
        ),
        (
            (
                "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, taken_from)"
                " VALUES (%s, 'new', 'agent', 'completed', %s)"
            ),
            [live, old],
        ),
    ]
    for statement, parameters in forged:
        with refuses(psycopg.errors.IntegrityConstraintViolation):
            raw.execute(statement.encode(), parameters)
    with refuses(psycopg.errors.UniqueViolation):
        raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, resumed_from) VALUES (%s, %s)", [pipeline, old])


def test_raw_insert_of_a_resumed_run_is_bound_to_the_old_version(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    old = failed(runs, session, "a>b", "a")
    pipeline = runs.get(old).pipeline_id
    nodes, edges = graph("x")
    PipelineRepository(session).update(pipeline, PipelineUpdate(nodes=nodes, edges=edges))
    session.commit()
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, resumed_from) VALUES (%s, %s)", [pipeline, old])
    run = runs.resume(old)
    assert (run.pipeline_version, run.resumed_from) == (1, old)
    runs.start(run.id)
    assert list(statuses(runs, run.id)) == ["a", "b"]


# --- many --------------------------------------------------------------------------------------------------------------


def test_cancel_all_and_resume_all_go_through_pages(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline, other = store(session, "a"), store(session, "a")
    ids = [runs.create(pipeline, tags={"half": str(at % 2)}).id for at in range(10)]
    runs.create(other)
    ended = runs.start(ids[0]).id
    runs.advance(ended)
    runs.advance(ended, [done("a")])
    cancelled: list[int] = []
    after = None
    while True:
        changed = runs.cancel_all(pipeline, after=after, limit=3, reason="stop")
        assert changed.refused == {}
        assert {run.error_message for run in changed.runs} <= {"stop"}
        cancelled += [run.id for run in changed.runs]
        if (after := changed.next_cursor) is None:
            break
    assert sorted(cancelled) == ids[1:]
    assert runs.counts()[RunStatus.PENDING] == 1
    assert runs.resume_all(pipeline).runs == ()  # cancelled ones only if they are asked for
    changed = runs.resume_all(pipeline, RunStatus.CANCELLED, tags={"half": "1"})
    assert sorted(run.resumed_from or 0 for run in changed.runs) == ids[1::2]
    again = runs.resume_all(pipeline, RunStatus.CANCELLED, tags={"half": "1"})
    assert {run.id for run in again.runs} >= {run.id for run in changed.runs}
    PipelineRepository(session).pause(pipeline)
    changed = runs.resume_all(pipeline, [RunStatus.CANCELLED, RunStatus.COMPLETED], tags={"half": "0"})
    assert changed.runs == ()
    assert set(changed.refused) == set(ids[::2])
    assert "is paused" in changed.refused[ids[2]]
    assert "only a failed, cancelled or timed-out run" in changed.refused[ids[0]]
    with pytest.raises(InvalidDataError):
        runs.cancel_all(status="done")  # type: ignore[arg-type]
    session.commit()
    assert scalar(raw, "SELECT count(*) FROM circle.pipeline_runs") == 11 + len(ids[1::2])
