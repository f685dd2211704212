"""Subclasses of the ORM classes, objects that were given a part of the columns, and JSON of runs in statements."""

import pickle
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from gathering_pipeline import InvalidDataError, InvalidPipelineError, Pipeline, PipelineNodeRun, PipelineRun
from tests.support.graphs import AGENT, CYCLIC, DELAY, EDGE, GOOD, TRIGGER, UNFINISHED, values
from tests.support.orm_writes import Run, stored

pytestmark = pytest.mark.once


class OwnPipeline(Pipeline):
    """A pipeline of an application; its table is that of ``Pipeline``."""

    @property
    def title(self) -> str:
        return self.name.title()


class OwnRun(PipelineRun):
    """A run of an application."""


class OwnNodeRun(PipelineNodeRun):
    """A node run of an application."""


BAD_JSON: list[Any] = [{1: "a", "1": "b"}, {"a": float("nan")}, {"a": [object()]}, {"a": "\0"}]


@pytest.mark.parametrize("kind", [Pipeline, OwnPipeline])
def test_bad_graph_of_each_class_is_refused(kind: type[Pipeline], run: Run, raw: psycopg.Connection) -> None:
    for write in (
        lambda session: session.add(kind(**values(CYCLIC))),
        lambda session: session.execute(insert(kind).values(values(CYCLIC))),
        lambda session: session.execute(insert(kind).values([values(CYCLIC)])),
        lambda session: session.execute(insert(kind), [values(CYCLIC)]),
    ):
        with pytest.raises(InvalidPipelineError, match="cycle"):
            run(lambda session, write=write: (write(session), session.flush()))
    run(lambda session: session.add(kind(**values())))
    for write in (
        lambda session: setattr(session.get_one(kind, 1), "edges", CYCLIC[1]),
        lambda session: session.execute(update(kind).values(nodes=CYCLIC[0], edges=CYCLIC[1])),
        lambda session: session.execute(update(kind), [{"id": 1, "nodes": CYCLIC[0], "edges": CYCLIC[1]}]),
        lambda session: session.execute(update(kind), [{"id": 1, "status": "wrong"}]),
    ):
        with pytest.raises(InvalidPipelineError):
            run(lambda session, write=write: (write(session), session.flush()))
    assert stored(raw) == [("p", *GOOD)]
    run(lambda session: session.execute(update(kind), [{"id": 1, "name": "q"}]))
    with pytest.raises(StaleDataError):
        run(lambda session: session.execute(update(kind), [{"id": 1, "name": "q", "revision": 1}]))


def test_subclass_is_a_version_counted_pipeline(session: Session, raw: psycopg.Connection) -> None:
    session.add(OwnPipeline(**values()))
    session.commit()
    own = session.scalars(select(OwnPipeline)).one()
    assert (own.title, own.revision) == ("P", 1)
    raw.execute("UPDATE circle.pipelines SET name = 'edited'")
    own.nodes.append(DELAY)
    with pytest.raises(StaleDataError):
        session.flush()
    session.rollback()


@pytest.mark.parametrize("bad", BAD_JSON, ids=["keys", "nan", "object", "nul"])
@pytest.mark.parametrize("kind", [PipelineRun, OwnRun])
def test_json_of_runs_in_each_way_is_refused(
    kind: type[PipelineRun], bad: Any, run: Run, pipeline_id: int, raw: psycopg.Connection
) -> None:
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, 'running')", [pipeline_id])
    row = {"pipeline_id": pipeline_id, "trigger_data": bad}
    for write in (
        lambda session: session.add(kind(**row)),
        lambda session: session.execute(insert(kind).values(**row)),
        lambda session: session.execute(insert(kind).values({kind.pipeline_id: pipeline_id, kind.logs: bad})),
        lambda session: session.execute(insert(kind).values([row])),
        lambda session: session.execute(insert(kind), row),
        lambda session: session.execute(insert(kind), [row]),
        lambda session: session.execute(update(kind).values(logs=bad)),
        lambda session: session.execute(update(kind).where(kind.id == 1), {"logs": bad}),
        lambda session: session.execute(update(kind), [{"id": 1, "trigger_data": bad}]),
        lambda session: setattr(session.get_one(kind, 1), "logs", bad),
        lambda session: session.query(kind).update({"logs": bad}),
    ):
        with pytest.raises(InvalidDataError, match=r"^(logs|trigger_data)"):
            run(lambda session, write=write: (write(session), session.flush()))
    assert raw.execute("SELECT id, logs, trigger_data FROM circle.pipeline_runs").fetchall() == [(1, [], {})]


@pytest.mark.parametrize("kind", [PipelineNodeRun, OwnNodeRun])
def test_json_of_node_runs_is_refused(
    kind: type[PipelineNodeRun], run: Run, pipeline_id: int, raw: psycopg.Connection
) -> None:
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, status) VALUES (%s, 'running')", [pipeline_id])
    row = {"run_id": 1, "node_id": "t", "node_type": "trigger"}
    run(lambda session: session.execute(insert(kind).values(**row)))
    for write in (
        lambda session: session.add(kind(**row, input_data=BAD_JSON[0])),
        lambda session: session.execute(insert(kind), [{**row, "output_data": BAD_JSON[0]}]),
        lambda session: session.execute(update(kind), [{"id": 1, "output_data": BAD_JSON[0]}]),
    ):
        with pytest.raises(InvalidDataError, match=r"^(input|output)_data"):
            run(lambda session, write=write: (write(session), session.flush()))


def test_good_statements_on_runs_are_stored(run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    data = {"a": [1, {"b": None}]}

    def work(session: Session) -> None:
        row = {"pipeline_id": pipeline_id, "trigger_data": data}
        made = session.scalars(insert(PipelineRun).returning(PipelineRun), [row, row]).all()
        assert [one.trigger_data for one in made] == [data, data]
        session.execute(insert(PipelineRun).values(pipeline_id=pipeline_id, trigger_data=func.jsonb_build_array(1)))
        session.execute(insert(PipelineRun).from_select(["pipeline_id"], select(Pipeline.id)))
        session.execute(update(PipelineRun).values(logs=text("'[2]'")))

    run(work)
    rows = raw.execute("SELECT trigger_data, logs FROM circle.pipeline_runs ORDER BY id").fetchall()
    assert rows == [(data, [2]), (data, [2]), ([1], [2]), ({}, [2])]


# --- what nobody gave isn't set ---------------------------------------------------------------------------------------


def test_merge_keeps_what_was_not_given(run: Run, pipeline_id: int, raw: psycopg.Connection) -> None:
    nodes = [TRIGGER, AGENT, DELAY]

    def work(session: Session) -> None:
        given = Pipeline(id=pipeline_id, nodes=nodes)
        assert given.edges == []  # looking at it is not giving it
        merged = session.merge(given)
        session.flush()
        assert merged.edges == [EDGE]

    run(work)
    assert stored(raw) == [("p", nodes, [EDGE])]
    run(lambda session: session.merge(Pipeline(id=pipeline_id, name="q")))
    assert stored(raw) == [("q", nodes, [EDGE])]
    run(lambda session: session.merge(Pipeline(id=pipeline_id, nodes=[TRIGGER], edges=[])))
    assert stored(raw) == [("q", [TRIGGER], [])]


def test_new_object_shows_empty_lists_that_can_be_appended_to(run: Run, raw: psycopg.Connection) -> None:
    def work(session: Session) -> None:
        pipeline = Pipeline(name="p", allow_incomplete=True)
        assert (pipeline.nodes, pipeline.edges) == ([], [])
        assert pipeline.nodes is pipeline.nodes
        nodes, edges = pipeline.nodes, pipeline.edges
        nodes.append(TRIGGER)
        assert pipeline.nodes == [TRIGGER]
        session.add(pipeline)
        session.flush()
        edges.append(EDGE)
        nodes.append(AGENT)
        session.flush()

    run(work)
    assert stored(raw) == [("p", *GOOD)]


def test_new_object_without_a_graph_is_a_draft_or_refused(run: Run, raw: psycopg.Connection) -> None:
    with pytest.raises(InvalidPipelineError, match="at least one node"):
        run(lambda session: session.add(Pipeline(name="p")))
    run(lambda session: session.add(Pipeline(name="p", allow_incomplete=True)))
    run(lambda session: session.add(Pipeline(name="q", nodes=[UNFINISHED], allow_incomplete=True)))
    assert stored(raw) == [("p", [], []), ("q", [UNFINISHED], [])]


def test_new_object_survives_pickle(run: Run, raw: psycopg.Connection) -> None:
    pipeline = Pipeline(name="p")
    assert pipeline.nodes == []
    again = pickle.loads(pickle.dumps(pipeline))  # noqa: S301 - our own
    again.nodes.append(TRIGGER)
    run(lambda session: session.add(again))
    assert stored(raw) == [("p", [TRIGGER], [])]
