"""What the ORM stores of a graph, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gathering_pipeline.errors import InvalidPipelineError
from gathering_pipeline.hooks import check_list, prepare_fields, prepare_graph
from gathering_pipeline.models import PipelineDefinition, PipelineEdge, PipelineNode
from gathering_pipeline.validator import DEFAULT_LIMITS

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

TRIGGER = {"id": "a", "type": "trigger", "name": "A"}
AGENT = {"id": "b", "type": "agent", "name": "B", "config": {"agent_id": 7, "task": "t", "cron": None}, "mine": [1]}
EDGE = {"id": "e", "from": "a", "to": "b"}


class MutableList(list[Any]):
    """As SQLAlchemy's."""


class TestPrepareGraph:
    def test_raw_json_is_kept_as_it_is(self) -> None:
        nodes, edges = MutableList([TRIGGER, AGENT]), MutableList([EDGE | {"condition": None, "label": "x"}])
        stored = prepare_graph(nodes, edges)
        assert (list(nodes), list(edges)) == stored
        assert [list, list] == [type(items) for items in stored]
        assert stored[0][1] is AGENT

    def test_edges_are_spelled_from_and_to(self) -> None:
        _, edges = prepare_graph([TRIGGER, AGENT], [{"id": "e", "from_node": "a", "to_node": "b", "x": 1}])
        assert edges == [{"id": "e", "from": "a", "to": "b", "x": 1}]

    def test_both_spellings_have_to_agree(self) -> None:
        _, edges = prepare_graph([TRIGGER, AGENT], [EDGE | {"from_node": "a"}])
        assert edges == [EDGE]
        with pytest.raises(InvalidPipelineError, match=r"edges\[0\] has both to and to_node, and they differ"):
            prepare_graph([TRIGGER, AGENT], [EDGE | {"to_node": "a"}])

    def test_models_are_written_without_noise(self) -> None:
        nodes = [PipelineNode.model_validate(item) for item in (TRIGGER, AGENT)]
        edges = [PipelineEdge.model_validate(EDGE)]
        assert prepare_graph(nodes, edges) == ([TRIGGER, AGENT], [EDGE])

    def test_models_and_json_mixed(self) -> None:
        edge = PipelineEdge(id="e", from_node="a", to_node="b", condition="x")
        expected = ([TRIGGER, AGENT], [EDGE | {"condition": "x"}])
        assert expected == prepare_graph([PipelineNode.model_validate(TRIGGER), AGENT], [edge])

    def test_a_default_that_was_filled_is_written(self) -> None:
        node = PipelineNode(id="a", type="trigger", name="A")
        node.config["cron"] = "* * * * *"
        nodes, _ = prepare_graph([node], [])
        assert nodes == [TRIGGER | {"config": {"cron": "* * * * *"}}]

    def test_a_stored_graph_comes_back_the_same(self) -> None:
        stored = prepare_graph([TRIGGER, AGENT | {"position": {"x": 1}}], [EDGE])
        definition = PipelineDefinition.from_json(*stored)
        again = prepare_graph(definition.nodes, definition.edges)
        assert definition == PipelineDefinition.from_json(*again)

    def test_a_wrong_shape_hides_no_cycle(self) -> None:
        nodes = [TRIGGER, TRIGGER, AGENT | {"config": {}}, {"id": "c", "type": "start", "name": "C"}, {"id": 1}]
        edges = [EDGE, {"id": "e2", "from": "b", "to": "b"}, EDGE]
        with pytest.raises(InvalidPipelineError) as caught:
            prepare_graph(nodes, edges)
        expected = {
            "duplicate_node",
            "duplicate_edge",
            "cycle",
            "missing_config",
            "invalid_type",
            "invalid_id",
            "invalid_node",
        }
        assert expected == {issue.code for issue in caught.value.issues}

    @pytest.mark.parametrize(
        ("nodes", "edges", "codes"),
        [
            ([TRIGGER, AGENT, TRIGGER], [], {"duplicate_node"}),
            ([TRIGGER], [EDGE], {"unknown_target"}),
            ([TRIGGER, AGENT], [EDGE, {"id": "f", "from": "b", "to": "a"}], {"cycle"}),
            ([TRIGGER], [{"id": "f", "from": "a", "to": "a"}], {"cycle"}),
            ([TRIGGER, AGENT | {"config": None}], [], {"invalid_config"}),
            ([TRIGGER | {"config": {"x": Decimal(1)}}], [], {"invalid_json"}),
            ([TRIGGER | {"mine": "a\0"}], [], {"invalid_json"}),
            ([TRIGGER | {"id": "x" * 101}], [], {"invalid_id"}),
            ([TRIGGER | {"id": 1}], [], {"invalid_id"}),
            ([TRIGGER, 3], [], {"invalid_node"}),
            ([TRIGGER], ["e"], {"invalid_edge"}),
        ],
        ids=[
            "two nodes",
            "dangling",
            "cycle",
            "self-edge",
            "config",
            "decimal",
            "nul",
            "long",
            "number",
            "item",
            "text",
        ],
    )
    @pytest.mark.parametrize("incomplete", [False, True])
    def test_refused_also_in_a_draft(self, nodes: object, edges: object, codes: set[str], incomplete: bool) -> None:
        with pytest.raises(InvalidPipelineError) as caught:
            prepare_graph(nodes, edges, allow_incomplete=incomplete)
        assert codes == {issue.code for issue in caught.value.issues}

    @pytest.mark.parametrize(
        "nodes", [[], [TRIGGER, AGENT | {"config": {"agent_id": " "}}]], ids=["empty", "unfinished"]
    )
    def test_a_draft(self, nodes: list[Any]) -> None:
        assert (nodes, []) == prepare_graph(nodes, [], allow_incomplete=True)
        with pytest.raises(InvalidPipelineError):
            prepare_graph(nodes, [])

    @pytest.mark.parametrize("value", [None, "[]", {}, ({},), object()], ids=lambda value: type(value).__name__)
    def test_lists_only(self, value: object) -> None:
        with pytest.raises(InvalidPipelineError, match="nodes must be a list, not "):
            prepare_graph(value, [])
        with pytest.raises(InvalidPipelineError, match="edges must be a list, not "):
            prepare_graph([TRIGGER], value)
        with pytest.raises(InvalidPipelineError, match="edges must be a list, not "):
            check_list("edges", value)

    def test_limits(self) -> None:
        with pytest.raises(InvalidPipelineError, match="100001 nodes, more than the limit of 100000 nodes"):
            prepare_graph([TRIGGER] * 100_001, [])

    @pytest.mark.parametrize("key", ["config", "mine"])
    def test_limit_of_bytes(self, key: str) -> None:
        node = TRIGGER | {key: {"text": "x" * DEFAULT_LIMITS.max_bytes}}
        with pytest.raises(
            InvalidPipelineError, match=r"Pipeline has \d+ bytes, more than the limit of 67108864 bytes"
        ):
            prepare_graph([node], [])

    @pytest.mark.parametrize("path", sorted(DATA.glob("*/*.json")), ids=lambda path: path.stem)
    def test_real_data(self, path: Path) -> None:
        stored = json.loads(path.read_text())
        call: Callable[[], Any] = lambda: prepare_graph(  # noqa: E731
            stored["nodes"], stored["edges"], allow_incomplete=stored.get("status") == "draft"
        )
        if path.stem.startswith("bad_"):
            with pytest.raises(InvalidPipelineError):
                call()
        else:
            assert (stored["nodes"], stored["edges"]) == call()


class TestPrepareFields:
    def test_good(self) -> None:
        values = {"name": "p", "status": "active", "nodes": [TRIGGER, AGENT], "edges": [EDGE], "run_count": 0, "id": 5}
        values |= {"timeout_seconds": None, "created_at": datetime.now(UTC), "last_run": None}
        assert values == prepare_fields(values)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"name": None},
            {"name": "a\0"},
            {"status": None},
            {"status": "running"},
            {"timeout_seconds": -1},
            {"max_retries_per_node": None},
            {"retry_backoff_base": math.nan},
            {"retry_backoff_max": math.inf},
            {"run_count": -1},
            {"error_count": True},
            {"success_count": None},
            {"created_at": datetime(2024, 1, 1)},  # noqa: DTZ001 - naive, that is the point
            {"updated_at": "infinity"},
        ],
        ids=repr,
    )
    def test_wrong(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidPipelineError) as caught:
            prepare_fields(wrong)
        (issue,) = caught.value.issues
        assert (issue.severity, issue.code) == ("error", "invalid_field")
        assert issue.message.startswith(f"{next(iter(wrong))}: ")

    def test_what_is_active_is_complete(self) -> None:
        draft = {"nodes": [TRIGGER, AGENT | {"config": {}}], "edges": [EDGE]}
        assert draft == prepare_fields(draft, allow_incomplete=True)
        with pytest.raises(InvalidPipelineError, match="missing its task"):
            prepare_fields(draft | {"status": "active"}, allow_incomplete=True)

    def test_half_a_graph(self) -> None:
        edge = {"id": "e", "from_node": "elsewhere", "to": "b"}
        assert prepare_fields({"edges": [edge]}) == {"edges": [{"id": "e", "from": "elsewhere", "to": "b"}]}
        assert prepare_fields({"nodes": [TRIGGER]}) == {"nodes": [TRIGGER]}
        with pytest.raises(InvalidPipelineError, match=r"edges\[0\].to"):
            prepare_fields({"edges": [{"id": "e", "from": "a"}]})
        with pytest.raises(InvalidPipelineError, match="Duplicate node id"):
            prepare_fields({"nodes": [TRIGGER, TRIGGER]})
