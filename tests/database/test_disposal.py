"""Errors while a database is disposed."""

import asyncio

import pytest
from sqlalchemy import event, text

from gathering_pipeline import (
    Database,
)

pytestmark = pytest.mark.once


def test_dispose_error_is_raised(database: Database) -> None:
    async def use() -> None:
        async with database.async_session() as session:
            await session.execute(text("SELECT 1"))

    asyncio.run(use())

    @event.listens_for(database.async_engine.sync_engine, "engine_disposed")
    def fail(_engine: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.dispose()
