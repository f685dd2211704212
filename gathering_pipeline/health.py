"""Whether a database can be used now: what a service's health endpoint answers with."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, text

from gathering_pipeline import migrations

_SERVER = text("""
SELECT current_user, pg_is_in_recovery(), current_setting('server_version_num')::integer / 10000,
       CASE WHEN NOT pg_is_in_recovery() THEN NULL
            WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
            ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END""")


class Health(BaseModel):
    """What ``Database.health`` found. Where the database can't be reached, only ``error`` and the pool are known."""

    model_config = ConfigDict(frozen=True)

    reachable: bool = Field(description="Whether the server answered.")
    error: str | None = Field(None, description="Why it did not.")
    revision: str | None = Field(None, description="Revision of the schema; null: there is none.")
    expected_revision: str = Field(description="The revision that this code is written for.")
    user: str | None = Field(None, description="Role of the connection.")
    is_primary: bool | None = Field(None, description="Whether the server takes writes; a standby doesn't.")
    replication_lag: timedelta | None = Field(None, description="How far a standby is behind; null on a primary.")
    server_version: int | None = Field(None, description="Major version of PostgreSQL.")
    connections_in_use: int | None = Field(
        description=(
            "Connections of the pool that sessions hold; null: the pool of a program's engine doesn't count them."
        ),
    )
    connections_allowed: int | None = Field(description="Most connections of the pool; null as above.")

    @property
    def ok(self) -> bool:
        """Whether calls can succeed: the server answers and takes writes, and the schema is the expected one."""
        return self.reachable and self.is_primary is True and self.revision == self.expected_revision


def examine(connection: Connection) -> dict[str, Any]:
    """The fields of ``Health`` that the server knows."""
    user, standby, version, lag = connection.execute(_SERVER).one()
    return {
        "revision": migrations.current(connection),
        "user": user,
        "is_primary": not standby,
        "replication_lag": None if lag is None else timedelta(seconds=float(lag)),
        "server_version": version,
    }
