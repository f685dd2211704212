"""The validator as a hook before a row is written: plain functions, which the ORM layer calls."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from .errors import InvalidPipelineError, Issue, IssueCode, shorten
from .json_values import quote
from .models import END_ALIASES, MAX_INT32, PipelineEdge, PipelineNode, PipelineUpdate, end_issues, list_issue
from .validator import INCOMPLETE_CODES, find_json_issues

_OF_NODES = frozenset({IssueCode.NO_NODES, IssueCode.UNKNOWN_SOURCE, IssueCode.UNKNOWN_TARGET})
_COUNTERS = {"run_count", "success_count", "error_count"}
_TIMES = {"last_run", "created_at", "updated_at"}
_PLAIN_FIELDS = PipelineUpdate.model_fields.keys() - {"nodes", "edges"}


def prepare_graph(
    nodes: object, edges: object, *, allow_incomplete: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check a graph and return it as the JSON lists that are stored.

    Raw JSON is stored as it was given, except that the ends of edges are spelled ``from`` and ``to``. Pydantic objects
    are written without unset defaults.

    Args:
        nodes: List of JSON objects, of ``PipelineNode``, or of both.
        edges: List of JSON objects, of ``PipelineEdge``, or of both.
        allow_incomplete: Accept a draft: no nodes yet, or configuration still missing.

    Raises:
        InvalidPipelineError: With every error in ``.issues``.
    """
    issues: list[Issue] = []
    if isinstance(nodes, list) and isinstance(edges, list):
        nodes, edges = [_node_json(node) for node in nodes], _edges_json(edges, issues)
    accepted = INCOMPLETE_CODES if allow_incomplete else frozenset()
    _refuse([*issues, *find_json_issues(nodes, edges)], accepted)
    return nodes, edges  # type: ignore[return-value]  # find_json_issues reports what is not a list


def prepare_fields(values: Mapping[str, Any], *, allow_incomplete: bool = False) -> dict[str, Any]:
    """Check the columns of ``pipelines`` that are about to be written, and return them with the graph as JSON.

    Without the other half of the graph, only ``nodes`` or ``edges`` is checked; the database checks the whole.

    Raises:
        InvalidPipelineError: With every error in ``.issues``.
    """
    issues = _column_issues(values)
    checked = dict(values)
    try:
        if "nodes" in values and "edges" in values:
            incomplete = allow_incomplete and values.get("status") != "active"
            graph = prepare_graph(values["nodes"], values["edges"], allow_incomplete=incomplete)
            checked["nodes"], checked["edges"] = graph
        elif "nodes" in values:
            checked["nodes"], _ = prepare_graph(values["nodes"], [], allow_incomplete=allow_incomplete)
        elif "edges" in values:
            checked["edges"] = _prepare_edges(values["edges"])
    except InvalidPipelineError as error:
        issues += error.issues
    if issues:
        raise InvalidPipelineError(issues)
    return checked


def _prepare_edges(edges: object) -> list[dict[str, Any]]:
    check_list("edges", edges)
    assert isinstance(edges, list)
    issues: list[Issue] = []
    edges = _edges_json(edges, issues)
    _refuse([*issues, *find_json_issues([], edges)], _OF_NODES)
    return edges


def _refuse(issues: list[Issue], accepted: frozenset[IssueCode]) -> None:
    if errors := [issue for issue in issues if issue.severity == "error" and issue.code not in accepted]:
        raise InvalidPipelineError(errors)


def _column_issues(values: Mapping[str, Any]) -> list[Issue]:
    issues: list[Issue] = []
    fields = {key: value for key, value in values.items() if key in _PLAIN_FIELDS}
    try:
        PipelineUpdate.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        issues += [_field_issue(str(detail["loc"][0]), shorten(detail["msg"], 200)) for detail in details]
    for key in _COUNTERS & values.keys():
        if type(values[key]) is not int or not 0 <= values[key] <= MAX_INT32:
            issues.append(_field_issue(key, f"must be a number from 0 to {MAX_INT32}, not {quote(values[key])}"))
    for key in _TIMES & values.keys():
        value = values[key]
        if value is not None and not (isinstance(value, datetime) and value.utcoffset() is not None):
            issues.append(_field_issue(key, f"must be a datetime with a time zone, not {quote(value)}"))
    return issues


def check_list(key: Literal["nodes", "edges"], value: object) -> None:
    """Check that ``nodes`` or ``edges`` is a list, and not null, text or an SQL expression.

    Raises:
        InvalidPipelineError: It is not a list.
    """
    if issues := list_issue(key, value):
        raise InvalidPipelineError(issues)


def _field_issue(key: str, reason: str) -> Issue:
    return Issue("error", IssueCode.INVALID_FIELD, f"{key}: {reason}", loc=(key,))


def _fields(item: PipelineNode | PipelineEdge) -> dict[str, Any]:
    """The fields of a model without unset defaults, and its unknown keys; a default changed in place counts as set."""
    kept = item.model_fields_set
    fields = {key: value for key, value in item.__dict__.items() if key in kept or (value is not None and value != {})}
    return fields | {key: value for key, value in (item.model_extra or {}).items() if key not in fields}


def _node_json(node: Any) -> Any:
    return _fields(node) if isinstance(node, PipelineNode) else node


def _edges_json(edges: list[Any], issues: list[Issue]) -> list[Any]:
    """Spell the ends of edges ``from`` and ``to``; an edge with both spellings must have equal ends."""
    return [_edge_json(edge, index, issues) for index, edge in enumerate(edges)]


def _edge_json(edge: Any, index: int, issues: list[Issue]) -> Any:
    given = _fields(edge) if isinstance(edge, PipelineEdge) else edge
    if not isinstance(given, dict) or given.keys().isdisjoint(END_ALIASES):
        return given
    issues += end_issues(index, given)
    return {END_ALIASES.get(key, key): value for key, value in given.items()}
