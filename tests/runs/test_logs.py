"""``RunRepository.append_log`` and ``logs``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import Database, InvalidDataError, LogEntry, RunNotFoundError, RunRepository
from tests.support.runs import started


def entries(runs: RunRepository, run_id: int) -> list[Any]:
    return [entry.entry for entry in runs.logs(run_id)]


def test_append_log_on_terminal_run_appends(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run_id = started(runs, session, "a")
    appended = [{"level": "info", "text": "ü"}, "plain", 3, None, [1, [2]], False]
    for entry in appended[:3]:
        runs.append_log(run_id, entry)
    ended = runs.cancel(run_id)
    for entry in appended[3:]:
        runs.append_log(run_id, entry)
    assert entries(runs, run_id) == appended
    assert runs.get(run_id) == ended
    raw.execute("UPDATE circle.pipeline_runs SET logs = NULL")
    assert entries(runs, run_id) == appended


def test_logs_are_read_in_pages_column_first(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    run_id, other = started(runs, session, "a"), started(runs, session, "a")
    assert runs.logs(run_id) == []
    runs.append_log(other, "another's")
    raw.execute("UPDATE circle.pipeline_runs SET logs = '[1, {\"two\": 2}]' WHERE id = %s", [run_id])
    for entry in (3, 4):
        runs.append_log(run_id, entry)
    raw.execute("UPDATE circle.pipeline_runs SET logs = logs || '[\"late\"]' WHERE id = %s", [run_id])
    read: list[LogEntry] = []
    while page := runs.logs(run_id, read[-1].id if read else None, limit=2):
        read += page
    assert [entry.entry for entry in read] == [1, {"two": 2}, "late", 3, 4]
    assert [entry.created_at is None for entry in read] == [True, True, True, False, False]
    raw.execute('UPDATE circle.pipeline_runs SET logs = \'{"no": "list"}\' WHERE id = %s', [run_id])
    assert entries(runs, run_id) == [{"no": "list"}, 3, 4]
    with pytest.raises(RunNotFoundError):
        runs.logs(-1)


def test_concurrent_entries_are_read_once_in_the_order_of_their_ids(database: Database, session: Session) -> None:
    run_id = started(RunRepository(session), session, "a")
    session.commit()

    def append(name: int) -> None:
        with database.session(autocommit=True) as opened:
            for number in range(20):
                RunRepository(opened).append_log(run_id, [name, number])

    read: list[LogEntry] = []
    with ThreadPoolExecutor() as pool, database.session(autocommit=True) as opened:
        writers = [pool.submit(append, name) for name in range(4)]
        while True:
            ended = all(writer.done() for writer in writers)
            page = RunRepository(opened).logs(run_id, read[-1].id if read else None, limit=7)
            read += page
            if ended and not page:
                break
        for writer in writers:
            writer.result()
    assert sorted(entry.entry for entry in read) == [[name, number] for name in range(4) for number in range(20)]


def test_log_of_a_raw_writer_has_to_be_readable(
    runs: RunRepository, session: Session, refuses: Callable[..., Any], raw: psycopg.Connection
) -> None:
    run_id = started(runs, session, "a")
    session.commit()
    with refuses(psycopg.errors.CheckViolation):
        raw.execute(
            "INSERT INTO circle.pipeline_run_logs (run_id, entry) VALUES (%s, %s)", [run_id, "[" * 70 + "]" * 70]
        )


def test_append_log_entry_may_be_one_level_less_deep(
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
    assert entries(runs, run_id) == [entry]
