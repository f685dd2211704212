"""The same fault has the same code and place by every path through Python; ``tests/graphs`` has the database's."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from gathering_pipeline.errors import InvalidPipelineError, Issue, IssueCode
from gathering_pipeline.hooks import prepare_fields, prepare_graph
from gathering_pipeline.models import PipelineDefinition, PipelineEdge, PipelineNode
from gathering_pipeline.validator import find_issues, find_json_issues, parse_pipeline_definition
from tests.support.faults import SHAPE, VALUES, Fault, by_each_fault

Found = set[tuple[IssueCode, tuple[str | int, ...]]]


def found(issues: Iterable[Issue]) -> Found:
    return {(issue.code, issue.loc) for issue in issues if issue.severity == "error"}


def refused(call: Callable[..., Any], *arguments: Any) -> Found:
    try:
        call(*arguments)
    except InvalidPipelineError as error:
        return found(error.issues)
    return set()


def unvalidated(nodes: Any, edges: Any) -> PipelineDefinition:
    """A definition of models that hold whatever they were given."""

    def models(model: type[PipelineNode | PipelineEdge], items: Any) -> Any:
        names = {field.alias or name: name for name, field in model.model_fields.items()}
        if not isinstance(items, list):
            return items
        return [model.model_construct(**{names[key]: item[key] for key in names if key in item}) for item in items]

    return PipelineDefinition.model_construct(nodes=models(PipelineNode, nodes), edges=models(PipelineEdge, edges))


@by_each_fault
def test_each_path_reports_the_code_and_the_place(fault: Fault) -> None:
    issue = (fault.code, fault.loc)
    expected = refused(prepare_graph, fault.nodes, fault.edges)
    assert issue in expected
    assert refused(prepare_fields, {"nodes": fault.nodes, "edges": fault.edges}) == expected
    assert found(find_json_issues(fault.nodes, fault.edges)) == expected

    by_shape = refused(PipelineDefinition.from_json, fault.nodes, fault.edges)
    by_parse = refused(parse_pipeline_definition, fault.nodes, fault.edges)
    assert by_shape <= by_parse <= expected
    assert (issue in by_parse) == (SHAPE in fault.seen_by)
    if SHAPE not in fault.seen_by:  # what parsing accepts, find_issues reports
        definition = parse_pipeline_definition(fault.nodes, fault.edges)
        assert found(find_issues(definition)) == expected
    if VALUES in fault.seen_by:
        by_values = found(find_issues(unvalidated(fault.nodes, fault.edges)))
        assert issue in by_values
        assert by_values <= expected


@by_each_fault
def test_each_issue_is_readable_and_picklable(fault: Fault) -> None:
    for issue in find_json_issues(fault.nodes, fault.edges):
        assert type(issue.code) is IssueCode
        assert issue.severity == issue.code.severity
        assert 0 < len(issue.message) <= 1_000
        issue.message.encode()
        assert repr(issue)
        assert all(type(key) in (str, int) for key in issue.loc)
        assert pickle.loads(pickle.dumps(issue)) == issue  # noqa: S301 - it was pickled here


FORK: list[dict[str, Any]] = [
    {"id": "a", "type": "condition", "name": "A", "config": {"condition": "x"}},
    *({"id": name, "type": "trigger", "name": name} for name in "bc"),
]
WARNINGS: dict[IssueCode, tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[str | int, ...]]] = {
    IssueCode.ORPHAN: ([{"id": "a", "type": "delay", "name": "A"}], [], ("nodes", 0)),
    IssueCode.MISSING_ACTION: (
        [{"id": "a", "type": "action", "name": "A"}],
        [],
        ("nodes", 0, "config", "action"),
    ),
    IssueCode.UNKNOWN_NEXT: ([{"id": "a", "type": "trigger", "name": "A", "next": ["x"]}], [], ("nodes", 0, "next")),
    IssueCode.CONTRADICTING_NEXT: (
        [{"id": "a", "type": "trigger", "name": "A", "next": ["a"]}],
        [],
        ("nodes", 0, "next"),
    ),
    IssueCode.SIMILAR_IDS: (
        [{"id": name, "type": "trigger", "name": "A"} for name in ("é", "e\u0301")],
        [],
        ("nodes", 1, "id"),
    ),
    IssueCode.PARALLEL_EDGES: (
        [{"id": name, "type": "trigger", "name": "A"} for name in "ab"],
        [{"id": name, "from": "a", "to": "b"} for name in "ef"],
        ("edges", 1),
    ),
    IssueCode.UNLABELLED_FORK: (
        FORK,
        [{"id": name, "from": "a", "to": name} for name in "bc"],
        ("nodes", 0),
    ),
    IssueCode.UNUSED_LABEL: (
        FORK,
        [{"id": name, "from": "a", "to": name, "label": label} for name, label in (("b", "true"), ("c", "false"))],
        ("edges", 1, "label"),
    ),
}


@pytest.mark.parametrize("code", WARNINGS)
def test_each_warning_has_its_place(code: IssueCode) -> None:
    nodes, edges, loc = WARNINGS[code]
    issues = find_issues(parse_pipeline_definition(nodes, edges))
    assert ("warning", code, loc) in [(issue.severity, issue.code, issue.loc) for issue in issues]
    assert code.severity == "warning"
    prepare_graph(nodes, edges)


def test_each_code_is_documented_and_is_an_error_or_a_warning() -> None:
    assert IssueCode.__doc__ is not None
    for code in IssueCode:
        word = "Warning" if code in WARNINGS else "Error"
        assert f"        {code.name}: {word}. " in IssueCode.__doc__
        assert code.severity == word.lower()
        assert code == code.value == code.name.lower()


def test_an_edge_spelled_from_node_has_the_place_of_from() -> None:
    nodes = [{"id": "a", "type": "trigger", "name": "A"}]
    for end, code in ((1, IssueCode.INVALID_EDGE), ("x", IssueCode.UNKNOWN_SOURCE)):
        edges = [{"id": "e", "from_node": end, "to_node": "a"}]
        assert refused(prepare_graph, nodes, edges) == {(code, ("edges", 0, "from"))}
    assert refused(parse_pipeline_definition, nodes, [{"id": "e", "from_node": 1, "to_node": "a"}]) == {
        (IssueCode.INVALID_EDGE, ("edges", 0, "from"))
    }
    assert refused(prepare_graph, nodes, [{"id": "e", "from": "a", "from_node": "b", "to": "a"}]) >= {
        (IssueCode.INVALID_EDGE, ("edges", 0, "from"))
    }


def test_an_issue_of_a_column_has_its_name() -> None:
    assert refused(prepare_fields, {"name": None, "run_count": -1}) == {
        (IssueCode.INVALID_FIELD, ("name",)),
        (IssueCode.INVALID_FIELD, ("run_count",)),
    }


def test_half_a_graph_has_the_same_codes() -> None:
    edges = [{"id": " e", "from": "x", "to": "y"}, {"id": "f", "from": "x"}, {"id": "f", "from": "x", "to": "y"}]
    assert refused(prepare_fields, {"edges": edges}) == {
        (IssueCode.INVALID_ID, ("edges", 0, "id")),
        (IssueCode.INVALID_EDGE, ("edges", 1, "to")),
        (IssueCode.DUPLICATE_EDGE, ("edges", 2, "id")),
    }


def test_an_edge_spelled_from_node_is_read_although_another_item_is_refused() -> None:
    nodes = [{"id": "a", "type": "trigger", "name": "A"}, 1]
    edges = [{"id": "e", "from_node": "a", "to_node": "a"}]
    found_by_path = found(find_json_issues(nodes, edges))
    assert found_by_path == {(IssueCode.INVALID_NODE, ("nodes", 1)), (IssueCode.CYCLE, ("nodes", 0))}
    assert refused(prepare_graph, nodes, edges) == found_by_path
