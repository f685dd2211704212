"""A migration that is killed between two steps goes on."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from gathering_pipeline import (
    DatabaseUnavailableError,
    migrations,
)
from tests.support.adoption import rows_of_006
from tests.support.schema import catalog, revisions

pytestmark = pytest.mark.once  # a step commits or not; test_revisions.py runs each step on both servers


class KilledError(BaseException):
    """Raised in the place of the signal."""


def killed_after(step: int, url: str, action: Callable[[Engine], None]) -> bool:
    """Run something whose connection is gone after its n-th statement; whether there was one."""
    engine = create_engine(url, poolclass=NullPool)
    count = 0

    @event.listens_for(engine, "after_cursor_execute")
    def count_down(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal count
        count += not statement.lstrip().startswith(("SET ", "RESET ", "SELECT "))
        if count == step:
            connection.connection.dbapi_connection.close()  # type: ignore[union-attr]
            raise KilledError

    try:
        action(engine)
    # what is tidied up on the way out finds no connection
    except (KilledError, SQLAlchemyError, DatabaseUnavailableError):
        assert count >= step
        return True
    return False


def test_upgrade_interrupted_after_each_statement_resumes(
    url: str, used: psycopg.Connection, adopted_catalogs: dict[str, list[str]]
) -> None:
    """Killed after each step in turn, so that each is met in the state that it left behind itself, up and down."""
    rows = rows_of_006(used)
    kills = 0
    path = ["base", *revisions()]
    for target in path[1:]:
        step = 1
        while killed_after(step, url, lambda engine, to=target: migrations.upgrade(engine, to)):  # type: ignore[misc]
            step += 1
        assert catalog(url) == adopted_catalogs[target]
        kills += step - 1
    assert rows_of_006(used) == rows
    for target in reversed(path[:-1]):
        step = 1
        while killed_after(step, url, lambda engine, to=target: migrations.downgrade(engine, to)):  # type: ignore[misc]
            step += 1
        assert catalog(url) == adopted_catalogs[target]
        kills += step - 1
    assert rows_of_006(used) == rows
    assert kills > 80
