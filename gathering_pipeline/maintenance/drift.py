"""Drift: how the objects of a database differ from those of a clean build."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sqlalchemy.engine import Connection

from gathering_pipeline.maintenance.catalog import Object, capture, expected, same
from gathering_pipeline.maintenance.findings import Finding
from gathering_pipeline.maintenance.repairs import enable_trigger, rebuild, revoke, violating_rows


def differences(connection: Connection) -> Iterator[Finding]:
    """Compare the objects of this package, and foreign objects on its tables, with a clean build."""
    wanted, found = expected(), capture(connection)
    for item, definition in wanted.items():
        if item not in found:
            if item.kind not in {"firing", "use", "execution"}:  # a missing trigger is one finding; revoked is no drift
                yield _drift(item, "is missing", rebuild(item, wanted))
        elif item.kind != "use" and not same(found[item], definition):
            yield _changed(item, wanted, found[item])
    tables = {item.name for item in wanted if item.kind == "table"}
    functions = {_function_name(item) for item in wanted if item.kind == "function"}
    for item, definition in found.items():
        overloads = item.kind == "function" and _function_name(item) in functions
        if item not in wanted and (item.table in tables or overloads):
            yield from _foreign(item, definition, wanted, found)
    yield from _foreign_uses(wanted, found)
    yield from _excess_rights(found)


def _foreign_uses(wanted: Mapping[Object, str], found: Mapping[Object, str]) -> Iterator[Finding]:
    """Report roles that may execute, and tables that use, a function that only the guards should."""
    for item, definition in found.items():
        if item in wanted:
            continue
        if item.kind == "use" and Object("function", "", definition) in wanted:
            message = f"calls {definition}, which guards another table and refuses this one"
            yield Finding("error", "foreign_trigger", f"trigger {item.name}", message, "drop it")
        elif item.kind == "execution" and Object("function", "", item.name) in wanted:
            message = (
                "may be executed by PUBLIC with the rights of its owner: any role could attach it to its own table"
            )
            repair = revoke(item.name)
            yield Finding("error", "drift", f"function {item.name}", message, f"the repair runs {repair}", (repair,))


def _excess_rights(found: Mapping[Object, str]) -> Iterator[Finding]:
    """Report roles that may write what only triggers should, or put code of their own in their place."""
    grantees: dict[str, list[str]] = {}
    for item, roles in found.items():
        for role in roles.split(", ") if item.kind == "right" else ():
            grantees.setdefault(role, []).append(item.name)
    for role, rights in sorted(grantees.items()):
        message = (
            f"has rights that no service needs, by which it can forge what triggers write: {', '.join(sorted(rights))}"
        )
        advice = "REVOKE them; docs/operations.md has the rights of a service"
        yield Finding("warning", "excess_rights", f"role {role}", message, advice)


def _function_name(function: Object) -> str:
    """The name without its arguments."""
    return function.name.partition("(")[0]


def _changed(item: Object, wanted: Mapping[Object, str], found: str) -> Finding:
    if item.kind == "firing":
        mode = "is disabled" if found == "D" else f"fires in mode {found}, not {wanted[item]}"
        return _demoted(item, mode, wanted[item])
    if found.endswith(" BEING BUILT"):
        message = "is not valid: it is being built now, or an interrupted build left it"
        return Finding("warning", "invalid_index", str(item), message, "look again when no session works on the table")
    if found.endswith(" INVALID"):
        advice = "rows that violate it stop the build; the repair drops the index and builds it again concurrently"
        message = "is INVALID: its build was interrupted, and no query uses it"
        return Finding("error", "invalid_index", str(item), message, advice, rebuild(item, wanted))
    difference = "was changed" if item.kind in {"function", "view"} else f"is {found!r}, not {wanted[item]!r}"
    finding = _drift(item, difference, rebuild(item, wanted))
    rows = violating_rows(finding.repair)
    if rows and same(found, f"{wanted[item]} NOT VALID"):  # left by a repair that failed
        return replace(finding, advice=f"the repair validates it once no row violates it: correct these first, {rows}")
    return finding


def _drift(item: Object, message: str, repair: tuple[str, ...]) -> Finding:
    advice = "the repair restores the definition of a clean build"
    if not repair:
        advice = "find out who changed it; restore it from a backup, or by hand from the output of db sql"
    return Finding("error", "drift", str(item), message, advice, repair)


def _demoted(item: Object, difference: str, mode: str) -> Finding:
    repair = enable_trigger(item, mode)
    message = f"{difference}: a restore with --disable-triggers does that"
    trigger = f"trigger {item.name} of circle.{item.table}"
    return Finding("error", "demoted_trigger", trigger, message, f"the repair runs {repair}", (repair,))


def _foreign(
    item: Object, definition: str, wanted: Mapping[Object, str], found: Mapping[Object, str]
) -> Iterator[Finding]:
    """Report a foreign object only if it can refuse or change what this package writes."""
    if item.kind == "trigger" and re.match(r"CREATE (CONSTRAINT )?TRIGGER .+? (BEFORE|INSTEAD OF) ", definition):
        message = f"is foreign and can change rows without being checked: {definition}"
        advice = "make sure that it leaves the columns of this package alone"
        yield Finding("warning", "foreign_trigger", str(item), message, advice)
    elif item.kind == "firing" and Object("trigger", item.table, item.name) not in found:
        yield _demoted(item, "guards a foreign key and doesn't fire as it should", "O")
    elif item.kind == "constraint" or (definition.startswith("CREATE UNIQUE") and not definition.endswith(" INVALID")):
        message = f"is foreign and may refuse rows of this package: {definition}"
        yield Finding("warning", "foreign_constraint", str(item), message, "drop it if it is not intended")
    elif item.kind == "rule":
        message = f"is foreign and can change or drop what this package writes: {definition}"
        yield Finding("warning", "foreign_rule", str(item), message, "drop it if it is not intended")
    elif item.kind in {"child table", "parent table", "storage", "sequence"}:
        yield from _foreign_relation(item, definition)
    elif item.kind == "row security":
        message = f"is enabled: a role other than the owner reads and writes only what the policies allow: {definition}"
        advice = "make sure that the policies allow all rows to the services"
        yield Finding("warning", "row_security", str(item), message, advice)
    elif item.kind == "function":
        message = "is foreign: a call of this package's function may reach it, or fail because both match"
        yield Finding("warning", "foreign_function", str(item), message, "drop it if it is not intended")
    elif item.kind in {"default", "NOT NULL"}:
        yield from _foreign_property(item, definition, wanted, found)
    elif item.kind == "index" and definition.endswith(" INVALID"):
        repair = f"DROP INDEX CONCURRENTLY {item.name}"
        message = "is INVALID: it is foreign, slows down every write, and no query uses it"
        yield Finding("warning", "invalid_index", str(item), message, f"the repair runs {repair}", (repair,))


def _foreign_relation(item: Object, definition: str) -> Iterator[Finding]:
    """Report what changes whose rows a table has, whether a crash empties it, or which ids it gets."""
    if item.kind == "child table":
        message = "is foreign: its rows are read as rows of this package, and no guard of this package sees them"
        yield Finding("warning", "foreign_child", str(item), message, "run ALTER TABLE ... NO INHERIT on it")
    elif item.kind == "parent table":
        message = "is foreign: who reads or writes it reaches the rows of this package, without the rights on them"
        yield Finding(
            "warning", "foreign_parent", str(item), message, "run ALTER TABLE ... NO INHERIT, or DETACH PARTITION"
        )
    elif item.kind == "storage":
        message = "is UNLOGGED: a crash of the server empties it, and no standby has its rows"
        advice = "run ALTER TABLE ... SET LOGGED at a quiet hour: it rewrites the table under an exclusive lock"
        yield Finding("error", "unlogged", f"table circle.{item.table}", message, advice)
    elif item.kind == "sequence":
        message = f"gives other ids than in a clean build, or fewer: {definition}"
        yield Finding(
            "warning", "sequence", str(item), message, "run ALTER SEQUENCE ... NO MAXVALUE NO CYCLE INCREMENT 1"
        )


def _foreign_property(
    item: Object, definition: str, wanted: Mapping[Object, str], found: Mapping[Object, str]
) -> Iterator[Finding]:
    """Report a default or NOT NULL of a column."""
    column = Object("column", item.table, item.name)
    if item.kind == "default" and column in wanted:
        repair = f"ALTER TABLE circle.{item.table} ALTER COLUMN {item.name} DROP DEFAULT"
        message = f"is foreign and fills a column that this package leaves empty: {definition}"
        yield Finding("error", "drift", str(item), message, f"the repair runs {repair}", (repair,))
    elif item.kind == "NOT NULL" and (
        column in wanted
        or not (Object("default", item.table, item.name) in found or found[column].endswith(" IDENTITY"))
    ):
        repair = f"ALTER TABLE circle.{item.table} ALTER COLUMN {item.name} DROP NOT NULL"
        message = "is foreign and refuses rows of this package"
        yield Finding("error", "drift", str(item), message, f"the repair runs {repair}", (repair,))
