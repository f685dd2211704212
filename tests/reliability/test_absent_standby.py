"""A synchronous standby that is absent: no answer may confirm what a failover would lose, neither the first nor a later one.

A call whose commit was interrupted while it waited for the standby is stored on the primary. The same call again finds it,
and has to wait as well.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from gathering_pipeline import (
    AsyncRunRepository,
    ClaimedRun,
    CommitIndeterminateError,
    Database,
    RunRepository,
    migrations,
)
from gathering_pipeline.embedded import EmbeddedServer
from tests.support import servers, standbys
from tests.support.runs import LEASE, done, store
from tests.support.standbys import CANCELLED, TERMINATED


@dataclass
class Stored:
    """What is there before the standby is absent."""

    pipeline: int
    claimed: dict[str, ClaimedRun]
    failed: int


# Calls that repeat themselves; each kind has a run of its own.
CALLS: dict[str, Callable[..., Any]] = {
    "create": lambda runs, at: runs.create(at.pipeline, idempotency_key="create"),
    "create unless live": lambda runs, at: runs.create(at.pipeline, unless_live=True),
    "record_run": lambda runs, at: runs.record_run(at.pipeline, [done("a"), done("b")], idempotency_key="record"),
    "start": lambda runs, at: runs.start(at.claimed["start"].id, token=at.claimed["start"].token),
    "start_node": lambda runs, at: runs.start_node(
        at.claimed["start_node"].id, "a", token=at.claimed["start_node"].token
    ),
    "complete_node": lambda runs, at: runs.complete_node(
        at.claimed["complete_node"].id, "a", {"x": 1}, token=at.claimed["complete_node"].token
    ),
    "skip_node": lambda runs, at: runs.skip_node(at.claimed["skip_node"].id, "a", token=at.claimed["skip_node"].token),
    "fail_node": lambda runs, at: runs.fail_node(
        at.claimed["fail_node"].id, "a", "no", retryable=False, token=at.claimed["fail_node"].token
    ),
    "advance": lambda runs, at: runs.advance(at.claimed["advance"].id, token=at.claimed["advance"].token),
    "advance with a result": lambda runs, at: runs.advance(
        at.claimed["result"].id, [done("a")], token=at.claimed["result"].token
    ),
    "advance to the end": lambda runs, at: runs.advance(
        at.claimed["end"].id, [done("a"), done("b")], token=at.claimed["end"].token
    ),
    "record": lambda runs, at: runs.record(
        at.claimed["record"].id, [done("a"), done("b")], token=at.claimed["record"].token
    ),
    "fail": lambda runs, at: runs.fail(at.claimed["fail"].id, "no", token=at.claimed["fail"].token),
    "heartbeat": lambda runs, at: runs.heartbeat(
        at.claimed["heartbeat"].id, LEASE, token=at.claimed["heartbeat"].token
    ),
    "release": lambda runs, at: runs.release(at.claimed["release"].id, token=at.claimed["release"].token),
    "resume": lambda runs, at: runs.resume(at.failed),
}
KINDS: tuple[str, ...] = ("start", "start_node", "complete_node", "skip_node", "fail_node", "advance", "result", "end", "record", "fail",
         "heartbeat", "release")  # fmt: skip


@pytest.fixture
def server(own_server: EmbeddedServer) -> EmbeddedServer:
    migrations.upgrade(own_server.url)
    return own_server


@contextmanager
def without_standby(server: EmbeddedServer) -> Iterator[tuple[Database, Stored]]:
    """A database with runs, whose commits wait in vain from now on."""
    with Database(server.url) as database:
        with database.session(autocommit=True) as session:
            runs = RunRepository(session)
            pipeline = store(session, "a>b")
            failed = runs.create(pipeline)
            runs.start(failed.id)
            runs.fail(failed.id, "no")
            other = store(session, "a>b")
            for _ in KINDS:
                runs.create(other)
            claimed = dict(zip(KINDS, runs.claim("worker", LEASE, limit=len(KINDS)), strict=True))
            runs.start_node(claimed["fail_node"].id, "a", token=claimed["fail_node"].token)
        with standbys.absent(server.url):
            yield database, Stored(pipeline, claimed, failed.id)


def attempt(database: Database, call: Callable[[Any], Any], *, autocommit: bool) -> None:
    with database.session(autocommit=autocommit) as session:
        call(RunRepository(session))


async def attempt_async(database: Database, call: Callable[[Any], Awaitable[Any]], *, autocommit: bool) -> None:
    async with database.async_session(autocommit=autocommit) as session:
        await call(AsyncRunRepository(session))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_repeated_call_waits_for_the_standby(server: EmbeddedServer, is_async: bool) -> None:
    answers: dict[str, list[str]] = {}
    with (
        without_standby(server) as (database, at),
        standbys.ending_waits(server.url, CANCELLED) as ender,
        asyncio.Runner() as runner,
    ):
        for name, call in CALLS.items():
            for ender.ending, autocommit in ((CANCELLED, True), (TERMINATED, False), (TERMINATED, True)):
                waits = len(ender.ended)
                with pytest.raises(CommitIndeterminateError):
                    if is_async:
                        runner.run(attempt_async(database, partial(call, at=at), autocommit=autocommit))
                    else:
                        attempt(database, partial(call, at=at), autocommit=autocommit)
                answers.setdefault(name, []).append("waited" if len(ender.ended) > waits else "did not wait")
                attempt(database, lambda runs: runs.counts(), autocommit=autocommit)  # the pool is as good as before
        runner.run(database.adispose())
    assert answers == {name: ["waited"] * 3 for name in CALLS}


def test_call_of_a_server_that_is_shut_down_is_indeterminate(server: EmbeddedServer) -> None:
    """The sessions that wait for the standby are ended by the shutdown, and the same call waits on the new server."""
    caught: list[BaseException] = []

    def call(database: Database, at: Stored) -> None:
        try:
            attempt(database, partial(CALLS["create"], at=at), autocommit=True)
        except Exception as error:  # noqa: BLE001 - looked at below
            caught.append(error)

    with without_standby(server) as (database, at):
        caller = threading.Thread(target=call, args=(database, at))
        caller.start()
        standbys.wait_for_waiting(server.url)
        servers.restart(server, "fast")
        caller.join()
        assert [type(error) for error in caught] == [CommitIndeterminateError]
        with standbys.ending_waits(server.url, CANCELLED) as ender:
            call(database, at)
        assert len(ender.ended) == 1
        assert type(caught[1]) is CommitIndeterminateError
    # the standby is given up, and what was stored is confirmed
    with Database(server.url) as again, again.session(autocommit=True) as session:
        runs = RunRepository(session)
        run = CALLS["create"](runs, at)
        assert [one.id for one in runs.search(at.pipeline).items] == [run.id, at.failed]
