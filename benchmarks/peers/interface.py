"""What a module of a peer offers. It imports nothing that the environment of a peer lacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, LiteralString, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """The run to record.

    Attributes:
        url: The peer's database, as libpq reads it.
        count: Number of nodes, one after the other.
        output: Output of every node, which is stored.
    """

    url: str
    count: int
    output: dict[str, Any]


class PeerModule(Protocol):
    """A module of a peer.

    Attributes:
        RECORDED: A query for the number of nodes whose end is committed. The program checks it after each run: a peer
            that still holds back a write when its run returns has no figure.
    """

    RECORDED: LiteralString

    def prepare(self, task: Task) -> AbstractContextManager[Callable[[], object]]:
        """Create the tables, connect, and give a function that takes one run to its recorded end."""
        ...
