"""A database at head that the tests of a module share, emptied before each test, and the sessions that they keep.

A new session reads the catalog and compiles each function that it calls, which takes ten times as long as the call. A
folder takes the fixtures over in its ``conftest.py``. A test that changes its session makes a ``Database`` of its own;
what it changes in that of ``raw`` is discarded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy.engine import make_url

from gathering_pipeline.database import Database
from tests.support import databases
from tests.support.servers import connect

CHANGED_SETTINGS = """
SELECT name, setting FROM pg_settings
WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding', 'default_transaction_isolation')
    AND name !~ '^transaction' ORDER BY 1"""
"""Of a session, except those of its transaction, and what psycopg, PgBouncer and this package set."""


class Shared:
    """The database of a module.

    Attributes:
        url: Its URL.
        database: ``Database`` on it, through the pooler if there is one.
    """

    def __init__(self, url: str, database: Database) -> None:
        self.url = url
        self.database = database
        self._raw: psycopg.Connection | None = None

    @property
    def raw(self) -> psycopg.Connection:
        """An autocommit connection, never through a pooler."""
        if self._raw is None:
            self._raw = connect(self.url)
            self._raw.prepare_threshold = None  # psycopg doesn't notice that DISCARD drops what it has prepared
        return self._raw

    def discard(self) -> None:
        """Discard what a test has left in the session of ``raw``."""
        if self._raw is not None:
            with suppress(psycopg.OperationalError):  # a test may have ended it
                if self._raw.autocommit and self._raw.info.transaction_status is TransactionStatus.IDLE:
                    self._raw.execute("DISCARD ALL")
                    return
            self._raw.close()
            self._raw = None

    def renew(self) -> None:
        """Let a test find the session of ``raw`` as a new one, and an empty database."""
        self.discard()
        databases.delete_rows(self.raw)

    def close(self) -> None:
        """Close the sessions; those of ``database`` have to be as they were opened."""
        if self._raw is not None:
            self._raw.close()
        with self.database, self.database.engine.connect() as connection:
            changed = connection.exec_driver_sql(CHANGED_SETTINGS).all()
            assert changed == [], f"a test has changed the settings {changed} of a session that others use"


@pytest.fixture(scope="module")
def shared(module_database_url: str, pooler: str | None) -> Iterator[Shared]:
    url = module_database_url
    if pooler is not None:
        url = make_url(pooler).set(database=make_url(url).database).render_as_string()
    made = Shared(module_database_url, Database(url))
    yield made
    made.close()


@pytest.fixture
def database_url(shared: Shared) -> str:
    """The URL of the database, emptied."""
    shared.renew()
    return shared.url


@pytest.fixture
def database(shared: Shared, database_url: str) -> Database:
    """The one ``Database`` of a module."""
    return shared.database


@pytest.fixture
def raw(shared: Shared, database_url: str) -> psycopg.Connection:
    """A raw autocommit connection to the test's database (the one of ``database`` and ``session``)."""
    return shared.raw
