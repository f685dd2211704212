"""Races between connections. What must hold always is tried ``GATHERING_ROUNDS`` times, 40 unless that is set."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from threading import Barrier, Event
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from gathering_pipeline import (
    ClaimedRun,
    NodeStatus,
    PipelineRepository,
    PipelineStatus,
    PipelineUpdate,
    RunRead,
    RunRepository,
    RunStatus,
)
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    IllegalTransitionError,
    LeaseLostError,
    PipelineError,
    PipelineNotFoundError,
    RunNotFoundError,
    RunOverError,
)
from gathering_pipeline.settings import DatabaseSettings
from tests.support.graphs import chain, graph
from tests.support.runs import done, store

ROUNDS = int(os.environ.get("GATHERING_ROUNDS", "25"))
LEASE = timedelta(minutes=5)
THREADS = 16

Call = Callable[[Session], Any]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with Database(database_url, settings=DatabaseSettings(pool_size=THREADS + 10)) as made:
        yield made


class Racers:
    """Connections of their own, one a thread, that begin their calls at the same moment."""

    def __init__(self, sessions: list[Session], threads: ThreadPoolExecutor) -> None:
        self._sessions = sessions
        self._threads = threads

    def __call__(self, *calls: Call) -> list[Any]:
        """What each call returned, or the ``PipelineError`` that it raised; anything else is raised here."""
        barrier = Barrier(len(calls))

        def run(session: Session, call: Call) -> Any:
            barrier.wait(timeout=30)
            try:
                return call(session)
            except PipelineError as error:
                session.rollback()
                return error

        futures = [
            self._threads.submit(run, session, call) for session, call in zip(self._sessions, calls, strict=False)
        ]
        return [future.result(timeout=60) for future in futures]


@pytest.fixture
def race(database: Database) -> Iterator[Racers]:
    with ExitStack() as stack:
        sessions = [stack.enter_context(database.session(autocommit=True)) for _ in range(THREADS)]
        yield Racers(sessions, stack.enter_context(ThreadPoolExecutor(THREADS)))


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    with database.session(autocommit=True) as opened:
        yield opened


@pytest.fixture
def runs(session: Session) -> RunRepository:
    return RunRepository(session)


def on(call: Callable[..., Any], *arguments: object) -> Call:
    """A call of the repository on the racer's own connection."""
    return lambda session: call(RunRepository(session), *arguments)


def delete(session: Session, pipeline_id: int) -> None:
    PipelineRepository(session).delete(pipeline_id, force=True)


def names(nodes: Any) -> list[str]:
    return [node.node_id for node in nodes]


def check_counters(raw: psycopg.Connection) -> None:
    """Nothing was purged, so the counters equal a recount."""
    wrong = raw.execute(
        """SELECT p.id, p.run_count, p.success_count, p.error_count, c.* FROM circle.pipelines t, circle.counted(t) p
           CROSS JOIN LATERAL (SELECT count(*) AS runs, count(*) FILTER (WHERE status = 'completed') AS good,
                                      count(*) FILTER (WHERE status IN ('failed', 'timeout')) AS bad
                               FROM circle.pipeline_runs WHERE pipeline_id = p.id) c
           WHERE (p.run_count, p.success_count, p.error_count) <> (c.runs, c.good, c.bad)"""
    ).fetchall()
    assert wrong == []


# --- two ends of one run -----------------------------------------------------------------------------------------------


def test_join_of_concurrent_nodes_starts_once(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a>j b>j")
    for _ in range(ROUNDS):
        run_id = runs.create(pipeline).id
        assert names(runs.advance(run_id).started) == ["a", "b"]
        started = race(
            on(lambda runs, run_id: names(runs.advance(run_id, [done("a")]).started), run_id),
            on(lambda runs, run_id: names(runs.advance(run_id, [done("b")]).started), run_id),
        )
        assert sorted(started) == [[], ["j"]]
        assert runs.advance(run_id, [done("j")]).started == ()
        assert runs.get(run_id).status == RunStatus.COMPLETED
    check_counters(raw)


IN_ONE_STATEMENT = """
WITH done AS (
    UPDATE circle.pipeline_node_runs SET status = 'completed'
    WHERE run_id = :run_id AND node_id = :node_id AND status = 'running' RETURNING run_id, position, successors
)
UPDATE circle.pipeline_node_runs n SET status = 'running' FROM done d
WHERE n.run_id = d.run_id AND n.position = ANY (d.successors) AND n.status = 'pending'
  AND NOT EXISTS (SELECT FROM circle.pipeline_node_runs p WHERE p.run_id = n.run_id AND p.position = ANY (n.predecessors)
                  AND p.position <> d.position AND p.status <> 'completed')
RETURNING n.node_id"""


def test_join_in_one_statement_would_be_lost(runs: RunRepository, session: Session, race: Racers) -> None:
    """The race above can fail: with data-modifying CTEs each writer sees the other's node as it was before."""
    pipeline = store(session, "a>j b>j")

    def complete(session: Session, run_id: int, node_id: str) -> list[str]:
        return list(session.execute(text(IN_ONE_STATEMENT), {"run_id": run_id, "node_id": node_id}).scalars())

    lost = 0
    for _ in range(max(ROUNDS, 100)):
        run_id = runs.create(pipeline).id
        runs.advance(run_id)
        started = race(
            partial(complete, run_id=run_id, node_id="a"),
            partial(complete, run_id=run_id, node_id="b"),
        )
        assert sorted(started) in ([[], []], [[], ["j"]])
        lost += sorted(started) == [[], []]
    assert lost > 0


def test_concurrent_last_nodes_end_the_run_once(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a b")
    for at in range(ROUNDS):
        run_id = runs.create(pipeline).id
        runs.advance(run_id)
        last = "failed" if at % 2 else "completed"
        ends = race(
            on(lambda runs, run_id: runs.advance(run_id, [done("a")]).status, run_id),
            on(lambda runs, run_id, status: runs.advance(run_id, [done("b", status)]).status, run_id, last),
        )
        assert sorted(ends) == sorted(["running", last])
        assert runs.get(run_id).status == last
    check_counters(raw)


def test_concurrent_finish_succeeds_once(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a b")

    def end(session: Session, run_id: int, node_id: str) -> RunRead:
        RunRepository(session).complete_node(run_id, node_id)
        return RunRepository(session).finish(run_id)

    for _ in range(ROUNDS):
        run_id = runs.create(pipeline).id
        runs.advance(run_id)
        ends = race(
            partial(end, run_id=run_id, node_id="a"),
            partial(end, run_id=run_id, node_id="b"),
        )
        # the loser found a node running, or the run over
        assert [type(outcome) for outcome in ends].count(RunRead) == 1
        assert sum(isinstance(outcome, IllegalTransitionError) for outcome in ends) == 1
    check_counters(raw)


def test_concurrent_ends_of_a_run_succeed_once(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a b", timeout_seconds=1, retry_backoff_base=0)
    winners: Counter[str] = Counter()
    calls: dict[str, Callable[[RunRepository, int, int], list[RunRead]]] = {
        "complete": lambda runs, run_id, token: [runs.complete(run_id, token=token)],
        "finish": lambda runs, run_id, token: [runs.finish(run_id, token=token)],
        "fail": lambda runs, run_id, token: [runs.fail(run_id, "failed", token=token)],
        "cancel": lambda runs, run_id, _: [runs.cancel(run_id, "cancelled")],
        "cancel too": lambda runs, run_id, _: [runs.cancel(run_id, "cancelled too")],
        "expire": lambda runs, _, __: runs.expire(),
        "recover": lambda runs, _, __: runs.recover(max_claims=1),
        "recover too": lambda runs, _, __: runs.recover(max_claims=1),
    }
    for at in range(ROUNDS):
        run_id = runs.create(pipeline).id
        (run,) = runs.claim("w", LEASE)
        token = run.token
        runs.advance(run_id, token=token)
        live = at % 3 == 0  # then it can't be completed
        runs.record(run_id, [done("a")] if live else [done("a"), done("b")], token=token)
        raw.execute(
            "UPDATE circle.pipeline_runs SET started_at = now() - interval '1 h', lease_expires_at = now() - interval '1 s'"
            " WHERE id = %s",
            [run_id],
        )
        order = random.Random(at).sample(sorted(calls), 8)
        outcomes = race(*(on(calls[name], run_id, token) for name in order))
        won = {
            name: outcome[0]
            for name, outcome in zip(order, outcomes, strict=True)
            if isinstance(outcome, list) and outcome
        }
        # with the token that ended the run a second call has the answer of the first: it changes nothing
        returned, *repeated = won.values()
        assert repeated == [returned] * len(repeated)
        others = set(won) - {"complete", "finish", "fail"}
        assert len(others) <= 1
        winners[min(others or won)] += 1
        assert {type(outcome) for outcome in outcomes if not isinstance(outcome, list)} <= {
            IllegalTransitionError,
            RunOverError,
            RunOverError,
        }
        stored = runs.get(run_id)
        assert stored == returned
        assert stored.status.is_terminal
        assert all(node.status.is_terminal for node in runs.nodes(run_id))
    assert sum(winners.values()) == ROUNDS
    check_counters(raw)


def test_retry_concurrent_with_end_of_run_leaves_no_live_node(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    """A node to be retried, and concurrently the last one that completes: the run continues."""
    pipeline = store(session, "a b", retry_backoff_base=0)
    for _ in range(ROUNDS):
        run_id = runs.create(pipeline).id
        runs.advance(run_id)
        failed, started = race(
            on(lambda runs, run_id: runs.fail_node(run_id, "a", "x"), run_id),
            on(lambda runs, run_id: names(runs.advance(run_id, [done("b")]).started), run_id),
        )
        assert failed.status == NodeStatus.PENDING
        assert runs.get(run_id).status == RunStatus.RUNNING
        # the one that came last saw that nothing runs, and started the retry
        assert (started or names(runs.advance(run_id).started)) == ["a"]
        runs.advance(run_id, [done("a")])
    assert runs.counts()[RunStatus.COMPLETED] == ROUNDS
    check_counters(raw)


# --- beginnings --------------------------------------------------------------------------------------------------------


def test_create_while_graph_is_edited_has_all_nodes_of_its_version(
    session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, chain(3))

    def edit(session: Session) -> None:
        for at in range(ROUNDS):
            nodes, edges = graph(chain(2 + at % 5))
            PipelineRepository(session).update(pipeline, PipelineUpdate(nodes=nodes, edges=edges))

    def create(session: Session) -> list[RunRead]:
        return [RunRepository(session).create(pipeline) for _ in range(ROUNDS)]

    _, *created = race(edit, create, create)
    assert all(isinstance(outcome, list) for outcome in created)
    versions: dict[int, list[str]] = dict(
        raw.execute(
            "SELECT version, ARRAY(SELECT n ->> 'id' FROM jsonb_array_elements(nodes) n) FROM circle.pipeline_versions"
        ).fetchall()
    )
    assert len(versions) == ROUNDS + 1
    seen = set()
    runs = RunRepository(session)
    for run in (run for outcome in created for run in outcome):
        assert names(runs.nodes(run.id)) == versions[run.pipeline_version]
        seen.add(run.pipeline_version)
    assert len(seen) > 1
    check_counters(raw)


def test_concurrent_create_unless_live_creates_one_run(session: Session, race: Racers, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a")
    runs = RunRepository(session)
    for at in range(ROUNDS):
        create = on(lambda runs: runs.create(pipeline, unless_live=True).id)
        if at % 2:  # a worker ends the run of the round before meanwhile
            ended = runs.search(pipeline, RunStatus.PENDING).items[0].id
            *created, _ = race(create, create, create, on(lambda runs, run_id: runs.cancel(run_id), ended))
        else:
            created = race(create, create, create)
        assert all(isinstance(run_id, int) for run_id in created)
        assert len(runs.search(pipeline, RunStatus.PENDING).items) <= 1
        for live in runs.search(pipeline, RunStatus.PENDING).items if at % 2 else ():
            runs.cancel(live.id)


def test_concurrent_resume_makes_one_run(session: Session, race: Racers, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    runs = RunRepository(session)
    for _ in range(ROUNDS):
        run_id = runs.create(pipeline).id
        runs.record(run_id, [done("a")])
        runs.cancel(run_id)
        resume = on(lambda runs, run_id: runs.resume(run_id).id, run_id)
        (resumed,) = set(race(resume, resume, resume))
        assert [node.status for node in runs.nodes(resumed)] == ["completed", "pending"]
    assert raw.execute("SELECT count(*) FROM circle.pipeline_runs").fetchone() == (2 * ROUNDS,)
    check_counters(raw)


def test_concurrent_create_with_one_key_creates_one_run(
    session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a>b")
    for at in range(ROUNDS):
        create = on(lambda runs, at: runs.create(pipeline, {"n": at}, idempotency_key=f"key {at}").id, at)
        assert len(set(race(create, create, create))) == 1
    assert raw.execute("SELECT count(*) FROM circle.pipeline_runs").fetchone() == (ROUNDS,)
    assert raw.execute("SELECT count(*) FROM circle.pipeline_node_runs").fetchone() == (ROUNDS * 2,)
    check_counters(raw)


@pytest.mark.parametrize("commits", [True, False])
def test_create_waits_for_uncommitted_run_with_its_key(
    database: Database, session: Session, race: Racers, commits: bool
) -> None:
    pipeline = store(session, "a")
    with database.session() as first:
        run = RunRepository(first).create(pipeline, idempotency_key="k")
        begun = Event()

        def second(session: Session) -> RunRead:
            begun.set()
            return RunRepository(session).create(pipeline, idempotency_key="k")

        def end(_session: Session) -> None:
            begun.wait()
            wait_for_a_waiter(database)
            if commits:
                PipelineRepository(first).pause(pipeline)  # the key answers all the same
                first.commit()
            else:
                first.rollback()

        other, _ = race(second, end)
    assert isinstance(other, RunRead)
    assert (other.id == run.id) == commits
    assert RunRepository(session).get(other.id).id == other.id


def test_create_while_pipeline_is_paused_and_activated_is_created_or_refused(session: Session, race: Racers) -> None:
    """It isn't taken for a broken one if it was paused when the run was inserted, and active when the refusal was worded."""
    pipeline = store(session, "a>b")
    ended = Event()

    def toggle(session: Session) -> None:
        for _ in range(ROUNDS * 5):
            PipelineRepository(session).pause(pipeline)
            PipelineRepository(session).activate(pipeline)
        ended.set()

    def create(session: Session) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        while not ended.is_set():
            try:
                RunRepository(session).create(pipeline)
                outcomes["created"] += 1
            except PipelineError as error:
                session.rollback()
                outcomes[type(error).__name__] += 1
        return outcomes

    _, *outcomes = race(toggle, *[create] * 6)
    assert sum(outcomes, Counter[str]()).keys() == {"created", "PipelineInactiveError"}


def test_run_count_never_decreases_while_counters_are_added_up(session: Session, race: Racers) -> None:
    pipeline = store(session, "a")
    ended = Event()

    def create(session: Session) -> None:
        while not ended.is_set():
            RunRepository(session).create(pipeline)

    def sweep(session: Session) -> None:
        while not ended.is_set():
            RunRepository(session).recover()

    def edit(session: Session) -> list[int]:
        counts = []
        while not ended.is_set():
            counts.append(PipelineRepository(session).update(pipeline, PipelineUpdate(name="p")).run_count)
        return counts

    def read(session: Session) -> list[int]:
        counts = [PipelineRepository(session).get(pipeline).run_count for _ in range(ROUNDS * 15)]
        ended.set()
        return counts

    _, _, edited, seen = race(create, sweep, edit, read)
    assert seen == sorted(seen)
    assert edited == sorted(edited)
    assert seen[-1] > seen[0]


def test_create_while_pipeline_is_deleted_is_found_or_refused(
    session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    for _ in range(ROUNDS):
        pipeline = store(session, "a>b")
        RunRepository(session).create(pipeline)
        created, deleted = race(
            on(lambda runs, pipeline: runs.create(pipeline), pipeline),
            partial(delete, pipeline_id=pipeline),
        )
        assert deleted is None
        assert isinstance(created, RunRead | PipelineNotFoundError)
        assert raw.execute("SELECT count(*) FROM circle.pipeline_runs").fetchone() == (0,)


def test_delete_among_busy_creators_succeeds(
    database: Database, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    """Creators share a lock on the pipeline and then bump its counters: who deletes it neither starves nor deadlocks."""
    for _ in range(max(2, ROUNDS // 10)):
        pipeline = store(session, "a>b")

        def create(_session: Session, pipeline: int = pipeline) -> int:
            created = 0
            while True:
                try:
                    with database.session() as longer:
                        RunRepository(longer).create(pipeline)
                        longer.execute(text("SELECT pg_sleep(0.002)"))
                except PipelineNotFoundError:
                    return created
                created += 1

        *created, deleted = race(*[create] * 7, partial(delete, pipeline_id=pipeline))
        assert deleted is None
        assert all(isinstance(count, int) for count in created)
        assert raw.execute("SELECT count(*) FROM circle.pipeline_runs").fetchone() == (0,)


def test_create_after_uncommitted_delete_waits_and_raises(database: Database, session: Session, race: Racers) -> None:
    pipeline = store(session, "a>b")
    with database.session() as deleting:
        PipelineRepository(deleting).delete(pipeline)

        def commit(_session: Session) -> None:
            wait_for_a_waiter(database)
            deleting.commit()

        created, _ = race(on(lambda runs: runs.create(pipeline)), commit)
    assert isinstance(created, PipelineNotFoundError)


def wait_for_a_waiter(database: Database) -> None:
    """Until some connection of this database waits for a lock."""
    with database.session(autocommit=True) as watch:
        for _ in range(2_000):
            waiting = watch.execute(
                text(
                    "SELECT count(*), pg_sleep(0.005) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
            ).scalar_one()
            if waiting:
                return
    raise AssertionError("no session waits")


# --- leases ------------------------------------------------------------------------------------------------------------


def test_stale_worker_never_writes_after_recovery(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    pipeline = store(session, "a>b", retry_backoff_base=0, max_retries_per_node=5)
    stale_writes: list[Callable[[int, int], object]] = [
        lambda run_id, old: runs.heartbeat(run_id, LEASE, token=old),
        lambda run_id, old: runs.release(run_id, token=old),
        lambda run_id, old: runs.advance(run_id, [done("b")], token=old),
        lambda run_id, old: runs.start_node(run_id, "b", token=old),
        lambda run_id, old: runs.fail(run_id, "late", token=old),
        lambda run_id, _: runs.finish(run_id),
    ]
    won: Counter[str] = Counter()
    for at in range(ROUNDS):
        run_id = runs.create(pipeline).id
        (stale,) = runs.claim("stale", LEASE)
        old = stale.token
        runs.advance(run_id, token=old)
        raw.execute("UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s' WHERE id = %s", [run_id])

        def take_over(session: Session) -> ClaimedRun:
            runs = RunRepository(session)
            while not (claimed := runs.claim("next", LEASE)):
                runs.recover()  # passes by what the stale worker has locked right now
            (run,) = claimed
            if runs.ready_nodes(run.id)[0].node_id == "a":
                runs.start_node(run.id, "a", token=run.token)
                runs.complete_node(run.id, "a", {"by": "next"}, token=run.token)
            return run

        writes: list[Callable[[RunRepository, int, int], object]] = [
            lambda runs, run_id, old: runs.complete_node(run_id, "a", {"by": "stale"}, token=old),
            lambda runs, run_id, old: runs.record(run_id, [done("a", output={"by": "stale"})], token=old),
        ]
        write = writes[at % 2]
        late, run = race(on(write, run_id, old), take_over)
        assert isinstance(run, ClaimedRun)
        by = "next" if isinstance(late, LeaseLostError) else "stale"
        assert isinstance(late, LeaseLostError) or not isinstance(late, PipelineError)
        node = runs.nodes(run_id)[0]
        assert (node.status, node.output_data) == ("completed", {"by": by})
        won[by] += 1
        for refused in stale_writes:
            with pytest.raises(LeaseLostError):
                refused(run_id, old)
        runs.advance(run_id, [done("b")], token=run.token)
        assert runs.get(run_id).status == RunStatus.COMPLETED
    check_counters(raw)


def test_concurrent_claims_get_each_run_once(session: Session, race: Racers, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a")
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id) SELECT %s FROM generate_series(1, 2000)", [pipeline])

    def claim(session: Session, name: int) -> list[tuple[int, int]]:
        mine, chance = [], random.Random(name)
        while claimed := RunRepository(session).claim(f"worker {name}", LEASE, chance.randint(1, 9)):
            assert [run.id for run in claimed] == sorted(run.id for run in claimed)
            mine += [(run.id, name) for run in claimed]
        return mine

    claims = race(*(partial(claim, name=name) for name in range(THREADS)))
    owners = [pair for mine in claims for pair in mine]
    assert len(owners) == len({run_id for run_id, _ in owners}) == 2000
    assert sum(bool(mine) for mine in claims) > 1
    rows = raw.execute("SELECT id, worker_id, claim_count, status FROM circle.pipeline_runs").fetchall()
    assert sorted(rows) == sorted((run_id, f"worker {name}", 1, "running") for run_id, name in owners)


def test_concurrent_sweeps_take_each_run_once(session: Session, race: Racers, raw: psycopg.Connection) -> None:
    """Each lost run is taken once, by one of several; none waits, and no two deadlock."""
    pipeline = store(session, "a", retry_backoff_base=0)
    runs = RunRepository(session)
    ids = {runs.create(pipeline).id for _ in range(60)}
    for run in runs.claim("w", LEASE, 60):
        runs.advance(run.id, token=run.token)
    raw.execute("UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s'")

    def sweep(session: Session) -> list[int]:
        taken = []
        while found := RunRepository(session).recover(limit=7):
            taken += [run.id for run in found]
        return taken

    swept = race(*[sweep] * 6)
    assert sorted(run_id for taken in swept for run_id in taken) == sorted(ids)
    assert [node.retry_count for run_id in ids for node in runs.nodes(run_id)] == [1] * 60


def test_concurrent_sweeps_of_many_pipelines_do_not_deadlock(
    session: Session, race: Racers, raw: psycopg.Connection
) -> None:
    """Their counters are bumped in one order, whatever order the runs were created in."""
    first, second = (store(session, "a", timeout_seconds=1) for _ in range(2))
    runs = RunRepository(session)
    for _ in range(max(5, ROUNDS // 4)):
        ids = [runs.create(pipeline).id for pipeline in [first, second, second, first] * 8]
        runs.claim("w", LEASE, len(ids))
        raw.execute(
            "UPDATE circle.pipeline_runs SET lease_expires_at = now() - interval '1 s' WHERE status = 'running'"
        )
        raw.execute("UPDATE circle.pipeline_runs SET started_at = now() - interval '9 s' WHERE status = 'running'")
        swept = race(
            *[on(lambda runs: [run.id for run in runs.recover(limit=2, max_claims=1)])] * 8,
            *[on(lambda runs: [run.id for run in runs.expire(limit=2)])] * 8,
        )
        assert sorted(run_id for taken in swept for run_id in taken) == sorted(ids)
    check_counters(raw)


# --- clocks and waits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_end_in_older_transaction_is_not_before_the_start(
    database: Database, runs: RunRepository, session: Session, end: str
) -> None:
    run_id = runs.create(store(session, "a>b")).id
    with database.session() as old:
        old.execute(text("SELECT now()"))  # its clock stands from here on
        runs.start(run_id)
        runs.start_node(run_id, "a")
        (node, _) = runs.nodes(run_id)
        assert node.started_at is not None
        call = RunRepository(old).cancel if end == "cancel" else RunRepository(old).fail
        run = call(run_id, "enough")
        (ended, _) = RunRepository(old).nodes(run_id)
        assert old.execute(text("SELECT now()")).scalar_one() < node.started_at
    assert run.status == ("cancelled" if end == "cancel" else "failed")
    assert ended.status == NodeStatus.CANCELLED
    assert ended.completed_at is not None
    assert ended.started_at is not None
    assert run.completed_at is not None
    assert run.started_at is not None
    assert ended.completed_at >= ended.started_at
    assert run.completed_at >= run.started_at


@pytest.mark.parametrize("late", ["cancel", "expire", "complete_node", "release"])
def test_call_that_waited_for_a_start_is_not_before_it(
    database: Database, runs: RunRepository, session: Session, race: Racers, late: str
) -> None:
    run_id = runs.create(store(session, "a", timeout_seconds=1)).id
    (run,) = runs.claim("w", LEASE)
    session.execute(text("UPDATE circle.pipeline_runs SET started_at = now() - interval '1 h'"))
    calls: dict[str, Callable[[RunRepository], object]] = {
        "cancel": lambda runs: runs.cancel(run_id),
        "expire": lambda runs: runs.expire(),
        "complete_node": lambda runs: runs.complete_node(run_id, "a", token=run.token),
        "release": lambda runs: runs.release(run_id, token=run.token),
    }
    with database.session() as starting:
        RunRepository(starting).start_node(run_id, "a", token=run.token)

        def commit(_session: Session) -> None:
            if late != "expire":  # sweeps don't wait
                wait_for_a_waiter(database)
            starting.commit()

        outcome, _ = race(on(calls[late]), commit)
    assert not isinstance(outcome, PipelineError)
    if late == "expire":
        runs.expire()
    (node,) = runs.nodes(run_id)
    wanted = {"cancel": "cancelled", "expire": "cancelled", "complete_node": "completed", "release": "pending"}
    assert node.status == wanted[late]
    assert node.status == "pending" or (node.completed_at or node.started_at) >= node.started_at  # type: ignore[operator]


def test_raw_node_start_concurrent_with_release_leaves_no_running_node(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection, database: Database
) -> None:
    """Nodes move only while their run is running, also when a writer that takes no lock is in between."""
    run_id = runs.create(store(session, "a")).id
    (run,) = runs.claim("w", LEASE)
    with database.session() as starting:
        starting.execute(text("UPDATE circle.pipeline_node_runs SET status = 'running'"))
        given = Event()

        def release(session: Session) -> RunRead:
            try:
                return RunRepository(session).release(run_id, token=run.token)
            finally:
                given.set()

        def commit(_session: Session) -> None:
            given.wait(timeout=1)  # or it waits for the commit
            starting.commit()

        race(release, commit)
    row = raw.execute(
        "SELECT r.status, n.status FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id"
    ).fetchone()
    assert row != ("pending", "running")


def test_raw_node_start_that_waits_for_a_claim_has_its_event_after_it(
    runs: RunRepository, session: Session, race: Racers, raw: psycopg.Connection, database: Database
) -> None:
    """Also if its transaction is older: it saw the run pending, and waited until it ran."""
    run_id = runs.create(store(session, "a")).id
    with database.session() as starting, database.session() as claiming:
        starting.execute(text("SELECT pg_current_xact_id()"))
        RunRepository(claiming).claim("w", LEASE)

        def start(_session: Session) -> None:
            starting.execute(text("UPDATE circle.pipeline_node_runs SET status = 'running'"))
            starting.commit()

        def commit(_session: Session) -> None:
            wait_for_a_waiter(database)
            claiming.commit()

        race(start, commit)
    events = raw.execute("SELECT type FROM circle.pipeline_events WHERE run_id = %s ORDER BY xid, id", [run_id])
    assert events.fetchall() == [("pipeline_run.started",), ("pipeline_node.started",)]


def test_concurrent_mixed_calls_end_every_run(session: Session, race: Racers, raw: psycopg.Connection) -> None:
    """Eight executors, cancellers and sweepers on the same few runs: typed errors only, and no deadlock."""
    pipeline = store(session, "t>a t>b a>j b>j", retry_backoff_base=0, max_retries_per_node=1_000)
    ids = [RunRepository(session).create(pipeline).id for _ in range(max(4, ROUNDS // 4))]

    def executor(session: Session, seed: int) -> None:
        runs, chance = RunRepository(session), random.Random(seed)
        for run_id in ids * 2:
            try:
                for node in runs.advance(run_id).started:
                    if chance.random() < 0.3:
                        runs.fail_node(run_id, node.node_id, "x")
                    else:
                        runs.advance(run_id, [done(node.node_id)])
            except (IllegalTransitionError, LeaseLostError):
                session.rollback()

    def canceller(session: Session) -> None:
        for run_id in ids[::3]:
            try:
                RunRepository(session).cancel(run_id)
            except IllegalTransitionError:
                session.rollback()

    def sweeper(session: Session) -> None:
        for _ in range(10):
            RunRepository(session).recover()
            RunRepository(session).expire()
            RunRepository(session).purge(timedelta(days=1))

    outcomes = race(*(partial(executor, seed=seed) for seed in range(6)), canceller, sweeper)
    assert outcomes == [None] * 8
    runs = RunRepository(session)
    for run_id in ids:
        while not runs.get(run_id).status.is_terminal:
            running = [node.node_id for node in runs.nodes(run_id) if node.status == "running"]
            runs.advance(run_id, [done(name) for name in running])
        assert all(node.status.is_terminal for node in runs.nodes(run_id))
    check_counters(raw)


def test_call_on_run_deleted_concurrently_raises_not_found(runs: RunRepository, session: Session, race: Racers) -> None:
    for _ in range(max(1, ROUNDS // 4)):
        pipeline = store(session, chain(5), status=PipelineStatus.ACTIVE)
        run_id = runs.create(pipeline).id

        def work(session: Session, run_id: int = run_id) -> str:
            nodes = RunRepository(session).advance(run_id).started
            while nodes:
                nodes = RunRepository(session).advance(run_id, [done(node.node_id) for node in nodes]).started
            return "completed"

        worked, deleted = race(work, partial(delete, pipeline_id=pipeline))
        assert deleted is None
        assert worked == "completed" or isinstance(worked, RunNotFoundError)
