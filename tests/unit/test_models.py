"""The Pydantic models: the graph as JSON spells it, and the bounds of what is written."""

from __future__ import annotations

import json
import math
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from gathering_pipeline.errors import InvalidPipelineError
from gathering_pipeline.events import EventType, PipelineEvent
from gathering_pipeline.lifecycle import PipelineStatus
from gathering_pipeline.models import (
    ActionNodeConfig,
    AgentNodeConfig,
    ConditionNodeConfig,
    DelayNodeConfig,
    NodeConfig,
    NodeExecutionResult,
    Page,
    ParallelNodeConfig,
    PipelineCreate,
    PipelineDefinition,
    PipelineEdge,
    PipelineNode,
    PipelineRead,
    PipelineUpdate,
    TriggerNodeConfig,
)
from gathering_pipeline.validator import get_execution_order

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def read(nodes: object, edges: object) -> PipelineRead:
    return PipelineRead.model_validate(
        dict.fromkeys(PipelineRead.model_fields)
        | {"id": 1, "name": "p", "status": "draft", "nodes": nodes, "edges": edges, "version": 1, "revision": 1}
        | {"max_retries_per_node": 3, "retry_backoff_base": 1.0, "retry_backoff_max": 60.0, "max_running": 0}
        | {"run_count": 0, "success_count": 0, "error_count": 0}
    )


class TestEdge:
    @pytest.mark.parametrize(
        "given",
        [{"from": "a", "to": "b"}, {"from_node": "a", "to_node": "b"}, {"from": "a", "to_node": "b"}],
    )
    def test_both_spellings(self, given: dict[str, str]) -> None:
        edge = PipelineEdge.model_validate({"id": "e", **given})
        assert (edge.from_node, edge.to_node, edge.condition) == ("a", "b", None)

    def test_by_alias_writes_from_and_to(self) -> None:
        edge = PipelineEdge(id="e", from_node="a", to_node="b", condition="x")
        assert edge.model_dump(by_alias=True) == {"id": "e", "from": "a", "to": "b", "condition": "x"}

    @pytest.mark.parametrize("value", [1, True, None, b"a", ["a"]])
    def test_ends_are_text(self, value: object) -> None:
        with pytest.raises(ValidationError):
            PipelineEdge.model_validate({"id": "e", "from": value, "to": "b"})


class TestNode:
    def test_half_drawn_node_is_data(self) -> None:
        node = PipelineNode(id="b", type="agent", name="Run", config={})
        assert (node.config, node.position, node.next) == ({}, None, None)

    def test_config_has_a_fresh_default(self) -> None:
        first, second = (PipelineNode(id=name, type="trigger", name="T") for name in "ab")
        first.config["x"] = 1
        assert second.config == {}

    def test_unknown_keys_and_nulls_of_config_are_kept(self) -> None:
        config = {"agent_id": None, "cron": "* * * * *", "type": "mine", "nested": {"a": [1]}}
        assert config == PipelineNode(id="a", type="trigger", name="T", config=config).config

    @pytest.mark.parametrize(
        "wrong",
        [
            {"id": 1},
            {"id": True},
            {"id": b"a"},
            {"type": "start"},
            {"name": None},
            {"config": None},
            {"config": []},
            {"config": {1: 2}},
            {"position": 3},
            {"next": "b"},
            {"next": [1]},
        ],
        ids=repr,
    )
    def test_wrong_shapes(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            PipelineNode.model_validate({"id": "a", "type": "agent", "name": "A", **wrong})


class TestNodeConfig:
    adapter: TypeAdapter[Any] = TypeAdapter(NodeConfig)

    @pytest.mark.parametrize(
        ("given", "model"),
        [
            ({"type": "trigger"}, TriggerNodeConfig),
            ({"type": "agent", "agent_id": "1", "task": "t"}, AgentNodeConfig),
            ({"type": "condition"}, ConditionNodeConfig),
            ({"type": "action", "action": "send"}, ActionNodeConfig),
            ({"type": "parallel"}, ParallelNodeConfig),
            ({"type": "delay"}, DelayNodeConfig),
        ],
    )
    def test_the_type_decides_and_other_keys_are_kept(self, given: dict[str, Any], model: type[BaseModel]) -> None:
        config = self.adapter.validate_python({**given, "extra": [1]})
        assert model is type(config)
        assert config.model_extra == {"extra": [1]}

    def test_defaults(self) -> None:
        assert ConditionNodeConfig().condition == "true"
        assert DelayNodeConfig().seconds == 0

    @pytest.mark.parametrize(("given", "expected"), [(7, "7"), ("x", "x"), (1.5, "1.5")])
    def test_agent_id_alone_is_coerced(self, given: object, expected: str) -> None:
        config = AgentNodeConfig.model_validate({"agent_id": given, "task": "t"})
        assert expected == config.agent_id

    @pytest.mark.parametrize(
        ("model", "given"),
        [
            (AgentNodeConfig, {"agent_id": True, "task": "t"}),
            (AgentNodeConfig, {"agent_id": 1, "task": 2}),
            (ActionNodeConfig, {}),
            (ActionNodeConfig, {"action": 1}),
            (ConditionNodeConfig, {"condition": 1}),
            (DelayNodeConfig, {"seconds": -1}),
            (DelayNodeConfig, {"seconds": math.nan}),
            (DelayNodeConfig, {"seconds": math.inf}),
            (DelayNodeConfig, {"seconds": "5"}),
            (DelayNodeConfig, {"seconds": True}),
        ],
    )
    def test_wrong_values(self, model: type[BaseModel], given: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            model.model_validate(given)


class TestDefinition:
    node = PipelineNode(id="a", type="trigger", name="A")

    def test_node_map(self) -> None:
        assert {"a": self.node} == PipelineDefinition(nodes=[self.node], edges=[]).node_map

    def test_leaves_to_the_validator_what_is_its_own(self) -> None:
        edge = PipelineEdge(id="e", from_node="a", to_node="ghost")
        definition = PipelineDefinition(nodes=[self.node, self.node], edges=[edge, edge])
        assert [len(definition.nodes), len(definition.edges)] == [2, 2]

    def test_what_the_validator_remembers_is_no_part_of_it(self) -> None:
        known, other = (PipelineDefinition(nodes=[self.node], edges=[]) for _ in range(2))
        get_execution_order(known)
        assert known == other
        assert known == pickle.loads(pickle.dumps(known))  # noqa: S301 - our own
        assert other.model_dump() == known.model_dump()

    def test_from_json_reports_every_place(self) -> None:
        with pytest.raises(InvalidPipelineError) as caught:
            PipelineDefinition.from_json(
                [{"id": "a", "type": "agent", "name": "A", "config": None}, 3], [{"id": "e", "from": "a"}]
            )
        assert [(issue.code, issue.node_id, issue.edge_id) for issue in caught.value.issues] == [
            ("invalid_config", "a", None),
            ("invalid_node", None, None),
            ("invalid_edge", None, "e"),
        ]
        assert "Invalid node data: nodes[0].config (node 'a'): Input should be a valid dictionary" in str(caught.value)
        assert "Invalid edge data: edges[0].to (edge 'e'): Field required" in str(caught.value)


class TestResult:
    def test_defaults(self) -> None:
        result = NodeExecutionResult(node_id="a", status="completed")
        assert (result.output, result.error, result.duration_ms, result.retry_count) == (None, None, 0, 0)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"status": "running"},
            {"status": None},
            {"duration_ms": -1},
            {"duration_ms": 2**31},
            {"retry_count": -1},
            {"retry_count": math.inf},
            {"duration_ms": math.nan},
            {"output": [1]},
        ],
        ids=repr,
    )
    def test_bounds(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            NodeExecutionResult.model_validate({"node_id": "a", "status": "failed", **wrong})

    @pytest.mark.parametrize("path", sorted(DATA.glob("workflows/*.json")), ids=lambda path: path.stem)
    def test_recorded_results(self, path: Path) -> None:
        rows = json.loads(path.read_text())["results"]
        parsed = [NodeExecutionResult.model_validate(row) for row in rows]
        assert rows == [result.model_dump(exclude_unset=True) for result in parsed]


WRONG_FIELDS: list[dict[str, Any]] = [
    {"name": ""},
    {"name": "x" * 256},
    {"name": "a\0b"},
    {"name": "\ud800"},
    {"name": None},
    {"description": "a\0b"},
    {"status": None},
    {"status": "running"},
    {"nodes": None},
    {"nodes": "[]"},
    {"edges": {}},
    {"timeout_seconds": -1},
    {"timeout_seconds": 2**31},
    {"timeout_seconds": math.nan},
    {"max_retries_per_node": -1},
    {"max_retries_per_node": 1_000_001},
    {"max_retries_per_node": None},
    {"retry_backoff_base": math.nan},
    {"retry_backoff_base": -0.5},
    {"retry_backoff_max": math.inf},
    {"retry_backoff_max": 31_536_001.0},
    {"unknown": 1},
]


class TestCreate:
    def test_defaults(self) -> None:
        expected: dict[str, Any] = {
            "name": "p",
            "description": None,
            "status": "draft",
            "nodes": [],
            "edges": [],
            "timeout_seconds": 3600,
            "max_retries_per_node": 3,
            "retry_backoff_base": 1.0,
            "retry_backoff_max": 60.0,
            "max_running": 0,
        }
        assert expected == PipelineCreate(name="p").model_dump(mode="json")

    def test_holds_raw_json_as_it_is(self) -> None:
        node = {"id": "a", "type": "agent", "config": {"agent_id": 7, "x": None}, "mine": 1}
        edge = PipelineEdge(id="e", from_node="a", to_node="a")
        created = PipelineCreate(name="p", nodes=[node], edges=[edge])
        assert node is created.nodes[0]
        assert edge is created.edges[0]

    @pytest.mark.parametrize("wrong", WRONG_FIELDS, ids=repr)
    def test_bounds(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            PipelineCreate.model_validate({"name": "p", **wrong})

    def test_is_frozen(self) -> None:
        with pytest.raises(ValidationError):
            PipelineCreate(name="p").name = "q"  # type: ignore[misc]

    def test_zero_is_a_value(self) -> None:
        created = PipelineCreate(name="p", timeout_seconds=0, max_retries_per_node=0, retry_backoff_base=0)
        assert (created.timeout_seconds, created.max_retries_per_node, created.retry_backoff_base) == (0, 0, 0.0)


class TestUpdate:
    def test_knows_which_fields_were_given(self) -> None:
        assert {"description", "status"} == PipelineUpdate(
            description=None, status=PipelineStatus.PAUSED
        ).model_fields_set

    def test_null_where_the_column_may_be_null(self) -> None:
        update = PipelineUpdate(description=None, timeout_seconds=None)
        assert update.model_dump(exclude_unset=True) == {"description": None, "timeout_seconds": None}

    @pytest.mark.parametrize("wrong", WRONG_FIELDS, ids=repr)
    def test_bounds(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            PipelineUpdate.model_validate(wrong)

    @pytest.mark.parametrize("field", sorted(PipelineUpdate.model_fields.keys() - {"description", "timeout_seconds"}))
    def test_null_elsewhere(self, field: str) -> None:
        with pytest.raises(ValidationError, match="can't be null"):
            PipelineUpdate.model_validate({field: None})

    def test_has_the_fields_of_create(self) -> None:
        assert PipelineCreate.model_fields.keys() == PipelineUpdate.model_fields.keys()


class TestRead:
    def test_a_broken_graph_can_be_read(self) -> None:
        row = read({"not": "a list"}, None)
        assert (row.nodes, row.edges, row.status) == ({"not": "a list"}, None, PipelineStatus.DRAFT)
        with pytest.raises(InvalidPipelineError, match="nodes must be a list, not dict"):
            _ = row.definition

    def test_definition(self) -> None:
        row = read([{"id": "a", "type": "trigger", "name": "A"}], [])
        assert [node.id for node in row.definition.nodes] == ["a"]

    def test_page(self) -> None:
        page = Page[int](items=(1, 2), next_cursor=None)
        assert (page.items, page.next_cursor) == ((1, 2), None)

    def test_event(self) -> None:
        event = PipelineEvent.model_validate_json(
            '{"id": 1, "run_id": 2, "node_id": null, "type": "pipeline_run.started", "data": {"a": 1}, "xid": "7",'
            ' "created_at": "2026-01-02T03:04:05+00:00", "cursor": "1-2-7-1", "later": "a column"}'
        )
        assert event.type is EventType.PIPELINE_RUN_STARTED
        assert (event.id, event.run_id, event.node_id, event.data) == (1, 2, None, {"a": 1})
        assert event.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        with pytest.raises(ValidationError, match="frozen"):
            event.run_id = 3  # type: ignore[misc]


class TestToCreate:
    NODES = ({"id": "t", "type": "trigger", "name": "T", "config": {"x": None}, "mine": [1]},)

    def test_keeps_all_but_the_status(self) -> None:
        stored = read(list(self.NODES), []).model_copy(
            update={"status": PipelineStatus.ACTIVE, "timeout_seconds": 0, "max_running": 7, "description": "d"}
        )
        draft = stored.to_create()
        assert draft.status is PipelineStatus.DRAFT
        for name in PipelineCreate.model_fields.keys() - {"status"}:
            assert getattr(draft, name) == getattr(stored, name)
        assert draft.model_dump()["nodes"] == [dict(node) for node in self.NODES]

    @pytest.mark.parametrize("nodes", [None, {}, "[]"])
    def test_of_what_is_no_graph_raises(self, nodes: object) -> None:
        with pytest.raises(ValidationError, match="nodes"):
            read(nodes, []).to_create()
