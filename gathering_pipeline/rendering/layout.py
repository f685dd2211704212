"""Where the nodes and edges of a graph are drawn: at the editor's positions, else in columns by generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from statistics import fmean
from typing import Any

from gathering_pipeline.models import PipelineDefinition, PipelineNode

WIDTH, HEIGHT = 208.0, 56.0
"""Size of a node."""
GAP_X, GAP_Y = 52.0, 24.0
"""Least distance of two nodes."""

_SWEEPS = 8
"""Times that the order of the columns is improved."""
_MOST_STRETCH = 3.0
"""Largest factor by which the editor's positions are drawn apart."""
_FARTHEST = 1_000_000
"""Largest coordinate of a position that is used."""
_MOST_BENDS = 20_000
"""Of more edges through other columns each is drawn straight."""

Point = tuple[float, float]
Link = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """A drawn graph.

    Attributes:
        nodes: The nodes by id; of several with the same id the first one.
        places: The upper left corner of each node.
        links: The places in ``nodes`` and ``edges`` of what each route connects: source, target, edge.
        routes: The points of each link, from the right side of its source to the left side of its target.
        width: Of the whole.
        height: Of the whole.
    """

    nodes: list[PipelineNode]
    places: list[Point]
    links: list[tuple[int, int, int]]
    routes: list[list[Point]]
    width: float
    height: float


def arrange(definition: PipelineDefinition) -> Layout:
    """Arrange a graph, which may be invalid: an edge to an unknown node is left out, and a cycle is drawn as one."""
    first: dict[str, PipelineNode] = {}
    for node in definition.nodes:
        first.setdefault(node.id, node)
    nodes = list(first.values())
    index = {node.id: place for place, node in enumerate(nodes)}
    links = [
        (index[edge.from_node], index[edge.to_node], place)
        for place, edge in enumerate(definition.edges)
        if edge.from_node in index and edge.to_node in index
    ]
    pairs = [(source, target) for source, target, _ in links]
    bends: list[list[Point]] = [[] for _ in links]
    places = _editor_places(nodes)
    if places is None:
        places, bends = _columns(len(nodes), pairs)
    left, top = (min((point[axis] for point in places), default=0.0) for axis in (0, 1))
    bent = [y for bend in bends for _, y in bend]
    top = min([top, *bent])
    places = [(x - left, y - top) for x, y in places]
    routes = [
        [
            (places[source][0] + WIDTH, places[source][1] + HEIGHT / 2),
            *((x - left, y - top) for x, y in bend),
            (places[target][0], places[target][1] + HEIGHT / 2),
        ]
        for (source, target), bend in zip(pairs, bends, strict=True)
    ]
    width = max((x for x, _ in places), default=0.0) + WIDTH
    height = max([*(y + HEIGHT for _, y in places), *(y - top for y in bent)], default=HEIGHT)
    return Layout(nodes, places, links, routes, width, height)


# --- the editor's positions -------------------------------------------------------------------------------------------


def _editor_places(nodes: Sequence[PipelineNode]) -> list[Point] | None:
    """The positions that the editor stored, drawn apart where nodes would overlap; ``None`` if they can't be used."""
    places: list[Point] = []
    for node in nodes:
        position: dict[str, Any] = node.position or {}
        x, y = position.get("x"), position.get("y")
        if x is None or y is None or not (_is_coordinate(x) and _is_coordinate(y)):
            return None
        places.append((float(x), float(y)))
    stretch = _stretch(places)
    return None if stretch is None else [(x * stretch, y * stretch) for x, y in places]


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and -_FARTHEST <= value <= _FARTHEST


def _stretch(places: Sequence[Point]) -> float | None:
    """The factor that keeps nodes apart; ``None`` if it were too large, as of nodes that were never placed."""
    wide, high = WIDTH + GAP_X, HEIGHT + GAP_Y
    cells: dict[tuple[int, int], list[Point]] = {}
    stretch = 1.0
    for x, y in places:
        column, row = int(x // wide), int(y // high)
        for near in ((column + right, row + down) for right in (-1, 0, 1) for down in (-1, 0, 1)):
            for other_x, other_y in cells.get(near, ()):
                across, along = abs(x - other_x), abs(y - other_y)
                needed = min(wide / across if across else inf, high / along if along else inf)
                if needed > _MOST_STRETCH:
                    return None
                stretch = max(stretch, needed)
        cells.setdefault((column, row), []).append((x, y))
    return stretch


# --- columns by generation --------------------------------------------------------------------------------------------


def generations(number: int, links: Iterable[Link]) -> list[int]:
    """The longest path from a root to each node; a cycle is entered at its first node."""
    after: list[list[int]] = [[] for _ in range(number)]
    missing = [0] * number
    for source, target in links:
        after[source].append(target)
        missing[target] += 1
    found = [0] * number
    done = [False] * number
    ready = deque(node for node in range(number) if not missing[node])
    unvisited = iter(range(number))
    while True:
        if not ready:
            begin = next((node for node in unvisited if not done[node]), None)
            if begin is None:
                return found
            ready.append(begin)
        node = ready.popleft()
        if done[node]:
            continue
        done[node] = True
        for target in after[node]:
            missing[target] -= 1
            if not done[target]:
                found[target] = max(found[target], found[node] + 1)
                if not missing[target]:
                    ready.append(target)


def _columns(number: int, links: Sequence[Link]) -> tuple[list[Point], list[list[Point]]]:
    """Place nodes in columns, with few crossings, and bend each edge around the columns between its ends."""
    rank = generations(number, links)
    bends = sum(max(rank[target] - rank[source] - 1, 0) for source, target in links)
    # a bend is an item of a column, too, of which there may be many: it keeps a way free
    rank_of, chains = list(rank), list[list[int]]()
    for source, target in links:
        chain = [source]
        for between in range(rank[source] + 1, rank[target]) if bends <= _MOST_BENDS else ():
            chain.append(len(rank_of))
            rank_of.append(between)
        chains.append([*chain, target])
    before: list[list[int]] = [[] for _ in rank_of]
    after: list[list[int]] = [[] for _ in rank_of]
    for chain in chains:
        for one, other in pairwise(chain):
            if rank_of[one] < rank_of[other]:
                after[one].append(other)
                before[other].append(one)
    columns: list[list[int]] = [[] for _ in range(max(rank_of, default=-1) + 1)]
    for item, column in enumerate(rank_of):
        columns[column].append(item)
    _sort(columns, before, after)
    heights = [HEIGHT] * number + [0.0] * (len(rank_of) - number)
    y = _align(columns, before, after, heights)
    places = [(rank[node] * (WIDTH + GAP_X), y[node]) for node in range(number)]
    return places, [
        [(rank_of[item] * (WIDTH + GAP_X) + side, y[item]) for item in chain[1:-1] for side in (0.0, WIDTH)]
        for chain in chains
    ]


def _sort(columns: list[list[int]], before: list[list[int]], after: list[list[int]]) -> None:
    """Sort each column by the mean place of the neighbours, forwards and backwards."""
    place: dict[int, float] = {item: at for column in columns for at, item in enumerate(column)}
    for sweep in range(_SWEEPS):
        backwards = sweep % 2 == 1
        neighbours = after if backwards else before
        for column in reversed(columns) if backwards else columns:
            means = {item: fmean(map(place.__getitem__, near)) for item in column if (near := neighbours[item])}
            column.sort(key=lambda item: means.get(item, place[item]))
            place |= {item: at for at, item in enumerate(column)}


def _align(
    columns: list[list[int]], before: list[list[int]], after: list[list[int]], heights: list[float]
) -> list[float]:
    """Move the items of each column to the mean height of their neighbours, as far as their distance allows."""
    y = [0.0] * len(heights)
    for column in columns:
        for item, top in zip(column, _tops(column, heights), strict=True):
            y[item] = top
    for sweep in range(_SWEEPS):
        backwards = sweep % 2 == 1
        neighbours = after if backwards else before
        for column in reversed(columns) if backwards else columns:
            wanted = [
                fmean(y[near] + heights[near] / 2 for near in neighbours[item]) - heights[item] / 2
                if neighbours[item]
                else y[item]
                for item in column
            ]
            tops = _tops(column, heights)
            found = _rising([want - top for want, top in zip(wanted, tops, strict=True)])
            for item, top, shift in zip(column, tops, found, strict=True):
                y[item] = top + shift
    return y


def _tops(column: Sequence[int], heights: Sequence[float]) -> list[float]:
    """The places of items that stand as close together as they may."""
    tops, top = [], 0.0
    for item in column:
        tops.append(top)
        top += heights[item] + GAP_Y
    return tops


def _rising(values: Sequence[float]) -> list[float]:
    """The closest values that don't fall, by least squares: neighbours that fall are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]
