"""The doctor and databases at other revisions."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy.engine import Connection

from gathering_pipeline import migrations
from gathering_pipeline.database import Database
from gathering_pipeline.maintenance.doctor import doctor
from tests.support.databases import ADVISORY_LOCKS
from tests.support.doctor import catalog, found


def test_doctor_on_older_revision_upgrades(database: Database, database_url: str) -> None:
    clean = catalog(database_url)
    migrations.downgrade(database_url, "010_graph")
    (finding,) = doctor(database.engine)
    assert (finding.code, finding.severity) == ("revision", "error")
    assert "010_graph" in finding.message
    assert migrations.head() in finding.message
    assert [finding.outcome for finding in doctor(database.engine, repair=True)] == ["repaired"]
    assert found(database) == []
    assert catalog(database_url) == clean


def test_doctor_reads_revision_under_the_lock(
    database: Database, raw: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, current = [], migrations.current

    def read(connection: Connection) -> str | None:
        locked.append(raw.execute(ADVISORY_LOCKS).fetchone())
        return current(connection)

    monkeypatch.setattr(migrations, "current", read)
    assert doctor(database.engine, repair=True) == []
    assert locked == [(1,)]


def test_doctor_on_unknown_or_no_revision_changes_nothing(
    database: Database, raw: psycopg.Connection, empty_database_url: str
) -> None:
    raw.execute("UPDATE circle.alembic_version SET version_num = '099_future'")
    (finding,) = doctor(database.engine, repair=True)
    assert (finding.code, finding.outcome) == ("revision", None)
    assert "ahead of this code" in finding.advice
    with Database(empty_database_url) as empty:
        (finding,) = doctor(empty.engine, repair=True)
    assert (finding.code, finding.outcome) == ("revision", None)
    assert "db upgrade" in finding.advice
