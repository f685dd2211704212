"""``Databases``: turns, pauses, sweeps, events and connections of many databases on one server."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any

import psycopg
import pytest
from sqlalchemy import event

from gathering_pipeline import (
    ConfigurationError,
    Database,
    Databases,
    DatabaseSettings,
    DatabaseUnavailableError,
    EventRepository,
    EventType,
    ForkedConnectionError,
    InvalidCursorError,
    InvalidDataError,
    RunRepository,
    SweepResult,
    idle,
)
from tests.support.databases import empty
from tests.support.forks import in_child
from tests.support.runs import LEASE, lose_lease, store
from tests.support.servers import Server, connect

pytestmark = pytest.mark.once  # turns, pauses and connections are kept by this package

NAMES = ("a", "b", "c")
NOWHERE = "postgresql://u:s3cret@127.0.0.1:1/none"
SOON = timedelta(seconds=0.02)
LIMIT_S = 30


@pytest.fixture(scope="module")
def clones(server: Server, template: str) -> Iterator[dict[str, str]]:
    made = [server.create(template) for _ in NAMES]
    yield {name: server.database_url(database) for name, database in zip(NAMES, made, strict=True)}
    for name in made:
        server.drop(name)


@pytest.fixture
def urls(clones: dict[str, str]) -> dict[str, str]:
    """Three empty databases."""
    for url in clones.values():
        empty(url)
    return clones


@pytest.fixture
def databases(urls: dict[str, str]) -> Iterator[Databases]:
    with Databases(urls) as made:
        yield made


def create(database: Database, number: int = 1, **fields: Any) -> list[int]:
    """Runs of a pipeline with one node."""
    with database.session() as session:
        pipeline = store(session, "a", **fields)
        return [RunRepository(session).create(pipeline).id for _ in range(number)]


def claim_all(databases: Databases, limit: int = 1) -> list[tuple[str, int]]:
    found = []
    while claimed := databases.claim("w", LEASE, limit):
        found += [(name, run.id) for name, run in claimed]
    return found


# --- one by name -----------------------------------------------------------------------------------------------------


def test_databases_are_opened_on_first_use_by_name(urls: dict[str, str]) -> None:
    with Databases(urls | {"nowhere": NOWHERE}) as databases:
        assert (list(databases), len(databases)) == (["a", "b", "c", "nowhere"], 4)
        database = databases["b"]
        assert databases["b"] is database
        assert database.settings.idle_limit == timedelta(seconds=30)
        database.check()
        with pytest.raises(ConfigurationError, match="there is no database 'x': there are a, b, c, nowhere"):
            databases["x"]
        assert "s3cret" not in repr(databases) + repr(databases["nowhere"])


@pytest.mark.parametrize(
    ("urls", "error", "message"),
    [
        ({}, ConfigurationError, "there is no database: urls is empty"),
        ([NOWHERE], InvalidDataError, "urls must be of type Mapping, not list"),
        (
            {"a": NOWHERE, "b": "mysql://u:s3cret@h/d"},
            ConfigurationError,
            "the URL of b can't be used: mysql:// is not",
        ),
        ({"a": "postgresql://u:s3cret@x@h/d"}, ConfigurationError, "the URL of a can't be read: write it as"),
        ({"": NOWHERE}, InvalidDataError, "the names in urls must be strings that are not empty, not ''"),
        ({1: NOWHERE}, InvalidDataError, "the names in urls must be strings that are not empty, not 1"),
    ],
)
def test_databases_of_wrong_urls_are_refused(urls: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Databases(urls)
    assert str(caught.value).startswith(message)
    assert "s3cret" not in str(caught.value)


def test_databases_with_wrong_options_are_refused(urls: dict[str, str]) -> None:
    with pytest.raises(InvalidDataError, match="^longest_pause must be a timedelta"):
        Databases(urls, longest_pause=5)  # type: ignore[arg-type]
    with Databases(urls) as databases, pytest.raises(InvalidDataError, match="^worker_id must have 1 to 255"):
        databases.claim("", LEASE)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_claims_take_turns_among_the_databases(databases: Databases) -> None:
    runs = {name: create(databases[name], 4) for name in NAMES}
    claimed = claim_all(databases)
    names = [name for name, _ in claimed]
    assert names == names[:3] * 4
    assert set(names[:3]) == set(NAMES)
    for name, ids in runs.items():
        assert [run for of, run in claimed if of == name] == ids


def test_claim_with_limit_returns_runs_of_one_database(databases: Databases) -> None:
    create(databases["a"], 3)
    create(databases["c"], 2)
    first, second = databases.claim("w", LEASE, 5), databases.claim("w", LEASE, 5)
    assert Counter(name for name, _ in first + second) == {"a": 3, "c": 2}
    assert len({name for name, _ in first}) == len({name for name, _ in second}) == 1
    name, run = first[0]
    with databases[name].session(autocommit=True) as session:
        assert RunRepository(session).advance(run.id, token=run.token).started[0].node_id == "a"


def test_aclaim_takes_turns_among_tasks(databases: Databases) -> None:
    for name in NAMES:
        create(databases[name], 5)

    async def work() -> list[str]:
        async with databases:
            found = await asyncio.gather(*(databases.aclaim("w", LEASE) for _ in range(15)))
            assert await databases.aclaim("w", LEASE) == []
        return [name for claimed in found for name, _ in claimed]

    assert Counter(asyncio.run(work())) == dict.fromkeys(NAMES, 5)


@contextmanager
def counted(database: Database) -> Iterator[list[str]]:
    """The statements that are sent to a database."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        sent.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    yield sent
    event.remove(database.engine, "before_cursor_execute", note)


def test_claim_leaves_an_empty_database_alone_for_a_growing_pause(urls: dict[str, str]) -> None:
    with Databases({"a": urls["a"]}, longest_pause=timedelta(seconds=0.4)) as databases:
        with counted(databases["a"]) as sent:
            begun, calls = time.monotonic(), 0
            while time.monotonic() < begun + 1.5:
                assert databases.claim("w", LEASE) == []
                calls += 1
        # pauses of at most 0.1, 0.2, 0.4 and 0.4 s, and of at least half of that
        assert 4 <= len(sent) <= 12
        assert calls > 500
        (run,) = create(databases["a"])
        begun = time.monotonic()
        while not (claimed := databases.claim("w", LEASE)):
            assert time.monotonic() < begun + LIMIT_S
        assert [(name, found.id) for name, found in claimed] == [("a", run)]
        create(databases["a"])
        assert databases.claim("w", LEASE), "the pause is over with the first run"


@contextmanager
def silent_server() -> Iterator[tuple[str, list[float]]]:
    """The URL of a server that accepts connections and says nothing, and the times of its connections."""
    times: list[float] = []
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listening:
        kept = []

        def accept() -> None:
            with pytest.raises(OSError):  # noqa: PT011 - it is closed
                while True:
                    kept.append(listening.accept()[0])
                    times.append(time.monotonic())

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"postgresql://u:s3cret@127.0.0.1:{listening.getsockname()[1]}/none", times
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT_S)
        for connection in kept:
            connection.close()


def test_unreachable_database_delays_the_others_once_a_backoff(
    urls: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = DatabaseSettings(connect_timeout=timedelta(seconds=2))
    with (
        silent_server() as (silent, tried),
        Databases(urls | {"silent": silent, "refused": NOWHERE}, settings=settings) as databases,
    ):
        for name in NAMES:
            create(databases[name], 20)
        begun, found, slowest = time.monotonic(), 0, 0.0
        while found < 60:
            before = time.monotonic()
            found += len(databases.claim("w", LEASE))
            slowest = max(slowest, time.monotonic() - before)
        assert len(tried) <= 3
        assert slowest < 2 * 2  # the timeout, and not one for each claim
        assert time.monotonic() - begun < 20
        failed = databases.recover().failed
        assert failed.keys() == {"silent", "refused"}
        assert {type(error) for error in failed.values()} == {DatabaseUnavailableError}
    assert "database refused failed, next attempt in" in caplog.text
    assert "s3cret" not in caplog.text


def test_database_that_comes_back_is_used_again(urls: dict[str, str], server: Server, template: str) -> None:
    later = server.create(template)
    server.drop(later)
    backoff = timedelta(seconds=0.2)
    with Databases({"a": urls["a"], "later": server.database_url(later)}, longest_backoff=backoff) as databases:
        assert isinstance(databases.expire().failed["later"], ConfigurationError)
        with server.connect() as admin:
            admin.execute(f"CREATE DATABASE {later} TEMPLATE {template}".encode())
        try:
            (run,) = create(databases["later"])
            begun = time.monotonic()
            while not (claimed := databases.claim("w", LEASE)):
                assert time.monotonic() < begun + LIMIT_S
                time.sleep(0.01)
            assert [(name, found.id) for name, found in claimed] == [("later", run)]
            assert databases.expire() == SweepResult((), {})
        finally:
            databases.dispose()
            server.drop(later)


def test_database_at_another_revision_stops_no_other(urls: dict[str, str], empty_database_url: str) -> None:
    with Databases({"empty": empty_database_url, "a": urls["a"]}) as databases:
        (run,) = create(databases["a"])
        assert claim_all(databases) == [("a", run)]
        assert "the schema lacks what this code needs" in str(databases.recover().failed["empty"])


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_sweeps_go_on_after_a_failure_and_tell_it(urls: dict[str, str]) -> None:
    with Databases({"nowhere": NOWHERE} | urls) as databases:
        expected = [(name, create(databases[name], timeout_seconds=100)[0]) for name in NAMES]
        assert sorted(claim_all(databases)) == expected
        for name, run in expected:
            with connect(urls[name]) as raw:
                lose_lease(raw, run)
        swept = databases.recover()
        assert [(name, run.id, run.status) for name, run in swept.runs] == [(*run, "pending") for run in expected]
        assert swept.failed.keys() == {"nowhere"}

        assert sorted(claim_all(databases)) == expected, "the pause of a database ends where a sweep released a run"
        for url in urls.values():
            with connect(url) as raw:
                raw.execute("UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '101 s'")

        async def work() -> tuple[SweepResult, SweepResult]:
            async with databases:
                return await databases.arecover(), await databases.aexpire()

        recovered, expired = asyncio.run(work())
        assert recovered.runs == ()
        assert [(name, run.id, run.status) for name, run in expired.runs] == [(*run, "timeout") for run in expected]
        assert recovered.failed.keys() == expired.failed.keys() == {"nowhere"}


def test_sweep_recovers_and_expires_once_a_second(urls: dict[str, str]) -> None:
    with Databases(urls) as databases:
        late, lost = (create(databases["a"], timeout_seconds=100)[0] for _ in range(2))
        while len(claim_all(databases)) > 0:
            pass
        with connect(urls["a"]) as raw:
            raw.execute(
                "UPDATE circle.pipeline_runs SET started_at = clock_timestamp() - interval '101 s' WHERE id = %s",
                [late],
            )
            lose_lease(raw, lost)
            raw.execute("DELETE FROM circle.pipeline_sweep")  # the claims swept just now
        assert {(name, run.id, run.status) for name, run in databases.sweep().runs} == {
            ("a", late, "timeout"),
            ("a", lost, "pending"),
        }
        assert asyncio.run(databases.asweep()) == SweepResult((), {})


# --- events ----------------------------------------------------------------------------------------------------------


def start(database: Database, number: int = 1) -> list[int]:
    ids = create(database, number)
    with database.session() as session:
        for run in ids:
            RunRepository(session).start(run)
    return ids


def test_listen_yields_events_of_each_database_once(urls: dict[str, str], databases: Databases) -> None:
    expected = {(name, run) for name in NAMES for run in start(databases[name], 3)}
    cursors: dict[str, str] = {}
    with closing(databases.listen(poll=SOON)) as events:
        seen = []
        for name, found in islice(events, 9):
            seen.append((name, found.run_id))
            cursors[name] = found.cursor
        assert len(seen) == 9
        assert set(seen) == expected
        (run,) = start(databases["b"])
        name, found = next(events)
        assert (name, found.run_id, found.type) == ("b", run, EventType.PIPELINE_RUN_STARTED)
    with closing(databases.listen(cursors, SOON)) as events:
        assert [(name, found.run_id) for name, found in islice(events, 1)] == [("b", run)]

    async def work() -> list[tuple[str, int]]:
        async with databases, aclosing(databases.alisten({"a": cursors["a"]}, SOON)) as events:
            return [(name, found.run_id) async for name, found in limited(events, 7)]

    again = asyncio.run(work())
    assert Counter(name for name, _ in again) == {"b": 4, "c": 3}


async def limited(events: Any, number: int) -> AsyncIterator[Any]:
    for _ in range(number):
        yield await anext(events)


def test_listen_goes_on_beside_a_database_that_fails(urls: dict[str, str]) -> None:
    with Databases({"nowhere": NOWHERE} | urls) as databases:
        (run,) = start(databases["a"])
        with closing(databases.listen(poll=SOON)) as events:
            assert next(events)[1].run_id == run
            with connect(urls["a"]) as raw:
                raw.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            (other,) = start(databases["a"])
            assert next(events)[1].run_id == other


def test_listen_with_wrong_cursors_names_the_database(databases: Databases) -> None:
    start(databases["a"])
    start(databases["b"])
    with databases["a"].session() as session:
        cursor = EventRepository(session).last()
    with pytest.raises(InvalidDataError, match="after has a cursor of 'x', which is no database"):
        next(databases.listen({"a": cursor, "x": cursor}))
    with pytest.raises(InvalidCursorError, match=r"^b: the cursor '.*' is of another database"):
        list(databases.listen({"a": cursor, "b": cursor}))

    async def work() -> None:
        async with databases, aclosing(databases.alisten({"a": cursor, "b": "nonsense"})) as events:
            await anext(events)

    with pytest.raises(InvalidCursorError, match="^b: after must be the cursor of an event"):
        asyncio.run(work())
    with pytest.raises(InvalidDataError, match="^poll must be a timedelta"):
        next(databases.listen(poll=timedelta(0)))


# --- connections -----------------------------------------------------------------------------------------------------


def connections(admin: psycopg.Connection, urls: dict[str, str]) -> list[int]:
    """The number of connections to each database."""
    names = [url.rpartition("/")[2].partition("?")[0] for url in urls.values()]
    found: dict[str, int] = dict(
        admin.execute(
            "SELECT datname, count(*) FROM pg_stat_activity WHERE datname = ANY (%s) GROUP BY 1", [names]
        ).fetchall()
    )
    return [found.get(name, 0) for name in names]


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_idle_databases_keep_one_connection_then_none(
    urls: dict[str, str], admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "SPARE_SECONDS", 0.1)
    settings = DatabaseSettings(idle_limit=timedelta(seconds=1.5))

    with Databases(urls, settings=settings) as databases:

        def work() -> None:
            for _ in range(20):
                databases.claim("w", LEASE)
                databases.recover()

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert sum(connections(admin, urls)) >= 3
        until(lambda: max(connections(admin, urls)) <= 1)
        assert connections(admin, urls) == [1, 1, 1]
        until(lambda: connections(admin, urls) == [0, 0, 0])
        databases.recover()
        assert connections(admin, urls) == [1, 1, 1]
    until(lambda: connections(admin, urls) == [0, 0, 0])


def test_forked_child_claims_on_connections_of_its_own(urls: dict[str, str], databases: Databases) -> None:
    for name in NAMES:
        start(databases[name])
        create(databases[name], 10)
    events = databases.listen(poll=SOON)
    next(events)

    def work() -> list[tuple[str, int]]:
        with pytest.raises(ForkedConnectionError):
            next(events)
        return claim_all(databases)

    before = [databases.claim("w", LEASE)[0] for _ in range(3)]
    with databases._lock:  # as if a thread held it
        of_child = in_child(work)
    after = claim_all(databases)
    assert len({(name, run.id) for name, run in before} | set(of_child)) == 30
    assert after == []
    assert next(events)[0] in NAMES
    events.close()


def test_threads_share_the_databases(databases: Databases) -> None:
    for name in NAMES:
        create(databases[name], 20)
    found: list[tuple[str, int]] = []
    threads = [threading.Thread(target=lambda: found.extend(claim_all(databases))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(found) == len(set(found)) == 60


def test_failure_is_logged_once_a_pause(urls: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with Databases({"nowhere": NOWHERE}) as databases, caplog.at_level(logging.WARNING):
        for _ in range(100):
            assert databases.claim("w", LEASE) == []
    assert len([record for record in caplog.records if record.name == "gathering_pipeline.databases"]) == 1
