"""The schema as a clean build leaves it, and how a database differs from that.

``catalog.json`` lies beside the revisions and lists every object at head, as PostgreSQL prints it. ``make generated``
writes it; a test compares it with a clean build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sqlalchemy.engine import Connection

from gathering_pipeline import migrations


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a database that is not as it should be.

    Attributes:
        severity: ``error``: a promise of this package doesn't hold; ``warning``: somebody should look at it.
        code: Stable name of what was found, such as ``demoted_trigger``.
        object: What it is about: an object of the schema, a row, a session.
        message: One sentence that says what is wrong.
        advice: What to do, or what a repair does.
        repair: SQL that mends it, each text a transaction of its own; empty where a person has to decide.
        outcome: What came of the repair; None where none was tried.
    """

    severity: Literal["error", "warning"]
    code: str
    object: str
    message: str
    advice: str
    repair: tuple[str, ...] = field(default=(), repr=False)
    outcome: str | None = None


class Object(NamedTuple):
    """An object of the schema. Names are quoted where SQL needs it; ``table`` is empty where it belongs to none."""

    kind: str
    table: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" of circle.{self.table}" if self.table else "")


# With the search path pg_catalog PostgreSQL prints names with their schema. Of a function the digest of its source is
# compared. The id of node runs stays INTEGER where the table was large at revision 008.
_CAPTURE = """
WITH ours AS MATERIALIZED (
    SELECT oid, quote_ident(relname) AS tab, relkind FROM pg_class
    WHERE relnamespace = to_regnamespace('circle') AND relkind IN ('r', 'p', 'v') AND relname <> 'alembic_version'
), columns AS (
    SELECT c.tab, quote_ident(a.attname) AS col, a.attnotnull, pg_get_expr(d.adbin, d.adrelid) AS expression,
           CASE WHEN (c.tab, a.attname) = ('pipeline_node_runs', 'id')
                     AND a.atttypid IN ('int4'::regtype, 'int8'::regtype) THEN 'integer or bigint'
                ELSE format_type(a.atttypid, a.atttypmod) END AS type
    FROM ours c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relkind <> 'v'
)
SELECT 'table' AS kind, '' AS tab, tab AS name, '' AS definition FROM ours WHERE relkind <> 'v'
UNION ALL SELECT 'view', '', 'circle.' || tab, pg_get_viewdef(oid) FROM ours WHERE relkind = 'v'
UNION ALL SELECT 'column', tab, col, type FROM columns
UNION ALL SELECT 'NOT NULL', tab, col, '' FROM columns WHERE attnotnull
UNION ALL SELECT 'default', tab, col, expression FROM columns WHERE expression IS NOT NULL
UNION ALL
SELECT 'constraint', c.tab, quote_ident(x.conname), pg_get_constraintdef(x.oid)
FROM ours c JOIN pg_constraint x ON x.conrelid = c.oid WHERE x.contype IN ('c', 'f', 'p', 'u', 'x')
UNION ALL
SELECT 'index', c.tab, i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) || CASE
    WHEN i.indisvalid AND i.indisready THEN ''
    WHEN EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
                 WHERE l.relation = i.indrelid AND l.mode = 'ShareUpdateExclusiveLock') THEN ' BEING BUILT'
    ELSE ' INVALID' END
FROM ours c JOIN pg_index i ON i.indrelid = c.oid
WHERE NOT EXISTS (SELECT FROM pg_constraint x WHERE x.conindid = i.indexrelid AND x.contype IN ('p', 'u', 'x'))
UNION ALL
SELECT 'trigger', c.tab, quote_ident(t.tgname), pg_get_triggerdef(t.oid)
FROM ours c JOIN pg_trigger t ON t.tgrelid = c.oid WHERE NOT t.tgisinternal
UNION ALL
SELECT 'firing', c.tab, quote_ident(t.tgname), t.tgenabled::text
FROM ours c JOIN pg_trigger t ON t.tgrelid = c.oid WHERE NOT t.tgisinternal OR t.tgenabled <> 'O'
UNION ALL
SELECT 'rule', c.tab, quote_ident(r.rulename), pg_get_ruledef(r.oid)
FROM ours c JOIN pg_rewrite r ON r.ev_class = c.oid AND r.ev_type <> '1'
UNION ALL
SELECT 'row security', c.tab, 'policies', coalesce(string_agg(quote_ident(o.polname), ', ' ORDER BY o.polname), 'none')
FROM ours c JOIN pg_class t ON t.oid = c.oid AND t.relrowsecurity LEFT JOIN pg_policy o ON o.polrelid = c.oid
GROUP BY c.tab
UNION ALL
SELECT 'function', '', p.oid::regprocedure::text, concat_ws(', ', pg_get_function_result(p.oid), l.lanname,
       p.provolatile, p.prosecdef, p.proisstrict, array_to_string(p.proconfig, ' '),
       encode(sha256(convert_to(p.prosrc, 'UTF8')), 'hex'))
FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE p.pronamespace = to_regnamespace('circle')
ORDER BY 1, 2, 3
"""


def capture(connection: Connection) -> dict[Object, str]:
    """Read every object of schema circle, with its definition. Leaves the connection with its default search path."""
    connection.exec_driver_sql("SET search_path = pg_catalog")
    rows = connection.exec_driver_sql(_CAPTURE, execution_options={"no_parameters": True})
    objects = {Object(kind, table, name): definition for kind, table, name, definition in rows}
    connection.exec_driver_sql("RESET search_path")  # repairs follow
    return objects


def reference() -> dict[Object, str]:
    """The objects that a clean build has."""
    rows = json.loads((migrations.scripts() / "catalog.json").read_text(encoding="utf-8"))
    return {Object(*row[:3]): row[3] for row in rows}


def canonical(definition: str) -> str:
    """A form that is the same on every version, and after a dump and restore; for comparing, not for running.

    When PostgreSQL reads its own output, it moves casts of lists into their items and makes one chain of the ORs that a
    comparison of rows becomes. For aliases of columns see ``same``.
    """
    text = re.sub(r"::(character varying|text)(\[\])?", "", definition)
    while (shorter := re.sub(r"\(('[^']*'|(?:[a-z]\.)?\w+|ARRAY\[[^\]]*\])\)", r"\1", text)) != text:
        text = shorter
    term = r"\((?:[^()]|\([^()]*\))*\)"
    while (flatter := re.sub(rf"(?<=\()\(({term}(?: OR {term})+)\) OR ", r"\1 OR ", text)) != text:
        text = flatter
    return text


def same(one: str, other: str) -> bool:
    """Whether definitions mean the same, apart from aliases that only one has: since version 16 some are left out."""
    parts = [re.findall(r"(\b[a-z]\.)?(\w+|\W)", canonical(text)) for text in (one, other)]
    return len(parts[0]) == len(parts[1]) and all(
        x == y and (a == b or not a or not b) for (a, x), (b, y) in zip(*parts, strict=True)
    )


def differences(connection: Connection) -> Iterator[Finding]:
    """Compare the objects of this package, and what others added to its tables, with a clean build."""
    wanted, found = reference(), capture(connection)
    for item, definition in wanted.items():
        if item not in found:
            if item.kind != "firing":  # it is missing with its trigger
                yield _drift(item, "is missing", _mend(item, wanted))
        elif not same(found[item], definition):
            yield _changed(item, wanted, found[item])
    tables = {item.name for item in wanted if item.kind == "table"}
    functions = {_bare(item) for item in wanted if item.kind == "function"}
    for item, definition in found.items():
        if item not in wanted and (item.table in tables or (item.kind == "function" and _bare(item) in functions)):
            yield from _foreign(item, definition, wanted, found)


def _bare(function: Object) -> str:
    return function.name.partition("(")[0]


def _changed(item: Object, wanted: Mapping[Object, str], found: str) -> Finding:
    if item.kind == "firing":
        mode = "is disabled" if found == "D" else f"fires in mode {found}, not {wanted[item]}"
        return _demoted(item, mode, wanted[item])
    if found.endswith(" BEING BUILT"):
        message = "is not valid: it is being built now, or was left over by a build that was broken off"
        return Finding("warning", "invalid_index", str(item), message, "look again when nobody works on the table")
    if found.endswith(" INVALID"):
        advice = "rows that break it stop the build; a repair drops the index and builds it again beside the writers"
        message = "is INVALID: a build was broken off, and no query uses it"
        return Finding("error", "invalid_index", str(item), message, advice, _mend(item, wanted))
    what = "was changed by hand" if item.kind in {"function", "view"} else f"is {found!r}, not {wanted[item]!r}"
    return _drift(item, what, _mend(item, wanted))


def _drift(item: Object, what: str, repair: tuple[str, ...]) -> Finding:
    advice = "a repair makes it as a clean build has it"
    if not repair:
        advice = "find out who changed it; restore it from a backup, or by hand from the output of db sql"
    return Finding("error", "drift", str(item), what, advice, repair)


def _demoted(item: Object, what: str, mode: str) -> Finding:
    always = "ALWAYS " if mode == "A" else ""
    repair = f"ALTER TABLE circle.{item.table} ENABLE {always}TRIGGER {item.name}"
    message = f"{what}: a restore with --disable-triggers does that"
    trigger = f"trigger {item.name} of circle.{item.table}"
    return Finding("error", "demoted_trigger", trigger, message, f"a repair runs {repair}", (repair,))


def _foreign(
    item: Object, definition: str, wanted: Mapping[Object, str], found: Mapping[Object, str]
) -> Iterator[Finding]:
    """What others added is theirs; named is only what can refuse or change what we write."""
    column = Object("column", item.table, item.name)
    if item.kind == "trigger" and re.match(r"CREATE (CONSTRAINT )?TRIGGER .+? (BEFORE|INSTEAD OF) ", definition):
        message = f"is not ours and can change rows past our checks: {definition}"
        yield Finding("warning", "foreign_trigger", str(item), message, "make sure that it leaves our columns alone")
    elif item.kind == "firing" and Object("trigger", item.table, item.name) not in found:
        yield _demoted(item, "guards a foreign key and doesn't fire as it should", "O")
    elif item.kind == "constraint" or (definition.startswith("CREATE UNIQUE") and not definition.endswith(" INVALID")):
        message = f"is not ours and may refuse what we write: {definition}"
        yield Finding("warning", "foreign_constraint", str(item), message, "drop it if it is not meant")
    elif item.kind == "rule":
        message = f"is not ours and can change or drop what we write: {definition}"
        yield Finding("warning", "foreign_rule", str(item), message, "drop it if it is not meant")
    elif item.kind == "row security":
        message = f"is enabled: who is not the owner reads and writes only what these allow: {definition}"
        yield Finding(
            "warning", "row_security", str(item), message, "make sure that they allow all rows to our services"
        )
    elif item.kind == "function":
        message = "is not ours, and calls of ours may get it instead, or fail because both fit"
        yield Finding("warning", "foreign_function", str(item), message, "drop it if it is not meant")
    elif item.kind == "default" and column in wanted:
        repair = f"ALTER TABLE circle.{item.table} ALTER COLUMN {item.name} DROP DEFAULT"
        message = f"is not ours and fills in what we leave empty: {definition}"
        yield Finding("error", "drift", str(item), message, f"a repair runs {repair}", (repair,))
    elif item.kind == "NOT NULL" and (column in wanted or Object("default", item.table, item.name) not in found):
        repair = f"ALTER TABLE circle.{item.table} ALTER COLUMN {item.name} DROP NOT NULL"
        yield Finding(
            "error", "drift", str(item), "is not ours and refuses our rows", f"a repair runs {repair}", (repair,)
        )
    elif item.kind == "index" and definition.endswith(" INVALID"):
        repair = f"DROP INDEX CONCURRENTLY {item.name}"
        message = "is INVALID: it is not ours, costs every write, and no query uses it"
        yield Finding("warning", "invalid_index", str(item), message, f"a repair runs {repair}", (repair,))


def _mend(item: Object, wanted: Mapping[Object, str]) -> tuple[str, ...]:
    """SQL that makes an object as it should be beside live writers; nothing where that can't be."""
    kind, table, name = item
    definition, alter, repair = wanted[item], f"ALTER TABLE circle.{table}", []
    if kind == "default":
        repair = [f"{alter} ALTER COLUMN {name} SET DEFAULT {definition}"]
    elif kind == "NOT NULL":  # a validated check spares the scan under the exclusive lock
        check = f"tmp_{table}_not_null"
        repair = [
            f"{alter} DROP CONSTRAINT IF EXISTS {check}, ADD CONSTRAINT {check} CHECK ({name} IS NOT NULL) NOT VALID",
            f"{alter} VALIDATE CONSTRAINT {check}",
            f"{alter} ALTER COLUMN {name} SET NOT NULL",
            f"{alter} DROP CONSTRAINT {check}",
        ]
    elif kind == "constraint" and definition.startswith(("CHECK", "FOREIGN KEY")):
        add = f"{alter} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} {definition} NOT VALID"
        repair = [add, f"{alter} VALIDATE CONSTRAINT {name}"]
    elif kind == "index":
        create = definition.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)
        repair = [f"DROP INDEX CONCURRENTLY IF EXISTS {name}", create]
    elif kind == "trigger":
        always = "ALWAYS " if wanted[Object("firing", table, name)] == "A" else ""
        create = definition.replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", 1)
        repair = [f"{create}; {alter} ENABLE {always}TRIGGER {name}"]
    elif kind == "view":
        repair = [f"CREATE OR REPLACE VIEW {name} AS {definition}"]
    elif kind == "function":  # as the last revision has it
        source = re.compile(rf"^CREATE OR REPLACE FUNCTION {name.split('(')[0]}\(.*?\$\$;$", re.MULTILINE | re.DOTALL)
        steps = [step.sql for revision in migrations.revisions() for step in migrations.steps(revision)]
        repair = source.findall("\n".join(steps))[-1:]
    return tuple(repair)
