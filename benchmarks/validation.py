"""Parse, check and order a graph, against ``graphlib`` on the same JSON lists: ``python -m benchmarks.validation``."""

from __future__ import annotations

import gc
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from typing import Any

from gathering_pipeline.validator import find_issues, get_execution_order, parse_pipeline_definition

Graph = tuple[list[dict[str, Any]], list[dict[str, Any]]]

BARS = {10: 4.0, 1_000: 4.0, 100_000: 3.0}
"""Highest ratio to graphlib's time, by number of nodes."""

_CONFIGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("agent", {"agent_id": 7, "task": "write the report"}),
    ("action", {"action": "notify", "channel": "mail", "recipients": ["ops@example.com"]}),
    ("condition", {"condition": "input.approved", "agent_id": None}),
)


def _graph(count: int, pairs: Iterator[tuple[int, int]], *, shuffled: bool = False) -> Graph:
    nodes = []
    for at in range(count):
        kind, config = _CONFIGS[at % len(_CONFIGS)]
        position = {"x": at * 10, "y": at % 7}
        nodes.append({"id": f"node-{at}", "type": kind, "name": f"Node {at}", "config": config, "position": position})
    edges = [{"id": f"e{at}", "from": f"node-{a}", "to": f"node-{b}"} for at, (a, b) in enumerate(pairs)]
    if shuffled:
        random.Random(1).shuffle(nodes)
        random.Random(2).shuffle(edges)
    loaded: Graph = json.loads(json.dumps([nodes, edges]))  # so that no two places share a string, as in real input
    return loaded


def _chain(count: int) -> Iterator[tuple[int, int]]:
    return ((at, at + 1) for at in range(count - 1))


def _near(count: int) -> Iterator[tuple[int, int]]:
    """2.5 edges a node: from each node to one of the 100 before it, then between any two so near."""
    chance, seen = random.Random(3), set[tuple[int, int]]()
    while len(seen) < min(count * 5 // 2, count * (count - 1) // 4):
        tail = len(seen) + 1 if len(seen) < count - 1 else chance.randrange(1, count)
        pair = (chance.randrange(max(0, tail - 100), tail), tail)
        if pair not in seen:
            seen.add(pair)
            yield pair


def _fan(count: int) -> Iterator[tuple[int, int]]:
    for at in range(1, count - 1):
        yield 0, at
        yield at, count - 1


def floor(nodes: list[dict[str, Any]], edges: list[dict[str, Any]]) -> list[str]:
    """What a program would write that trusts its input."""
    graph: dict[str, set[str]] = {node["id"]: set() for node in nodes}
    for edge in edges:
        graph[edge["to"]].add(edge["from"])
    return list(TopologicalSorter(graph).static_order())


def ours(nodes: list[dict[str, Any]], edges: list[dict[str, Any]]) -> list[str]:
    """Parse, check, order."""
    definition = parse_pipeline_definition(nodes, edges)
    if issues := find_issues(definition):
        raise AssertionError(issues[:3])
    return get_execution_order(definition)


def _best(functions: list[Callable[..., object]], graph: Graph, repeats: int) -> list[float]:
    """The least time of each in milliseconds; they take turns, so that a noisy moment hits all of them."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for at, function in enumerate(functions):
            if repeats < 10:
                gc.collect()
            begin = time.perf_counter()
            function(*graph)
            best[at] = min(best[at], time.perf_counter() - begin)
    return [seconds * 1_000 for seconds in best]


Row = tuple[int, int, str, float, float, float, float]


def measure() -> Iterator[Row]:
    """Nodes, edges, shape, our time and graphlib's in milliseconds, their ratio, and its bar."""
    for count, bar in BARS.items():
        for shape, pairs in (("chain", _chain), ("random", _near), ("fan-out", _fan)):
            for shuffled in (False, True):
                graph = _graph(count, pairs(count), shuffled=shuffled)
                mine, base = _best([ours, floor], graph, 3 if count > 10_000 else 200 if count > 100 else 2_000)
                name = f"{shape}, shuffled" if shuffled else shape
                yield count, len(graph[1]), name, mine, base, mine / base, bar


def memory() -> tuple[str, float, float]:
    """What was measured, and the most memory beside the lists themselves, ours and graphlib's, in MB."""
    graph = _graph(100_000, _near(100_000))
    peaks = []
    for function in (ours, floor):
        gc.collect()
        tracemalloc.start()
        function(*graph)
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    return f"{len(graph[0])} nodes, {len(graph[1])} edges: peak memory", peaks[0], peaks[1]


def rows() -> list[Row]:
    """The whole table."""
    return list(measure())


def main() -> None:
    """Print the table."""
    print(f"{'nodes':>7} {'edges':>7}  {'shape':<18} {'ours ms':>9} {'graphlib':>9} {'ratio':>6} {'bar':>5}")
    for nodes, edges, shape, mine, base, ratio, bar in measure():
        print(f"{nodes:>7} {edges:>7}  {shape:<18} {mine:>9.3f} {base:>9.3f} {ratio:>6.2f} {bar:>5.1f}", flush=True)
    what, mine, base = memory()
    print(f"{what}: {mine:.0f} MB, graphlib {base:.0f} MB, ratio {mine / base:.2f}")


if __name__ == "__main__":
    main()
