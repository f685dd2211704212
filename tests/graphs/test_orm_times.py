"""Times without an offset from UTC are refused, wherever an ORM class is written or asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from gathering_pipeline import Pipeline, PipelineNodeRun, PipelineRun, RunRepository
from gathering_pipeline.database import Database
from gathering_pipeline.errors import InvalidDataError
from tests.support.runs import store

pytestmark = pytest.mark.once  # the checks are those of the ORM's hooks

NAIVE = datetime(2026, 1, 1, 12)  # noqa: DTZ001
AWARE = NAIVE.replace(tzinfo=UTC)


def change(session: Session, row: PipelineRun | PipelineNodeRun | None, time: datetime) -> None:
    assert row is not None
    row.started_at = time
    session.flush()


def add(session: Session, time: datetime) -> None:
    session.add(PipelineRun(pipeline_id=1, created_at=time))
    session.flush()


WRITES: dict[str, Callable[[Session, datetime], object]] = {
    "add": add,
    "change of a run": lambda session, time: change(session, session.get(PipelineRun, 1), time),
    "change of a node run": lambda session, time: change(session, session.get(PipelineNodeRun, 1), time),
    "insert": lambda session, time: session.execute(insert(PipelineRun).values(pipeline_id=1, created_at=time)),
    "insert of rows": lambda session, time: session.execute(
        insert(PipelineRun), [{"pipeline_id": 1, "created_at": time}] * 2
    ),
    "update": lambda session, time: session.execute(update(PipelineNodeRun).values(started_at=time)),
    "where": lambda session, time: session.execute(select(PipelineRun).where(PipelineRun.created_at > time)),
    "where of a pipeline": lambda session, time: session.execute(select(Pipeline).where(Pipeline.last_run < time)),
}


@pytest.mark.parametrize("name", WRITES)
def test_time_without_offset_raises_invalid_data(database: Database, name: str) -> None:
    with database.session() as session:
        assert store(session, "a") == 1
        RunRepository(session).start(RunRepository(session).create(1).id)
        session.commit()
        with pytest.raises(InvalidDataError, match="offset from UTC"):
            WRITES[name](session, NAIVE)
        session.rollback()
        WRITES[name](session, AWARE)


def test_intervals_are_added_to_times(database: Database) -> None:
    with database.session() as session:
        assert store(session, "a") == 1
        run = RunRepository(session).start(RunRepository(session).create(1).id)
        later = PipelineRun.started_at + timedelta(minutes=5)
        assert run.started_at is not None
        assert session.scalars(select(later)).one() == run.started_at + timedelta(minutes=5)
        assert session.scalars(select(PipelineRun.id).where(PipelineRun.created_at < later)).all() == [run.id]
        session.execute(update(PipelineRun).values(run_at=later))
        assert session.scalars(select(PipelineRun.run_at)).one() == run.started_at + timedelta(minutes=5)


def test_update_by_rows_flushes_first(database: Database) -> None:
    with database.session() as session:
        assert store(session, "a") == 1
        pipeline = session.get_one(Pipeline, 1)
        pipeline.name = "mine"
        session.execute(update(Pipeline), [{"id": 1, "timeout_seconds": 7}])
        session.commit()
        session.refresh(pipeline)
        assert (pipeline.name, pipeline.timeout_seconds, pipeline.revision) == ("mine", 7, 3)
