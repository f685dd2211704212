"""Parse, check and order a graph in Python, against ``graphlib`` on the same JSON lists."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from graphlib import TopologicalSorter

from benchmarks.databases import Databases
from benchmarks.graphs import Graph, Json, edges, shuffled
from benchmarks.table import Row, Size, timed
from gathering_pipeline.validator import find_issues, get_execution_order, parse_pipeline_definition

Validate = Callable[[list[Json], list[Json]], list[str]]

CONFIGS: tuple[tuple[str, Json], ...] = (
    ("agent", {"agent_id": 7, "task": "write the report"}),
    ("action", {"action": "notify", "channel": "mail", "recipients": ["ops@example.com"]}),
    ("condition", {"condition": "input.approved", "agent_id": None}),
)


def validate(_databases: Databases, size: Size) -> Iterator[Row]:
    """Time by shape and number of nodes; memory of the largest graph."""
    for full_count, repeats, bar in ((10, 2_000, 4.0), (1_000, 200, 4.0), (100_000, 3, 2.5)):
        count = size.count(full_count)
        for shape, pairs in (("chain", chain_pairs), ("random", random_pairs), ("fan-out", fan_out_pairs)):
            in_order = typed_graph(count, pairs(count))
            for order, graph in (("", in_order), (", shuffled", shuffled(in_order))):
                ours, base = least_seconds((validate_graph, sort_graph), load_again(graph), size.repeats(repeats))
                yield Row.of_times(f"validate {count} nodes, {len(graph[1])} edges, {shape}{order}", ours, base, bar)
    count = size.count(100_000)
    graph = load_again(typed_graph(count, random_pairs(count)))
    ours, base = (peak_megabytes(function, graph) for function in (validate_graph, sort_graph))
    name = f"validate {len(graph[0])} nodes, {len(graph[1])} edges: peak memory"
    yield Row(name, f"{ours:.3g} MB", f"{base:.3g} MB", ours / base, None)


def validate_graph(nodes_json: list[Json], edges_json: list[Json]) -> list[str]:
    """Parse, check, order."""
    definition = parse_pipeline_definition(nodes_json, edges_json)
    if issues := find_issues(definition):
        raise AssertionError(issues[:3])
    return get_execution_order(definition)


def sort_graph(nodes_json: list[Json], edges_json: list[Json]) -> list[str]:
    """The floor: a program that trusts its input."""
    graph: dict[str, set[str]] = {node["id"]: set() for node in nodes_json}
    for edge in edges_json:
        graph[edge["to"]].add(edge["from"])
    return list(TopologicalSorter(graph).static_order())


def typed_graph(count: int, pairs: Iterator[tuple[int, int]]) -> Graph:
    """A graph of ``count`` nodes of several types with an edge for each pair of places."""
    nodes = []
    for at in range(count):
        kind, config = CONFIGS[at % len(CONFIGS)]
        position = {"x": at * 10, "y": at % 7}
        nodes.append({"id": f"node-{at}", "type": kind, "name": f"Node {at}", "config": config, "position": position})
    return nodes, edges(list(pairs))


def chain_pairs(count: int) -> Iterator[tuple[int, int]]:
    """Each node follows the previous one."""
    return ((at, at + 1) for at in range(count - 1))


def random_pairs(count: int) -> Iterator[tuple[int, int]]:
    """2.5 edges a node: from each node to one of the 100 before it, then between any two that are so near."""
    chance, seen = random.Random(3), set[tuple[int, int]]()
    wanted = max(count - 1, min(count * 5 // 2, count * (count - 1) // 4))
    while len(seen) < wanted:
        tail = len(seen) + 1 if len(seen) < count - 1 else chance.randrange(1, count)
        pair = (chance.randrange(max(0, tail - 100), tail), tail)
        if pair not in seen:
            seen.add(pair)
            yield pair


def fan_out_pairs(count: int) -> Iterator[tuple[int, int]]:
    """All nodes but the first and the last lie in parallel between these two."""
    for at in range(1, count - 1):
        yield 0, at
        yield at, count - 1


def load_again(graph: Graph) -> Graph:
    """The same graph as it comes from the database: no two places share a string."""
    loaded: list[list[Json]] = json.loads(json.dumps(graph))
    return loaded[0], loaded[1]


def least_seconds(functions: tuple[Validate, ...], graph: Graph, repeats: int) -> list[float]:
    """The least time of each function; they take turns, so that a noisy moment hits all of them."""
    times: list[list[float]] = []
    for _ in range(repeats):
        if len(graph[0]) > 10_000:
            gc.collect()
        times.append([timed(partial(function, *graph)) for function in functions])
    return [min(of_one) for of_one in zip(*times, strict=True)]


def peak_megabytes(function: Validate, graph: Graph) -> float:
    """The most memory that a function takes in addition to its arguments."""
    gc.collect()
    tracemalloc.start()
    try:
        function(*graph)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
