"""The command ``python -m gathering_pipeline.worker``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any

from gathering_pipeline import ConfigurationError, Database, PipelineError
from gathering_pipeline.worker.loop import Worker


def load_handlers(place: str) -> Mapping[str, Any]:
    """Import the handlers that ``MODULE:NAME`` names.

    Raises:
        ConfigurationError: There is no such module or name.
    """
    module, _, name = place.partition(":")
    if not module or module.startswith(".") or not name:
        raise ConfigurationError(f"{place!r:.100} names no handlers: write MODULE:HANDLERS, as in mine:HANDLERS")
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the handlers import
        raise ConfigurationError(f"there is no module {module!r:.100}: write MODULE:HANDLERS") from None
    found: Mapping[str, Any] | None = getattr(imported, name, None)
    if found is None:
        raise ConfigurationError(f"module {module!r:.100} has no {name!r:.100}: write MODULE:HANDLERS")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a worker with the options of the command line, on the database that the environment names."""
    parser = argparse.ArgumentParser(
        prog="python -m gathering_pipeline.worker",
        description="Execute pipeline runs until SIGTERM or SIGINT, on the database that the environment names.",
    )
    parser.add_argument("handlers", metavar="MODULE:HANDLERS", help="a dict of node types and functions")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="most handlers at the same time (8)")
    parser.add_argument("--lease", type=float, default=30.0, metavar="SECONDS", help="how long a claim lasts (30)")
    parser.add_argument("--name", help="worker_id of its runs (host and process id)")
    parser.add_argument("--pipelines", type=int, nargs="+", metavar="ID", help="only runs of these pipelines")
    parser.add_argument("--partial", action="store_true", help="types of nodes may lack a function")
    parser.add_argument("--once", action="store_true", help="exit when no run is left to claim")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("gathering_pipeline.calls").setLevel(logging.ERROR)  # the worker reports the faults of its calls
    try:
        worker = Worker(
            Database(),
            load_handlers(options.handlers),
            concurrency=options.concurrency,
            name=options.name,
            lease=timedelta(seconds=options.lease),
            pipelines=options.pipelines,
            partial=options.partial,
        )
        worker.main(once=options.once)
    except PipelineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
