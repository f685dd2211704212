"""Whatever is given as a graph: an answer, or the error that is documented. ``GATHERING_EXAMPLES`` says how often."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, member
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gathering_pipeline.arguments import check_json
from gathering_pipeline.errors import InvalidDataError, InvalidPipelineError, Issue
from gathering_pipeline.hooks import prepare_fields, prepare_graph
from gathering_pipeline.models import PipelineDefinition, PipelineEdge, PipelineNode
from gathering_pipeline.node_types import NODE_TYPES
from gathering_pipeline.validator import (
    INCOMPLETE_CODES,
    Limits,
    find_issues,
    find_json_issues,
    get_execution_order,
    parse_pipeline_definition,
    validate_pipeline_dag,
)

T = TypeVar("T")

each = settings(
    max_examples=int(os.environ.get("GATHERING_EXAMPLES", "50")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def nested(depth: int) -> Any:
    value: Any = 1
    for at in range(depth):
        value = [value] if at % 2 else {"x": value}
    return value


def circle() -> list[Any]:
    made: list[Any] = []
    made.append({"again": made})
    return made


class Odd(Enum):
    """Values of which Hypothesis can't write down an example; ``made`` puts them in."""

    HUGE = member(partial(pow, -10, 5_001))
    LEVELS_62 = member(partial(nested, 62))
    LEVELS_63 = member(partial(nested, 63))
    LEVELS_64 = member(partial(nested, 64))
    LEVELS_1500 = member(partial(nested, 1_500))
    CIRCLE = member(circle)


def made(value: Any) -> Any:
    if isinstance(value, Odd):
        return value.value()
    if isinstance(value, dict):
        return {made(key) if key is Odd.HUGE else key: made(item) for key, item in value.items()}
    return type(value)(map(made, value)) if isinstance(value, list | tuple) else value


any_text = st.text(st.characters(codec=None, categories=None), max_size=5)
ids = st.sampled_from(["a", "b", "c", "d", "é", "e\u0301"]) | any_text
hashable = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    st.sampled_from([10**400, "x" * 101, "\0", "\ud800", b"x", Decimal("NaN"), UUID(int=1), datetime.now(UTC), *Odd]),
    st.builds(object),
)
keys = st.sampled_from(["agent_id", "task", "condition", "action", "seconds", "type"]) | hashable
anything = st.recursive(
    hashable | st.builds(set),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What belongs there, and now and then anything: most graphs are wrong in few places, or in none."""
    return st.integers(0, 19).flatmap(lambda chance: anything if chance == 19 else good)


configs = st.dictionaries(keys, st.sampled_from(["x", 1, 0.5]) | anything, max_size=3) | st.just(
    {"agent_id": 7, "task": "t", "condition": "true", "action": "send", "seconds": 1.5}
)
nodes = st.fixed_dictionaries(
    {"id": mostly(ids), "type": mostly(st.sampled_from(NODE_TYPES)), "name": mostly(st.just("N"))},
    optional={
        "config": mostly(configs),
        "position": mostly(st.none() | st.dictionaries(any_text, anything, max_size=2)),
        "next": mostly(st.none() | st.lists(mostly(ids), max_size=3)),
        "mine": anything,
    },
)
edges = st.fixed_dictionaries(
    {"id": mostly(any_text), "from": mostly(ids), "to": mostly(ids)},
    optional={"condition": mostly(st.none() | st.just("x > 1")), "mine": anything},
)
spelled_otherwise = st.fixed_dictionaries({"id": any_text, "from_node": ids, "to_node": ids}, optional={"to": ids})
node_lists = mostly(st.lists(mostly(nodes), max_size=6))
edge_lists = mostly(st.lists(mostly(edges), max_size=6))


def answer(call: Callable[..., T], *arguments: Any, **more: Any) -> tuple[T | None, tuple[Issue, ...]]:
    """What a call returns, or the issues of the one error that it may raise."""
    try:
        return call(*arguments, **more), ()
    except InvalidPipelineError as error:
        str(error).encode()
        readable(error.issues)
        return None, error.issues


def readable(issues: Any) -> None:
    for issue in issues:
        assert issue.code
        assert 0 < len(issue.message) <= 1_000
        issue.message.encode()


@each
@given(node_lists, edge_lists)
def test_a_graph_is_parsed_checked_and_ordered_or_refused(nodes: Any, edges: Any) -> None:
    nodes, edges = made(nodes), made(edges)
    definition, refused = answer(parse_pipeline_definition, nodes, edges)
    assert (definition is None) == bool(refused)
    if definition is None:
        return
    issues = find_issues(definition)
    readable(issues)
    errors = [issue for issue in issues if issue.severity == "error"]
    assert validate_pipeline_dag(definition) == [issue.message for issue in errors]
    order, refused = answer(get_execution_order, definition)
    assert {issue.code for issue in refused} <= {issue.code for issue in errors}
    assert (order is None) == bool(refused)
    if order is None:
        return
    place = {name: at for at, name in enumerate(order)}
    assert sorted(order) == sorted(node.id for node in definition.nodes)
    assert all(place[edge.from_node] < place[edge.to_node] for edge in definition.edges)
    if not errors:  # what is found good can be stored, and is the same when it comes back
        again = parse_pipeline_definition(*json.loads(json.dumps([nodes, edges], allow_nan=False)))
        assert find_issues(again) == issues
        assert get_execution_order(again) == order


@each
@given(node_lists, edge_lists, st.booleans())
def test_the_hook_accepts_what_is_valid_and_nothing_else(nodes: Any, edges: Any, incomplete: bool) -> None:
    nodes, edges = made(nodes), made(edges)
    definition, refused = answer(parse_pipeline_definition, nodes, edges)
    issues = [*refused] if definition is None else find_issues(definition)
    found = {(issue.code, issue.loc) for issue in find_json_issues(nodes, edges)}
    assert {(issue.code, issue.loc) for issue in issues} <= found
    accepted = INCOMPLETE_CODES if incomplete else frozenset()
    valid = accepted.issuperset(issue.code for issue in issues if issue.severity == "error")
    stored, _ = answer(prepare_graph, nodes, edges, allow_incomplete=incomplete)
    assert stored == ((nodes, edges) if valid else None)


@each
@given(node_lists, st.lists(spelled_otherwise | edges, max_size=4), st.sampled_from(["draft", "active", None]))
def test_fields_are_prepared_or_refused(nodes: Any, edges: Any, status: str | None) -> None:
    nodes, edges = made(nodes), made(edges)
    for values in ({"nodes": nodes}, {"edges": edges}, {"nodes": nodes, "edges": edges, "status": status}):
        answer(prepare_fields, values, allow_incomplete=True)


def fields(model: type[PipelineNode | PipelineEdge]) -> st.SearchStrategy[Any]:
    return st.lists(st.dictionaries(st.sampled_from([*model.model_fields]), anything), max_size=5)


@each
@given(
    fields(PipelineNode),
    fields(PipelineEdge),
    st.builds(Limits, st.integers(0, 6), st.integers(0, 6), st.integers(0, 1_000)),
)
def test_models_that_bypassed_validation(nodes: Any, edges: Any, limits: Limits) -> None:
    nodes = [PipelineNode.model_construct(**made(given)) for given in nodes]
    edges = [PipelineEdge.model_construct(**made(given)) for given in edges]
    definition = PipelineDefinition.model_construct(nodes=nodes, edges=edges)
    readable(find_issues(definition, limits))
    answer(get_execution_order, definition)
    answer(prepare_graph, nodes, edges)


@each
@given(anything)
def test_json_is_storable_or_refused(value: Any) -> None:
    value = made(value)
    try:
        check_json(value, "trigger_data")
    except InvalidDataError as error:
        str(error).encode()
    else:
        json.dumps(value, allow_nan=False).encode()
