"""``explain``: each situation of a run and of a node, made by real calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.orm import Session

from gathering_pipeline import (
    AsyncRunRepository,
    ClaimedRun,
    Database,
    Explanation,
    HistoryKind,
    InvalidDataError,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    ReasonCode,
    RunRepository,
)
from tests.support.databases import scalar, unguarded
from tests.support.graphs import chain
from tests.support.runs import LEASE, done, lose_lease, store


@dataclass(frozen=True)
class World:
    """What a situation is made with; its runs have no timeout unless they are given one."""

    runs: RunRepository
    session: Session
    raw: psycopg.Connection

    def store(self, spec: str = "a>b", **fields: Any) -> int:
        return store(self.session, spec, **{"timeout_seconds": None, **fields})

    def new(self, spec: str = "a>b", **fields: Any) -> int:
        return self.runs.create(self.store(spec, **fields)).id

    def claim(self, spec: str = "a>b", **fields: Any) -> ClaimedRun:
        self.new(spec, **fields)
        return self.reclaim()

    def reclaim(self, worker: str = "w-1") -> ClaimedRun:
        (run,) = self.runs.claim(worker, LEASE)
        return run

    def pipeline_with_worker(self, spec: str = "a>b", **fields: Any) -> int:
        """A pipeline of which a run was just claimed."""
        pipeline = self.store(spec, **fields)
        self.runs.create(pipeline)
        self.runs.cancel(self.reclaim().id)
        return pipeline

    def insert(self, pipeline: int, status: str = "pending") -> int:
        """A run that SQL inserted."""
        insert = "INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, %s) RETURNING id"
        run_id: int = scalar(self.raw, insert, [pipeline, status])
        return run_id

    def lose(self, run: ClaimedRun) -> None:
        """As if the worker had died."""
        lose_lease(self.raw, run.id)

    def move_back(self, column: str, hours: int, run_id: int) -> None:
        """As if something had happened earlier."""
        name = sql.Identifier(column)
        update = sql.SQL("UPDATE circle.pipeline_runs SET {} = {} - make_interval(hours => %s) WHERE id = %s")
        self.raw.execute(update.format(name, name), [hours, run_id])


@dataclass(frozen=True)
class Situation:
    """How a run gets there, and what is then said about it and its nodes: codes, and words of each text."""

    make: Callable[[World], int]
    reasons: dict[ReasonCode, list[str]]
    nodes: dict[str, tuple[ReasonCode, list[str]]] = field(default_factory=dict)
    max_claims: int = 10


C = ReasonCode
HELD_BY_RUN = {name: (C.NODE_WAITS_FOR_RUN, [f"Node {name} waits until its run is running"]) for name in "ab"}
B_WAITS = {"b": (C.NODE_WAITS_FOR_PREDECESSORS, ["Node b waits for a."])}
A_READY = {"a": (C.NODE_READY, ["Node a can start, attempt 1 of 4."])}


def behind_others(world: World) -> int:
    pipeline = world.pipeline_with_worker()
    world.runs.create(pipeline)
    run = world.runs.create(pipeline)
    world.runs.create(pipeline)
    world.runs.create(pipeline, priority=1)
    return run.id


def first_in_queue(world: World) -> int:
    return world.runs.create(world.pipeline_with_worker()).id


def scheduled(world: World) -> int:
    run_at = datetime.now(UTC) + timedelta(hours=3, minutes=1)
    return world.runs.create(world.store(), run_at=run_at).id


def released_until_retry(world: World) -> int:
    run = world.claim(retry_backoff_base=600, retry_backoff_max=600)
    world.runs.advance(run.id, token=run.token)
    world.runs.fail_node(run.id, "a", "the model does not answer", token=run.token)
    world.runs.release(run.id, token=run.token)
    return run.id


def of_pipeline_that_is(status: PipelineStatus) -> Callable[[World], int]:
    def make(world: World) -> int:
        pipeline = world.store()
        run = world.runs.create(pipeline)
        PipelineRepository(world.session).update(pipeline, PipelineUpdate(status=status))
        return run.id

    return make


def paused_before_it_was_noted(world: World) -> int:
    run_id = of_pipeline_that_is(PipelineStatus.PAUSED)(world)
    with unguarded(world.raw, "pipelines"):
        world.raw.execute("UPDATE circle.pipelines SET status_changed_at = NULL")
    return run_id


def full(world: World) -> int:
    pipeline = world.store(max_running=2)
    for _ in range(3):
        world.runs.create(pipeline)
    claimed = [world.reclaim() for _ in range(2)]
    return claimed[-1].id + 1


def without_version(world: World) -> int:
    pipeline = world.store()
    world.raw.execute("SET session_replication_role = replica")  # as a subscriber stores the run of a broken graph
    run_id = world.insert(pipeline)
    world.raw.execute("RESET session_replication_role")
    return run_id


def without_nodes(world: World) -> int:
    return world.insert(world.pipeline_with_worker())


def with_wrong_nodes(world: World) -> int:
    run_id = world.insert(world.store())
    world.raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position) VALUES (%s, 'x', 'action', 1)",
        [run_id],
    )
    assert world.runs.claim("w-1", LEASE) == []
    return run_id


def recovered(world: World) -> int:
    run = world.claim(retry_backoff_base=0)
    world.lose(run)
    world.runs.recover()
    return run.id


def released(world: World) -> int:
    run = world.claim()
    world.runs.release(run.id, token=run.token, reason="the worker stops")
    return run.id


def recovered_often(world: World) -> int:
    run = world.claim()
    for _ in range(7):
        world.lose(run)
        world.runs.recover()
        run = world.reclaim()
    world.lose(run)
    world.runs.recover()
    return run.id


def never_claimed(world: World) -> int:
    return world.new()


def long_not_claimed(world: World) -> int:
    pipeline = world.pipeline_with_worker()
    run_id = world.runs.create(pipeline).id
    world.move_back("created_at", 1, run_id)
    world.raw.execute("UPDATE circle.pipeline_run_history SET at = at - interval '5 h'")
    with unguarded(world.raw, "pipelines"):
        world.raw.execute("UPDATE circle.pipelines SET status_changed_at = status_changed_at - interval '6 h'")
    return run_id


def executed(world: World) -> int:
    run = world.claim()
    world.runs.advance(run.id, token=run.token)
    return run.id


def lease_past(world: World) -> int:
    run = world.claim()
    world.runs.advance(run.id, token=run.token)
    world.lose(run)
    return run.id


def without_lease(world: World) -> int:
    run_id = world.new()
    world.runs.advance(run_id)
    return run_id


def only_claimed(world: World) -> int:
    return world.claim().id


def claimed_again_and_nothing_started(world: World) -> int:
    run = world.claim()
    world.runs.advance(run.id, token=run.token)
    world.runs.complete_node(run.id, "a", token=run.token)
    world.runs.release(run.id, token=run.token)
    world.reclaim("w-2")
    return run.id


def ready_and_not_started(world: World) -> int:
    run = world.claim("a>b a>c")
    world.runs.start_node(run.id, "a", token=run.token)
    world.runs.complete_node(run.id, "a", token=run.token)
    return run.id


def started_only(world: World) -> int:
    return world.runs.start(world.new("a")).id


def waits_for_retry(world: World) -> int:
    run = world.claim(retry_backoff_base=600, retry_backoff_max=600)
    world.runs.advance(run.id, token=run.token)
    world.runs.advance(run.id, [done("a", "failed", error="boom")], retry=True, token=run.token)
    return run.id


def draining(world: World) -> int:
    run = world.claim("a b c>d", retry_backoff_base=600, retry_backoff_max=600)
    world.runs.advance(run.id, token=run.token)
    world.runs.fail_node(run.id, "a", "boom", token=run.token)
    world.runs.fail_node(run.id, "b", "wrong key", False, token=run.token)
    return run.id


def past_timeout(world: World) -> int:
    run_id = world.new("a", timeout_seconds=60)
    world.runs.advance(run_id)
    world.move_back("started_at", 1, run_id)
    return run_id


def times_out(world: World) -> int:
    run_id = world.new("a", timeout_seconds=36_000)
    world.runs.advance(run_id)
    return run_id


def legacy(world: World) -> int:
    return world.insert(world.store(), "running")


def legacy_without_version(world: World) -> int:
    run_id = without_version(world)
    world.raw.execute("UPDATE circle.pipeline_runs SET status = 'running' WHERE id = %s", [run_id])
    return run_id


def waits_at_join(world: World) -> int:
    run_id = world.new("a>d b>d c>d")
    world.runs.advance(run_id)
    world.runs.complete_node(run_id, "b")
    return run_id


def reported_and_not_ended(world: World) -> int:
    run_id = world.new("a")
    world.runs.record(run_id, [done("a")])
    return run_id


def with_dead_node(world: World) -> int:
    run_id = world.new("a>b c")
    world.runs.advance(run_id)
    world.raw.execute(
        "UPDATE circle.pipeline_node_runs SET status = 'pending' WHERE run_id = %s AND node_id = 'a'", [run_id]
    )
    world.raw.execute(
        "UPDATE circle.pipeline_node_runs SET status = 'skipped' WHERE run_id = %s AND node_id = 'a'", [run_id]
    )
    return run_id


def skipped_in_each_way(world: World) -> int:
    run_id = world.new("a>b=yes a>c=no c>d a>e=yes f")
    world.runs.advance(run_id)
    world.runs.complete_node(run_id, "a", branch="yes")
    world.runs.skip_node(run_id, "e")
    return run_id


def second_attempt(world: World) -> int:
    run = world.claim("a", retry_backoff_base=0)
    world.runs.advance(run.id, token=run.token)
    world.runs.fail_node(run.id, "a", "boom", token=run.token)
    world.runs.advance(run.id, token=run.token)
    return run.id


def failed_by_node(world: World) -> int:
    run_id = world.new("a>b", max_retries_per_node=1, retry_backoff_base=0)
    for _ in range(2):
        world.runs.advance(run_id)
        world.runs.advance(run_id, [done("a", "failed", error="HTTP 500\nInternal Server Error")], retry=True)
    return run_id


def failed_by_call(world: World) -> int:
    return world.runs.fail(world.new(), "the disk is full").id


def failed_by_worker(world: World) -> int:
    run = world.claim()
    return world.runs.fail(run.id, "no such agent", token=run.token).id


def failed_after_recovery(world: World) -> int:
    """By a call, though a recovery stands last in its history."""
    return world.runs.fail(recovered(world), "given up").id


def failed_by_max_claims(world: World) -> int:
    run_id = recovered(world)
    world.lose(world.reclaim())
    world.runs.recover(max_claims=2)
    return run_id


def cancelled(world: World) -> int:
    return world.runs.cancel(world.new(), "not needed any more").id


def cancelled_with_its_node(world: World) -> int:
    run_id = world.new("a>b")
    world.runs.advance(run_id)
    world.runs.record(run_id, [done("a", "cancelled")])
    return world.runs.finish(run_id).id


def timed_out(world: World) -> int:
    run_id = past_timeout(world)
    assert [run.status for run in world.runs.expire()] == ["timeout"]
    return run_id


def completed(world: World) -> int:
    run_id = world.new("a")
    world.runs.advance(run_id)
    world.runs.advance(run_id, [done("a")])
    return run_id


SITUATIONS = {
    "claimable behind others": Situation(
        behind_others, {C.CLAIMABLE: ["Workers can claim it: 2 runs of pipeline 1 are claimed before it."]}, HELD_BY_RUN
    ),
    "first in the queue": Situation(
        first_in_queue, {C.CLAIMABLE: ["it is the first in the queue of pipeline 1."]}, HELD_BY_RUN
    ),
    "run_at is ahead": Situation(
        scheduled, {C.SCHEDULED: ["isn't claimed before its run_at, 2", " UTC (in 3 h)."]}, HELD_BY_RUN
    ),
    "released until a retry": Situation(
        released_until_retry,
        {
            C.WAITS_FOR_RETRY: ["It waits until 2", "(in 9 min) for the retry of node a."],
            C.RELEASED: ["Worker w-1 released it at"],
        },
        {
            "a": (
                C.NODE_WAITS_FOR_RETRY,
                ["starts again at", "attempt 2 of 4; attempt 1 failed: the model does not answer."],
            ),
            "b": HELD_BY_RUN["b"],
        },
    ),
    "paused": Situation(
        of_pipeline_that_is(PipelineStatus.PAUSED),
        {C.PAUSED: ["Pipeline 1 was paused at 2", "s ago): activate(1) lets workers claim its runs."]},
        HELD_BY_RUN,
    ),
    "paused before that was noted": Situation(
        paused_before_it_was_noted, {C.PAUSED: ["Pipeline 1 is paused: activate(1)"]}, HELD_BY_RUN
    ),
    "draft": Situation(
        of_pipeline_that_is(PipelineStatus.DRAFT),
        {C.DRAFT: ["Pipeline 1 became a draft at 2", "activate(1) lets workers claim its runs."]},
        HELD_BY_RUN,
    ),
    "full": Situation(
        full,
        {C.FULL: ["2 runs of pipeline 1 are running, and max_running is 2", "once one of these has ended: 1, 2."]},
        HELD_BY_RUN,
    ),
    "without version": Situation(without_version, {C.NO_VERSION: ["no version", "cancel it and create it again."]}),
    "without nodes": Situation(
        without_nodes,
        {C.CLAIMABLE: ["first in the queue"], C.NO_NODES: ["gets them when it is claimed, started or advanced."]},
    ),
    "whose nodes can't be created": Situation(
        with_wrong_nodes,
        {C.NO_NODES: ["A claim could not create its node runs", "the next one tries after 2", "(in 59 min)."]},
        {"x": (C.NODE_WAITS_FOR_RUN, ["Node x waits"])},
    ),
    "recovered": Situation(
        recovered,
        {
            C.CLAIMABLE: ["first"],
            C.RECOVERED: ["It was recovered from worker w-1 at 2", "s ago): the lease ended at 2"],
        },
        HELD_BY_RUN,
    ),
    "released": Situation(
        released,
        {C.CLAIMABLE: ["first"], C.RELEASED: ["Worker w-1 released it at 2", "s ago): the worker stops."]},
        HELD_BY_RUN,
    ),
    "close to max_claims": Situation(
        recovered_often,
        {
            C.CLAIMABLE: ["first"],
            C.RECOVERED: ["from worker w-1"],
            C.NEAR_MAX_CLAIMS: ["Its lease ran out 8 times: it fails when that has happened 10 times."],
        },
        HELD_BY_RUN,
    ),
    "far from max_claims": Situation(
        recovered_often, {C.CLAIMABLE: ["first"], C.RECOVERED: ["from worker w-1"]}, HELD_BY_RUN, max_claims=11
    ),
    "never claimed": Situation(
        never_claimed,
        {C.CLAIMABLE: ["first"], C.NO_WORKER: ["No worker has claimed any of the last runs of pipeline 1"]},
        HELD_BY_RUN,
    ),
    "long not claimed": Situation(
        long_not_claimed,
        {
            C.CLAIMABLE: ["first"],
            C.NO_WORKER: ["No worker has claimed a run of pipeline 1 since w-1 did so at 2", "(5 h ago)"],
        },
        HELD_BY_RUN,
    ),
    "executed": Situation(
        executed,
        {
            C.LEASED: [
                "Worker w-1 holds it: it claimed it at 2",
                "its lease ends at 2",
                "(in 4 min), node a has run since 2",
            ]
        },
        {"a": (C.NODE_RUNNING, ["Node a has run since 2", "s ago), attempt 1 of 4 by worker w-1."]), **B_WAITS},
    ),
    "lease past": Situation(
        lease_past,
        {C.LEASE_PAST: ["The lease of worker w-1 ended at 2", "s ago): the next claim or sweep() releases the run."]},
        {"a": (C.NODE_RUNNING, ["Node a has run since"]), **B_WAITS},
    ),
    "without lease": Situation(
        without_lease,
        {
            C.NO_LEASE: [
                "No worker holds it: it was started at 2",
                "its executor has to advance it, or cancel() ends it.",
            ]
        },
        {"a": (C.NODE_RUNNING, ["s ago), attempt 1 of 4."]), **B_WAITS},
    ),
    "claimed, nothing started": Situation(
        only_claimed,
        {
            C.LEASED: ["Worker w-1 holds it"],
            C.NOTHING_STARTED: ["has started no node since the claim: node a is ready."],
        },
        {**A_READY, **B_WAITS},
    ),
    "claimed again, nothing started": Situation(
        claimed_again_and_nothing_started,
        {C.LEASED: ["Worker w-2 holds it"], C.NOTHING_STARTED: ["node b is ready."]},
        {"b": (C.NODE_READY, ["Node b can start"])},
    ),
    "nodes are ready": Situation(
        ready_and_not_started,
        {C.LEASED: ["Worker w-1"], C.NODES_READY: ["nodes b, c are ready, and advance() starts them."]},
        {"b": (C.NODE_READY, ["can start"]), "c": (C.NODE_READY, ["can start"])},
    ),
    "started without a claim": Situation(
        started_only, {C.NO_LEASE: ["without a claim"], C.NODES_READY: ["node a is ready"]}, A_READY
    ),
    "waits for a retry": Situation(
        waits_for_retry,
        {C.LEASED: ["w-1"], C.WAITS_FOR_RETRY: ["It waits until 2", "(in 9 min) for the retry of node a."]},
        {"a": (C.NODE_WAITS_FOR_RETRY, ["(in 9 min), attempt 2 of 4; attempt 1 failed: boom."]), **B_WAITS},
    ),
    "draining": Situation(
        draining,
        {
            C.LEASED: ["node c has run since"],
            C.DRAINING: ["Node b failed: nothing else starts, and the run fails after nodes a, c."],
        },
        {
            "a": (C.NODE_WAITS_FOR_RETRY, ["boom"]),
            "b": (C.NODE_FAILED, ["Node b failed at 2", "attempt 1 of 4: wrong key."]),
            "c": (C.NODE_RUNNING, ["Node c has run"]),
            "d": (C.NODE_DRAINED, ["Node d doesn't start, because node b failed."]),
        },
    ),
    "past its timeout": Situation(
        past_timeout,
        {
            C.NO_LEASE: ["(60 min ago)"],
            C.PAST_TIMEOUT: ["Its timeout of 60 s ended at 2", "(59 min ago)", "sweep() ends the run."],
        },
        {"a": (C.NODE_RUNNING, ["Node a"])},
    ),
    "times out": Situation(
        times_out,
        {C.NO_LEASE: ["No worker"], C.TIMES_OUT: ["It times out at 2", "(in 9 h), 36000 s after its start."]},
        {"a": (C.NODE_RUNNING, ["Node a"])},
    ),
    "legacy run without nodes": Situation(
        legacy, {C.NO_LEASE: ["No worker"], C.WITHOUT_NODES: ["no node runs", "advance() gives it its nodes"]}
    ),
    "legacy run without version": Situation(
        legacy_without_version, {C.NO_LEASE: ["No worker"], C.WITHOUT_NODES: ["only that writer ends it, or cancel()"]}
    ),
    "waits at a join": Situation(
        waits_at_join,
        {C.NO_LEASE: ["No worker"]},
        {
            "a": (C.NODE_RUNNING, ["Node a"]),
            "c": (C.NODE_RUNNING, ["Node c"]),
            "d": (C.NODE_WAITS_FOR_PREDECESSORS, ["Node d waits for a, c."]),
        },
    ),
    "reported and not ended": Situation(
        reported_and_not_ended, {C.NO_LEASE: ["No worker"], C.NOT_ENDED: ["advance() or finish() ends it."]}
    ),
    "with a node that is to be skipped": Situation(
        with_dead_node,
        {C.NO_LEASE: ["No worker"]},
        {
            "a": (C.NODE_SKIPPED_BY_REPORT, ["Node a was reported as skipped."]),
            "b": (C.NODE_DEAD, ["no edge to it is alive: skip_node() skips it."]),
            "c": (C.NODE_RUNNING, ["Node c"]),
        },
    ),
    "with skipped nodes": Situation(
        skipped_in_each_way,
        {C.NO_LEASE: ["No worker"], C.NODES_READY: ["node b is ready"]},
        {
            "b": (C.NODE_READY, ["Node b"]),
            "c": (C.NODE_SKIPPED_BY_BRANCH, ["because node a completed with an outcome that doesn't take it."]),
            "d": (C.NODE_SKIPPED_BY_CASCADE, ["Node d is skipped, because all its predecessors are."]),
            "e": (C.NODE_SKIPPED_BY_REPORT, ["Node e was reported as skipped."]),
            "f": (C.NODE_RUNNING, ["Node f"]),
        },
    ),
    "second attempt": Situation(
        second_attempt, {C.LEASED: ["w-1"]}, {"a": (C.NODE_RUNNING, ["attempt 2 of 4 by worker w-1."])}
    ),
    "failed by a node": Situation(
        failed_by_node,
        {C.FAILED_BY_NODE: ["It failed with node a at 2", "after its start: HTTP 500 Internal Server Error."]},
        {"a": (C.NODE_FAILED, ["attempt 2 of 2: HTTP 500 Internal Server Error."])},
    ),
    "failed by a call": Situation(failed_by_call, {C.FAILED_BY_CALL: ["A call failed it at 2", ": the disk is full."]}),
    "failed by its worker": Situation(
        failed_by_worker, {C.FAILED_BY_CALL: ["A call failed it while worker w-1 held it at 2", ": no such agent."]}
    ),
    "failed by a call after a recovery": Situation(failed_after_recovery, {C.FAILED_BY_CALL: ["given up"]}),
    "failed by max_claims": Situation(
        failed_by_max_claims, {C.FAILED_BY_MAX_CLAIMS: ["when worker w-1 had lost it: its lease ran out 2 times."]}
    ),
    "cancelled": Situation(cancelled, {C.CANCELLED: ["Role ", " cancelled it at 2", ": not needed any more."]}),
    "cancelled with its node": Situation(cancelled_with_its_node, {C.CANCELLED: ["It was cancelled at 2"]}),
    "timed out": Situation(
        timed_out, {C.TIMED_OUT: ["It timed out at 2", "1 h 00 min after its start: timed out after 60"]}
    ),
    "completed": Situation(completed, {C.COMPLETED: ["It completed at 2", " after its start."]}),
}


@pytest.fixture
def world(runs: RunRepository, session: Session, raw: psycopg.Connection) -> World:
    return World(runs, session, raw)


@pytest.mark.parametrize("name", SITUATIONS)
def test_explain_tells_each_situation(world: World, name: str) -> None:
    wanted = SITUATIONS[name]
    explanation = world.runs.explain(wanted.make(world), max_claims=wanted.max_claims)
    assert [reason.code for reason in explanation.reasons] == list(wanted.reasons), str(explanation)
    assert {node.node_id: node.code for node in explanation.nodes} == {
        node_id: code for node_id, (code, _) in wanted.nodes.items()
    }
    texts = [(reason.text, wanted.reasons[reason.code]) for reason in explanation.reasons]
    texts += [(node.text, wanted.nodes[node.node_id][1]) for node in explanation.nodes]
    for text, words in texts:
        assert text.endswith(".")
        for word in words:
            assert word in text
    assert explanation.more_nodes == 0


def test_situations_cover_every_code() -> None:
    covered = {code for situation in SITUATIONS.values() for code in situation.reasons}
    covered |= {code for situation in SITUATIONS.values() for code, _ in situation.nodes.values()}
    assert set(ReasonCode) - covered == {C.RESUMED_AS, C.NODE_TAKEN_OVER}  # the tests below have them


def test_explanation_as_text_is_for_people(world: World) -> None:
    run_id = draining(world)
    lines = str(world.runs.explain(run_id)).splitlines()
    assert lines[0].startswith(f"Run {run_id} is running. Worker w-1 holds it: it claimed it at ")
    assert "Node b failed: nothing else starts" in lines[0]
    assert [line[:6] for line in lines[1:]] == ["Node a", "Node b", "Node c", "Node d"]
    assert len(str(world.runs.explain(world.new(chain(30)))).splitlines()) == 1  # all of its nodes wait for the run


def test_explain_long_names_and_errors_tells_them_in_short(world: World) -> None:
    run_id = world.new("a>b")
    world.runs.advance(run_id)
    world.runs.fail(run_id, "x" * 1_000_000)
    assert len(str(world.runs.explain(run_id))) < 1_000


def test_explain_large_run_lists_what_matters_first(world: World) -> None:
    nodes = 1_000
    run_id = world.new(" ".join(f"a>n{at} n{at}>z" for at in range(nodes)))
    world.runs.advance(run_id)
    world.runs.advance(run_id, [done("a")])
    world.runs.record(run_id, [done(f"n{at}") for at in range(800, nodes - 1)])
    world.runs.fail_node(run_id, f"n{nodes - 1}", "boom", False)
    explanation = world.runs.explain(run_id)
    assert len(explanation.nodes) == 100
    assert explanation.more_nodes == 800 + 2 - 100
    assert explanation.nodes[-1].code is C.NODE_FAILED  # though it is the last in execution order
    assert {node.code for node in explanation.nodes[:-1]} == {C.NODE_RUNNING}
    (draining,) = (reason for reason in explanation.reasons if reason.code is C.DRAINING)
    assert draining.text.endswith("n9 and 790 more.")
    assert str(explanation).endswith("\nAnd 792 more nodes.")
    world.runs.complete_node(run_id, "n0")


def test_explain_join_names_the_first_of_many_predecessors(world: World) -> None:
    run_id = world.new(" ".join(f"n{at}>z" for at in range(150)))
    world.runs.start(run_id)
    world.runs.record(run_id, [done(f"n{at}") for at in range(100)])
    (join,) = (node for node in world.runs.explain(run_id).nodes if node.node_id == "z")
    assert join.text == f"Node z waits for {', '.join(f'n{at}' for at in range(100, 110))} and 40 more."


def test_explain_tells_the_last_claims_without_their_tokens(world: World, raw: psycopg.Connection) -> None:
    run = world.claim()
    for number in range(12):
        world.runs.release(run.id, token=run.token, reason=f"turn {number}")
        run = world.reclaim(f"w-{number}")
    world.runs.cancel(run.id, "enough")
    explanation = world.runs.explain(run.id)
    kinds = [HistoryKind.CLAIMED, HistoryKind.RELEASED] * 10 + [HistoryKind.CLAIMED, HistoryKind.CANCELLED]
    assert [entry.kind for entry in explanation.history] == kinds[-20:]
    assert [entry.reason for entry in explanation.history[-3:]] == ["turn 11", None, "enough"]
    assert [entry.worker_id for entry in explanation.history[-2:]] == ["w-11", scalar(raw, "SELECT session_user")]
    assert [entry.at for entry in explanation.history] == sorted(entry.at for entry in explanation.history)
    facts = scalar(raw, "SELECT circle.explain_run(%s)::text", [run.id])
    tokens = [token for (token,) in raw.execute("SELECT token FROM circle.pipeline_run_history WHERE token > 0")]
    assert [token for token in tokens if str(token) in facts + explanation.model_dump_json()] == []


def test_explain_behind_very_many_runs_counts_a_thousand(world: World) -> None:
    pipeline = world.pipeline_with_worker()
    world.raw.execute(
        "INSERT INTO circle.pipeline_runs (pipeline_id) SELECT %s FROM generate_series(1, 1100)", [pipeline]
    )
    first, *_ = world.runs.explain(world.runs.create(pipeline).id).reasons
    assert "at least 1,000 runs of pipeline" in first.text


def test_explain_sees_the_claims_before_a_long_queue(world: World) -> None:
    """The last 100 runs were never claimed, but workers claim those before them."""
    pipeline = world.store()
    for _ in range(150):
        world.runs.create(pipeline)
    world.runs.fail(
        world.reclaim().id, "x", token=scalar(world.raw, "SELECT max(claim_token) FROM circle.pipeline_runs")
    )
    last = world.runs.create(pipeline).id
    assert [reason.code for reason in world.runs.explain(last).reasons] == [C.CLAIMABLE]


def test_explain_has_the_error_of_an_attempt_that_failed_and_not_of_the_next_one(world: World) -> None:
    def errors() -> dict[str, str | None]:
        return {node.node_id: node.error for node in world.runs.explain(run.id).nodes}

    run = world.claim("a b", retry_backoff_base=0.0)
    world.runs.advance(run.id, token=run.token)
    world.runs.fail_node(run.id, "a", "boom", token=run.token)
    assert errors() == {"a": "boom", "b": None}
    world.runs.start_node(run.id, "a", token=run.token)
    assert errors() == {"a": None, "b": None}


def test_explain_of_a_failed_run_names_calls_that_succeed(world: World) -> None:
    run_id = world.new("a")
    pipelines = PipelineRepository(world.session)
    pipeline = world.runs.fail(run_id, "no luck").pipeline_id
    pipelines.pause(pipeline)
    assert "Once its pipeline is active, resume() continues it" in str(world.runs.explain(run_id))
    pipelines.activate(pipeline)
    assert "Once" not in str(world.runs.explain(run_id))
    assert world.runs.resume(run_id).resumed_from == run_id


def test_explanation_as_text_counts_no_nodes_that_have_nothing_to_tell(world: World) -> None:
    run = world.claim(" ".join(f"n{at}" for at in range(150)), retry_backoff_base=600, retry_backoff_max=600)
    world.runs.advance(run.id, token=run.token)
    assert str(world.runs.explain(run.id)).endswith("more nodes.")
    world.runs.fail_node(run.id, "n7", "boom", token=run.token)
    world.runs.release(run.id, token=run.token)
    (line,) = str(world.runs.explain(run.id)).splitlines()[1:]
    assert "n7" in line


def test_explain_in_a_transaction_sees_its_own_changes(database: Database) -> None:
    with database.session() as session:
        runs = RunRepository(session)
        run_id = runs.create(store(session)).id
        assert runs.explain(run_id).status == "pending"
        runs.advance(run_id)
        assert runs.explain(run_id).nodes[0].code is C.NODE_RUNNING


def test_explain_of_a_resumed_run_tells_the_new_run_and_taken_over_nodes(world: World) -> None:
    old = world.runs.create(world.store("a>b")).id
    world.runs.record(old, [done("a")])
    world.runs.fail(old, "no luck")
    new = world.runs.resume(old).id
    assert (C.RESUMED_AS, f"It was resumed as run {new}.") in [
        (r.code, r.text) for r in world.runs.explain(old).reasons
    ]
    explanation = world.runs.explain(new)
    assert [(entry.kind, entry.reason) for entry in explanation.history] == [("resumed", f"from run {old}")]
    assert (C.NODE_TAKEN_OVER, f"Node a has its result from run {old}.") in [
        (n.code, n.text) for n in explanation.nodes
    ]


def test_async_explain_answers_like_sync(database_url: str, world: World) -> None:
    run_id = executed(world)

    async def ask() -> Explanation:
        async with Database(database_url) as database, database.async_session() as session:
            return await AsyncRunRepository(session).explain(run_id)

    explanation, found = world.runs.explain(run_id), asyncio.run(ask())
    assert [reason.code for reason in found.reasons] == [reason.code for reason in explanation.reasons]
    assert found.history == explanation.history


@pytest.mark.parametrize("bad", [0, -1, None, "10", True])
def test_explain_with_a_wrong_max_claims_raises_invalid_data(world: World, bad: Any) -> None:
    with pytest.raises(InvalidDataError, match="max_claims must be a whole number"):
        world.runs.explain(1, max_claims=bad)
