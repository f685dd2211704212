"""``python -m benchmarks.peers [NAME ...]`` prints one table: what a run costs here, in other stores, and at the floor.

A run is a chain of ten nodes, recorded step by step. Ratios are to the floor's script in the same run, in turns. The
server is the one of GATHERING_TEST_URL; without that variable an embedded one is started, which syncs as in production.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from benchmarks import floor
from benchmarks.command_line import add_size_option, remove_database_settings
from benchmarks.databases import Server, open_server
from benchmarks.peers.environments import NotInstalledError
from benchmarks.peers.measure import NODES, measure, measure_ours
from benchmarks.peers.process import NotMeasuredError
from benchmarks.peers.registry import PEERS
from benchmarks.table import Comparison, Size, milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of ours, of the peers named or of all, and of the floor; 1 if a peer failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Other stores, next to ours.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(PEERS)}")
    parser.add_argument(
        "--environments",
        type=Path,
        metavar="FOLDER",
        help="keep the virtual environments of the peers in this folder; without it they are made anew each time",
    )
    add_size_option(parser)
    options = parser.parse_args(arguments)
    names: list[str] = options.names or list(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"no peers called {', '.join(unknown)}; there are {', '.join(PEERS)}")
    remove_database_settings()
    kept: Path | None = options.environments
    with (
        tempfile.TemporaryDirectory(prefix="gathering-peers-") if kept is None else nullcontext(kept) as folder,
        open_server() as server,
    ):
        return _print_table(server, names, Path(folder).resolve(), options.size)


def _print_table(server: Server, names: Sequence[str], folder: Path, size: Size) -> int:
    _print_server(server, size)
    _print_line("what", "version", "a run", "floor", "ratio")
    floors: list[float] = []

    def print_figures(title: str, package: str, figures: Comparison) -> None:
        floors.append(figures.floor)
        times = milliseconds(figures.ours), milliseconds(figures.floor)
        _print_line(title, package, *times, f"{figures.ratio:.2f}")

    failures = 0
    for title, figures in measure_ours(server, size):
        print_figures(title, f"gathering-pipeline {version('gathering-pipeline').split('+')[0]}", figures)
    for name in names:
        peer = PEERS[name]
        try:
            measured = measure(server, peer, folder, size)
        except NotInstalledError as error:
            print(f"{peer.title:<{_TITLE}} can't be installed: {error}", flush=True)
        except NotMeasuredError as error:
            failures += 1
            print(f"{peer.title:<{_TITLE}} failed: {error}", flush=True)
        else:
            print_figures(peer.title, f"{peer.package} {measured.version}", measured.times)
    time = milliseconds(statistics.median(floors))
    _print_line("the floor, 2n + 2 bare statements", f"psycopg {version('psycopg')}", time, time, "1.00")
    return min(failures, 1)


_TITLE = 36


def _print_server(server: Server, size: Size) -> None:
    """Say what the figures depend on: without fsync they are others."""
    with server.databases() as databases:
        settings = [
            floor.fetch_value(databases.floor.execute("SELECT current_setting(%s)", (name,), prepare=False))
            for name in ("server_version", "fsync", "synchronous_commit")
        ]
    print(
        "PostgreSQL {}, fsync {}, synchronous_commit {}; a run is a chain of {} nodes".format(
            *settings, size.count(NODES)
        ),
        flush=True,
    )


def _print_line(title: str, package: str, time: str, base: str, ratio: str) -> None:
    print(f"{title:<{_TITLE}} {package:<34} {time:>9} {base:>9} {ratio:>7}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
