"""Prints events as they happen: ``python -m examples.follow [RUN]``.

With a run's id the program prints all events of that run and stops at its end; without an id it prints the events of
all runs from now on. The database is the one that GATHERING_DATABASE_URL or DATABASE_URL names, else the embedded one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress

from gathering_pipeline import Database, EventRepository, PipelineError, PipelineEvent


def format_event(event: PipelineEvent) -> str:
    """An event as one line."""
    time = event.created_at.astimezone().isoformat(" ", "milliseconds")
    data = "  ".join(f"{name}={value}" for name, value in event.data.items() if value is not None)
    return f"{time}  run {event.run_id}  {event.type:<24}  {event.node_id or '':<16}  {data}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print events until the run ends, or until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.follow", description="Prints events as they happen.")
    parser.add_argument("run", nargs="?", type=int, help="id of a run; without it, all runs from now on")
    run_id: int | None = parser.parse_args(arguments).run
    try:
        with suppress(KeyboardInterrupt), Database() as database:
            with database.session() as session:
                # None starts at the oldest event, which is too much for all runs. A service stores its cursor instead.
                after = EventRepository(session).last() if run_id is None else None
            for event in database.listen(run_id, after):
                print(format_event(event), flush=True)
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
