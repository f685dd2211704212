"""All benchmarks by name.

A benchmark is a function of the databases and the size that yields rows, each with its bar. It is given databases that
nothing else uses, so any selection of benchmarks runs in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks import events, guard, reads, runs, validation
from benchmarks.databases import Databases, Server
from benchmarks.table import Row, Size

BENCHMARKS: dict[str, Callable[[Databases, Size], Iterator[Row]]] = {
    "steps": runs.steps,
    "advance": runs.advance,
    "record": runs.record,
    "workers": runs.workers,
    "group": runs.group,
    "creators": runs.creators,
    "claims": runs.claims,
    "create": runs.create,
    "trips": runs.round_trips,
    "wal": runs.write_ahead_log,
    "events": events.events,
    "import": reads.imports,
    "load": reads.load,
    "history": reads.history,
    "validate": validation.validate,
    "guard": guard.guard,
}


def measure(server: Server, name: str, size: Size) -> Iterator[Row]:
    """The rows of a benchmark, on databases of its own."""
    with server.databases() as databases:
        yield from BENCHMARKS[name](databases, size)
