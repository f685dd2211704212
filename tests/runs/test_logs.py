"""``RunRepository.append_log``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
)
from gathering_pipeline.errors import (
    InvalidDataError,
)
from tests.support.runs import started


def test_append_log_on_terminal_run_appends(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
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
    assert runs.get(run_id).logs == [entry]
