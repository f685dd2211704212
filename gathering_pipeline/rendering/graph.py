"""A graph as Mermaid and as SVG."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from gathering_pipeline.errors import InvalidDataError, shorten
from gathering_pipeline.lifecycle import NodeStatus
from gathering_pipeline.models import PipelineDefinition, PipelineNode
from gathering_pipeline.texts import printable

from .layout import HEIGHT, WIDTH, Point, arrange

MOST_DRAWN = 10_000
"""Nodes of the largest graph that is drawn."""

_MARGIN = 12.0
_NAME_WIDTH, _LINE_WIDTH = 19, 27
"""Characters that fit into a line of a node; a wide character counts twice."""
_MOST_LABEL = 30
"""Characters of an edge's label."""

COLORS: Mapping[str, tuple[str, str]] = {
    "page": ("#ffffff", "#14171c"),
    "card": ("#ffffff", "#1c2027"),
    "soft": ("#f4f5f7", "#242932"),
    "line": ("#d5d9e0", "#3a414d"),
    "text": ("#1b1f24", "#e8ebf0"),
    "muted": ("#57606a", "#a4adba"),
    "pending": ("#57606a", "#a4adba"),
    "running": ("#0757c7", "#7ab5ff"),
    "completed": ("#136c33", "#56d27c"),
    "failed": ("#b71c1c", "#ff8f87"),
    "timeout": ("#b71c1c", "#ff8f87"),
    "cancelled": ("#7d4e00", "#e8b04a"),
    "skipped": ("#57606a", "#a4adba"),
}
"""Names of colours: in the light and in the dark. Texts have a contrast of 4.5:1 to page, card and soft."""

ICONS: Mapping[str, str] = {
    "pending": "M8 2.5a5.5 5.5 0 1 0 .01 0",
    "running": "M5 3l8 5-8 5z",
    "completed": "M3 8.5l3.5 3.5 6.5-8",
    "failed": "M3.5 3.5l9 9m0-9l-9 9",
    "timeout": "M8 2.5a5.5 5.5 0 1 0 .01 0M8 5v3.5l2 1.5",
    "cancelled": "M8 2.5a5.5 5.5 0 1 0 .01 0M4.2 4.2l7.6 7.6",
    "skipped": "M3 4l4 4-4 4m5-8l4 4-4 4",
}
"""Outlines of the signs of the statuses, in a square of 16."""


def color_style() -> str:
    """The colours as variables of CSS, for light and dark."""
    light, dark = ("".join(f"--{name}:{both[at]};" for name, both in COLORS.items()) for at in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


GRAPH_STYLE = (
    "svg.graph{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    ".graph .box{fill:var(--card);stroke:var(--line);stroke-width:1.25}"
    ".graph .name{font-size:12.5px;font-weight:600;fill:var(--text)}"
    ".graph .what{font-size:11px;fill:var(--muted)}"
    ".graph .edge{fill:none;stroke:var(--muted);stroke-width:1.4}"
    ".graph .edge.untaken{stroke-dasharray:4 4;opacity:.75}"
    ".graph .tip{fill:var(--muted)}"
    ".graph .label{font-size:11px;fill:var(--text);stroke:var(--page);stroke-width:4px;paint-order:stroke;"
    "stroke-linejoin:round;text-anchor:middle}"
    ".graph .sign{fill:none;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}"
    + "".join(
        f".graph .{status} .box{{stroke:var(--{status})}}.graph .{status} .sign{{stroke:var(--{status})}}"
        f".graph .{status} .bar{{fill:var(--{status})}}.graph .{status} .what{{fill:var(--{status})}}"
        for status in NodeStatus
    )
    + ".graph .pending .box,.graph .skipped .box{stroke-dasharray:4 3}.graph .skipped .name{fill:var(--muted)}"
)
"""The style of ``to_svg``, without the colours."""


@dataclass(frozen=True, slots=True)
class NodeLook:
    """How a node of a run is drawn.

    Attributes:
        status: Its status.
        detail: What stands behind the status, such as the duration.
    """

    status: NodeStatus
    detail: str = ""


# --- Mermaid ----------------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[^\w ,/]|_")
_MARKS = re.compile(r"\$(?=\$)|:(?=fa-)")
"""What begins a formula or an icon, if it is followed by more; a space without width keeps both apart."""


def to_mermaid(definition: PipelineDefinition) -> str:
    """A graph as a flowchart of Mermaid; an edge to an unknown node is left out.

    Args:
        definition: The graph.
    """
    names = {node.id: f"n{place}" for place, node in enumerate(definition.nodes)}
    lines = ["flowchart LR"]
    lines += [
        f'    {names[node.id]}["{_mermaid_text(node.name)}<br/>{_mermaid_text(node.type)}"]'
        for node in definition.nodes
    ]
    for edge in definition.edges:
        if edge.from_node in names and edge.to_node in names:
            label = f'|"{_mermaid_text(edge.condition)}"|' if (edge.condition or "").strip() else ""
            lines.append(f"    {names[edge.from_node]} -->{label} {names[edge.to_node]}")
    return "\n".join(lines) + "\n"


def _mermaid_text(text: str | None) -> str:
    """A text in which nothing is syntax of Mermaid, Markdown or HTML: what is no letter or digit is a code."""
    # Mermaid looks for marks after it has read the codes
    shown = _MARKS.sub("\\g<0>\u200b", shorten(printable(text or ""), 200))
    return _PLAIN.sub(lambda match: f"#{ord(match[0])};", shown) or "#8203;"


_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8"'
    ' orient="auto" markerUnits="userSpaceOnUse"><path class="tip" d="M0 0l8 4-8 4z"/></marker></defs>'
)

# --- SVG --------------------------------------------------------------------------------------------------------------


def to_svg(
    definition: PipelineDefinition,
    looks: Mapping[str, NodeLook] | None = None,
    untaken: Collection[tuple[str, str]] = (),
    *,
    title: str = "",
    embedded: bool = False,
) -> str:
    """A graph as SVG, at the editor's positions where all nodes have them, else in columns by generation.

    The graph may be invalid: an edge to an unknown node is left out.

    Args:
        definition: The graph.
        looks: Of a run: how its nodes are drawn, by id.
        untaken: Of a run: the ends of edges that were not taken.
        title: What screen readers say.
        embedded: Whether it stands in a page that has ``GRAPH_STYLE`` and the colours.

    Raises:
        InvalidDataError: The graph has more than ``MOST_DRAWN`` nodes.
    """
    if (number := len(definition.nodes)) > MOST_DRAWN:
        raise InvalidDataError(
            f"the graph has {number:,} nodes: an SVG has at most {MOST_DRAWN:,}, Mermaid has no such limit"
        )
    layout = arrange(definition)
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    label = _text(title) or f"Graph of {number} nodes"
    shrink = f' style="width:min(100%,{width:.0f}px);min-width:{width * 0.75:.0f}px;height:auto"' if embedded else ""
    head = (
        f'<svg class="graph" xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"{shrink}'
        f' viewBox="{-_MARGIN:.0f} {-_MARGIN:.0f} {width:.0f} {height:.0f}" role="img" aria-label="{label}">'
    )
    style = "" if embedded else f"<style>{color_style()}{GRAPH_STYLE}svg{{background:var(--page)}}</style>"
    parts, labels = [head, style, _TIP], []
    for (_, _, place), route in zip(layout.links, layout.routes, strict=True):
        edge = definition.edges[place]
        kind = "edge untaken" if (edge.from_node, edge.to_node) in untaken else "edge"
        parts.append(f'<path class="{kind}" marker-end="url(#tip)" d="{_curve(route)}"/>')
        if text := (edge.condition or "").strip():
            (from_x, from_y), (to_x, to_y) = route[:2]
            labels.append(
                f'<text class="label" x="{(from_x + to_x) / 2:.1f}" y="{(from_y + to_y) / 2 + 4:.1f}">'
                f"{_text(_fit(shorten(text, 200), _MOST_LABEL))}</text>"
            )
    for node, corner in zip(layout.nodes, layout.places, strict=True):
        parts.append(_draw_node(node, corner, (looks or {}).get(node.id)))
    return "\n".join([part for part in [*parts, *labels] if part] + ["</svg>\n"])


def _curve(route: Sequence[Point]) -> str:
    """The path along a route, level at each of its points."""
    path = [f"M{route[0][0]:.1f} {route[0][1]:.1f}"]
    for (x, y), (to_x, to_y) in pairwise(route):
        if y == to_y and to_x > x:
            path.append(f"H{to_x:.1f}")
        else:
            bow = max(abs(to_x - x) / 2, 24.0)
            path.append(f"C{x + bow:.1f} {y:.1f} {to_x - bow:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}")
    return "".join(path)


def _draw_node(node: PipelineNode, corner: Point, look: NodeLook | None) -> str:
    words = [node.type, *(word for word in ([look.status.value, look.detail] if look else []) if word)]
    what = " · ".join(words)
    line = what if len(what) <= _LINE_WIDTH else " · ".join(words[1:] or words)
    name = shorten(node.name.strip() or node.id, 1_000)
    x, y = corner
    sign = (
        f'<rect class="bar" x="5" y="9" width="4" height="{HEIGHT - 18:.0f}" rx="2"/>'
        f'<path class="sign" transform="translate({WIDTH - 26:.0f} 8)" d="{ICONS[look.status]}"/>'
        if look
        else ""
    )
    room = _NAME_WIDTH if look else _NAME_WIDTH + 2
    return (
        f'<g class="node {look.status if look else ""}" transform="translate({x:.1f} {y:.1f})">'
        f"<title>{_text(name)} ({_text(node.id)}): {_text(what)}</title>"
        f'<rect class="box" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" rx="8"/>{sign}'
        f'<text class="name" x="16" y="23">{_text(_fit(name, room))}</text>'
        f'<text class="what" x="16" y="42">{_text(_fit(line, _LINE_WIDTH))}</text></g>'
    )


def _fit(text: str, room: int) -> str:
    """A text without its middle, where it doesn't fit into so many narrow characters: ids differ at their ends."""
    shown = printable(text)
    width = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in shown]
    if sum(width) <= room:
        return shown
    head, tail, used = 0, len(shown), 1  # the ellipsis
    while True:
        is_head = head <= len(shown) - tail
        used += width[head if is_head else tail - 1]
        if used > room:
            return f"{shown[:head].rstrip()}…{shown[tail:].lstrip()}"
        head, tail = (head + 1, tail) if is_head else (head, tail - 1)


def _text(text: str) -> str:
    return escape(printable(text))
