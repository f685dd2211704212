"""What callers were told while something went wrong, next to what is stored: nothing may be lost, doubled or told wrongly.

A caller sends a call again until it succeeds, as an application does: each key is stored once. The number of the attempt
is stored with it, as the priority of the run or the output of its node, so that an attempt that was refused and took
place all the same is found.
"""

# psycopg takes literal SQL; statements are put together here.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psycopg

from gathering_pipeline import (
    AsyncRunRepository,
    CommitIndeterminateError,
    Database,
    DatabaseSettings,
    EventRepository,
    RunRepository,
    StatementCancelledError,
    is_transient,
)
from tests.support.runs import done

PAUSE = 0.05
"""Seconds between two attempts."""
POLL = timedelta(milliseconds=50)


@dataclass
class Row:
    """A line of the table.

    Attributes:
        name: What went wrong.
        told: How often each error was raised.
        rounds: How often.
        calls: How many calls there were.
        lost: Acknowledged calls that are not stored, and events that a listener missed.
        doubled: What is stored or was listened to twice.
        wrong: Attempts that took place although their callers were told that they didn't, and unknown errors.
        longest: Seconds of the longest call.
        until: Seconds from the end of the fault until each caller had written again, the longest of all.
    """

    name: str
    told: dict[str, int]
    rounds: int
    calls: int
    lost: list[str]
    doubled: list[str]
    wrong: list[str]
    longest: float
    until: list[float]

    def __str__(self) -> str:
        times = sorted(self.until) or [0.0]
        p95 = times[min(int(len(times) * 0.95), len(times) - 1)]
        return (
            f"{self.name:38} {self.rounds:6} {self.calls:7} {len(self.lost):5} {len(self.doubled):8} {len(self.wrong):6}"
            f" {self.longest:9.2f} s {p95:9.2f} s {times[-1]:8.2f} s   {self.told}"
        )


HEADING = f"{'fault':38} rounds   calls  lost  doubled  wrong  longest call    again p95        max   errors"


class Ledger:
    """Callers of a database, in threads and in tasks, each call alone or in a block; and listeners.

    Attributes:
        hold: Seconds for which a block is idle before it ends.
        pause: Seconds between two calls.
    """

    def __init__(self, url: str, pipeline: int, name: str, settings: DatabaseSettings | None = None) -> None:
        self.url = url
        self.name = name
        self.hold = self.pause = 0.0
        self.pipeline = pipeline
        self.settings = settings
        self.acknowledged: dict[str, int] = {}
        self.refused: set[tuple[str, int]] = set()
        self.told: dict[str, int] = {}
        self.wrong: list[str] = []
        self.calls = 0
        self.longest = 0.0
        self.names: list[str] = []
        self.first: dict[str, float] = {}
        self.latest_begin = 0.0
        self.heard: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._end: int | None = None

    # --- callers ---

    @contextmanager
    def calling(self, threads: int = 4, tasks: int = 4, *, listeners: bool = False) -> Iterator[None]:
        """Call during a block; at its end each caller completes what it has begun."""
        kinds = itertools.cycle(("alone", "in a block"))
        names = [f"thread {at} {next(kinds)}" for at in range(threads)]
        running = [threading.Thread(target=self._thread, args=(name,)) for name in names]
        if tasks:
            names_of_tasks = [f"task {at} {next(kinds)}" for at in range(tasks)]
            running.append(threading.Thread(target=lambda: asyncio.run(self._tasks(names_of_tasks))))
            names += names_of_tasks
        hearing = []
        if listeners:
            hearing = [
                threading.Thread(target=self._listen, args=("listen",)),
                threading.Thread(target=lambda: asyncio.run(self._alisten("alisten"))),
            ]
        self.names = names
        for thread in [*running, *hearing]:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in running:
                thread.join(120)
            with Database(self.url) as database, database.session(autocommit=True) as session:
                runs = RunRepository(session)
                self._end = runs.record_run(self.pipeline, [done("a")]).id
                runs.record_run(self.pipeline, [done("a")])
            for thread in hearing:
                thread.join(60)
            assert not any(thread.is_alive() for thread in [*running, *hearing]), "a caller hangs"

    def mark(self) -> float:
        """Note when each caller succeeds for the first time from now on."""
        with self._lock:
            self.first.clear()
            return time.monotonic()

    def wait(self, since: float, patience: float = 60.0) -> list[float]:
        """Wait until each caller has succeeded since the mark, and return how many seconds it took each."""
        deadline = time.monotonic() + patience
        while missing := [name for name in self.names if name not in self.first]:
            assert time.monotonic() < deadline, f"no success of {missing}: {self.told}, {self.wrong[:3]}"
            time.sleep(0.005)
        return [at - since for at in self.first.values()]

    def _thread(self, name: str) -> None:
        alone = name.endswith("alone")
        with Database(self.url, settings=self.settings) as database:

            def attempt(key: str, number: int) -> int:
                with database.session(autocommit=alone) as session:
                    runs = RunRepository(session)
                    if alone:
                        return runs.create(self.pipeline, idempotency_key=key, priority=number).id
                    run = runs.record_run(self.pipeline, [done("a", output={"attempt": number})], idempotency_key=key)
                    time.sleep(self.hold)
                    return runs.get(run.id).id

            for key in self._keys(name):
                for number in itertools.count(1):
                    begin = time.monotonic()
                    try:
                        found: int | BaseException = attempt(key, number)
                    except BaseException as error:  # noqa: BLE001 - noted
                        found = error
                    if self._note(name, key, number, begin, found):
                        break
                    time.sleep(PAUSE)
                time.sleep(self.pause)

    async def _tasks(self, names: list[str]) -> None:
        async with Database(self.url, settings=self.settings) as database:
            await asyncio.gather(*(self._task(database, name) for name in names))

    async def _task(self, database: Database, name: str) -> None:
        alone = name.endswith("alone")

        async def attempt(key: str, number: int) -> int:
            async with database.async_session(autocommit=alone) as session:
                runs = AsyncRunRepository(session)
                if alone:
                    return (await runs.create(self.pipeline, idempotency_key=key, priority=number)).id
                run = await runs.record_run(self.pipeline, [done("a", output={"attempt": number})], idempotency_key=key)
                await asyncio.sleep(self.hold)
                return (await runs.get(run.id)).id

        for key in self._keys(name):
            for number in itertools.count(1):
                begin = time.monotonic()
                try:
                    found: int | BaseException = await attempt(key, number)
                except BaseException as error:  # noqa: BLE001 - noted
                    found = error
                if self._note(name, key, number, begin, found):
                    break
                await asyncio.sleep(PAUSE)
            await asyncio.sleep(self.pause)

    def _keys(self, name: str) -> Iterator[str]:
        for number in itertools.count():
            if self._stop.is_set():
                return
            yield f"{self.name}, {name}, {number}"

    def _note(self, name: str, key: str, attempt: int, begin: float, found: int | BaseException) -> bool:
        """Note the answer of an attempt, and return whether the caller is done with the key."""
        end = time.monotonic()
        with self._lock:
            self.calls += 1
            self.longest = max(self.longest, end - begin)
            if isinstance(found, int):
                self.acknowledged[key] = found
                self.first.setdefault(name, end)
                self.latest_begin = max(self.latest_begin, begin)
                return True
            self.told[type(found).__name__] = self.told.get(type(found).__name__, 0) + 1
            if isinstance(found, CommitIndeterminateError):
                return False
            if is_transient(found) or isinstance(found, StatementCancelledError):
                self.refused.add((key, attempt))
                return False
            self.wrong.append(f"{key}: {type(found).__name__}: {found}"[:300])
            return True

    # --- listeners ---

    def _listen(self, name: str) -> None:
        heard = self.heard[name] = []
        with Database(self.url, settings=self.settings) as database:
            try:
                for event in database.listen(poll=POLL):
                    heard.append(event.cursor)
                    if self._end is not None and event.run_id > self._end:
                        return
            except Exception as error:  # noqa: BLE001 - noted
                self.wrong.append(f"{name}: {type(error).__name__}: {error}")

    async def _alisten(self, name: str) -> None:
        heard = self.heard[name] = []
        async with Database(self.url, settings=self.settings) as database:
            try:
                async for event in database.alisten(poll=POLL):
                    heard.append(event.cursor)
                    if self._end is not None and event.run_id > self._end:
                        return
            except Exception as error:  # noqa: BLE001 - noted
                self.wrong.append(f"{name}: {type(error).__name__}: {error}")

    # --- the end ---

    def close(self, raw: psycopg.Connection, rounds: int, until: list[float]) -> Row:
        """Compare with what is stored."""
        stored = {
            key: (run_id, attempt)
            for key, run_id, attempt in raw.execute(
                "SELECT r.idempotency_key, r.id, coalesce((n.output_data ->> 'attempt')::int, r.priority)"
                " FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id"
                " WHERE starts_with(r.idempotency_key, %s)",
                [f"{self.name}, "],
            )
        }
        lost = [
            f"{key}: run {run_id}" for key, run_id in self.acknowledged.items() if stored.get(key, (0,))[0] != run_id
        ]
        wrong = [*self.wrong, *(f"{key}, attempt {at}" for key, at in self.refused if stored.get(key, (0, 0))[1] == at)]
        doubled = [
            str(row)
            for row in raw.execute(
                "SELECT run_id, node_id, type, count(*) FROM circle.pipeline_events GROUP BY 1, 2, 3 HAVING count(*) > 1"
            )
        ]
        cursors: list[str] = []
        with Database(self.url) as database, database.session() as session:
            while self.heard and (page := EventRepository(session).read(after=cursors[-1] if cursors else None).items):
                cursors += [event.cursor for event in page]
        for listener, heard in self.heard.items():
            times = Counter(heard)
            lost += [f"{listener}: {cursor}" for cursor in cursors[: len(heard)] if cursor not in times]
            doubled += [f"{listener}: {cursor}" for cursor, number in times.items() if number > 1]
            wrong += [f"{listener}: {cursor} is not stored" for cursor in set(times).difference(cursors)]
        return Row(self.name, self.told, rounds, self.calls, lost, doubled, wrong, self.longest, until)
