"""A command on many databases: the file with their URLs, the worker processes, and what is printed.

A worker process is a copy of this one, made before any connection is: it has imported everything, and works on one
database after the other.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import click
from sqlalchemy.engine import URL, Engine

from gathering_pipeline import connections
from gathering_pipeline.cli.output import ACTION_NEEDED, Outcome, describe, print_json
from gathering_pipeline.errors import ConfigurationError, shorten
from gathering_pipeline.settings import DatabaseSettings
from gathering_pipeline.texts import one_line
from gathering_pipeline.urls import parse_url

MOST_BAD_LINES = 20


@dataclass(frozen=True, slots=True)
class Target:
    """A database of the file."""

    name: str
    url: URL


@dataclass(frozen=True, slots=True)
class _Result:
    name: str
    seconds: float
    outcome: Outcome | None = None
    error: str = ""

    @property
    def text(self) -> str:
        return f"failed: {self.error}" if self.outcome is None else self.outcome.text

    @property
    def data(self) -> dict[str, Any]:
        found = {"error": self.error} if self.outcome is None else self.outcome.data
        return {"name": self.name, "ok": self.outcome is not None, "seconds": round(self.seconds, 3)} | found


Action = Callable[[Engine], Outcome]


def read_targets(path: str) -> list[Target]:
    """Read lines ``NAME URL``; blank lines, and lines that begin with ``#``, are skipped.

    Args:
        path: The file, or ``-`` for stdin.

    Raises:
        ConfigurationError: A line is not such a line, or a name occurs twice, or there is no database. The message has
            the numbers of the lines and no URL.
    """
    found: dict[str, Target] = {}
    numbers: dict[str, int] = {}
    wrong: list[str] = []
    with click.open_file(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:  # noqa: PLR2004 - a name and a URL
                wrong.append(f"line {number} has {len(words)} words instead of NAME URL")
            elif numbers.setdefault(words[0], number) != number:
                wrong.append(f"line {number} has the name {shorten(words[0], 100)} of line {numbers[words[0]]}")
            else:
                try:
                    found[words[0]] = Target(words[0], parse_url(words[1], f"the URL in line {number}"))
                except ConfigurationError as error:
                    wrong.append(str(error))
    if not (found or wrong):
        wrong.append("it has no line NAME URL")
    if wrong:
        more = f"; and {len(wrong) - MOST_BAD_LINES} more" if len(wrong) > MOST_BAD_LINES else ""
        raise ConfigurationError(f"{path} can't be used: {'; '.join(wrong[:MOST_BAD_LINES])}{more}")
    return list(found.values())


def run(targets: list[Target], action: Action, jobs: int, *, as_json: bool) -> int:
    """Run a command on each database, print a line as each ends, and the failed ones at the end.

    Args:
        targets: The databases.
        action: The command.
        jobs: Number of worker processes.
        as_json: Print one JSON document at the end; the lines go to stderr.

    Returns:
        The exit code: 1 if the command failed on a database, else ``ACTION_NEEDED`` if one needs it, else 0.
    """
    settings = DatabaseSettings.load(database_url=None)
    results = []
    for result in _run_all(targets, action, settings, jobs):
        results.append(result)
        click.echo(f"{result.name}: {result.text} ({result.seconds:.2f} s)", err=as_json)
    failed = [result for result in results if result.outcome is None]
    if as_json:
        print_json([result.data for result in results])
    if failed:
        lines = "".join(f"\n  {result.name}: {result.error}" for result in failed)
        click.echo(f"Error: {len(failed)} of {len(results)} databases failed:{lines}", err=True)
        return 1
    return ACTION_NEEDED if any(result.outcome and result.outcome.needs_action for result in results) else 0


def _run_all(targets: list[Target], action: Action, settings: DatabaseSettings, jobs: int) -> Iterator[_Result]:
    """Yield the results as they come; a worker that ends before its time fails on one database only."""
    waiting = deque(targets)
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                worker = _Worker(lambda target: _run_one(target, action, settings), list(workers))
                workers[worker.pipe] = worker
                worker.give(waiting.popleft())
            for pipe in wait(list(workers)):
                worker = workers[pipe]  # type: ignore[index]  # it is a connection
                yield worker.take()
                if waiting and worker.process.is_alive():
                    worker.give(waiting.popleft())
                else:
                    worker.end()
                    del workers[worker.pipe]
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.end()


@dataclass(slots=True)
class _Worker:
    """A process that works on one database after the other."""

    work: Callable[[Target], _Result]
    others: list[Connection]
    pipe: Connection = field(init=False)
    process: ForkProcess = field(init=False)
    _target: Target | None = None
    _begun: float = 0.0

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def _serve(self, pipe: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the parent, too, which ends this one
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # interrupts a call, which cancels its statement
        for inherited in (self.pipe, *self.others):  # else their workers would not see the end of the parent
            inherited.close()
        with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
            while True:
                pipe.send(self.work(pipe.recv()))

    def give(self, target: Target) -> None:
        self._target, self._begun = target, time.monotonic()
        with suppress(BrokenPipeError):  # it was killed, which take() tells
            self.pipe.send(target)

    def take(self) -> _Result:
        assert self._target is not None, "it was given one"
        try:
            result: _Result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            error = f"its worker process ended with exit code {self.process.exitcode}"
            return _Result(self._target.name, time.monotonic() - self._begun, error=error)
        return result

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def _run_one(target: Target, action: Action, settings: DatabaseSettings) -> _Result:
    begun = time.monotonic()
    try:
        with connections.temporary_engine(target.url, settings) as engine:
            outcome = action(engine)
    except Exception as error:  # noqa: BLE001 - the other databases are not concerned
        text = describe(error) or f"{type(error).__name__}: {error}"
        return _Result(target.name, time.monotonic() - begun, error=shorten(one_line(text)))
    return _Result(target.name, time.monotonic() - begun, outcome)
