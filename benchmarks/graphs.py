"""Graphs in the JSON that an editor stores."""

from __future__ import annotations

import random
from typing import Any

Json = dict[str, Any]
Graph = tuple[list[Json], list[Json]]


def nodes(count: int) -> list[Json]:
    """``count`` agents."""
    return [
        {
            "id": f"node-{at}",
            "type": "agent",
            "name": f"Node {at}",
            "config": {"agent_id": 7, "task": "write the report", "cron": None},
            "position": {"x": at * 10, "y": at % 7},
        }
        for at in range(count)
    ]


def edges(pairs: list[tuple[int, int]]) -> list[Json]:
    """Edges between the nodes at these places."""
    return [{"id": f"e{at}", "from": f"node-{a}", "to": f"node-{b}"} for at, (a, b) in enumerate(pairs, start=1)]


def chain(count: int) -> Graph:
    """Each node follows the previous one."""
    return nodes(count), edges([(at - 1, at) for at in range(1, count)])


def fan_out(count: int) -> Graph:
    """All nodes but the first and the last lie in parallel between these two."""
    middle = range(1, count - 1)
    return nodes(count), edges([(0, at) for at in middle] + [(at, count - 1) for at in middle])


def layered(count: int) -> Graph:
    """Twenty layers; each node follows three of the previous layer."""
    width, chance = max(count // 20, 1), random.Random(1)
    pairs = [
        (source, target)
        for target in range(width, count)
        for source in chance.sample(range((target // width - 1) * width, target // width * width), min(3, width))
    ]
    return nodes(count), edges(pairs)


def shuffled(graph: Graph) -> Graph:
    """The same graph, its nodes and edges in random order."""
    chance = random.Random(2)
    return chance.sample(graph[0], len(graph[0])), chance.sample(graph[1], len(graph[1]))
