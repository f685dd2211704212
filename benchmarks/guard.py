"""What the database's own checks of a graph cost, as a part of the plain insert of the same JSON."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import psycopg

from benchmarks.stage import Graph, Row, Stage, chain, connect, fan_out, floor, milliseconds, nodes

Connection = psycopg.Connection[tuple[Any, ...]]

INSERT = "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('bench', %s, %s) RETURNING id"


def layered(count: int) -> Graph:
    """Twenty layers; each node follows three of the layer before."""
    width, chance = max(count // 20, 1), random.Random(1)
    pairs = [
        (source, target)
        for target in range(width, count)
        for source in chance.sample(range((target // width - 1) * width, target // width * width), min(3, width))
    ]
    return nodes(count), [{"id": f"e{at}", "from": f"node-{a}", "to": f"node-{b}"} for at, (a, b) in enumerate(pairs)]


def shuffled(graph: Graph) -> Graph:
    """The same with nodes and edges in any order."""
    chance = random.Random(2)
    return chance.sample(graph[0], len(graph[0])), chance.sample(graph[1], len(graph[1]))


def guard(stage: Stage) -> Iterator[Row]:
    """What refuses a graph: the checks of revision 010, and these with the proof of an order, which 009 needs anyway.

    The whole insert also compiles the graph and writes its version, once, so that no run has to.
    """
    base = floor(stage)
    with connect(stage.ours) as ours:
        for count, repeats in ((10, 100), (100, 60), (1_000, 30), (10_000, 5)):
            for name, graph in (("chain", chain(count)), ("layered", layered(count)), ("fan-out", fan_out(count))):
                for order, what in (("in order", graph), ("shuffled", shuffled(graph))):
                    values = json.dumps(what[0]), json.dumps(what[1])
                    checked, ordered, whole, plain = _compare(ours, base, values, repeats)
                    bar = 0.5 if order == "in order" else 1.0
                    graph_name = f"{count} nodes, {name}, {order}"
                    for part, cost in (("checks", checked), ("checks, order", checked + ordered)):
                        yield Row(f"{part}: {graph_name}", milliseconds(cost), milliseconds(plain), cost / plain, bar)
                    title = f"whole insert: {graph_name}"
                    yield Row(title, milliseconds(whole), milliseconds(plain), whole / plain, None)
        yield _counter_update(ours, base)


def _compare(
    ours: psycopg.Connection[Any], base: psycopg.Connection[Any], values: Any, repeats: int
) -> tuple[float, ...]:
    """Median seconds of the checks, of the order, of the whole insert and of the plain one; they take turns."""
    statements = {
        "parse": (ours, "SELECT jsonb_typeof(%s::jsonb), jsonb_typeof(%s::jsonb)"),
        "check": (ours, "SELECT circle.check_graph(%s::jsonb, %s::jsonb, false)"),
        "sort": (ours, "SELECT FROM circle.sort_graph(%s::jsonb, %s::jsonb)"),
        "whole": (ours, INSERT),
        "plain": (base, INSERT),
    }
    times: dict[str, list[float]] = {name: [] for name in statements}
    for turn in range(-2, repeats):
        for name, (connection, statement) in statements.items():
            begin = time.perf_counter()
            connection.execute(statement, values)
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    parsed, checked, ordered, whole, plain = (statistics.median(seen) for seen in times.values())
    return checked - parsed, ordered - parsed, whole, plain


def _counter_update(ours: Connection, base: Connection) -> Row:
    values = json.dumps(chain(1_000)[0]), json.dumps(chain(1_000)[1])
    rows = [connection.execute(INSERT, values).fetchone() for connection in (ours, base)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(200):
        for connection, row, seen in zip((ours, base), rows, times, strict=True):
            begin = time.perf_counter()
            connection.execute("UPDATE circle.pipelines SET run_count = run_count + 1 WHERE id = %s", row)
            seen.append(time.perf_counter() - begin)
    mine, plain = (statistics.median(seen) for seen in times)
    return Row(
        "a counter update, 1,000 nodes, to one without triggers",
        milliseconds(mine),
        milliseconds(plain),
        mine / plain,
        1.2,
    )
