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
    """The checks of revision 010, alone and with the compiler of 009, on top of the plain insert."""
    base = floor(stage)
    with connect(stage.ours) as ours:
        for count, repeats in ((10, 100), (100, 60), (1_000, 15), (10_000, 3)):
            for name, graph in (("chain", chain(count)), ("layered", layered(count)), ("fan-out", fan_out(count))):
                for order, what in (("in order", graph), ("shuffled", shuffled(graph))):
                    values = json.dumps(what[0]), json.dumps(what[1])
                    checked, compiled, plain = _compare(ours, base, values, repeats)
                    bar = 0.5 if order == "in order" else 1.0
                    for part, cost in (("checks", checked), ("checks and compiler", checked + compiled)):
                        title = f"{part}, {count} nodes, {name}, {order}, to the plain insert"
                        yield Row(title, milliseconds(cost), milliseconds(plain), cost / plain, bar)
        yield _counter_update(ours, base)


def _compare(
    ours: psycopg.Connection[Any], base: psycopg.Connection[Any], values: Any, repeats: int
) -> tuple[float, ...]:
    """Median seconds of the checks, of the compiler, and of the plain insert; they take turns."""
    check = "SELECT circle.check_graph(%s::jsonb, %s::jsonb, false)"
    compile_ = "SELECT count(*) FROM circle.compile_graph(%s::jsonb, %s::jsonb)"
    parse = "SELECT jsonb_typeof(%s::jsonb), jsonb_typeof(%s::jsonb)"
    times: dict[str, list[float]] = {parse: [], check: [], compile_: [], INSERT: []}
    for turn in range(-2, repeats):
        for statement, seen in times.items():
            begin = time.perf_counter()
            (base if statement == INSERT else ours).execute(statement, values)
            if turn >= 0:
                seen.append(time.perf_counter() - begin)
    parsed, checked, compiled, plain = (statistics.median(seen) for seen in times.values())
    return checked - parsed, compiled - parsed, plain


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
