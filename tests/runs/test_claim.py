"""``claim``: which run comes next, what holds a run back, and several workers that claim at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import EventRepository, PipelineRepository, PipelineUpdate, RunRead, RunRepository
from gathering_pipeline.database import Database
from gathering_pipeline.errors import InvalidDataError, InvalidPipelineError, LeaseLostError
from tests.support.databases import scalar, unguarded
from tests.support.runs import LEASE, claimed, clock, done, lose_lease, statuses, store

QUEUED = """
SELECT r.id FROM circle.pipeline_runs r JOIN circle.pipelines p ON p.id = r.pipeline_id
WHERE r.status = 'pending' AND p.status = 'active' AND (r.waits_until IS NULL OR r.waits_until <= clock_timestamp())
  AND (%(pipelines)s::bigint[] IS NULL OR p.id = ANY (%(pipelines)s))
ORDER BY r.priority DESC, r.id LIMIT %(limit)s"""


def ids(found: Sequence[RunRead]) -> list[int]:
    return [run.id for run in found]


def test_claim_takes_higher_priority_first_then_older(runs: RunRepository, session: Session) -> None:
    pipelines = [store(session, "a"), store(session, "a")]
    made = [runs.create(pipelines[place % 2], priority=priority).id for place, priority in enumerate([0, -1, 7, 0, 7])]
    assert ids(runs.claim("w", LEASE, 3)) == [made[2], made[4], made[0]]
    assert ids(runs.claim("w", LEASE, 3)) == [made[3], made[1]]


@pytest.mark.parametrize("seed", range(20))
def test_claim_takes_what_sorting_all_runs_would(
    runs: RunRepository, session: Session, raw: psycopg.Connection, seed: int
) -> None:
    chance = random.Random(seed)
    pipelines = [store(session, "a") for _ in range(5)]
    for _ in range(40):
        run_at = chance.choice([None, None, datetime.now(UTC) + timedelta(hours=chance.choice([-1, 1]))])
        runs.create(chance.choice(pipelines), priority=chance.randint(-2, 2), run_at=run_at)
    for pipeline in chance.sample(pipelines, 2):
        PipelineRepository(session).pause(pipeline)
    while True:
        limit, some = chance.randint(1, 7), chance.choice([None, chance.sample(pipelines, 3)])
        expected = [row[0] for row in raw.execute(QUEUED, {"limit": limit, "pipelines": some})]
        assert ids(runs.claim("w", LEASE, limit, some)) == expected
        if not expected and some is None:
            break


def test_claim_of_pipelines_takes_only_theirs(runs: RunRepository, session: Session) -> None:
    first, second = (runs.create(store(session, "a")) for _ in range(2))
    assert runs.claim("w", LEASE, pipelines=[]) == []
    assert runs.claim("w", LEASE, pipelines=[2**70, -5]) == []
    assert ids(runs.claim("w", LEASE, 5, [second.pipeline_id])) == [second.id]
    assert ids(runs.claim("w", LEASE, 5, pipelines={first.pipeline_id, second.pipeline_id})) == [first.id]


def test_paused_pipeline_keeps_its_runs_until_it_is_active(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    lost = claimed(runs, session, "a")
    PipelineRepository(session).pause(lost.pipeline_id)
    lose_lease(raw, lost.id)
    assert ids(runs.recover()) == [lost.id]
    assert runs.claim("w", LEASE) == []
    PipelineRepository(session).activate(lost.pipeline_id)
    assert ids(runs.claim("w", LEASE)) == [lost.id]


def test_run_at_ahead_holds_the_run_back(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a")
    ahead = clock(raw) + timedelta(hours=1)
    run = runs.create(pipeline, run_at=ahead.astimezone(timezone(timedelta(hours=5, minutes=30))))
    assert (run.run_at, run.waits_until) == (ahead, ahead)
    past = runs.create(pipeline, run_at=clock(raw) - timedelta(days=1))
    assert past.waits_until is None
    assert ids(runs.claim("w", LEASE, 5)) == [past.id]
    raw.execute("UPDATE circle.pipeline_runs SET waits_until = clock_timestamp() WHERE id = %s", [run.id])
    (due,) = runs.claim("w", LEASE, 5)
    assert (due.id, due.run_at, due.waits_until) == (run.id, ahead, None)


@pytest.mark.parametrize("leave", ["release", "recover"])
def test_run_that_waits_for_a_retry_is_claimed_when_it_is_due(
    runs: RunRepository, session: Session, raw: psycopg.Connection, leave: str
) -> None:
    run = claimed(runs, session, "a", retry_backoff_base=600, retry_backoff_max=600)
    runs.start_node(run.id, "a", token=run.token)
    due = runs.fail_node(run.id, "a", "busy", token=run.token).available_at
    if leave == "release":
        waiting = runs.release(run.id, token=run.token)
    else:
        lose_lease(raw, run.id)
        (waiting,) = runs.recover()
    assert (waiting.status, waiting.waits_until) == ("pending", due)
    for _ in range(12):  # it neither burns claims nor fails
        assert runs.claim("w", LEASE) == []
    assert (runs.get(run.id).status, runs.get(run.id).claim_count) == ("pending", 1)
    raw.execute("UPDATE circle.pipeline_node_runs SET available_at = clock_timestamp()")
    raw.execute("UPDATE circle.pipeline_runs SET waits_until = clock_timestamp()")
    (again,) = runs.claim("w", LEASE)
    assert [node.attempt for node in runs.advance(run.id, token=again.token).started] == [2]


def test_release_of_run_with_another_ready_node_waits_for_nothing(runs: RunRepository, session: Session) -> None:
    run = claimed(runs, session, "a>c b", retry_backoff_base=600, retry_backoff_max=600)
    runs.start_node(run.id, "a", token=run.token)
    runs.fail_node(run.id, "a", "busy", token=run.token)
    assert runs.release(run.id, token=run.token).waits_until is None
    assert ids(runs.claim("w", LEASE)) == [run.id]


def test_release_twice_answers_twice_and_a_stale_token_stays_refused(
    runs: RunRepository, session: Session, refuses: Callable[..., Any]
) -> None:
    run = claimed(runs, session, "a")
    released = runs.release(run.id, token=run.token)
    assert runs.release(run.id, token=run.token) == released
    (again,) = runs.claim("w", LEASE)
    repeated = runs.release(run.id, token=run.token)
    assert repeated == RunRead.model_validate(again.model_dump())  # which tells nobody the holder's token
    with refuses(LeaseLostError):
        runs.advance(run.id, token=run.token)
    with refuses(LeaseLostError):
        runs.release(run.id, token=again.token + 1)


def test_each_claim_is_one_started_event_with_its_number(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    run = claimed(runs, session, "a")
    runs.release(run.id, token=run.token)
    runs.claim("w", LEASE)
    lose_lease(raw, run.id)
    runs.recover()
    (last,) = runs.claim("w", LEASE)
    assert (last.claim_count, last.lapsed_claims) == (3, 1)
    events = EventRepository(session).read(run_id=run.id).items
    assert [event.data for event in events if event.type == "pipeline_run.started"] == [
        {"claim": n, "worker_id": "w" if n > 1 else "worker"} for n in (1, 2, 3)
    ]


def test_claim_of_a_raw_run_gives_it_its_nodes(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    pipeline = store(session, "a>b")
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (%s), (%s)", [pipeline, pipeline])
    first, second = runs.claim("w", LEASE, 2)
    assert [statuses(runs, run.id) for run in (first, second)] == [{"a": "pending", "b": "pending"}] * 2
    runs.start_node(first.id, "a", token=first.token)
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id) VALUES (%s)", [pipeline])
    runs.start(second.id + 1)
    assert statuses(runs, second.id + 1) == {"a": "pending", "b": "pending"}


def test_run_without_version_is_neither_claimed_nor_started(
    runs: RunRepository, session: Session, raw: psycopg.Connection, refuses: Callable[..., Any]
) -> None:
    run = runs.create(store(session, "a"))
    with unguarded(raw, "pipeline_runs"):
        raw.execute("UPDATE circle.pipeline_runs SET pipeline_version = NULL")
    assert runs.claim("w", LEASE) == []
    with refuses(InvalidPipelineError) as caught:
        runs.start(run.id)
    assert "no version" in str(caught.value)


def test_claim_passes_by_runs_that_others_hold(
    runs: RunRepository, session: Session, database_url: str, connect: Callable[[str], psycopg.Connection]
) -> None:
    one, many = store(session, "a"), store(session, "a")
    held = [runs.create(one).id, *(runs.create(many).id for _ in range(40))]
    free = [runs.create(many).id, runs.create(one).id]
    other = connect(database_url)
    with other.transaction():
        other.execute("SELECT FROM circle.pipeline_runs WHERE id = ANY (%s) FOR NO KEY UPDATE", [held])
        assert sorted(ids(runs.claim("w", LEASE, 1)) + ids(runs.claim("w", LEASE, 2))) == free
        assert runs.claim("w", LEASE) == []
    assert ids(runs.claim("w", LEASE, 41)) == held


@pytest.mark.parametrize("pipelines", [1, 30])
def test_claim_by_many_workers_hands_out_each_run_once(
    runs: RunRepository, session: Session, database: Database, pipelines: int
) -> None:
    stored = [store(session, "a") for _ in range(pipelines)]
    made = [runs.create(stored[place % pipelines], priority=place % 3).id for place in range(240)]
    taken: list[int] = []

    def work(limit: int) -> None:
        with database.session(autocommit=True) as own:
            repository = RunRepository(own)
            while found := repository.claim("w", LEASE, limit):
                taken.extend(ids(found))
                for run in found:
                    repository.advance(run.id, token=run.token)
                    repository.advance(run.id, [done("a")], token=run.token)

    threads = [threading.Thread(target=work, args=(1 + place % 4,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"priority": 40_000}, "priority must be a whole number"),
        ({"priority": True}, "priority must be a whole number"),
        ({"priority": None}, "priority must be a whole number"),
        ({"run_at": datetime(2030, 1, 1)}, "run_at must be a datetime with an offset"),  # noqa: DTZ001
        ({"run_at": "2030-01-01"}, "run_at must be a datetime"),
        ({"run_at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))}, "run_at must be within the years"),
        ({"run_at": datetime.min.replace(tzinfo=UTC)}, "run_at must be from 1970-01-01 to 9999-12-30"),
        ({"run_at": datetime.max.replace(tzinfo=UTC)}, "run_at must be from 1970-01-01 to 9999-12-30"),
    ],
)
def test_create_with_bad_time_or_priority_raises_invalid_data(
    runs: RunRepository, session: Session, arguments: dict[str, Any], message: str
) -> None:
    pipeline = store(session, "a")
    with pytest.raises(InvalidDataError, match=message):
        runs.create(pipeline, **arguments)


@pytest.mark.parametrize("pipelines", ["12", 5, [None], [1.5], [True], [10**200]])
def test_claim_with_bad_pipelines_raises_invalid_data(runs: RunRepository, pipelines: Any) -> None:
    with pytest.raises(InvalidDataError, match="pipelines"):
        runs.claim("w", LEASE, pipelines=pipelines)


def test_claim_keeps_to_max_running(runs: RunRepository, session: Session, raw: psycopg.Connection) -> None:
    limited, free = store(session, "a", max_running=2), store(session, "a")
    made = [runs.create(limited, priority=1).id for _ in range(4)]
    other = runs.create(free).id
    assert ids(runs.claim("w", LEASE, 10)) == [*made[:2], other]
    assert runs.claim("w", LEASE, 10) == []
    runs.cancel(made[0])
    assert ids(runs.claim("w", LEASE, 10)) == made[2:3]
    runs.start(made[3])  # is not held up, and counts
    PipelineRepository(session).update(limited, PipelineUpdate(max_running=4))
    waiting = [runs.create(limited).id for _ in range(3)]
    assert ids(runs.claim("w", LEASE, 10)) == waiting[:1]
    with pytest.raises(psycopg.errors.CheckViolation):
        raw.execute("UPDATE circle.pipelines SET max_running = -1")


def test_claims_of_many_workers_keep_to_max_running(
    runs: RunRepository, session: Session, raw: psycopg.Connection, database: Database
) -> None:
    limited = [store(session, "a", max_running=limit) for limit in (1, 3)]
    made = sorted(runs.create(pipeline).id for pipeline in limited for _ in range(40))
    taken: list[int] = []
    most: list[int] = []
    stop = threading.Event()

    def work() -> None:
        with database.session(autocommit=True) as own:
            repository = RunRepository(own)
            while len(taken) < len(made):
                for run in repository.claim("w", LEASE, 2):
                    taken.append(run.id)
                    repository.advance(run.id, token=run.token)
                    repository.advance(run.id, [done("a")], token=run.token)

    def watch() -> None:
        count = "SELECT count(*) FROM circle.pipeline_runs WHERE status = 'running'"
        while not stop.is_set():
            most.append(scalar(raw, count))

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    watcher.join()
    assert sorted(taken) == made
    assert max(most) <= 4


def test_run_whose_nodes_cannot_be_made_stops_no_claim(
    runs: RunRepository, session: Session, raw: psycopg.Connection
) -> None:
    """It is passed by, and looked at again an hour later."""
    pipeline = store(session, "a>b")
    raw.execute("INSERT INTO circle.pipeline_runs (pipeline_id, priority) VALUES (%s, 9)", [pipeline])
    raw.execute(
        "INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position)"
        " SELECT id, 'foreign', 'agent', 1 FROM circle.pipeline_runs"
    )
    good = [runs.create(pipeline).id for _ in range(2)]
    assert ids(runs.claim("w", LEASE, 2)) == good[:1]
    assert ids(runs.claim("w", LEASE, 2)) == good[1:]
    (poisoned,) = (run for run in runs.search().items if run.status == "pending")
    assert poisoned.waits_until is not None
    assert clock(raw) < poisoned.waits_until <= clock(raw) + timedelta(hours=1)
    runs.cancel(poisoned.id)


def test_claims_see_all_due_runs_while_another_claim_is_open(
    runs: RunRepository, session: Session, raw: psycopg.Connection, database: Database
) -> None:
    pipeline = store(session, "a")
    made = [runs.create(pipeline, run_at=clock(raw) + timedelta(hours=1)).id for _ in range(300)]
    raw.execute("UPDATE circle.pipeline_runs SET waits_until = clock_timestamp()")
    with database.session() as other:
        held = ids(RunRepository(other).claim("other", LEASE, 5))
        mine = ids(runs.claim("w", LEASE, 5))
        assert len(held) == len(mine) == 5
        assert set(held).isdisjoint(mine)
    assert set(held) | set(mine) <= set(made)


def test_event_of_a_start_without_claim_has_no_number(runs: RunRepository, session: Session) -> None:
    run = claimed(runs, session, "a")
    runs.release(run.id, token=run.token)
    started = runs.start(run.id)
    assert started.waits_until is None
    events = EventRepository(session).read(run_id=run.id).items
    assert [event.data for event in events if event.type == "pipeline_run.started"] == [
        {"claim": 1, "worker_id": "worker"},
        {},
    ]
