"""Graphs as Mermaid and SVG: where nodes stand, and that no name is more than a text."""

from __future__ import annotations

import random
import re
from itertools import combinations
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from gathering_pipeline import InvalidDataError, NodeStatus, PipelineDefinition
from gathering_pipeline.rendering import MOST_DRAWN, NodeLook, graph, to_mermaid, to_svg
from gathering_pipeline.rendering.layout import GAP_X, HEIGHT, WIDTH, arrange, generations
from tests.support.graphs import DIAMOND, chain
from tests.support.graphs import graph as make_graph

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "</text><script>alert(1)</script>\"'&#x3c;]]>\x1b[31m\x00\u202e`*_1. fa:fa-car"


def definition(spec: str, **fields: Any) -> PipelineDefinition:
    nodes, edges = make_graph(spec)
    return PipelineDefinition.from_json([node | fields for node in nodes], edges)


def placed(spec: str, *places: Any) -> PipelineDefinition:
    nodes, edges = make_graph(spec)
    return PipelineDefinition.from_json(
        [node | {"position": place} for node, place in zip(nodes, places, strict=True)], edges
    )


def overlaps(made: PipelineDefinition) -> list[tuple[str, str]]:
    layout = arrange(made)
    boxes = list(zip(layout.nodes, layout.places, strict=True))
    return [
        (one.id, other.id)
        for (one, (x, y)), (other, (other_x, other_y)) in combinations(boxes, 2)
        if abs(x - other_x) < WIDTH and abs(y - other_y) < HEIGHT
    ]


def columns(made: PipelineDefinition) -> dict[str, int]:
    layout = arrange(made)
    return {node.id: round(x / (WIDTH + GAP_X)) for node, (x, _) in zip(layout.nodes, layout.places, strict=True)}


# --- the layout -------------------------------------------------------------------------------------------------------


def test_layout_without_positions_has_a_column_for_each_generation() -> None:
    assert columns(definition("a>b b>c a>c d")) == {"a": 0, "b": 1, "c": 2, "d": 0}
    assert overlaps(definition("a>b b>c a>c d")) == []


def test_layout_uses_the_positions_of_the_editor() -> None:
    layout = arrange(placed("a>b b>c", {"x": 50, "y": 100}, {"x": 450, "y": 40}, {"x": 450, "y": 160}))
    assert layout.places == [(0, 60), (400, 0), (400, 120)]
    near = arrange(placed("a>b", {"x": 0, "y": 0}, {"x": 200, "y": 0}))
    assert near.places[0] == (0.0, 0.0)
    assert WIDTH < near.places[1][0] < 2 * WIDTH


@pytest.mark.parametrize(
    "place",
    [
        None,
        {},
        {"x": 0, "y": 0},
        {"x": "1", "y": 0},
        {"x": True, "y": False},
        {"x": float("nan"), "y": 0},
        {"x": float("inf"), "y": 0},
        {"x": 10**400, "y": 0},
    ],
)
def test_layout_with_a_useless_position_has_columns(place: Any) -> None:
    made = PipelineDefinition.model_construct(**dict(definition("a>b")))
    for node, position in zip(made.nodes, ({"x": 0, "y": 0}, place), strict=True):
        node.position = position
    assert columns(made) == {"a": 0, "b": 1}


def test_layout_of_random_graphs_has_no_overlaps() -> None:
    random.seed(17)
    for _ in range(60):
        number = random.randint(1, 40)
        links = [
            f"n{source}>n{target}"
            for source, target in combinations(range(number), 2)
            if random.random() < random.choice([0.02, 0.1, 0.4])
        ]
        made = definition(" ".join([*(f"n{at}" for at in range(number)), *links]))
        assert overlaps(made) == []
        spread = placed(
            " ".join(f"n{at}" for at in range(number)),
            *({"x": random.randint(0, 2000), "y": random.randint(0, 2000)} for _ in range(number)),
        )
        assert overlaps(spread) == []


def test_layout_of_invalid_graphs_draws_what_can_be_drawn() -> None:
    cyclic = definition("a>b b>c c>a c>d e>e")
    assert overlaps(cyclic) == []
    assert set(columns(cyclic)) == {"a", "b", "c", "d", "e"}
    nodes, edges = make_graph("a>b")
    twice = PipelineDefinition.from_json([*nodes, nodes[0]], [*edges, {"id": "x", "from": "a", "to": "ghost"}])
    layout = arrange(twice)
    assert ([node.id for node in layout.nodes], len(layout.links)) == (["a", "b"], 1)
    assert to_svg(PipelineDefinition(nodes=[], edges=[])).startswith("<svg")
    assert to_mermaid(twice).count("-->") == 1


def test_generations_enter_a_cycle_at_its_first_node() -> None:
    assert generations(4, [(0, 1), (1, 2), (2, 1), (2, 3)]) == [0, 1, 2, 3]
    assert generations(3, [(0, 1), (1, 2), (2, 0)]) == [0, 1, 2]


@pytest.mark.parametrize("shape", ["chain", "wide", "random"])
def test_svg_of_large_graph_has_every_node(shape: str) -> None:
    random.seed(1)
    number = MOST_DRAWN if shape == "random" else 1_000
    spec = {
        "chain": lambda: chain(number),
        "wide": lambda: " ".join(f"root>n{at}" for at in range(number - 1)),
        "random": lambda: " ".join(f"n{random.randrange(at)}>n{at}" for at in range(1, number)),
    }[shape]()
    made = definition(spec)
    assert to_svg(made).count('class="node') == number


def test_svg_of_too_large_graph_is_refused() -> None:
    made = definition("a")
    made.nodes *= MOST_DRAWN + 1
    with pytest.raises(InvalidDataError, match="the graph has 10,001 nodes: an SVG has at most 10,000"):
        to_svg(made)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_svg_of_any_name_is_well_formed_and_only_text() -> None:
    made = definition("a>b=x", name=EVIL)
    made.edges[0].condition = EVIL
    for looks in (None, {"a": NodeLook(NodeStatus.FAILED, EVIL)}):
        drawn = ET.fromstring(to_svg(made, looks, title=EVIL))  # noqa: S314 - it was just made
        assert {element.tag.removeprefix(SVG) for element in drawn.iter()} == {
            *("svg", "style", "defs", "marker", "path", "g", "title", "rect", "text")
        }
        assert any("\\x1b[31m\\x00\\u202e" in (element.text or "") for element in drawn.iter(f"{SVG}title"))
        assert not [key for element in drawn.iter() for key in element.attrib if key.startswith("on")]


def test_svg_cuts_names_that_do_not_fit() -> None:
    texts = [
        element.text or ""
        for element in ET.fromstring(to_svg(definition("a", name="fasterq-dump_ID0000002" * 3))).iter(f"{SVG}text")  # noqa: S314
    ]
    assert texts[0].startswith("fasterq-")
    assert texts[0].endswith("0000002")
    assert len(texts[0]) <= 21
    wide = to_svg(definition("a", name="日" * 40))
    assert 5 < max(map(len, re.findall("日[日…]*日", wide.split("</title>")[1]))) <= 11


def test_svg_of_a_run_tells_each_status_by_sign_and_word() -> None:
    made = definition(" ".join(NodeStatus))
    drawn = to_svg(made, {status: NodeLook(status, "3 s") for status in NodeStatus}, {("a", "b")})
    for status in NodeStatus:
        assert f'd="{graph.ICONS[status]}"' in drawn
        assert f"action · {status}" in drawn
    assert len(set(graph.ICONS.values())) == len(graph.ICONS)


def test_svg_marks_edges_that_were_not_taken() -> None:
    drawn = to_svg(definition("a>b a>c"), {}, {("a", "c")})
    assert (drawn.count('class="edge"'), drawn.count('class="edge untaken"')) == (1, 1)


def test_mermaid_of_any_name_is_only_text() -> None:
    made = definition("a>b=x", name=EVIL)
    made.edges[0].condition = 'end"]; click a "javascript:alert(1)"'
    lines = to_mermaid(made).splitlines()
    assert len(lines) == 4
    assert lines[0] == "flowchart LR"
    label = r"(?:[\w ,/]|#\d+;)*"
    assert re.fullmatch(rf'    n0\["{label}<br/>action"\]', lines[1])
    assert re.fullmatch(rf'    n0 -->\|"{label}"\| n1', lines[3])
    assert "#36;#36;" not in to_mermaid(definition("a", name="$$x$$"))
    assert to_mermaid(definition("a", name="")).splitlines()[1] == '    n0["#8203;<br/>action"]'


def test_mermaid_of_a_graph_has_all_its_edges() -> None:
    assert to_mermaid(definition(DIAMOND)).count("-->") == 4


# --- colours ----------------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """As https://www.w3.org/TR/WCAG22/#dfn-relative-luminance defines it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_of_texts_have_contrast(scheme: int) -> None:
    grounds = ("page", "card", "soft")
    for name in graph.COLORS.keys() - {*grounds, "line"}:
        for ground in grounds:
            dark, light = sorted(luminance(graph.COLORS[key][scheme]) for key in (name, ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
