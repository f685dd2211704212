"""Each field of a public model says what it is, where OpenAPI and editors show it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel

import gathering_pipeline
from gathering_pipeline import DatabaseSettings, PipelineCreate, PipelineRead, PipelineUpdate
from gathering_pipeline.node_types import NODE_TYPES

PUBLIC = (getattr(gathering_pipeline, name) for name in gathering_pipeline.__all__)
MODELS: list[type[BaseModel]] = [
    model
    for model in PUBLIC
    # settings are read from the environment, and are documented there
    if isinstance(model, type) and issubclass(model, BaseModel) and model is not DatabaseSettings
]


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_schema_of_a_public_model_describes_each_property(
    model: type[BaseModel], mode: Literal["validation", "serialization"]
) -> None:
    schema = model.model_json_schema(mode=mode)
    objects = [schema, *schema.get("$defs", {}).values()]
    properties = [(name, shown) for each in objects for name, shown in each.get("properties", {}).items()]
    assert len(properties) >= len(model.model_fields) > 0
    for name, shown in properties:
        assert shown.get("description", "").endswith("."), name
        assert "``" not in shown["description"], name  # OpenAPI shows Markdown


def shown_nodes(model: type[BaseModel], mode: Literal["validation", "serialization"]) -> Any:
    schema = model.model_json_schema(mode=mode)
    nodes = schema["properties"]["nodes"]
    nodes = nodes["anyOf"][0] if "anyOf" in nodes else nodes
    assert nodes["items"] == {"$ref": "#/$defs/PipelineNode"}
    return schema["$defs"]["PipelineNode"]


def test_schema_shows_nodes_typed_though_any_json_is_read() -> None:
    for node in (
        shown_nodes(PipelineRead, "serialization"),
        shown_nodes(PipelineCreate, "validation"),
        shown_nodes(PipelineUpdate, "validation"),
    ):
        assert node["properties"]["type"]["enum"] == list(NODE_TYPES)
    edge = PipelineRead.model_json_schema(mode="serialization")["$defs"]["PipelineEdge"]
    assert {"from", "to"} <= edge["properties"].keys()
