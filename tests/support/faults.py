"""Faults of a graph, one a row, with the code and the place under which every path reports them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from gathering_pipeline import IssueCode
from gathering_pipeline.node_types import REQUIRED_KEYS

SHAPE, VALUES, STORED = "shape", "values", "stored"
"""What sees a fault: parsing; ``find_issues`` of models made without validation; the database."""
EVERYWHERE = (SHAPE, VALUES, STORED)


@dataclass(frozen=True)
class Fault:
    """A graph, and the issue that is reported.

    Attributes:
        seen_by: Which paths report it; the hooks always do.
    """

    nodes: Any
    edges: Any
    code: IssueCode
    loc: tuple[str | int, ...]
    seen_by: tuple[str, ...]


def node(id: Any = "n", **more: Any) -> dict[str, Any]:
    return {"id": id, "type": "trigger", "name": "N", **more}


def edge(id: Any = "e", start: Any = "a", end: Any = "b", **more: Any) -> dict[str, Any]:
    return {"id": id, "from": start, "to": end, **more}


def without(item: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != key}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def each(*values: Any) -> tuple[Any, ...]:
    """Values of any types."""
    return values


A, B, C = node("a"), node("b"), node("c")
NODES = [A, B, C]
CODE = IssueCode

_TABLE: dict[str, tuple[Any, Any, IssueCode, tuple[str | int, ...], tuple[str, ...]]] = {
    # lists
    "nodes: null": (None, [], CODE.NOT_A_LIST, ("nodes",), EVERYWHERE),
    "nodes: object": ({}, [], CODE.NOT_A_LIST, ("nodes",), EVERYWHERE),
    "nodes: text": ("[]", [], CODE.NOT_A_LIST, ("nodes",), EVERYWHERE),
    "edges: object": ([A], {}, CODE.NOT_A_LIST, ("edges",), EVERYWHERE),
    "edges: number": ([A], 1, CODE.NOT_A_LIST, ("edges",), EVERYWHERE),
    "both: text": ("", "", CODE.NOT_A_LIST, ("edges",), EVERYWHERE),
    "no nodes": ([], [], CODE.NO_NODES, ("nodes",), (VALUES, STORED)),
    "too many nodes": ([A] * 100_001, [], CODE.TOO_LARGE, ("nodes",), (VALUES, STORED)),
    # items and their fields
    **{
        f"node: {item!r}": ([A, item], [], CODE.INVALID_NODE, ("nodes", 1), (SHAPE, STORED))
        for item in each(None, 1, "x", [], True)
    },
    **{
        f"edge: {item!r}": (NODES, [item], CODE.INVALID_EDGE, ("edges", 0), (SHAPE, STORED))
        for item in each(None, 1, "x", ["id"], False)
    },
    "node without id": ([A, without(B, "id")], [], CODE.INVALID_ID, ("nodes", 1, "id"), EVERYWHERE),
    "edge without id": (NODES, [without(edge(), "id")], CODE.INVALID_ID, ("edges", 0, "id"), EVERYWHERE),
    **{
        f"node's id: {value!r}": ([A, node(value)], [], CODE.INVALID_ID, ("nodes", 1, "id"), EVERYWHERE)
        for value in each(1, 1.5, True, None, [], {})
    },
    **{
        f"edge's id: {value!r}": (NODES, [edge(value)], CODE.INVALID_ID, ("edges", 0, "id"), EVERYWHERE)
        for value in each(1, True, None, {})
    },
    **{
        f"node's id: {value!r}": ([A, node(value)], [], CODE.INVALID_ID, ("nodes", 1, "id"), (VALUES, STORED))
        for value in each("", "  ", "\u3000", " x", "x\n", "x" * 101)
    },
    **{
        f"edge's id: {value!r}": (NODES, [edge(value)], CODE.INVALID_ID, ("edges", 0, "id"), (VALUES, STORED))
        for value in each("", "\x85", "x ", "x" * 1_001)
    },
    "node twice": ([A, B, A, A], [], CODE.DUPLICATE_NODE, ("nodes", 2, "id"), (VALUES, STORED)),
    "edge twice": (NODES, [edge(), edge("f"), edge()], CODE.DUPLICATE_EDGE, ("edges", 2, "id"), (VALUES, STORED)),
    "no type": ([A, without(B, "type")], [], CODE.INVALID_TYPE, ("nodes", 1, "type"), EVERYWHERE),
    **{
        f"type: {kind!r}": ([node(type=kind)], [], CODE.INVALID_TYPE, ("nodes", 0, "type"), EVERYWHERE)
        for kind in each("robot", "", "Agent", "agent ", None, 1, ["agent"])
    },
    "no name": ([without(A, "name")], [], CODE.INVALID_NODE, ("nodes", 0, "name"), EVERYWHERE),
    **{
        f"name: {name!r}": ([node(name=name)], [], CODE.INVALID_NODE, ("nodes", 0, "name"), EVERYWHERE)
        for name in each(None, 1, ["x"])
    },
    **{
        f"config: {config!r}": ([node(config=config)], [], CODE.INVALID_CONFIG, ("nodes", 0, "config"), EVERYWHERE)
        for config in each(None, 1, "x", [])
    },
    **{
        f"position: {place!r}": ([node(position=place)], [], CODE.INVALID_NODE, ("nodes", 0, "position"), EVERYWHERE)
        for place in each(1, "x", [])
    },
    **{
        f"next: {following!r}": ([node(next=following)], [], CODE.INVALID_NODE, ("nodes", 0, "next"), EVERYWHERE)
        for following in each(1, "a", {})
    },
    "next: ['n', None]": ([node(next=["n", None])], [], CODE.INVALID_NODE, ("nodes", 0, "next", 1), EVERYWHERE),
    "condition: 1": (NODES, [edge(condition=1)], CODE.INVALID_EDGE, ("edges", 0, "condition"), EVERYWHERE),
    "condition: []": (NODES, [edge(condition=[])], CODE.INVALID_EDGE, ("edges", 0, "condition"), EVERYWHERE),
    # ends
    "no from": (NODES, [without(edge(), "from")], CODE.INVALID_EDGE, ("edges", 0, "from"), EVERYWHERE),
    "no to": (NODES, [edge(), without(edge("f"), "to")], CODE.INVALID_EDGE, ("edges", 1, "to"), EVERYWHERE),
    **{
        f"from: {end!r}": (NODES, [edge(start=end)], CODE.INVALID_EDGE, ("edges", 0, "from"), EVERYWHERE)
        for end in each(None, 1, True, [], {})
    },
    "from: unknown": (NODES, [edge(start="x")], CODE.UNKNOWN_SOURCE, ("edges", 0, "from"), (VALUES, STORED)),
    "to: unknown": (NODES, [edge(), edge("f", "a", "")], CODE.UNKNOWN_TARGET, ("edges", 1, "to"), (VALUES, STORED)),
    # configurations
    **{
        f"{kind}.{key}: {value!r}": (
            [A, node(type=kind, config=rest | {key: value})],
            [],
            CODE.INVALID_CONFIG,
            ("nodes", 1, "config", key),
            (VALUES, STORED),
        )
        for kind, rest, key, values in each(
            *((kind, {}, key.name, ({},)) for kind, keys in REQUIRED_KEYS.items() for key in keys),
            ("agent", {"task": "t"}, "agent_id", (True, [], {})),
            ("agent", {"agent_id": 7}, "task", (1, False, ["x"])),
            ("condition", {}, "condition", (1, True, {})),
            ("action", {}, "action", (1, [])),
            ("delay", {}, "seconds", (-1, "5", True, [5])),
        )
        for value in values
    },
    **{
        f"{kind}.{key} missing: {config!r}": (
            [A, node(type=kind, config=config)],
            [],
            CODE.MISSING_CONFIG,
            ("nodes", 1, "config", key),
            (VALUES, STORED),
        )
        for kind, config, key in each(
            *(
                (kind, {}, key.name)
                for kind, keys in REQUIRED_KEYS.items()
                for key in keys
                if key.code is CODE.MISSING_CONFIG
            ),
            ("agent", {"agent_id": " "}, "agent_id"),
            ("agent", {"agent_id": 7, "task": None}, "task"),
            ("condition", {"condition": None}, "condition"),
        )
    },
    # cycles
    "self-edge": (NODES, [edge(), edge("f", "b", "b")], CODE.CYCLE, ("nodes", 1), (VALUES, STORED)),
    "cycle": (
        NODES,
        [edge("e", "c", "b"), edge("f", "b", "c"), edge("g", "b", "a")],
        CODE.CYCLE,
        ("nodes", 1),
        (VALUES, STORED),
    ),
    # JSON
    "number in a config": (
        [A, node(config={"x": [0, 10**400]})],
        [],
        CODE.INVALID_JSON,
        ("nodes", 1, "config", "x", 1),
        (VALUES, STORED),
    ),
    "infinity in an unknown key": (
        NODES,
        [edge(mine={"x y": float("inf")})],
        CODE.INVALID_JSON,
        ("edges", 0, "mine", "x y"),
        (SHAPE, STORED),
    ),
    "too deep in a config": (
        [node(config={"x": deep(62)})],
        [],
        CODE.INVALID_JSON,
        ("nodes", 0, "config", "x", *[0] * 61),
        (VALUES, STORED),
    ),
    "too deep in an unknown key": (
        NODES,
        [edge(), edge("f", mine=deep(63))],
        CODE.INVALID_JSON,
        ("edges", 1, "mine", *[0] * 62),
        (SHAPE, STORED),
    ),
    **{
        f"{value!r} in a config": (
            [node(config={"x": {"y": value}})],
            [],
            CODE.INVALID_JSON,
            ("nodes", 0, "config", "x", "y"),
            (VALUES,),
        )
        for value in each("a\0", "\ud800", float("nan"), Decimal(1), b"x", {1})
    },
    **{
        f"{value!r} in an unknown key": ([node(mine=value)], [], CODE.INVALID_JSON, ("nodes", 0, "mine"), (SHAPE,))
        for value in each("a\0", float("nan"), Decimal(1))
    },
    "NUL in a node's id": ([node("a\0")], [], CODE.INVALID_JSON, ("nodes", 0, "id"), (VALUES,)),
    "NUL in an edge's id": (NODES, [edge("a\0")], CODE.INVALID_JSON, ("edges", 0, "id"), (VALUES,)),
    "NUL in a name": ([node(name="a\0")], [], CODE.INVALID_JSON, ("nodes", 0, "name"), (VALUES,)),
    "NUL in next": ([node(next=["a\0"])], [], CODE.INVALID_JSON, ("nodes", 0, "next", 0), (VALUES,)),
    "NUL in an end": (NODES, [edge(end="a\0")], CODE.INVALID_JSON, ("edges", 0, "to"), (VALUES,)),
    "NUL in a condition": (NODES, [edge(condition="a\0")], CODE.INVALID_JSON, ("edges", 0, "condition"), (VALUES,)),
    "a key that is no string": ([node(config={1: 2})], [], CODE.INVALID_JSON, ("nodes", 0, "config"), (SHAPE, VALUES)),
    "a key with NUL": ([node(config={"a\0": 2})], [], CODE.INVALID_JSON, ("nodes", 0, "config"), (VALUES,)),
    "an unknown key with NUL": ([node(**{"a\0": 2})], [], CODE.INVALID_JSON, ("nodes", 0), (SHAPE,)),
}

FAULTS: dict[str, Fault] = {name: Fault(*row) for name, row in _TABLE.items()}


def _parametrize(faults: dict[str, Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults.values(), ids=map(ascii, faults))


by_each_fault = _parametrize(FAULTS)
by_each_stored_fault = _parametrize({name: fault for name, fault in FAULTS.items() if STORED in fault.seen_by})
