"""Incomplete graphs: stored as drafts, refused elsewhere."""

import json
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    insert,
    update,
)
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
)
from tests.support.graphs import CYCLIC, DRAFT, EDGE, TRIGGER, UNFINISHED, values
from tests.support.orm_writes import INSERTS, Run, stored

pytestmark = pytest.mark.once

INCOMPLETE = {"no nodes yet": ([], []), "missing config": DRAFT}


NEVER: dict[str, tuple[Any, Any]] = {
    "cycle": CYCLIC,
    "dangling edge": ([TRIGGER], [EDGE]),
    "duplicate id": ([TRIGGER, TRIGGER], []),
    "unknown type": ([{"id": "r", "type": "robot", "name": "R"}], []),
    "config of a wrong type": ([{"id": "d", "type": "delay", "name": "D", "config": {"seconds": -1}}], []),
    "config null": ([{"id": "d", "type": "delay", "name": "D", "config": None}], []),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_incomplete_graph_with_allow_incomplete_is_stored(what: str, run: Run, raw: psycopg.Connection) -> None:
    graph = INCOMPLETE[what]
    allowed = {"allow_incomplete": True}
    run(lambda session: session.add(Pipeline(**values(graph), allow_incomplete=True)))
    run(lambda session: session.execute(insert(Pipeline), [values(graph)], execution_options=allowed))
    run(lambda session: session.execute(insert(Pipeline).values(values(graph)).execution_options(**allowed)))
    run(lambda session: session.execute(insert(Pipeline).values([values(graph)]), execution_options=allowed))
    assert stored(raw) == [("p", *graph)] * 4
    raw.execute("UPDATE circle.pipelines SET nodes = %s, edges = '[]'", [json.dumps([TRIGGER])])
    new = {"nodes": graph[0], "edges": graph[1]}
    run(lambda session: session.execute(update(Pipeline).values(new), execution_options=allowed))
    assert stored(raw) == [("p", *graph)] * 4


@pytest.mark.parametrize("what", INCOMPLETE)
def test_incomplete_graph_without_flag_is_refused(what: str, run: Run, raw: psycopg.Connection) -> None:
    for write in INSERTS:
        with pytest.raises(InvalidPipelineError):
            run(write, values(INCOMPLETE[what]))
    assert stored(raw) == []


@pytest.mark.parametrize("what", NEVER)
def test_broken_graph_with_allow_incomplete_is_refused(what: str, run: Run, raw: psycopg.Connection) -> None:
    allowed = {"allow_incomplete": True}
    for work in (
        lambda session: session.add(Pipeline(**values(NEVER[what]), allow_incomplete=True)),
        lambda session: session.execute(insert(Pipeline), [values(NEVER[what])], execution_options=allowed),
    ):
        with pytest.raises(InvalidPipelineError):
            run(work)
    assert stored(raw) == []


@pytest.mark.parametrize("what", INCOMPLETE)
def test_activate_incomplete_pipeline_is_refused(what: str, run: Run, raw: psycopg.Connection) -> None:
    allowed = {"allow_incomplete": True}
    active = values(INCOMPLETE[what], status="active")
    for work in (
        lambda session: session.add(Pipeline(**active, allow_incomplete=True)),
        lambda session: session.execute(insert(Pipeline), [active], execution_options=allowed),
    ):
        with pytest.raises(InvalidPipelineError):
            run(work)
    run(lambda session: session.add(Pipeline(**values(INCOMPLETE[what]), allow_incomplete=True)))

    def activate(session: Session) -> None:
        session.get_one(Pipeline, 1).status = "active"

    with pytest.raises(InvalidPipelineError):
        run(activate)
    assert raw.execute("SELECT status FROM circle.pipelines").fetchall() == [("draft",)]


def test_edit_loaded_draft_with_flag_is_stored(run: Run, raw: psycopg.Connection) -> None:
    run(lambda session: session.add(Pipeline(**values(([], [])), allow_incomplete=True)))

    def edit(session: Session, *, allowed: bool) -> None:
        pipeline = session.get_one(Pipeline, 1)
        pipeline.allow_incomplete = allowed
        pipeline.nodes.append(UNFINISHED)

    with pytest.raises(InvalidPipelineError, match="missing its task"):
        run(lambda session: edit(session, allowed=False))
    run(lambda session: edit(session, allowed=True))
    assert stored(raw) == [("p", [UNFINISHED], [])]
