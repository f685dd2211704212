"""A TCP proxy before a server, which does to its connections what networks do."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from queue import Empty, SimpleQueue

from sqlalchemy.engine import URL, make_url


class Fault(StrEnum):
    """What happens to the connections: to those that are open, and to new ones as long as it lasts.

    Attributes:
        NONE: Nothing.
        SILENT: The network is cut: nothing arrives at either end, and nothing is refused.
        DEAF: What callers send arrives, and the answers are lost.
        HALF_OPEN: The server's ends are closed, and the callers aren't told.
        RESET: They are reset.
        ENDED: They are closed.
    """

    NONE = "none"
    SILENT = "silent"
    DEAF = "deaf"
    HALF_OPEN = "half-open"
    RESET = "reset"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class _Link:
    """A caller's connection and that to the server."""

    client: socket.socket
    server: socket.socket | None
    calls_are_lost: bool = False
    answers_are_lost: bool = False
    left: int | None = None  # bytes of answers before the link is cut


class Proxy:
    """A proxy on 127.0.0.1, in a thread of its own.

    Attributes:
        port: Its port.
    """

    def __init__(self, upstream: URL) -> None:
        self._host = str(upstream.query.get("host") or upstream.host or "127.0.0.1")
        self._server_port = int(str(upstream.query.get("port") or upstream.port or 5432))
        self._fault = Fault.NONE
        self._links: dict[socket.socket, _Link] = {}
        self._commands: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- what tests do ---

    @contextmanager
    def during(self, fault: Fault) -> Iterator[None]:
        """Let a fault last for a block."""
        self.begin(fault)
        try:
            yield
        finally:
            self.begin(Fault.NONE)

    def begin(self, fault: Fault) -> None:
        """Begin a fault, or end one."""

        def apply() -> None:
            self._fault = fault
            for link in set(self._links.values()):
                self._hit(link)
                if fault is Fault.NONE and (link.calls_are_lost or link.answers_are_lost):
                    self._end(link, reset=True)  # as the other end answers once it can, which knows of no connection

        self._command(apply)

    def cut_after(self, size: int) -> None:
        """Cut each connection that is open now once so many bytes of answers have passed."""

        def apply() -> None:
            for link in self._links.values():
                link.left = size

        self._command(apply)

    def close(self) -> None:
        self._command(lambda: setattr(self, "_closed", True))
        self._thread.join(10)

    # --- its thread ---

    def _command(self, action: Callable[[], None]) -> None:
        done = threading.Event()
        self._commands.put((action, done))
        assert done.wait(10), "the proxy hangs"

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(0.01):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._links:  # not closed by what came before it
                    self._forward(key.fileobj, self._links[key.fileobj])
            with suppress(Empty):
                while True:
                    action, done = self._commands.get_nowait()
                    action()
                    done.set()
        for link in set(self._links.values()):
            self._end(link)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        link = _Link(client, None if self._fault is Fault.SILENT else self._connect())
        for end in (link.client, link.server):
            if end is not None:
                self._links[end] = link
                self._selector.register(end, selectors.EVENT_READ)
        if link.server is None and self._fault is not Fault.SILENT:  # the server takes none
            self._end(link)
        else:
            self._hit(link)

    def _connect(self) -> socket.socket | None:
        with suppress(OSError):
            if not self._host.startswith("/"):
                return socket.create_connection((self._host, self._server_port), timeout=10)
            server = socket.socket(socket.AF_UNIX)
            server.settimeout(10)
            try:
                server.connect(f"{self._host}/.s.PGSQL.{self._server_port}")
            except OSError:
                server.close()
                raise
            return server
        return None

    def _hit(self, link: _Link) -> None:
        if self._fault in (Fault.RESET, Fault.ENDED):
            self._end(link, reset=self._fault is Fault.RESET)
        if self._fault in (Fault.SILENT, Fault.HALF_OPEN):
            link.calls_are_lost = link.answers_are_lost = True
        if self._fault is Fault.DEAF:
            link.answers_are_lost = True
        if self._fault is Fault.HALF_OPEN and link.server is not None:
            self._drop(link.server)
            link.server = None

    def _forward(self, source: socket.socket, link: _Link) -> None:
        from_client = source is link.client
        target = link.server if from_client else link.client
        lost = link.calls_are_lost if from_client else link.answers_are_lost
        try:
            data = source.recv(65536)
            if not data:
                raise ConnectionError
            if not from_client and link.left is not None:
                data, link.left = data[: link.left], max(link.left - len(data), 0)
            if target is not None and not lost:
                target.sendall(data)
        except OSError:
            if from_client or not lost:
                self._end(link)
            else:  # the caller isn't told
                self._drop(source)
                link.server = None
            return
        if link.left == 0:
            self._end(link)

    def _end(self, link: _Link, *, reset: bool = False) -> None:
        for end in (link.client, link.server):
            if end is not None and end in self._links:
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        self._selector.unregister(end)
        del self._links[end]
        end.close()


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before a server, and the URL that leads through it."""
    upstream = make_url(url)
    proxy = Proxy(upstream)
    user, password = upstream.username or "postgres", upstream.password
    through = URL.create("postgresql+psycopg", user, password, "127.0.0.1", proxy.port, upstream.database)
    try:
        yield proxy, through.render_as_string(hide_password=False)
    finally:
        proxy.close()
