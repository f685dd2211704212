"""Random calls of several workers against a model of the state machine in Python: no difference in any step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from gathering_pipeline import RunRepository
from gathering_pipeline.database import Database
from gathering_pipeline.errors import PipelineError
from tests.support.runs import store
from tests.support.servers import connect

EXAMPLES = int(os.environ.get("GATHERING_EXAMPLES", "15"))
LEASE = timedelta(minutes=5)
RETRIES = 1
MAX_CLAIMS = 3
BRANCHES = "c>y=true c>n=false c>b y>j n>j d>n=true"
GRAPHS = ("a", "a>b", "a b", "a>b a>c b>d c>d", "a>b b>c a>c x", "t>l t>r l>m m>j r>j j>e", BRANCHES)
WORKERS = 3
OVER = ("completed", "failed", "skipped", "cancelled")
RUN_OVER = ("completed", "failed", "cancelled", "timeout")


Branch = bool | str | None
Result = tuple[str, str, Branch]
"""A node, its status and, where it is completed, its branch."""


class RefusedError(Exception):
    """The model's refusal: the class that the database's must have."""


@dataclass
class Node:
    status: str = "pending"
    retries: int = 0
    untaken: set[str] = field(default_factory=set)
    labels: dict[str, set[str]] = field(default_factory=dict)
    """The labels of the edges to each successor."""
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What 3.1 and 3.2 of the specification say of one run."""

    pipeline: int
    nodes: dict[str, Node]
    status: str = "pending"
    token: int = 0
    claims: int = 0
    lapsed: int = 0
    given_up: int | None = None
    """The token of the last release."""
    leased: bool = False
    lost: bool = False
    late: bool = False
    failed: bool = False

    def held(self, token: int | None) -> None:
        if (token != self.token) if token is not None else self.leased:
            raise RefusedError("LeaseLostError")

    def need(self, token: int | None, *statuses: str) -> None:
        self.held(token)
        if self.status not in statuses:
            self.refuse()

    def refuse(self) -> None:
        raise RefusedError("RunOverError" if self.status in RUN_OVER else "IllegalTransitionError")

    def repeats(self, name: str, status: str, branch: Branch, token: int | None) -> bool:
        """Whether a result that can't be applied repeats one that was."""
        node = self.nodes[name]
        if status == "skipped" or token is None:
            return status == node.status == "skipped"
        if status == node.status == "completed" and branch is not None:
            return self.outcome(name, branch) == node.untaken
        return node.status == status or (status == "failed" and node.status == "pending" and node.retries > 0)

    def outcome(self, name: str, branch: Branch) -> set[str]:
        """The successors that a node doesn't take."""
        if branch is None:
            return set()
        labels = self.nodes[name].labels
        known = set[str]().union(*labels.values()) - {""}
        label = str(branch).lower()
        if label not in known | {"true", "false"}:
            raise RefusedError("InvalidDataError")
        taken = {label, ""} if known or label == "true" else {label}
        return {to for to, of_edges in labels.items() if not of_edges & taken}

    def dead(self, source: str, target: str) -> bool:
        node = self.nodes[source]
        return node.status == "skipped" or (node.status == "completed" and target in node.untaken)

    def ready(self, name: str) -> bool:
        node = self.nodes[name]
        return (
            node.status == "pending"
            and all(self.nodes[other].status in ("completed", "skipped") for other in node.before)
            and (not node.before or not all(self.dead(other, name) for other in node.before))
        )

    def may_start(self, name: str) -> bool:
        return self.ready(name) and (not self.failed or self.nodes[name].retries > 0)

    def end(self, status: str) -> None:
        self.status, self.leased, self.lost = status, False, False
        for node in self.nodes.values():
            if node.status not in OVER:
                node.status = "cancelled"

    def end_if_over(self) -> bool:
        nodes = self.nodes.values()
        if any(node.status == "running" or (node.status == "pending" and node.retries) for node in nodes):
            return False
        if not self.failed and any(map(self.ready, self.nodes)):
            return False
        left = {node.status for node in self.nodes.values()}
        self.end("failed" if self.failed else "cancelled" if left & {"pending", "cancelled"} else "completed")
        return True

    def skip_on(self, names: list[str]) -> list[str]:
        """Skip those to which no edge is alive; returns what was looked at."""
        seen = list(names)
        while names:
            skipped = [
                name
                for name in names
                if self.nodes[name].status == "pending"
                and all(self.dead(other, name) for other in self.nodes[name].before)
            ]
            for name in skipped:
                self.nodes[name].status = "skipped"
            names = [follower for name in skipped for follower in self.nodes[name].after]
            seen += names
        return seen

    def record(self, results: list[Result], token: int | None) -> tuple[list[str], bool]:
        """Apply results; returns what may have become ready, and whether some results repeat earlier ones."""
        if any(name not in self.nodes for name, *_ in results):
            raise RefusedError("NodeRunNotFoundError")
        named = [name for name, *_ in results]
        if len(set(named)) < len(named):
            raise RefusedError("IllegalTransitionError")
        new = []
        for name, status, branch in results:
            live = self.nodes[name].status
            if self.status not in RUN_OVER and not (live in OVER or (live == "running" and status == "skipped")):
                new.append((name, status, branch))
            elif not self.repeats(name, status, branch, token):
                self.refuse()
        for name, status, branch in new:
            self.nodes[name].status = status
            self.nodes[name].untaken = self.outcome(name, branch)
            self.failed |= status == "failed"
        followers = [follower for name, *_ in new for follower in self.nodes[name].after]
        if any(status == "skipped" or self.nodes[name].untaken for name, status, _ in new):
            followers = self.skip_on(followers)
        return followers, len(new) < len(results)

    def node(self, name: str, token: int | None) -> Node:
        self.held(token)
        if name not in self.nodes:
            raise RefusedError("NodeRunNotFoundError")
        return self.nodes[name]


def reported(results: list[Result]) -> list[dict[str, Any]]:
    return [
        {"node_id": name, "status": status} | ({} if branch is None else {"branch": branch})
        for name, status, branch in results
    ]


def nothing(_: object) -> None:
    """What a call returns that is compared with the rest of the database after the step."""


PLACES = st.integers(0, 13)
"""A node by its place, beginning anew after the last; one place in two rounds is that of a node that is not there."""
OUTCOMES = st.sampled_from([None, None, True, False])
RESULTS = st.lists(
    st.tuples(PLACES, st.sampled_from(OVER), OUTCOMES).map(
        lambda result: result if result[1] == "completed" else (*result[:2], None)
    ),
    max_size=3,
).filter(
    # of two failures at once the first is reported; which one that is, is tested elsewhere
    lambda results: sum(status == "failed" for _, status, _ in results) < 2
)
TOKENS = st.sampled_from(["current", "current", "current", "older", "none", "newer"])


class Lifecycle(RuleBasedStateMachine):
    """The model and the database; ``workers`` are sessions on connections of their own."""

    url: str
    workers: list[RunRepository]
    pipelines: list[int]
    raw: psycopg.Connection

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, Run] = {}
        self.turn = 0

    @initialize(target=runs, places=st.tuples(*[st.integers(0, len(GRAPHS) - 1)] * 2))
    def begin(self, places: tuple[int, int]) -> MultipleResults[int]:
        self.raw.execute("DELETE FROM circle.pipeline_runs")
        self.raw.execute("DELETE FROM circle.pipeline_counters")
        self.raw.execute("UPDATE circle.pipelines SET run_count = 0, success_count = 0, error_count = 0")
        made = [self.create_run(at) for at in places]
        self.claim(1, sweeps=False)
        return multiple(*made)

    @property
    def worker(self) -> RunRepository:
        self.turn += 1
        return self.workers[self.turn % WORKERS]

    def both(self, mine: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """Make the same call on the model and on the database; both do it, or both refuse it for the same reason."""
        try:
            wanted: Any = ("done", mine())
        except RefusedError as error:
            wanted = ("refused", str(error))
        try:
            found: Any = ("done", theirs())
        except PipelineError as error:
            found = ("refused", type(error).__name__)
        assert found == wanted
        return found[1]

    def name(self, run: Run, place: int) -> str:
        names = [*run.nodes, *run.nodes, "nowhere"]
        return names[place % len(names)]

    def token(self, run: Run, kind: str) -> int | None:
        return {"current": run.token, "older": run.token - 1, "newer": run.token + 1, "none": None}[kind]

    # --- runs ---

    @rule(target=runs, at=st.integers(0, len(GRAPHS) - 1))
    def create(self, at: int) -> int:
        return self.create_run(at)

    def create_run(self, at: int) -> int:
        run_id = self.worker.create(self.pipelines[at]).id
        items = [item.partition("=")[::2] for item in GRAPHS[at].split()]
        nodes = {name: Node() for ends, _ in items for name in ends.split(">")}
        for ends, label in items:
            if ">" in ends:
                source, target = ends.split(">")
                nodes[source].after.append(target)
                nodes[source].labels.setdefault(target, set()).add(label)
                nodes[target].before.append(source)
        self.model[run_id] = Run(self.pipelines[at], nodes)
        return run_id

    @rule(run_id=runs, kind=TOKENS)
    def start(self, run_id: int, kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)

        def start() -> None:
            if token == run.token and run.status == "running":
                return
            run.need(token, "pending")
            run.status = "running"

        self.both(start, lambda: nothing(self.worker.start(run_id, token=token)))

    @rule(run_id=runs, kind=TOKENS)
    def complete(self, run_id: int, kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)

        def complete() -> str:
            if run.status == "completed" and token == run.token:
                return run.status
            run.need(token, "running")
            if any(node.status not in OVER or node.status == "failed" for node in run.nodes.values()):
                raise RefusedError("IllegalTransitionError")
            run.end("completed")
            return "completed"

        self.both(complete, lambda: self.worker.complete(run_id, token=token).status)

    @rule(run_id=runs, kind=TOKENS)
    def finish(self, run_id: int, kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)

        def finish() -> str:
            if run.status in ("completed", "failed", "cancelled") and token == run.token:
                return run.status
            run.need(token, "running")
            if not run.end_if_over():
                raise RefusedError("IllegalTransitionError")
            return run.status

        self.both(finish, lambda: self.worker.finish(run_id, token=token).status)

    @rule(run_id=runs, kind=TOKENS)
    def fail(self, run_id: int, kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)

        def fail() -> None:
            if run.status != "failed" or token != run.token:
                run.need(token, "pending", "running")
                run.end("failed")

        self.both(fail, lambda: nothing(self.worker.fail(run_id, "x", token=token)))

    @rule(run_id=runs)
    def cancel(self, run_id: int) -> None:
        run = self.model[run_id]

        def cancel() -> None:
            if run.status not in ("pending", "running"):
                run.refuse()
            run.end("cancelled")

        self.both(cancel, lambda: nothing(self.worker.cancel(run_id)))

    # --- nodes ---

    @rule(run_id=runs, place=PLACES, kind=TOKENS)
    def start_node(self, run_id: int, place: int, kind: str) -> None:
        run = self.model[run_id]
        name = self.name(run, place)
        token = self.token(run, kind)

        def start_node() -> None:
            node = run.node(name, token)
            if token is not None and node.status == "running":
                return
            if run.status != "running" or node.status != "pending":
                run.refuse()
            if not run.may_start(name):
                raise RefusedError("NodeNotReadyError")
            node.status = "running"

        self.both(start_node, lambda: nothing(self.worker.start_node(run_id, name, token=token)))

    @rule(run_id=runs, place=PLACES, kind=TOKENS, branch=st.one_of(OUTCOMES, st.just("maybe")))
    def complete_node(self, run_id: int, place: int, kind: str, branch: Branch) -> None:
        run = self.model[run_id]
        name = self.name(run, place)
        token = self.token(run, kind)

        def complete_node() -> None:
            node = run.node(name, token)
            if node.status == "completed" and run.repeats(name, "completed", branch, token):
                return
            if run.status != "running" or node.status in OVER:
                run.refuse()
            node.untaken = run.outcome(name, branch)
            node.status = "completed"
            if node.untaken:
                run.skip_on(node.after)

        self.both(complete_node, lambda: nothing(self.worker.complete_node(run_id, name, branch=branch, token=token)))

    @rule(run_id=runs, place=PLACES, kind=TOKENS)
    def skip_node(self, run_id: int, place: int, kind: str) -> None:
        run = self.model[run_id]
        name = self.name(run, place)
        token = self.token(run, kind)

        def skip_node() -> None:
            node = run.node(name, token)
            if node.status == "skipped":
                return
            if run.status != "running" or node.status != "pending":
                run.refuse()
            node.status = "skipped"
            run.skip_on(node.after)

        self.both(skip_node, lambda: nothing(self.worker.skip_node(run_id, name, token=token)))

    @rule(run_id=runs, place=PLACES, kind=TOKENS, retryable=st.booleans())
    def fail_node(self, run_id: int, place: int, kind: str, retryable: bool) -> None:
        run = self.model[run_id]
        name = self.name(run, place)
        token = self.token(run, kind)

        def fail_node() -> str:
            node = run.node(name, token)
            waits = node.status == "pending" and node.retries > 0
            if token is not None and (node.status == "failed" or (waits and (retryable or run.status != "running"))):
                return node.status
            if run.status != "running" or node.status in OVER:
                run.refuse()
            self._attempt_failed(run, node, retryable)
            return node.status

        self.both(fail_node, lambda: self.worker.fail_node(run_id, name, "x", retryable, token=token).status)

    def _attempt_failed(self, run: Run, node: Node, retryable: bool) -> None:
        if retryable and node.status == "running" and node.retries < RETRIES:
            node.status, node.retries = "pending", node.retries + 1
        else:
            node.status, run.failed = "failed", True

    @rule(run_id=runs, results=RESULTS, kind=TOKENS)
    def record(self, run_id: int, results: list[tuple[int, str, Branch]], kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)
        named = [(self.name(run, place), status, branch) for place, status, branch in results]

        def record() -> None:
            if run.status in RUN_OVER and token == run.token and named:
                run.record(named, token)
                return
            run.need(token, "pending", "running")
            run.record(named, token)
            run.status = "running"

        self.both(record, lambda: self.worker.record(run_id, reported(named), token=token))

    @rule(run_id=runs, results=RESULTS, kind=TOKENS)
    def advance(self, run_id: int, results: list[tuple[int, str, Branch]], kind: str) -> None:
        run = self.model[run_id]
        self._advance(run_id, [(self.name(run, place), status, branch) for place, status, branch in results], kind)

    @rule(run_id=runs, status=st.sampled_from(["completed", "completed", "completed", "failed"]), branch=OUTCOMES)
    def advance_properly(self, run_id: int, status: str, branch: Branch) -> None:
        """What an executor does: report a node that runs, else begin."""
        running = [name for name, node in self.model[run_id].nodes.items() if node.status == "running"]
        branch = branch if status == "completed" else None
        self._advance(run_id, [(name, status, branch) for name in running[:1]], "current")

    def _advance(self, run_id: int, results: list[Result], kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)

        def advance() -> list[str]:
            if run.status in RUN_OVER and token == run.token and results:
                run.record(results, token)
                return []
            run.need(token, "pending", "running")
            followers, repeated = run.record(results, token)
            run.status = "running"
            if not results or run.failed or repeated:
                followers = list(run.nodes)
            started = {name for name in followers if run.may_start(name)}
            for name in started:
                run.nodes[name].status = "running"
            if repeated:  # the answer to the first report may be lost
                started = {name for name, node in run.nodes.items() if node.status == "running"}
            if (
                not started
                and not run.end_if_over()
                and not any(node.status == "running" for node in run.nodes.values())
            ):
                started = {name for name in run.nodes if run.may_start(name)}
                for name in started:
                    run.nodes[name].status = "running"
            return sorted(started)

        self.both(
            advance,
            lambda: sorted(
                node.node_id for node in self.worker.advance(run_id, reported(results), token=token).started
            ),
        )

    # --- leases and sweeps ---

    @rule(limit=st.integers(1, 3), sweeps=st.booleans())
    def claim_some(self, limit: int, sweeps: bool) -> None:
        self.claim(limit, sweeps)

    def claim(self, limit: int, sweeps: bool) -> None:
        """Claim runs; whether the call sweeps is a matter of time, which is decided here."""
        self.raw.execute(
            "INSERT INTO circle.pipeline_sweep (next_at) VALUES (%(due)s)"
            " ON CONFLICT (id) DO UPDATE SET next_at = excluded.next_at",
            {"due": "-infinity" if sweeps else "infinity"},
        )

        def claim() -> list[int]:
            if sweeps:
                self._recover()
                self._expire()
            oldest = sorted(run_id for run_id, run in self.model.items() if run.status == "pending")[:limit]
            for run_id in oldest:
                run = self.model[run_id]
                run.status, run.leased, run.lost = "running", True, False
                run.claims += 1
            return oldest

        self.both(claim, lambda: [run.id for run in self.worker.claim("w", LEASE, limit, max_claims=MAX_CLAIMS)])
        self.read_tokens()

    def read_tokens(self) -> None:
        """Tokens follow the clock of the database: all that is certain is that they grow."""
        for run_id, token in self.raw.execute("SELECT id, claim_token FROM circle.pipeline_runs").fetchall():
            assert token >= self.model[run_id].token
            self.model[run_id].token = token

    @rule(run_id=runs, kind=TOKENS.filter(lambda kind: kind != "none"))
    def heartbeat(self, run_id: int, kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)
        assert token is not None

        def heartbeat() -> None:
            if not run.leased or token != run.token:
                raise RefusedError("LeaseLostError")
            run.lost = False

        self.both(heartbeat, lambda: nothing(self.worker.heartbeat(run_id, LEASE, token=token)))

    @rule(run_id=runs, kind=TOKENS.filter(lambda kind: kind != "none"))
    def release(self, run_id: int, kind: str) -> None:
        run = self.model[run_id]
        token = self.token(run, kind)
        assert token is not None

        def release() -> None:
            if token == run.given_up:
                return
            if not run.leased or token != run.token:
                raise RefusedError("LeaseLostError")
            for node in run.nodes.values():
                node.status = "pending" if node.status == "running" else node.status
            run.status, run.leased, run.lost = "pending", False, False
            run.given_up = token

        before, repeated = run.token, token == run.given_up
        refusal = self.both(release, lambda: nothing(self.worker.release(run_id, token=token)))
        self.read_tokens()
        assert (run.token > before) == (refusal is None and not repeated)

    @rule(run_id=runs)
    def lose_the_lease(self, run_id: int) -> None:
        if self.model[run_id].leased:
            self.model[run_id].lost = True
            self.raw.execute(
                "UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s' WHERE id = %s", [run_id]
            )

    def _recover(self) -> list[tuple[int, str]]:
        lost = [(run_id, run) for run_id, run in sorted(self.model.items()) if run.lost]
        for _, run in lost:
            for node in run.nodes.values():
                if node.status == "running":
                    self._attempt_failed(run, node, retryable=True)
            if run.end_if_over():
                continue
            if run.lapsed + 1 >= MAX_CLAIMS:
                run.end("failed")
            else:
                run.lapsed += 1
                run.status, run.leased, run.lost = "pending", False, False
        return [(run_id, run.status) for run_id, run in lost]

    @rule()
    def recover(self) -> None:
        before = {run_id: run.token for run_id, run in self.model.items() if run.lost}
        self.both(self._recover, lambda: [(run.id, run.status) for run in self.worker.recover(100, MAX_CLAIMS)])
        self.read_tokens()
        assert all(
            self.model[run_id].token > token
            for run_id, token in before.items()
            if self.model[run_id].status == "pending"
        )

    @rule(run_id=runs)
    def be_late(self, run_id: int) -> None:
        if self.model[run_id].status == "running":
            self.model[run_id].late = True
            self.raw.execute(
                "UPDATE circle.pipeline_runs SET started_at = now() - interval '2 h' WHERE id = %s", [run_id]
            )

    def _expire(self) -> list[int]:
        late = [run_id for run_id, run in sorted(self.model.items()) if run.late and run.status == "running"]
        for run_id in late:
            self.model[run_id].end("timeout")
        return late

    @rule()
    def expire(self) -> None:
        self.both(self._expire, lambda: [run.id for run in self.worker.expire()])

    # --- and after each step ---

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        found = self.raw.execute(
            "SELECT id, status, claim_token, claim_count, lapsed_claims, lease_expires_at IS NOT NULL"
            " FROM circle.pipeline_runs ORDER BY id"
        ).fetchall()
        assert found == [
            (run_id, run.status, run.token, run.claims, run.lapsed, run.leased)
            for run_id, run in sorted(self.model.items())
        ]
        nodes = self.raw.execute(
            "SELECT n.run_id, n.node_id, n.status, n.retry_count, ARRAY("
            "    SELECT s.node_id::text FROM circle.pipeline_node_runs s"
            "    WHERE s.run_id = n.run_id AND s.position = ANY (n.untaken) ORDER BY s.node_id)"
            " FROM circle.pipeline_node_runs n"
        ).fetchall()
        assert sorted(nodes) == sorted(
            (run_id, name, node.status, node.retries, sorted(node.untaken))
            for run_id, run in self.model.items()
            for name, node in run.nodes.items()
        )
        counters = self.raw.execute(
            "SELECT c.id, c.run_count, c.success_count, c.error_count FROM circle.pipelines p, circle.counted(p) c"
        ).fetchall()
        assert sorted(counters) == [
            (
                pipeline,
                *(
                    sum(run.pipeline == pipeline and run.status in statuses for run in self.model.values())
                    for statuses in (("pending", "running", *OVER, "timeout"), ("completed",), ("failed", "timeout"))
                ),
            )
            for pipeline in self.pipelines
        ]


@pytest.fixture
def machine(database: Database, database_url: str) -> Iterator[type[Lifecycle]]:
    with database.session(autocommit=True) as session:
        made = [store(session, spec, max_retries_per_node=RETRIES, retry_backoff_base=0) for spec in GRAPHS]
    with ExitStack() as stack:

        class Machine(Lifecycle):
            raw = stack.enter_context(connect(database_url))
            pipelines = made
            workers = [  # noqa: RUF012 - one machine, one set of workers
                RunRepository(stack.enter_context(database.session(autocommit=True))) for _ in range(WORKERS)
            ]

        yield Machine


def test_random_calls_behave_as_the_model(machine: type[Lifecycle]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
