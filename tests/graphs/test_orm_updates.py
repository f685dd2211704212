"""The hook before an UPDATE, by each way of SQLAlchemy."""

import json
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    func,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
)
from tests.support.graphs import BACK, CYCLIC, DRAFT, EDGE, GOOD, TRIGGER, values
from tests.support.orm_writes import Run, by_each_update, insert_many, stored

pytestmark = pytest.mark.once


@by_each_update
def test_update_good_graph_is_stored(write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    run(write, pipeline_id, {"nodes": [TRIGGER], "edges": [], "name": "new"})
    assert stored(raw) == [("new", [TRIGGER], [])]


@by_each_update
def test_update_bad_graph_is_refused(write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    for bad, sentence in (
        ({"nodes": CYCLIC[0], "edges": CYCLIC[1]}, "cycle: t -> a -> t"),
        ({"nodes": DRAFT[0], "edges": DRAFT[1]}, "missing its agent_id"),
        ({"nodes": [], "edges": []}, "at least one node"),
    ):
        with pytest.raises(InvalidPipelineError, match=sentence):
            run(write, pipeline_id, bad)
    assert stored(raw) == [("p", *GOOD)]


@by_each_update
def test_update_half_a_graph_that_does_not_fit_is_refused(
    write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection
) -> None:
    """By the hook where it sees the stored half, else by the database's compiler; in either case nothing is stored."""
    for bad in ({"nodes": [TRIGGER]}, {"edges": [EDGE, BACK]}):
        with pytest.raises((InvalidPipelineError, DBAPIError)) as refused:
            run(write, pipeline_id, bad)
        if isinstance(refused.value, DBAPIError):
            assert getattr(refused.value.orig, "sqlstate", None) == "PL008"
    assert stored(raw) == [("p", *GOOD)]


@by_each_update
def test_update_bad_field_is_refused(write: Any, run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    for bad in ({"status": None}, {"status": "archived"}, {"name": ""}, {"retry_backoff_base": float("nan")}):
        with pytest.raises(InvalidPipelineError, match=next(iter(bad))):
            run(write, pipeline_id, bad)
    run(write, pipeline_id, {"status": "paused"})
    assert raw.execute("SELECT status, version FROM circle.pipelines").fetchall() == [("paused", 1)]


def test_bulk_update_checks_each_row(run: Run, raw: psycopg.Connection) -> None:
    run(insert_many, *(values(name=name) for name in "abc"))
    rows: list[dict[str, Any]] = [
        {"id": 1, "nodes": [TRIGGER], "edges": []},
        {"id": 2, "nodes": CYCLIC[0], "edges": CYCLIC[1]},
    ]
    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(lambda session: session.execute(update(Pipeline), rows))
    assert stored(raw) == [(name, *GOOD) for name in "abc"]
    rows[1] = {"id": 3, "nodes": [TRIGGER], "edges": []}
    run(lambda session: session.execute(update(Pipeline), rows))
    assert stored(raw) == [("a", [TRIGGER], []), ("b", *GOOD), ("c", [TRIGGER], [])]


def test_update_by_sql_expression_is_stored(run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    counted = {"run_count": Pipeline.run_count + 1, "last_run": func.now(), "description": func.upper(Pipeline.name)}
    run(lambda session: session.execute(update(Pipeline).values(counted)))
    row = raw.execute("SELECT run_count, last_run IS NOT NULL, description, version FROM circle.pipelines").fetchone()
    assert row == (1, True, "P", 1)


def test_flush_unchanged_object_writes_nothing(run: Run, raw: psycopg.Connection, pipeline_id: int) -> None:
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER ALL")
    raw.execute("UPDATE circle.pipelines SET edges = %s", [json.dumps(CYCLIC[1])])
    raw.execute("ALTER TABLE circle.pipelines ENABLE TRIGGER ALL")

    def work(session: Session) -> None:
        pipeline = session.get_one(Pipeline, pipeline_id)
        assert len(pipeline.edges) == 2
        pipeline.description = "the graph is broken, but not touched"

    run(work)
    assert raw.execute("SELECT description FROM circle.pipelines").fetchone() == (
        "the graph is broken, but not touched",
    )
