"""All calls at once from many threads, then the same next to raw writers. Whatever is answered, the rows keep every rule.

A storm makes ``GATHERING_CALLS`` calls, 1,200 unless that is set; ``GATHERING_SEED`` chooses them, not their interleaving.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import inspect
import json
import os
import random
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import cache
from threading import Barrier, Event
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from gathering_pipeline import (
    ClaimedRun,
    EventRepository,
    PipelineRepository,
    PipelineUpdate,
    RunRead,
    RunReport,
    RunRepository,
    RunStatus,
    Step,
    errors,
)
from gathering_pipeline.database import Database
from gathering_pipeline.errors import InvalidPipelineError, PipelineError, TransactionConflictError
from gathering_pipeline.maintenance.rights import grants
from gathering_pipeline.settings import DatabaseSettings
from tests.support.databases import Connect
from tests.support.graphs import DIAMOND, chain, graph
from tests.support.invariants import faults, repeated
from tests.support.runs import store

CALLS = int(os.environ.get("GATHERING_CALLS", "1200"))
SEED = int(os.environ.get("GATHERING_SEED", "1"))
THREADS = 12
RAW_THREADS = 4
READERS = 2
"""Threads of the storm that read all events, too."""
LEASE = timedelta(minutes=5)

MANY_EDGES = " ".join(f"{a}{i}>{b}{j}" for a, b in ("ab", "bc") for i in range(4) for j in range(4)) + " c0>d c1>d c2>d"
PIPELINES: list[tuple[str, dict[str, Any]]] = [
    (chain(4), {}),
    (DIAMOND, {}),
    ("r>a r>b r>c r>d r>e", {"timeout_seconds": 60}),
    ("a>b b>c", {"max_retries_per_node": 2}),
    (MANY_EDGES, {"max_retries_per_node": 1}),
    ("c>y=true c>n=false c>b=maybe c>z y>j n>j b>d=true b>e=false j>d", {"max_retries_per_node": 1}),
]
DEADLOCK = "40P01"


@cache
def documented(call: Callable[..., Any]) -> tuple[type[PipelineError], ...]:
    """The errors of a call's docstring."""
    _, _, raises = (inspect.getdoc(call) or "").partition("Raises:\n")
    return tuple(getattr(errors, name) for name in re.findall(r"^    (\w+): ", raises, re.MULTILINE))


def sqlstate(error: BaseException | None) -> str:
    """That of the database's error behind one of the package."""
    while error is not None and not isinstance(error, psycopg.Error):
        error = getattr(error, "orig", None) or error.__cause__
    return (error and error.sqlstate) or ""


WEIGHTS: dict[float, str] = {
    26: "advance",
    8: "create claim advance_many",
    6: "read_pipeline activate complete_node",
    5: "start_node fail_node record read_run",
    4: "create_with_key finish read_events",
    3: "record_run heartbeat release start lose_lease update pause",
    2: "create_later create_unless_live skip_node complete cancel recover resume",
    1: "append_log grow_old fail expire sweep purge read_counts rerun",
    0.3: "delete resume_all cancel_all purge_versions",
}
"""The calls of a storm, by how often each is made."""


class Storm:
    """What the threads share: pipelines, the latest runs, tokens of claims, and nodes that are executed."""

    def __init__(self, database: Database, session: Session, *, foreign: bool) -> None:
        self.database = database
        self.foreign = foreign
        self.spec_of: dict[int, list[str]] = {}
        self.pipelines = [self.store(session, at) for at in range(len(PIPELINES))]
        self.runs: deque[int] = deque(maxlen=36)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.flying: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self.names: dict[int, list[str]] = {}

    def store(self, session: Session, at: int) -> int:
        spec, fields = PIPELINES[at]
        pipeline = store(session, spec, **{"retry_backoff_base": 0.0, **fields})
        self.spec_of[pipeline] = [node["id"] for node in graph(spec)[0]]
        return pipeline

    def some_node(self, run_id: int, chance: random.Random) -> tuple[str, int]:
        """A node of a run, with its attempt; rather one that somebody executes, rarely one that isn't there."""
        flying = self.flying.get(run_id, [])[-6:]
        if flying and chance.random() < 0.8:
            return chance.choice(flying)
        return ("nowhere" if chance.random() < 0.02 else chance.choice(self.names.get(run_id, ["x"]))), 1


class Caller:
    """One thread of a storm, and what the calls answered it."""

    def __init__(self, storm: Storm, number: int, session: Session) -> None:
        self.storm = storm
        self.number = number
        self.chance = random.Random(SEED * 1000 + number)
        self.session = session
        self.runs = RunRepository(session)
        self.pipelines = PipelineRepository(session)
        self.events = EventRepository(session)
        self.calls = 0
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.made: dict[int, tuple[int, int]] = {}
        self.claims: list[tuple[int, int]] = []
        self.completed: dict[tuple[int, str], Any] = {}
        self.completions: list[tuple[int, str]] = []
        self.started: list[tuple[int, str, int, int | None]] = []
        self.ends: dict[int, tuple[Any, ...]] = {}
        self.highest: dict[tuple[str, int], int] = {}
        self.cursor: str | None = None
        self.seen: list[str] = []
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        driver.add_notice_handler(self.notice)

    def notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        """A sweep passes by a run that it can't handle, with a warning: no run is such a run."""
        if diagnostic.severity_nonlocalized == "WARNING" and not self.storm.foreign:
            self.faults.append(f"warning: {diagnostic.message_primary}")

    def run(self, calls: int) -> None:
        weights = {name: weight for weight, names in WEIGHTS.items() for name in names.split()}
        for name in self.chance.choices([*weights], [*weights.values()], k=calls):
            try:
                getattr(self, name)()
            except Exception as error:  # noqa: BLE001 - any error that isn't the package's is a fault
                self.faults.append(f"{name}: {type(error).__name__}: {error}")
                self.session.rollback()

    def call(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What a call returned, or the error that its documentation allows; anything else is a fault."""
        self.calls += 1
        allowed = documented(call.__func__)  # type: ignore[attr-defined]
        try:
            if self.number % 2 and self.chance.random() < 0.3:
                # then transactions that are younger may change the run first
                self.session.execute(text("SELECT pg_current_xact_id()"))
            answer = call(*arguments, **named)
            self.commit()
        except PipelineError as error:
            self.session.rollback()
            self.outcomes[call.__name__, type(error).__name__] += 1
            conflict = isinstance(error, TransactionConflictError) and self.storm.foreign
            if sqlstate(error) == DEADLOCK and not self.storm.foreign:
                self.faults.append(f"{call.__name__}{arguments}: deadlock")
            elif isinstance(error, InvalidPipelineError) and not self.storm.foreign:
                self.faults.append(f"{call.__name__}{arguments}: every stored graph is valid: {error}")
            elif not conflict and not isinstance(error, allowed):
                self.faults.append(f"{call.__name__}{arguments}{named}: {type(error).__name__}: {error}")
            return error
        self.outcomes[call.__name__, "done"] += 1
        for run in answer if isinstance(answer, list) else [answer]:
            if isinstance(run, RunRead):
                self.note(run)
        return answer

    def commit(self) -> None:
        """Every other thread has a transaction for each call, and often keeps its locks for a while."""
        if self.number % 2 and self.chance.random() < 0.5:
            time.sleep(self.chance.random() * 0.004)
        self.session.commit()

    def note(self, run: RunRead) -> None:
        """What a thread sees of a run never goes back, and its end never changes."""
        if isinstance(run, ClaimedRun):
            self.grows("token of run", run.id, run.token)
        self.grows("claims of run", run.id, run.claim_count)
        if run.status.is_terminal:
            end = (run.status, run.completed_at, run.error_message)
            if self.ends.setdefault(run.id, end) != end:
                self.faults.append(f"run {run.id} ended twice: {self.ends[run.id]} and {end}")
        elif run.id in self.ends:
            self.faults.append(f"run {run.id} is {run.status} after its end")

    def grows(self, what: str, id: int, number: int) -> None:
        if number < self.highest.get((what, id), number):
            self.faults.append(f"{what} {id} was {self.highest[what, id]} and is {number}")
        self.highest[what, id] = number

    # --- choices ---

    def pipeline(self) -> int:
        return self.chance.choice(self.storm.pipelines)

    def a_run(self) -> int:
        runs = list(self.storm.runs)[self.chance.choice([-6, 0]) :]
        return self.chance.choice(runs) if runs and self.chance.random() > 0.01 else 10**9

    def token(self, run_id: int) -> int | None:
        tokens = self.storm.tokens.get(run_id, [])
        kind = self.chance.random()
        if not tokens or kind < 0.05:
            return None if kind < 0.9 else self.chance.choice([0, 1, 2**53])
        return tokens[-1] if kind < 0.85 else self.chance.choice([tokens[0], tokens[-1] + 1, tokens[-1] - 1])

    def node(self, run_id: int) -> tuple[str, int]:
        return self.storm.some_node(run_id, self.chance)

    def output(self) -> dict[str, int]:
        """One that no other report has: so a second report of a node is no repeat."""
        return {"by": self.number, "call": self.calls}

    def results(self, run_id: int) -> list[dict[str, Any]]:
        chosen = {self.node(run_id) for _ in range(self.chance.choice([1, 1, 1, 2, 3]))}
        results = []
        for node_id, attempt in dict(sorted(chosen)).items():
            status = self.chance.choices(["completed", "failed", "skipped"], [16, 3, 1])[0]
            result: dict[str, Any] = {"node_id": node_id, "status": status}
            if status == "completed":
                result["output"] = self.output()
                if self.chance.random() < 0.3:
                    result["branch"] = self.chance.choice([True, False])
            elif status == "failed":
                result |= {"error": f"by {self.number}", "retryable": self.chance.random() < 0.7}
            if status != "skipped" and self.chance.random() < 0.5:
                result["attempt"] = attempt
            results.append(result)
        return results

    # --- acknowledged ---

    def acknowledge(self, run_id: int, results: list[dict[str, Any]], step: Step | None, token: int | None) -> None:
        for result in results:
            if result["status"] == "completed":
                self.completions.append((run_id, result["node_id"]))
                self.completed[run_id, result["node_id"]] = result["output"]
        if step is None:
            return
        self.storm.flying[run_id] += [(node.node_id, node.attempt) for node in step.started]
        if all(
            result["status"] == "completed" for result in results
        ):  # a failure that is reported twice may be a repeat
            self.started += [(run_id, node.node_id, node.attempt, token) for node in step.started]

    def created(self, run: object) -> None:
        if isinstance(run, RunRead):
            assert run.pipeline_version is not None
            if run.id not in self.made:
                self.storm.names[run.id] = self.storm.spec_of[run.pipeline_id]
                self.storm.runs.append(run.id)
            self.made[run.id] = run.pipeline_id, run.pipeline_version

    # --- calls ---

    def create(self) -> None:
        self.created(
            self.call(self.runs.create, self.pipeline(), {"n": self.calls}, priority=self.chance.randint(-1, 2))
        )

    def create_with_key(self) -> None:
        key = f"key {self.chance.randint(1, 20)}"
        self.created(self.call(self.runs.create, self.pipeline(), idempotency_key=key))

    def create_later(self) -> None:
        run_at = datetime.now(UTC) + timedelta(milliseconds=self.chance.choice([-100, 50, 200, 10**8]))
        self.created(self.call(self.runs.create, self.pipeline(), run_at=run_at))

    def create_unless_live(self) -> None:
        tags = self.chance.choice([None, {"by": str(self.number)}])
        self.created(self.call(self.runs.create, self.pipeline(), unless_live=True, tags=tags))

    def resume(self) -> None:
        self.created(self.call(self.runs.resume, self.a_run()))

    def resume_all(self) -> None:
        changed = self.call(self.runs.resume_all, self.chance.choice([None, self.pipeline()]), limit=5)
        if not isinstance(changed, PipelineError):
            for run in changed.runs:
                self.created(run)

    def rerun(self) -> None:
        key = self.chance.choice([None, None, f"again {self.chance.randint(1, 9)}"])
        self.created(self.call(self.runs.rerun, self.a_run(), idempotency_key=key))

    def record_run(self) -> None:
        at = self.chance.randrange(len(PIPELINES))
        nodes, _ = graph(PIPELINES[at][0])
        results = [{"node_id": node["id"], "status": "completed", "output": self.output()} for node in nodes]
        results = results[: self.chance.choice([len(results), len(results), 1])]
        key = self.chance.choice([None, f"recorded {self.chance.randint(1, 9)}"])
        self.created(self.call(self.runs.record_run, self.storm.pipelines[at], results, idempotency_key=key))

    def claim(self) -> None:
        pipelines = self.chance.choice([None, [self.pipeline(), self.pipeline()]])
        claimed = self.call(self.runs.claim, f"worker {self.number}", LEASE, self.chance.choice([1, 1, 3]), pipelines)
        for run in claimed if isinstance(claimed, list) else []:
            self.claims.append((run.id, run.token))
            self.storm.tokens[run.id].append(run.token)
            self.storm.runs.append(run.id)

    def heartbeat(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.heartbeat, run_id, LEASE, token=self.token(run_id) or 1)

    def release(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.release, run_id, token=self.token(run_id) or 1)

    def start(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.start, run_id, token=self.token(run_id))

    def append_log(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.append_log, run_id, {"by": self.number}, token=self.token(run_id))

    def lose_lease(self) -> None:
        self.alter("lease_expires_at = clock_timestamp() - interval '1 s'", "lease_expires_at IS NOT NULL")

    def grow_old(self) -> None:
        self.alter("started_at = started_at - interval '1 d'", "completed_at IS NULL")

    def alter(self, change: str, condition: str) -> None:
        statement = f"UPDATE circle.pipeline_runs SET {change} WHERE id = :id AND {condition}"
        try:
            self.session.execute(text(statement), {"id": self.a_run()})
            self.commit()
        except OperationalError as error:
            self.session.rollback()
            if not (self.storm.foreign and sqlstate(error) == DEADLOCK):  # a raw statement as those of RawWriter
                raise

    def start_node(self) -> None:
        run_id = self.a_run()
        node, _ = self.node(run_id)
        token = self.token(run_id)
        state = self.call(self.runs.start_node, run_id, node, token=token)
        if not isinstance(state, PipelineError):
            self.storm.flying[run_id].append((node, state.attempt))

    def complete_node(self) -> None:
        run_id = self.a_run()
        node, attempt = self.node(run_id)
        token, output = self.token(run_id), self.output()
        branch = self.chance.choice([None, None, True, False, "maybe"])
        named = {"attempt": self.chance.choice([None, attempt]), "branch": branch, "token": token}
        state = self.call(self.runs.complete_node, run_id, node, output, **named)
        if not isinstance(state, PipelineError):
            self.acknowledge(run_id, [{"node_id": node, "status": "completed", "output": output}], None, token)

    def skip_node(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.skip_node, run_id, self.node(run_id)[0], token=self.token(run_id))

    def fail_node(self) -> None:
        run_id = self.a_run()
        node, attempt = self.node(run_id)
        named = {"attempt": self.chance.choice([None, attempt]), "token": self.token(run_id)}
        state = self.call(self.runs.fail_node, run_id, node, "x", self.chance.random() < 0.7, **named)
        if not isinstance(state, PipelineError) and state.status not in ("pending", "running", "failed"):
            self.faults.append(f"fail_node({run_id}, {node}) made it {state.status}")

    def advance(self) -> None:
        run_id = self.a_run()
        token = self.token(run_id)
        results = self.results(run_id) if self.chance.random() < 0.7 else []
        named = {"token": token, "retry": self.chance.random() < 0.2, "inputs": self.chance.random() < 0.2}
        step = self.call(self.runs.advance, run_id, results, **named)
        if isinstance(step, Step):
            self.acknowledge(run_id, results, step, token)
            if token is not None and self.chance.random() < 0.2:  # its answer was lost
                again = self.call(self.runs.advance, run_id, results, **named)
                if isinstance(again, Step):
                    self.storm.flying[run_id] += [(node.node_id, node.attempt) for node in again.started]

    def advance_many(self) -> None:
        run_ids = sorted({self.a_run() for _ in range(6)}, key=lambda _: self.chance.random())
        reports = []
        for run_id in run_ids:
            results = self.results(run_id) if self.chance.random() < 0.8 else []
            reports.append(RunReport(run_id, results, self.token(run_id)))
        steps = self.call(self.runs.advance_many, reports)
        if not isinstance(steps, PipelineError):
            for report, step in zip(reports, steps, strict=True):
                if step is not None:
                    results = [dict(result) for result in report.results]
                    self.acknowledge(report.run_id, results, step, report.token)

    def record(self) -> None:
        run_id = self.a_run()
        token, results = self.token(run_id), self.results(run_id)
        if self.call(self.runs.record, run_id, results, token=token, retry=self.chance.random() < 0.2) is None:
            self.acknowledge(run_id, results, None, token)

    def finish(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.finish, run_id, token=self.token(run_id))

    def complete(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.complete, run_id, token=self.token(run_id))

    def fail(self) -> None:
        run_id = self.a_run()
        self.call(self.runs.fail, run_id, "given up", token=self.token(run_id))

    def cancel(self) -> None:
        self.call(self.runs.cancel, self.a_run(), "enough")

    def cancel_all(self) -> None:
        self.call(self.runs.cancel_all, self.pipeline(), limit=3, reason="enough", tags={"by": str(self.number)})

    def sweep(self) -> None:
        self.call(self.runs.sweep)

    def recover(self) -> None:
        self.call(self.runs.recover, self.chance.choice([1, 60]), self.chance.choice([3, 10]))

    def expire(self) -> None:
        self.call(self.runs.expire, self.chance.choice([1, 60]))

    def purge(self) -> None:
        self.call(self.runs.purge, timedelta(0), self.chance.choice([1, 10]))

    def read_run(self) -> None:
        run_id = self.a_run()
        reads: list[Callable[..., Any]] = [
            *(self.runs.get, self.runs.get, self.runs.nodes, self.runs.ready_nodes),
            *(self.runs.definition, self.runs.outputs, self.runs.explain, self.runs.logs),
        ]
        self.call(self.chance.choice(reads), run_id)

    def read_pipeline(self) -> None:
        found = self.call(self.pipelines.get, self.pipeline())
        if not isinstance(found, PipelineError):
            for what in ("revision", "version", "run_count", "success_count", "error_count"):
                self.grows(what, found.id, getattr(found, what))

    def read_counts(self) -> None:
        counts = self.call(self.runs.counts)
        if not isinstance(counts, PipelineError) and min(counts.values()) < 0:
            self.faults.append(f"negative counts: {counts}")
        statistics = self.call(self.runs.statistics, self.pipeline())
        if not isinstance(statistics, PipelineError) and min(statistics.runs.values()) < 0:
            self.faults.append(f"negative statistics: {statistics}")
        self.call(self.runs.search, self.pipeline(), self.chance.choice([None, RunStatus.RUNNING]), None, 5)

    def read_events(self) -> None:
        if self.number >= READERS:
            self.call(self.events.read, None, 5, self.a_run())
            return
        page = self.call(self.events.read, self.cursor, 100)
        self.cursor = page.next_cursor
        self.seen += [event.cursor for event in page.items]

    def update(self) -> None:
        at = self.chance.randrange(len(PIPELINES))
        pipeline = self.storm.pipelines[at]
        spec = PIPELINES[at][0] + self.chance.choice(["", " x", " x>y", " x x>y y>z"])
        nodes, edges = graph(spec)
        changes = self.chance.choice(
            [
                PipelineUpdate(name=f"by {self.number}"),
                PipelineUpdate(nodes=nodes, edges=edges),
                PipelineUpdate(nodes=nodes, edges=edges, max_retries_per_node=self.chance.randint(0, 3)),
            ]
        )
        revision = self.highest.get(("revision", pipeline), 1)
        expected = self.chance.choice([None, revision, revision, max(1, revision - 1)])
        updated = self.call(self.pipelines.update, pipeline, changes, expected)
        if not isinstance(updated, PipelineError):
            if expected not in (None, updated.revision - 1, updated.revision):
                self.faults.append(f"pipeline {pipeline} was expected at {expected}, and is at {updated.revision} now")
            for what in ("revision", "version", "run_count", "success_count", "error_count"):
                self.grows(what, updated.id, getattr(updated, what))

    def pause(self) -> None:
        self.call(self.pipelines.pause, self.pipeline())

    def activate(self) -> None:
        for pipeline in self.chance.sample(self.storm.pipelines, 2):
            self.call(self.pipelines.activate, pipeline)

    def purge_versions(self) -> None:
        self.call(self.pipelines.purge_versions, timedelta(0), self.chance.choice([1, 10]))

    def delete(self) -> None:
        at = self.chance.randrange(len(PIPELINES))
        if self.call(self.pipelines.delete, self.storm.pipelines[at], self.chance.random() < 0.7) is None:
            self.storm.pipelines[at] = self.storm.store(self.session, at)
            self.session.commit()


# --- raw writers -------------------------------------------------------------------------------------------------------

STATUSES = ["pending", "running", "completed", "failed", "skipped", "cancelled", "timeout"]
EDGES_OF_BIGINT = [2**63 - 1, 2**63 - 2, 2**53, 2**31, 1, 0, -1, -(2**63)]
RAW_STATEMENTS = [
    # statuses, legal or not
    *["UPDATE circle.pipeline_runs SET status = %(status)s WHERE id = %(run)s"] * 4,
    *["UPDATE circle.pipeline_node_runs SET status = %(status)s WHERE run_id = %(run)s AND node_id = %(node)s"] * 6,
    *[
        "UPDATE circle.pipeline_node_runs SET status = 'running', started_at = now() WHERE run_id = %(run)s AND node_id = %(node)s"
    ]
    * 2,
    "UPDATE circle.pipeline_node_runs SET status = %(status)s WHERE run_id = %(run)s",
    "UPDATE circle.pipeline_node_runs SET status = %(status)s WHERE run_id IN (%(run)s, %(other)s) AND status = 'pending'",
    "UPDATE circle.pipeline_node_runs SET status = %(status)s, completed_at = now(), retry_count = retry_count + 1 WHERE run_id = %(run)s AND status = 'running'",
    "UPDATE circle.pipeline_runs SET status = %(status)s WHERE id IN (%(run)s, %(other)s)",
    "UPDATE circle.pipeline_runs SET status = %(status)s, completed_at = %(time)s, error_message = 'raw' WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET status = 'completed', completed_at = now(), duration_seconds = 1 WHERE id = %(run)s",
    # new rows
    *["INSERT INTO circle.pipeline_runs (pipeline_id, status, started_at) VALUES (%(pipeline)s, %(status)s, now())"]
    * 2,
    "INSERT INTO circle.pipeline_runs (pipeline_id, claim_token, idempotency_key) VALUES (%(pipeline)s, %(edge)s, 'raw')",
    "INSERT INTO circle.pipeline_runs (pipeline_id, pipeline_version) SELECT %(pipeline)s, 99 FROM generate_series(1, 3)",
    *[
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%(run)s, %(node)s, 'action', %(status)s)"
    ]
    * 3,
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status) VALUES (%(run)s, 'raw', 'action', %(status)s), (%(other)s, 'raw', 'action', %(status)s) ON CONFLICT DO NOTHING",
    # deletes
    "DELETE FROM circle.pipeline_node_runs WHERE run_id = %(run)s AND node_id = %(node)s",
    "DELETE FROM circle.pipeline_node_runs WHERE run_id = %(run)s",
    "DELETE FROM circle.pipeline_runs WHERE id = %(run)s",
    "TRUNCATE circle.pipeline_node_runs",
    # identity
    "UPDATE circle.pipeline_runs SET id = id + 1000000 WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET pipeline_id = %(pipeline)s WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET pipeline_version = NULL WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET pipeline_version = pipeline_version + 1 WHERE id = %(run)s",
    "UPDATE circle.pipeline_node_runs SET run_id = %(other)s WHERE run_id = %(run)s AND node_id = %(node)s",
    "UPDATE circle.pipeline_node_runs SET node_id = 'z', position = 77, predecessors = '{5}' WHERE run_id = %(run)s AND node_id = %(node)s",
    "UPDATE circle.pipeline_node_runs SET position = NULL, successors = NULL WHERE run_id = %(run)s AND node_id = %(node)s",
    # where a run was resumed from
    "INSERT INTO circle.pipeline_runs (pipeline_id, resumed_from) VALUES (%(pipeline)s, %(run)s)",
    "UPDATE circle.pipeline_runs SET resumed_from = %(other)s WHERE id = %(run)s",
    "UPDATE circle.pipeline_node_runs SET taken_from = id WHERE run_id = %(run)s",
    "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, status, taken_from) VALUES (%(run)s, 'raw', 'action', 'completed', 1)",
    # what isn't taken
    *[
        "UPDATE circle.pipeline_node_runs SET status = %(status)s, untaken = successors[:1] WHERE run_id = %(run)s AND node_id = %(node)s"
    ]
    * 3,
    "UPDATE circle.pipeline_node_runs SET status = 'completed', untaken = '{0,1}' WHERE run_id = %(run)s AND node_id = %(node)s",
    "UPDATE circle.pipeline_node_runs SET untaken = successors WHERE run_id = %(run)s",
    "UPDATE circle.pipeline_node_runs SET untaken = NULL WHERE run_id = %(run)s",
    # tokens, leases, ends
    *["UPDATE circle.pipeline_runs SET claim_token = %(edge)s WHERE id = %(run)s"] * 2,
    "UPDATE circle.pipeline_runs SET claim_token = claim_token + 1 WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET lease_expires_at = %(time)s WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET worker_id = NULL WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET completed_at = %(time)s WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET completed_at = NULL, status = 'running' WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET failed_node = %(node)s WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET error_message = 'raw' WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET waits_until = %(time)s, run_at = %(time)s WHERE id = %(run)s",
    "UPDATE circle.pipeline_runs SET logs = logs || '[1]' WHERE id = %(run)s",
    # pipelines and versions
    "UPDATE circle.pipelines SET nodes = %(nodes)s, edges = %(edges)s WHERE id = %(pipeline)s",
    "UPDATE circle.pipelines SET nodes = '[]' WHERE id = %(pipeline)s",
    "UPDATE circle.pipelines SET version = version + 5 WHERE id = %(pipeline)s",
    "UPDATE circle.pipelines SET revision = %(edge)s WHERE id = %(pipeline)s",
    "UPDATE circle.pipelines SET run_count = run_count + 1, last_run = now() WHERE id = %(pipeline)s",
    "UPDATE circle.pipelines SET status = CASE status WHEN 'active' THEN 'paused' ELSE 'active' END WHERE id = %(pipeline)s",
    "UPDATE circle.pipeline_versions SET nodes = '[]', node_count = 0 WHERE pipeline_id = %(pipeline)s",
    "UPDATE circle.pipeline_versions SET version = version + 1 WHERE pipeline_id = %(pipeline)s",
    "INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges, node_count, compiled) VALUES (%(pipeline)s, 99, '[]', '[]', 0, '{}')",
    "DELETE FROM circle.pipeline_versions v USING circle.pipelines p WHERE p.id = v.pipeline_id AND p.version = v.version AND p.id = %(pipeline)s",
    "TRUNCATE circle.pipeline_versions",
    "UPDATE circle.pipeline_events SET type = 'pipeline_run.completed' WHERE run_id = %(run)s",
]
OF_SERVICE_ONLY = [
    # the owner of the tables can do these; a service can't
    "INSERT INTO circle.pipeline_events (xid, run_id, type) VALUES ('1', %(run)s, 'pipeline_run.completed')",
    "DELETE FROM circle.pipeline_events WHERE run_id = %(run)s",
    "UPDATE circle.pipeline_counters SET running = 0 WHERE pipeline_id = %(pipeline)s",
    "DELETE FROM circle.pipeline_versions WHERE pipeline_id = %(pipeline)s",
]
CYCLE = (
    [{"id": name, "type": "action", "name": name} for name in "ab"],
    [{"id": f"{a}{b}", "from": a, "to": b} for a, b in ("ab", "ba")],
)
REFUSED = re.compile("PL0..|23...|40P01|55P03|42501|22003|22023")
"""What raw statements may get: refusals of the guards, constraints, deadlocks, missing rights, numbers out of range."""


class RawWriter:
    """One thread that sends raw statements, each by itself or two in a transaction."""

    def __init__(self, storm: Storm, number: int, connection: psycopg.Connection, *, owner: bool) -> None:
        self.storm = storm
        self.chance = random.Random(SEED * 2000 + number)
        self.connection = connection
        self.owner = owner
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    def parameters(self) -> dict[str, Any]:
        runs = list(self.storm.runs) or [1]
        run = self.chance.choice(runs)
        nodes, edges = self.chance.choice([CYCLE, graph("a>b"), graph(PIPELINES[1][0] + " x")])
        return {
            "run": run,
            "other": self.chance.choice(runs),
            "node": self.storm.some_node(run, self.chance)[0],
            "status": self.chance.choice(STATUSES),
            "edge": self.chance.choice(EDGES_OF_BIGINT),
            "time": self.chance.choice(["now", "infinity", "-infinity", "1999-01-01", None]),
            "pipeline": self.chance.choice(self.storm.pipelines),
            "nodes": Jsonb(nodes),
            "edges": Jsonb(edges),
        }

    def run(self, stop: Event) -> None:
        statements = RAW_STATEMENTS + ([] if self.owner else OF_SERVICE_ONLY)
        while not stop.is_set():
            chosen = self.chance.choices(statements, k=self.chance.choice([1, 1, 2]))
            chosen = [one for one in chosen if not one.startswith("TRUNCATE") or self.chance.random() < 0.2]
            try:
                with self.connection.transaction():
                    for statement in chosen:
                        self.connection.execute(statement, self.parameters())
                    if self.chance.random() < 0.1:
                        self.outcomes["rolled back"] += 1
                        raise psycopg.Rollback
                self.outcomes["done"] += 1
            except psycopg.Error as error:
                self.outcomes[error.sqlstate or "none"] += 1
                if not REFUSED.fullmatch(error.sqlstate or ""):
                    self.faults.append(f"{chosen}: {error.sqlstate} {error}")


# --- the storms --------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(database_url: str, connect: Connect) -> Iterator[Database]:
    # a deadlock is found at once, not after a second
    raw = connect(database_url)
    raw.execute(f"ALTER DATABASE {raw.info.dbname} SET deadlock_timeout = '20ms'")
    with Database(database_url, settings=DatabaseSettings(pool_size=THREADS + 5)) as made:
        yield made


def rage(storm: Storm, database: Database, writers: list[RawWriter]) -> list[Caller]:
    """Make all calls from all threads, next to the raw writers."""
    barrier, stop = Barrier(THREADS), Event()

    def call(number: int) -> Caller:
        with database.session(autocommit=number % 2 == 0) as session:
            caller = Caller(storm, number, session)
            barrier.wait(timeout=60)
            caller.run(CALLS // THREADS)
            return caller

    with ThreadPoolExecutor(THREADS + len(writers)) as threads:
        raw = [threads.submit(writer.run, stop) for writer in writers]
        try:
            callers = [one.result() for one in [threads.submit(call, number) for number in range(THREADS)]]
        finally:
            stop.set()
        for one in raw:
            one.result()
    return callers


def report(callers: list[Caller], writers: list[RawWriter]) -> None:
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for caller in callers:
        for (call, outcome), times in caller.outcomes.items():
            outcomes[call][outcome] += times
    print(f"\n{sum(caller.calls for caller in callers)} calls, GATHERING_SEED={SEED}")
    for call, of_call in sorted(outcomes.items()):
        print(f"  {call}: {json.dumps(dict(of_call.most_common()))}")
    if writers:
        print("raw:", dict(sum((writer.outcomes for writer in writers), Counter[str]()).most_common()))


def merged(callers: list[Caller], what: str) -> dict[Any, Any]:
    return {key: value for caller in callers for key, value in getattr(caller, what).items()}


def answered(callers: list[Caller], raw: psycopg.Connection) -> list[str]:
    """What the threads were told that contradicts what others were told, or what is stored."""
    found = [fault for caller in callers for fault in caller.faults]
    for what in ("claims", "completions", "started"):
        found += [
            f"{what} twice: {one}" for one in repeated([one for caller in callers for one in getattr(caller, what)])
        ]
    ends: dict[int, tuple[Any, ...]] = {}
    for caller in callers:
        for run_id, end in caller.ends.items():
            if ends.setdefault(run_id, end) != end:
                found.append(f"run {run_id} ended twice: {ends[run_id]} and {end}")
    stored = {
        run_id: (status, completed_at, error)
        for run_id, status, completed_at, error in raw.execute(
            "SELECT id, status, completed_at, error_message FROM circle.pipeline_runs"
        )
    }
    found += [
        f"run {run_id} ended {end}, and is stored {stored[run_id]}"
        for run_id, end in ends.items()
        if stored.get(run_id, end) != end
    ]
    outputs = {
        (run_id, node): (status, output)
        for run_id, node, status, output in raw.execute(
            "SELECT run_id, node_id, status, output_data FROM circle.pipeline_node_runs"
        )
    }
    events = Counter(
        raw.execute(
            "SELECT run_id, node_id FROM circle.pipeline_events WHERE type = 'pipeline_node.completed'"
        ).fetchall()
    )
    for one, output in merged(callers, "completed").items():
        if outputs.get(one, ("completed", output)) != ("completed", output):
            found.append(f"{one} was completed with {output}, and is stored {outputs[one]}")
        if events[one] != 1:
            found.append(f"{one} was completed, and has {events[one]} such events")
    return found


def counted(made: dict[int, tuple[int, int]], raw: psycopg.Connection) -> list[str]:
    """How the counters differ from the runs that were made and from their ends, whether or not they were purged."""
    wanted: dict[int, Counter[str]] = defaultdict(Counter)
    for pipeline, _ in made.values():
        wanted[pipeline]["run_count"] += 1
    for run_id, event in raw.execute("SELECT run_id, type FROM circle.pipeline_events WHERE node_id IS NULL"):
        if run_id not in made:
            return [f"run {run_id} was made, and nobody was told"]
        end = {"completed": "success_count", "failed": "error_count", "timeout": "error_count"}
        wanted[made[run_id][0]][end.get(event.partition(".")[2], "others")] += 1
    counters = raw.execute(
        "SELECT p.id, c.run_count, c.success_count, c.error_count FROM circle.pipelines p, circle.counted(p) c"
    ).fetchall()
    return [
        f"pipeline {pipeline} counts {counts}, of {wanted[pipeline]}"
        for pipeline, *counts in counters
        if counts != [wanted[pipeline][name] for name in ("run_count", "success_count", "error_count")]
    ]


def followed(callers: list[Caller], session: Session) -> list[str]:
    """How what the readers of events got differs from the log."""
    found = []
    log = [row[0] for row in session.execute(text("SELECT id FROM circle.pipeline_events ORDER BY xid, id"))]
    for caller in callers[:READERS]:
        caller.session, caller.events = session, EventRepository(session)
        before = -1
        while before < len(caller.seen):
            before = len(caller.seen)
            caller.read_events()
        seen = [int(cursor.split("-")[3]) for cursor in caller.seen]
        if seen != log:
            found.append(f"a reader got {len(seen)} events of {len(log)}, {len(set(log) - set(seen))} were missed")
    return found


def end_all(session: Session, pipelines: list[int]) -> list[str]:
    """Bring every run that was left to its end: by a worker, which first gets those of workers that died."""
    for pipeline in pipelines:
        PipelineRepository(session).activate(pipeline)
    runs = RunRepository(session)
    session.execute(
        text("UPDATE circle.pipeline_runs SET waits_until = NULL, run_at = NULL WHERE waits_until IS NOT NULL")
    )
    session.execute(
        text(
            "UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s' WHERE lease_expires_at IS NOT NULL"
        )
    )
    while runs.recover(max_claims=1000):
        pass
    claimed = {run.id: run.token for run in runs.claim("last", LEASE, 100_000)}
    left = session.execute(text("SELECT id FROM circle.pipeline_runs WHERE status IN ('pending', 'running')")).scalars()
    return [f"run {run_id} never ends" for run_id in left.all() if not ends(runs, run_id, claimed.get(run_id))]


def ends(runs: RunRepository, run_id: int, token: int | None) -> bool:
    """Whether a run ends if all its nodes are started and completed."""
    for _ in range(100):
        step = runs.advance(run_id, token=token)
        running = [*step.started, *step.running]
        if running:
            step = runs.advance(run_id, [{"node_id": n.node_id, "status": "completed"} for n in running], token=token)
        if step.status.is_terminal:
            return True
    return False


def test_storm_of_all_calls_keeps_every_rule(database: Database, raw: psycopg.Connection) -> None:
    with database.session(autocommit=True) as session:
        storm = Storm(database, session, foreign=False)
    callers = rage(storm, database, [])
    report(callers, [])
    made: dict[int, tuple[int, int]] = merged(callers, "made")
    found = faults(raw, foreign=False, versions=made) + answered(callers, raw) + counted(made, raw)
    with database.session(autocommit=True) as session:
        found += followed(callers, session) + end_all(session, storm.pipelines)
    found += faults(raw, foreign=False, versions=made) + counted(made, raw)
    assert found == [], "\n".join([f"{len(found)} faults", *found[:40]])


def test_storm_next_to_raw_writers_stores_nothing_invalid(
    database: Database, raw: psycopg.Connection, admin: psycopg.Connection, connect: Connect, database_url: str
) -> None:
    role = f"{raw.info.dbname}_service"
    admin.execute(f"CREATE ROLE {role}")
    for statement in grants(role):
        raw.execute(statement)
    with database.session(autocommit=True) as session:
        storm = Storm(database, session, foreign=True)
    writers = [RawWriter(storm, number, connect(database_url), owner=number % 2 == 0) for number in range(RAW_THREADS)]
    try:
        for writer in writers[1::2]:
            writer.connection.execute(f"SET ROLE {role}")
        callers = rage(storm, database, writers)
    finally:
        for writer in writers:
            writer.connection.close()
        raw.execute(f"DROP OWNED BY {role}")
        admin.execute(f"DROP ROLE {role}")
    report(callers, writers)
    found = [fault for caller in callers for fault in caller.faults]
    found += [fault for writer in writers for fault in writer.faults] + faults(raw, foreign=True)
    assert found == [], "\n".join([f"{len(found)} faults", *found[:40]])
