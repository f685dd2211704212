"""The report of a run: one page of HTML that needs nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from gathering_pipeline.errors import shorten
from gathering_pipeline.explaining import Explanation
from gathering_pipeline.lifecycle import NodeStatus
from gathering_pipeline.models import LogEntry, NodeRunRead, PipelineDefinition, RunRead
from gathering_pipeline.texts import duration_text, one_line, printable_lines

from .graph import GRAPH_STYLE, ICONS, NodeLook, color_style, to_svg
from .timeline import Attempt, find_attempts, node_duration

if TYPE_CHECKING:
    from jinja2 import Template

    from gathering_pipeline.events import PipelineEvent

MOST_ROWS = 500
"""Nodes that the table and the timeline show."""
MOST_DRAWN = 1_000
"""Nodes of the largest graph that the page shows."""

_MOST_JSON = 4_000
"""Characters of a value that is shown as JSON."""
_FIRST = (NodeStatus.FAILED, NodeStatus.RUNNING, NodeStatus.PENDING, NodeStatus.CANCELLED)
"""What is shown of many nodes before all others."""


PROGRESS = (
    *(NodeStatus.COMPLETED, NodeStatus.SKIPPED, NodeStatus.FAILED, NodeStatus.CANCELLED),
    *(NodeStatus.RUNNING, NodeStatus.PENDING),
)
"""The order in which nodes are counted: a bar of them fills from the left."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a report is made of.

    Attributes:
        run: The run.
        pipeline_name: Its pipeline.
        definition: Its graph; ``None``: it is bound to none.
        nodes: Its nodes in execution order.
        events: Its events, in their order.
        logs: Its log, oldest entry first.
        more_logs: Whether the log has more entries.
        tags: Its tags.
        explanation: Why it is stuck, or how it ended.
        at: When this was read.
    """

    run: RunRead
    pipeline_name: str
    definition: PipelineDefinition | None
    nodes: Sequence[NodeRunRead]
    events: Sequence[PipelineEvent]
    logs: Sequence[LogEntry]
    more_logs: bool
    tags: Mapping[str, str]
    explanation: Explanation
    at: datetime


@dataclass(frozen=True, slots=True)
class _Bar:
    """An attempt in the timeline, in percent of its width."""

    left: float
    width: float
    outcome: NodeStatus
    label: str


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that attempts of a node ended with."""

    node_id: str
    text: str
    attempts: list[int]
    last: datetime | None


@dataclass(frozen=True, slots=True)
class _Row:
    """A node as the page shows it."""

    node: NodeRunRead
    name: str
    attempts: list[Attempt]
    bars: list[_Bar]
    duration: str
    output: str | None

    @property
    def summary(self) -> str:
        """What screen readers say instead of the bars."""
        return "; ".join(bar.label for bar in self.bars)


def render_report(record: RunRecord) -> str:
    """Render the page: graph, timeline, nodes, errors and log of a run.

    It has no script and loads nothing. Of more than ``MOST_ROWS`` nodes those that failed or are live come first.

    Args:
        record: The run.
    """
    run, nodes = record.run, list(record.nodes)
    names = {node.id: node.name for node in record.definition.nodes} if record.definition else {}
    attempts = find_attempts(run, nodes, record.events)
    kept = {node.id for node in sorted(nodes, key=lambda node: node.status not in _FIRST)[:MOST_ROWS]}
    shown = [node for node in nodes if node.id in kept]
    begin, end = _span_of(run, attempts, record.at)
    rows = [
        _make_row(node, names.get(node.node_id), attempts.get(node.node_id, []), (begin, end), record.at)
        for node in shown
    ]
    looks = {row.node.node_id: NodeLook(row.node.status, row.duration) for row in rows}
    counts = Counter(node.status for node in nodes)
    by_position = {node.position: node.node_id for node in nodes}
    untaken = {
        (node.node_id, by_position[place]) for node in nodes for place in node.untaken or () if place in by_position
    }
    return _template().render(
        run=run,
        record=record,
        rows=rows,
        left_out=len(nodes) - len(rows),
        counts=[(status, counts[status]) for status in PROGRESS if counts[status]],
        done=sum(count for status, count in counts.items() if status.is_terminal),
        number=len(nodes),
        graph=_draw(record, nodes, looks, untaken),
        untaken=untaken,
        most_drawn=MOST_DRAWN,
        failures=[failure for row in rows for failure in _failures(row)],
        names=names,
        ticks=[(part, duration_text((end - begin) * part / 100)) for part in (0, 25, 50, 75, 100)],
        trigger=_json(run.trigger_data),
        style=color_style() + GRAPH_STYLE,
        icons=ICONS,
        duration="–" if run.started_at is None else duration_text((run.completed_at or record.at) - run.started_at),
    )


def _span_of(run: RunRead, attempts: Mapping[str, Sequence[Attempt]], now: datetime) -> tuple[datetime, datetime]:
    """The time that the timeline shows."""
    every = [attempt for several in attempts.values() for attempt in several]
    starts = [attempt.start for attempt in every] + [run.started_at or run.created_at or now]
    begin = min(starts)
    ends = [attempt.end or now for attempt in every] + [run.completed_at or now]
    return begin, max(*ends, begin + timedelta(milliseconds=1))


def _make_row(
    node: NodeRunRead, name: str | None, attempts: list[Attempt], span: tuple[datetime, datetime], now: datetime
) -> _Row:
    begin, end = span
    whole, bars = end - begin, []
    for number, attempt in enumerate(attempts, 1):
        lasted = (attempt.end or end) - attempt.start
        words = "for" if attempt.end is None else "after"
        label = f"attempt {number} {attempt.outcome} {words} {duration_text(lasted)}"
        if attempt.worker_id is not None:
            label += f", worker {attempt.worker_id}"
        bars.append(_Bar(100 * ((attempt.start - begin) / whole), 100 * (lasted / whole), attempt.outcome, label))
    taken = node_duration(node, now)
    return _Row(
        node,
        (name or "").strip() or node.node_id,
        attempts,
        bars,
        "" if taken is None else duration_text(taken),
        None if not node.output_data else _json(node.output_data),
    )


def _failures(row: _Row) -> list[_Failure]:
    """The different errors of a node."""
    found: dict[str, _Failure] = {}
    for number, attempt in enumerate(row.attempts, 1):
        if attempt.error:
            earlier = found.get(attempt.error)
            numbers = [*(earlier.attempts if earlier else ()), number]
            found[attempt.error] = _Failure(row.node.node_id, attempt.error, numbers, attempt.end)
    return list(found.values())


def _draw(
    record: RunRecord, nodes: Sequence[NodeRunRead], looks: Mapping[str, NodeLook], untaken: set[tuple[str, str]]
) -> str | None:
    """The graph; ``None`` if there is none, or it is too large."""
    if record.definition is None or not 0 < len(record.definition.nodes) <= MOST_DRAWN:
        return None
    plain = {node.node_id: NodeLook(node.status) for node in nodes}
    title = f"Graph of run {record.run.id}: {len(nodes)} nodes"
    return to_svg(record.definition, plain | dict(looks), untaken, title=title, embedded=True)


def _time(time: datetime | None) -> str:
    return "–" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _json(value: Any) -> str:
    return shorten(json.dumps(value, indent=2, ensure_ascii=False), _MOST_JSON)


def _brief(text: str) -> str:
    return shorten(one_line(text), 160)


def _harmless(value: Any) -> Any:
    """What stands in the page for a value: texts of users can't turn the direction of what follows."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return printable_lines(value)
    return value


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # part of the extra cli

    environment = Environment(
        autoescape=True, finalize=_harmless, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"time": _time, "json": _json, "brief": _brief}
    text = resources.files(__package__ or "").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)
