"""Random graphs with branches: whatever order their nodes complete in, the same nodes are completed and skipped.

``GATHERING_BRANCHED`` graphs are run, 200 unless that is set, each in several orders; ``GATHERING_SEED`` chooses them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import PipelineDefinition, RunRepository, RunStatus, get_execution_order, untaken_successors
from gathering_pipeline.database import Database
from tests.support.invariants import faults
from tests.support.runs import store

GRAPHS = int(os.environ.get("GATHERING_BRANCHED", "200"))
SEED = int(os.environ.get("GATHERING_SEED", "7"))
LABELS = ["true", "false", " TRUE ", "High", "low"]

Outcome = bool | str | None


@dataclass
class Case:
    """A graph, the outcome of each node, and what becomes of the nodes."""

    nodes: list[dict[str, Any]]
    edges: list[dict[str, Any]]
    outcomes: dict[str, Outcome]
    wanted: dict[str, str]

    def result(self, node: str) -> dict[str, Any]:
        outcome = self.outcomes[node]
        return {"node_id": node, "status": "completed"} | ({} if outcome is None else {"branch": outcome})


def some_case(chance: random.Random) -> Case:
    ids = [f"n{at}" for at in range(chance.randint(1, 14))]
    chance.shuffle(ids)
    labels: list[str | None] = chance.choice([[None], [None, *LABELS], [*LABELS], ["true", "false"]])
    pairs = (
        [sorted(chance.sample(range(len(ids)), 2)) for _ in range(chance.randint(0, 2 * len(ids)))] if ids[1:] else []
    )
    edges = [
        {"id": f"e{at}", "from": ids[source], "to": ids[target], "condition": chance.choice(labels)}
        for at, (source, target) in enumerate(pairs)
    ]
    outcomes: dict[str, Outcome] = {}
    for node in ids:
        own = [edge["condition"] for edge in edges if edge["from"] == node and edge["condition"]]
        outcomes[node] = chance.choice([None, True, False, *own, *own])
    nodes = [{"id": name, "type": chance.choice(["parallel", "delay"]), "name": name} for name in ids]
    chance.shuffle(nodes)
    return Case(nodes, edges, outcomes, simulated(ids, edges, outcomes))


def simulated(ids: list[str], edges: list[dict[str, Any]], outcomes: dict[str, Outcome]) -> dict[str, str]:
    """What becomes of nodes that stand in a topological order, by the rules alone."""
    after: dict[str, str] = {}
    for node in ids:
        alive, incoming = False, False
        for edge in edges:
            if edge["to"] == node:
                incoming = True
                source = edge["from"]
                alive |= after[source] == "completed" and is_taken(edge, edges, outcomes[source])
        after[node] = "completed" if alive or not incoming else "skipped"
    return after


def is_taken(edge: dict[str, Any], edges: list[dict[str, Any]], outcome: Outcome) -> bool:
    """Whether a completed node takes an edge."""
    if outcome is None:
        return True
    said = str(outcome).strip().lower()
    if any(other["condition"] for other in edges if other["from"] == edge["from"]):
        return edge["condition"] is None or edge["condition"].strip().lower() == said
    return said == "true"


# --- the orders --------------------------------------------------------------------------------------------------------

Way = Callable[[RunRepository, int, Case, random.Random], int]
"""Runs a pipeline to its end, and returns the run."""


def by_advance(runs: RunRepository, pipeline: int, case: Case, chance: random.Random) -> int:
    run_id = runs.create(pipeline).id
    step = runs.advance(run_id)
    running = [node.node_id for node in step.started]
    while running:
        chance.shuffle(running)
        batch = [running.pop() for _ in range(chance.randint(1, len(running)))]
        step = runs.advance(run_id, [case.result(node) for node in batch])
        running += [node.node_id for node in step.started]
    return run_id


def one_by_one(runs: RunRepository, pipeline: int, case: Case, chance: random.Random) -> int:
    run_id = runs.start(runs.create(pipeline).id).id
    while ready := runs.ready_nodes(run_id):
        node = chance.choice(ready).node_id
        if chance.random() < 0.5:
            runs.start_node(run_id, node)
        runs.complete_node(run_id, node, branch=case.outcomes[node])
    return runs.finish(run_id).id


def afterwards(runs: RunRepository, pipeline: int, case: Case, chance: random.Random) -> int:
    """In any order, also before their predecessors."""
    run_id = runs.create(pipeline).id
    left = [node for node, status in case.wanted.items() if status == "completed"]
    chance.shuffle(left)
    while left:
        batch = [left.pop() for _ in range(chance.randint(1, len(left)))]
        runs.record(run_id, [case.result(node) for node in batch])
    return runs.finish(run_id).id


def in_one_call(runs: RunRepository, pipeline: int, case: Case, chance: random.Random) -> int:
    done = [case.result(node) for node, status in case.wanted.items() if status == "completed"]
    chance.shuffle(done)
    return runs.record_run(pipeline, done).id


WAYS: list[Way] = [by_advance, by_advance, one_by_one, afterwards, in_one_call]


def differences(runs: RunRepository, session: Session, case: Case, chance: random.Random) -> list[str]:
    """How what a graph's runs come to differs from what is simulated, and from what Python says."""
    pipeline = store(session, nodes=case.nodes, edges=case.edges)
    definition = PipelineDefinition.from_json(case.nodes, case.edges)
    order = get_execution_order(definition)
    found = []
    for way in WAYS:
        run_id = way(runs, pipeline, case, chance)
        nodes = runs.nodes(run_id)
        came = {node.node_id: node.status.value for node in nodes}
        if came != case.wanted or runs.get(run_id).status != RunStatus.COMPLETED:
            found.append(f"{way.__name__}: {came} of {case}")
        for node in nodes:
            outcome = case.outcomes[node.node_id]
            dead: list[str] = []
            if node.status == "completed" and outcome is not None:
                dead = untaken_successors(definition, node.node_id, outcome)
            if sorted(dead) != sorted(order[at] for at in node.untaken or []):
                found.append(f"{way.__name__}: {node.node_id} doesn't take {node.untaken}, by Python {dead} of {case}")
    return found


@pytest.mark.parametrize("part", range(4))
def test_random_branches_come_to_the_same_in_any_order(database: Database, raw: psycopg.Connection, part: int) -> None:
    skipped = joins = 0
    graphs = range(part, GRAPHS, 4)
    for number in graphs:
        chance = random.Random(f"{SEED} {number}")
        case = some_case(chance)
        with database.session() as session:
            found = differences(RunRepository(session), session, case, chance)
        assert found == [], f"GATHERING_SEED={SEED}, graph {number}: {found[0]}"
        skipped += "skipped" in case.wanted.values()
        joins += len({(edge["from"], edge["to"]) for edge in case.edges}) >= len(case.nodes)
    print(f"\n{len(graphs)} graphs, {skipped} of them skip, {joins} have joins, GATHERING_SEED={SEED}")
    assert min(skipped, joins) > len(graphs) / 8
    assert faults(raw, foreign=False) == []
