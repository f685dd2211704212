"""The loops behind ``Database.listen`` and ``Database.alisten``: poll, wait, reconnect.

A listener keeps one connection so that a notification (off by default, see ``circle.notify_events``) can end its wait
early. It doesn't depend on notifications: behind a pooler that drops them, and on a standby, it polls.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from gathering_pipeline.arguments import check_duration
from gathering_pipeline.connections import check_asyncio
from gathering_pipeline.errors import DatabaseError, ForkedConnectionError, PipelineError, is_transient
from gathering_pipeline.events import PipelineEvent
from gathering_pipeline.repositories import AsyncEventRepository, EventRepository

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

logger = logging.getLogger(__name__)

Events = Generator[PipelineEvent, None, None]
AsyncEvents = AsyncGenerator[PipelineEvent, None]

POLL = timedelta(seconds=0.5)
PAGE = 500
PAUSE = 0.25
"""Seconds between attempts to get a new connection."""
LISTEN = "LISTEN circle_events"
ERRORS = (PipelineError, psycopg.Error, exc.DBAPIError, exc.TimeoutError)


class _Position:
    """State of a loop that outlives its connections: position in the events, and whether a read has succeeded."""

    def __init__(self, run_id: int | None, after: str | None, poll: timedelta) -> None:
        self.wait = check_duration(poll, "poll")
        self.arguments: dict[str, Any] = {"after": after, "limit": PAGE, "run_id": run_id}
        self.started = False
        self._pid = os.getpid()

    def check_process(self) -> None:
        """Raise in a forked child: parent and child would both process each event from here on."""
        if os.getpid() != self._pid:
            raise ForkedConnectionError

    def can_reconnect(self, error: Exception) -> bool:
        """Whether to reconnect after an error: a read has succeeded before, and the error may be temporary."""
        self.check_process()
        gone = isinstance(error, (DatabaseError, exc.TimeoutError)) or is_transient(error)
        broken = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
        if not (self.started and (gone or broken)):
            return False
        logger.warning("listening was interrupted and reconnects: %s", error)
        return True


def listen(engine: Engine, run_id: int | None, after: str | None, poll: timedelta) -> Events:
    """See ``Database.listen``."""
    position = _Position(run_id, after, poll)
    while True:
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                try:
                    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
                    with suppress(psycopg.errors.ReadOnlySqlTransaction):  # a standby
                        driver.execute(LISTEN)
                    while True:
                        with Session(connection) as session:
                            page = EventRepository(session).read(**position.arguments)
                        position.started = True
                        for event in page.items:
                            position.arguments["after"] = event.cursor
                            yield event
                            position.check_process()
                        position.arguments["after"] = page.next_cursor
                        if len(page.items) < PAGE:
                            for _ in driver.notifies(timeout=position.wait, stop_after=1):
                                pass
                finally:
                    connection.invalidate()  # don't return a LISTENing connection to the pool
        except ERRORS as error:
            if not position.can_reconnect(error):
                raise
        time.sleep(PAUSE)


async def alisten(engine: AsyncEngine, run_id: int | None, after: str | None, poll: timedelta) -> AsyncEvents:
    """See ``Database.alisten``."""
    check_asyncio()
    position = _Position(run_id, after, poll)
    while True:
        try:
            async with engine.connect() as connection:
                try:
                    await connection.execution_options(isolation_level="AUTOCOMMIT")
                    driver: psycopg.AsyncConnection[Any]
                    driver = (await connection.get_raw_connection()).driver_connection  # type: ignore[assignment]
                    with suppress(psycopg.errors.ReadOnlySqlTransaction):
                        await driver.execute(LISTEN)
                    while True:
                        async with AsyncSession(connection) as session:
                            page = await AsyncEventRepository(session).read(**position.arguments)
                        position.started = True
                        for event in page.items:
                            position.arguments["after"] = event.cursor
                            yield event
                            position.check_process()
                        position.arguments["after"] = page.next_cursor
                        if len(page.items) < PAGE:
                            async for _ in driver.notifies(timeout=position.wait, stop_after=1):
                                pass
                finally:
                    await connection.invalidate()
        except ERRORS as error:
            if not position.can_reconnect(error):
                raise
        await asyncio.sleep(PAUSE)
