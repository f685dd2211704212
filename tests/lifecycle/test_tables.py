"""The tables of the lifecycle in the database are those of the package, cell by cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import get_args

import psycopg
import pytest

from gathering_pipeline import NodeStatus, RunStatus
from gathering_pipeline.events import EventType
from gathering_pipeline.lifecycle import NODE_EVENTS, NODE_TRANSITIONS, RUN_EVENTS, RUN_TRANSITIONS
from gathering_pipeline.models import NodeType


@pytest.mark.parametrize(
    ("function", "transitions"), [("run_may_become", RUN_TRANSITIONS), ("node_may_become", NODE_TRANSITIONS)]
)
def test_transitions_are_those_of_lifecycle(
    raw: psycopg.Connection, function: str, transitions: Mapping[StrEnum, frozenset[StrEnum]]
) -> None:
    statuses = [str(status) for status in transitions]
    cells = raw.execute(
        f"SELECT a, b, circle.{function}(a, b) FROM unnest(%(all)s::text[]) a, unnest(%(all)s::text[]) b".encode(),
        {"all": [*statuses, "unknown"]},
    ).fetchall()
    assert len(cells) == 49
    assert {(a, b) for a, b, legal in cells if legal} == {(a, b) for a in transitions for b in transitions[a]}
    assert {legal for _, _, legal in cells} == {True, False}


@pytest.mark.parametrize(
    ("function", "statuses", "events"), [("run_event", RunStatus, RUN_EVENTS), ("node_event", NodeStatus, NODE_EVENTS)]
)
def test_events_are_those_of_lifecycle(
    raw: psycopg.Connection, function: str, statuses: type[StrEnum], events: Mapping[StrEnum, EventType]
) -> None:
    found = raw.execute(
        f"SELECT status, circle.{function}(status) FROM unnest(%s::text[]) status".encode(),
        [[str(status) for status in statuses]],
    ).fetchall()
    assert {status: event for status, event in found if event is not None} == dict(events)
    # a run has no event when it becomes pending, nor a node when it is cancelled: their triggers leave these out
    assert [status for status, event in found if event is None] == [set(statuses).difference(events).pop()]


@pytest.mark.parametrize(("function", "names"), [("node_types", get_args(NodeType)), ("event_types", EventType)])
def test_types_are_those_of_the_package(raw: psycopg.Connection, function: str, names: Iterable[str]) -> None:
    row = raw.execute(f"SELECT circle.{function}()".encode()).fetchone()
    assert row == ([str(name) for name in names],)


@pytest.mark.parametrize(
    ("query", "inlined"),
    [
        ("SELECT FROM circle.pipeline_runs WHERE circle.run_may_become(status, 'running')", "CASE"),
        ("SELECT FROM circle.pipeline_node_runs WHERE circle.node_may_become(status, 'skipped')", "CASE"),
        ("SELECT FROM circle.pipeline_runs WHERE circle.holds_run(claim_token, lease_expires_at, 1)", "COALESCE("),
        ("SELECT circle.run_event(status) FROM circle.pipeline_runs", "CASE"),
        ("SELECT circle.node_event(status) FROM circle.pipeline_node_runs", "CASE"),
        ("SELECT FROM circle.startable_node_runs", "bool_and("),
    ],
)
def test_the_planner_inlines_the_rules(raw: psycopg.Connection, query: str, inlined: str) -> None:
    plan = "\n".join(row[0] for row in raw.execute(f"EXPLAIN (VERBOSE, COSTS OFF) {query}".encode()).fetchall())
    assert inlined in plan
    assert re.search(r"may_become|holds_run|_event\(|blocked_by\(", plan) is None, plan
