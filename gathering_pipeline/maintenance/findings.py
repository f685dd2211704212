"""``Finding``: a problem of a database, its repair, and the outcome of the repair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a database.

    Attributes:
        severity: ``error``: a guarantee of this package is broken; ``warning``: an operator should look at it.
        code: Stable name of the kind of problem, such as ``demoted_trigger``; docs/cli.md lists them.
        object: What has the problem: an object of the schema, a row, a session.
        message: One sentence that describes the problem.
        advice: What to do, or what the repair does.
        repair: SQL statements that repair it, each a transaction of its own; empty if an operator has to decide.
        outcome: ``repaired``, or why the repair failed; None if none was tried.
    """

    severity: Severity
    code: str
    object: str
    message: str
    advice: str
    repair: tuple[str, ...] = field(default=(), repr=False)
    outcome: str | None = None
