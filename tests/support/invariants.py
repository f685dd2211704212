"""What holds of all rows after whatever was written, by SQL and Python of its own: neither the doctor nor the package's tables."""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import psycopg

ALWAYS = {
    "a completed run with live or failed nodes": """
        SELECT r.id, n.node_id, n.status FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE r.status = 'completed' AND n.status IN ('pending', 'running', 'failed')""",
    "a terminal run with live nodes": """
        SELECT r.id, n.node_id, n.status FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE r.status NOT IN ('pending', 'running') AND n.status IN ('pending', 'running')""",
    "a running node of a run that isn't running": """
        SELECT r.id, n.node_id FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE r.status <> 'running' AND n.status = 'running'""",
    "a run whose times or lease contradict its status": """
        SELECT id, status, started_at, completed_at, worker_id, lease_expires_at FROM circle.pipeline_runs
        WHERE (status IN ('pending', 'running')) <> (completed_at IS NULL) OR completed_at < started_at OR status = 'running' AND started_at IS NULL
           OR lease_expires_at IS NOT NULL AND (status NOT IN ('pending', 'running') OR worker_id IS NULL) OR claim_token < 0
           OR duration_seconds < 0 OR NOT isfinite(started_at) OR NOT isfinite(completed_at) OR NOT isfinite(lease_expires_at)""",
    "a node run whose times contradict its status": """
        SELECT id, status, started_at, completed_at FROM circle.pipeline_node_runs
        WHERE (status IN ('pending', 'running')) <> (completed_at IS NULL) OR completed_at < started_at OR status = 'running' AND started_at IS NULL
           OR retry_count < 0 OR duration_ms < 0""",
    "untaken that isn't of successors of a completed node": """
        SELECT run_id, node_id, status, successors, untaken FROM circle.pipeline_node_runs
        WHERE untaken IS NOT NULL AND (status = 'completed' AND untaken <@ successors) IS NOT TRUE""",
    "a failed_node that didn't fail": """
        SELECT r.id, r.failed_node, n.status FROM circle.pipeline_runs r
        LEFT JOIN circle.pipeline_node_runs n ON n.run_id = r.id AND n.node_id = r.failed_node
        WHERE r.failed_node IS NOT NULL AND n.status IS DISTINCT FROM 'failed'
          AND (r.completed_at IS NULL OR n.id IS NOT NULL)  -- nodes of a terminal run may be deleted""",
    "a run with a failed node and no failed_node": """
        SELECT r.id, n.node_id FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE n.status = 'failed' AND r.failed_node IS NULL""",
    "a run of a missing version": """
        SELECT r.id, r.pipeline_id, r.pipeline_version FROM circle.pipeline_runs r
        LEFT JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
        WHERE v.version IS NULL""",
    "a node run that isn't its version's": """
        SELECT n.run_id, n.node_id FROM circle.pipeline_node_runs n JOIN circle.pipeline_runs r ON r.id = n.run_id
        LEFT JOIN circle.pipeline_version_nodes v
            ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version AND v.node_id = n.node_id
        WHERE n.position IS NOT NULL AND (v.position, v.predecessors, v.successors)
            IS DISTINCT FROM (n.position, n.predecessors, n.successors)""",
    "versions that don't number the graphs": """
        SELECT p.id, p.version, v.versions, v.first, v.last FROM circle.pipelines p CROSS JOIN LATERAL (
            SELECT count(*) AS versions, min(version) AS first, max(version) AS last FROM circle.pipeline_versions
            WHERE pipeline_id = p.id) v
        WHERE v.last IS DISTINCT FROM p.version OR v.first < 1 OR v.versions > v.last  -- old ones may be purged""",
    "a pipeline whose version has another graph": """
        SELECT p.id FROM circle.pipelines p JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
        WHERE p.nodes <> v.nodes OR p.edges <> v.edges""",
    "a version without pipeline": """
        SELECT pipeline_id, version FROM circle.pipeline_versions WHERE pipeline_id NOT IN (SELECT id FROM circle.pipelines)""",
    "an active pipeline without nodes": "SELECT id FROM circle.pipelines WHERE status = 'active' AND nodes = '[]'",
    "a key of two runs": """
        SELECT pipeline_id, idempotency_key FROM circle.pipeline_runs WHERE idempotency_key IS NOT NULL
        GROUP BY 1, 2 HAVING count(*) > 1""",
    "counters that don't equal a recount": """
        SELECT p.id, c.sums, r.counts FROM circle.pipelines p
        LEFT JOIN LATERAL (
            SELECT ARRAY[sum(pending), sum(running), sum(completed), sum(failed), sum(cancelled), sum(timeout)]::bigint[] AS sums
            FROM circle.pipeline_counters WHERE pipeline_id = p.id HAVING count(*) > 0) c ON true
        CROSS JOIN LATERAL (
            SELECT ARRAY(SELECT (SELECT count(*) FROM circle.pipeline_runs WHERE pipeline_id = p.id AND status = s.status)
                         FROM unnest('{pending,running,completed,failed,cancelled,timeout}'::text[]) s (status)) AS counts) r
        WHERE coalesce(c.sums, '{0,0,0,0,0,0}') <> r.counts""",
}
"""Queries that find no row, after calls as well as after raw statements."""

OF_CALLS = {
    "a run without exactly its version's nodes": """
        SELECT r.id, array_agg(n.node_id), array_agg(v.node_id) FROM circle.pipeline_runs r
        CROSS JOIN LATERAL (
            SELECT v.node_id, v.position FROM circle.pipeline_version_nodes v
            WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version) v
        FULL JOIN circle.pipeline_node_runs n ON n.run_id = r.id AND n.node_id = v.node_id AND n.position = v.position
        WHERE n.id IS NULL OR r.id IS NULL GROUP BY r.id""",
    "a pending run with a lease": """
        SELECT id FROM circle.pipeline_runs WHERE status = 'pending' AND (lease_expires_at IS NOT NULL OR worker_id IS NOT NULL)""",
    "a pending node to which no edge is alive": """
        SELECT n.run_id, n.node_id FROM circle.pipeline_node_runs n
        WHERE n.status = 'pending' AND n.predecessors <> '{}' AND NOT EXISTS (
            SELECT FROM circle.pipeline_node_runs p WHERE p.run_id = n.run_id AND p.position = ANY (n.predecessors)
            AND p.status <> 'skipped' AND NOT (p.status = 'completed' AND n.position = ANY (coalesce(p.untaken, '{}'))))""",
    "a run whose history doesn't have its claims": """
        SELECT r.id, r.claim_count, array_agg(h.kind ORDER BY h.id) FROM circle.pipeline_runs r
        LEFT JOIN circle.pipeline_run_history h ON h.run_id = r.id GROUP BY r.id
        HAVING count(*) FILTER (WHERE h.kind = 'claimed') <> r.claim_count""",
    "a cancelled node of a run that goes on": """
        SELECT r.id, n.node_id FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
        WHERE r.status IN ('pending', 'running', 'completed') AND n.status = 'cancelled'""",
}
"""Queries that find no row if all runs were made and moved by calls."""

# the tables of spec 3.1 for the events of 3.4
NODE_EVENTS = {
    "pipeline_node.started": (("pending",), "running"),
    "pipeline_node.completed": (("pending", "running"), "completed"),
    "pipeline_node.failed": (("pending", "running"), "failed"),
    "pipeline_node.skipped": (("pending",), "skipped"),
    "pipeline_node.retrying": (("running",), "pending"),
}
ENDS = ("completed", "failed", "cancelled", "timeout")

Graphs = dict[tuple[int, int], dict[str, list[str]]]
"""The predecessors of each node, by pipeline and version."""


@dataclass
class Replay:
    """A run as its events tell it.

    Attributes:
        predecessors: Those of each node, where the run's graph is known; then each start is judged, too.
        dead: The edges that completed nodes didn't take.
        nodes: The status of each node that has one by an event, or that was taken over from another run.
        foreign: Whether raw statements wrote, too: they may start nodes that aren't ready, and insert node runs that have ended.
    """

    predecessors: dict[str, list[str]] | None
    foreign: bool
    dead: set[tuple[str, str]] = field(default_factory=set)
    status: str = "pending"
    claim: int = 0
    nodes: dict[str, str] = field(default_factory=dict)
    retried: set[str] = field(default_factory=set)

    def event(self, node: str | None, type: str, data: dict[str, Any]) -> str | None:  # noqa: PLR0911 - each rule has its end
        """The rule that an event violates."""
        if self.status in ENDS:
            return "comes after the run's end"
        if node is None:
            status = type.removeprefix("pipeline_run.")
            if status == "started":
                if "resumed_from" in data and len(self.nodes) < data["taken_over"]:
                    self.predecessors = None  # it is deleted, and with it what was taken over
                # a run that was released is pending again, without an event of its own
                running = [name for name, status in self.nodes.items() if status == "running"]
                if running and not self.foreign:  # raw SQL may have cancelled them, which has no event
                    return f"while {running} run"
                if "claim" in data and not self.foreign and data["claim"] < self.claim:
                    return f"is claim {data['claim']} after {self.claim}"
                self.claim = data.get("claim", self.claim)
                self.status = "running"
                return None
            before = ("pending", "running") if status in ("failed", "cancelled") else ("running",)
            legal = self.status in before
            self.status = status
            live = set() if self.foreign else {"running", "pending"}
            if status == "completed" and set(self.nodes.values()) & {"failed", *live}:
                return "while nodes are live or failed"
            return None if legal else "of a run that has not started"
        befores, after = NODE_EVENTS[type]
        found = self.nodes.get(node, "pending")
        inserted = self.foreign and node not in self.nodes and after not in ("running", "pending")
        self.nodes[node] = after
        if self.status != "running" and not inserted:
            return f"while the run is {self.status}"
        if found not in befores:
            return f"of a node that is {found}"
        if after == "pending" and data.get("available_at") is not None:
            self.retried.add(node)
        if after == "running" and not self.foreign:
            if "failed" in self.nodes.values() and node not in self.retried:
                return "after a permanent failure"
            sources = {other: self.nodes.get(other, "pending") for other in (self.predecessors or {}).get(node, [])}
            alive = [other for other in sources if sources[other] == "completed" and (other, node) not in self.dead]
            if sources and not (alive and set(sources.values()) <= {"completed", "skipped"}):
                return f"before its predecessors: {sources}, of which {alive} take it"
        return None

    def differs(self, status: str, nodes: dict[str, str]) -> Iterator[str]:
        """How the stored rows differ from what the events tell."""
        if (status in ENDS) != (self.status in ENDS) or (status in ENDS and status != self.status):
            yield f"the run is {status}, by its events {self.status}"
        if status == "running" != self.status:
            yield f"the run is running, by its events {self.status}"
        for node, now in nodes.items():
            told = self.nodes.get(node, "pending")
            cancelled = now == "cancelled" and told in ("pending", "running") and (status in ENDS or self.foreign)
            if now != told and not cancelled:
                yield f"node {node} is {now}, by its events {told}"


def faults(raw: psycopg.Connection, *, foreign: bool, versions: dict[int, tuple[int, int]] | None = None) -> list[str]:
    """Every row that contradicts the lifecycle, in words.

    Args:
        raw: A connection to a database that nobody writes to meanwhile.
        foreign: Whether raw statements wrote, too.
        versions: Pipeline and version of runs that may be deleted by now.
    """
    found = []
    for rule, query in (ALWAYS if foreign else ALWAYS | OF_CALLS).items():
        found += [f"{rule}: {row}" for row in raw.execute(query).fetchall()]
    graphs, wrong = _graphs(raw)
    found += wrong
    stored = {
        run_id: (status, (pipeline_id, version))
        for run_id, status, pipeline_id, version in raw.execute(
            "SELECT id, status, pipeline_id, pipeline_version FROM circle.pipeline_runs"
        )
    }
    nodes: dict[int, dict[str, str]] = defaultdict(dict)
    for run_id, node, status in raw.execute("SELECT run_id, node_id, status FROM circle.pipeline_node_runs"):
        nodes[run_id][node] = status
    taken: dict[int, dict[str, str]] = defaultdict(dict)
    for run_id, node, status in raw.execute(
        "SELECT run_id, node_id, status FROM circle.pipeline_node_runs WHERE taken_from IS NOT NULL"
    ):
        taken[run_id][node] = status
    dead: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for run_id, *edge in raw.execute(
        "SELECT n.run_id, n.node_id, s.node_id FROM circle.pipeline_node_runs n"
        " JOIN circle.pipeline_node_runs s ON s.run_id = n.run_id AND s.position = ANY (n.untaken)"
    ):
        dead[run_id].add((edge[0], edge[1]))
    replays: dict[int, Replay] = {}
    for run_id, node, event, data in raw.execute(
        "SELECT run_id, node_id, type, data FROM circle.pipeline_events ORDER BY xid, id"
    ):
        if run_id not in replays:
            graph = stored[run_id][1] if run_id in stored else (versions or {}).get(run_id, (0, 0))
            replays[run_id] = Replay(graphs.get(graph), foreign, dead[run_id], nodes=taken[run_id])
        if violated := replays[run_id].event(node, event, data):
            found.append(f"run {run_id}: {node or 'run'} {event} {violated}")
    for run_id, (status, graph) in stored.items():
        replay = replays.get(run_id) or Replay(graphs.get(graph), foreign, nodes=taken[run_id])
        found += [f"run {run_id}: {difference}" for difference in replay.differs(status, nodes[run_id])]
    return found


def _graphs(raw: psycopg.Connection) -> tuple[Graphs, list[str]]:
    """The graphs of all versions, and what the compiler made wrong of them: a cycle, another order, other edges."""
    compiled: dict[tuple[int, int], list[tuple[Any, ...]]] = defaultdict(list)
    for pipeline, version, *node in raw.execute(
        "SELECT pipeline_id, version, position, node_id, node_type, predecessors, successors, branches"
        " FROM circle.pipeline_version_nodes ORDER BY 1, 2, 3"
    ):
        compiled[pipeline, version].append(tuple(node))
    graphs: Graphs = {}
    found = []
    for pipeline, version, count, nodes, edges in raw.execute(
        "SELECT pipeline_id, version, node_count, nodes, edges FROM circle.pipeline_versions"
    ):
        before: dict[str, list[str]] = {node["id"]: [] for node in nodes}
        for edge in edges:
            if edge["from"] not in before[edge["to"]]:
                before[edge["to"]].append(edge["from"])
        graphs[pipeline, version] = before
        try:
            sorted_ids = list(TopologicalSorter(before).static_order())
        except CycleError as error:
            found.append(f"version {version} of pipeline {pipeline} has a cycle: {error.args[1]}")
            continue
        depth: dict[str, int] = {}
        for name in sorted_ids:
            depth[name] = max((depth[other] + 1 for other in before[name]), default=0)
        order = sorted(before, key=depth.__getitem__)  # stable: ties by place
        place = {name: at for at, name in enumerate(order)}
        types = {node["id"]: node["type"] for node in nodes}
        after: dict[str, list[int]] = {
            name: sorted(place[other] for other in order if name in before[other]) for name in order
        }
        wanted = [
            (
                at,
                name,
                types[name],
                sorted(place[other] for other in before[name]),
                after[name],
                labels(name, edges, place),
            )
            for at, name in enumerate(order)
        ]
        if wanted != compiled[pipeline, version] or count != len(order):
            found.append(f"version {version} of pipeline {pipeline} is compiled wrongly: {compiled[pipeline, version]}")
    return graphs, found


def labels(node: str, edges: list[dict[str, Any]], place: dict[str, int]) -> dict[str, list[int]] | None:
    """The positions to which the edges of each label alone lead."""
    ends = [(edge["to"], (edge.get("condition") or "").strip().lower()) for edge in edges if edge["from"] == node]
    always = {to for to, label in ends if not label}
    return {
        label: sorted({place[to] for to, other in ends if other == label and to not in always})
        for _, label in ends
        if label
    } or None


def repeated(items: Collection[Any]) -> list[Any]:
    """What occurs more than once."""
    seen: set[Any] = set()
    twice = []
    for item in items:
        if item in seen:
            twice.append(item)
        seen.add(item)
    return twice
