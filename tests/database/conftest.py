"""A lock that a call waits for."""

import signal
from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.support.sessions import Blocker


@pytest.fixture
def blocker(
    raw: psycopg.Connection, connect: Callable[[str], psycopg.Connection], database_url: str
) -> Iterator[Callable[[], Blocker]]:
    # Python leaves SIGINT ignored where it is started so, as in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: Blocker(raw, connect, database_url)
    signal.signal(signal.SIGINT, before)
