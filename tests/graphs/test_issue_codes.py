"""The database reports a fault under the code and the place of Python; ``tests/unit`` has the paths through Python."""

from __future__ import annotations

import random
from typing import LiteralString

import psycopg
import pytest

from gathering_pipeline import InvalidPipelineError, IssueCode
from gathering_pipeline.hooks import prepare_graph
from gathering_pipeline.node_types import NODE_TYPES
from gathering_pipeline.repositories._call import translate
from gathering_pipeline.validator import find_json_issues
from tests.support.databases import scalar
from tests.support.faults import Fault, by_each_stored_fault, edge, node
from tests.support.write_paths import as_json

INSERT: LiteralString = "INSERT INTO circle.pipelines (name, status, nodes, edges) VALUES ('p', 'active', %s, %s)"
SORT: LiteralString = "SELECT circle.sort_graph(%s, %s)"

Found = set[tuple[IssueCode, tuple[str | int, ...]]]


def by_python(fault: Fault) -> Found:
    with pytest.raises(InvalidPipelineError) as refused:
        prepare_graph(fault.nodes, fault.edges)
    return {(issue.code, issue.loc) for issue in refused.value.issues}


def by_database(raw: psycopg.Connection, statement: LiteralString, fault: Fault) -> Found:
    try:
        raw.execute(statement, [as_json(fault.nodes), as_json(fault.edges)])
    except psycopg.Error as error:
        typed = translate(error)
        assert isinstance(typed, InvalidPipelineError)
        assert all(type(issue.code) is IssueCode and issue.severity == "error" for issue in typed.issues)
        assert all(type(issue.loc) is tuple for issue in typed.issues)
        return {(issue.code, issue.loc) for issue in typed.issues}
    return set()


@by_each_stored_fault
def test_an_insert_reports_the_code_and_the_place(fault: Fault, raw: psycopg.Connection) -> None:
    found = by_database(raw, INSERT, fault)
    assert (fault.code, fault.loc) in found
    assert found <= by_python(fault)


@by_each_stored_fault
def test_sort_graph_reports_no_other_code_or_place(fault: Fault, raw: psycopg.Connection) -> None:
    if fault.code != IssueCode.TOO_LARGE:  # the compiler has no limits
        assert by_database(raw, SORT, fault) <= by_python(fault)


def test_the_types_of_nodes_are_those_of_python(raw: psycopg.Connection) -> None:
    assert scalar(raw, "SELECT circle.node_types()") == list(NODE_TYPES)


def test_a_cycle_is_the_one_that_python_reports(raw: psycopg.Connection) -> None:
    chance = random.Random(12)
    for _ in range(100):
        names = "abcdefgh"[: chance.randrange(2, 9)]
        pairs = [chance.choices(names, k=2) for _ in range(2 * len(names))]
        nodes = [node(name) for name in names]
        edges = [edge(f"e{at}", a, b) for at, (a, b) in enumerate(pairs)]
        cycles = [issue for issue in find_json_issues(nodes, edges) if issue.code == IssueCode.CYCLE]
        try:
            raw.execute(SORT, [as_json(nodes), as_json(edges)])
        except psycopg.Error as error:
            typed = translate(error)
            assert isinstance(typed, InvalidPipelineError)
            assert typed.issues[0] == cycles[0]
        else:
            assert cycles == []
