"""Prints events as they happen: ``python -m examples.follow [RUN]``, of one run until it ends, or of all from now on.

The database is the one that the environment names (GATHERING_DATABASE_URL, DATABASE_URL), else the embedded one.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

from gathering_pipeline import Database, EventRepository, EventType, PipelineError, PipelineEvent

ENDS = {
    EventType.PIPELINE_RUN_COMPLETED,
    EventType.PIPELINE_RUN_FAILED,
    EventType.PIPELINE_RUN_CANCELLED,
    EventType.PIPELINE_RUN_TIMEOUT,
}


def line(event: PipelineEvent) -> str:
    """An event as one line."""
    time = event.created_at.astimezone().isoformat(" ", "milliseconds")
    data = "  ".join(f"{name}={value}" for name, value in event.data.items() if value is not None)
    return f"{time}  run {event.run_id}  {event.type:<24}  {event.node_id or '':<16}  {data}".rstrip()


def main() -> int:
    """Follow until the run ends, or until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.follow", description="Prints events as they happen.")
    parser.add_argument("run", nargs="?", type=int, help="a run's id; without it all runs, from now on")
    run_id = parser.parse_args().run
    try:
        with suppress(KeyboardInterrupt), Database() as database:
            with database.session() as session:
                # the history of one run, but not that of all of them; a program that stores its cursor goes on there
                after = EventRepository(session).last() if run_id is None else None
            for event in database.listen(run_id, after):
                print(line(event), flush=True)
                if run_id is not None and event.type in ENDS:
                    break
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
