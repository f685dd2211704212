"""The order that the database compiles is the order that Python computes."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gathering_pipeline import (
    InvalidPipelineError,
    PipelineDefinition,
    get_execution_order,
)
from tests.support.compiled import by_python, compiled
from tests.support.pipelines import count
from tests.support.servers import connect as open_connection


def graph(nodes: list[str], edges: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return (
        [{"id": node, "type": "delay", "name": node} for node in nodes],
        [{"id": f"e{index}", "from": source, "to": target} for index, (source, target) in enumerate(edges)],
    )


CONDITIONS = [None, "", " ", "true", "TRUE", " False\u3000", "x > 1", "X > 1", "Ä", "ä", "\u0130", "{", "a\\b", '"']


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes in any order; edges in any order, some of them twice."""
    size = draw(st.integers(1, 25))
    ids = [f"n{number}" for number in range(size)]
    pair = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(lambda ends: ends[0] < ends[1])
    edges = draw(st.lists(pair, max_size=60)) if size > 1 else []
    edges += draw(st.lists(st.sampled_from(edges), max_size=5)) if edges else []
    order = list(ids) if draw(st.booleans()) else draw(st.permutations(ids))
    return order, [(ids[source], ids[target]) for source, target in draw(st.permutations(edges))]


@pytest.fixture(scope="module")
def scratch(module_database_url: str) -> Iterator[psycopg.Connection]:
    """A connection for many examples; each one is rolled back."""
    with open_connection(module_database_url) as connection:
        yield connection


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dag=dags(), data=st.data())
def test_insert_random_dag_compiles_to_python_order(scratch: psycopg.Connection, dag: Any, data: st.DataObject) -> None:
    nodes, edges = graph(*dag)
    for edge in edges:
        edge.update(data.draw(st.sampled_from([{}, *({"condition": text} for text in CONDITIONS)])))
    with scratch.transaction(force_rollback=True):
        assert compiled(scratch, nodes, edges) == by_python(nodes, edges)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dag=dags(), data=st.data())
def test_insert_random_cycle_is_refused_by_both(scratch: psycopg.Connection, dag: Any, data: st.DataObject) -> None:
    nodes, edges = dag
    ring = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=6, unique=True))
    edges = data.draw(st.permutations([*edges, *zip(ring, [*ring[1:], ring[0]], strict=True)]))
    made = graph(nodes, edges)
    with pytest.raises(InvalidPipelineError, match="cycle"):
        get_execution_order(PipelineDefinition.from_json(*made))
    with pytest.raises(psycopg.Error, match="Pipeline contains a cycle: ") as refused, scratch.transaction():
        compiled(scratch, *made)
    assert refused.value.sqlstate == "PL008"
    # what it shows is a cycle of this graph, in the direction of its edges
    shown = (refused.value.diag.message_primary or "").partition(": ")[2].split(" -> ")
    assert shown[0] == shown[-1]
    assert set(pairwise(shown)) <= set(edges)
    assert count(scratch) == 0


def test_insert_ids_of_any_script_keeps_them_distinct_and_in_order(raw: psycopg.Connection) -> None:
    ids = [
        "é",
        "e\u0301",
        "E",
        "e",
        "ß",
        "ss",
        "\u212b",
        "Å",
        "日本",
        "🦉",
        "a b",
        "a\tb",
        "'",
        '"',
        "\\",
        "%",
        "{",
        "x" * 100,
    ]
    edges = list(pairwise(ids))
    random.Random(7).shuffle(edges)
    for nodes in (ids, ids[::-1]):
        assert compiled(raw, *graph(nodes, edges)) == by_python(*graph(nodes, edges))


def test_insert_large_graph_compiles_to_python_order(raw: psycopg.Connection) -> None:
    rng = random.Random(11)
    ids = [f"node-{number}" for number in range(2_000)]
    edges = [(ids[at], ids[at + 1]) for at in range(1_000)]
    edges += [(ids[a], ids[b]) for a, b in (sorted(rng.sample(range(2_000), 2)) for _ in range(4_000))]
    shuffled = rng.sample(ids, len(ids))
    for nodes in (ids, shuffled):
        assert compiled(raw, *graph(nodes, edges)) == by_python(*graph(nodes, edges))
    with pytest.raises(psycopg.Error, match=r"cycle: .* -> \.\.\. \(\d+ nodes\) -> ") as refused:
        compiled(raw, *graph(ids, [(ids[at], ids[(at + 1) % 2_000]) for at in range(2_000)]))
    assert refused.value.sqlstate == "PL008"
    assert len(str(refused.value)) < 3_000


@pytest.mark.parametrize(
    ("edges", "branches"),
    [
        ([("b", "no"), ("c", None)], {"no": [1]}),
        ([("b", " YES "), ("c", "yes"), ("c", "no")], {"yes": [1, 2], "no": [2]}),
        ([("b", "yes"), ("b", None), ("c", "yes")], {"yes": [2]}),  # one of parallel edges is always taken
        ([("b", "yes"), ("b", "")], {"yes": []}),
        ([("b", ""), ("c", "  ")], None),
        ([("b", None), ("c", None)], None),
    ],
)
def test_insert_labels_compiles_to_branches(
    raw: psycopg.Connection, edges: list[tuple[str, str | None]], branches: Any
) -> None:
    made = graph(["a", "b", "c"], [("a", target) for target, _ in edges])
    for edge, (_, condition) in zip(made[1], edges, strict=True):
        edge["condition"] = condition
    assert compiled(raw, *made) == by_python(*made)
    assert {row[1]: row[-1] for row in compiled(raw, *made)} == {"a": branches, "b": None, "c": None}
