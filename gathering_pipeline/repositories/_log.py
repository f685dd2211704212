"""What the logger ``gathering_pipeline`` tells: each call that changed something at DEBUG, each fault at WARNING.

A line has names, ids and statuses; no JSON of runs, no error texts of theirs, no keys and no tokens.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg

from gathering_pipeline.connections import Statement
from gathering_pipeline.errors import DatabaseError, LeaseLostError, shorten

logger = logging.getLogger("gathering_pipeline")

_SHOWN = ("pipeline_id", "run_id", "node_id", "worker_id")
"""Parameters that say what a call is about."""


def log_change(statement: Statement, parameters: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Tell at DEBUG what a call changed; a call that found nothing to do is not told."""
    if not logger.isEnabledFor(logging.DEBUG) or not rows:
        return
    outcome = "; ".join(filter(None, map(_outcome, rows)))
    logger.debug("%s%s", _name(statement, parameters), f": {outcome}" if outcome else "")


def log_fault(statement: Statement, parameters: Mapping[str, Any], error: Exception) -> None:
    """Tell at WARNING that the database can't do a call, or that its worker has lost the run; a refusal is no fault."""
    if isinstance(error, (DatabaseError, LeaseLostError, psycopg.Error)):
        # a driver's error quotes values from its second line on
        reason = shorten((str(error).splitlines() or [""])[0], 200)
        logger.warning("%s failed: %s: %s", _name(statement, parameters), type(error).__name__, reason)


def _name(statement: Statement, parameters: Mapping[str, Any]) -> str:
    found = re.search(r"circle\.(\w+)", statement.sql)
    given = [f"{key}={parameters[key]!r}" for key in _SHOWN if parameters.get(key) is not None]
    return " ".join([found[1] if found else "call", *given])


def _outcome(row: Any) -> str:
    """What a row tells: of a run, of a node run, or of a step, which may stand behind the run that it is of."""
    value = json.loads(row) if row and row[0] in "[{" else None
    of, step = value if isinstance(value, list) else (None, value)
    if not isinstance(step, dict) or "status" not in step:
        return ""
    return " ".join(_words(of, step))


def _words(of: Any, step: Mapping[str, Any]) -> Iterator[str]:
    if of is not None or "pipeline_id" in step:
        yield f"run {of or step.get('id')} is"
    yield step["status"]
    if started := step.get("started"):
        yield f"and started {', '.join(repr(node['node_id']) for node in started)}"
