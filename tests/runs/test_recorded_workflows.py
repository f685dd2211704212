"""Workflows that were recorded elsewhere, replayed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
    RunStatus,
)
from tests.support.runs import statuses, store

WORKFLOWS = Path(__file__).parents[3] / "shared" / "data" / "workflows"


def workflow(name: str) -> dict[str, Any]:
    path = WORKFLOWS / name
    if not path.exists():
        pytest.skip("the recorded workflows are not here")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


WORKFLOW_NAMES = sorted(path.name for path in WORKFLOWS.glob("*.json")) or ["none"]


def predecessors(flow: dict[str, Any]) -> dict[str, set[str]]:
    before: dict[str, set[str]] = {node["id"]: set() for node in flow["nodes"]}
    for edge in flow["edges"]:
        before[edge["to"]].add(edge["from"])
    return before


def check_replay(runs: RunRepository, run_id: int, flow: dict[str, Any]) -> None:
    assert runs.get(run_id).status == RunStatus.COMPLETED
    recorded = {result["node_id"]: result for result in flow["results"]}
    nodes = runs.nodes(run_id)
    assert {n.node_id: (n.status, n.output_data) for n in nodes} == {
        name: (result["status"], result["output"]) for name, result in recorded.items()
    }
    # 0 stands for no duration: then it is measured
    assert all(node.duration_ms == (recorded[node.node_id]["duration_ms"] or node.duration_ms) for node in nodes)
    place = {node.node_id: at for at, node in enumerate(nodes)}
    assert all(place[a] < place[b] for b, before in predecessors(flow).items() for a in before)


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_record_whole_workflow_matches_the_recording(runs: RunRepository, session: Session, name: str) -> None:
    flow = workflow(name)
    run_id = runs.create(store(session, nodes=flow["nodes"], edges=flow["edges"])).id
    runs.record(run_id, flow["results"])
    runs.finish(run_id)
    check_replay(runs, run_id, flow)


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_advance_workflow_in_random_batches_matches_the_recording(
    runs: RunRepository, session: Session, name: str
) -> None:
    flow = workflow(name)
    before = predecessors(flow)
    recorded = {result["node_id"]: result for result in flow["results"]}
    chance = random.Random(name)
    run_id = runs.create(store(session, nodes=flow["nodes"], edges=flow["edges"])).id
    running = [node.node_id for node in runs.advance(run_id).started]
    assert running == [name for name in statuses(runs, run_id) if not before[name]]
    over: set[str] = set()
    while running:
        chance.shuffle(running)
        batch = [running.pop() for _ in range(chance.randint(1, min(4, len(running))))]
        over |= set(batch)
        follows = runs.advance(run_id, [recorded[node] for node in batch]).started
        assert all(before[node.node_id] <= over for node in follows)
        running += [node.node_id for node in follows]
    assert over == set(before)
    check_replay(runs, run_id, flow)
