"""The smallest rights of a role, as GRANT statements: of a service, a reader and a migrator."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sqlalchemy.dialects import postgresql

from gathering_pipeline.errors import ConfigurationError
from gathering_pipeline.migrator import SCHEMA

Purpose = Literal["service", "read-only", "migrate"]

_WRITTEN = ("pipelines", "pipeline_runs", "pipeline_node_runs")
_INSERTED = ("pipeline_counters", "pipeline_run_tags", "pipeline_run_logs", "pipeline_run_history")
_READ = (
    *(*_WRITTEN, *_INSERTED, "pipeline_versions", "pipeline_events"),
    *("startable_node_runs", "pending_node_runs", "alembic_version"),
)


class Right(NamedTuple):
    """A privilege on an object."""

    privilege: str
    object: str


def rights(purpose: Purpose) -> list[Right]:
    """The rights of a role on schema circle; none for a migrator, which owns it.

    A service can't write events and versions, which triggers write with the rights of their owner, nor delete events.
    Node runs are deleted with their run.
    """
    if purpose == "migrate":
        return []
    found = [Right("USAGE", f"SCHEMA {SCHEMA}")]
    found += [Right("SELECT", f"{SCHEMA}.{name}") for name in _READ]
    if purpose == "service":
        found += [Right("SELECT", f"{SCHEMA}.pipeline_sweep")]
        found += [Right("INSERT", f"{SCHEMA}.{name}") for name in (*_WRITTEN, *_INSERTED, "pipeline_sweep")]
        found += [Right("UPDATE", f"{SCHEMA}.{name}") for name in (*_WRITTEN, "pipeline_sweep")]
        found += [Right("DELETE", f"{SCHEMA}.{name}") for name in ("pipelines", "pipeline_runs")]
        found += [Right("USAGE", f"SEQUENCE {SCHEMA}.{name}_id_seq") for name in _WRITTEN]
    return found


def grants(role: str, purpose: Purpose = "service") -> list[str]:
    """SQL statements that give a role its rights.

    Args:
        role: An existing role.
        purpose: What the role does.

    Raises:
        ConfigurationError: The role is empty or PUBLIC.
    """
    if role.strip().lower() in {"", "public", "none"}:
        raise ConfigurationError(f"{role!r} is not the name of a role: name the one role that gets the rights")
    name = postgresql.dialect().identifier_preparer.quote(role)  # type: ignore[no-untyped-call]
    if purpose == "migrate":
        return [f"CREATE SCHEMA IF NOT EXISTS {SCHEMA} AUTHORIZATION {name};"]
    kinds: dict[tuple[str, str], list[str]] = {}
    for right in rights(purpose):
        kind, _, thing = right.object.rpartition(" ")
        kinds.setdefault((right.privilege, kind), []).append(thing)
    return [
        f"GRANT {privilege} ON {kind and kind + ' '}{', '.join(things)} TO {name};"
        for (privilege, kind), things in kinds.items()
    ]
