"""The schema of a database as a list of facts; revisions and their scripts."""

import io
import subprocess
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory

from gathering_pipeline import (
    migrations,
)
from tests.support import servers
from tests.support.servers import connect as open_connection

ROOT = Path(__file__).parents[2]


CREATED_BY_006 = "created by gathering_pipeline revision 006_pipelines"


# One row a fact: kind, name, definition. Names are shown with their schema, whatever the search path is.
CATALOG = """
SELECT 'schema', nspname, '' FROM pg_namespace WHERE nspname = 'circle'
UNION ALL
SELECT 'relation', c.relname, format('%s, %s, %s', c.relkind, c.relpersistence, c.reloptions) FROM pg_class c
WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind <> 'i'
UNION ALL
SELECT 'column', format('%s.%s', c.relname, a.attname),
       concat_ws(' ', rank() OVER (PARTITION BY c.oid ORDER BY a.attnum), format_type(a.atttypid, a.atttypmod),
                 CASE WHEN a.attnotnull THEN 'NOT NULL' END, 'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid),
                 NULLIF(a.attidentity::text || a.attgenerated::text, ''),
                 'COLLATE ' || NULLIF(a.attcollation, t.typcollation)::regcollation::text,
                 'STORAGE ' || a.attstorage::text)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind IN ('r', 'v', 'p', 'c')
UNION ALL
SELECT 'constraint', format('%s.%s', conrelid::regclass, conname),
       pg_get_constraintdef(oid) || CASE WHEN convalidated THEN '' ELSE ' (not validated)' END
FROM pg_constraint WHERE connamespace = to_regnamespace('circle')
UNION ALL
SELECT 'index', indexrelid::regclass::text,
       pg_get_indexdef(indexrelid) || CASE WHEN indisvalid AND indisready THEN '' ELSE ' (invalid)' END
FROM pg_index WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = to_regnamespace('circle'))
UNION ALL
SELECT 'trigger', format('%s.%s', tgrelid::regclass, tgname), format('%s %s', pg_get_triggerdef(oid), tgenabled)
FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '')
FROM pg_proc p WHERE p.pronamespace = to_regnamespace('circle')
UNION ALL
SELECT 'view', c.relname, pg_get_viewdef(c.oid) FROM pg_class c
WHERE c.relnamespace = to_regnamespace('circle') AND c.relkind = 'v'
UNION ALL
SELECT 'sequence', s.sequencename, format(
    '%s from %s by %s to %s, owned by %s', s.data_type, s.start_value, s.increment_by, s.max_value, (
                  SELECT format('%s.%s', d.refobjid::regclass, a.attname) FROM pg_depend d
                  JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                  WHERE d.objid = format('circle.%I', s.sequencename)::regclass AND d.deptype = 'a'))
FROM pg_sequences s WHERE s.schemaname = 'circle'
UNION ALL
SELECT 'type', typname, typtype::text FROM pg_type
WHERE typnamespace = to_regnamespace('circle') AND typrelid = 0 AND typelem = 0
UNION ALL
SELECT 'comment', pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
WHERE pg_describe_object(classoid, objoid, objsubid) LIKE '%circle.%'
ORDER BY 1, 2, 3
"""


def catalog(url: str) -> list[str]:
    """Everything that schema circle holds but rows, in one canonical form; Alembic's own table is left out."""
    with open_connection(url) as connection:
        connection.execute("SET search_path = pg_catalog")
        rows = connection.execute(CATALOG).fetchall()
    return [" | ".join(row) for row in rows if "alembic_version" not in row[1]]


def facts(url: str, kind: str, of: tuple[str, ...] = ("",)) -> dict[str, str]:
    """One kind of facts, name to definition, of the tables whose names begin so."""
    found = (line.split(" | ", 2) for line in catalog(url))
    return {
        name: definition
        for what, name, definition in found
        if what == kind and name.removeprefix("circle.").startswith(of)
    }


def revisions() -> list[str]:
    script = ScriptDirectory.from_config(migrations.config())
    return [revision.revision for revision in script.walk_revisions()][::-1]


def script(revision: str, *, down: bool = False) -> str:
    """What ``alembic upgrade --sql`` or ``alembic downgrade --sql`` writes."""
    output = io.StringIO()
    config = migrations.config()
    config.output_buffer = output
    (command.downgrade if down else command.upgrade)(config, revision, sql=True)
    return output.getvalue()


def run_psql(url: str, sql: str) -> None:
    """Run a script as a DBA would."""
    done = subprocess.run(
        [*servers.psql(url), "-v", "ON_ERROR_STOP=1", "-f", "-"],
        input=sql,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def constraints(url: str) -> dict[str, str]:
    """All but NOT NULL, which PostgreSQL 18 lists as well."""
    found = {name.split(".")[-1]: definition for name, definition in facts(url, "constraint").items()}
    return {name: definition for name, definition in found.items() if not definition.startswith("NOT NULL")}
