"""Random graphs through every door: what is illegal is refused at each of them, and what is legal is not.

``GATHERING_GRAPHS`` says how many graphs, 1,000 unless that is set; ``GATHERING_SEED`` repeats a run. The answers are those
of an oracle of its own, below, so that the validator in Python and the guard in SQL can't be wrong together.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import psycopg
import pytest
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from gathering_pipeline import (
    InvalidPipelineError,
    Pipeline,
    find_issues,
    get_execution_order,
    parse_pipeline_definition,
)
from gathering_pipeline.database import Database
from gathering_pipeline.validator import INCOMPLETE_CODES
from tests.migrations.test_alembic import run_psql

GRAPHS = int(os.environ.get("GATHERING_GRAPHS", "1000"))
SEED = int(os.environ.get("GATHERING_SEED", random.randrange(2**32)))
BATCH = 100

Graph = tuple[list[Any], list[Any], str]

TYPES = ["trigger", "agent", "condition", "action", "parallel", "delay"]
BLANKS = [
    " ",
    "\t",
    "\n",
    "\x0b",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u2028",
    "\u202f",
    "\u205f",
    "\u3000",
]
LETTERS = [
    "a",
    "B",
    "7",
    "-",
    "é",
    "e\u0301",
    "ß",
    "Ω",
    "я",
    "中",
    "ﬁ",
    "\u200b",
    "\ufeff",
    "\u180e",
    "😀",
    "\U0010fffd",
    "'",
    '"',
    "\\",
    "%",
    "{",
    "\x01",
    "\x7f",
]
ODD = [None, True, False, 0, 1, -1.5, "", " ", "x", [], ["x"], [1], {}, {"x": 1}]


# --- graphs ------------------------------------------------------------------------------------------------------------


def text(chance: random.Random) -> str:
    """An id that is good as a rule, in any Unicode."""
    word = "".join(chance.choices(LETTERS, k=chance.randint(1, 6)))
    if chance.random() < 0.15:
        word += chance.choice([*BLANKS, "  ", "-"]) + "z"  # inside, where blanks are welcome
    if chance.random() < 0.03:
        word = (word * 100)[: chance.choice([99, 100])].rstrip("".join(BLANKS)) or "x"
    return word


def pick(chance: random.Random, options: list[Any]) -> Any:
    """A copy, so that no defect is put into two places, or into itself."""
    return deepcopy(chance.choice(options))


def config(chance: random.Random, kind: str) -> dict[str, Any]:
    """A complete configuration, now and then with more in it."""
    made: dict[str, Any] = {
        "agent": {"agent_id": chance.choice([7, 1.5, "writer"]), "task": "write"},
        "condition": {"condition": chance.choice(["x > 1", "", " "])},
        "action": chance.choice([{}, {"action": None}, {"action": "notify"}]),
        "delay": chance.choice([{}, {"seconds": 0}, {"seconds": 2.5}, {"seconds": None}]),
    }.get(kind, {})
    if chance.random() < 0.2:
        made = made | {chance.choice(["agent_id", "cron", "ключ", ""]): pick(chance, ODD)} | made
    return made


def graph(chance: random.Random) -> Graph:
    """A legal graph: acyclic, its nodes in topological order or not."""
    ids = list({text(chance): None for _ in range(chance.choice([0, 1, 2, 3, 5, 8, 13]))})
    nodes: list[Any] = []
    for name in ids:
        kind = chance.choice(TYPES)
        node: dict[str, Any] = {"id": name, "type": kind, "name": chance.choice(["", "Node", " "])}
        made = config(chance, kind)
        if made or chance.random() < 0.5:
            node["config"] = made
        if chance.random() < 0.3:
            node["position"] = chance.choice([None, {"x": 1, "y": -2.5}])
        if chance.random() < 0.2:
            node["next"] = chance.choice([None, [], ids[:1], ["nowhere"]])
        if chance.random() < 0.1:
            node["more"] = pick(chance, ODD)
        nodes.append(node)
    pairs = [(a, b) for b in range(len(ids)) for a in range(b) if chance.random() < 2 / len(ids)]
    edges: list[Any] = []
    for at, (a, b) in enumerate(pairs):
        edge: dict[str, Any] = {"id": f"{text(chance)}{at}", "from": ids[a], "to": ids[b]}
        if chance.random() < 0.2:
            edge["condition"] = chance.choice([None, "", "x"])
        if chance.random() < 0.1:
            edge["animated"] = pick(chance, ODD)
        edges.append(edge)
    if chance.random() < 0.5:
        chance.shuffle(nodes)
        chance.shuffle(edges)
    return nodes, edges, chance.choice(["active", "draft", "paused"])


def nested(levels: int) -> Any:
    value: Any = 1
    for at in range(levels):
        value = [value] if at % 2 else {"x": value}
    return value


def spoil(chance: random.Random, made: Graph) -> Graph:
    """Put one defect into a graph; some are none after all."""
    nodes, edges, status = made
    items = chance.choice([nodes, edges])
    if not items:
        return made
    item = chance.choice(items)
    if not isinstance(item, dict):
        return made
    blank = chance.choice(BLANKS)
    name = item["id"] if isinstance(item.get("id"), str) else "x"
    ways: list[Callable[[], object]] = [
        lambda: items.append(dict(item)),
        lambda: items.append(pick(chance, ODD)),
        lambda: item.update(id=pick(chance, [name + blank, blank + name, blank, "", "x" * 100, "x" * 101, *ODD])),
        lambda: item.pop(chance.choice(list(item)), None),
        lambda: item.update({chance.choice(list(item)): pick(chance, ODD)}),
        lambda: item.update(config=chance.choice([None, [], "x", {"agent_id": 7}, {"agent_id": blank, "task": "x"}])),
        lambda: item.update(
            config={"agent_id": pick(chance, ODD), "task": pick(chance, ODD), "seconds": pick(chance, ODD)}
        ),
        lambda: item.update(config={"condition": pick(chance, ODD), "action": pick(chance, ODD), "seconds": -0.5}),
        lambda: item.update(type=chance.choice(["Agent", "agent ", "webhook", 1, None])),
        lambda: item.update({pick(chance, ["from", "to"]): pick(chance, [name, "nowhere", name + blank, *ODD])}),
        lambda: item.update(more=nested(chance.choice([61, 62, 63, 64, 70, 200]))),
        lambda: item.update(more=chance.choice([1e308, 10**308, 10**309, -(10**400), 1.5])),
        lambda: item.update({chance.choice(["name", "more", "condition"]): "a\0b"}),
        lambda: edges.append({"id": "back", "from": edges[-1]["to"], "to": edges[0]["from"]}) if edges else None,
    ]
    with suppress(KeyError, TypeError):  # spoiled before
        chance.choice(ways)()
    return nodes, edges, status


def cases() -> Iterator[Graph]:
    chance = random.Random(SEED)
    for _ in range(GRAPHS):
        made = graph(chance)
        for _ in range(chance.choice([0, 0, 1, 1, 2, 3])):
            made = spoil(chance, made)
        yield made


# --- the oracle --------------------------------------------------------------------------------------------------------


def storable(value: Any, level: int = 1) -> bool:
    """Whether JSONB and a float hold a value; the list itself is the first of 64 levels."""
    if isinstance(value, dict | list):
        inside = value if isinstance(value, list) else [*value, *value.values()]
        return level <= 64 and all(storable(item, level + 1) for item in inside)
    if isinstance(value, str):
        return "\0" not in value
    return not isinstance(value, int) or abs(value) < 2**1024 - 2**970


def good_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.strip() == value


def good_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def good_node(node: Any) -> bool:
    if not (isinstance(node, dict) and good_id(node.get("id")) and node.get("type") in TYPES):
        return False
    made, following = node.get("config", {}), node.get("next")
    if not (
        isinstance(node.get("name"), str)
        and isinstance(made, dict)
        and (node.get("position") is None or isinstance(node["position"], dict))
        and (following is None or (isinstance(following, list) and all(isinstance(item, str) for item in following)))
    ):
        return False
    return {
        "agent": lambda: (good_text(made.get("agent_id")) or number(made["agent_id"])) and good_text(made.get("task")),
        "condition": lambda: good_text(made.get("condition")),
        "action": lambda: good_text(made.get("action")),
        "delay": lambda: made.get("seconds") is None or (number(made["seconds"]) and made["seconds"] >= 0),
    }.get(node["type"], lambda: True)()


def complete(node: Any) -> bool:
    made = node.get("config", {})
    if node["type"] == "agent":
        return all(str(made.get(key) if made.get(key) is not None else "").strip() for key in ("agent_id", "task"))
    return node["type"] != "condition" or made.get("condition") is not None


def good_edge(edge: Any) -> bool:
    return (
        isinstance(edge, dict)
        and good_id(edge.get("id"))
        and all(isinstance(edge.get(end), str) for end in ("from", "to"))
        and good_text(edge.get("condition"))
    )


def legal(made: Graph) -> bool:
    """Whether a graph may be stored with this status."""
    nodes, edges, status = made
    if not (storable(nodes) and storable(edges) and all(map(good_node, nodes)) and all(map(good_edge, edges))):
        return False
    places = {node["id"]: [edge["to"] for edge in edges if edge["from"] == node["id"]] for node in nodes}
    if len(places) < len(nodes) or len({edge["id"] for edge in edges}) < len(edges):
        return False
    if not all(edge[end] in places for edge in edges for end in ("from", "to")):
        return False
    if status == "active" and not (nodes and all(map(complete, nodes))):
        return False
    while free := places.keys() - {end for ends in places.values() for end in ends}:
        places = {name: ends for name, ends in places.items() if name not in free}
    return not places


# --- the doors ---------------------------------------------------------------------------------------------------------

Door = Callable[[int, str, str, str], None]
"""Stores a graph, given a number to be its name, nodes, edges (JSON) and status; raises what refused it."""

INSERT = "INSERT INTO circle.pipelines (name, nodes, edges, status) VALUES (%s, %s, %s, %s)"


def by_merge(raw: psycopg.Connection, name: str, nodes: str, edges: str, status: str) -> None:
    raw.execute(
        "MERGE INTO circle.pipelines p USING (SELECT %s, %s::jsonb, %s::jsonb, %s) AS s (name, nodes, edges, status)"
        " ON p.name = s.name WHEN NOT MATCHED THEN"
        " INSERT (name, nodes, edges, status) VALUES (s.name, s.nodes, s.edges, s.status)",
        (name, nodes, edges, status),
    )


def by_conflict(raw: psycopg.Connection, name: str, nodes: str, edges: str, status: str) -> None:
    """As an update of what is there: an empty draft that has the name and the id."""
    with raw.transaction():
        row = raw.execute(
            "INSERT INTO circle.pipelines (name, status) VALUES (%s, 'draft') RETURNING id", (name,)
        ).fetchone()
        assert row is not None
        raw.execute(
            "INSERT INTO circle.pipelines (id, name, nodes, edges, status) VALUES (%s, %s, %s, %s, %s) ON CONFLICT (id)"
            " DO UPDATE SET nodes = excluded.nodes, edges = excluded.edges, status = excluded.status",
            (row[0], name, nodes, edges, status),
        )


def by_copy(raw: psycopg.Connection, name: str, nodes: str, edges: str, status: str) -> None:
    with raw.cursor().copy("COPY circle.pipelines (name, nodes, edges, status) FROM STDIN") as copy:
        copy.write_row((name, nodes, edges, status))


def as_replica(raw: psycopg.Connection, name: str, nodes: str, edges: str, status: str) -> None:
    with raw.transaction():
        raw.execute("SET LOCAL session_replication_role = replica")
        raw.execute(INSERT, (name, nodes, edges, status))


def values(name: str, made: Graph) -> dict[str, Any]:
    return {"name": name, "nodes": made[0], "edges": made[1], "status": made[2]}


def by_add(session: Session, name: str, made: Graph) -> None:
    session.add(Pipeline(**values(name, made), allow_incomplete=made[2] != "active"))
    session.flush()


def by_bulk_save(session: Session, name: str, made: Graph) -> None:
    session.bulk_save_objects([Pipeline(**values(name, made))])


def by_insert(session: Session, name: str, made: Graph) -> None:
    options = {"allow_incomplete": made[2] != "active"}
    session.execute(insert(Pipeline), [values(name, made)], execution_options=options)


def by_core(session: Session, name: str, made: Graph) -> None:
    session.connection().execute(Pipeline.__table__.insert(), [values(name, made)])  # type: ignore[attr-defined]


RAW: dict[str, Callable[[psycopg.Connection, str, str, str, str], None]] = {
    "COPY": by_copy,
    "MERGE": by_merge,
    "ON CONFLICT": by_conflict,
    "replica": as_replica,
}
MAPPED: dict[str, Callable[[Session, str, Graph], None]] = {
    "add": by_add,
    "bulk save": by_bulk_save,
    "insert(Pipeline)": by_insert,
    "Core": by_core,
}
REFUSALS = ("PL008", "22P05", "22003", "23502")
"""SQLSTATEs of a refusal: ours; JSON that JSONB can't hold."""


def through_raw(raw: psycopg.Connection, made: list[Graph]) -> None:
    for at, (nodes, edges, status) in enumerate(made):
        for door, store in RAW.items():
            try:
                store(raw, f"{door} {at}", json.dumps(nodes), json.dumps(edges), status)
            except psycopg.Error as error:
                assert error.sqlstate in REFUSALS, (door, SEED, nodes, edges)  # noqa: PT017 - it is not what is tested


def through_sqlalchemy(session: Session, made: list[Graph]) -> None:
    for at, one in enumerate(made):
        for door, store in MAPPED.items():
            copied = json.loads(json.dumps(one))
            try:
                with session.begin_nested():
                    store(session, f"{door} {at}", tuple(copied))
            except InvalidPipelineError:
                pass
            except DBAPIError as error:
                state = getattr(error.orig, "sqlstate", None)
                assert state in REFUSALS, (door, SEED, one)
    session.commit()


def through_psql(url: str, made: list[Graph]) -> None:
    """One psql for all of them; every statement is its own transaction, and goes on after an error."""

    def quoted(value: str) -> str:
        return "'" + value.replace("'", "''") + "'"

    script = "".join(
        "INSERT INTO circle.pipelines (name, nodes, edges, status) VALUES ("
        + ", ".join(map(quoted, (f"psql {at}", json.dumps(nodes), json.dumps(edges), status)))
        + ");\n"
        for at, (nodes, edges, status) in enumerate(made)
    )
    run_psql(url, script, stop=False)


def test_only_legal_graphs_get_in_whichever_door_they_take(
    database: Database, database_url: str, raw: psycopg.Connection
) -> None:
    print(f"GATHERING_SEED={SEED}")
    everything = list(cases())
    answers = [legal(made) for made in everything]
    assert GRAPHS < BATCH or 0.2 < sum(answers) / GRAPHS < 0.8, "there are enough of both"
    doors = [*RAW, *MAPPED, "psql"]
    for begin in range(0, GRAPHS, BATCH):
        batch = everything[begin : begin + BATCH]
        for at, made in enumerate(batch):
            assert python_accepts(made) == answers[begin + at], (SEED, made)
        through_raw(raw, batch)
        with database.session() as session:
            through_sqlalchemy(session, batch)
        through_psql(database_url, batch)
        stored = dict(
            raw.execute(
                "SELECT p.name, array_agg(v.node_id ORDER BY v.position) FROM circle.pipelines p"
                " LEFT JOIN circle.pipeline_version_nodes v ON v.pipeline_id = p.id AND v.version = p.version GROUP BY p.id"
            ).fetchall()
        )
        expected = {
            f"{door} {at}": order(made) if door != "replica" else [None]
            for at, made in enumerate(batch)
            for door in doors
            if answers[begin + at]
        }
        wrong = {name: (name in expected, batch[int(name.split()[-1])]) for name in stored.keys() ^ expected.keys()}
        assert not wrong, (SEED, wrong)
        assert stored == expected, SEED
        raw.execute("DELETE FROM circle.pipelines")


def python_accepts(made: Graph) -> bool:
    nodes, edges, status = made
    try:
        issues = find_issues(parse_pipeline_definition(nodes, edges))
    except InvalidPipelineError:
        return False
    draft = INCOMPLETE_CODES if status != "active" else frozenset()
    return all(issue.severity == "warning" or issue.code in draft for issue in issues)


def order(made: Graph) -> list[str | None]:
    return list(get_execution_order(parse_pipeline_definition(made[0], made[1]))) or [None]


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (([], [], "draft"), True),
        (([], [], "active"), False),
        (([{"id": "a", "type": "agent", "name": ""}], [], "draft"), True),
        (([{"id": "a", "type": "agent", "name": ""}], [], "active"), False),
        (([{"id": "a", "type": "delay", "name": ""}], [{"id": "e", "from": "a", "to": "a"}], "draft"), False),
        (([{"id": "a", "type": "delay", "name": ""}] * 2, [], "draft"), False),
        (([{"id": "a ", "type": "delay", "name": ""}], [], "draft"), False),
        (([{"id": "a", "type": "delay", "name": "", "x": nested(62)}], [], "active"), True),
        (([{"id": "a", "type": "delay", "name": "", "x": nested(63)}], [], "active"), False),
    ],
)
def test_the_oracle_knows(made: Graph, answer: bool) -> None:
    assert legal(made) == answer
