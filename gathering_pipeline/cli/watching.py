"""``runs watch`` in a terminal: the state of a run, which is read again twice a second."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gathering_pipeline.cli.output import make_table, style_of
from gathering_pipeline.cli.runs import NODE_COLUMNS, node_row, run_duration
from gathering_pipeline.errors import is_transient
from gathering_pipeline.lifecycle import NodeStatus
from gathering_pipeline.rendering.report import PROGRESS
from gathering_pipeline.repositories import PipelineRepository, RunRepository
from gathering_pipeline.texts import one_line, printable

if TYPE_CHECKING:
    from gathering_pipeline.database import Database
    from gathering_pipeline.models import NodeRunRead, RunRead

PAUSE = 0.5
_REST = 10
"""Pause after a read that took long, as a multiple of it: a run can have many nodes."""
_HEAD = 8
"""Lines that are not about nodes."""
_ORDER = (
    *(NodeStatus.FAILED, NodeStatus.RUNNING, NodeStatus.PENDING),
    *(NodeStatus.CANCELLED, NodeStatus.COMPLETED, NodeStatus.SKIPPED),
)
"""Which nodes are shown where there is no room for all."""


def watch_live(database: Database, run_id: int) -> RunRead:
    """Show a run until it ends; while its server doesn't answer, the last state stays.

    Raises:
        RunNotFoundError: The run doesn't exist.
    """
    run, nodes = _read(database, run_id)
    with database.reading() as session:
        name = PipelineRepository(session).get(run.pipeline_id).name
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        problem, taken = "", 0.0
        while True:
            live.update(_draw(run, nodes, name, problem, console.height - _HEAD), refresh=True)
            if run.completed_at is not None and not problem:
                return run
            time.sleep(max(PAUSE, _REST * taken))
            begun = time.monotonic()
            try:
                run, nodes = _read(database, run_id)
                problem, taken = "", time.monotonic() - begun
            except Exception as error:
                if not is_transient(error):
                    raise
                problem, taken = str(error), 0.0


def _read(database: Database, run_id: int) -> tuple[RunRead, list[NodeRunRead]]:
    with database.reading() as session:
        runs = RunRepository(session)
        return runs.get(run_id), runs.nodes(run_id)


def _draw(run: RunRead, nodes: list[NodeRunRead], name: str, problem: str, room: int) -> RenderableType:
    counts = Counter(node.status for node in nodes)
    done = sum(count for status, count in counts.items() if status.is_terminal)
    head = Text.assemble(
        (f"run {run.id}", "bold"),
        f" of {printable(name)}: ",
        (run.status, style_of(run.status)),
        f", {run_duration(run)}",
    )
    if run.worker_id is not None:
        head.append(f", worker {printable(run.worker_id)}")
    color = "red" if counts[NodeStatus.FAILED] else "green"
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        ProgressBar(total=max(len(nodes), 1), completed=done, width=30, complete_style=color, finished_style=color),
        Text(f"{done}/{len(nodes)} nodes:"),
        Text(", ".join(f"{counts[status]} {status}" for status in PROGRESS if counts[status])),
    )
    shown = nodes
    if len(nodes) > room:
        kept = {node.id for node in sorted(nodes, key=lambda node: _ORDER.index(node.status))[: max(room, 1)]}
        shown = [node for node in nodes if node.id in kept]
    parts: list[RenderableType] = [head, progress, make_table(NODE_COLUMNS, map(node_row, shown))]
    if len(shown) < len(nodes):
        parts.append(Text(f"and {len(nodes) - len(shown)} more nodes", style="dim"))
    if run.error_message:
        parts.append(Text(one_line(run.error_message), style=style_of("failed")))
    if problem:
        parts.append(Text(printable(problem), style=style_of("failed")))
    return Group(*parts)
