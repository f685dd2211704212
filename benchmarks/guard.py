"""What the database's own checks of a graph cost, as a part of the plain insert of the same JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from functools import partial
from typing import LiteralString, NamedTuple

from benchmarks import floor
from benchmarks.databases import Databases
from benchmarks.floor import Connection
from benchmarks.graphs import Graph, chain, fan_out, layered, shuffled
from benchmarks.table import Row, Size, compare, timed

INSERT: LiteralString = "INSERT INTO circle.pipelines (name, nodes, edges) VALUES ('bench', %s, %s) RETURNING id"


def guard(databases: Databases, size: Size) -> Iterator[Row]:
    """The checks that refuse a graph; these with the proof of an order, which the lifecycle needs anyway; the insert.

    The whole insert also compiles the graph and writes its version, once, so that no run has to.
    """
    with floor.connect(databases.our_url) as ours:
        for full_count, repeats in ((10, 100), (100, 60), (1_000, 30), (10_000, 5)):
            count = size.count(full_count)
            for name, graph in (("chain", chain(count)), ("layered", layered(count)), ("fan-out", fan_out(count))):
                for order, rows, bar in (("in order", graph, 0.7), ("shuffled", shuffled(graph), 0.9)):
                    costs = _measure(ours, databases.floor, rows, size.repeats(repeats))
                    what = f"{count} nodes, {name}, {order}"
                    yield Row.of_times(f"checks: {what}", costs.checks, costs.plain, bar)
                    yield Row.of_times(f"checks, order: {what}", costs.checks + costs.order, costs.plain, bar)
                    yield Row.of_times(f"whole insert: {what}", costs.whole, costs.plain, None)
        yield _counter_update(ours, databases.floor, size)


class Costs(NamedTuple):
    """Median seconds of the checks, of the proof of an order, of the whole insert and of the plain one."""

    checks: float
    order: float
    whole: float
    plain: float


def _measure(ours: Connection, base: Connection, graph: Graph, repeats: int) -> Costs:
    """The statements take turns. Checks and order cost what they take beyond the parsing of their arguments."""
    values = json.dumps(graph[0]), json.dumps(graph[1])
    statements: tuple[tuple[Connection, LiteralString], ...] = (
        (ours, "SELECT jsonb_typeof(%s::jsonb), jsonb_typeof(%s::jsonb)"),
        (ours, "SELECT circle.check_graph(%s::jsonb, %s::jsonb, false)"),
        (ours, "SELECT FROM circle.sort_graph(%s::jsonb, %s::jsonb)"),
        (ours, INSERT),
        (base, INSERT),
    )
    turns = [
        [timed(partial(connection.execute, statement, values)) for connection, statement in statements]
        for _ in range(-2, repeats)
    ]
    parsing, checks, order, whole, plain = (statistics.median(times) for times in zip(*turns[2:], strict=True))
    return Costs(checks - parsing, order - parsing, whole, plain)


def _counter_update(ours: Connection, base: Connection, size: Size) -> Row:
    count = size.count(1_000)
    nodes, edges = chain(count)
    statement: LiteralString = "UPDATE circle.pipelines SET run_count = run_count + 1 WHERE id = %s"
    actions = [
        partial(
            connection.execute, statement, connection.execute(INSERT, (json.dumps(nodes), json.dumps(edges))).fetchone()
        )
        for connection in (ours, base)
    ]
    figures = compare(actions[0], actions[1], size.repeats(200))
    name = f"a counter update, {count} nodes, to one without triggers"
    return Row.of_times(name, figures.ours, figures.floor, 1.2, ratio=figures.ratio)
