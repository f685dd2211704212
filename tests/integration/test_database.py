import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
import pytest
from psycopg.abc import PQGen
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, ProgrammingError

from gathering_pipeline import embedded, migrations
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    CommitIndeterminateError,
    ConfigurationError,
    DatabaseUnavailableError,
    SchemaRevisionError,
)
from gathering_pipeline.settings import DatabaseSettings
from tests.servers import Server, connect

INSERT = text("INSERT INTO circle.pipelines (name) VALUES (:name) RETURNING id")
COUNT = text("SELECT count(*) FROM circle.pipelines")
QUICK = DatabaseSettings(connect_timeout=timedelta(seconds=2), answer_timeout=timedelta(seconds=1))


def test_a_session_commits_when_its_block_ends_well_and_rolls_back_otherwise(
    database: Database, raw: psycopg.Connection
) -> None:
    with database.session() as session:
        session.execute(INSERT, {"name": "kept"})
    with pytest.raises(ZeroDivisionError), database.session() as session:
        session.execute(INSERT, {"name": "lost"})
        raise ZeroDivisionError
    assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("kept",)]


def test_so_does_an_async_one(database: Database, raw: psycopg.Connection) -> None:
    async def use() -> None:
        async with database:
            async with database.async_session() as session:
                await session.execute(INSERT, {"name": "kept"})
            with pytest.raises(ZeroDivisionError):
                async with database.async_session() as session:
                    await session.execute(INSERT, {"name": "lost"})
                    raise ZeroDivisionError
            async with database.async_session(autocommit=True) as session:
                assert (await session.execute(COUNT)).scalar_one() == 1

    asyncio.run(use())
    assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("kept",)]


def _messages_of(trace: Path) -> list[str]:
    """What libpq sent, by the name of the message; its trace has a line a message: F for what the frontend sends."""
    lines = [line.split("\t") for line in trace.read_text().splitlines()]
    return [fields[2] for fields in lines if fields[0] == "F"]


@pytest.mark.parametrize("prepared", [True, False])
def test_autocommit_sends_one_message_a_call_and_nothing_else(
    database_url: str, tmp_path: Path, prepared: bool
) -> None:
    settings = DatabaseSettings(pool_size=1, prepare_threshold=0 if prepared else None)
    with Database(database_url, settings=settings) as database:
        with database.session(autocommit=True) as session:
            session.execute(INSERT, {"name": "prepare it"})
            driver = session.connection().connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
        with (tmp_path / "trace").open("w") as trace:
            driver.pgconn.trace(trace.fileno())
            driver.pgconn.set_trace_flags(psycopg.pq.Trace.SUPPRESS_TIMESTAMPS)
            for _ in range(2):  # the connection goes back to the pool in between
                with database.session(autocommit=True) as session:
                    session.execute(INSERT, {"name": "a"})
                    session.execute(INSERT, {"name": "b"})
            driver.pgconn.untrace()
        call = ["Bind", "Describe", "Execute", "Sync"]
        assert _messages_of(tmp_path / "trace") == (call if prepared else ["Parse", *call]) * 4


def test_what_autocommit_did_stays_done(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(ZeroDivisionError), database.session(autocommit=True) as session:
        session.execute(INSERT, {"name": "kept"})
        raise ZeroDivisionError
    with database.session() as session:  # the next user of the connection has transactions again
        session.execute(INSERT, {"name": "uncommitted"})
        assert raw.execute("SELECT name FROM circle.pipelines").fetchall() == [("kept",)]
        session.rollback()


def test_an_error_at_commit_is_the_databases_own(database: Database, raw: psycopg.Connection) -> None:
    raw.execute("CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO late VALUES (1)")
    with pytest.raises(Exception, match="late_id_key") as caught, database.session() as session:
        session.execute(text("INSERT INTO late VALUES (1)"))
    assert caught.type.__name__ == "IntegrityError"


def test_upgrade_and_check(empty_database_url: str, connect: Callable[[str], psycopg.Connection]) -> None:
    with Database(empty_database_url) as database:
        with pytest.raises(
            SchemaRevisionError, match=r"at revision none, this code needs \w+: run 'alembic upgrade head'"
        ):
            database.check()
        found = connect(empty_database_url).execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'circle'")
        assert found.fetchone() == (0,)  # it only looked
        database.upgrade("007_pipeline_execution")
        with pytest.raises(SchemaRevisionError) as caught:
            database.check()
        assert (caught.value.found, caught.value.expected) == ("007_pipeline_execution", migrations.head())
        database.upgrade()
        database.check()


def test_the_upgrade_by_the_direct_url_has_the_settings_of_the_database(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unused = SecretStr("postgresql://nobody@127.0.0.1:1/pooler")
    settings = DatabaseSettings(database_url=unused, migration_url=SecretStr(empty_database_url))
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("GATHERING_POOL_SIZE", "not read")
    with Database(settings=settings) as database:
        database.upgrade()
    with Database(empty_database_url, settings=settings) as database:
        database.check()


def test_upgrade_takes_the_direct_url(
    empty_database_url: str, connect: Callable[[str], psycopg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATHERING_MIGRATION_URL", empty_database_url)
    monkeypatch.setenv("GATHERING_DATABASE_URL", "postgresql://localhost:1/unused")
    Database().upgrade()
    raw = connect(empty_database_url)
    assert raw.execute("SELECT version_num FROM circle.alembic_version").fetchall() == [(migrations.head(),)]


@pytest.mark.parametrize("name", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
def test_a_url_that_is_given_goes_before_an_empty_variable(
    name: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    with Database(database_url) as database:
        database.check()
    with pytest.raises(ConfigurationError, match=f"^{name} can't be used: it is empty"):
        Database()


def test_no_password_in_any_view_of_it(database_url: str) -> None:
    url = make_url(database_url).set(username="u", password="hunter2", host="h")
    database = Database(url.render_as_string(hide_password=False))
    assert "hunter2" not in f"{database!r} {database.url} {database.settings!r} {database.engine!r}"


def _both(url: str, settings: DatabaseSettings = QUICK) -> Iterator[Callable[[], Any]]:
    """Connect by the sync and by the async engine."""

    def sync() -> None:
        with Database(url, settings=settings) as database, database.session() as session:
            session.execute(text("SELECT 1"))

    async def asynchronous() -> None:
        async with Database(url, settings=settings) as database, database.async_session() as session:
            await session.execute(text("SELECT 1"))

    yield sync
    yield lambda: asyncio.run(asynchronous())


def test_a_server_that_is_not_there() -> None:
    for attempt in _both("postgresql://localhost:1/name"):
        with pytest.raises(
            DatabaseUnavailableError, match="^no answer from the PostgreSQL server at localhost:1: start it"
        ):
            attempt()


def test_an_option_that_is_none() -> None:
    for attempt in _both("postgresql://localhost:1/name?nonsense=1"):
        with pytest.raises(ConfigurationError, match='^the database URL can\'t be used: .*"nonsense"$'):
            attempt()


def test_a_database_that_is_not_there(server: Server) -> None:
    for attempt in _both(server.database_url("nowhere")):
        with pytest.raises(ConfigurationError, match=r'refuses the connection \(database "nowhere" does not exist\)'):
            attempt()


def test_a_wrong_password(server: Server) -> None:
    url = make_url(server.url)
    if url.password is None:
        pytest.skip("this server asks for no password")
    for attempt in _both(url.set(password="hunter2").render_as_string(hide_password=False)):
        with pytest.raises(ConfigurationError, match="correct the URL's user, password or database") as caught:
            attempt()
        assert "hunter2" not in str(caught.value)


def test_too_many_connections_pass_by_themselves(server: Server, admin: psycopg.Connection) -> None:
    name = server.create()
    admin.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0'.encode())
    admin.execute("DROP ROLE IF EXISTS gathering_test_plain")
    admin.execute("CREATE ROLE gathering_test_plain LOGIN PASSWORD 'plain'")
    url = make_url(server.database_url(name)).set(username="gathering_test_plain", password="plain")
    try:
        for attempt in _both(url.render_as_string(hide_password=False)):
            with pytest.raises(DatabaseUnavailableError, match="has no free connection .* try again"):
                attempt()
    finally:
        server.drop(name)
        admin.execute("DROP ROLE gathering_test_plain")


def test_another_encoding(server: Server, admin: psycopg.Connection) -> None:
    name = f"gathering_test_{os.getpid()}_latin"
    admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'".encode())
    try:
        for attempt in _both(server.database_url(name)):
            with pytest.raises(ConfigurationError, match="encoding is LATIN1: create it with ENCODING 'UTF8'"):
                attempt()
    finally:
        server.drop(name)


def test_an_old_server(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gathering_pipeline.database.OLDEST_SERVER", 99)
    for attempt in _both(database_url):
        with pytest.raises(ConfigurationError, match=r"^the server is PostgreSQL \d+: 99 or later is needed"):
            attempt()


def test_a_broken_connection_is_replaced(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(OperationalError), database.session() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        session.execute(INSERT, {"name": "lost"})
    with database.session() as session:
        assert session.execute(COUNT).scalar_one() == 0


def test_a_connection_that_breaks_at_the_commit_leaves_it_open(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(CommitIndeterminateError, match="the connection broke during the commit"):
        with database.session() as session:
            pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def test_a_slow_statement_goes_on_while_the_server_answers(database_url: str) -> None:
    with Database(database_url, settings=QUICK) as database, database.session() as session:
        assert session.execute(text("SELECT 'done' FROM pg_sleep(3)")).scalar_one() == "done"


def test_errors_of_statements_pass_as_they_are(database: Database) -> None:
    with pytest.raises(ProgrammingError), database.session() as session:
        session.execute(text("SELECT 1 FROM nothing"))


# What follows does harm to a server, so that each has one of its own.


@pytest.fixture
def own_server() -> Iterator[embedded.EmbeddedServer]:
    with tempfile.TemporaryDirectory(prefix="gathering-test-") as folder:
        running = embedded.start(Path(folder) / "data")
        try:
            yield running
        finally:
            running.stop()


@contextmanager
def _frozen(server: embedded.EmbeddedServer) -> Iterator[None]:
    """Stop all of a server's processes, as a machine that hangs does; the kernel goes on taking what is sent."""
    postmaster = psutil.Process(int((server.data_dir / "postmaster.pid").read_text().split()[0]))
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def test_a_server_that_hangs_is_noticed(own_server: embedded.EmbeddedServer) -> None:
    async def use(database: Database) -> None:
        async with database.async_session() as session:
            await session.execute(text("SELECT 1"))
            with _frozen(own_server):
                start, beats = time.monotonic(), 0
                call = asyncio.ensure_future(session.execute(text("SELECT 2")))
                while not call.done():
                    await asyncio.sleep(0.05)
                    beats += 1
                with pytest.raises(OperationalError, match="no sign of life"):
                    await call
                assert time.monotonic() - start < 10
                assert beats > 20  # the loop went on meanwhile
            await session.rollback()
        await database.adispose()

    with Database(own_server.url, settings=QUICK) as database:
        with database.session() as session:
            session.execute(text("SELECT 1"))
            with _frozen(own_server):
                start = time.monotonic()
                with pytest.raises(OperationalError, match="no sign of life"):
                    session.execute(text("SELECT 2"))
                with pytest.raises(DatabaseUnavailableError, match="no answer from"), database.session() as other:
                    other.execute(text("SELECT 3"))
                assert time.monotonic() - start < 15
            session.rollback()
        asyncio.run(use(database))
        with database.session() as session:
            assert session.execute(text("SELECT 4")).scalar_one() == 4


def _cancel_a_waiting_commit(url: str) -> threading.Thread:
    """As an operator does who sees a commit hang because the standby is gone."""

    def cancel() -> None:
        with connect(url) as raw:
            waiting: list[Any] = []
            while not waiting:
                waiting = raw.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchall()
            for (pid,) in waiting:
                raw.execute("SELECT pg_cancel_backend(%s)", [pid])

    thread = threading.Thread(target=cancel)
    thread.start()
    return thread


def _interrupt_an_unconfirmed_commit(database: Database, url: str) -> None:
    """Nor does the next statement answer for a commit whose caller was interrupted when the server's word was there."""

    def interrupted(steps: PQGen[None]) -> PQGen[None]:
        yield from steps
        raise KeyboardInterrupt

    with database.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        driver.execute("INSERT INTO t VALUES (1)")
        canceller = _cancel_a_waiting_commit(url)
        with pytest.raises(KeyboardInterrupt):
            driver.wait(interrupted(driver._commit_gen()))
        canceller.join()
        assert driver.execute("SELECT 1").fetchall() == [(1,)]


def test_a_commit_that_no_standby_confirmed_is_no_success(own_server: embedded.EmbeddedServer) -> None:
    async def insert(database: Database, *, autocommit: bool) -> None:
        async with database.async_session(autocommit=autocommit) as session:
            await session.execute(text("INSERT INTO t VALUES (1)"))

    def insert_sync(database: Database, *, autocommit: bool) -> None:
        with database.session(autocommit=autocommit) as session:
            session.execute(text("INSERT INTO t VALUES (1)"))

    async def run(action: Coroutine[Any, Any, None], database: Database) -> None:
        try:
            await action
        finally:
            await database.adispose()

    with connect(own_server.url) as raw:
        raw.execute("CREATE TABLE t (id int)")
        raw.execute("SET synchronous_commit = local")
        raw.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        raw.execute("SELECT pg_reload_conf()")
        time.sleep(0.5)
        try:
            with Database(own_server.url) as database:
                for autocommit in (False, True):
                    canceller = _cancel_a_waiting_commit(own_server.url)
                    with pytest.raises(CommitIndeterminateError, match="its standby did not confirm it"):
                        insert_sync(database, autocommit=autocommit)
                    canceller.join()
                    canceller = _cancel_a_waiting_commit(own_server.url)
                    with pytest.raises(CommitIndeterminateError, match="its standby did not confirm it"):
                        asyncio.run(run(insert(database, autocommit=autocommit), database))
                    canceller.join()
                _interrupt_an_unconfirmed_commit(database, own_server.url)
                with database.session() as session:  # the connection is as good as before
                    session.execute(text("SET LOCAL synchronous_commit = local"))
                    assert session.execute(text("SELECT count(*) FROM t")).scalar_one() == 5
        finally:
            raw.execute("ALTER SYSTEM RESET synchronous_standby_names")
            raw.execute("SELECT pg_reload_conf()")


def test_settings_of_a_database(database_url: str) -> None:
    settings = DatabaseSettings(
        database_url=SecretStr(database_url), pool_size=1, statement_timeout=timedelta(seconds=1)
    )
    with Database(settings=settings) as database, database.session() as session:
        assert session.execute(text("SHOW statement_timeout")).scalar_one() == "1s"
        assert session.execute(text("SHOW application_name")).scalar_one() == "gathering_pipeline"
        assert session.execute(text("SHOW client_encoding")).scalar_one() == "UTF8"


def test_options_of_the_url_are_merged_with_the_settings(database_url: str) -> None:
    url = make_url(database_url).update_query_dict({"options": "-c work_mem=1MB"}).render_as_string(hide_password=False)
    settings = DatabaseSettings(statement_timeout=timedelta(seconds=1))
    with Database(url, settings=settings) as database, database.session() as session:
        assert session.execute(text("SHOW statement_timeout")).scalar_one() == "1s"
        assert session.execute(text("SHOW work_mem")).scalar_one() == "1MB"


@pytest.mark.parametrize("libpqs", [True, False])
def test_of_several_hosts_one_that_serves_is_taken(database_url: str, libpqs: bool) -> None:
    url = make_url(database_url)
    host, port = str(url.query.get("host", url.host)), url.query.get("port", url.port or 5432)
    user = "postgres" if url.password is None else f"postgres:{url.password}"
    several = (
        f"postgresql://{user}@localhost:1,{quote(host, safe='')}:{port}/{url.database}?"
        if libpqs
        else f"postgresql://{user}@/{url.database}?host=localhost:1&host={quote(host, safe='')}:{port}&"
    )
    for attempt in _both(f"{several}target_session_attrs=read-write"):
        attempt()


def test_async_connections_can_be_disposed_from_anywhere(database: Database) -> None:
    async def use() -> None:
        async with database.async_session() as session:
            await session.execute(text("SELECT 1"))
        database.dispose()

    asyncio.run(use())
