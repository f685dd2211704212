"""Connections: servers that can't be used, timeouts, settings."""

import asyncio
import os
import re
import signal
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from gathering_pipeline import embedded
from gathering_pipeline.connections import connect_arguments
from gathering_pipeline.database import Database
from gathering_pipeline.errors import (
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    PipelineError,
    is_transient,
)
from gathering_pipeline.settings import DatabaseSettings
from tests.support import servers
from tests.support.servers import Server

QUICK = DatabaseSettings(connect_timeout=timedelta(seconds=2), answer_timeout=timedelta(seconds=1))


@pytest.mark.parametrize("name", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
def test_explicit_url_overrides_empty_variable(name: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with Database(database_url) as database:
        database.check()
    with pytest.raises(ConfigurationError, match=f"^{name} can't be used: it is empty"):
        Database()


def test_database_repr_hides_password(database_url: str) -> None:
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


def test_connect_without_server_raises_unavailable() -> None:
    for attempt in _both("postgresql://localhost:1/name"):
        with pytest.raises(
            DatabaseUnavailableError, match="^no answer from the PostgreSQL server at localhost:1: start it"
        ):
            attempt()


def test_connect_with_unknown_option_raises_configuration() -> None:
    for attempt in _both("postgresql://localhost:1/name?nonsense=1"):
        with pytest.raises(ConfigurationError, match='^the database URL can\'t be used: .*"nonsense"$'):
            attempt()


def test_connect_to_missing_database_raises_configuration(server: Server) -> None:
    for attempt in _both(server.database_url("nowhere")):
        with pytest.raises(ConfigurationError, match=r'refuses the connection \(database "nowhere" does not exist\)'):
            attempt()


def test_connect_with_wrong_password_raises_configuration(server: Server) -> None:
    if make_url(server.url).password is None:
        pytest.skip("this server asks for no password")
    url = make_url(server.url).set(username="gathering_test_nobody", password="hunter2")
    for attempt in _both(url.render_as_string(hide_password=False)):
        with pytest.raises(ConfigurationError, match="correct the URL's user, password, database or options") as caught:
            attempt()
        assert "hunter2" not in str(caught.value)


def test_connect_beyond_connection_limit_raises_unavailable(server: Server, admin: psycopg.Connection) -> None:
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


@contextmanager
def _refusing_server(message: str) -> Iterator[int]:
    """The port of a server that refuses every connection with an error."""

    class Refusal(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                size, code = struct.unpack("!ii", self.request.recv(8))
                if code in (80877103, 80877104):  # asks for encryption
                    self.request.sendall(b"N")
                    continue
                self.request.recv(size - 8)
                fields = b"".join(
                    f"{key}{value}\0".encode()
                    for key, value in {"S": "FATAL", "M": message, "D": "A detail.", "H": "A hint."}.items()
                )
                self.request.sendall(b"E" + struct.pack("!i", len(fields) + 5) + fields + b"\0")
                return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


REFUSALS = {
    "the database system is starting up": DatabaseUnavailableError,
    "the database system is shutting down": DatabaseUnavailableError,
    "the database system is not yet accepting connections": DatabaseUnavailableError,
    "the database system is in recovery mode": DatabaseUnavailableError,
    "terminating connection due to administrator command": DatabaseUnavailableError,
    "das Datenbanksystem startet": DatabaseUnavailableError,
    "server login has been failing, try again later (server_login_retry)": DatabaseUnavailableError,
    "sorry, too many clients already": DatabaseUnavailableError,
    'password authentication failed for user "u"': ConfigurationError,
    'role "u" does not exist': ConfigurationError,
    'database "d" does not exist': ConfigurationError,
    'no pg_hba.conf entry for host "h", user "u", database "d", no encryption': ConfigurationError,
    'permission denied for database "d"': ConfigurationError,
    'role "u" is not permitted to log in': ConfigurationError,
    "no such database: d": ConfigurationError,
    'invalid value for parameter "statement_timeout": "99999999999"': ConfigurationError,
    'unrecognized configuration parameter "nonsense"': ConfigurationError,
    "invalid command-line argument for server process: postgres": ConfigurationError,
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refused_connection_is_configuration_only_where_that_is_sure(message: str) -> None:
    with _refusing_server(message) as port:
        for attempt in _both(f"postgresql://u@127.0.0.1:{port}/d"):
            with pytest.raises(DatabaseError, match=re.escape(message)) as caught:
                attempt()
            assert type(caught.value) is REFUSALS[message]
            assert is_transient(caught.value) is (REFUSALS[message] is DatabaseUnavailableError)


def test_refusal_after_a_connection_is_unavailable(server: Server) -> None:
    name = server.create()
    with Database(server.database_url(name)) as database:
        with database.session() as session:
            session.execute(text("SELECT 1"))
        server.drop(name)
        with pytest.raises(DatabaseUnavailableError, match="does not exist"), database.session() as session:
            session.execute(text("SELECT 1"))


def test_calls_while_the_server_restarts_are_transient(own_server: embedded.EmbeddedServer) -> None:
    """Also of a Database that was never connected before."""
    stop, failures = threading.Event(), list[BaseException]()

    def call() -> None:
        while not stop.is_set():
            try:
                for attempt in _both(own_server.url):
                    attempt()
            except (PipelineError, OperationalError) as error:
                failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for mode in ("fast", "immediate", "fast"):
        servers.restart(own_server, mode)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures
    lasting = [error for error in failures if not is_transient(error)]
    if lasting:
        raise lasting[0]


def test_connect_to_other_encoding_raises_configuration(server: Server, admin: psycopg.Connection) -> None:
    name = f"gathering_test_{os.getpid()}_latin"
    admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'".encode())
    try:
        for attempt in _both(server.database_url(name)):
            with pytest.raises(ConfigurationError, match="encoding is LATIN1: create it with ENCODING 'UTF8'"):
                attempt()
    finally:
        server.drop(name)


def test_connect_to_old_server_raises_configuration(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gathering_pipeline.connections.OLDEST_SERVER", 99)
    for attempt in _both(database_url):
        with pytest.raises(ConfigurationError, match=r"^the server is PostgreSQL \d+: 99 or later is needed"):
            attempt()


def test_session_after_broken_connection_gets_a_new_one(database: Database, raw: psycopg.Connection) -> None:
    with pytest.raises(OperationalError), database.session() as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        raw.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        session.execute(text("INSERT INTO circle.pipelines (name) VALUES ('lost')"))
    with database.session() as session:
        assert session.execute(text("SELECT count(*) FROM circle.pipelines")).scalar_one() == 0


def test_slow_statement_outlasts_answer_timeout(database_url: str) -> None:
    with Database(database_url, settings=QUICK) as database, database.session() as session:
        assert session.execute(text("SELECT 'done' FROM pg_sleep(3)")).scalar_one() == "done"


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


def test_statement_on_hanging_server_raises_unavailable(own_server: embedded.EmbeddedServer) -> None:
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
                assert beats > 5  # the loop went on meanwhile
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


def test_many_calls_on_a_hanging_server_share_a_probe(own_server: embedded.EmbeddedServer) -> None:
    """The event loop, and so every heartbeat, goes on."""
    probes = list[int]()

    async def use(database: Database) -> None:
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(database.async_session()) for _ in range(20)]
            for session in sessions:
                await session.execute(text("SELECT 1"))
            with _frozen(own_server):
                start = previous = time.monotonic()
                longest = 0.0
                calls = [asyncio.ensure_future(session.execute(text("SELECT 2"))) for session in sessions]
                while not all(call.done() for call in calls):
                    await asyncio.sleep(0.02)
                    longest, previous = max(longest, time.monotonic() - previous), time.monotonic()
                    probes.append(sum(thread.name == "probe of a server" for thread in threading.enumerate()))
                failures = await asyncio.gather(*calls, return_exceptions=True)
                assert time.monotonic() - start < 15
                assert {type(failure) for failure in failures} == {OperationalError}
                assert longest < 2
            for session in sessions:
                await session.rollback()
        await database.adispose()

    with Database(own_server.url, settings=QUICK.model_copy(update={"pool_size": 20})) as database:
        asyncio.run(use(database))
    assert max(probes) == 1


def test_settings_reach_the_session(database_url: str) -> None:
    settings = DatabaseSettings(
        database_url=SecretStr(database_url), pool_size=1, statement_timeout=timedelta(seconds=1)
    )
    with Database(settings=settings) as database, database.session() as session:
        assert session.execute(text("SHOW statement_timeout")).scalar_one() == "1s"
        assert session.execute(text("SHOW application_name")).scalar_one() == "gathering_pipeline"
        assert session.execute(text("SHOW client_encoding")).scalar_one() == "UTF8"


def test_url_options_are_merged_with_settings(database_url: str) -> None:
    url = make_url(database_url).update_query_dict({"options": "-c work_mem=1MB"}).render_as_string(hide_password=False)
    settings = DatabaseSettings(statement_timeout=timedelta(seconds=1))
    with Database(url, settings=settings) as database, database.session() as session:
        assert session.execute(text("SHOW statement_timeout")).scalar_one() == "1s"
        assert session.execute(text("SHOW work_mem")).scalar_one() == "1MB"


@pytest.mark.parametrize("libpqs", [True, False])
def test_url_with_several_hosts_takes_one_that_serves(database_url: str, libpqs: bool) -> None:
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


def test_async_connections_are_disposed_from_other_loop(database: Database) -> None:
    async def use() -> None:
        async with database.async_session() as session:
            await session.execute(text("SELECT 1"))
        database.dispose()

    asyncio.run(use())


@pytest.mark.parametrize("hosts", ["h", "h,i,j", "?host=h:1&host=i:2&host=j:3", "?host=h,i,j"])
def test_hosts_of_a_url_share_the_time_to_connect(hosts: str) -> None:
    settings = DatabaseSettings(connect_timeout=timedelta(seconds=6))
    url = make_url(f"postgresql://{hosts}/d" if "?" not in hosts else f"postgresql:///d{hosts}")
    assert connect_arguments(url, settings)["connect_timeout"] == (6 if hosts == "h" else 2)
