"""``doctor``: examines a database at head, and repairs it while services read and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from gathering_pipeline import migrations, migrator
from gathering_pipeline.errors import WITHDRAWN_REVISIONS, DatabaseUnavailableError, SchemaRevisionError
from gathering_pipeline.maintenance import drift, repairs, rows
from gathering_pipeline.maintenance.findings import Finding


def doctor(engine: Engine, *, repair: bool = False, held_for: float = 10.0) -> list[Finding]:
    """Examine a database and optionally repair it.

    Args:
        engine: Of the database, as the owner of its tables; sees the sessions of other roles as a member of
            ``pg_monitor``.
        repair: Run the repairs and examine again. Repairs are short transactions that wait at most 200 ms for a lock,
            but an index build waits for all open transactions, and a validation reads the whole table. Both are
            cancelled and retried if another session waits for them.
        held_for: Age in seconds from which a transaction that holds back the event feed is a finding.

    Returns:
        The remaining problems, and with ``repair`` also the repaired ones; see ``Finding.outcome``.

    Raises:
        DatabaseUnavailableError: With ``repair``: a migrator or another repairing doctor is running.
    """
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        migrator.low_impact_session(connection, "lock_timeout"),
    ):
        try:
            lock = f"SELECT pg_try_advisory_lock({migrator.MIGRATION_LOCK})"
            if repair and not connection.exec_driver_sql(lock).scalar():
                raise DatabaseUnavailableError("a migrator or another doctor is running: try again later")
            revision = migrations.current(connection)  # under the lock, so that it can't change
            outdated = None if revision == migrations.head() else _wrong_revision(connection, revision)
            if outdated:
                findings = [outdated]
            elif repair:
                findings = _repair(connection, held_for)
            else:
                findings = list(_examine(connection, held_for))
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")
    if outdated and repair and outdated.repair:
        migrations.upgrade(engine)
        return [replace(outdated, outcome="repaired"), *doctor(engine, repair=True, held_for=held_for)]
    return findings


def _repair(connection: Connection, held_for: float) -> list[Finding]:
    """Examine, run the repairs, and examine again, as long as a repair succeeds: others may have needed it."""
    found = {_key(finding): finding for finding in _examine(connection, held_for)}
    tried: dict[tuple[str, str], Finding] = {}
    progress = True
    while progress:
        pending = {key: finding for key, finding in found.items() if finding.repair}
        pending = {key: finding for key, finding in pending.items() if key not in tried or tried[key].outcome}
        done = {key: replace(finding, outcome=repairs.run(connection, finding)) for key, finding in pending.items()}
        tried |= done
        progress = any(finding.outcome is None for finding in done.values())
        if done:
            found = {_key(finding): finding for finding in _examine(connection, held_for)}
    # includes failed repairs whose problem is gone: another repair or another session solved it
    repaired = [replace(finding, outcome="repaired") for key, finding in tried.items() if key not in found]
    remaining = [
        replace(finding, outcome=(tried[key].outcome or "not repaired: it was found again") if key in tried else None)
        for key, finding in found.items()
    ]
    return repaired + remaining


def _key(finding: Finding) -> tuple[str, str]:
    # one problem in both forms: a failed build turns a missing index into an INVALID one
    return "drift" if finding.code == "invalid_index" else finding.code, finding.object


def _wrong_revision(connection: Connection, found: str | None) -> Finding:
    head = migrations.head()
    message = f"the schema is at revision {found or 'none'}, this code needs {head}; nothing else was examined"
    if found in migrations.revisions():
        command = "gathering-pipeline db upgrade"
        return Finding("error", "revision", "schema circle", message, f"the repair runs {command}", (command,))
    advice = migrator.missing_revision_hint(connection) or "run gathering-pipeline db upgrade"
    if found in WITHDRAWN_REVISIONS:
        advice = SchemaRevisionError(found, head).advice
    elif found is not None:
        advice = "the database is ahead of this code: install the version of gathering-pipeline that migrated it"
    return Finding("error", "revision", "schema circle", message, advice)


def _examine(connection: Connection, held_for: float) -> Iterator[Finding]:
    differences = list(drift.differences(connection))
    kinds = ("table ", "column ", "type ", "function ")
    structural = [finding for finding in differences if finding.code == "drift" and finding.object.startswith(kinds)]
    found: list[Finding] = []
    unexamined: list[str] = []
    for codes, examination in rows.examinations(connection, held_for).items():
        try:
            found += examination
        except DBAPIError as error:
            if not structural or error.connection_invalidated:
                raise
            unexamined.append(codes)
    for finding in differences:
        if unexamined and finding in structural:
            message = f"{finding.message}; rows were not examined for {', '.join(unexamined)}"
            yield replace(finding, message=message)
        else:
            yield finding
    yield from found
