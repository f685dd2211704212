"""Why a run or a node is stuck: sentences from the facts that ``circle.explain_run`` reads.

Nothing here reads a database.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from .errors import shorten
from .lifecycle import HistoryKind, NodeStatus, PipelineStatus, RunStatus
from .texts import duration_text

# --- what is returned ------------------------------------------------------------------------------------------------


Found = tuple["ReasonCode", str]


class ReasonCode(StrEnum):
    """Stable names of the situations of a run and of its nodes.

    Attributes:
        CLAIMABLE: Pending. Any worker may claim it, after the runs before it in its pipeline's queue.
        SCHEDULED: Pending. It isn't claimed before ``run_at``.
        WAITS_FOR_RETRY: Live. Nothing is left to do before the retry of a node is due.
        PAUSED: Pending. Its pipeline is paused.
        DRAFT: Pending. Its pipeline is a draft.
        FULL: Pending. ``max_running`` runs of its pipeline are running.
        NO_VERSION: Pending. It has no version of a graph, so it is never claimed.
        NO_NODES: Pending. It was inserted by SQL and gets its node runs when it is claimed or started.
        NO_WORKER: Pending. It can be claimed, and no worker claims runs of its pipeline.
        RECOVERED: Pending. The lease of the worker that held it ended.
        RELEASED: Pending. The worker that held it gave it up.
        NEAR_MAX_CLAIMS: Live. Its lease ended so often that it fails soon.
        LEASED: Running. A worker holds it.
        LEASE_PAST: Running. The lease of its worker has ended, and no sweep has released it yet.
        NO_LEASE: Running. It was started without a claim.
        NOTHING_STARTED: Running. Its worker has started no node since the claim, though some are ready.
        NODES_READY: Running. Nodes are ready, and nothing starts them.
        NOT_ENDED: Running. Nothing is left to do but to end it.
        DRAINING: Running. A node failed: running nodes continue, and nothing else starts.
        PAST_TIMEOUT: Running. It is past its timeout, and no sweep has ended it yet.
        TIMES_OUT: Running. When it times out.
        WITHOUT_NODES: Running. It has no node runs: a writer that stores none started it.
        FAILED_BY_NODE: Failed. A node failed.
        FAILED_BY_CALL: Failed. A call failed it, such as ``fail``.
        FAILED_BY_MAX_CLAIMS: Failed. Its lease ended ``max_claims`` times.
        CANCELLED: Cancelled.
        TIMED_OUT: It ended by its timeout.
        COMPLETED: Completed.
        RESUMED_AS: Terminal. Another run resumes it.
        NODE_RUNNING: An attempt is running.
        NODE_READY: Nothing blocks it.
        NODE_WAITS_FOR_RETRY: Its retry is due later.
        NODE_WAITS_FOR_PREDECESSORS: Predecessors have not ended.
        NODE_WAITS_FOR_RUN: Its run is not running.
        NODE_DRAINED: It doesn't start, because another node failed.
        NODE_DEAD: No edge to it is alive: it is to be skipped.
        NODE_FAILED: It failed for good.
        NODE_SKIPPED_BY_BRANCH: A predecessor completed with an outcome that doesn't take it.
        NODE_SKIPPED_BY_CASCADE: All its predecessors are skipped.
        NODE_SKIPPED_BY_REPORT: It was reported as skipped.
        NODE_TAKEN_OVER: Its result is that of the run that its run resumes.
    """

    CLAIMABLE = "claimable"
    SCHEDULED = "scheduled"
    WAITS_FOR_RETRY = "waits_for_retry"
    PAUSED = "paused"
    DRAFT = "draft"
    FULL = "full"
    NO_VERSION = "no_version"
    NO_NODES = "no_nodes"
    NO_WORKER = "no_worker"
    RECOVERED = "recovered"
    RELEASED = "released"
    NEAR_MAX_CLAIMS = "near_max_claims"
    LEASED = "leased"
    LEASE_PAST = "lease_past"
    NO_LEASE = "no_lease"
    NOTHING_STARTED = "nothing_started"
    NODES_READY = "nodes_ready"
    NOT_ENDED = "not_ended"
    DRAINING = "draining"
    PAST_TIMEOUT = "past_timeout"
    TIMES_OUT = "times_out"
    WITHOUT_NODES = "without_nodes"
    FAILED_BY_NODE = "failed_by_node"
    FAILED_BY_CALL = "failed_by_call"
    FAILED_BY_MAX_CLAIMS = "failed_by_max_claims"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    COMPLETED = "completed"
    RESUMED_AS = "resumed_as"
    NODE_RUNNING = "node_running"
    NODE_READY = "node_ready"
    NODE_WAITS_FOR_RETRY = "node_waits_for_retry"
    NODE_WAITS_FOR_PREDECESSORS = "node_waits_for_predecessors"
    NODE_WAITS_FOR_RUN = "node_waits_for_run"
    NODE_DRAINED = "node_drained"
    NODE_DEAD = "node_dead"
    NODE_FAILED = "node_failed"
    NODE_SKIPPED_BY_BRANCH = "node_skipped_by_branch"
    NODE_SKIPPED_BY_CASCADE = "node_skipped_by_cascade"
    NODE_SKIPPED_BY_REPORT = "node_skipped_by_report"
    NODE_TAKEN_OVER = "node_taken_over"


class _Frozen(BaseModel):
    # a later revision of the schema may tell more
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class Reason(_Frozen):
    """Why a run is stuck, or how it ended."""

    code: ReasonCode = Field(description="The situation.")
    text: str = Field(description="A sentence with the numbers that matter; times are the database's, in UTC.")


class NodeExplanation(_Frozen):
    """What a node waits for, or how it ended."""

    node_id: str = Field(description="The node.")
    status: NodeStatus = Field(description="Its status.")
    code: ReasonCode = Field(description="The situation.")
    text: str = Field(description="A sentence, as of a `Reason`.")
    error: str | None = Field(
        default=None, description="The error of its last attempt, in one line, if that failed; else null."
    )


class HistoryEntry(_Frozen):
    """Who took or gave up a run, or cancelled it."""

    at: datetime = Field(description="When.")
    kind: HistoryKind = Field(description="What happened.")
    worker_id: str | None = Field(
        description="The worker that claimed, released or lost it; of a cancellation the role of the session."
    )
    reason: str | None = Field(description="Why; null: no reason was given.")


class Explanation(_Frozen):
    """Why a run is stuck, as ``RunRepository.explain`` found it; ``str()`` is for people."""

    run_id: int = Field(description="The run.")
    status: RunStatus = Field(description="Its status.")
    reasons: tuple[Reason, ...] = Field(description="What it waits for, what to do, and how it got there.")
    nodes: tuple[NodeExplanation, ...] = Field(
        description="Its nodes that are live, failed, skipped or taken over, in execution order, at most 100."
    )
    more_nodes: int = Field(description="How many such nodes are left out.")
    history: tuple[HistoryEntry, ...] = Field(
        description="The last 20 claims, releases, recoveries and cancellations, oldest first."
    )

    def __str__(self) -> str:
        """A paragraph about the run, and a line for each of the first nodes that have something to tell."""
        lines = [" ".join([f"Run {self.run_id} is {self.status}.", *(reason.text for reason in self.reasons)])]
        nodes = [node for node in self.nodes if node.error or node.code is not ReasonCode.NODE_WAITS_FOR_RUN]
        if nodes:
            lines += [node.text for node in nodes[:_SHOWN]]
            hides_some = len(nodes) < len(self.nodes)
            if rest := len(nodes[_SHOWN:]) + (0 if hides_some else self.more_nodes):
                lines.append(f"And {_count(rest, 'more node')}.")
        return "\n".join(lines)


# --- the facts -------------------------------------------------------------------------------------------------------


class _Run(_Frozen):
    id: int
    status: RunStatus
    pipeline_version: int | None
    error_message: str | None
    failed_node: str | None
    worker_id: str | None
    lapsed_claims: int
    lease_expires_at: datetime | None
    run_at: datetime | None
    waits_until: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    created_at: datetime | None
    resumed_as: int | None


class _Pipeline(_Frozen):
    id: int
    status: PipelineStatus
    status_changed_at: datetime | None
    timeout_seconds: int | None
    max_retries_per_node: int
    max_running: int


class _Queue(_Frozen):
    ahead: int
    running: int
    running_ids: tuple[int, ...]
    claimed_at: datetime | None
    claimed_by: str | None


class _Node(_Frozen):
    node_id: str
    status: NodeStatus
    attempt: int
    started_at: datetime | None
    completed_at: datetime | None
    available_at: datetime | None
    error: str | None
    blocked_by: str | None
    taken_from: int | None
    waiting_for: tuple[str, ...]
    waiting: int
    skipped_by: str | None
    untaken_by: str | None


class _Nodes(_Frozen):
    number: int
    listable: int
    filled: bool
    moved_at: datetime | None
    running: int
    running_since: datetime | None
    ready: int
    retrying: int
    retry_at: datetime | None
    listed: tuple[_Node, ...] | None


class _Entry(HistoryEntry):
    is_current: bool | None


class Facts(_Frozen):
    """What ``circle.explain_run`` returns."""

    now: datetime
    run: _Run
    pipeline: _Pipeline
    queue: _Queue
    nodes: _Nodes
    history: tuple[_Entry, ...] | None

    def at(self, time: datetime | None) -> str:
        """A time, and how far it is from now."""
        if time is None:
            return "an unknown time"
        distance = time - self.now
        near = f"in {_span(distance)}" if distance > timedelta(0) else f"{_span(-distance)} ago"
        return f"{time:%Y-%m-%d %H:%M:%S} UTC ({near})"

    def list_nodes(self, number: int, *states: tuple[NodeStatus, str | None]) -> str:
        """Name the nodes in these states, of which there are ``number``: status, and what blocks them."""
        names = [node.node_id for node in self.nodes.listed or () if (node.status, node.blocked_by) in states]
        what = "node" if number == 1 else "nodes"
        return f"{what} {_join(names, number)}" if names else f"{number:,} {what}"

    @property
    def is_leased(self) -> bool:
        """Whether a worker holds the run."""
        return self.run.lease_expires_at is not None and self.run.lease_expires_at > self.now

    @property
    def last(self) -> _Entry | None:
        """The last entry of the history."""
        return self.history[-1] if self.history else None

    @property
    def claim(self) -> _Entry | None:
        """The claim that the run has now, or had when it ended."""
        return next(
            (entry for entry in self.history or () if entry.kind is HistoryKind.CLAIMED and entry.is_current), None
        )


# --- the sentences ---------------------------------------------------------------------------------------------------

_SHOWN = 10
"""Most names of a sentence, and nodes of a text."""
_MOST_AHEAD = 1_000
"""The facts count no more runs."""
_QUIET = timedelta(minutes=1)
"""A pipeline of which no run was claimed for so long has no worker."""
_NEAR = 2
"""A run that fails when its lease ends so often again is close to ``max_claims``."""

_RESUMABLE = (RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.TIMEOUT)
_RUNNING = (NodeStatus.RUNNING, None)
_READY = (NodeStatus.PENDING, None)
_RETRY = (NodeStatus.PENDING, "retry")


def explain(facts: Facts, max_claims: int) -> Explanation:
    """Say why a run is stuck, or how it ended.

    Args:
        facts: The run as it was read.
        max_claims: As the workers give it to ``claim``.
    """
    run, listed = facts.run, facts.nodes.listed or ()
    say = {RunStatus.PENDING: _pending, RunStatus.RUNNING: _running}.get(run.status, _terminal)
    found = list(say(facts))
    if run.status in _RESUMABLE and run.resumed_as is None:
        code, text = found.pop()
        found.append((code, f"{text} {_how_to_go_on(facts)}"))
    if not run.status.is_terminal and 0 < run.lapsed_claims >= max_claims - _NEAR:
        text = f"Its lease ran out {run.lapsed_claims} times: it fails when that has happened {max_claims} times."
        found.append((ReasonCode.NEAR_MAX_CLAIMS, text))
    if run.resumed_as is not None:
        found.append((ReasonCode.RESUMED_AS, f"It was resumed as run {run.resumed_as}."))
    nodes = ((node, *_node(facts, node)) for node in listed)
    return Explanation(
        run_id=run.id,
        status=run.status,
        reasons=tuple(Reason(code=code, text=text) for code, text in found),
        nodes=tuple(
            NodeExplanation(
                node_id=node.node_id,
                status=node.status,
                code=code,
                text=text,
                error=_in_one_line(node.error) or None if _has_failed(node) else None,
            )
            for node, code, text in nodes
        ),
        more_nodes=facts.nodes.listable - len(listed),
        history=tuple(
            HistoryEntry(at=entry.at, kind=entry.kind, worker_id=entry.worker_id, reason=entry.reason)
            for entry in facts.history or ()
        ),
    )


def _pending(facts: Facts) -> Iterator[Found]:
    run, last = facts.run, facts.last
    held = list(_held(facts))
    yield from held or _claimable(facts)
    if run.pipeline_version is not None and not facts.nodes.filled and run.waits_until is None:
        text = "It was inserted without node runs: it gets them when it is claimed, started or advanced."
        yield ReasonCode.NO_NODES, text
    if last is not None and last.kind is HistoryKind.RECOVERED:
        text = f"It was recovered from worker {last.worker_id} at {facts.at(last.at)}{_because(last.reason)}"
        yield ReasonCode.RECOVERED, text
    elif last is not None and last.kind is HistoryKind.RELEASED:
        yield ReasonCode.RELEASED, f"Worker {last.worker_id} released it at {facts.at(last.at)}{_because(last.reason)}"


def _held(facts: Facts) -> Iterator[Found]:
    """What keeps workers from claiming a pending run."""
    run, pipeline, queue = facts.run, facts.pipeline, facts.queue
    if run.pipeline_version is None:
        text = "It is bound to no version of its pipeline's graph and is never claimed: cancel it and create it again."
        yield ReasonCode.NO_VERSION, text
    if pipeline.status is not PipelineStatus.ACTIVE:
        code = ReasonCode.DRAFT if pipeline.status is PipelineStatus.DRAFT else ReasonCode.PAUSED
        state = "is paused" if code is ReasonCode.PAUSED else "is a draft"
        if (changed := pipeline.status_changed_at) is not None:
            state = f"{'was paused' if code is ReasonCode.PAUSED else 'became a draft'} at {facts.at(changed)}"
        yield code, f"Pipeline {pipeline.id} {state}: activate({pipeline.id}) lets workers claim its runs."
    if run.waits_until is not None and run.waits_until > facts.now:
        yield _waiting(facts, run.waits_until)
    if 0 < pipeline.max_running <= queue.running:
        ids = _join([str(run_id) for run_id in queue.running_ids], queue.running)
        text = (
            f"{_count(queue.running, 'run')} of pipeline {pipeline.id} {_are(queue.running)} running, and max_running "
            f"is {pipeline.max_running}: it is claimed once one of these has ended: {ids}."
        )
        yield ReasonCode.FULL, text


def _waiting(facts: Facts, until: datetime) -> Found:
    if until == facts.run.run_at:
        return ReasonCode.SCHEDULED, f"It isn't claimed before its run_at, {facts.at(until)}."
    if facts.nodes.retrying:
        nodes = facts.list_nodes(facts.nodes.retrying, _RETRY)
        return ReasonCode.WAITS_FOR_RETRY, f"It waits until {facts.at(until)} for the retry of {nodes}."
    if not facts.nodes.filled:
        text = (
            f"A claim could not create its node runs, see the server's log: the next one tries after {facts.at(until)}."
        )
        return ReasonCode.NO_NODES, text
    return ReasonCode.SCHEDULED, f"It isn't claimed before its waits_until, {facts.at(until)}."


def _claimable(facts: Facts) -> Iterator[Found]:
    run, pipeline, queue, last = facts.run, facts.pipeline, facts.queue, facts.last
    if queue.ahead:
        number = f"{'at least ' if queue.ahead >= _MOST_AHEAD else ''}{_count(queue.ahead, 'run')}"
        before = f"{number} of pipeline {pipeline.id} {_are(queue.ahead)} claimed before it"
    else:
        before = f"it is the first in the queue of pipeline {pipeline.id}"
    yield ReasonCode.CLAIMABLE, f"Workers can claim it: {before}."
    if queue.claimed_at is None:
        text = f"No worker has claimed any of the last runs of pipeline {pipeline.id}: check that one is running."
        yield ReasonCode.NO_WORKER, text
        return
    times = (queue.claimed_at, run.created_at, run.run_at, pipeline.status_changed_at, last and last.at)
    if max(time for time in times if time) < facts.now - _QUIET:
        text = (
            f"No worker has claimed a run of pipeline {pipeline.id} since {queue.claimed_by} did so at "
            f"{facts.at(queue.claimed_at)}: check that workers are running and have free slots."
        )
        yield ReasonCode.NO_WORKER, text


def _running(facts: Facts) -> Iterator[Found]:
    run, nodes = facts.run, facts.nodes
    yield _lease(facts)
    live = nodes.running + nodes.retrying + nodes.ready
    if not nodes.number:
        remedy = "only that writer ends it" if run.pipeline_version is None else "advance() gives it its nodes"
        text = f"It has no node runs, because a writer that stores none started it: {remedy}, or cancel() ends it."
        yield ReasonCode.WITHOUT_NODES, text
    elif not live:
        yield ReasonCode.NOT_ENDED, "Nothing is left to execute: advance() or finish() ends it."
    elif run.failed_node is not None:
        others = facts.list_nodes(live, _RUNNING, _RETRY, _READY)
        text = f"Node {run.failed_node} failed: nothing else starts, and the run fails after {others}."
        yield ReasonCode.DRAINING, text
    if nodes.ready:
        yield _ready(facts)
    elif nodes.retrying and not nodes.running:
        text = f"It waits until {facts.at(nodes.retry_at)} for the retry of {facts.list_nodes(nodes.retrying, _RETRY)}."
        yield ReasonCode.WAITS_FOR_RETRY, text
    if run.started_at is not None and (seconds := facts.pipeline.timeout_seconds):
        end = run.started_at + timedelta(seconds=seconds)
        if end > facts.now:
            yield ReasonCode.TIMES_OUT, f"It times out at {facts.at(end)}, {seconds} s after its start."
        else:
            text = f"Its timeout of {seconds} s ended at {facts.at(end)}: the next claim or sweep() ends the run."
            yield ReasonCode.PAST_TIMEOUT, text


def _lease(facts: Facts) -> Found:
    run, nodes = facts.run, facts.nodes
    if run.lease_expires_at is None:
        text = (
            f"No worker holds it: it was started at {facts.at(run.started_at)} without a claim, so no sweep "
            "recovers it: its executor has to advance it, or cancel() ends it."
        )
        return ReasonCode.NO_LEASE, text
    if not facts.is_leased:
        end = facts.at(run.lease_expires_at)
        text = f"The lease of worker {run.worker_id} ended at {end}: the next claim or sweep() releases the run."
        return ReasonCode.LEASE_PAST, text
    known = [f"its lease ends at {facts.at(run.lease_expires_at)}"]
    if facts.claim is not None:
        known.insert(0, f"it claimed it at {facts.at(facts.claim.at)}")
    if nodes.running:
        run_since = f"{'has' if nodes.running == 1 else 'have'} run since {facts.at(nodes.running_since)}"
        known.append(f"{facts.list_nodes(nodes.running, _RUNNING)} {run_since}")
    return ReasonCode.LEASED, f"Worker {run.worker_id} holds it: {', '.join(known)}."


def _ready(facts: Facts) -> Found:
    moved, number = facts.nodes.moved_at, facts.nodes.ready
    ready = f"{facts.list_nodes(number, _READY)} {_are(number)} ready"
    if facts.is_leased and facts.claim is not None and (moved is None or moved < facts.claim.at):
        return ReasonCode.NOTHING_STARTED, f"Its worker has started no node since the claim: {ready}."
    return ReasonCode.NODES_READY, f"Nothing starts what can start: {ready}, and advance() starts them."


def _terminal(facts: Facts) -> Iterator[Found]:
    run, last = facts.run, facts.last
    end = facts.at(run.completed_at)
    if run.completed_at is not None and run.started_at is not None:
        end += f", {duration_text(run.completed_at - run.started_at)} after its start"
    why = _because(run.error_message)
    if run.status is RunStatus.COMPLETED:
        yield ReasonCode.COMPLETED, f"It completed at {end}."
    elif run.status is RunStatus.TIMEOUT:
        yield ReasonCode.TIMED_OUT, f"It timed out at {end}{why}"
    elif run.status is RunStatus.CANCELLED:
        is_call = last is not None and last.kind is HistoryKind.CANCELLED
        who = f"Role {last.worker_id} cancelled it" if last is not None and is_call else "It was cancelled"
        yield ReasonCode.CANCELLED, f"{who} at {end}{why}"
    elif run.failed_node is not None:
        yield ReasonCode.FAILED_BY_NODE, f"It failed with node {run.failed_node} at {end}{why}"
    elif last is not None and last.kind is HistoryKind.RECOVERED and last.is_current:
        yield ReasonCode.FAILED_BY_MAX_CLAIMS, f"It failed at {end}, when worker {last.worker_id} had lost it{why}"
    else:
        held = "" if run.worker_id is None else f" while worker {run.worker_id} held it"
        yield ReasonCode.FAILED_BY_CALL, f"A call failed it{held} at {end}{why}"


def _node(facts: Facts, node: _Node) -> Found:
    name = f"Node {node.node_id}"
    attempt = f"attempt {node.attempt} of {max(facts.pipeline.max_retries_per_node + 1, node.attempt)}"
    if node.taken_from is not None:
        return ReasonCode.NODE_TAKEN_OVER, f"{name} has its result from run {node.taken_from}."
    if node.status is NodeStatus.SKIPPED:
        return _skipped(name, node)
    if node.status is NodeStatus.PENDING:
        return _blocked(facts, node, name, attempt)
    if node.status is NodeStatus.FAILED:
        text = f"{name} failed at {facts.at(node.completed_at)}, {attempt}{_because(node.error)}"
        return ReasonCode.NODE_FAILED, text
    worker = "" if facts.run.worker_id is None else f" by worker {facts.run.worker_id}"
    return ReasonCode.NODE_RUNNING, f"{name} has run since {facts.at(node.started_at)}, {attempt}{worker}."


def _skipped(name: str, node: _Node) -> Found:
    if node.skipped_by == "branch":
        text = f"{name} is skipped, because node {node.untaken_by} completed with an outcome that doesn't take it."
        return ReasonCode.NODE_SKIPPED_BY_BRANCH, text
    if node.skipped_by == "cascade":
        return ReasonCode.NODE_SKIPPED_BY_CASCADE, f"{name} is skipped, because all its predecessors are."
    return ReasonCode.NODE_SKIPPED_BY_REPORT, f"{name} was reported as skipped."


def _blocked(facts: Facts, node: _Node, name: str, attempt: str) -> Found:
    match node.blocked_by:
        case "retry":
            code = ReasonCode.NODE_WAITS_FOR_RETRY
            text = f"{name} starts again at {facts.at(node.available_at)}, {attempt}{_after_failure(node)}"
        case "predecessors":
            code = ReasonCode.NODE_WAITS_FOR_PREDECESSORS
            text = f"{name} waits for {_join(node.waiting_for, node.waiting)}."
        case "failure":
            code = ReasonCode.NODE_DRAINED
            text = f"{name} doesn't start, because node {facts.run.failed_node} failed."
        case "skipped":
            code = ReasonCode.NODE_DEAD
            text = f"{name} can't start, because no edge to it is alive: skip_node() skips it."
        case "run":
            code = ReasonCode.NODE_WAITS_FOR_RUN
            text = f"{name} waits until its run is running{_after_failure(node)}"
        case _:
            code = ReasonCode.NODE_READY
            text = f"{name} can start, {attempt}{_after_failure(node)}"
    return code, text


def _how_to_go_on(facts: Facts) -> str:
    """The calls that start a run again which failed, was cancelled or timed out."""
    calls = "rerun() starts anew with the current graph."
    if facts.run.pipeline_version is not None:
        calls = "resume() continues it with its own graph, rerun() starts anew with the current one."
    return calls if facts.pipeline.status is PipelineStatus.ACTIVE else f"Once its pipeline is active, {calls}"


def _has_failed(node: _Node) -> bool:
    """Whether its last attempt did."""
    return node.status is NodeStatus.FAILED or (node.status is NodeStatus.PENDING and node.attempt > 1)


def _after_failure(node: _Node) -> str:
    """The end of a sentence about a node that waits: the attempt before, if it failed."""
    return f"; attempt {node.attempt - 1} failed{_because(node.error)}" if node.attempt > 1 else "."


# --- words -----------------------------------------------------------------------------------------------------------


def _span(duration: timedelta) -> str:
    """A duration in the largest unit of which there are two."""
    seconds = duration.total_seconds()
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{int(seconds // size):,} {unit}"
    return f"{seconds:.1f} s"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _join(names: Sequence[str], number: int) -> str:
    """The first names of a number of things."""
    shown = ", ".join(names[:_SHOWN])
    return shown if number <= len(names[:_SHOWN]) else f"{shown} and {number - len(names[:_SHOWN]):,} more"


def _in_one_line(reason: str | None) -> str:
    return shorten(" ".join((reason or "").split()), 200)


def _because(reason: str | None) -> str:
    """The end of a sentence: the reason that was given, in one line."""
    line = _in_one_line(reason)
    if not line:
        return "."
    return f": {line}" if line[-1] in ".!?" else f": {line}."
