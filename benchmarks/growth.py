"""What calls cost as the history grows: ``python -m benchmarks.growth [--plot FILE.svg]``.

A database of each size is filled with ended runs of ten nodes. The calls are then made on all of them in turns, so that
a slow minute of the machine is none of one size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.command_line import add_size_option, remove_database_settings
from benchmarks.databases import Databases, open_server
from benchmarks.graphs import chain
from benchmarks.reads import fill_history
from benchmarks.table import Size, timed
from gathering_pipeline import EventRepository, RunRepository

SIZES = (10_000, 100_000, 1_000_000)
NODES = 10
ROUNDS = 200
BAR = 1.2
"""Largest allowed ratio of the largest history to the smallest."""

LEASE = timedelta(minutes=5)
Times = dict[str, list[float]]
"""Seconds of each call, by the call's name."""


class Caller:
    """Makes every call once in a round, on a database with a history.

    Attributes:
        runs_before: Number of runs of the history.
        times: Seconds of each call.
    """

    def __init__(self, databases: Databases, runs_before: int) -> None:
        self.runs_before = runs_before
        self.times: Times = {}
        graph = chain(NODES)
        self._nodes = [node["id"] for node in graph[0]]
        self._pipeline = databases.store(graph).ours
        with floor.connect(databases.our_url) as connection:
            fill_history(connection, self._pipeline, runs_before)
        self._runs = RunRepository(databases.session)
        self._events = EventRepository(databases.session)

    def round(self) -> None:
        """Make every call."""
        runs, events, pipeline = self._runs, self._events, self._pipeline
        run = self._time("create", lambda: runs.create(pipeline, {"branch": "main"}))
        (claimed,) = self._time("claim", lambda: runs.claim("worker", LEASE))
        token, node = claimed.token, self._nodes[0]
        self._time("heartbeat", lambda: runs.heartbeat(run.id, LEASE, token=token))
        self._time("start_node", lambda: runs.start_node(run.id, node, token=token))
        self._time("complete_node", lambda: runs.complete_node(run.id, node, {"text": "done"}, token=token))
        self._time("advance", lambda: runs.advance(run.id, token=token))
        self._time("get and nodes", lambda: (runs.get(run.id), runs.nodes(run.id)))
        self._time("search", lambda: runs.search(pipeline, limit=50))
        self._time("counts", runs.counts)
        self._time("statistics", lambda: runs.statistics(pipeline))
        self._time("events", lambda: events.read(run_id=run.id))
        self._time("recover and expire", lambda: (runs.recover(), runs.expire()))
        self._time("cancel", lambda: runs.cancel(run.id))
        results = [{"node_id": node, "status": "completed"} for node in self._nodes]
        self._time("record_run", lambda: runs.record_run(pipeline, results))
        self._time("purge", lambda: runs.purge(timedelta(0), limit=1))

    def _time(self, name: str, call: Callable[[], Any]) -> Any:
        answer: list[Any] = []
        self.times.setdefault(name, []).append(timed(lambda: answer.append(call())))
        return answer[0]


def measure(sizes: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Median seconds of each call, by its name, in the order of the sizes."""
    with open_server() as server, ExitStack() as opened:
        callers = [Caller(opened.enter_context(server.databases()), size) for size in sizes]
        for _ in range(3):
            for caller in callers:
                caller.round()
        for caller in callers:
            caller.times.clear()
        for _ in range(rounds):
            for caller in callers:
                caller.round()
    return {name: [statistics.median(caller.times[name]) for caller in callers] for name in callers[0].times}


def plot(sizes: Sequence[int], medians: dict[str, list[float]]) -> str:
    """The medians as lines of an SVG drawing: history size to the right, milliseconds upwards."""
    width, height, left, top, right = 900, 420, 60, 20, 170
    highest = 1000 * max(map(max, medians.values()))

    def point(place: int, seconds: float) -> tuple[float, float]:
        x = left + place * (width - left - right) / max(len(sizes) - 1, 1)
        return x, height - 40 - seconds * 1000 / highest * (height - 40 - top)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            ' font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(
            f'<text x="{point(place, 0)[0]:.0f}" y="{height - 20}" text-anchor="middle">{size:,} runs</text>'
            for place, size in enumerate(sizes)
        ),
        *(
            f'<text x="{left - 8}" y="{point(0, step * highest / 4000)[1]:.0f}" text-anchor="end">'
            f"{step * highest / 4:.1f} ms</text>"
            for step in range(5)
        ),
    ]
    by_height = sorted(medians.items(), key=lambda item: item[1][-1])
    label = float(height)
    for number, (name, values) in enumerate(by_height):
        colour = f"hsl({360 * number // len(by_height)},65%,40%)"
        line = " ".join("{:.1f},{:.1f}".format(*point(place, seconds)) for place, seconds in enumerate(values))
        x, y = point(len(sizes) - 1, values[-1])
        label = min(label - 14, y + 4)  # labels don't cover each other
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{x + 8:.0f}" y="{label:.0f}" fill="{colour}">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line a call, and draw the plot if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    add_size_option(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an SVG")
    options = parser.parse_args(arguments)
    remove_database_settings()
    size: Size = options.size
    sizes = [size.count(count) for count in SIZES]
    medians = measure(sizes, size.repeats(ROUNDS))
    print(f"{'ms':<22}", *(f"{count:>12,}" for count in sizes), f"{'ratio':>7}")
    for name, values in medians.items():
        ratio = values[-1] / values[0]
        print(
            f"{name:<22}",
            *(f"{seconds * 1000:>12.2f}" for seconds in values),
            f"{ratio:>7.2f}",
            "met" if ratio <= BAR else f"missed: {BAR}",
        )
    if options.plot:
        options.plot.write_text(plot(sizes, medians), encoding="utf-8")


if __name__ == "__main__":
    main()
