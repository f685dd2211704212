"""Which values PostgreSQL's JSONB can hold, and the names of places in them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import chain, islice
from math import isfinite
from sys import float_info

from .errors import Issue, IssueCode, shorten

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a stored value."""

MAX_BYTES = 268_435_455
"""Size in bytes as JSON of the largest value; JSONB holds no longer text, list or object."""

_MAX_NUMBER = int(
    Decimal(repr(float_info.max))
)  # the shortest decimal of the largest float; the database compares with the same
_MAX_VALUES = 10_000_000
_MAX_FINDINGS = 100
_UNUSUAL, _TOO_MANY = -1, -2


def json_issues(value: object, path: str, depth: int = MAX_DEPTH, loc: tuple[str | int, ...] = ()) -> list[Issue]:
    """Name the places, at most 100, at which JSONB can't hold a value.

    Args:
        value: Trigger data, an output, a configuration, ...
        path: Name of the value in messages.
        depth: Deepest nesting of lists and objects.
        loc: Place of the value, with which the places begin.
    """
    size = scan([value], depth)
    if 0 <= size <= MAX_BYTES:
        return []
    if size == _TOO_MANY:
        return [Issue("error", IssueCode.TOO_LARGE, f"{path} has more than {_MAX_VALUES} values", loc=loc)]
    issues = [
        Issue("error", IssueCode.INVALID_JSON, f"{json_path(path, keys)} {reason}", loc=(*loc, *keys))
        for keys, reason in islice(_walk(value, depth), _MAX_FINDINGS)
    ]
    if issues or json_bytes(value) <= MAX_BYTES:
        return issues
    keys, size = _largest(value)
    message = f"{json_path(path, keys)} has {size:,} bytes as JSON: the database holds at most {MAX_BYTES:,}"
    return [Issue("error", IssueCode.TOO_LARGE, message, loc=(*loc, *keys))]


def json_bytes(value: object) -> int:
    """Size of a value in bytes as compact JSON in UTF-8."""
    return len(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())


def _largest(value: object) -> tuple[_Keys, int]:
    """The innermost place that is larger than ``MAX_BYTES``, and its size in bytes; ``value`` is."""
    place: _Keys = ()
    size = json_bytes(value)
    while isinstance(value, dict | list | tuple):
        sizes = ((keys, member, json_bytes(member)) for keys, member in _members(place, value))
        inner = next((found for found in sizes if found[2] > MAX_BYTES), None)
        if inner is None:
            break
        place, value, size = inner
    return place, size


def quote(value: object) -> str:
    """Quote and escape a value for a message, in at most 120 characters."""
    if isinstance(value, str):
        return repr(shorten(value, 120))
    try:
        return shorten(repr(value), 120)
    except (RecursionError, ValueError):  # nested too deep, a number of too many digits
        return f"a {type(value).__name__} too large to be shown"


def json_path(root: str, keys: Iterable[object]) -> str:
    """Name a place in JSON, such as ``nodes[3].config.agent_id``; shortened where keys are long."""
    for key in keys:
        root += f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{quote(key)}]"
    return shorten(root, 300)


def scan(values: Iterable[object], depth: int) -> int:  # noqa: C901, PLR0912 - a branch a type, which is the fastest
    """Scan values for what JSONB can't hold: level by level, each value once.

    Returns:
        An upper bound of their size as JSON in bytes if they are certainly storable, else a negative number: what is
        not exactly JSON, such as a tuple, is left to ``_walk``.
    """
    texts: list[str] = []
    integers: list[int] = []
    floats: list[float] = []
    constants = total = 0
    while True:
        objects: list[dict[str, object]] = []
        arrays: list[list[object]] = []
        for value in values:
            kind = type(value)  # not isinstance: it is faster, and a subclass may hold more than JSON
            if kind is str:
                texts.append(value)  # type: ignore[arg-type]
            elif kind is dict:
                objects.append(value)  # type: ignore[arg-type]
            elif kind is int:
                integers.append(value)  # type: ignore[arg-type]
            elif kind is list:
                arrays.append(value)  # type: ignore[arg-type]
            elif kind is float:
                floats.append(value)  # type: ignore[arg-type]
            elif kind is bool or value is None:
                constants += 1
            else:
                return _UNUSUAL
        if not objects and not arrays:
            break
        if depth == 0:
            return _UNUSUAL
        depth -= 1
        for one in objects:
            texts += one
        members = chain(chain.from_iterable(map(dict.values, objects)), chain.from_iterable(arrays))
        values = list(islice(members, _MAX_VALUES))
        total += len(values) + len(objects) + len(arrays)
        if total >= _MAX_VALUES:
            return _TOO_MANY
    size = text_size(texts)
    try:
        array("q", integers)
    except OverflowError:
        return _UNUSUAL
    if size < 0 or (floats and not all(map(isfinite, floats))):
        return _UNUSUAL
    # a number takes up to 25 bytes; constants, brackets and commas up to six
    return size + 6 * (total + constants) + 25 * (len(integers) + len(floats))


def text_size(texts: list[str]) -> int:
    """An upper bound of the size of texts as JSON in bytes if all of them are storable, else a negative number."""
    try:
        text = "".join(texts)
        size = len(text) if text.isascii() else len(text.encode())
    except (TypeError, UnicodeEncodeError):
        return _UNUSUAL
    if "\0" in text:
        return _UNUSUAL
    # an escaped character takes up to six bytes, a printable one two; four for quotes and separators
    return size * (2 if text.isprintable() else 6) + 4 * len(texts)


def text_reason(text: str) -> str | None:
    """Why PostgreSQL can't store a text; ``None`` if it can."""
    if "\0" in text:
        return "contains NUL, which PostgreSQL can't store"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate, which is not Unicode text"
    return None


def _value_reason(value: object) -> str | None:
    """Why JSONB can't hold a value that is neither a list nor an object; ``None`` if it can."""
    if value is None or isinstance(value, str):
        return text_reason(value) if value else None
    if isinstance(value, float):
        return None if isfinite(value) else f"is {value}, which JSON can't hold"
    if isinstance(value, int):
        return None if -_MAX_NUMBER <= value <= _MAX_NUMBER else "is a number too large for a float"
    return f"is not JSON but a {type(value).__name__}"


_Keys = tuple[str | int, ...]


def _walk(value: object, depth: int) -> Iterator[tuple[_Keys, str]]:
    """Find each place that JSONB can't hold, and why; without recursion, and each container once for a depth."""
    seen: dict[int, int] = {}
    inside: set[int] = set()
    stack: list[tuple[object, Iterator[tuple[_Keys, object]]]] = [(None, iter([((), value)]))]
    while stack:
        owner, members = stack[-1]
        for keys, item in members:
            if not isinstance(item, dict | list | tuple):
                if reason := _value_reason(item):
                    yield keys, reason
            elif id(item) in inside:
                yield keys, "contains itself"
            elif len(stack) > depth:
                yield keys, f"is nested deeper than {MAX_DEPTH}"
            elif seen.get(id(item), 0) < len(stack):
                seen[id(item)] = len(stack)
                inside.add(id(item))
                for key in item if isinstance(item, dict) else ():
                    reason = text_reason(key) if isinstance(key, str) else "is not a string"
                    if reason:
                        yield keys, f"has a key that {reason}: {quote(key)}"
                stack.append((item, _members(keys, item)))
                break
        else:
            stack.pop()
            inside.discard(id(owner))


def _members(
    keys: _Keys, owner: dict[object, object] | list[object] | tuple[object, ...]
) -> Iterator[tuple[_Keys, object]]:
    if isinstance(owner, dict):
        for key, value in owner.items():
            yield (*keys, str.__str__(key) if isinstance(key, str) else quote(key)), value
    else:
        for index, value in enumerate(owner):
            yield (*keys, index), value
