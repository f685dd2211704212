"""Keys of nodes and edges that the typed graph doesn't know: read, edited and stored again."""

import copy
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
    PipelineDefinition,
    PipelineEdge,
    PipelineNode,
    PipelineRepository,
    PipelineUpdate,
    find_issues,
)
from tests.support.graphs import AGENT, EDGE, TRIGGER
from tests.support.pipelines import new

pytestmark = pytest.mark.once  # keys are kept by the models; JSONB is the same on each server

NODES: list[dict[str, Any]] = [
    {**TRIGGER, "color": "#fff", "data": {"label": "Start", "deep": [1, {"x": None}]}, "selected": False, "copy": 1},
    {**AGENT, "measured": {"width": 1.5}, "model_extra": None, "": 0, "from": "kept"},
]
EDGES: list[dict[str, Any]] = [{**EDGE, "data": {"label": "yes"}, "animated": True, "sourceHandle": None, "schema": []}]


def stored(raw: psycopg.Connection) -> Any:
    return raw.execute("SELECT nodes, edges FROM circle.pipelines").fetchone()


def test_read_edit_store_keeps_unknown_keys(each: Session, raw: psycopg.Connection) -> None:
    pipelines = PipelineRepository(each)
    made = pipelines.create(new(nodes=NODES, edges=EDGES))
    definition = pipelines.get(made.id).definition
    changed = pipelines.update(made.id, PipelineUpdate(nodes=definition.nodes, edges=definition.edges))
    assert stored(raw) == (NODES, EDGES)
    assert (changed.version, changed.revision) == (1, 1)  # nothing differs
    definition.nodes[0].name = "renamed"
    definition.edges[0].condition = "x"
    pipelines.update(made.id, PipelineUpdate(nodes=definition.nodes, edges=definition.edges))
    assert stored(raw) == ([{**NODES[0], "name": "renamed"}, NODES[1]], [{**EDGES[0], "condition": "x"}])


def test_definition_of_orm_object_keeps_unknown_keys(session: Session, raw: psycopg.Connection) -> None:
    pipeline = Pipeline(name="p", nodes=copy.deepcopy(NODES), edges=copy.deepcopy(EDGES))
    session.add(pipeline)
    session.flush()
    pipeline.definition = pipeline.definition
    session.commit()
    assert stored(raw) == (NODES, EDGES)
    assert pipeline.version == 1


def test_definition_keeps_unknown_keys_through_json_and_copies() -> None:
    definition = PipelineDefinition.from_json(NODES, EDGES)
    assert definition.nodes[0].model_extra == {key: NODES[0][key] for key in ("color", "data", "selected", "copy")}
    for again in (
        definition.model_copy(deep=True),
        PipelineDefinition.model_validate(definition.model_dump(by_alias=True)),
        PipelineDefinition.model_validate_json(definition.model_dump_json(by_alias=True)),
    ):
        assert again == definition
        assert again.nodes[1].model_extra == {"measured": {"width": 1.5}, "model_extra": None, "": 0, "from": "kept"}
    assert definition.model_dump(by_alias=True, exclude_unset=True) == {"nodes": NODES, "edges": EDGES}


@pytest.mark.parametrize(
    ("value", "place"),
    [(float("nan"), "color"), ({"deep": {1: 2}}, "color.deep"), (object(), "color"), ("\0", "color")],
)
def test_unknown_key_that_json_cannot_hold_is_refused(value: Any, place: str, each: Session) -> None:
    nodes = [PipelineNode.model_validate({"id": "t", "type": "trigger", "name": "T", "color": value})]
    edges = [PipelineEdge.model_validate({"id": "e", "from": "t", "to": "d", "color": value})]
    nodes.append(PipelineNode(id="d", type="delay", name="D"))
    issues = find_issues(PipelineDefinition(nodes=nodes, edges=edges))
    places = [("nodes", 0, *place.split(".")), ("edges", 0, *place.split("."))]
    assert [issue.loc for issue in issues if issue.severity == "error"] == places
    with pytest.raises(InvalidPipelineError) as refused:
        PipelineRepository(each).create(new(nodes=nodes, edges=edges))
    assert [issue.loc for issue in refused.value.issues] == places
