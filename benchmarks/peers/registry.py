"""The peers by name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Base(Enum):
    """The database that a peer is given."""

    EMPTY = "empty"
    FLOOR = "the floor's"


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer.

    Attributes:
        title: What the table calls it.
        module: Its module in this package; see ``interface.PeerModule``.
        package: The installed package whose version is printed.
        requirements: What its environment needs; empty: it runs in ours. ``constraints.txt`` has the versions.
        base: Its database.
    """

    title: str
    module: str
    package: str
    requirements: tuple[str, ...] = ()
    base: Base = Base.EMPTY


PEERS = {
    "naive-orm": Peer("naive ORM: get, set, commit", "naive_orm", "SQLAlchemy"),
    "raw-sql": Peer("GatheRing's own statements", "raw_sql", "psycopg", base=Base.FLOOR),
    "dbos": Peer("DBOS, a workflow of steps", "dbos_workflow", "dbos", ("dbos", "psycopg[binary]")),
    "procrastinate": Peer(
        "procrastinate, a task a node", "procrastinate_tasks", "procrastinate", ("procrastinate", "psycopg[binary]")
    ),
    "pgqueuer": Peer("pgqueuer, a job a node", "pgqueuer_jobs", "pgqueuer", ("pgqueuer[asyncpg]", "psycopg[binary]")),
}
