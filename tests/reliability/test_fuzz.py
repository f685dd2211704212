"""Random graphs on every write path: no illegal one is stored, no legal one is refused, all are ordered alike.

``GATHERING_GRAPHS`` graphs take each path, 1,000 unless that is set. A failure says with which ``GATHERING_SEED``
the same graphs come again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine

from gathering_pipeline import (
    InvalidPipelineError,
    IssueCode,
    find_issues,
    get_execution_order,
    parse_pipeline_definition,
)
from gathering_pipeline.repositories._call import translate
from gathering_pipeline.validator import INCOMPLETE_CODES, find_json_issues
from tests.support.write_paths import BY_HOOK, INSERTING, UPDATING, Row, Stage, refusal, sqlstate

GRAPHS = int(os.environ.get("GATHERING_GRAPHS", "400"))
SEED = int(os.environ.get("GATHERING_SEED") or 20261124)
BATCH = 100

Items = list[dict[str, Any]]


@dataclass
class Case:
    """A graph as it is written."""

    row: Row
    defects: list[str]
    order: list[str] | None
    """Ids in execution order by the oracle; none if the graph is illegal."""
    by_validator: list[str] | None
    """The same by what is tested."""
    issues: Issues
    """The errors that Python reports."""


# --- graphs ----------------------------------------------------------------------------------------------------------

BLANKS = [chr(at) for at in range(0x110000) if chr(at).isspace()]
PIECES = [
    *("a", "A", "а", "А", "Å", "\u212b", "A\u030a", "é", "e\u0301", "\u0301", "ß", "ss", "ﬁ", "fi", "İ", "Σ", "ς"),
    *("日本", "𝄞", "🦉", "\U0010ffff", "\u200b", "\u200d", "\ufeff", "\u180e", "\u00ad", "\u202e", "\ufffd", "\uffff"),
    *(
        "!",
        "~",
        "~~",
        "\x7f",
        "\x80",
        "\x01",
        "\x1b",
        "'",
        '"',
        "\\",
        "\\u0041",
        "%",
        "%s",
        "%(a)s",
        ":a",
        "$$",
        "{",
        "}",
    ),
    *("--", "/*", ";", "null", "0", "1e3", "node-1718031024311", " b", "\tb", "\u3000b", "\u2028b", "x" * 97),
]
LARGEST, LARGEST_FLOAT = 17976931348623157 * 10**292, 1.7976931348623157e308
DEEPEST = 64
"""Levels of JSON that a stored list may have, itself included."""


def some_text(rng: random.Random) -> str:
    drawn = (chr(rng.randrange(1, 0x110000)) for _ in range(rng.randrange(3)))
    pieces = rng.choices(PIECES, k=rng.randrange(1, 4)) + [c for c in drawn if not 0xD800 <= ord(c) <= 0xDFFF]
    rng.shuffle(pieces)
    return "".join(pieces).strip()[:100].strip() or "a"


def nested(levels: int, rng: random.Random) -> Any:
    value: Any = rng.choice([1, "x", None])
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {"k": value}
    return value


def some_json(rng: random.Random, levels: int) -> Any:
    """A value of at most so many levels."""
    number = rng.choice([0, -1, 2**63, 0.5, 5e-324, LARGEST_FLOAT, LARGEST, -(10**300)])
    flat: list[Any] = [None, True, number, some_text(rng), "", [], {}]
    return rng.choice([*flat, [number, {some_text(rng): flat}], nested(levels, rng) if rng.random() < 0.2 else {}])


def some_config(rng: random.Random, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {key: None for key in ("agent_id", "task", "cron", "seconds") if rng.random() < 0.2}
    config |= {some_text(rng): some_json(rng, DEEPEST - 3) for _ in range(rng.choice([0, 0, 1, 2]))}
    config |= {"type": rng.choice(["delay", None, 7])} if rng.random() < 0.1 else {}
    own: dict[str, dict[str, Any]] = {
        "agent": {"agent_id": rng.choice([7, 1.5, 0, "x", some_text(rng)]), "task": some_text(rng)},
        "condition": {"condition": rng.choice(["", " ", "true", some_text(rng)])},
        "action": rng.choice([{}, {"action": None}, {"action": " "}, {"action": some_text(rng)}]),
        "delay": rng.choice([{}, {"seconds": None}, {"seconds": 0}, {"seconds": -0.0}, {"seconds": 1e300}]),
    }
    others = {"seconds": "not its own", "agent_id": [], "condition": 1} if rng.random() < 0.2 else {}
    return config | own.get(kind, others)


def some_graph(rng: random.Random) -> tuple[Items, Items]:
    """A legal graph."""
    ids = list(dict.fromkeys(some_text(rng) for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 12, 30]))))
    if ids and rng.random() < 0.2:  # looks like another one
        ids = list(dict.fromkeys([*ids, *(unicodedata.normalize(form, ids[0]).strip() for form in ("NFD", "NFKC"))]))
        ids = [name for name in ids if 0 < len(name) <= 100 and not name[0].isspace()]
    nodes: Items = []
    for name in ids:
        kind = rng.choice(["trigger", "agent", "condition", "action", "parallel", "delay"])
        node: dict[str, Any] = {"id": name, "type": kind, "name": rng.choice(["N", "", some_text(rng)])}
        node["config"] = some_config(rng, kind)
        if not node["config"] and rng.random() < 0.5:
            del node["config"]
        node |= {"position": rng.choice([None, {}, {"x": 50, "y": 0.5}])} if rng.random() < 0.3 else {}
        node |= {"next": rng.choice([None, [], ["nowhere"], [rng.choice(ids)]])} if rng.random() < 0.3 else {}
        node |= {some_text(rng): some_json(rng, DEEPEST - 2)} if rng.random() < 0.1 else {}
        nodes.append(node)
    pairs = [sorted(rng.sample(range(len(ids)), 2)) for _ in range(rng.randrange(2 * len(ids)))] if len(ids) > 1 else []
    edges: Items = []
    for name, (a, b) in zip(dict.fromkeys(some_text(rng) for _ in pairs), pairs, strict=False):
        edge: dict[str, Any] = {"id": name, "from": ids[a], "to": ids[b]}
        edge |= {"condition": rng.choice([None, "", "x > 1"])} if rng.random() < 0.2 else {}
        edge |= {some_text(rng): some_json(rng, DEEPEST - 2)} if rng.random() < 0.1 else {}
        edges.append(edge)
    if rng.random() < 0.5:
        rng.shuffle(nodes)
    rng.shuffle(edges)
    return nodes, edges


Defect = Callable[[random.Random, Items, Items], object]


def put(what: str, key: str, *values: Any, kind: str | None = None) -> Defect:
    """One of these values at a node (of a kind), in its configuration, or at an edge."""

    def spoil(rng: random.Random, nodes: Items, edges: Items) -> None:
        item = rng.choice(edges if what == "edge" else nodes)
        if kind:
            item["type"] = kind
        if what == "config":
            item = item.setdefault("config", {})
        item[key] = copy.deepcopy(rng.choice(values))

    return spoil


def cut(what: str, key: str) -> Defect:
    return lambda rng, nodes, edges: rng.choice(edges if what == "edge" else nodes).pop(key)


def spoil_id(make: Callable[[random.Random, str], Any]) -> Defect:
    def spoil(rng: random.Random, nodes: Items, edges: Items) -> None:
        rng.choice(rng.choice([nodes, edges]))["id"] = make(rng, some_text(rng)[:99].strip())

    return spoil


def same_id(rng: random.Random, nodes: Items, edges: Items) -> None:
    items = rng.choice([nodes, edges])
    items.insert(rng.randrange(len(items) + 1), copy.deepcopy(rng.choice(items)) | {"name": "again"})


def dangle(rng: random.Random, nodes: Items, edges: Items) -> None:
    edge, end = rng.choice(edges), rng.choice(["from", "to"])
    ghosts = ["nowhere", edge[end] + " ", unicodedata.normalize("NFD", edge[end] + "é"), edge[end].swapcase() + "x", ""]
    edge[end] = rng.choice(ghosts)


def reads_like_an_id(rng: random.Random, nodes: Items, edges: Items) -> None:
    edge = rng.choice(edges)
    before, (value, text) = edge["from"], rng.choice([(7, "7"), (True, "true"), ([], "[]"), ({}, "{}")])
    for item, key in [(node, "id") for node in nodes] + [(edge, end) for edge in edges for end in ("from", "to")]:
        item[key] = text if item[key] == before else item[key]
    edge[rng.choice(["from", "to"])] = value


def ring(rng: random.Random, nodes: Items, edges: Items) -> None:
    ids = rng.sample([node["id"] for node in nodes], rng.randrange(1, len(nodes) + 1))
    edges += [{"id": f"ring-{at}", "from": a, "to": b} for at, (a, b) in enumerate(pairwise([*ids, ids[0]]))]
    rng.shuffle(edges)


def spoil_json(rng: random.Random, nodes: Items, edges: Items) -> None:
    wrong = ["a\0", "\ud800", "x\udfff", float("nan"), float("inf"), 10**400, -LARGEST - 1, 2**1024 - 1]
    item = rng.choice(nodes + edges)
    place = rng.choice([item, item.setdefault("mine", {})])
    value = rng.choice(wrong)
    if isinstance(value, str) and rng.random() < 0.3:
        place[value] = 1
    else:
        place["k"] = rng.choice([value, [value], {"deep": [value]}])


def too_deep(rng: random.Random, nodes: Items, edges: Items) -> None:
    levels = DEEPEST + rng.choice([0, 0, 1, 40])  # the list and the item add to them
    rng.choice(nodes + edges)["mine"] = nested(levels - 1, rng)


def no_item(rng: random.Random, nodes: Items, edges: Items) -> None:
    wrong: list[Any] = [None, 1, "x", [], ["id"], True]
    rng.choice([nodes, edges]).append(rng.choice(wrong))


def anything_anywhere(rng: random.Random, nodes: Items, edges: Items) -> None:
    """It may be no defect after all: the oracle decides."""
    item = rng.choice(nodes + edges)
    item = rng.choice([item, item.get("config") or item])
    item[rng.choice([*item, "agent_id", "task", "condition", "action", "seconds"])] = copy.deepcopy(
        rng.choice([None, True, False, 0, 1, -1.5, "", " ", "x", [], ["x"], [1], [None], {}, {"x": 1}])
    )


NO_TEXT: tuple[Any, ...] = (None, 1, True, [], {}, ["x"])
NO_OBJECT: tuple[Any, ...] = (1, True, "x", [], [{}])
DEFECTS: dict[str, Defect] = {
    "an id that is no text": spoil_id(lambda rng, _: rng.choice([1, 1.5, True, None, [], {}])),
    "an empty id": spoil_id(lambda rng, _: rng.choice(["", *BLANKS, "\t \n"])),
    "a blank before an id": spoil_id(lambda rng, text: rng.choice(BLANKS) + text),
    "a blank after an id": spoil_id(lambda rng, text: text + rng.choice(BLANKS)),
    "a long id": spoil_id(
        lambda rng, text: (text * 1_001)[: rng.choice([1_001, 1_001, 2_000])].strip().ljust(1_001, "x")
    ),
    "no id": cut("node", "id"),
    "no id of an edge": cut("edge", "id"),
    "an id twice": same_id,
    "an end that is nowhere": dangle,
    "an end that only reads like an id": reads_like_an_id,
    "an end that is no text": put("edge", "from", *NO_TEXT),
    "no end": cut("edge", "to"),
    "a cycle": ring,
    "a type": put("node", "type", "robot", "Agent", "agent ", "", *NO_TEXT, ["agent"]),
    "no type": cut("node", "type"),
    "a name": put("node", "name", *NO_TEXT),
    "no name": cut("node", "name"),
    "a config": put("node", "config", None, *NO_OBJECT),
    "a position": put("node", "position", *NO_OBJECT),
    "a next": put("node", "next", 1, "a", {}, [1], ["a", None], [["a"]]),
    "a condition of an edge": put("edge", "condition", 1, True, [], ["x"], {}),
    "an agent's id": put("config", "agent_id", True, [], {}, ["x"], kind="agent"),
    "an agent's task": put("config", "task", 1, True, [], ["x"], {}, kind="agent"),
    "a condition": put("config", "condition", 1, True, [], ["x"], {}, kind="condition"),
    "an action": put("config", "action", 1, True, [], ["x"], {}, kind="action"),
    "a delay": put("config", "seconds", -1, -0.5, "5", True, [], [5], {}, {"seconds": 5}, kind="delay"),
    "no agent": put("config", "agent_id", None, "", *BLANKS, "\t \n", kind="agent"),
    "no task": put("config", "task", None, "", *BLANKS, kind="agent"),
    "no condition": put("config", "condition", None, kind="condition"),
    "anything anywhere": anything_anywhere,
    "no JSON": spoil_json,
    "too deep": too_deep,
    "an item": no_item,
}


def some_case(rng: random.Random, number: int) -> Case:
    nodes, edges = some_graph(rng)
    status = rng.choice(["active", "draft", "paused"])
    applied = []
    for defect in rng.sample([*DEFECTS], rng.choice([0, 0, 0, 1, 1, 1, 1, 1, 2, 4])):
        try:
            DEFECTS[defect](rng, nodes, edges)
            applied.append(defect)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass  # there is no such place in this graph, or another defect sits there already
    row = {"id": number, "name": f"g-{number}", "status": status, "nodes": nodes, "edges": edges}
    if rng.random() < 0.02:
        applied.append("no list")
        row["nodes"] = rng.choice([None, {}, "[]", 0, True])
    graph, active = (row["nodes"], row["edges"]), status == "active"
    return Case(row, applied, by_oracle(*graph, active=active), by_validator(*graph, active=active), by_python(*graph))


@lru_cache(10)
def batch(number: int) -> tuple[list[Case], list[Case]]:
    """Legal and illegal graphs; the short form makes them once for all paths."""
    rng = random.Random(f"{SEED}-{number}")
    cases = [some_case(rng, at) for at in range(1, BATCH + 1)]
    return [case for case in cases if case.order is not None], [case for case in cases if case.order is None]


# --- what is to be expected: twice, written independently ------------------------------------------------------------


def storable(value: Any, levels: int) -> bool:
    if isinstance(value, str):
        return not any(c == "\0" or 0xD800 <= ord(c) <= 0xDFFF for c in value)
    if isinstance(value, list | dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(storable(item, levels - 1) for item in items)
    return (
        value is None or isinstance(value, bool) or abs(value) <= (LARGEST if isinstance(value, int) else LARGEST_FLOAT)
    )


def is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value[0] not in BLANKS and value[-1] not in BLANKS


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def has_text(value: Any) -> bool:
    return isinstance(value, str) and any(c not in BLANKS for c in value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def good_node(node: Any, *, active: bool) -> bool:
    if not isinstance(node, dict) or not (is_id(node.get("id")) and is_text(node.get("name"))):
        return False
    config, following, position = node.get("config", {}), node.get("next"), node.get("position")
    shaped = isinstance(config, dict) and (position is None or isinstance(position, dict))
    if not shaped or not (following is None or (isinstance(following, list) and all(map(is_text, following)))):
        return False
    kind = node.get("type") if is_text(node.get("type")) else None
    agent, task, condition = config.get("agent_id"), config.get("task"), config.get("condition")
    action, seconds = config.get("action"), config.get("seconds")
    whole = has_text(task) and (has_text(agent) or is_number(agent))
    return {
        "trigger": True,
        "parallel": True,
        "agent": (agent is None or is_text(agent) or is_number(agent))
        and (task is None or is_text(task))
        and (whole or not active),
        "condition": is_text(condition) or (condition is None and not active),
        "action": action is None or is_text(action),
        "delay": seconds is None or (is_number(seconds) and seconds >= 0),
    }.get(kind or "", False)


def good_edge(edge: Any, ids: set[str]) -> bool:
    if not isinstance(edge, dict) or not is_id(edge.get("id")):
        return False
    ends, condition = [edge.get("from"), edge.get("to")], edge.get("condition")
    return all(is_text(end) and end in ids for end in ends) and (condition is None or is_text(condition))


def by_oracle(nodes: Any, edges: Any, *, active: bool) -> list[str] | None:
    """The order of execution of a graph that may be stored: by the longest path from a root, ties by place."""
    if not (isinstance(nodes, list) and isinstance(edges, list) and storable([nodes, edges], DEEPEST + 1)):
        return None
    if (active and not nodes) or not all(good_node(node, active=active) for node in nodes):
        return None
    level = {node["id"]: 0 for node in nodes}
    if len(level) < len(nodes) or not all(good_edge(edge, {*level}) for edge in edges):
        return None
    if len({edge["id"] for edge in edges}) < len(edges):
        return None
    for _ in range(len(nodes) + 1):
        before = dict(level)
        for edge in edges:
            level[edge["to"]] = max(level[edge["to"]], level[edge["from"]] + 1)
        if level == before:
            return sorted(level, key=level.__getitem__)
    return None  # round and round


def by_validator(nodes: Any, edges: Any, *, active: bool) -> list[str] | None:
    try:
        definition = parse_pipeline_definition(nodes, edges)
    except InvalidPipelineError:
        return None
    errors = {issue.code for issue in find_issues(definition) if issue.severity == "error"}
    return None if errors - (set() if active else INCOMPLETE_CODES) else get_execution_order(definition)


Issues = frozenset[tuple[IssueCode, tuple[str | int, ...]]]
"""Code and place of each error."""


def by_python(nodes: Any, edges: Any) -> Issues:
    issues = find_json_issues(nodes, edges)
    return frozenset((issue.code, issue.loc) for issue in issues if issue.severity == "error")


def reported(error: Exception) -> Issues:
    """What the database or a hook reports; nothing where it is another refusal than that of a graph."""
    typed = translate(error) if isinstance(error, psycopg.Error) else error
    return frozenset((issue.code, issue.loc) for issue in getattr(typed, "issues", ()))


# --- the write paths -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(database_url: str, connect: Any) -> Iterator[Stage]:
    engine = create_engine(database_url)
    yield Stage(database_url, engine, connect(database_url))
    engine.dispose()


def comparable(nodes: Any, edges: Any) -> Any:
    """JSONB writes large floats as integers, and knows no negative zero."""
    return json.loads(json.dumps([nodes, edges]), parse_int=float)


NODE, EDGE = {"id": "n", "type": "delay", "name": ""}, {"id": "e", "from": "m", "to": "a"}
STORED = """SELECT p.id, p.name, p.status, p.nodes::text, p.edges::text,
        ARRAY(SELECT v.node_id FROM circle.pipeline_version_nodes v
              WHERE (v.pipeline_id, v.version) = (p.id, p.version) ORDER BY v.position)
    FROM circle.pipelines p WHERE p.name <> 'there before'"""


@pytest.mark.parametrize("path", INSERTING)
def test_random_graph_is_stored_if_and_only_if_legal(path: str, stage: Stage, connect: Any) -> None:
    failures: list[str] = []
    counted: Counter[str] = Counter()
    look: psycopg.Connection = connect(stage.url)
    # JSONB can't be made of what is no text of PostgreSQL; a graph that SQLAlchemy takes for NULL has no default
    wanted = ("InvalidPipelineError",) if path in BY_HOOK else ("InvalidPipelineError", "PL008", "22P", "23502")
    with INSERTING[path](stage) as write:
        for number in range(-(-GRAPHS // BATCH)):
            legal, illegal = batch(number)
            failures += [
                f"the validator disagrees: {case!a}" for case in legal + illegal if case.order != case.by_validator
            ]
            counted.update(graphs=len(legal + illegal), legal=len(legal))
            look.execute("TRUNCATE circle.pipelines CASCADE")
            if path in UPDATING:  # half of them
                look.execute(
                    "INSERT INTO circle.pipelines (id, name) SELECT generate_series(2, 100, 2), 'there before'"
                )

            for refused in ([*legal[:3], illegal[0]], *([case] for case in illegal)):
                error = refusal(write, [case.row for case in refused])
                counted.update([f"refused by {sqlstate(error)}" if error else "not refused"])
                if not error or not sqlstate(error).startswith(wanted):
                    failures.append(f"refused by {error!r}: {refused[-1]!a}")
                elif unknown := reported(error) - refused[-1].issues:
                    failures.append(f"reported as {unknown}, by Python as {refused[-1].issues}: {refused[-1]!a}")
            if refusal(write, [case.row for case in legal]):
                failures += [
                    f"refused by {error!r}: {case!a}" for case in legal if (error := refusal(write, [case.row]))
                ]
            stored = {row[0]: row[1:] for row in look.execute(STORED)}
            failures += [f"stored: {case!a}" for case in illegal if case.row["id"] in stored]
            for case in legal:
                name, status, nodes, edges, order = stored.get(case.row["id"], (None, None, "null", "null", None))
                # JSONB writes large floats as integers, and knows no negative zero
                written = json.loads(json.dumps([case.row["nodes"], case.row["edges"]]), parse_int=float)
                found = json.loads(f"[{nodes}, {edges}]", parse_int=float)
                if (name, status, found) != (case.row["name"], case.row["status"], written):
                    failures.append(f"not as it was given: {case!a}")
                elif path != "a replica" and order != case.order:  # whose versions come from the primary
                    failures.append(f"sorted as {order}: {case!a}")
    print(f"\n{path}: {dict(sorted(counted.items()))}, failures: {len(failures)} (GATHERING_SEED={SEED})")
    assert counted["graphs"] * 0.2 < counted["legal"] < counted["graphs"] * 0.8
    assert not failures, f"GATHERING_SEED={SEED}: {len(failures)}, such as\n" + "\n".join(failures[:5])


@pytest.mark.parametrize(
    ("nodes", "edges", "active", "order"),
    [
        ([], [], False, []),
        ([], [], True, None),
        ([NODE | {"type": "agent"}], [], False, ["n"]),
        ([NODE | {"type": "agent"}], [], True, None),
        ([NODE], [EDGE | {"from": "n", "to": "n"}], False, None),
        ([NODE, NODE], [], False, None),
        ([NODE | {"id": "n\x85"}], [], False, None),
        ([NODE | {"x": [[[]]]}], [], False, ["n"]),
        ([NODE | {"x": float("nan")}], [], False, None),
        ([NODE, NODE | {"id": "a"}, NODE | {"id": "m"}], [EDGE], True, ["n", "m", "a"]),
    ],
)
def test_oracle_knows_examples(nodes: Items, edges: Items, active: bool, order: list[str] | None) -> None:
    assert by_oracle(nodes, edges, active=active) == order
