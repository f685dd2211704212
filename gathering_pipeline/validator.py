"""What a graph has to be: every check of nodes, edges, configurations and stored JSON, on ``graphlib``; pure.

The good path is written for large graphs: passes over whole lists that run in C, and positions instead of ids. What is
unusual falls through to a slower check that names each place; the fast one only ever says "surely good".
"""

from __future__ import annotations

import gc
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from .arguments import check_type
from .errors import InvalidPipelineError, Issue, shorten
from .json_values import MAX_DEPTH, json_issues, json_path, scan, show, text_reason, text_size
from .models import NodeConfig, NodeType, PipelineDefinition, PipelineEdge, PipelineNode
from .ordering import components, generations

logger = logging.getLogger(__name__)

MAX_ID_LENGTH = 100
"""Longest id in characters: ``pipeline_node_runs.node_id`` is a ``VARCHAR(100)``."""

INCOMPLETE_CODES = frozenset({"no_nodes", "missing_config"})
"""What a draft may have: nothing drawn yet, or configuration still missing."""

_NODE_TYPES = frozenset(get_args(NodeType))
_REQUIRED = {"agent": ("agent_id", "task"), "condition": ("condition",), "action": ("action",)}
_HINT = "parse_pipeline_definition(nodes, edges) makes one, and so does .definition of what is stored"
_MAX_FINDINGS = 100
_MAX_CYCLE = 20
_MANY = 1_000
_FIELDS_SET = "__pydantic_fields_set__"
_GETTERS = {name: attrgetter(name) for name in (*PipelineNode.model_fields, *PipelineEdge.model_fields, _FIELDS_SET)}


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a graph may be; ``max_bytes`` is its size as compact JSON in UTF-8."""

    max_nodes: int = 100_000
    max_edges: int = 1_000_000
    max_bytes: int = 64 * 1024 * 1024


DEFAULT_LIMITS = Limits()


class _Compiled(NamedTuple):
    """The order of a graph, beside what it was made from: it holds as long as these lists are still the graph's."""

    ids: list[Any]
    sources: list[Any]
    targets: list[Any]
    order: list[str]


def validate_pipeline_dag(definition: PipelineDefinition) -> list[str]:
    """Every error of a graph as a sentence; empty when it is valid. Warnings are logged."""
    issues = find_issues(definition)
    warnings = [issue.message for issue in issues if issue.severity == "warning"]
    for message in warnings[:_MAX_FINDINGS]:
        logger.warning("%s", message)
    if len(warnings) > _MAX_FINDINGS:
        logger.warning("and %d more warnings", len(warnings) - _MAX_FINDINGS)
    return [issue.message for issue in issues if issue.severity == "error"]


def find_issues(definition: PipelineDefinition, limits: Limits = DEFAULT_LIMITS) -> list[Issue]:
    """Everything that is wrong or doubtful about a graph, each with a stable code.

    Args:
        definition: The graph; it may have been made without validation.
        limits: How large it may be; what is larger is not looked into.
    """
    check_type(definition, PipelineDefinition, "definition", _HINT)
    nodes, edges = definition.nodes, definition.edges
    if len(nodes) > limits.max_nodes or len(edges) > limits.max_edges:
        return size_issues(nodes, edges, limits)
    issues: list[Issue] = []
    if not nodes:
        issues.append(Issue("error", "no_nodes", "Pipeline must have at least one node"))
    paused = _pause_gc(nodes, edges)
    try:
        ids, kinds, configs = _column(nodes, "id"), _column(nodes, "type"), _column(nodes, "config")
        size = _check_ids("node", ids, issues)
        compiled, more = _check_graph(definition, ids, issues)
        object.__setattr__(definition, "_compiled", compiled)
        _check_configs(ids, kinds, configs, issues)
        size += more + _check_json(nodes, edges, configs, issues)
    finally:
        if paused:
            gc.enable()
    # the bound is generous (80 and 60: the names of the fields), so that few graphs are written out to be measured
    if size + 80 * len(nodes) + 60 * len(edges) > limits.max_bytes and all(i.severity != "error" for i in issues):
        size = len(definition.model_dump_json(by_alias=True, exclude_unset=True).encode())
        if size > limits.max_bytes:
            issues.append(_too_large("bytes", size, limits.max_bytes))
    return issues


def get_execution_order(definition: PipelineDefinition) -> list[str]:
    """Node ids in the order of execution: by generation (longest path from a root), ties by place in ``nodes``.

    Raises:
        InvalidPipelineError: (a ``ValueError``) The graph has a cycle, an unknown end of an edge, or an id twice.
    """
    check_type(definition, PipelineDefinition, "definition", _HINT)
    ids, edges = _column(definition.nodes, "id"), definition.edges
    known: _Compiled | None = getattr(definition, "_compiled", None)
    if known is None or known[:3] != (ids, _column(edges, "from_node"), _column(edges, "to_node")):
        issues: list[Issue] = []
        _check_ids("node", ids, issues)
        known, _ = _check_graph(definition, ids, issues)
        if known is None:
            raise InvalidPipelineError([issue for issue in issues if issue.severity == "error"])
        object.__setattr__(definition, "_compiled", known)
    return known.order.copy()


def parse_pipeline_definition(nodes_json: list[dict[str, Any]], edges_json: list[dict[str, Any]]) -> PipelineDefinition:
    """Parse the two JSON lists of a pipeline; what the graph means is left to ``find_issues``.

    Raises:
        InvalidPipelineError: (a ``ValueError``) "Invalid node data: ..." or "Invalid edge data: ...", with an issue for
            each place that has the wrong shape or holds what JSON can't.
    """
    issues: list[Issue] = []
    definition: PipelineDefinition | None = None
    paused = _pause_gc(nodes_json, edges_json)
    try:
        try:
            definition = PipelineDefinition.from_json(nodes_json, edges_json)
        except InvalidPipelineError as error:
            issues += error.issues
        if definition is None or not _is_plain(definition, nodes_json, edges_json):
            lists: dict[str, object] = {"node": nodes_json, "edge": edges_json}
            for what, items in lists.items():
                for index, item in enumerate(items if isinstance(items, list) else ()):
                    if not isinstance(item, PipelineNode | PipelineEdge):
                        issues += json_issues(item, f"Invalid {what} data: {what}s[{index}]", MAX_DEPTH - 1)
    finally:
        if paused:
            gc.enable()
    if definition is None or issues:
        raise InvalidPipelineError(issues)
    return definition


def size_issues(nodes: Sequence[object], edges: Sequence[object], limits: Limits = DEFAULT_LIMITS) -> list[Issue]:
    """Whether there are more nodes or edges than ``limits`` allow."""
    counts = (("nodes", len(nodes), limits.max_nodes), ("edges", len(edges), limits.max_edges))
    return [_too_large(what, count, limit) for what, count, limit in counts if count > limit]


def _too_large(what: str, count: int, limit: int) -> Issue:
    return Issue("error", "too_large", f"Pipeline has {count} {what}, more than the limit of {limit} {what}")


def _column(items: Sequence[object], name: str) -> list[Any]:
    try:
        return list(map(_GETTERS[name], items))
    except AttributeError:  # made by model_construct
        return [getattr(item, name, None) for item in items]


def _about(what: str, value: object, code: str, message: str, severity: Literal["error", "warning"] = "error") -> Issue:
    name = value if isinstance(value, str) else None
    return Issue(severity, code, message, name if what == "node" else None, name if what == "edge" else None)


def _pause_gc(nodes: object, edges: object) -> bool:
    """Pause the collector for a large graph: half the time would go into looking for garbage among objects in use."""
    if not (isinstance(nodes, list) and isinstance(edges, list) and len(nodes) + len(edges) > _MANY and gc.isenabled()):
        return False
    gc.disable()
    return True


def _check_ids(what: str, ids: list[Any], issues: list[Issue]) -> int:
    """Check each id, and that none is there twice; returns a bound of their size as JSON."""
    size = text_size(ids)
    good = (
        size >= 0 and all(ids) and max(map(len, ids), default=0) <= MAX_ID_LENGTH and ids == list(map(str.strip, ids))
    )
    if good and len(set(ids)) == len(ids):
        return size
    first: dict[str, int] = {}
    for index, value in enumerate(ids):
        if reason := _id_reason(value):
            issues.append(_about(what, value, "invalid_id", f"{what}s[{index}].id {reason}: {show(value)}"))
        if isinstance(value, str) and first.setdefault(value, index) != index:
            message = f"Duplicate {what} id {show(value)}: {what}s[{first[value]}] and {what}s[{index}]"
            issues.append(_about(what, value, f"duplicate_{what}", message))
    return max(size, 0)


def _id_reason(value: object) -> str | None:
    if not isinstance(value, str):
        return "is not a string"
    if not value.strip():
        return "is empty or blank"
    if value != value.strip():
        return "has leading or trailing blanks"
    if len(value) > MAX_ID_LENGTH:
        return f"is longer than {MAX_ID_LENGTH} characters"
    return text_reason(value)


def _check_graph(definition: PipelineDefinition, ids: list[Any], issues: list[Issue]) -> tuple[_Compiled | None, int]:
    """Check the edges and what they make of the nodes; returns the order, if it has one, and a bound of their size."""
    edges, count = definition.edges, len(ids)
    names, sources, targets = _column(edges, "id"), _column(edges, "from_node"), _column(edges, "to_node")
    size = _check_ids("edge", names, issues)
    try:
        place = dict(zip(ids, range(count), strict=True))
        place.pop(None, None)  # an id that is missing is no end of an edge
        heads, tails = list(map(place.__getitem__, sources)), list(map(place.__getitem__, targets))
    except (KeyError, TypeError):  # an end is unknown, an id is not hashable
        place = {value: index for index, value in enumerate(ids) if isinstance(value, str)}
        names, heads, tails = _known_edges(place, names, sources, targets, issues)
    followers: list[list[int]] = [[] for _ in ids]
    waiting = [0] * count
    for head, tail in zip(heads, tails, strict=True):
        followers[head].append(tail)
        waiting[tail] += 1
    if len({head * count + tail for head, tail in zip(heads, tails, strict=True)}) < len(heads):
        first: dict[tuple[int, int], int] = {}
        for index, ends in enumerate(zip(heads, tails, strict=True)):
            if (other := first.setdefault(ends, index)) != index:
                message = f"Edges {show(names[other])} and {show(names[index])} connect the same nodes"
                issues.append(_about("edge", names[index], "parallel_edges", message, "warning"))
    issues += _node_warnings(definition.nodes, ids, place, followers, waiting)
    order = generations(followers, waiting)
    if len(order) < count:
        issues += [_cycle_issue(ids, cycle) for cycle in _cycles(followers, {*range(count)}.difference(order))]
    if len(order) < count or len(place) < count or len(heads) < len(edges):
        return None, size
    return _Compiled(ids, sources, targets, list(map(ids.__getitem__, order))), size


def _known_edges(
    place: dict[str, int], names: list[Any], sources: list[Any], targets: list[Any], issues: list[Issue]
) -> list[list[Any]]:
    """Report the edges with an unknown end; returns the others' names, heads and tails."""
    known: list[list[Any]] = []
    for name, *ends in zip(names, sources, targets, strict=True):
        places = [place.get(end) if isinstance(end, str) else None for end in ends]
        for side, end, at in zip(("source", "target"), ends, places, strict=True):
            if at is None:
                message = f"Edge {show(name)} references unknown {side} node: {show(end)}"
                issues.append(_about("edge", name, f"unknown_{side}", message))
        if None not in places:
            known.append([name, *places])
    return list(map(list, zip(*known, strict=True))) or [[], [], []]


def _cycles(followers: list[list[int]], rest: set[int]) -> list[list[int]]:
    """A cycle of each strongly connected component among ``rest``, and each edge from a node to itself."""
    predecessors: dict[int, set[int]] = {at: set() for at in sorted(rest)}
    for head in predecessors:
        for tail in followers[head]:  # what follows a node of the rest is of the rest itself
            predecessors[tail].add(head)
    cycles = [[at, at] for at, before in predecessors.items() if at in before]
    for component in components(predecessors):
        graph = {at: (predecessors[at] & component) - {at} for at in sorted(component)}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycles.append(error.args[1])
    return cycles


def _cycle_issue(ids: list[Any], cycle: list[int]) -> Issue:
    turn = cycle.index(min(cycle))  # start at the node that stands first in the list
    names = [ids[at] for at in (*cycle[turn:-1], *cycle[: turn + 1])]
    if len(names) > _MAX_CYCLE:
        names[5:-5] = [f"... ({len(cycle) - 1} nodes) ..."]
    names = [shorten(name, 40) if isinstance(name, str) and name.isprintable() else show(name) for name in names]
    return _about("node", ids[cycle[turn]], "cycle", f"Pipeline contains a cycle: {' -> '.join(names)}")


def _node_warnings(
    nodes: list[PipelineNode], ids: list[Any], place: dict[Any, int], followers: list[list[int]], waiting: list[int]
) -> list[Issue]:
    lonely = [at for at, after in enumerate(followers) if not after and not waiting[at]]
    lonely = [at for at in lonely if getattr(nodes[at], "type", None) != "trigger"]
    warnings = [(at, "orphan", "is not connected to any other node") for at in lonely]
    for at, texts in enumerate(nexts if any(nexts := _column(nodes, "next")) else ()):
        named = {text for text in texts if isinstance(text, str)} if isinstance(texts, list) else set()
        unknown = named - place.keys()
        if unknown:
            warnings.append((at, "unknown_next", f"names unknown nodes in next: {show(sorted(unknown))}"))
        if named and named - unknown != {ids[tail] for tail in followers[at]}:
            warnings.append((at, "contradicting_next", "has a next that contradicts the edges, which decide"))
    names = [name for name in place if isinstance(name, str)]
    if not all(map(str.isascii, names)):
        alike: dict[str, str] = {}
        for name in names:
            other = alike.setdefault(unicodedata.normalize("NFKC", name), name)
            if other != name:
                warnings.append((place[name], "similar_ids", f"looks like node {show(other)}, but is another one"))
    return [_about("node", ids[at], code, f"Node {show(ids[at])} {text}", "warning") for at, code, text in warnings]


def _check_configs(ids: list[Any], kinds: list[Any], configs: list[Any], issues: list[Issue]) -> None:
    """Check types and configurations; what is surely good is recognised here, which spares most nodes a validation."""
    for index, (kind, config) in enumerate(zip(kinds, configs, strict=True)):
        if type(config) is dict:
            if kind == "agent":
                agent, task = config.get("agent_id"), config.get("task")
                known = type(agent) is int or (type(agent) is str and agent.strip())
                if known and type(task) is str and task.strip():
                    continue
            elif kind == "action":
                action = config.get("action")
                if type(action) is str and action.strip():
                    continue
            elif kind == "condition":
                if type(config.get("condition")) is str:
                    continue
            elif kind in ("trigger", "parallel"):
                continue
        _check_config(index, ids[index], kind, config, issues)


@cache
def _config_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(NodeConfig)


def _check_config(index: int, name: Any, kind: Any, config: Any, issues: list[Issue]) -> None:
    """Check a node by ``NodeConfig``; what its models would fill in by a default has to be there, too."""
    root = f"nodes[{index}].config"
    if not isinstance(kind, str) or kind not in _NODE_TYPES:
        message = f"Node {show(name)} (nodes[{index}]) has invalid type {show(kind)}"
        issues.append(_about("node", name, "invalid_type", message))
        return
    if not isinstance(config, dict):
        issues.append(_about("node", name, "invalid_config", f"{root} must be an object, not {show(config)}"))
        return
    given = {key: value for key, value in config.items() if value is not None and isinstance(key, str)}
    blank = {key for key, value in given.items() if isinstance(value, str) and not value.strip()}
    absent = [key for key in _REQUIRED.get(kind, ()) if key not in given or (key in blank and kind != "condition")]
    for key in absent:
        what = f"{root}.{key}: {kind} node {show(name)}"
        if kind == "action":  # existing editors store such nodes, and they are run
            issues.append(_about("node", name, "missing_action", f"{what} has no action", "warning"))
        else:
            issues.append(_about("node", name, "missing_config", f"{what} is missing its {key}"))
    try:
        _config_adapter().validate_python({**given, "type": kind})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            keys = detail["loc"][1:]  # the first is the type by which the model was chosen
            if keys and keys[0] not in absent:
                message = f"{json_path(root, keys)}: {shorten(detail['msg'], 200)} ({kind} node {show(name)})"
                issues.append(_about("node", name, "invalid_config", message))


def _content_size(nodes: list[PipelineNode], edges: list[PipelineEdge], configs: list[Any]) -> int:
    """A bound of the size of all but ids and types as JSON, if it is surely storable, else a negative number."""
    nexts, conditions = filter(None, _column(nodes, "next")), filter(None, _column(edges, "condition"))
    size = text_size(_column(nodes, "name"))
    more = scan(chain(configs, _column(nodes, "position"), nexts, conditions), MAX_DEPTH - 2)
    return size + more if size >= 0 and more >= 0 else -1


def _is_plain(definition: PipelineDefinition, nodes: list[dict[str, Any]], edges: list[dict[str, Any]]) -> bool:
    """Whether the JSON that was parsed is surely storable. The models hold all of it, unless there are other keys."""
    models, arrows = definition.nodes, definition.edges
    try:
        if sum(map(len, chain(nodes, edges))) != sum(map(len, map(_GETTERS[_FIELDS_SET], chain(models, arrows)))):
            return False
    except TypeError:  # a model among the items
        return False
    texts = [*_column(models, "id"), *chain(*(_column(arrows, end) for end in ("id", "from_node", "to_node")))]
    return text_size(texts) >= 0 and _content_size(models, arrows, _column(models, "config")) >= 0


def _check_json(nodes: list[PipelineNode], edges: list[PipelineEdge], configs: list[Any], issues: list[Issue]) -> int:
    """Check what JSONB can't hold in the fields that are not ids; returns a bound of their size."""
    size = _content_size(nodes, edges, configs)
    if size < 0:
        for index, node in enumerate(nodes):
            for field in ("name", "config", "position", "next"):
                issues += json_issues(getattr(node, field, None), f"nodes[{index}].{field}", MAX_DEPTH - 2)
        for index, edge in enumerate(edges):
            issues += json_issues(getattr(edge, "condition", None), f"edges[{index}].condition", 0)
    return max(size, 0)
