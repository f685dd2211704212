"""What a node doesn't take: ``untaken_successors``, and the ``branch`` of results, without a database."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gathering_pipeline import InvalidDataError, NodeResult, PipelineDefinition, untaken_successors
from gathering_pipeline.arguments import branch_label, check_branch
from gathering_pipeline.repositories.runs import encode_report
from tests.support.graphs import graph


def definition(spec: str) -> PipelineDefinition:
    return PipelineDefinition.from_json(*graph(spec))


@pytest.mark.parametrize(
    ("spec", "outcome", "untaken"),
    [
        ("c>a=true c>b=false c>x", True, "b"),
        ("c>a=true c>b=false c>x", False, "a"),
        ("c>a=True c>b=FALSE c>x", " true ", "b"),
        ("c>b=low c>a=high c>x", "HIGH", "b"),
        ("c>b=low c>a=high c>x", True, "b a"),
        ("c>a c>b", True, ""),
        ("c>a c>b", "false", "a b"),
        ("c", "false", ""),
        ("c>a=x c>a=y c>b=y", "x", "b"),
        ("c>a=x c>a", False, ""),
        ("d>a=true c>a=false", True, "a"),  # edges of other nodes don't count
    ],
)
def test_untaken_successors_are_the_ends_of_dead_edges(spec: str, outcome: bool | str, untaken: str) -> None:
    assert untaken_successors(definition(spec), "c", outcome) == untaken.split()


def test_untaken_successors_takes_blank_conditions_for_none() -> None:
    graph = PipelineDefinition.from_json(
        [{"id": name, "type": "parallel", "name": name} for name in "cab"],
        [
            {"id": "1", "from": "c", "to": "a", "condition": "\u3000"},
            {"id": "2", "from": "c", "to": "b", "condition": None},
        ],
    )
    assert untaken_successors(graph, "c", False) == ["a", "b"]
    with pytest.raises(InvalidDataError, match="must be true or false, as no edge of it has a condition, not ''"):
        untaken_successors(graph, "c", "")


@pytest.mark.parametrize(
    ("node", "outcome", "message"),
    [
        ("c", "maybe", "branch of node 'c' must be one of true, false, high, low, not 'maybe'"),
        ("c", None, "outcome must be True, False or a string, not None"),
        ("c", 1, "branch must be True, False or a string, not 1"),
        ("c", "\ud800", "branch contains a lone surrogate"),
        ("nowhere", True, "node_id must be a node of the graph, not 'nowhere'"),
        (7, True, "node_id must be a string, not int"),
    ],
)
def test_untaken_successors_of_bad_arguments_raises_invalid_data(node: Any, outcome: Any, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        untaken_successors(definition("c>a=low c>b=High"), node, outcome)
    with pytest.raises(InvalidDataError, match="definition must be of type PipelineDefinition"):
        untaken_successors({}, "c", True)  # type: ignore[arg-type]


def test_labels_are_lower_case_of_a_to_z_alone() -> None:
    """What else is a letter depends on the database."""
    assert branch_label(" ÄZ\u0130\t") == "Äz\u0130"
    assert [check_branch(value) for value in (None, True, False, " Yes")] == [None, "true", "false", "yes"]


def test_result_keeps_its_branch_as_it_was_given() -> None:
    for branch in (True, False, "High", None):
        assert NodeResult(node_id="c", status="completed", branch=branch).branch is branch
    report = encode_report(1, [{"node_id": "c", "status": "completed", "branch": True}], None)
    assert report.results == ['{"node_id":"c","status":"completed","branch":true}']


@pytest.mark.parametrize("branch", [0, 1, 1.0, [], {}, b"true", "a\0", "\ud800"])
def test_result_with_another_branch_is_refused(branch: Any) -> None:
    with pytest.raises(ValidationError, match="branch"):
        NodeResult(node_id="c", status="completed", branch=branch)
    with pytest.raises(InvalidDataError, match=r"results\[0\]\.branch: "):
        encode_report(1, [{"node_id": "c", "status": "completed", "branch": branch}], None)


@pytest.mark.parametrize("status", ["failed", "skipped", "cancelled"])
def test_result_that_completes_nothing_has_no_branch(status: Any) -> None:
    with pytest.raises(ValidationError, match="only a completed node takes a branch"):
        NodeResult(node_id="c", status=status, branch=True)
    assert NodeResult(node_id="c", status=status, branch=None).branch is None
