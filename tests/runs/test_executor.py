"""GatheRing's executor: it walks the graph in topological order, skips by a rule of its own, and reports each node afterwards."""

from __future__ import annotations

import random

from sqlalchemy.orm import Session

from gathering_pipeline import (
    EventRepository,
    NodeExecutionResult,
    PipelineDefinition,
    RunRepository,
    RunStatus,
    get_execution_order,
)
from tests.support.runs import statuses, store


def execute(runs: RunRepository, run_id: int, definition: PipelineDefinition, chance: random.Random) -> dict[str, str]:
    """Run the graph as the executor does, and return what it made of each node.

    A condition that is false skips the nodes that follow it alone, and transitively those that follow only skipped ones.
    """
    before: dict[str, set[str]] = {node: set() for node in definition.node_map}
    for edge in definition.edges:
        before[edge.to_node].add(edge.from_node)
    outcome: dict[str, str] = {}
    unwanted: set[str] = set()
    for node in get_execution_order(definition):
        if node in unwanted or (before[node] and all(outcome[other] == "skipped" for other in before[node])):
            outcome[node] = "skipped"
            runs.record(run_id, [NodeExecutionResult(node_id=node, status="skipped")])
            continue
        outcome[node] = "completed"
        takes = chance.choice(["true", "false"])
        result = NodeExecutionResult(node_id=node, status="completed", output={"takes": takes}, duration_ms=1)
        runs.record(run_id, [result])
        unwanted |= {
            edge.to_node
            for edge in definition.edges
            if edge.from_node == node and edge.condition not in {None, takes} and len(before[edge.to_node]) == 1
        }
    return outcome


def test_executor_that_skips_by_itself_works_on_the_store(runs: RunRepository, session: Session) -> None:
    chance = random.Random(20261127)
    for _ in range(40):
        size = chance.randint(1, 9)
        edges = [
            f"n{a}>n{b}{chance.choice(['', '=true', '=false'])}"
            for b in range(size)
            for a in range(b)
            if chance.random() < 0.35
        ]
        run_id = runs.create(store(session, " ".join([*(f"n{at}" for at in range(size)), *edges]))).id
        wanted = execute(runs, run_id, runs.definition(run_id), chance)
        assert runs.finish(run_id).status is RunStatus.COMPLETED
        assert statuses(runs, run_id) == wanted
        ends = [event for event in EventRepository(session).read(run_id=run_id).items if event.node_id is not None]
        assert {(event.node_id, event.type.rpartition(".")[2]) for event in ends} == set(wanted.items())
        assert len(ends) == size
