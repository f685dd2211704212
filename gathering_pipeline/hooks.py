"""The validator as a hook before a row is written: plain functions, which the ORM layer calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from .errors import InvalidPipelineError, Issue, shorten
from .json_values import scan, show
from .models import MAX_INT32, PipelineDefinition, PipelineEdge, PipelineNode, PipelineUpdate
from .validator import DEFAULT_LIMITS, INCOMPLETE_CODES, find_issues, parse_pipeline_definition, size_issues

_ENDS = {"from_node": "from", "to_node": "to"}
_STRUCTURE = frozenset({"duplicate_node", "duplicate_edge", "cycle"})
_COUNTERS = {"run_count", "success_count", "error_count"}
_TIMES = {"last_run", "created_at", "updated_at"}
_PLAIN_FIELDS = PipelineUpdate.model_fields.keys() - {"nodes", "edges"}


def prepare_graph(
    nodes: object, edges: object, *, allow_incomplete: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check a graph and return it as the JSON lists that are stored.

    Raw JSON is stored as it was given, except that the ends of edges are spelled ``from`` and ``to``. Pydantic objects
    are written without the defaults that nobody set.

    Args:
        nodes: List of JSON objects, of ``PipelineNode``, or of both.
        edges: List of JSON objects, of ``PipelineEdge``, or of both.
        allow_incomplete: Accept a draft: no nodes yet, or configuration still missing.

    Raises:
        InvalidPipelineError: With every error in ``.issues``.
    """
    for key, value in (("nodes", nodes), ("edges", edges)):
        check_list(key, value)
    assert isinstance(nodes, list)
    assert isinstance(edges, list)
    if too_many := size_issues(nodes, edges):
        raise InvalidPipelineError(too_many)
    issues: list[Issue] = []
    nodes = [_node_json(node) for node in nodes]
    edges = [_edge_json(edge, index, issues) for index, edge in enumerate(edges)]
    try:
        found = find_issues(parse_pipeline_definition(nodes, edges))
    except InvalidPipelineError as error:
        found = [*error.issues, *(issue for issue in find_issues(_lenient(nodes, edges)) if issue.code in _STRUCTURE)]
    accepted = INCOMPLETE_CODES if allow_incomplete else frozenset()
    issues += [issue for issue in found if issue.severity == "error" and issue.code not in accepted]
    if not issues and not 0 <= scan([nodes, edges], 100) <= DEFAULT_LIMITS.max_bytes:
        # the text itself, with the keys that the models ignore
        size = len(json.dumps([nodes, edges], ensure_ascii=False, separators=(",", ":")).encode())
        if size > DEFAULT_LIMITS.max_bytes:
            message = f"Pipeline has {size} bytes, more than the limit of {DEFAULT_LIMITS.max_bytes} bytes"
            issues.append(Issue("error", "too_large", message))
    if issues:
        raise InvalidPipelineError(issues)
    return nodes, edges


def prepare_fields(values: Mapping[str, Any], *, allow_incomplete: bool = False) -> dict[str, Any]:
    """Check the columns of ``pipelines`` that are about to be written, and return them with the graph as JSON.

    Of a graph whose other half is not at hand only this half is checked; the database checks the whole.

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
            check_list("edges", values["edges"])
            checked["edges"] = [_edge_json(edge, index, issues) for index, edge in enumerate(values["edges"])]
            parse_pipeline_definition([], checked["edges"])
    except InvalidPipelineError as error:
        issues += error.issues
    if issues:
        raise InvalidPipelineError(issues)
    return checked


def _column_issues(values: Mapping[str, Any]) -> list[Issue]:
    issues: list[Issue] = []
    fields = {key: value for key, value in values.items() if key in _PLAIN_FIELDS}
    try:
        PipelineUpdate.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        issues += [_refused(f"{detail['loc'][0]}: {shorten(detail['msg'], 200)}") for detail in details]
    for key in _COUNTERS & values.keys():
        if type(values[key]) is not int or not 0 <= values[key] <= MAX_INT32:
            issues.append(_refused(f"{key}: must be a number from 0 to {MAX_INT32}, not {show(values[key])}"))
    for key in _TIMES & values.keys():
        value = values[key]
        if value is not None and not (isinstance(value, datetime) and value.utcoffset() is not None):
            issues.append(_refused(f"{key}: must be a datetime with a time zone, not {show(value)}"))
    return issues


def check_list(key: str, value: object) -> None:
    """Refuse ``nodes`` or ``edges`` that are not a list: null, text, an SQL expression.

    Raises:
        InvalidPipelineError: It is not a list.
    """
    if not isinstance(value, list):
        what = "null" if value is None else type(value).__name__
        raise InvalidPipelineError([_refused(f"Invalid {key[:-1]} data: {key} must be a list, not {what}")])


def _refused(message: str) -> Issue:
    return Issue("error", "invalid_field", message)


def _fields(item: PipelineNode | PipelineEdge) -> dict[str, Any]:
    """What a model holds, without the defaults that nobody set; a default that was filled since counts as set."""
    kept = item.model_fields_set
    return {key: value for key, value in item.__dict__.items() if key in kept or (value is not None and value != {})}


def _node_json(node: Any) -> Any:
    return _fields(node) if isinstance(node, PipelineNode) else node


def _edge_json(edge: Any, index: int, issues: list[Issue]) -> Any:
    given = _fields(edge) if isinstance(edge, PipelineEdge) else edge
    if not isinstance(given, dict) or given.keys().isdisjoint(_ENDS):
        return given
    for name, alias in _ENDS.items():
        if name in given and given.get(alias, given[name]) != given[name]:
            message = f"Invalid edge data: edges[{index}] has both {alias} and {name}, and they differ"
            issues.append(Issue("error", "invalid_edge", message))
    return {_ENDS.get(key, key): value for key, value in given.items()}


def _lenient(nodes: list[Any], edges: list[Any]) -> PipelineDefinition:
    """A graph of items that have wrong shapes, too, so that one of them doesn't hide a cycle among the others."""
    as_nodes = [PipelineNode.model_construct(**_known(PipelineNode, node)) for node in nodes]
    as_edges = [PipelineEdge.model_construct(**_known(PipelineEdge, edge)) for edge in edges]
    return PipelineDefinition.model_construct(nodes=as_nodes, edges=as_edges)


def _known(model: type[PipelineNode | PipelineEdge], item: object) -> dict[str, Any]:
    aliases = {field.alias or name: name for name, field in model.model_fields.items()}
    return {aliases[key]: item[key] for key in aliases.keys() & item.keys()} if isinstance(item, dict) else {}
