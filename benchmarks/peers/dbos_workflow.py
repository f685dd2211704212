"""DBOS: a workflow whose steps are checkpointed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

from dbos import DBOS  # pyright: ignore[reportMissingImports] - only in the environment of this peer

from benchmarks.peers.interface import Task

RECORDED: LiteralString = (
    "SELECT count(*) FROM dbos.operation_outputs JOIN dbos.workflow_status USING (workflow_uuid)"
    " WHERE status = 'SUCCESS'"
)


@contextmanager
def prepare(task: Task) -> Iterator[Callable[[], object]]:
    """Migrate the database and launch DBOS, with its own threads."""

    def node(_node_id: str) -> dict[str, Any]:
        return task.output

    def run() -> None:
        for at in range(task.count):
            step(f"node-{at}")

    # Called, since a decorator without types would take the types of the functions away.
    DBOS(config={"name": "peer", "system_database_url": task.url, "log_level": "ERROR"})
    try:
        step, workflow = DBOS.step()(node), DBOS.workflow()(run)
        DBOS.launch()
        yield workflow
    finally:
        DBOS.destroy()
