"""A database that a module shares, emptied before each test; each call is a transaction of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    RunRepository,
)
from gathering_pipeline.database import Database
from tests.support import shared as fixtures

shared, database_url, database, raw = fixtures.shared, fixtures.database_url, fixtures.database, fixtures.raw


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """Every call is its own transaction, as an executor has it."""
    with database.session(autocommit=True) as opened:
        yield opened


@pytest.fixture
def runs(session: Session) -> RunRepository:
    return RunRepository(session)
