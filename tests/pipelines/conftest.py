"""A database that a module shares, emptied before each test."""

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from gathering_pipeline import (
    Database,
    PipelineRepository,
)
from tests.support import shared as fixtures

shared, database_url, database, raw = fixtures.shared, fixtures.database_url, fixtures.database, fixtures.raw


@pytest.fixture
def pipelines(session: Session) -> PipelineRepository:
    return PipelineRepository(session)


@pytest.fixture
def each(database: Database) -> Iterator[Session]:
    """A session in which every call is a transaction of its own."""
    with database.session(autocommit=True) as session:
        yield session
