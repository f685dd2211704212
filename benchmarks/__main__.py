"""``python -m benchmarks [NAME ...]`` prints one table: our time, the floor's in the same run, and their ratio.

The server is the one of GATHERING_TEST_URL; without that variable an embedded one is started, which syncs as in
production.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.command_line import add_size_option, remove_database_settings
from benchmarks.databases import open_server
from benchmarks.suite import BENCHMARKS, measure
from benchmarks.table import print_header, print_row


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows of the benchmarks named, or of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times, as ratios to a floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(BENCHMARKS)}")
    add_size_option(parser)
    options = parser.parse_args(arguments)
    names: list[str] = options.names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmarks called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    remove_database_settings()
    with open_server() as server:
        print_header()
        for name in names:
            for row in measure(server, name, options.size):
                print_row(row)


if __name__ == "__main__":
    main()
