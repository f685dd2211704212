"""Checks of arguments, made before a statement is sent: the message of an error begins with the argument's name.

A check returns the value as the database takes it. No database library is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from .errors import InvalidCursorError, InvalidDataError, PipelineNotFoundError, RunNotFoundError, shorten
from .json_values import MAX_BYTES, MAX_DEPTH, json_issues, quote, text_reason

MAX_BIGINT = 2**63 - 1
"""Largest value of PostgreSQL's ``BIGINT``."""

MAX_COUNT = 2**31 - 2
"""Largest number of rows; one more, which tells whether a page is the last, is still an ``INTEGER``."""

MAX_DURATION = timedelta(days=36_500)

MAX_PRIORITY = 2**15 - 1
"""Largest value of PostgreSQL's ``SMALLINT``."""

_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

_MAX_ID = 10**100  # a longer number makes no readable message, and Python refuses to write out a very long one


def check_type(value: object, expected: type | tuple[type, ...], name: str, hint: str) -> None:
    """Check the type of an argument.

    Args:
        value: The argument.
        expected: Expected type or types; the message names the first.
        name: Name of the argument in the message.
        hint: How to get a value of this type.

    Raises:
        InvalidDataError: It is of another type.
    """
    if not isinstance(value, expected):
        first = expected[0] if isinstance(expected, tuple) else expected
        raise InvalidDataError(f"{name} must be of type {first.__name__}, not {type(value).__name__}: {hint}")


def check_id(value: object, name: str) -> int:
    """Check an id, a version or a token.

    Returns:
        The number, or -1 where it is out of the range of ``BIGINT``: no row has the id -1 either.

    Raises:
        InvalidDataError: It is not an integer, or not below 10^100.
    """
    if type(value) is not int or not -_MAX_ID < value < _MAX_ID:
        raise InvalidDataError(f"{name} must be a whole number below 10^100, not {quote(value)}")
    return value if -MAX_BIGINT <= value <= MAX_BIGINT else -1


def check_pipeline_id(pipeline_id: int) -> int:
    """Check the id of a pipeline.

    Raises:
        InvalidDataError: It is not an integer.
        PipelineNotFoundError: It is out of the range of ``BIGINT``.
    """
    if check_id(pipeline_id, "pipeline_id") != pipeline_id:
        raise PipelineNotFoundError(pipeline_id)
    return pipeline_id


def check_run_id(run_id: int) -> int:
    """Check the id of a run.

    Raises:
        InvalidDataError: It is not an integer.
        RunNotFoundError: It is out of the range of ``BIGINT``.
    """
    if check_id(run_id, "run_id") != run_id:
        raise RunNotFoundError(run_id)
    return run_id


def check_token(token: object) -> int | None:
    """Check the token of a claim; ``None`` stays ``None``.

    Raises:
        InvalidDataError: It is not an integer.
    """
    return None if token is None else check_id(token, "token")


def check_attempt(attempt: object) -> int | None:
    """Check the number of an attempt, from 1; ``None`` stays ``None``.

    Raises:
        InvalidDataError: It is not a positive integer.
    """
    return None if attempt is None else check_count(attempt, "attempt")


def branch_label(text: str) -> str:
    """The label that the ``condition`` of an edge or an outcome stands for; empty: none.

    Only A to Z become lower case: what else is a letter depends on the database.
    """
    return text.strip().translate(_LOWER)


def check_branch(value: object) -> str | None:
    """Check the outcome of a node; ``None`` stays ``None``.

    Returns:
        The label of the edges that it takes.

    Raises:
        InvalidDataError: It is neither a bool nor a string, or a string that PostgreSQL can't store.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise InvalidDataError(f"branch must be True, False or a string, not {quote(value)}")
    return branch_label(check_text(value, "branch"))


def check_text(value: object, name: str, max_length: int | None = None) -> str:
    """Check a text.

    Args:
        value: The argument.
        name: Name of the argument in the message.
        max_length: Longest length in characters; the text must then have at least one.

    Raises:
        InvalidDataError: It is not a string, its length is wrong, it is larger than ``MAX_BYTES``, which no event can
            hold, or it has a NUL or a lone surrogate, which PostgreSQL can't store.
    """
    if not isinstance(value, str):
        raise InvalidDataError(f"{name} must be a string, not {type(value).__name__}")
    if reason := text_reason(value):
        raise InvalidDataError(f"{name} {reason}")
    if max_length is not None and not 0 < len(value) <= max_length:
        raise InvalidDataError(f"{name} must have 1 to {max_length} characters, not {len(value)}")
    if len(value) > MAX_BYTES // 4 and (size := len(value.encode())) > MAX_BYTES:
        raise InvalidDataError(f"{name} has {size:,} bytes: the database holds at most {MAX_BYTES:,}")
    return value


def check_status(value: str, statuses: type[StrEnum]) -> str:
    """Check the name of a status.

    Raises:
        InvalidDataError: It is not one of ``statuses``.
    """
    try:
        return statuses(value).value
    except ValueError:
        raise InvalidDataError(f"status must be one of {', '.join(statuses)}, not {quote(value)}") from None


def check_statuses(value: Any, statuses: type[StrEnum]) -> list[str]:
    """Check the name of a status, or a collection of them.

    Raises:
        InvalidDataError: One is not one of ``statuses``.
    """
    if isinstance(value, Collection) and not isinstance(value, (str, bytes)):
        several: Collection[Any] = value
        return [check_status(status, statuses) for status in several]
    one: Any = value
    return [check_status(one, statuses)]


def check_tags(tags: object) -> dict[str, str]:
    """Check the tags of a run.

    Raises:
        InvalidDataError: They are no mapping, a key has not 1 to 100 characters, or a value not 1 to 255.
    """
    if not isinstance(tags, Mapping):
        raise InvalidDataError(f"tags must be a mapping of texts, not {type(tags).__name__}")
    return {
        check_text(key, f"tags: the key {quote(key)}", 100): check_text(value, f"tags[{quote(key)}]", 255)
        for key, value in tags.items()
    }


def check_flag(value: object, name: str) -> bool:
    """Check a flag.

    Raises:
        InvalidDataError: It is not a bool. (``None`` would be NULL, which is neither true nor false.)
    """
    if not isinstance(value, bool):
        raise InvalidDataError(f"{name} must be True or False, not {quote(value)}")
    return value


def check_count(value: object, name: str) -> int:
    """Check a number of rows.

    Raises:
        InvalidDataError: It is not an integer from 1 to ``MAX_COUNT``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_COUNT:
        raise InvalidDataError(f"{name} must be a whole number from 1 to {MAX_COUNT}, not {quote(value)}")
    return value


def check_duration(value: object, name: str, *, allow_zero: bool = False) -> float:
    """Check a duration.

    Returns:
        The duration in seconds.

    Raises:
        InvalidDataError: It is not a ``timedelta``, is negative, is zero without ``allow_zero``, or is longer than
            ``MAX_DURATION``.
    """
    lowest = timedelta(0) if allow_zero else timedelta.resolution
    if not isinstance(value, timedelta) or not lowest <= value <= MAX_DURATION:
        span = f"{'from' if allow_zero else 'above'} 0 and at most {MAX_DURATION.days} days"
        raise InvalidDataError(f"{name} must be a timedelta {span}, not {quote(value)}")
    return value.total_seconds()


def check_time(value: object, name: str) -> str:
    """Check a point in time.

    Returns:
        The time in UTC, as PostgreSQL reads it.

    Raises:
        InvalidDataError: It is not a ``datetime``, has no offset from UTC, or is outside the years 1 to 9999 in UTC.
    """
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise InvalidDataError(f"{name} must be a datetime with an offset from UTC, not {quote(value)}")
    try:
        return value.astimezone(UTC).isoformat()
    except OverflowError:
        raise InvalidDataError(f"{name} must be within the years 1 to 9999 in UTC, not {quote(value)}") from None


def check_run_at(value: object) -> str:
    """Check the time before which no worker claims a run.

    Returns:
        The time in UTC, as PostgreSQL reads it.

    Raises:
        InvalidDataError: As ``check_time``; or it is before 1970, or on the last day that a ``datetime`` can be: in the
            time zone of a session it may have seconds in its offset, or be in the year 10000, and the run couldn't be
            read.
    """
    text = check_time(value, "run_at")
    if not "1970-01-01" <= text < "9999-12-31":
        raise InvalidDataError(f"run_at must be from 1970-01-01 to 9999-12-30 in UTC, not {quote(value)}")
    return text


def check_priority(value: object) -> int:
    """Check the priority of a run.

    Raises:
        InvalidDataError: It is not an integer, or its size is above ``MAX_PRIORITY``.
    """
    if type(value) is not int or not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidDataError(
            f"priority must be a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {quote(value)}"
        )
    return value


def check_ids(values: object, name: str) -> list[int]:
    """Check a collection of ids.

    Raises:
        InvalidDataError: It is not a collection, or one of them is no integer.
    """
    if not isinstance(values, Collection) or isinstance(values, (str, bytes)):
        raise InvalidDataError(f"{name} must be a collection of ids, not {quote(values)}")
    return [check_id(value, f"{name}[{place}]") for place, value in enumerate(values)]


def check_cursor(after: object) -> int:
    """Check the cursor of a page whose rows are sorted by id, newest first.

    Returns:
        The id below which the page starts.

    Raises:
        InvalidCursorError: It is neither ``None`` nor an integer.
    """
    if after is None:
        return MAX_BIGINT
    if isinstance(after, bool) or not isinstance(after, int):
        raise InvalidCursorError(f"after must be the next_cursor of a page, not {quote(after)}")
    return min(max(after, 0), MAX_BIGINT)


def check_json(value: object, name: str, max_depth: int = MAX_DEPTH) -> None:
    """Check that JSONB can hold a value.

    Args:
        value: Trigger data, an output, a log entry, ...
        name: Name of the argument in the message, where the paths begin.
        max_depth: Deepest nesting of lists and objects.

    Raises:
        InvalidDataError: It can't; the message gives the path of each place.
    """
    if issues := json_issues(value, name, max_depth):
        raise InvalidDataError(shorten("; ".join(issue.message for issue in issues)))


def encode_json(value: Any, name: str, max_depth: int = MAX_DEPTH) -> str | None:
    """Check a value and write it as JSON for a JSONB parameter; ``None`` stays ``None``, which is NULL.

    Raises:
        InvalidDataError: As ``check_json``.
    """
    if value is None:
        return None
    check_json(value, name, max_depth)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
