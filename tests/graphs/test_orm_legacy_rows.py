"""Rows with graphs that would be refused today: loaded, edited, repaired."""

import copy
import json
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    select,
)
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
)
from tests.support.graphs import CYCLIC, EDGE, GOOD, TRIGGER
from tests.support.orm_writes import Run, stored

pytestmark = pytest.mark.once

LEGACY: dict[str, tuple[Any, Any]] = {
    "cycle": CYCLIC,
    "dangling": ([TRIGGER], [EDGE]),
    "number for an id": ([{"id": 7, "type": "trigger", "name": "T"}], []),
    "items that are no objects": ([1, None, "x", [2]], ["e"]),
    "object": ({"t": TRIGGER}, {"e": 1}),
    "text": ("[]", "[]"),
    "JSON null": (None, None),
}


@pytest.fixture
def legacy(raw: psycopg.Connection) -> list[int]:
    """Pipelines whose graphs are broken, as they were before there was any guard."""
    raw.execute("SET session_replication_role = replica")
    raw.execute("ALTER TABLE circle.pipelines DISABLE TRIGGER ALL")
    for name, graph in LEGACY.items():
        raw.execute(
            "INSERT INTO circle.pipelines (name, nodes, edges) VALUES (%s, %s, %s)", [name, *map(json.dumps, graph)]
        )
    raw.execute("ALTER TABLE circle.pipelines ENABLE TRIGGER ALL")
    raw.execute("ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_before")
    raw.execute("RESET session_replication_role")
    return list(range(1, len(LEGACY) + 1))


def test_legacy_row_is_loaded_edited_and_repaired(run: Run, legacy: list[int], raw: psycopg.Connection) -> None:
    def look(session: Session) -> None:
        for pipeline, (name, (nodes, _)) in zip(
            session.scalars(select(Pipeline).order_by(Pipeline.id)), LEGACY.items(), strict=True
        ):
            assert pipeline.name == name
            assert list(pipeline.nodes or []) == (
                nodes if isinstance(nodes, list) else [] if nodes is None else [nodes]
            )
            pipeline.description = "known to be broken"

    run(look)
    kept = [(name, *graph) for name, graph in LEGACY.items()]
    assert stored(raw) == kept

    def spoil(session: Session) -> None:
        session.get_one(Pipeline, 1).edges = [*CYCLIC[1], {"id": "more", "from": "t", "to": "a"}]

    with pytest.raises(InvalidPipelineError, match="cycle"):
        run(spoil)

    def repair(session: Session) -> None:
        for pipeline in session.scalars(select(Pipeline)):
            pipeline.nodes, pipeline.edges = copy.deepcopy(GOOD)

    run(repair)
    assert stored(raw) == [(name, *GOOD) for name in LEGACY]
    assert raw.execute("SELECT DISTINCT version FROM circle.pipelines").fetchall() == [(2,)]


def test_legacy_row_definition_raises_on_access_only(session: Session, legacy: list[int]) -> None:
    for pipeline in session.scalars(select(Pipeline).where(Pipeline.id > 2)):
        with pytest.raises(InvalidPipelineError):
            _ = pipeline.definition
