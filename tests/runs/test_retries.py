"""Failed attempts of a node, and when it is tried again."""

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    NodeStatus,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.errors import (
    NodeNotReadyError,
)
from gathering_pipeline.lifecycle import retry_delay
from tests.support.runs import clock, counters, started, store


@pytest.mark.parametrize(("base", "longest"), [(1.5, 10.0), (0.0, 5.0), (3.0, 2.0), (31_536_000.0, 31_536_000.0)])
def test_fail_node_retryable_waits_for_backoff(
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
            assert (node.status, node.attempt) == ("pending", attempt + 2)
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
                step = runs.advance(run_id)
                assert (step.started, step.running, step.next_due) == ((), (), node.available_at)
                assert runs.get(run_id).status == RunStatus.RUNNING
            raw.execute("UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp() WHERE node_id = 'a'")
    (stored, _) = runs.nodes(run_id)
    assert (stored.status, stored.retry_count, stored.available_at) == ("failed", 3, None)
    assert runs.finish(run_id).error_message == "error 3"
    assert counters(raw, pipeline) == (1, 0, 1)


def test_fail_node_with_huge_retry_count_waits_at_most_the_maximum(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    settings = {"max_retries_per_node": 1_000_000, "retry_backoff_base": 31_536_000, "retry_backoff_max": 31_536_000}
    run_id = started(runs, session, "a", **settings)
    for count in (61, 62, 63, 1_023, 1_024, 999_999):
        raw.execute("UPDATE circle.pipeline_node_runs SET retry_count = %s, available_at = NULL", [count])
        runs.start_node(run_id, "a")
        since = clock(raw)
        node = runs.fail_node(run_id, "a", "x")
        assert node.available_at is not None
        assert since + timedelta(days=365) <= node.available_at <= clock(raw) + timedelta(days=365)
        assert node.attempt == count + 2


def test_fail_node_permanent_or_not_running_is_not_retried(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a b c", max_retries_per_node=3)
    runs.start_node(run_id, "a")
    runs.start_node(run_id, "b")
    assert runs.fail_node(run_id, "a", "for good", retryable=False).status == NodeStatus.FAILED
    assert runs.fail_node(run_id, "c", "never started").status == NodeStatus.FAILED
    assert runs.fail_node(run_id, "b", "again").status == NodeStatus.PENDING
    none = started(runs, session, "a", max_retries_per_node=0)
    runs.start_node(none, "a")
    assert runs.fail_node(none, "a", "once").status == NodeStatus.FAILED
