"""A database that a module shares, emptied before each test."""

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import make_url

from gathering_pipeline.database import Database
from tests.support import shared as fixtures

shared, database_url, database, raw = fixtures.shared, fixtures.database_url, fixtures.database, fixtures.raw


@pytest.fixture(scope="module", params=["origin", "replica"])
def in_role(module_database_url: str, request: pytest.FixtureRequest) -> Iterator[tuple[str, fixtures.Shared]]:
    """The role of a session's writes, and the module's database with sessions in that role."""
    url = make_url(module_database_url).update_query_dict({"options": f"-csession_replication_role={request.param}"})
    as_text = url.render_as_string(hide_password=False)
    made = fixtures.Shared(as_text, Database(as_text))
    yield request.param, made
    made.close()
