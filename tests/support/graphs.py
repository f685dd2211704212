"""Graphs and nodes that many tests use."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

Nodes = list[dict[str, Any]]
Graph = tuple[Nodes, Nodes]
"""Nodes and edges, as JSON."""

TRIGGER: dict[str, Any] = {
    "id": "t",
    "type": "trigger",
    "name": "T",
    "config": {"cron": None},
    "position": {"x": 50, "y": 100},
}
AGENT: dict[str, Any] = {
    "id": "a",
    "type": "agent",
    "name": "A",
    "config": {"agent_id": 7, "task": "review", "extra": [1]},
}
UNFINISHED: dict[str, Any] = {"id": "a", "type": "agent", "name": "A", "config": {}}
DELAY: dict[str, Any] = {"id": "d", "type": "delay", "name": "D"}
EDGE: dict[str, Any] = {"id": "e", "from": "t", "to": "a"}
BACK: dict[str, Any] = {"id": "back", "from": "a", "to": "t"}

NODES: Nodes = [TRIGGER, AGENT]
EDGES: Nodes = [EDGE]
CYCLE: Nodes = [EDGE, BACK]
GOOD: Graph = (NODES, EDGES)
CYCLIC: Graph = (NODES, CYCLE)
DRAFT: Graph = ([TRIGGER, UNFINISHED], EDGES)

DIAMOND = "a>b a>c b>d c>d"
"""For ``graph``."""


def graph(spec: str) -> Graph:
    """The JSON of a graph, from ``"a>b b>c=yes d"``: edges, which may have a label, and nodes that have none.

    The nodes stand in the order of their names' first use.
    """
    names: dict[str, None] = {}
    edges: Nodes = []
    for item in spec.split():
        ends, _, label = item.partition("=")
        names |= dict.fromkeys(ends.split(">"))
        if ">" in ends:
            source, target = ends.split(">")
            edge = {"id": f"e{len(edges)}", "from": source, "to": target}
            edges.append(edge | {"condition": label} if label else edge)
    return [{"id": name, "type": "action", "name": name.upper(), "config": {"action": "do"}} for name in names], edges


def chain(length: int) -> str:
    """For ``graph``: nodes one after the other."""
    return " ".join(["n0", *(f"n{at}>n{at + 1}" for at in range(length - 1))])


def values(graph: Graph = GOOD, name: str = "p", **more: Any) -> dict[str, Any]:
    """Columns of a pipeline with a copy of a graph."""
    nodes, edges = copy.deepcopy(graph)
    return {"name": name, "nodes": nodes, "edges": edges, **more}


def shared_files(folder: str) -> list[Path]:
    """Recorded JSON files; they lie next to the checkout or in it, and there are none elsewhere."""
    root = Path(__file__).parents[2]
    found = (root.parent / "shared" / "data" / folder, root / "shared" / "data" / folder)
    return sorted(path for place in found for path in place.glob("*.json"))
