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
    """The JSON of a graph, from ``"a>b b>c d"``: edges, and nodes that have none; nodes in the order of their names' first use."""
    edges = [edge.split(">") for edge in spec.split() if ">" in edge]
    names = dict.fromkeys(name for item in spec.split() for name in item.split(">"))
    return (
        [{"id": name, "type": "action", "name": name.upper(), "config": {"action": "do"}} for name in names],
        [{"id": f"e{at}", "from": source, "to": target} for at, (source, target) in enumerate(edges)],
    )


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
