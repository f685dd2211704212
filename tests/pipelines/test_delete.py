"""``PipelineRepository.delete``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    PipelineInUseError,
    PipelineNotFoundError,
    PipelineRepository,
    PipelineUpdate,
    RunNotFoundError,
    RunRepository,
    is_transient,
)
from tests.support.databases import contents
from tests.support.graphs import TRIGGER
from tests.support.pipelines import count, new
from tests.support.runs import store


def test_delete_with_live_runs_needs_force(each: Session, raw: psycopg.Connection, refuses: Callable[..., Any]) -> None:
    runs, pipelines = RunRepository(each), PipelineRepository(each)
    pipeline, other = store(each), store(each)
    run = runs.create(pipeline)
    runs.start(runs.create(pipeline).id)
    runs.cancel(runs.create(pipeline).id)  # not live
    kept = runs.create(other)
    with refuses(PipelineInUseError) as caught:
        pipelines.delete(pipeline)
    assert (caught.value.pipeline_id, caught.value.live_runs) == (pipeline, 2)
    pipelines.delete(pipeline, force=True)
    with refuses(PipelineNotFoundError) as caught:
        pipelines.delete(pipeline, force=True)
    assert caught.value.pipeline_id == pipeline
    with refuses(RunNotFoundError):
        runs.start(run.id)
    runs.cancel(kept.id)
    pipelines.delete(other)
    raw.execute("DELETE FROM circle.pipeline_events")  # the log keeps what happened until it is purged
    raw.execute("SELECT circle.fold_counters()")
    assert contents(raw) == []


def test_delete_removes_runs_and_versions_of_that_pipeline_only(each: Session, raw: psycopg.Connection) -> None:
    pipelines, runs = PipelineRepository(each), RunRepository(each)
    made = pipelines.create(new(status="active"))
    other = pipelines.create(new("other", status="active"))
    for pipeline in (made, other):
        run = runs.create(pipeline.id)
        runs.cancel(run.id)
    pipelines.update(made.id, PipelineUpdate(nodes=[TRIGGER], edges=[]))
    pipelines.delete(made.id)
    for table, left in (
        *(("pipelines", 1), ("pipeline_runs", 1), ("pipeline_node_runs", 2)),
        *(("pipeline_versions", 1), ("pipeline_version_nodes", 2)),
    ):
        assert count(raw, table) == left, table
    with pytest.raises(PipelineNotFoundError):
        pipelines.get(made.id)


def test_delete_while_runs_are_created_succeeds(database: Database, raw: psycopg.Connection) -> None:
    """Constant creation of runs blocks no deletion; the creators get an error that the pipeline is gone."""
    errors: list[BaseException] = []
    for _ in range(6):
        with database.session() as session:
            pipeline = PipelineRepository(session).create(new(status="active")).id
        created: list[int] = []

        def create(pipeline: int = pipeline, created: list[int] = created) -> None:
            with database.session(autocommit=True) as session:
                runs = RunRepository(session)
                try:
                    while True:
                        created.append(runs.create(pipeline).id)
                        runs.start(created[-1])
                except (PipelineNotFoundError, RunNotFoundError):
                    pass
                except BaseException as error:  # noqa: BLE001 - whatever it is
                    errors.append(error)

        threads = [threading.Thread(target=create) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(created) < 6 and not errors:
            time.sleep(0.001)
        with database.session(autocommit=True) as session:
            with pytest.raises(PipelineInUseError):
                PipelineRepository(session).delete(pipeline)
            PipelineRepository(session).delete(pipeline, force=True)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert count(raw, "pipeline_runs") == count(raw, "pipeline_node_runs") == count(raw, "pipeline_version_nodes") == 0


@pytest.mark.parametrize("force", [False, True])
def test_delete_concurrently_succeeds_once(database: Database, force: bool) -> None:
    with database.session() as session:
        pipeline = PipelineRepository(session).create(new()).id
    barrier, answers = threading.Barrier(3), []

    def delete() -> None:
        with database.session(autocommit=True) as session:
            barrier.wait()
            try:
                PipelineRepository(session).delete(pipeline, force=force)
            except PipelineNotFoundError:
                answers.append("not found")
            except Exception as error:  # noqa: BLE001 - whatever it is
                answers.append(f"{error!r} {is_transient(error)}")
            else:
                answers.append("deleted")

    threads = [threading.Thread(target=delete) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == ["deleted", "not found", "not found"]
