"""Repairs: the SQL that rebuilds an object of the schema, and how the SQL of a finding is run."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import migrations, migrator
from gathering_pipeline.errors import DatabaseError
from gathering_pipeline.maintenance.catalog import Object
from gathering_pipeline.maintenance.findings import Finding

LOCK_TIMEOUT, ATTEMPTS = "200ms", 30
_CHECK_VIOLATION = "23514"


def rebuild(item: Object, expected: Mapping[Object, str]) -> tuple[str, ...]:
    """SQL that gives an object its expected definition while services write; empty if no such SQL exists."""
    kind, table, name = item
    definition, alter, repair = expected[item], f"ALTER TABLE circle.{table}", []
    if kind == "default":
        repair = [f"{alter} ALTER COLUMN {name} SET DEFAULT {definition}"]
    elif kind == "NOT NULL":  # a validated check avoids the scan under the exclusive lock
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
        create = definition.replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", 1)
        repair = [f"{create}; {enable_trigger(item, expected[Object('firing', table, name)])}"]
    elif kind == "view":
        repair = [f"CREATE OR REPLACE VIEW {name} WITH {definition_of_view(name)}"]
    elif kind == "function":
        create = _definition_of_function(name)
        if "SECURITY DEFINER" in definition and Object("execution", "", name) not in expected:
            create += f"\n{revoke(name)};"  # PUBLIC may execute a new function
        repair = [create]
    return tuple(repair)


def definition_of_view(view: str) -> str:
    """The last definition of a view in the revisions: its options and its query.

    What PostgreSQL prints names the columns of a row by their place, which differs among databases.
    """
    sources = rf"^CREATE OR REPLACE VIEW {re.escape(view)} WITH (.+?);$"
    *_, last = re.finditer(sources, _upgrades(), re.MULTILINE | re.DOTALL)
    return last[1]


def _upgrades() -> str:
    return "\n".join(step.sql for revision in migrations.revisions() for step in migrator.steps(revision))


def _definition_of_function(function: str) -> str:
    """The last definition of a function in the revisions, of those with as many parameters."""
    name, _, types = function.rstrip(")").partition("(")
    sources = re.compile(
        rf"^CREATE OR REPLACE FUNCTION {re.escape(name)}\((.*?)\)\s+(?:RETURNS|LANGUAGE).*?\$\$;$",
        re.MULTILINE | re.DOTALL,
    )
    number = len(types.split(",")) if types else 0
    found = [
        source[0]
        for source in sources.finditer(_upgrades())
        if len([p for p in source[1].split(",") if p.strip() and not p.strip().startswith("OUT ")]) == number
    ]
    return found[-1]


def revoke(function: str) -> str:
    """SQL that lets only the owner of a function, and who was granted it, execute it."""
    return f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC"


def enable_trigger(item: Object, mode: str) -> str:
    """SQL that enables a trigger in a mode of ``pg_trigger.tgenabled``."""
    always = "ALWAYS " if mode == "A" else ""
    return f"ALTER TABLE circle.{item.table} ENABLE {always}TRIGGER {item.name}"


def violating_rows(repair: Sequence[str]) -> str | None:
    """A query for the rows that violate the check that a repair adds; None if it adds none."""
    check = re.match(r"ALTER TABLE (\S+) .* CHECK (\(.+\)) NOT VALID$", repair[0], re.DOTALL) if repair else None
    return check and f"SELECT * FROM {check[1]} WHERE NOT {check[2]}"  # noqa: S608 - parts of a generated statement


def run(connection: Connection, finding: Finding) -> str | None:
    """Run the repair of a finding.

    Returns:
        Why it failed, or None.
    """
    done, attempts = 0, 0
    while done < len(finding.repair):
        sql = finding.repair[done]
        # A concurrent build waits for other transactions and blocks no writer.
        builds = " CONCURRENTLY " in sql
        connection.exec_driver_sql(f"SET lock_timeout = '{'0' if builds else LOCK_TIMEOUT}'")
        send = migrator.execute_yielding if builds or " VALIDATE " in sql else migrator.execute
        try:
            send(connection, sql)
            done += 1
            continue
        except migrator.YieldedError:
            reason, is_final = "other sessions waited for it at every attempt", False
        except DatabaseError as error:  # the second connection, which monitors waiting sessions, was refused
            reason, is_final = str(error), True
        except DBAPIError as error:
            diagnostic = getattr(error.orig, "diag", None)
            if error.connection_invalidated or diagnostic is None:
                raise
            reason = f"{diagnostic.message_primary} (SQLSTATE {diagnostic.sqlstate})"
            if diagnostic.sqlstate == _CHECK_VIOLATION and (rows := violating_rows(finding.repair)):
                reason += f"; correct these rows first: {rows}"
            is_final = diagnostic.sqlstate not in migrator.RETRYABLE
        attempts += 1
        if is_final or attempts == ATTEMPTS:
            return f"not repaired: {reason}" + _drop_temporary_check(connection, finding, done)
        if builds:
            done = 0  # an interrupted build leaves its index INVALID; the first statement drops it
        time.sleep(random.uniform(0.1, 0.3))  # noqa: S311 - only spreads the retries
    return None


def _drop_temporary_check(connection: Connection, finding: Finding, done: int) -> str:
    """Drop the temporary check of a failed repair, which would refuse updates of rows that violate it."""
    drop = finding.repair[-1]
    if not done or " DROP CONSTRAINT tmp_" not in drop:
        return ""
    return f"; run {drop} later" if run(connection, replace(finding, repair=(drop,))) else ""
