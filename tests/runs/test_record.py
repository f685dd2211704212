"""``RunRepository.record``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
    RunStatus,
)
from gathering_pipeline.errors import (
    IllegalTransitionError,
    InvalidDataError,
    NodeRunNotFoundError,
)
from tests.support.runs import counters, done, started, statuses, store


def test_record_skipped_branch_skips_its_followers(runs: RunRepository, session: Session) -> None:
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
    assert runs.advance(everything, [done("t", "skipped")]).started == ()
    assert set(statuses(runs, everything).values()) == {"skipped"}
    assert runs.get(everything).status == RunStatus.COMPLETED


def test_record_with_one_bad_result_records_none(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
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


def test_record_terminal_results_stores_outputs_and_durations(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
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


@pytest.mark.parametrize("call", [RunRepository.advance, RunRepository.record])
def test_record_with_unknown_key_raises_invalid_data(session: Session, call: Any) -> None:
    results = [{"node_id": "a", "status": "completed", "outputs": {"text": "lost"}}]
    with pytest.raises(InvalidDataError, match=r"^results\[0\]\.outputs: Extra inputs are not permitted"):
        call(RunRepository(session), 1, results)


def test_result_without_duration_of_node_that_never_started_takes_no_time(
    runs: RunRepository, session: Session
) -> None:
    results = [done("a"), done("b", "skipped"), done("c", "failed", error="no"), done("d", "cancelled")]
    for at in range(3):
        run_id = started(runs, session, "a b c d e")
        (runs.record, runs.advance, runs.record)[at](run_id, results)
        assert [node.duration_ms for node in runs.nodes(run_id)] == [0] * 5
    plain = started(runs, session, "a b")
    runs.complete_node(plain, "b")
    runs.advance(plain, [done("a")])
    assert [node.duration_ms for node in runs.nodes(plain)] == [0, 0]


def test_results_with_and_without_retries_alternate_on_one_connection(runs: RunRepository, session: Session) -> None:
    """The statements of the functions are prepared once, with the types of their first call."""
    for retry in (False, True, False, True):
        for call in (runs.record, runs.advance):
            run_id = runs.create(store(session, "a", max_retries_per_node=1, retry_backoff_base=60)).id
            runs.advance(run_id)
            call(run_id, [done("a", "failed", error="no")], retry=retry)
            assert statuses(runs, run_id) == {"a": "pending" if retry else "failed"}
