"""What the programs of this folder have in common."""

from __future__ import annotations

import argparse
import os

from benchmarks.table import Size


def add_size_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--tiny``; the option's value is ``size``."""
    parser.add_argument(
        "--tiny",
        dest="size",
        action="store_const",
        const=Size.TINY,
        default=Size.FULL,
        help="take seconds: shows that everything runs, its ratios mean nothing",
    )


def remove_database_settings() -> None:
    """Remove the variables that would change how the databases are used; GATHERING_TEST_URL names the server."""
    for variable in list(os.environ):
        if variable == "DATABASE_URL" or (variable.startswith("GATHERING_") and variable != "GATHERING_TEST_URL"):
            del os.environ[variable]
