"""``python -m benchmarks [NAME ...]`` prints one table: our time, the floor's in the same run, and their ratio.

The server is the one of GATHERING_TEST_URL; without that an embedded one is started, which syncs as in production.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

from benchmarks import events, guard, reads, runs, validation
from benchmarks.stage import Row, Stage, head, milliseconds, open_stage, show


def validate(_stage: Stage) -> Iterator[Row]:
    """The validator against ``graphlib``."""
    for nodes, edges, shape, mine, base, ratio, bar in validation.measure():
        name = f"validate {nodes} nodes, {edges} edges, {shape}"
        yield Row(name, milliseconds(mine / 1000), milliseconds(base / 1000), ratio, bar)
    what, mine, base = validation.memory()
    yield Row(f"validate {what}", f"{mine:.0f} MB", f"{base:.0f} MB", mine / base, None)


ROWS: dict[str, Callable[[Stage], Iterator[Row]]] = {
    "steps": runs.steps,
    "advance": runs.advance,
    "record": runs.record,
    "workers": runs.workers,
    "create": runs.create,
    "trips": runs.trips,
    "wal": runs.wal,
    "events": events.rows,
    "import": reads.imports,
    "load": reads.load,
    "history": reads.history,
    "validate": validate,
    "guard": guard.guard,
}


def main() -> None:
    """Print the rows asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times, as ratios to a floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(ROWS)}")
    names = parser.parse_args().names or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no rows called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for variable in [v for v in os.environ if v == "DATABASE_URL" or v.startswith("GATHERING_")]:
        if variable != "GATHERING_TEST_URL":
            del os.environ[variable]
    with open_stage() as stage:
        head()
        for name in names:
            for row in ROWS[name](stage):
                show([row])


if __name__ == "__main__":
    main()
