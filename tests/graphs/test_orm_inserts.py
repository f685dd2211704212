"""The hook before an INSERT, by each way of SQLAlchemy."""

import copy
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    Engine,
    event,
    insert,
)
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
    PipelineDefinition,
)
from tests.support.graphs import AGENT, CYCLIC, EDGE, GOOD, values
from tests.support.orm_writes import (
    INSERTS,
    Run,
    add,
    by_each_insert,
    insert_many,
    insert_multi_values,
    insert_values,
    stored,
)

pytestmark = pytest.mark.once


@by_each_insert
def test_insert_good_graph_stores_it_unchanged(write: Any, run: Run, raw: psycopg.Connection) -> None:
    run(write, values(name="one"), values(name="two"))
    assert stored(raw) == [("one", *GOOD), ("two", *GOOD)]


@by_each_insert
def test_insert_bad_graph_raises_every_issue_and_stores_nothing(write: Any, run: Run, raw: psycopg.Connection) -> None:
    bad = values(CYCLIC, name="bad")
    bad["edges"].append({"id": "x", "from": "a", "to": "ghost"})
    with pytest.raises(InvalidPipelineError, match="cycle: t -> a -> t") as refused:
        run(write, values(name="good"), bad)
    assert {issue.code for issue in refused.value.issues} == {"cycle", "unknown_target"}
    assert stored(raw) == []


def test_insert_bad_graph_sends_no_sql(engine: Engine) -> None:
    sent: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    for write in INSERTS:
        with Session(engine) as session, pytest.raises(InvalidPipelineError):
            write(session, values(CYCLIC))
    assert [statement for statement in sent if "SELECT" not in statement] == []


def test_insert_without_graph_is_refused(run: Run, raw: psycopg.Connection) -> None:
    for write in (add, insert_many, insert_values):
        with pytest.raises(InvalidPipelineError, match="at least one node"):
            run(write, {"name": "empty"})
    assert stored(raw) == []


def test_insert_rows_share_columns_of_values(run: Run, raw: psycopg.Connection) -> None:
    graph = {"nodes": GOOD[0], "edges": GOOD[1]}
    run(lambda session: session.execute(insert(Pipeline).values(**graph), [{"name": "one"}, {"name": "two"}]))
    assert stored(raw) == [("one", *GOOD), ("two", *GOOD)]
    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(
            lambda session: session.execute(
                insert(Pipeline).values(nodes=CYCLIC[0], edges=CYCLIC[1]), [{"name": "three"}, {"name": "four"}]
            )
        )
    assert len(stored(raw)) == 2


def test_insert_statement_can_be_executed_twice(session: Session, raw: psycopg.Connection) -> None:
    one, many = insert(Pipeline).values(**values(name="one")), insert(Pipeline).values([values(name="many")])
    for statement in (one, many, one, many):
        session.execute(statement)
    session.commit()
    assert stored(raw) == [("one", *GOOD), ("many", *GOOD)] * 2


@by_each_insert
def test_insert_pydantic_objects_stores_json(write: Any, run: Run, raw: psycopg.Connection) -> None:
    definition = PipelineDefinition.from_json(*copy.deepcopy(GOOD))
    run(write, {"name": "p", "nodes": definition.nodes, "edges": definition.edges})
    run(write, {"name": "q", "nodes": [definition.nodes[0], AGENT], "edges": [EDGE]})
    assert stored(raw) == [("p", *GOOD), ("q", *GOOD)]


def test_insert_edges_with_python_names_stores_json_names(run: Run, raw: psycopg.Connection) -> None:
    edge = {"id": "e", "from_node": "t", "to_node": "a", "label": "kept"}
    for write in (add, insert_many, insert_multi_values):
        run(write, {"name": "p", "nodes": GOOD[0], "edges": [edge]})
    assert [row[2] for row in stored(raw)] == [[{"id": "e", "from": "t", "to": "a", "label": "kept"}]] * 3
