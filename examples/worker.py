"""A worker that simulates nodes as their ``config["simulate"]`` says: ``python -m examples.worker [--name NAME]``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from gathering_pipeline import NodeContext, NodeResult
from gathering_pipeline.worker.__main__ import main


async def simulate(context: NodeContext) -> dict[str, Any] | NodeResult:
    """An agent or an action: it takes its time, and its first attempts may fail. An exception would do, too."""
    given = context.config.get("simulate") or {}
    await asyncio.sleep(given.get("seconds") or 0)
    if context.attempt <= given.get("failures", 0):
        return NodeResult(node_id=context.node.id, status="failed", error="the model does not answer")
    return dict(given.get("output") or {})


def decide(context: NodeContext) -> bool:
    """A condition: whether an output of the nodes before has the key that it names."""
    return any(output.get(context.config["condition"]) for output in context.inputs.values())


HANDLERS = {"agent": simulate, "action": simulate, "condition": decide}

if __name__ == "__main__":
    main(["examples.worker:HANDLERS", *sys.argv[1:]])
