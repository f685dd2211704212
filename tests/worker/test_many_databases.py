"""One worker for several databases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from itertools import cycle

import pytest

from gathering_pipeline import AsyncRunRepository, ClaimedRun, Database, InvalidDataError, NodeContext, RunStatus
from tests.support.servers import Server
from tests.support.workers import made, new_run, outcome, run_once


class Turns:
    """Claims from one database after the other, as ``Databases`` does."""

    def __init__(self, **databases: Database) -> None:
        self._databases = databases
        self._names = cycle(databases)

    def __getitem__(self, name: str, /) -> Database:
        return self._databases[name]

    async def aclaim(self, worker_id: str, lease: timedelta, limit: int = 1) -> list[tuple[str, ClaimedRun]]:
        for _ in self._databases:
            name = next(self._names)
            async with self[name].async_session(autocommit=True) as session:
                if claimed := await AsyncRunRepository(session).claim(worker_id, lease, limit):
                    return [(name, run) for run in claimed]
        return []

    async def adispose(self) -> None:
        await asyncio.gather(*(database.adispose() for database in self._databases.values()))


@pytest.fixture
def other_database(server: Server, template: str) -> Iterator[Database]:
    name = server.create(template)
    with Database(server.database_url(name)) as database:
        yield database
    server.drop(name)


def test_worker_of_two_databases_executes_the_runs_of_both(database: Database, other_database: Database) -> None:
    run_ids = [new_run(database, "a>b") for _ in range(3)]
    other_ids = [new_run(other_database, "c>d") for _ in range(3)]
    assert run_ids == other_ids  # and the pipelines' ids are the same, with other graphs
    seen: list[tuple[int, str]] = []

    async def handle(context: NodeContext) -> None:
        seen.append((context.run.id, context.node.id))

    run_once(made(Turns(a=database, b=other_database), handle))
    for each in (database, other_database):
        assert {outcome(each, run_id)[0].status for run_id in run_ids} == {RunStatus.COMPLETED}
    assert sorted(seen) == sorted((run_id, node_id) for run_id in run_ids for node_id in "abcd")


def test_pipelines_of_many_databases_are_refused(database: Database) -> None:
    with pytest.raises(InvalidDataError, match="pipelines are those of one Database"):
        made(Turns(a=database), lambda _: None, pipelines=[1])
