"""``widen``: changes the INTEGER ids of runs and node runs to BIGINT while services read and write.

Beside each such column a BIGINT one is made, which a trigger keeps equal. Old rows are copied in short transactions,
and the new column gets the indexes and foreign keys of the old one. A last short transaction puts it into the old one's
place. Until then the name of whatever was made begins with ``catalog.TEMPORARY``, so that another call continues.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import migrations, migrator
from gathering_pipeline.errors import ConfigurationError, DatabaseUnavailableError
from gathering_pipeline.maintenance.catalog import TEMPORARY, expected
from gathering_pipeline.maintenance.repairs import definition_of_view
from gathering_pipeline.migrator import Options

BATCH_SECONDS = 0.05
"""How long a batch should take; its rows are locked meanwhile."""
FIRST_BATCH, LARGEST_BATCH = 500, 20_000
PROGRESS_SECONDS = 5.0
_BELOW_EVERY_ID = -(2**31) - 1
_COPYING = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "jit", "synchronous_commit")
"""What is off while rows are copied. A batch goes along the primary key from where the last one ended, and finds its
rows by it: no join, which would be planned by statistics from before. A plan that can't do without what is off counts
as so expensive that it would be compiled, for seconds. What a crash undoes is copied again."""

logger = logging.getLogger("alembic.gathering_pipeline")


@dataclass(frozen=True, slots=True)
class Widening:
    """What ``widen`` would do.

    Attributes:
        columns: The columns that are INTEGER still, with schema and table.
        steps: Titles of the steps that are left.
        obstacles: What prevents it, with what to do: nothing is begun then.
    """

    columns: tuple[str, ...]
    steps: tuple[str, ...]
    obstacles: tuple[str, ...]


def plan(connection: Connection) -> Widening:
    """Look ahead at ``widen``. Takes no lock and changes nothing.

    Raises:
        SchemaRevisionError: The schema is not at head.
    """
    migrations.check(connection)
    migrator.execute(connection, f"SET LOCAL search_path = {migrator.SEARCH_PATH}")
    columns = _narrow_columns(connection)
    steps = tuple(title for title, _ in _steps(connection, columns))
    return Widening(_names(columns), steps, tuple(_obstacles(connection)))


def widen(engine: Engine, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Change the INTEGER ids of runs and node runs to BIGINT. After an interruption another call continues.

    Args:
        engine: Of the database, as the owner of its tables, and of other tables with foreign keys to them.
        options: Those of ``migrations.upgrade``.

    Returns:
        The columns that were changed, with schema and table.

    Raises:
        ConfigurationError: An object depends on a column and can't be put back, such as a view of the host; an option
            can't be used; the role lacks a right.
        DatabaseUnavailableError: Other transactions or another migrator blocked it for longer than ``patience``, or the
            connection broke.
        SchemaRevisionError: The schema is not at head.
    """
    known = migrator.read_options(options or {}, {})
    with (
        migrator.translated_errors("start it again, it continues where it was"),
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        migrator.migration_lock(connection, known),
        migrator.low_impact_session(connection, "lock_timeout", "default_tablespace", *_COPYING),
    ):
        migrator.execute(connection, f"SET lock_timeout = '{known.lock_timeout}'")
        migrations.check(connection)
        first = _narrow_columns(connection)
        # an index or a key that was made meanwhile gets its steps in another round
        while columns := _narrow_columns(connection):
            if obstacles := list(_obstacles(connection)):
                raise ConfigurationError(f"ids can't be changed to BIGINT: {'; '.join(obstacles)}")
            for title, run in _steps(connection, columns):
                logger.info("%s", title)
                run(connection, known)
    return _names(first)


# --- what there is ---------------------------------------------------------------------------------------------------

# The columns that are INTEGER still, and what depends on them: of views those of this package. A twin is what is made
# for an index or a foreign key.
_NARROW = f"""
WITH RECURSIVE narrow AS MATERIALIZED (
    SELECT a.attrelid AS tab, a.attnum AS col, a.attname AS name, '{TEMPORARY}' || a.attname AS wide
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = to_regnamespace('circle') AND a.atttypid = 'int4'::regtype AND (c.relname, a.attname) IN
        (('pipeline_runs', 'id'), ('pipeline_node_runs', 'id'), ('pipeline_node_runs', 'run_id'))
), dependents AS MATERIALIZED (
    SELECT n.*, d.classid, d.objid, d.objsubid, d.deptype FROM narrow n
    JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = n.tab AND d.refobjsubid = n.col
), showing (view, depth) AS (
    SELECT r.ev_class, 1 FROM dependents d JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
    UNION
    SELECT r.ev_class, s.depth + 1
    FROM showing s JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.view
    JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid AND r.ev_class <> s.view
), views AS MATERIALIZED (
    SELECT c.*, c.oid::regclass AS view, (SELECT max(depth) FROM showing WHERE view = c.oid) AS depth FROM pg_class c
    WHERE c.oid IN (SELECT view FROM showing) AND c.relkind = 'v'
      AND c.oid::regclass::text IN (SELECT name FROM (VALUES $VIEWS) s (name, query))
), indexes AS MATERIALIZED (
    SELECT i.*, c.relname AS name, '{TEMPORARY}' || c.oid AS twin, c.reltablespace
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE EXISTS (SELECT FROM narrow n WHERE n.tab = i.indrelid AND n.col = ANY (i.indkey))
), keys AS MATERIALIZED (
    SELECT f.*, '{TEMPORARY}' || f.oid AS twin FROM pg_constraint f WHERE f.contype = 'f' AND EXISTS (
        SELECT FROM narrow n
        WHERE n.tab = f.conrelid AND n.col = ANY (f.conkey) OR n.tab = f.confrelid AND n.col = ANY (f.confkey))
)"""
_AGAIN = "drop it, and create it again afterwards"
_OBSTACLES = f"""{_NARROW}, found (object, reason) AS (
    SELECT coalesce('view ' || r.ev_class::regclass, pg_describe_object(d.classid, d.objid, d.objsubid)),
           format('depends on %s.%I: {_AGAIN}', d.tab::regclass, d.name)
    FROM dependents d LEFT JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
    WHERE NOT CASE d.classid
        WHEN 'pg_attrdef'::regclass THEN EXISTS (
            SELECT FROM pg_attrdef f JOIN narrow n ON n.tab = f.adrelid AND n.col = f.adnum WHERE f.oid = d.objid)
        WHEN 'pg_class'::regclass THEN EXISTS (
            SELECT FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
            WHERE c.oid = d.objid AND CASE c.relkind
                WHEN 'S' THEN d.deptype = 'a'
                WHEN 'i' THEN concat_ws(' ', pg_get_expr(i.indexprs, i.indrelid), pg_get_expr(i.indpred, i.indrelid))
                     !~ ('\\m' || d.name || '\\M')
                ELSE false END)
        WHEN 'pg_constraint'::regclass THEN EXISTS (
            SELECT FROM pg_constraint c WHERE c.oid = d.objid AND (
                c.contype IN ('f', 'n') OR c.contype = 'p' AND NOT c.condeferrable
                OR starts_with(c.conname, '{TEMPORARY}')))
        WHEN 'pg_trigger'::regclass THEN EXISTS (SELECT FROM pg_trigger t WHERE t.oid = d.objid AND t.tgconstraint = 0)
        WHEN 'pg_rewrite'::regclass THEN r.ev_class IN (SELECT oid FROM views)
        ELSE d.classid = 'pg_publication_rel'::regclass END
    UNION ALL
    SELECT coalesce('view ' || r.ev_class::regclass, pg_describe_object(d.classid, d.objid, d.objsubid)),
           format('depends on %s: {_AGAIN}', v.view)
    FROM views v JOIN pg_depend d ON d.deptype <> 'i'
        AND (d.refclassid, d.refobjid) IN (('pg_class'::regclass, v.oid), ('pg_type'::regclass, v.reltype))
    LEFT JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
    WHERE r.ev_class IS NULL OR r.ev_class NOT IN (SELECT oid FROM views)
    UNION ALL
    SELECT pg_describe_object(d.classid, d.objid, d.objsubid), format('has rows of %s: {_AGAIN}', c.oid::regclass)
    FROM pg_class c JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid = c.reltype
    WHERE c.oid IN (SELECT tab FROM narrow) AND d.classid = 'pg_class'::regclass AND d.objsubid > 0
    UNION ALL
    SELECT format('table %s', h.inhrelid::regclass), format('inherits from %s: end that', h.inhparent::regclass)
    FROM pg_inherits h WHERE h.inhparent IN (SELECT tab FROM narrow) OR h.inhrelid IN (SELECT tab FROM narrow)
    UNION ALL
    SELECT format('index %s', i.indexrelid::regclass), 'is INVALID: run gathering-pipeline db doctor --repair'
    FROM indexes i WHERE NOT i.indisvalid
    UNION ALL
    SELECT format('foreign key %I of %s', k.conname, k.conrelid::regclass), CASE
        WHEN k.conparentid <> 0 OR c.relkind = 'p' THEN 'belongs to a partitioned table: {_AGAIN}'
        ELSE format('belongs to role %s: run this as a member of it', c.relowner::regrole) END
    FROM keys k JOIN pg_class c ON c.oid = k.conrelid
    WHERE k.conparentid <> 0 OR c.relkind = 'p' OR NOT pg_has_role(c.relowner, 'USAGE')
    UNION ALL
    SELECT format('publication %I', p.pubname),
           format('publishes every column of %s, also temporary ones: give it a list of columns', n.tab::regclass)
    FROM pg_publication p CROSS JOIN (SELECT DISTINCT tab FROM narrow) n
    WHERE p.puballtables
       OR EXISTS (SELECT FROM pg_publication_rel WHERE prpubid = p.oid AND prrelid = n.tab AND prattrs IS NULL)
       OR EXISTS (SELECT FROM pg_publication_namespace WHERE pnpubid = p.oid AND pnnspid = to_regnamespace('circle'))
)
SELECT DISTINCT object || ' ' || reason FROM found ORDER BY 1"""
_COLUMNS = f"{_NARROW} SELECT tab::regclass::text, name FROM narrow ORDER BY tab::regclass::text DESC, name"
# What earlier calls have made, and whether it is valid.
_MADE = f"""
SELECT tgrelid::regclass::text, tgname, true FROM pg_trigger WHERE starts_with(tgname, '{TEMPORARY}')
UNION ALL
SELECT conrelid::regclass::text, conname, convalidated FROM pg_constraint WHERE starts_with(conname, '{TEMPORARY}')
UNION ALL
SELECT i.indrelid::regclass::text, c.relname, i.indisvalid FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
WHERE starts_with(c.relname, '{TEMPORARY}')"""
_INDEXES = f"""{_NARROW}
SELECT indexrelid::regclass::text, twin, indrelid::regclass::text AS tab, pg_get_indexdef(indexrelid), coalesce(
           (SELECT quote_ident(spcname) FROM pg_tablespace WHERE oid = reltablespace), 'DEFAULT')
FROM indexes ORDER BY tab DESC, name"""
_KEYS = f"""{_NARROW}
SELECT quote_ident(conname), twin, conrelid::regclass::text AS tab, confrelid::regclass::text,
       pg_get_constraintdef(oid), convalidated
FROM keys ORDER BY tab, conname"""
# The settings of ANALYZE that decide how many rows it reads.
_STATISTICS = f"""{_NARROW}
SELECT format('ALTER TABLE %s ALTER %I SET %s', n.tab::regclass, n.wide, s.setting)
FROM narrow n JOIN pg_attribute a ON a.attrelid = n.tab AND a.attnum = n.col CROSS JOIN LATERAL (VALUES
    (CASE WHEN a.attstattarget >= 0 THEN 'STATISTICS ' || a.attstattarget END),
    ('(' || (SELECT string_agg(o, ', ') FROM unnest(a.attoptions) o WHERE NOT starts_with(o, 'pg_')) || ')')
) s (setting)
WHERE s.setting IS NOT NULL"""

Columns = dict[str, list[str]]
"""The names of the columns that are INTEGER still, by table."""


def _narrow_columns(connection: Connection) -> Columns:
    found: Columns = defaultdict(list)
    for table, name in _query(connection, _COLUMNS):
        found[table].append(name)
    return found


def _names(columns: Columns) -> tuple[str, ...]:
    return tuple(f"{table}.{name}" for table, names in columns.items() for name in names)


def _obstacles(connection: Connection) -> Iterator[str]:
    for (sentence,) in _query(connection, _OBSTACLES):
        yield sentence


def _query(connection: Connection, sql: str) -> list[Any]:
    return list(connection.exec_driver_sql(_of_views(sql), execution_options={"no_parameters": True}))


def _of_views(sql: str) -> str:
    """Insert the views of this package: what PostgreSQL prints of them names columns by their place, which changes."""
    names = [item.name for item in expected() if item.kind == "view"]
    queries = {name: definition_of_view(name).partition(" AS\n")[2].replace("'", "''") for name in names}
    return sql.replace("$VIEWS", ", ".join(f"('{name}', '{query}')" for name, query in queries.items()))


# --- the steps -------------------------------------------------------------------------------------------------------

Run = Callable[[Connection, Options], None]
COPY, PROOF = f"{TEMPORARY}copy", f"{TEMPORARY}proof"


def _steps(connection: Connection, columns: Columns) -> Iterator[tuple[str, Run]]:
    """The titles of the steps that are left, and the steps. Each may be repeated."""
    if not columns:
        return
    made = {(table, name): valid for table, name, valid in _query(connection, _MADE)}
    for table, names in columns.items():
        if (table, COPY) not in made:
            yield f"{table}: add {', '.join(map(_wide, names))}", _sql([_begin(table, names)], table)
        if not made.get((table, PROOF)):
            yield f"{table}: copy {', '.join(names)} of each row", partial(_copy, table=table, names=names)
            yield f"{table}: check the copies of new rows", _sql([_check(table, names)], table)
            yield f"{table}: check the copies of old rows", _sql([_validate(table, PROOF)], table)
    for name, twin, table, definition, tablespace in _query(connection, _INDEXES):
        if not made.get((table, twin)):
            sql = _twin_of_index(definition, twin, table, columns[table])
            yield f"build the index that replaces {name}", partial(_build, twin=twin, sql=sql, tablespace=tablespace)
    analyze = [sql for (sql,) in _query(connection, _STATISTICS)]
    analyze += [f"ANALYZE {table} ({', '.join(map(_wide, names))})" for table, names in columns.items()]
    yield "analyze the new columns", _sql(analyze, *columns)
    locked = dict.fromkeys(columns)
    for name, twin, table, target, definition, validated in _query(connection, _KEYS):
        locked |= {table: None, target: None}
        if (table, twin) not in made:
            sql = f"ALTER TABLE {table} ADD CONSTRAINT {twin} {_twin_of_key(definition, columns, table, target)}"
            yield f"{table}: add the foreign key that replaces {name}", _sql([sql], table, target)
        if validated and not made.get((table, twin)):
            yield f"{table}: validate the foreign key that replaces {name}", _sql([_validate(table, twin)], table)
    yield f"put the new columns into the place of {', '.join(_names(columns))}", _sql([_replace(list(locked))], *locked)


def _sql(statements: list[str], *tables: str) -> Run:
    """A step that sends statements, each a transaction of its own."""

    def run(connection: Connection, options: Options) -> None:
        for sql in statements:
            step = migrator.Step(sql[:60], sql, is_index=False)
            migrator.run_step(connection, step, options, partial(_displace_autovacuum, connection, tables))

    return run


def _displace_autovacuum(connection: Connection, tables: tuple[str, ...]) -> None:
    """Let an autovacuum end: it does when a session has waited for it for a second. No writer waits meanwhile."""
    for table in tables:
        with suppress(DBAPIError):
            lock = f"LOCK TABLE ONLY {table} IN SHARE UPDATE EXCLUSIVE MODE"
            migrator.execute(connection, f"SET LOCAL lock_timeout = '5s'; {lock}")


def _wide(name: str) -> str:
    """The BIGINT column that takes the place of a column."""
    return TEMPORARY + name


def _begin(table: str, names: list[str]) -> str:
    function = f"circle.{TEMPORARY}{table.rpartition('.')[2]}"
    assignments = " ".join(f"NEW.{_wide(name)} := NEW.{name};" for name in names)
    return f"""
        ALTER TABLE {table} {", ".join(f"ADD COLUMN IF NOT EXISTS {_wide(name)} bigint" for name in names)};
        CREATE OR REPLACE FUNCTION {function}() RETURNS trigger
        LANGUAGE plpgsql SET search_path = {migrator.SEARCH_PATH} AS $$ BEGIN {assignments} RETURN NEW; END $$;
        CREATE TRIGGER {COPY} BEFORE INSERT OR UPDATE OF {", ".join(names)} ON {table}
            FOR EACH ROW EXECUTE FUNCTION {function}();
        ALTER TABLE {table} ENABLE ALWAYS TRIGGER {COPY}"""


def _copy(connection: Connection, options: Options, *, table: str, names: list[str]) -> None:
    """Copy the ids of all rows, some at a time; those that another transaction has locked are left for another pass."""
    left = " OR ".join(f"{_wide(name)} IS DISTINCT FROM {name}" for name in names)
    batch = f"""
        WITH batch AS MATERIALIZED (
            SELECT id FROM {table} WHERE id > %(after)s AND ({left}) ORDER BY id LIMIT %(size)s
            FOR NO KEY UPDATE SKIP LOCKED
        ), copied AS (
            UPDATE {table} t SET {", ".join(f"{_wide(name)} = t.{name}" for name in names)}
            WHERE t.id = ANY (ARRAY(SELECT id FROM batch)) RETURNING t.id
        )
        SELECT count(*), max(id) FROM copied"""
    size, copied, reported = FIRST_BATCH, 0, time.monotonic()
    deadline = reported + options.patience
    while True:
        migrator.execute(connection, "; ".join(f"SET {name} = off" for name in _COPYING))
        after: int | None = _BELOW_EVERY_ID
        while after is not None:
            begin = time.monotonic()
            number, after = migrator.retry(partial(_send_batch, connection, batch, after, size), options)
            end = time.monotonic()
            if number:
                copied += number
                deadline = end + options.patience
                size = int(min(max(size * BATCH_SECONDS / (end - begin), size / 2, 10), size * 2, LARGEST_BATCH))
            if end > reported + PROGRESS_SECONDS:
                reported = end
                logger.info("%s: %s rows copied, up to id %s", table, f"{copied:,}", after)
            time.sleep((end - begin) / 2)  # a third of the time belongs to others
        migrator.execute(connection, "; ".join(f"RESET {name}" for name in _COPYING))
        if not _query(connection, f"SELECT FROM {table} WHERE {left} LIMIT 1"):
            break
        if time.monotonic() > deadline:
            raise DatabaseUnavailableError(
                f"rows of {table} stayed locked for {options.patience:.0f} s: pg_stat_activity shows the transaction"
            )
        time.sleep(0.2)
    logger.info("%s: %s rows copied", table, f"{copied:,}")


def _send_batch(connection: Connection, sql: str, after: int, size: int) -> tuple[int, int | None]:
    number, last = connection.exec_driver_sql(sql, {"after": after, "size": size}).one()
    return number, last


def _check(table: str, names: list[str]) -> str:
    """A check that also proves NOT NULL, which then needs no scan under a lock."""
    equal = " AND ".join(f"{_wide(name)} = {name} AND {_wide(name)} IS NOT NULL" for name in names)
    return f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {PROOF}, ADD CONSTRAINT {PROOF} CHECK ({equal}) NOT VALID"


def _validate(table: str, constraint: str) -> str:
    return f"ALTER TABLE {table} VALIDATE CONSTRAINT {constraint}"


def _renamed(lists: str, names: list[str]) -> str:
    """Lists of columns, with the new names for the old ones."""
    return re.sub(rf"(?<=[( ])({'|'.join(names)})(?=[,) ])", lambda match: _wide(match[1]), lists)


def _twin_of_index(definition: str, twin: str, table: str, names: list[str]) -> str:
    head, on, rest = definition.partition(f" ON {table} USING ")
    lists, where, condition = rest.partition(" WHERE ")
    unique = "UNIQUE " if head.startswith("CREATE UNIQUE ") else ""
    create = f"CREATE {unique}INDEX CONCURRENTLY IF NOT EXISTS {twin}"
    return create + on + _renamed(lists, names) + where + condition


def _build(connection: Connection, options: Options, *, twin: str, sql: str, tablespace: str) -> None:
    migrator.execute(connection, f"SET default_tablespace = {tablespace}")
    migrator.run_step(connection, migrator.Step(f"circle.{twin}", sql, is_index=True), options)


def _twin_of_key(definition: str, columns: Columns, table: str, target: str) -> str:
    local, references, foreign = definition.removesuffix(" NOT VALID").partition(" REFERENCES ")
    there, bracket, actions = foreign.removeprefix(target).partition(")")
    if target in columns:
        there = _renamed(there + bracket, columns[target]).removesuffix(bracket)
    if table in columns:  # the actions may have a list, too
        local, actions = (_renamed(lists, columns[table]) for lists in (local, actions))
    return f"{local}{references}{target}{there}{bracket}{actions} NOT VALID"


# --- the last step ---------------------------------------------------------------------------------------------------

# Its statements by phase. They are made under its locks, because what they put back may have changed. None are made if
# an index or a foreign key was created a moment ago, and lacks its twin.
_STATEMENTS = f"""{_NARROW}, primary_keys AS MATERIALIZED (
    SELECT c.*, i.twin FROM pg_constraint c JOIN indexes i ON i.indexrelid = c.conindid WHERE c.contype = 'p'
), triggers AS MATERIALIZED (
    SELECT t.*, pg_get_triggerdef(t.oid) AS definition FROM pg_trigger t
    WHERE NOT starts_with(t.tgname, '{TEMPORARY}')
      AND t.oid IN (SELECT objid FROM dependents WHERE classid = 'pg_trigger'::regclass)
), published AS MATERIALIZED (
    SELECT r.*, p.pubname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
    WHERE r.oid IN (SELECT objid FROM dependents WHERE classid = 'pg_publication_rel'::regclass)
), rights (phase, columns, object, acl) AS (
    SELECT 30, format('(%I) ', n.wide), n.tab::regclass, a.attacl
    FROM narrow n JOIN pg_attribute a ON a.attrelid = n.tab AND a.attnum = n.col
    UNION ALL SELECT 103, '', view, relacl FROM views
    UNION ALL SELECT 103, format('(%I) ', a.attname), v.view, a.attacl
    FROM views v JOIN pg_attribute a ON a.attrelid = v.oid
), comments (phase, object, class, id, part) AS (
    SELECT 30, format('COLUMN %s.%I', tab::regclass, wide), 'pg_class'::regclass, tab, col::integer FROM narrow
    UNION ALL SELECT 82, 'INDEX ' || indexrelid::regclass, 'pg_class'::regclass, indexrelid, 0 FROM indexes
    UNION ALL SELECT 82, format('CONSTRAINT %I ON %s', conname, conrelid::regclass), 'pg_constraint'::regclass, oid, 0
    FROM pg_constraint WHERE oid IN (SELECT oid FROM primary_keys UNION ALL SELECT oid FROM keys)
    UNION ALL SELECT 103, 'VIEW ' || view, 'pg_class'::regclass, oid, 0 FROM views
    UNION ALL SELECT 103, format('COLUMN %s.%I', v.view, a.attname), 'pg_class'::regclass, v.oid, a.attnum
    FROM views v JOIN pg_attribute a ON a.attrelid = v.oid
), statements (phase, statement) AS (
    -- what depends on the old columns, and what an earlier call made for something that is gone
    SELECT 10, format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) FROM keys
    UNION ALL SELECT 10, format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) FROM pg_constraint
    WHERE contype = 'f' AND starts_with(conname, '{TEMPORARY}') AND conname NOT IN (SELECT twin FROM keys)
    UNION ALL SELECT 10, format('ALTER PUBLICATION %I DROP TABLE %s', pubname, prrelid::regclass) FROM published
    UNION ALL SELECT 10, 'DROP VIEW ' || string_agg(view::text, ', ') FROM views HAVING count(*) > 0
    UNION ALL SELECT 20, format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) FROM primary_keys
    UNION ALL SELECT 20, 'DROP INDEX ' || oid::regclass FROM pg_class
    WHERE relkind = 'i' AND starts_with(relname, '{TEMPORARY}') AND relname NOT IN (SELECT twin FROM indexes)
    UNION ALL SELECT DISTINCT 20, format('DROP TRIGGER {COPY} ON %s', tab::regclass) FROM narrow
    UNION ALL SELECT DISTINCT 21, format('DROP FUNCTION circle.%I()', '{TEMPORARY}' || c.relname)
    FROM narrow n JOIN pg_class c ON c.oid = n.tab
    -- the new columns get what the old ones have
    UNION ALL SELECT 30, format('ALTER TABLE %s ALTER %I SET NOT NULL', tab::regclass, wide) FROM narrow
    UNION ALL SELECT 30, format(
        'ALTER TABLE %s ALTER %I SET DEFAULT %s', n.tab::regclass, n.wide, pg_get_expr(d.adbin, d.adrelid))
    FROM narrow n JOIN pg_attrdef d ON d.adrelid = n.tab AND d.adnum = n.col
    UNION ALL SELECT 30, format('ALTER SEQUENCE %s AS bigint OWNED BY %s.%I', s.oid::regclass, d.tab::regclass, d.wide)
    FROM dependents d JOIN pg_class s ON s.oid = d.objid AND d.classid = 'pg_class'::regclass AND s.relkind = 'S'
    UNION ALL SELECT r.phase, format(
        'GRANT %s %sON %s TO %s%s', x.privilege_type, r.columns, r.object,
        CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END,
        CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' END)
    FROM rights r CROSS JOIN LATERAL aclexplode(r.acl) x
    UNION ALL SELECT c.phase, format('COMMENT ON %s IS %L', c.object, d.description)
    FROM comments c JOIN pg_description d ON d.classoid = c.class AND d.objoid = c.id AND d.objsubid = c.part
    UNION ALL SELECT DISTINCT 40, format('ALTER TABLE %s DROP CONSTRAINT {PROOF}', tab::regclass) FROM narrow
    -- and their names
    UNION ALL SELECT 50, format('ALTER TABLE %s RENAME %I TO %I', tab::regclass, name, '{TEMPORARY}old_' || name)
    FROM narrow
    UNION ALL SELECT 51, format('ALTER TABLE %s RENAME %I TO %I', tab::regclass, wide, name) FROM narrow
    UNION ALL SELECT 52, format(
        'ALTER TABLE %s RENAME %I TO %I', c.oid::regclass, a.attname, substr(a.attname, length('{TEMPORARY}') + 1))
    FROM indexes i JOIN pg_class c ON c.relname = i.twin AND c.relnamespace = to_regnamespace('circle')
    JOIN pg_attribute a ON a.attrelid = c.oid AND starts_with(a.attname, '{TEMPORARY}')
    UNION ALL SELECT 60, overlay(definition PLACING 'CREATE OR REPLACE' FROM 1 FOR length('CREATE')) FROM triggers
    UNION ALL SELECT 61, format(
        'ALTER TABLE %s %s TRIGGER %I', tgrelid::regclass, CASE tgenabled
            WHEN 'A' THEN 'ENABLE ALWAYS' WHEN 'R' THEN 'ENABLE REPLICA' WHEN 'D' THEN 'DISABLE' ELSE 'ENABLE' END,
        tgname)
    FROM triggers
    UNION ALL SELECT 70, format('ALTER TABLE %s DROP %I', tab::regclass, '{TEMPORARY}old_' || name) FROM narrow
    UNION ALL SELECT 80, format('ALTER INDEX circle.%I RENAME TO %I', twin, name) FROM indexes WHERE NOT indisprimary
    UNION ALL SELECT 80, format(
        'ALTER TABLE %s ADD CONSTRAINT %I PRIMARY KEY USING INDEX %I', conrelid::regclass, conname, twin)
    FROM primary_keys
    UNION ALL SELECT 80, format('ALTER TABLE %s RENAME CONSTRAINT %I TO %I', conrelid::regclass, twin, conname)
    FROM keys
    UNION ALL SELECT 80, format(
        'ALTER TABLE %s RENAME CONSTRAINT %I TO %I', n.tab::regclass, concat_ws('_', c.relname, n.wide, 'not_null'),
        x.conname)
    FROM narrow n JOIN pg_class c ON c.oid = n.tab
    JOIN pg_constraint x ON x.contype = 'n' AND x.conrelid = n.tab AND x.conkey = ARRAY[n.col]   -- from PostgreSQL 18
    UNION ALL SELECT 81, format('ALTER TABLE %s CLUSTER ON %I', indrelid::regclass, name)
    FROM indexes WHERE indisclustered
    UNION ALL SELECT 81, format('ALTER TABLE %s REPLICA IDENTITY USING INDEX %I', indrelid::regclass, name)
    FROM indexes WHERE indisreplident
    -- what was dropped
    UNION ALL SELECT 90 + depth, format(
        'CREATE VIEW %s %sAS %s', view, 'WITH (' || array_to_string(reloptions, ', ') || ') ', s.query)
    FROM views JOIN (VALUES $VIEWS) s (name, query) ON s.name = view::text
    UNION ALL SELECT 102, format('ALTER VIEW %s OWNER TO %s', view, relowner::regrole) FROM views
    UNION ALL SELECT DISTINCT 102, format(
        'REVOKE ALL ON %s FROM %s', v.view, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END)
    FROM views v CROSS JOIN pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) x
    WHERE d.defaclobjtype = 'r' AND x.grantee <> v.relowner
    UNION ALL SELECT 104, format(
        'ALTER PUBLICATION %I ADD TABLE %s (%s)%s', r.pubname, r.prrelid::regclass, (
            SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a
            WHERE a.attrelid = r.prrelid AND a.attnum = ANY (r.prattrs)),
        ' WHERE (' || pg_get_expr(r.prqual, r.prrelid) || ')')
    FROM published r
    -- a session plans and compiles a function anew whose row has changed: else it goes on with the old columns
    UNION ALL SELECT 109, format(
        'ALTER ROUTINE %s SECURITY %s', p.oid::regprocedure, CASE WHEN p.prosecdef THEN 'DEFINER' ELSE 'INVOKER' END)
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang AND l.lanname IN ('plpgsql', 'sql')
    WHERE pg_has_role(p.proowner, 'USAGE') AND NOT starts_with(p.proname, '{TEMPORARY}') AND (
        p.pronamespace = to_regnamespace('circle') OR p.prosrc ~ 'pipeline_(node_)?runs'
        OR p.oid IN (SELECT tgfoid FROM pg_trigger WHERE tgrelid IN (SELECT tab FROM narrow)))
)
SELECT array_agg(statement ORDER BY phase, statement) INTO todo FROM statements
WHERE NOT EXISTS (
    SELECT FROM indexes i WHERE NOT EXISTS (
        SELECT FROM pg_index t JOIN pg_class c ON c.oid = t.indexrelid
        WHERE t.indrelid = i.indrelid AND t.indisvalid AND c.relname = i.twin))
AND NOT EXISTS (
    SELECT FROM keys k WHERE NOT EXISTS (
        SELECT FROM pg_constraint t
        WHERE t.conrelid = k.conrelid AND t.conname = k.twin AND (t.convalidated OR NOT k.convalidated)))"""


def _replace(tables: list[str]) -> str:
    """The last step. It waits for its first lock only: with a lock in hand a wait could be half of a deadlock."""
    first, *others = sorted(tables, key=lambda table: (table != "circle.pipeline_runs", table))
    locks = f"LOCK TABLE ONLY {first} IN ACCESS EXCLUSIVE MODE; "
    if others:
        locks += f"LOCK TABLE ONLY {', ONLY '.join(others)} IN ACCESS EXCLUSIVE MODE NOWAIT; "
    return _of_views(f"""{locks}
        DO $widen$
        DECLARE
            todo text[];
            one text;
        BEGIN
            {_NARROW} SELECT array_agg(view::text ORDER BY depth DESC) INTO todo FROM views;
            FOREACH one IN ARRAY coalesce(todo, '{{}}') LOOP   -- a reader locks a view, then its tables
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', one);
            END LOOP;
            {_STATEMENTS};
            FOREACH one IN ARRAY coalesce(todo, '{{}}') LOOP
                EXECUTE one;
            END LOOP;
        END $widen$""")
