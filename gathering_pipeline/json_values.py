"""Which values PostgreSQL's JSONB can hold, and the names of places in them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import chain, islice
from math import isfinite
from sys import float_info
from typing import Any

from .errors import Issue, shorten

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a stored value."""

_MAX_NUMBER = int(Decimal(repr(float_info.max)))  # as the text in JSON says it, to which the database compares
_MAX_VALUES = 10_000_000
_MAX_FINDINGS = 100
_UNUSUAL, _TOO_MANY = -1, -2


def json_issues(value: object, path: str, depth: int = MAX_DEPTH) -> list[Issue]:
    """What keeps a value from being stored as JSONB: at most 100 places, each named by its path.

    Args:
        value: Trigger data, an output, a configuration, ...
        path: What the messages call it.
        depth: How deep lists and objects may be nested.
    """
    size = scan([value], depth)
    if size >= 0:
        return []
    if size == _TOO_MANY:
        return [Issue("error", "too_large", f"{path} has more than {_MAX_VALUES} values")]
    findings = islice(_walk(value, path, depth), _MAX_FINDINGS)
    return [Issue("error", "invalid_json", f"{shorten(where, 300)} {reason}") for where, reason in findings]


def show(value: object) -> str:
    """A value in a message: quoted and escaped, at most 120 characters."""
    if isinstance(value, str):
        return repr(shorten(value, 120))
    try:
        return shorten(repr(value), 120)
    except (RecursionError, ValueError):  # nested too deep, a number of too many digits
        return f"a {type(value).__name__} too large to be shown"


def json_path(root: str, keys: Iterable[object]) -> str:
    """Name a place in JSON, such as ``nodes[3].config.agent_id``; shortened where keys are long."""
    for key in keys:
        root += f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{show(key)}]"
    return shorten(root, 300)


def scan(values: Iterable[object], depth: int) -> int:
    """A bound of the size of these values as JSON in bytes if they are surely good, else a negative number.

    It goes level by level and looks at each value once; whatever is not exactly JSON is left to ``_walk``.
    """
    texts: list[str] = []
    integers: list[int] = []
    floats: list[float] = []
    constants: list[object] = []
    objects: list[dict[str, object]] = []
    arrays: list[list[object]] = []
    sort: dict[type, Callable[[Any], None]] = {
        str: texts.append,
        int: integers.append,
        float: floats.append,
        bool: constants.append,
        type(None): constants.append,
        dict: objects.append,
        list: arrays.append,
    }
    total = 0
    try:
        while True:
            for value in values:
                sort[type(value)](value)
            if not objects and not arrays:
                break
            if depth == 0:
                return _UNUSUAL
            depth -= 1
            texts += chain.from_iterable(objects)
            members = chain(chain.from_iterable(map(dict.values, objects)), chain.from_iterable(arrays))
            values = list(islice(members, _MAX_VALUES))
            total += len(values) + len(objects) + len(arrays)
            if total >= _MAX_VALUES:
                return _TOO_MANY
            objects.clear()
            arrays.clear()
        array("q", integers)
    except (KeyError, OverflowError, TypeError):  # another type, a huge number
        return _UNUSUAL
    size = text_size(texts)
    if size < 0 or (floats and not all(map(isfinite, floats))):
        return _UNUSUAL
    # a number takes up to 25 bytes; constants, brackets and commas up to six
    return size + 6 * (total + len(constants)) + 25 * (len(integers) + len(floats))


def text_size(texts: list[str]) -> int:
    """A bound of the size of these texts as JSON in bytes if all of them can be stored, else a negative number."""
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
    """Why PostgreSQL can't store a text."""
    if "\0" in text:
        return "contains NUL, which PostgreSQL can't store"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate, which is not Unicode text"
    return None


def _value_reason(value: object) -> str | None:
    """What is wrong with a value that is neither a list nor an object."""
    if value is None or isinstance(value, str):
        return text_reason(value) if value else None
    if isinstance(value, float):
        return None if isfinite(value) else f"is {value}, which JSON can't hold"
    if isinstance(value, int):
        return None if -_MAX_NUMBER <= value <= _MAX_NUMBER else "is a number too large for a float"
    return f"is not JSON but a {type(value).__name__}"


def _walk(value: object, path: str, depth: int) -> Iterator[tuple[str, str]]:
    """Each place that JSONB can't hold, and why; without recursion, and each container once for a depth."""
    seen: dict[int, int] = {}
    inside: set[int] = set()
    stack: list[tuple[object, Iterator[tuple[str, object]]]] = [(None, iter([(path, value)]))]
    while stack:
        owner, members = stack[-1]
        for where, item in members:
            if not isinstance(item, dict | list | tuple):
                if reason := _value_reason(item):
                    yield where, reason
            elif id(item) in inside:
                yield where, "contains itself"
            elif len(stack) > depth:
                yield where, f"is nested deeper than {MAX_DEPTH}"
            elif seen.get(id(item), 0) < len(stack):
                seen[id(item)] = len(stack)
                inside.add(id(item))
                for key in item if isinstance(item, dict) else ():
                    reason = text_reason(key) if isinstance(key, str) else "is not a string"
                    if reason:
                        yield where, f"has a key that {reason}: {show(key)}"
                items = item.items() if isinstance(item, dict) else enumerate(item)
                stack.append((item, _named(where, items)))
                break
        else:
            stack.pop()
            inside.discard(id(owner))


def _named(path: str, items: Iterable[tuple[object, object]]) -> Iterator[tuple[str, object]]:
    for key, value in items:
        yield json_path(path, [key]), value
