"""The rows that benchmarks yield, how much each measures, and how the table is printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Size(Enum):
    """How much a benchmark measures.

    Attributes:
        FULL: What the figures of the documents are measured with.
        TINY: Seconds for all rows. It shows that they run; its ratios mean nothing.
    """

    FULL = "full"
    TINY = "tiny"

    def count(self, full: int) -> int:
        """Number of nodes, runs, events or workers. Tiny numbers of 10, 100 and 1,000 stay distinct: 3, 4 and 5."""
        return full if self is Size.FULL else min(full, 1 + len(str(full)))

    def repeats(self, full: int) -> int:
        """Number of measurements."""
        return full if self is Size.FULL else 1

    def seconds(self, full: float) -> float:
        """Length of a measurement, in seconds."""
        return full if self is Size.FULL else min(full, 0.05)


class Comparison(NamedTuple):
    """Median seconds of both sides, and the median of their ratios."""

    ours: float
    floor: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was measured.
        ours: Our figure, with its unit.
        floor: The floor's figure, with its unit.
        ratio: Our figure divided by the floor's.
        bar: The ratio to reach, or None.
        more_is_better: Whether the ratio has to be at least the bar, instead of at most.
    """

    name: str
    ours: str
    floor: str
    ratio: float
    bar: float | None
    more_is_better: bool = False

    @classmethod
    def of_times(cls, name: str, ours: float, floor: float, bar: float | None, *, ratio: float | None = None) -> Row:
        """Compare seconds; ``ratio`` replaces their quotient where it was measured pair by pair."""
        return cls(name, milliseconds(ours), milliseconds(floor), ours / floor if ratio is None else ratio, bar)

    @classmethod
    def of_rates(cls, name: str, ours: float, floor: float, bar: float | None, *, ratio: float | None = None) -> Row:
        """Compare numbers of runs or calls per second."""
        quotient = ours / floor if ratio is None else ratio
        return cls(name, f"{ours:.0f}/s", f"{floor:.0f}/s", quotient, bar, more_is_better=True)

    def verdict(self) -> str:
        """The bar, and whether it is met."""
        if self.bar is None:
            return ""
        is_met = self.ratio >= self.bar if self.more_is_better else self.ratio <= self.bar
        bar = f"{'>=' if self.more_is_better else '<='} {self.bar:g}"
        return f"{bar:>8}  {'met' if is_met else 'missed'}"


def compare(ours: Callable[[], object], floor: Callable[[], object], repeats: int) -> Comparison:
    """Time both sides in turns. Which side goes first alternates; at most three warm-up turns are not counted."""
    times: list[tuple[float, float]] = []
    for turn in range(-min(3, repeats), repeats):
        if turn % 2:
            our_time, floor_time = timed(ours), timed(floor)
        else:
            floor_time, our_time = timed(floor), timed(ours)
        if turn >= 0:
            times.append((our_time, floor_time))
    return Comparison(
        statistics.median(our_time for our_time, _ in times),
        statistics.median(floor_time for _, floor_time in times),
        statistics.median(our_time / floor_time for our_time, floor_time in times),
    )


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def milliseconds(seconds: float) -> str:
    """Format a time."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds * 1000:.0f} ms"


def print_header() -> None:
    """Print the names of the columns."""
    print(f"{'what':<58} {'ours':>12} {'floor':>12} {'ratio':>7} {'bar':>8}", flush=True)


def print_row(row: Row) -> None:
    """Print a row as soon as it is measured."""
    print(f"{row.name:<58} {row.ours:>12} {row.floor:>12} {row.ratio:>7.2f} {row.verdict()}".rstrip(), flush=True)
