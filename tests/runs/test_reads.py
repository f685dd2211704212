"""``search``, ``counts`` and ``statistics``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidDataError,
    RunNotFoundError,
    RunRepository,
    RunStatus,
    RunSummary,
)
from tests.support.runs import done, started, store


def test_search_pages_through_history_newest_first(runs: RunRepository, session: Session) -> None:
    one, two = store(session, "a"), store(session, "a")
    ids = [runs.create(pipeline).id for _ in range(10) for pipeline in (one, two)]
    for run_id in ids[::3]:
        runs.start(run_id)
    every = [RunSummary.model_validate(runs.get(run_id).model_dump()) for run_id in reversed(ids)]
    filtered: list[tuple[dict[str, Any], list[RunSummary]]] = [
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


# --- search by several conditions --------------------------------------------------------------------------------------


def test_search_by_tags_times_and_statuses(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    one, two = store(session, "a"), store(session, "a")
    made: list[tuple[RunSummary, dict[str, str]]] = []
    for at in range(24):
        tags = {key: str(at % number) for key, number in (("two", 2), ("three", 3)) if at % 5}
        run = runs.create(one if at % 4 else two, tags=tags)
        if at % 3 == 0:
            runs.cancel(run.id)
        elif at % 3 == 1:
            runs.start(run.id)
        made.append((run, tags))
    session.commit()
    raw.execute("UPDATE circle.pipeline_runs SET created_at = timestamptz '2026-01-01T00:00Z' + id * interval '1 min'")
    every = [(RunSummary.model_validate(runs.get(run.id).model_dump()), tags) for run, tags in reversed(made)]
    first, last = every[-3][0].created_at, every[4][0].created_at
    assert first is not None
    assert last is not None
    cases: list[tuple[dict[str, Any], Callable[[RunSummary, dict[str, str]], bool]]] = [
        ({"tags": {"two": "1"}}, lambda _, tags: tags.get("two") == "1"),
        ({"tags": {"three": "2", "two": "1"}}, lambda _, tags: tags == {"three": "2", "two": "1"}),
        ({"tags": {"two": "1"}, "pipeline_id": two}, lambda run, tags: tags.get("two") == "1" and run.pipeline_id == two),
        ({"tags": {"two": "1"}, "status": "running"}, lambda run, tags: tags.get("two") == "1" and run.status == "running"),
        ({"tags": {"two": "1", "four": "1"}}, lambda *_: False),
        ({"tags": {}, "status": ["running"]}, lambda run, _: run.status == "running"),
        ({"status": ["running", RunStatus.CANCELLED]}, lambda run, _: run.status in ("running", "cancelled")),
        ({"status": {RunStatus.PENDING, RunStatus.FAILED}, "pipeline_id": one},
         lambda run, _: run.status == "pending" and run.pipeline_id == one),
        ({"status": []}, lambda *_: False),
        ({"created_after": first}, lambda run, _: run.created_at is not None and run.created_at >= first),
        ({"created_before": last}, lambda run, _: run.created_at is not None and run.created_at < last),
        ({"created_after": first, "created_before": last, "pipeline_id": one, "status": RunStatus.PENDING},
         lambda run, _: run.created_at is not None and first <= run.created_at < last and run.pipeline_id == one
         and run.status == "pending"),
    ]  # fmt: skip
    for filters, matches in cases:
        expected = [run for run, tags in every if matches(run, tags)]
        assert list(runs.iterate(**filters)) == expected, filters
        assert list(runs.iterate(**filters, batch=2)) == expected, filters
        assert runs.search(**filters, limit=100).next_cursor is None


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"status": ["running", "done"]}, "status must be one of"),
        ({"tags": "a"}, "tags must be a mapping"),
        ({"created_after": "today"}, "created_after"),
        ({"created_before": datetime(2026, 1, 1)}, "created_before"),  # noqa: DTZ001 - that is refused
    ],
)
def test_search_by_nonsense_is_refused(runs: RunRepository, filters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        runs.search(**filters)


def test_outputs_are_those_of_the_last_nodes(runs: RunRepository, session: Session) -> None:
    run_id = started(runs, session, "a>b a>c x")
    assert runs.outputs(run_id) == {}
    runs.record(run_id, [done(name, output={"by": name}) for name in "abx"])
    assert runs.outputs(run_id) == {"b": {"by": "b"}, "x": {"by": "x"}}
    with pytest.raises(RunNotFoundError):
        runs.outputs(-1)
