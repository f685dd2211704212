"""``search``, ``counts`` and ``statistics``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRead,
    RunRepository,
    RunStatus,
)
from tests.support.runs import done, store


def test_search_pages_through_history_newest_first(runs: RunRepository, session: Session) -> None:
    one, two = store(session, "a"), store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(10) for pipeline in (one, two)]
    for run_id in ids[::3]:
        runs.start(run_id)
    every = [runs.get(run_id) for run_id in reversed(ids)]
    filtered: list[tuple[dict[str, Any], list[RunRead]]] = [
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
    ]
    for filters, expected in filtered:
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


def test_statistics_of_known_durations_match(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline, other = store(session, "a"), store(session, "a")
    assert runs.counts() == dict.fromkeys(RunStatus, 0)
    empty = runs.statistics(other)
    assert (empty.runs, empty.success_rate) == (dict.fromkeys(RunStatus, 0), None)
    assert (empty.duration_p50, empty.duration_p95) == (None, None)
    assert runs.statistics(-1) == empty
    for status, count in (("completed", 100), ("failed", 20), ("timeout", 5), ("cancelled", 30)):
        for at in range(1, count + 1):
            run_id = runs.start(runs.create(pipeline).id).id
            runs.record(run_id, [done("a")])
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
