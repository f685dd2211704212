"""``RunRepository.advance_many``."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import RunReport, RunRepository, RunStatus, is_transient
from gathering_pipeline.errors import InvalidDataError, TransactionConflictError
from tests.support.databases import Connect, contents
from tests.support.events import names, read_all
from tests.support.runs import LEASE, counters, done, started, statuses, store


def test_advance_many_does_what_advance_does(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    """Random graphs are taken to their ends twice: each run by itself, and all runs together."""
    chance = random.Random(20261127)
    pipelines = []
    for _ in range(20):
        size = chance.randint(1, 8)
        edges = [f"n{a}>n{b}" for b in range(size) for a in range(b) if chance.random() < 0.4]
        pipelines.append(store(session, " ".join([*(f"n{at}" for at in range(size)), *edges])))
    many = [runs.create(pipeline).id for pipeline in pipelines]
    twins = dict(zip(many, (runs.create(pipeline).id for pipeline in pipelines), strict=True))
    running: dict[int, set[str]] = {run_id: set() for run_id in many}
    reports: dict[int, list[Any]] = {run_id: [] for run_id in many}
    live = many
    while live:
        live = chance.sample(live, len(live))
        inputs = {run_id: chance.random() < 0.5 for run_id in live}
        steps = runs.advance_many([RunReport(run_id, reports[run_id], inputs=inputs[run_id]) for run_id in live])
        for run_id, step in zip(live, steps, strict=True):
            assert step == runs.advance(twins[run_id], reports[run_id], inputs=inputs[run_id])
            assert step is not None
            running[run_id] -= {result.node_id for result in reports[run_id]}
            running[run_id] |= {node.node_id for node in step.started}
            most = len(running[run_id])
            finished = chance.sample(sorted(running[run_id]), chance.randint(min(1, most), most))
            reports[run_id] = [done(name, output={"of": name}) for name in finished]
        live = [run_id for run_id in live if running[run_id]]
    for pipeline, (run_id, twin) in zip(pipelines, twins.items(), strict=True):
        assert runs.get(run_id).status == runs.get(twin).status == RunStatus.COMPLETED
        assert statuses(runs, run_id) == statuses(runs, twin)
        assert names(read_all(session, run_id)) == names(read_all(session, twin))
        assert counters(raw, pipeline) == (2, 2, 0)


def test_advance_many_leaves_out_what_is_not_plain(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a b", max_retries_per_node=1)
    plain, failed, skipping, unknown, twice, polling, over, stale, repeated = (
        started(runs, session, "a b") for _ in range(9)
    )
    runs.cancel(over)
    runs.record(failed, [done("b", "failed")])
    runs.create(pipeline)
    (claimed,) = runs.claim("worker", LEASE)
    runs.record(repeated, [done("a")])
    before = (failed, skipping, unknown, twice, polling, over, claimed.id, repeated, stale)
    left = {run_id: (runs.get(run_id), runs.nodes(run_id)) for run_id in before}
    steps = runs.advance_many(
        [
            RunReport(failed, [done("a")]),
            RunReport(skipping, [done("a", "skipped")]),
            RunReport(unknown, [done("a"), done("nowhere")]),
            RunReport(twice, [done("a"), done("a")]),
            RunReport(polling),
            RunReport(over, [done("a")]),
            RunReport(claimed.id, [done("a")], claimed.token + 1),
            RunReport(repeated, [done("a"), done("b")]),
            RunReport(stale, [{"node_id": "a", "status": "completed", "attempt": 2}]),
            RunReport(10**9, [done("a")]),
            RunReport(plain, [done("a")]),
        ]
    )
    assert steps[:-1] == [None] * 10
    assert steps[-1] is not None
    assert steps[-1].status == RunStatus.RUNNING
    assert statuses(runs, plain) == {"a": "completed", "b": "running"}
    assert {run_id: (runs.get(run_id), runs.nodes(run_id)) for run_id in before} == left
    (alone,) = runs.advance_many([RunReport(claimed.id, [done("a")], claimed.token)])
    assert alone is not None


def test_advance_many_waits_for_no_locked_run(
    runs: RunRepository, session: Session, raw: psycopg.Connection, database_url: str, connect: Connect
) -> None:
    locked, free = started(runs, session, "a"), started(runs, session, "a")
    with connect(database_url) as other, other.transaction():
        other.execute("SELECT FROM circle.pipeline_runs WHERE id = %s FOR UPDATE", [locked])
        steps = runs.advance_many([RunReport(locked, [done("a")]), RunReport(free, [done("a")])])
    assert steps[0] is None
    assert steps[1] is not None
    assert (runs.get(locked).status, runs.get(free).status) == ("running", "completed")


def test_advance_many_of_one_run_twice_raises_invalid_data(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run_id = started(runs, session, "a b")
    with refuses(InvalidDataError):
        runs.advance_many([RunReport(run_id, [done("a")]), RunReport(run_id, [done("b")])])
    with refuses(InvalidDataError):
        runs.advance_many([RunReport(run_id, [{"node_id": "a", "status": "running"}])])
    assert runs.advance_many([]) == []
    nobody: Any = None
    cases: list[tuple[Any, str]] = [
        ("x", r"reports\[0\] must be of type RunReport"),
        (7, "reports must be of type Iterable"),
        ([{"run_id": 1}], r"reports\[0\] must be of type RunReport, not dict"),
        ([RunReport(run_id), RunReport(7, [{"node_id": "a"}])], r"reports\[1\].results\[0\].status"),
        ([RunReport(nobody)], r"reports\[0\].run_id"),
        ([RunReport(run_id, [{"node_id": "a", "status": "completed", "attempt": "1"}])], r"results\[0\].attempt"),
        ([RunReport(run_id, [{"node_id": "a", "status": "completed", "duration_ms": True}])], "duration_ms"),
    ]
    for bad, path in cases:
        with refuses(InvalidDataError) as caught:
            runs.advance_many(bad)
        assert re.search(path, str(caught.value))


def test_advance_many_with_node_that_is_locked_raises_transient_and_changes_nothing(
    runs: RunRepository, session: Session, raw: psycopg.Connection, database_url: str, connect: Connect
) -> None:
    run_id, free = started(runs, session, "a"), started(runs, session, "a")
    before = contents(raw)
    with connect(database_url) as other, other.transaction():
        other.execute("SELECT FROM circle.pipeline_node_runs WHERE run_id = %s FOR UPDATE", [run_id])
        with pytest.raises(TransactionConflictError) as caught:
            runs.advance_many([RunReport(run_id, [done("a")]), RunReport(free, [done("a")])])
        assert is_transient(caught.value)
    assert contents(raw) == before


def test_advance_many_leaves_out_a_run_that_was_released(runs: RunRepository, session: Session) -> None:
    runs.create(store(session, "a>b c"))
    (run,) = runs.claim("worker", LEASE)
    runs.advance(run.id, token=run.token)
    runs.advance(run.id, [done("a"), done("c")], token=run.token)
    runs.release(run.id, token=run.token)
    assert runs.advance_many([RunReport(run.id)]) == [None]
    assert [node.node_id for node in runs.advance(run.id).started] == ["b"]


def test_advance_many_gives_a_raw_run_its_nodes(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (%s)", [pipeline])
    (run,) = runs.search().items
    (step,) = runs.advance_many([RunReport(run.id)])
    assert step is not None
    assert (step.status, [node.node_id for node in step.started]) == ("running", ["a"])
