"""The tests that come with pytest-alembic."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from alembic.config import Config
from pytest_alembic.plugin.fixtures import alembic_runner  # noqa: F401 - a fixture
from pytest_alembic.runner import MigrationContext
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from gathering_pipeline import migrations

pytestmark = pytest.mark.once  # test_revisions.py runs each revision on both servers


@pytest.fixture
def alembic_config() -> Config:
    return migrations.config()


@pytest.fixture
def alembic_engine(empty_database_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.begin() as connection:
        # pytest-alembic asks for the current revision in a way that makes Alembic create its version table
        connection.execute(text("CREATE SCHEMA circle"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def of_pytest_alembic(pytestconfig: pytest.Config) -> ModuleType:
    # its tests bear a marker that its plugin, which is not loaded, would register
    pytestconfig.addinivalue_line("markers", "alembic: tests that come with pytest-alembic")
    from pytest_alembic import tests

    return tests


@pytest.mark.parametrize(
    "name",
    ["test_single_head_revision", "test_upgrade", "test_model_definitions_match_ddl", "test_up_down_consistency"],
)
def test_check_of_pytest_alembic_passes(
    name: str,
    of_pytest_alembic: ModuleType,
    alembic_runner: MigrationContext,  # noqa: F811
) -> None:
    assert sorted(of_pytest_alembic.__all__) == sorted(
        {"test_single_head_revision", "test_upgrade", "test_model_definitions_match_ddl", "test_up_down_consistency"}
    )
    getattr(of_pytest_alembic, name)(alembic_runner)
