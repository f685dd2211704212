"""Every check of a graph: nodes, edges, configurations, stored JSON, order and branches; pure.

The fast path is written for large graphs: passes over whole lists that run in C, and positions instead of ids. It only
decides that a graph is certainly valid; any other graph is checked again by slower functions that name each place.
"""

from __future__ import annotations

import gc
import graphlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from .arguments import branch_label, check_branch, check_text, check_type
from .errors import InvalidDataError, InvalidPipelineError, Issue, IssueCode, shorten
from .json_values import MAX_DEPTH, json_issues, json_path, quote, scan, text_reason, text_size
from .models import END_ALIASES, PipelineDefinition, PipelineEdge, PipelineNode, end_issues, list_issue, shape_issues
from .node_types import CONFIG_MODELS, REQUIRED_KEYS, NodeConfig, RequiredKey

logger = logging.getLogger(__name__)

MAX_ID_LENGTH: dict[str, int] = {"node": 100, "edge": 1_000}
"""Longest id in characters. ``pipeline_node_runs.node_id`` is a ``VARCHAR(100)``; editors join ids to an edge's."""

INCOMPLETE_CODES = frozenset({IssueCode.NO_NODES, IssueCode.MISSING_CONFIG})
"""Errors that a draft may have: no nodes yet, or missing configuration."""

_HINT = "parse_pipeline_definition(nodes, edges) makes one, and so does .definition of a stored pipeline"
_MAX_WARNINGS = 100
_MAX_CYCLES = 10
_MAX_CYCLE_LENGTH = 20
_LARGE = 1_000
_NOT_AN_OBJECT = (IssueCode.INVALID_NODE, IssueCode.INVALID_EDGE)
_NODE_KEYS = frozenset(PipelineNode.model_fields)
_NOT_CONDITIONS = ("branch", "label")
"""Keys that other tools have for the branch of an edge."""
_EDGE_KEYS = frozenset(field.alias or name for name, field in PipelineEdge.model_fields.items())
_LENGTHS = {item: frozenset(range(1, longest + 1)) for item, longest in MAX_ID_LENGTH.items()}
_OBJECTS = frozenset({dict, type(None)})
_FIELDS = (*PipelineNode.model_fields, *PipelineEdge.model_fields)
_UNKNOWN = "__pydantic_extra__"  # what model_extra returns, without a call for each item
_GETTERS = {name: attrgetter(name) for name in (*_FIELDS, _UNKNOWN)}

_Item = Literal["node", "edge"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Size limits of a graph; ``max_bytes`` is its size as compact JSON in UTF-8."""

    max_nodes: int = 100_000
    max_edges: int = 1_000_000
    max_bytes: int = 64 * 1024 * 1024


DEFAULT_LIMITS = Limits()


class _Columns(NamedTuple):
    """The ids of a graph as lists, which are faster to check than one model after the other."""

    nodes: list[Any]
    edges: list[Any]
    sources: list[Any]
    targets: list[Any]

    @classmethod
    def of(cls, definition: PipelineDefinition) -> _Columns:
        nodes, edges = definition.nodes, definition.edges
        return cls(_column(nodes, "id"), _column(edges, "id"), _column(edges, "from_node"), _column(edges, "to_node"))


class _Order(NamedTuple):
    """The order of a graph, cached with the columns from which it was made: valid while they are unchanged."""

    columns: _Columns
    ids: list[str]


# --- the public checks ------------------------------------------------------------------------------------------------


def validate_pipeline_dag(definition: PipelineDefinition) -> list[str]:
    """Every error of a graph as a sentence; empty when it is valid. Warnings are logged."""
    issues = find_issues(definition)
    warnings = [issue.message for issue in issues if issue.severity == "warning"]
    for message in warnings[:_MAX_WARNINGS]:
        logger.warning("%s", message)
    if len(warnings) > _MAX_WARNINGS:
        logger.warning("and %d more warnings", len(warnings) - _MAX_WARNINGS)
    return [issue.message for issue in issues if issue.severity == "error"]


def find_issues(definition: PipelineDefinition, limits: Limits = DEFAULT_LIMITS) -> list[Issue]:
    """Every error and warning of a graph, each with its code and place.

    Args:
        definition: The graph; it may have been made without validation (``model_construct``).
        limits: Size limits; a larger graph is not checked further.
    """
    check_type(definition, PipelineDefinition, "definition", _HINT)
    nodes, edges = definition.nodes, definition.edges
    if issues := _list_issues(nodes, edges) or _count_issues(nodes, edges, limits):
        return issues
    paused = _pause_gc(nodes, edges)
    try:
        issues, size = _check(definition)
    finally:
        if paused:
            gc.enable()
    if not 0 <= size <= limits.max_bytes and not _has_errors(issues):  # rare: the bound is generous
        size = len(definition.model_dump_json(by_alias=True, exclude_unset=True).encode())
        issues += _byte_issues(size, limits)
    return issues


def find_json_issues(nodes: Any, edges: Any, limits: Limits = DEFAULT_LIMITS) -> list[Issue]:
    """Every error and warning of a graph as JSON: what parsing it refuses, and what ``find_issues`` reports.

    Args:
        nodes: The list of nodes; each should be a JSON object.
        edges: The list of edges.
        limits: Size limits; a larger graph is not checked further.
    """
    if issues := _list_issues(nodes, edges) or _count_issues(nodes, edges, limits):
        return issues
    paused = _pause_gc(nodes, edges)
    try:
        definition, issues, unknown = _parse(nodes, edges)
        if definition is None:  # an item of the wrong shape must not hide a cycle among the others
            definition = _construct(nodes, edges)
        else:
            unknown = min(unknown, 0)  # _check sees them, too
        found, size = _check(definition)
    finally:
        if paused:
            gc.enable()
    issues = _merge(issues, found)
    size = size + unknown if min(size, unknown) >= 0 else -1
    if not 0 <= size <= limits.max_bytes and not _has_errors(issues):
        size = len(json.dumps([nodes, edges], ensure_ascii=False, separators=(",", ":")).encode())
        issues += _byte_issues(size, limits)
    return issues


def get_execution_order(definition: PipelineDefinition) -> list[str]:
    """Node ids in the order of execution: by generation (longest path from a root), ties by place in ``nodes``.

    Raises:
        InvalidPipelineError: (a ``ValueError``) The graph has a cycle, an unknown end of an edge, or a repeated id.
    """
    check_type(definition, PipelineDefinition, "definition", _HINT)
    columns = _Columns.of(definition)
    order: _Order | None = getattr(definition, "_order", None)
    if order is None or order.columns != columns:
        issues: list[Issue] = []
        _check_ids("node", columns.nodes, issues)
        _check_ids("edge", columns.edges, issues)
        order = _check_edges(definition, columns, issues)
        if order is None:
            raise InvalidPipelineError([issue for issue in issues if issue.severity == "error"])
        object.__setattr__(definition, "_order", order)
    return order.ids.copy()


def untaken_successors(definition: PipelineDefinition, node_id: str, outcome: bool | str) -> list[str]:
    """The successors that a node doesn't take if it completes with an outcome, as the database computes them.

    ``True`` stands for "true". The ``condition`` of an edge is its label, trimmed and with A to Z in lower case. If no
    edge of the node has a label, "false" takes none and "true" all. Else edges without a label are taken, and those
    with this label. A successor is taken if one of the edges to it is.

    Args:
        definition: The graph.
        node_id: The node.
        outcome: What ``branch=`` of ``complete_node`` takes.

    Returns:
        Node ids, in the order of the edges.

    Raises:
        InvalidDataError: The graph has no such node, or no edge of the node has this label.
    """
    check_type(definition, PipelineDefinition, "definition", _HINT)
    check_text(node_id, "node_id")
    if node_id not in map(attrgetter("id"), definition.nodes):
        raise InvalidDataError(f"node_id must be a node of the graph, not {quote(node_id)}")
    label = check_branch(outcome)
    if label is None:
        raise InvalidDataError("outcome must be True, False or a string, not None")
    edges = [edge for edge in definition.edges if edge.from_node == node_id]
    branches = [(edge.to_node, branch_label(edge.condition or "")) for edge in edges]
    labels = {name for _, name in branches if name}
    if label not in labels | {"true", "false"}:
        names = ", ".join(["true", "false", *sorted(labels - {"true", "false"})])
        wanted = f"one of {names}" if labels else "true or false, as no edge of it has a condition"
        raise InvalidDataError(f"branch of node {quote(node_id)} must be {wanted}, not {quote(outcome)}")
    taken = {label, ""} if labels or label == "true" else {label}
    alive = {successor for successor, name in branches if name in taken}
    return list(dict.fromkeys(successor for successor, _ in branches if successor not in alive))


def parse_pipeline_definition(nodes_json: list[dict[str, Any]], edges_json: list[dict[str, Any]]) -> PipelineDefinition:
    """Parse the two JSON lists of a pipeline; ``find_issues`` checks the values and the meaning of the graph.

    Raises:
        InvalidPipelineError: (a ``ValueError``) "Invalid node data: ..." or "Invalid edge data: ...", with an issue for
            each place that has the wrong shape, and for each key that the models don't know and JSONB can't hold.
    """
    if issues := _list_issues(nodes_json, edges_json):
        raise InvalidPipelineError(issues)
    paused = _pause_gc(nodes_json, edges_json)
    try:
        definition, issues, _ = _parse(nodes_json, edges_json)
    finally:
        if paused:
            gc.enable()
    if definition is None or issues:
        raise InvalidPipelineError(issues)
    return definition


# --- the steps of a check ---------------------------------------------------------------------------------------------


def _list_issues(nodes: object, edges: object) -> list[Issue]:
    return [*list_issue("nodes", nodes), *list_issue("edges", edges)]


def _count_issues(nodes: Sequence[object], edges: Sequence[object], limits: Limits) -> list[Issue]:
    counts = (("nodes", len(nodes), limits.max_nodes), ("edges", len(edges), limits.max_edges))
    return [_too_large(what, count, limit, (what,)) for what, count, limit in counts if count > limit]


def _byte_issues(size: int, limits: Limits) -> list[Issue]:
    return [_too_large("bytes", size, limits.max_bytes, ())] if size > limits.max_bytes else []


def _too_large(what: str, count: int, limit: int, loc: tuple[str, ...]) -> Issue:
    message = f"Pipeline has {count} {what}, more than the limit of {limit} {what}"
    return Issue("error", IssueCode.TOO_LARGE, message, loc=loc)


def _check(definition: PipelineDefinition) -> tuple[list[Issue], int]:
    """Check everything but the size of a graph; returns the issues and a bound of its size, see ``scan``."""
    columns = _Columns.of(definition)
    issues = _graph_issues(definition, columns)
    size = _size(definition.nodes, definition.edges, columns)
    if size < 0:
        issues = _merge(issues, _model_issues("nodes", definition.nodes), _model_issues("edges", definition.edges))
    return issues, size


def _parse(nodes: list[Any], edges: list[Any]) -> tuple[PipelineDefinition | None, list[Issue], int]:
    """Parse two lists: the graph unless its shape is wrong, the issues, and a bound of the size of unknown keys."""
    definition, issues = None, list[Issue]()
    try:
        definition = PipelineDefinition.from_json(nodes, edges)
    except InvalidPipelineError as error:
        issues += error.issues
    try:
        if {*chain.from_iterable(nodes)} <= _NODE_KEYS and {*chain.from_iterable(edges)} <= _EDGE_KEYS:
            return definition, issues, 0
    except TypeError:  # an item of another type
        pass
    found, size = list[Issue](), 0
    for index, edge in enumerate(edges):
        found += end_issues(index, edge) if isinstance(edge, dict) else []
    lists: tuple[tuple[Literal["nodes", "edges"], list[Any]], ...] = (("nodes", nodes), ("edges", edges))
    for key, items in lists:
        unknown = [_unknown_keys(key, item) for item in items]
        more = scan(unknown, MAX_DEPTH - 1)
        size = size + more if min(size, more) >= 0 else -1
        for index, values in enumerate(unknown if more < 0 else ()):
            found += json_issues(values, f"Invalid {key[:-1]} data: {key}[{index}]", MAX_DEPTH - 1, (key, index))
    return definition, _merge(issues, found), size


def _unknown_keys(key: Literal["nodes", "edges"], item: object) -> dict[Any, Any]:
    """The part of an item that is no field of its model."""
    if not isinstance(item, dict):
        return {}
    known = _NODE_KEYS
    if key == "edges":
        known = _EDGE_KEYS.union(name for name, alias in END_ALIASES.items() if alias not in item)
    return {name: value for name, value in item.items() if name not in known}


def _model_issues(key: Literal["nodes", "edges"], items: list[Any]) -> list[Issue]:
    """Name each place of models made without validation that has the wrong shape or that JSONB can't hold."""
    model: type[PipelineNode | PipelineEdge] = PipelineNode if key == "nodes" else PipelineEdge
    issues: list[Issue] = []
    for index, item in enumerate(items):
        fields = {name: value for name in model.model_fields if (value := getattr(item, name, None)) is not None}
        try:
            model.model_validate(fields)
        except ValidationError as error:
            issues += shape_issues(error, {key: items}, (key, index))
        as_json = (getattr(item, "model_extra", None) or {}) | {
            END_ALIASES.get(name, name): value for name, value in fields.items()
        }
        issues += json_issues(as_json, f"{key}[{index}]", MAX_DEPTH - 1, (key, index))
    return issues


def _construct(nodes: list[Any], edges: list[Any]) -> PipelineDefinition:
    """Make a graph of items of which some have the wrong shape."""
    as_nodes = [PipelineNode.model_construct(**_known_fields(PipelineNode, node)) for node in nodes]
    as_edges = [PipelineEdge.model_construct(**_known_fields(PipelineEdge, edge)) for edge in edges]
    return PipelineDefinition.model_construct(nodes=as_nodes, edges=as_edges)


def _known_fields(model: type[PipelineNode | PipelineEdge], item: object) -> dict[str, Any]:
    if not isinstance(item, dict):
        return {}
    keys = {name: [field.alias or name, name] for name, field in model.model_fields.items()}  # in the order of Pydantic
    return {name: item[key] for name, both in keys.items() for key in reversed(both) if key in item}


def _merge(issues: list[Issue], *more: list[Issue]) -> list[Issue]:
    """Add issues, except those already reported and those within an item that is not an object."""
    merged = {(issue.code, issue.loc): issue for issue in issues}
    not_objects = {loc for code, loc in merged if code in _NOT_AN_OBJECT and loc[2:] == ()}
    for issue in chain.from_iterable(more):
        if issue.loc[:2] not in not_objects or issue.code == IssueCode.INVALID_JSON:
            merged.setdefault((issue.code, issue.loc), issue)
    return [*merged.values()]


def _has_errors(issues: list[Issue]) -> bool:
    return any(issue.severity == "error" for issue in issues)


def _graph_issues(definition: PipelineDefinition, columns: _Columns) -> list[Issue]:
    """Check ids, edges, order and configurations, and cache the order."""
    issues: list[Issue] = []
    nodes = definition.nodes
    if not nodes:
        issues.append(Issue("error", IssueCode.NO_NODES, "Pipeline must have at least one node", loc=("nodes",)))
    _check_ids("node", columns.nodes, issues)
    _check_ids("edge", columns.edges, issues)
    object.__setattr__(definition, "_order", _check_edges(definition, columns, issues))
    _check_configs(columns.nodes, _column(nodes, "type"), _column(nodes, "config"), issues)
    return issues


def _column(items: Sequence[object], name: str) -> list[Any]:
    try:
        return list(map(_GETTERS[name], items))
    except AttributeError:  # made by model_construct
        return [getattr(item, name, None) for item in items]


def _issue(item: _Item, value: object, code: IssueCode, message: str, *loc: str | int) -> Issue:
    """An issue about the node or the edge with this id; ``loc`` goes on from the list's name."""
    name = value if isinstance(value, str) else None
    node_id, edge_id = (name, None) if item == "node" else (None, name)
    return Issue(code.severity, code, message, node_id, edge_id, (f"{item}s", *loc))


def _pause_gc(nodes: Sequence[object], edges: Sequence[object]) -> bool:
    """Pause the collector for a large graph: it would take half the time, looking for garbage among objects in use."""
    paused = len(nodes) + len(edges) > _LARGE and gc.isenabled()
    if paused:
        gc.disable()
    return paused


# --- ids --------------------------------------------------------------------------------------------------------------


def _check_ids(item: _Item, ids: list[Any], issues: list[Issue]) -> None:
    """Check each id, and that it is unique."""
    if text_size(ids) >= 0 and len({*ids}) == len(ids):
        lengths = {*map(len, ids)}
        text = "".join(ids)  # in most graphs without any blank, which is faster to find out
        if lengths <= _LENGTHS[item] and (text.split(None, 1) == [text] or ids == list(map(str.strip, ids))):
            return
    first: dict[str, int] = {}
    for index, value in enumerate(ids):
        for code, reason in _id_faults(item, value):
            message = f"{item}s[{index}].id {reason}: {quote(value)}"
            issues.append(_issue(item, value, code, message, index, "id"))
        if isinstance(value, str) and first.setdefault(value, index) != index:
            message = f"Duplicate {item} id {quote(value)}: {item}s[{first[value]}] and {item}s[{index}]"
            code = IssueCode.DUPLICATE_NODE if item == "node" else IssueCode.DUPLICATE_EDGE
            issues.append(_issue(item, value, code, message, index, "id"))


def _id_faults(item: _Item, value: object) -> Iterator[tuple[IssueCode, str]]:
    if not isinstance(value, str):
        yield IssueCode.INVALID_ID, "is not a string"
        return
    if not value.strip():
        yield IssueCode.INVALID_ID, "is empty or blank"
    elif value != value.strip():
        yield IssueCode.INVALID_ID, "has leading or trailing blanks"
    elif len(value) > MAX_ID_LENGTH[item]:
        yield IssueCode.INVALID_ID, f"is longer than {MAX_ID_LENGTH[item]} characters"
    if reason := text_reason(value):
        yield IssueCode.INVALID_JSON, reason


# --- edges, order, cycles ---------------------------------------------------------------------------------------------


def _check_edges(definition: PipelineDefinition, columns: _Columns, issues: list[Issue]) -> _Order | None:
    """Check the edges and the graph that they form, and sort it; ``None`` unless every id and every end is valid."""
    ids, names, sources, targets = columns
    known: Sequence[int] = range(len(names))
    try:
        place = dict(zip(ids, range(len(ids)), strict=True))
        place.pop(None, None)  # no edge ends at a missing id
        heads, tails = list(map(place.__getitem__, sources)), list(map(place.__getitem__, targets))
    except (KeyError, TypeError):  # an end is unknown, an id is not hashable
        place = {value: index for index, value in enumerate(ids) if isinstance(value, str)}
        known, heads, tails = _known_edges(place, columns, issues)
    predecessors: list[set[int]] = [set() for _ in ids]
    for head, tail in zip(heads, tails, strict=True):
        predecessors[tail].add(head)
    if sum(map(len, predecessors)) < len(heads):
        first: dict[tuple[int, int], int] = {}
        for index, ends in zip(known, zip(heads, tails, strict=True), strict=True):
            if (other := first.setdefault(ends, index)) != index:
                message = f"Edges {quote(names[other])} and {quote(names[index])} connect the same nodes"
                issues.append(_issue("edge", names[index], IssueCode.PARALLEL_EDGES, message, index))
    issues += chain(_node_warnings(definition.nodes, ids, place, heads, tails), _similar_ids(ids, place))
    issues += _branch_warnings(definition, columns, known, heads, tails)
    order = _sort(predecessors)
    if len(order) < len(ids):
        issues += [_cycle_issue(ids, cycle) for cycle in _cycles(predecessors)]
    if len(order) < len(ids) or len(place) < len(ids) or len(heads) < len(names):
        return None
    return _Order(columns, list(map(ids.__getitem__, order)))


def _known_edges(
    place: dict[str, int], columns: _Columns, issues: list[Issue]
) -> tuple[list[int], list[int], list[int]]:
    """Report the edges with an invalid end; returns the others' indexes, heads and tails."""
    known, heads, tails = list[int](), list[int](), list[int]()
    for index, (name, source, target) in enumerate(zip(*columns[1:], strict=True)):
        places: list[int] = []
        for key, side, end in (("from", "source", source), ("to", "target", target)):
            if isinstance(end, str) and end in place:
                places.append(place[end])
                continue
            unknown = IssueCode.UNKNOWN_SOURCE if key == "from" else IssueCode.UNKNOWN_TARGET
            code = unknown if isinstance(end, str) else IssueCode.INVALID_EDGE
            message = f"Edge {quote(name)} references unknown {side} node: {quote(end)}"
            issues.append(_issue("edge", name, code, message, index, key))
            if isinstance(end, str) and (reason := text_reason(end)):
                message = f"edges[{index}].{key} {reason}: {quote(end)}"
                issues.append(_issue("edge", name, IssueCode.INVALID_JSON, message, index, key))
        if len(places) == 2:  # noqa: PLR2004 - both ends
            known.append(index)
            heads.append(places[0])
            tails.append(places[1])
    return known, heads, tails


def _sort(predecessors: list[set[int]]) -> list[int]:
    """Sort places by generation, ties by place; those on a cycle and behind one are left out."""
    sorter = graphlib.TopologicalSorter(dict(enumerate(predecessors)))
    with suppress(graphlib.CycleError):  # the nodes before the cycle are still returned
        sorter.prepare()
    order: list[int] = []
    while ready := sorted(sorter.get_ready()):  # each round is a generation
        order += ready
        sorter.done(*ready)
    return order


def _cycles(predecessors: list[set[int]]) -> Iterator[list[int]]:
    """Find each edge from a node to itself, and at most ten other cycles, which share no node.

    ``graphlib`` reports one cycle of a graph; which one is undefined. Here each node that can't be sorted keeps one
    predecessor, the last in the list of nodes, and ``graphlib`` searches against the edges from the first such node. So
    the first cycle is defined, and it is the one that the database finds (``refuse_cycle``).
    """
    yield from ([place, place] for place, before in enumerate(predecessors) if place in before)
    others = [before - {place} for place, before in enumerate(predecessors)]
    unsorted = sorted({*range(len(others))}.difference(_sort(others)))
    rest = {*unsorted}
    followers: dict[int, list[int]] = {place: [] for place in unsorted}
    for place in unsorted:
        followers[max(others[place] & rest)].append(place)
    for _ in range(_MAX_CYCLES):
        try:
            graphlib.TopologicalSorter(followers).prepare()
        except graphlib.CycleError as error:
            cycle: list[int] = error.args[1]
            yield cycle[::-1]
            for place in cycle[1:]:
                del followers[place]
        else:
            return


def _cycle_issue(ids: list[Any], cycle: list[int]) -> Issue:
    turn = cycle.index(min(cycle))  # start at the node that stands first in the list
    names = [ids[at] for at in (*cycle[turn:-1], *cycle[: turn + 1])]
    if len(names) > _MAX_CYCLE_LENGTH:
        names[5:-5] = [f"... ({len(cycle) - 1} nodes) ..."]
    names = [shorten(name, 40) if isinstance(name, str) and name.isprintable() else quote(name) for name in names]
    message = f"Pipeline contains a cycle: {' -> '.join(names)}"
    return _issue("node", ids[cycle[turn]], IssueCode.CYCLE, message, cycle[turn])


def _node_warnings(
    nodes: list[PipelineNode], ids: list[Any], place: dict[Any, int], heads: list[int], tails: list[int]
) -> Iterator[Issue]:
    orphans = {*range(len(ids))}.difference(heads, tails)
    for at in sorted(orphans) if orphans else ():
        if getattr(nodes[at], "type", None) != "trigger":
            yield _node_warning(ids, at, IssueCode.ORPHAN, "is not connected to any other node")
    if any(nexts := _column(nodes, "next")):
        followers: list[set[str]] = [set() for _ in ids]
        for head, tail in zip(heads, tails, strict=True):
            followers[head].add(ids[tail])
        for at, texts in enumerate(nexts):
            named = {text for text in texts if isinstance(text, str)} if isinstance(texts, list) else set[str]()
            if unknown := named - place.keys():
                text = f"names unknown nodes in next: {quote(sorted(unknown))}"
                yield _node_warning(ids, at, IssueCode.UNKNOWN_NEXT, text, "next")
            if named and named - unknown != followers[at]:
                text = "has a next that contradicts the edges, which decide"
                yield _node_warning(ids, at, IssueCode.CONTRADICTING_NEXT, text, "next")


def _branch_warnings(
    definition: PipelineDefinition, columns: _Columns, known: Sequence[int], heads: list[int], tails: list[int]
) -> Iterator[Issue]:
    """Find edges that have their branch under another key, and conditions that fork without any branch."""
    kinds, unknown = _column(definition.nodes, "type"), _column(definition.edges, _UNKNOWN)
    number = Counter(heads)
    forks = {at for at, kind in enumerate(kinds) if kind == "condition" and number[at] > 1}
    if not forks and not any(unknown):
        return
    plain: dict[int, set[int]] = {at: set() for at in forks}
    for index, head, tail in zip(known, heads, tails, strict=True):
        condition = getattr(definition.edges[index], "condition", None)
        if isinstance(condition, str) and condition.strip():
            plain.pop(head, None)
            continue
        extra = unknown[index] or {}
        key = next((key for key in _NOT_CONDITIONS if extra.get(key) not in (None, "")), None)
        if key is not None and (kinds[head] == "condition" or number[head] > 1):
            plain.pop(head, None)
            name = columns.edges[index]
            message = f"Edge {quote(name)} has a {key}, which is kept but not used: its branch is its condition"
            yield _issue("edge", name, IssueCode.UNUSED_LABEL, message, index, key)
        elif head in plain:
            plain[head].add(tail)
    for at, followers in sorted(plain.items()):
        if len(followers) > 1:
            text = f"forks, but no edge from it has a condition: true takes all {len(followers)}, false none"
            yield _node_warning(columns.nodes, at, IssueCode.UNLABELLED_FORK, text)


def _similar_ids(ids: list[Any], place: dict[Any, int]) -> Iterator[Issue]:
    names = [name for name in place if isinstance(name, str)]
    if all(map(str.isascii, names)):
        return
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(unicodedata.normalize("NFKC", name), name)
        if other != name:
            text = f"looks like node {quote(other)}, but is another one"
            yield _node_warning(ids, place[name], IssueCode.SIMILAR_IDS, text, "id")


def _node_warning(ids: list[Any], at: int, code: IssueCode, text: str, *keys: str) -> Issue:
    return _issue("node", ids[at], code, f"Node {quote(ids[at])} {text}", at, *keys)


# --- configurations ---------------------------------------------------------------------------------------------------

# Types whose models have no other fields than the required keys: keys of the right types are then all that is checked.
_QUICK_KEYS: dict[str, tuple[RequiredKey, ...]] = {
    kind: REQUIRED_KEYS.get(kind, ())
    for kind, model in CONFIG_MODELS.items()
    if model.model_fields.keys() == {"type", *(key.name for key in REQUIRED_KEYS.get(kind, ()))}
}


def _check_configs(ids: list[Any], kinds: list[Any], configs: list[Any], issues: list[Issue]) -> None:
    """Check types and configurations; those that are certainly valid are recognised without Pydantic, which is slow."""
    for index, (kind, config) in enumerate(zip(kinds, configs, strict=True)):
        if type(config) is dict and type(kind) is str and kind in _QUICK_KEYS:
            for key, types, blank, _ in _QUICK_KEYS[kind]:
                value = config.get(key)
                if (type(value) is not str or not (blank or value.strip())) and type(value) not in types:
                    break
            else:
                continue
        _check_config(index, ids[index], kind, config, issues)


@cache
def _config_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(NodeConfig)


def _check_config(index: int, name: Any, kind: Any, config: Any, issues: list[Issue]) -> None:
    """Check a node by ``NodeConfig``, and its required keys, also those for which its model has a default."""
    root = f"nodes[{index}].config"
    if not isinstance(kind, str) or kind not in CONFIG_MODELS:
        message = f"Node {quote(name)} (nodes[{index}]) has invalid type {quote(kind)}"
        issues.append(_issue("node", name, IssueCode.INVALID_TYPE, message, index, "type"))
        return
    if not isinstance(config, dict):
        message = f"{root} must be an object, not {quote(config)}"
        issues.append(_issue("node", name, IssueCode.INVALID_CONFIG, message, index, "config"))
        return
    given = {key: value for key, value in config.items() if value is not None and isinstance(key, str)}
    absent = set[str]()
    for key, _, blank, code in REQUIRED_KEYS.get(kind, ()):
        value = given.get(key)
        if value is None or not (blank or not isinstance(value, str) or value.strip()):
            absent.add(key)
            message = f"{root}.{key}: {kind} node {quote(name)} is missing its {key}"
            issues.append(_issue("node", name, code, message, index, "config", key))
    try:
        _config_adapter().validate_python({**given, "type": kind})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            keys = detail["loc"][1:]  # the first is the type, which selected the model
            if keys and keys[0] not in absent:
                message = f"{json_path(root, keys)}: {shorten(detail['msg'], 200)} ({kind} node {quote(name)})"
                issues.append(_issue("node", name, IssueCode.INVALID_CONFIG, message, index, "config", *keys))


# --- stored JSON ------------------------------------------------------------------------------------------------------


def _size(nodes: list[PipelineNode], edges: list[PipelineEdge], columns: _Columns) -> int:
    """An upper bound of a graph's size as JSON in bytes, or a negative number where a value may not be storable."""
    positions, nexts, conditions = _column(nodes, "position"), _column(nodes, "next"), _column(edges, "condition")
    texts = columns.nodes + columns.edges + _column(nodes, "name")
    if conditions.count(None) < len(conditions):
        texts += [text for text in conditions if text is not None]
    if nexts.count(None) < len(nexts):
        for following in nexts:
            if type(following) is list:
                texts += following
            elif following is not None:
                return -1
    # models made without validation may hold any value; scan doesn't look at types
    if not {*map(type, positions)} <= _OBJECTS:
        return -1
    unknown = list(filter(None, chain(_column(nodes, _UNKNOWN), _column(edges, _UNKNOWN))))
    sizes = (
        text_size(texts),
        scan(chain(_column(nodes, "config"), filter(None, positions)), MAX_DEPTH - 2),
        scan(unknown, MAX_DEPTH - 1) if unknown else 0,
    )
    if min(sizes) < 0:
        return -1
    # the ends of an edge are ids of nodes, so their texts are storable; a character takes up to six bytes, and the
    # names of the fields, quotes and brackets up to 80 bytes of a node and 60 of an edge
    longest = max(map(len, columns.nodes), default=0)
    return sum(sizes) + 80 * len(nodes) + (60 + 12 * longest) * len(edges)
