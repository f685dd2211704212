"""Outcomes of nodes: which edges are taken, what is skipped, and what is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncRunRepository,
    Database,
    NodeResult,
    RunReport,
    RunRepository,
    RunStatus,
    untaken_successors,
)
from gathering_pipeline.errors import (
    IllegalTransitionError,
    InvalidDataError,
    LeaseLostError,
    NodeNotReadyError,
    NodeRunNotFoundError,
    RunOverError,
)
from tests.support.databases import contents
from tests.support.runs import claimed, done, started, statuses, store

BRANCHES = "c>y=true c>n=false c>both y>yy n>nn yy>j nn>j"
"""A condition with two branches that meet again, and an edge that is always taken."""


def untaken(runs: RunRepository, run_id: int, node_id: str = "c") -> list[int] | None:
    return next(node.untaken for node in runs.nodes(run_id) if node.node_id == node_id)


def by_complete_node(runs: RunRepository, run_id: int, node_id: str, branch: Any) -> object:
    return runs.complete_node(run_id, node_id, branch=branch)


def by_record(runs: RunRepository, run_id: int, node_id: str, branch: Any) -> object:
    return runs.record(run_id, [{"node_id": node_id, "status": "completed", "branch": branch}])


def by_advance(runs: RunRepository, run_id: int, node_id: str, branch: Any) -> object:
    return runs.advance(run_id, [{"node_id": node_id, "status": "completed", "branch": branch}])


CALLS = [by_complete_node, by_record, by_advance]
Call = Callable[[RunRepository, int, str, Any], object]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("spec", "branch", "dead"),
    [
        (BRANCHES, True, "n nn"),
        (BRANCHES, False, "y yy"),
        (BRANCHES, " TRUE\n", "n nn"),
        (BRANCHES, None, ""),
        ("c>a c>b", True, ""),
        ("c>a c>b", "true", ""),
        ("c>a c>b", False, "a b"),
        ("c>a=low c>b=HIGH c>x", "high", "a"),
        ("c>a=low c>b=HIGH c>x", "false", "a b"),  # no such edge: only those without a label
        ("c>a=low c>b=HIGH", True, "a b"),
        ("c>a=x c>a=y c>b=y", "x", "b"),  # parallel edges: one of them is enough
        ("c>a=x c>a c>b=y", "y", ""),
        ("c", False, ""),
        ("c>a=Ä c>b=ä", "ä", "a"),
    ],
)
def test_branch_takes_its_edges_and_skips_what_no_edge_is_alive_to(
    runs: RunRepository, session: Session, call: Call, spec: str, branch: Any, dead: str
) -> None:
    run_id = started(runs, session, spec)
    call(runs, run_id, "c", branch)
    found = statuses(runs, run_id)
    assert [name for name, status in found.items() if status == "skipped"] == dead.split()
    ends = {node.position: node.node_id for node in runs.nodes(run_id)}
    taken = [] if branch is None else untaken_successors(runs.definition(run_id), "c", branch)
    assert sorted(ends[at] for at in untaken(runs, run_id) or []) == sorted(taken)
    while runs.get(run_id).status == RunStatus.RUNNING:
        step = runs.advance(run_id)
        if running := [*step.started, *step.running]:
            runs.advance(run_id, [done(node.node_id) for node in running])
    assert runs.get(run_id).status == RunStatus.COMPLETED
    assert set(statuses(runs, run_id).values()) <= {"completed", "skipped"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("spec", "branch", "message"),
    [
        (
            "c>a=low c>b=High c>d",
            "x",
            "branch of node 'c' must be one of true, false, high, low, not 'x'",
        ),
        ("c>a c>b", "low", "branch of node 'c' must be true or false, as no edge of it has a condition, not 'low'"),
        ("c>a=true", "", "branch of node 'c' must be one of true, false, not ''"),
        ("c>a=Ä", "ä", "branch of node 'c' must be one of true, false, Ä, not 'ä'"),
        ("c>a", 1, "must be True, False or a string, not 1"),
        ("c>a", ["true"], r"must be True, False or a string, not \['true'\]"),
        ("c>a", "a\0", "NUL"),
    ],
)
def test_unknown_branch_raises_invalid_data_and_changes_nothing(
    runs: RunRepository,
    session: Session,
    refuses: Callable[..., Any],
    call: Call,
    spec: str,
    branch: Any,
    message: str,
) -> None:
    run_id = started(runs, session, spec)
    with refuses(InvalidDataError) as caught:
        call(runs, run_id, "c", branch)
    assert re.search(message, str(caught.value))
    if isinstance(branch, str) and "\0" not in branch:
        with pytest.raises(InvalidDataError, match=message):
            untaken_successors(runs.definition(run_id), "c", branch)


def test_branch_of_a_result_that_completes_nothing_is_refused(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "c>a=true")
    for status in ("failed", "skipped", "cancelled"):
        with pytest.raises(InvalidDataError, match=r"results\[0\].branch: .*only a completed node takes a branch"):
            runs.advance(run_id, [{"node_id": "c", "status": status, "branch": True}])


def test_join_waits_for_its_live_edges_only(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    run_id = started(runs, session, "c>j=true d>j=true e>j")
    runs.complete_node(run_id, "c", branch=False)
    runs.complete_node(run_id, "d", branch=False)
    with refuses(NodeNotReadyError) as caught:
        runs.start_node(run_id, "j")
    assert caught.value.waiting_for == ("e",)
    (step,) = runs.advance(run_id, [done("e", output={"x": 1})], inputs=True).started
    assert (step.node_id, step.inputs) == ("j", {"e": {"x": 1}})  # not what c and d say, which don't lead to it


@pytest.mark.parametrize("order", ["cde", "ced", "dce", "dec", "ecd", "edc"])
def test_join_of_dead_edges_is_skipped_whichever_comes_last(runs: RunRepository, session: Session, order: str) -> None:
    run_id = started(runs, session, "c>j=true d>j=yes e>j j>k k>end")
    for name in order:
        if name == "e":
            runs.skip_node(run_id, "e")
        else:
            runs.complete_node(run_id, name, branch=False)
    assert statuses(runs, run_id) == {
        **dict.fromkeys("cd", "completed"),
        **dict.fromkeys(("e", "j", "k", "end"), "skipped"),
    }
    assert runs.finish(run_id).status == RunStatus.COMPLETED


def test_nested_branches_skip_across_levels(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "c>d=true c>e=false d>f=true d>g=false e>j f>j g>x g>j x>y c>y=false")
    first = runs.advance(run_id)
    assert [node.node_id for node in first.started] == ["c"]
    second = runs.advance(run_id, [NodeResult(node_id="c", status="completed", branch=True)])
    assert [node.node_id for node in second.started] == ["d"]
    third = runs.advance(run_id, [NodeResult(node_id="d", status="completed", branch=True)])
    assert [node.node_id for node in third.started] == ["f"]
    assert [name for name, status in statuses(runs, run_id).items() if status == "skipped"] == ["e", "g", "x", "y"]
    assert [node.node_id for node in runs.advance(run_id, [done("f")]).started] == ["j"]
    assert runs.advance(run_id, [done("j")]).status == RunStatus.COMPLETED


def test_batch_with_branches_skips_and_starts_in_one_call(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a>x=true a>y=false b>y=true b>z=false")
    runs.advance(run_id)
    step = runs.advance(
        run_id,
        [
            {"node_id": "a", "status": "completed", "branch": True},
            {"node_id": "b", "status": "completed", "branch": False, "output": {"v": 1}},
        ],
    )
    assert [node.node_id for node in step.started] == ["x", "z"]
    assert statuses(runs, run_id)["y"] == "skipped"


def test_record_run_stores_branches(runs: RunRepository, session: Session, refuses: Callable[..., Any]) -> None:
    pipeline = store(session, BRANCHES)
    reports = [
        {"node_id": "c", "status": "completed", "branch": "False"},
        *({"node_id": name, "status": "completed"} for name in ("n", "both", "nn", "j")),
    ]
    run = runs.record_run(pipeline, reports)
    assert run.status == RunStatus.COMPLETED
    assert [name for name, status in statuses(runs, run.id).items() if status == "skipped"] == ["y", "yy"]
    assert untaken(runs, run.id) == [1]
    with refuses(InvalidDataError) as caught:
        runs.record_run(pipeline, [{"node_id": "c", "status": "completed", "branch": "maybe"}])
    assert re.search("node 'c' must be one of true, false, not 'maybe'", str(caught.value))
    with refuses(NodeRunNotFoundError):
        runs.record_run(pipeline, [{"node_id": "nowhere", "status": "completed", "branch": "maybe"}])


def test_branch_of_an_unknown_node_raises_not_found(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session, "c>a=true")
    for call in CALLS:
        with refuses(NodeRunNotFoundError):
            call(runs, run_id, "nowhere", "maybe")


def test_repeat_with_another_branch_is_refused(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "c>a=low c>b=high d>e")
    token = run.token
    runs.complete_node(run.id, "c", {"x": 1}, branch="low", token=token)
    runs.complete_node(run.id, "d", token=token)
    before = contents(raw)
    branches: tuple[str | None, ...] = ("low", " LOW ", None)
    for branch in branches:
        runs.complete_node(run.id, "c", {"x": 1}, branch=branch, token=token)
        runs.record(run.id, [NodeResult(node_id="c", status="completed", branch=branch)], token=token)
    runs.complete_node(run.id, "d", branch=True, token=token)  # no edge of it is dead, whether or not it has a branch
    assert contents(raw) == before
    others: tuple[str | bool, ...] = ("high", True)
    for other in others:
        with refuses(IllegalTransitionError) as caught:
            runs.complete_node(run.id, "c", {"x": 1}, branch=other, token=token)
        assert re.search("it completed with another branch", str(caught.value))
        with refuses(IllegalTransitionError) as caught:
            runs.advance(run.id, [NodeResult(node_id="c", status="completed", branch=other)], token=token)
        assert re.search("it completed with another branch", str(caught.value))
    with refuses(IllegalTransitionError) as caught:
        runs.complete_node(run.id, "d", branch=False, token=token)
    assert re.search("it completed with another branch", str(caught.value))
    with refuses(IllegalTransitionError) as caught:
        runs.complete_node(run.id, "c", {"x": 2}, branch="low", token=token)
    assert re.search("it completed with another output", str(caught.value))
    with refuses(InvalidDataError):
        runs.complete_node(run.id, "c", branch="maybe", token=token)
    with refuses(LeaseLostError):
        runs.complete_node(run.id, "c", branch="maybe", token=token - 1)


def test_repeat_with_a_branch_on_a_terminal_run(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "c>a=true")
    token = run.token
    ended = runs.advance(run.id, [NodeResult(node_id="c", status="completed", branch=False)], token=token)
    assert ended.status == RunStatus.COMPLETED
    assert runs.advance(run.id, [NodeResult(node_id="c", status="completed", branch="False")], token=token) == ended
    assert runs.complete_node(run.id, "c", branch=False, token=token).status == "completed"
    with refuses(RunOverError):
        runs.advance(run.id, [NodeResult(node_id="c", status="completed", branch=True)], token=token)
    with refuses(RunOverError):
        runs.complete_node(run.id, "c", branch=True, token=token)


def test_explicit_skip_of_what_a_branch_skipped_is_a_repeat(runs: RunRepository, session: Session) -> None:
    """As executors do that skip by themselves."""
    run_id = started(runs, session, BRANCHES)
    runs.complete_node(run_id, "c", branch=True)
    runs.skip_node(run_id, "n")
    runs.record(run_id, [done("n", "skipped"), done("y")])
    assert statuses(runs, run_id)["nn"] == "skipped"


def test_advance_many_leaves_a_branch_to_advance(
    runs: RunRepository, session: Session, database: Database, database_url: str
) -> None:
    pipeline = store(session, BRANCHES)
    ids = [runs.create(pipeline).id for _ in range(4)]
    runs.advance_many([RunReport(run_id) for run_id in ids])
    result = NodeResult(node_id="c", status="completed", branch=True)
    steps = runs.advance_many([RunReport(ids[0], [result]), RunReport(ids[1], [done("c")])])
    assert steps[0] is None
    assert steps[1] is not None
    assert [node.node_id for node in steps[1].started] == ["y", "n", "both"]
    assert untaken(runs, ids[0]) is None
    with database.group_commit() as grouped:
        assert [node.node_id for node in grouped.advance(ids[0], [result]).started] == ["y", "both"]

    async def together() -> list[list[str]]:
        async with Database(database_url) as own, own.group_commit() as grouped:
            made = await asyncio.gather(*(grouped.advance(run_id, [result]) for run_id in ids[2:]))
        return [[node.node_id for node in step.started] for step in made]

    assert asyncio.run(together()) == [["y", "both"]] * 2


def test_async_complete_node_takes_a_branch(runs: RunRepository, session: Session, database_url: str) -> None:
    run_id = started(runs, session, BRANCHES)

    async def complete() -> None:
        async with Database(database_url) as own, own.async_session(autocommit=True) as opened:
            await AsyncRunRepository(opened).complete_node(run_id, "c", branch=False)

    asyncio.run(complete())
    assert statuses(runs, run_id)["yy"] == "skipped"


def test_failed_attempt_and_retry_keep_no_branch(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = started(runs, session, "c>a=true c>b=false", retry_backoff_base=0)
    runs.start_node(run_id, "c")
    runs.fail_node(run_id, "c", "no")
    assert untaken(runs, run_id) is None
    runs.advance(run_id)
    (step,) = runs.advance(run_id, [{"node_id": "c", "status": "completed", "attempt": 2, "branch": True}]).started
    assert step.node_id == "a"


def test_branch_after_a_permanent_failure_starts_nothing(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "c>a=true c>b=false x", max_retries_per_node=0)
    runs.advance(run_id)
    runs.fail_node(run_id, "x", "no")
    step = runs.advance(run_id, [NodeResult(node_id="c", status="completed", branch=True)])
    assert (step.status, step.started) == (RunStatus.FAILED, ())
    assert statuses(runs, run_id) == {"c": "completed", "x": "failed", "a": "cancelled", "b": "skipped"}


def test_run_is_bound_to_the_branches_of_its_version(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = started(runs, session, "c>a=low c>b=high")
    raw.execute("UPDATE circle.pipelines SET edges = '[]'")
    runs.complete_node(run_id, "c", branch="low")
    assert statuses(runs, run_id)["b"] == "skipped"


def test_events_tell_what_is_completed_and_skipped(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run_id = started(runs, session, BRANCHES)
    runs.complete_node(run_id, "c", branch=True)
    events = raw.execute("SELECT type, node_id FROM circle.pipeline_events WHERE node_id IS NOT NULL ORDER BY xid, id")
    assert events.fetchall() == [
        ("pipeline_node.completed", "c"),
        ("pipeline_node.skipped", "n"),
        ("pipeline_node.skipped", "nn"),
    ]
    # by the branch: with a predecessor that completed and didn't take it; else by cascade
    rows = {node.position: node for node in runs.nodes(run_id)}
    by_branch = {
        node.node_id: any(rows[at].status == "completed" for at in node.predecessors or [])
        for node in rows.values()
        if node.status == "skipped"
    }
    assert by_branch == {"n": True, "nn": False}
