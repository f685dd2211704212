"""What a forked child does with the connections and locks that it inherits.

The child runs one thread. A lock that another thread held stays locked in it, and a socket is the parent's: whatever
the child sends there, the server takes for the parent's. So each object that has one of these is renewed in the child
before anything else runs there, without input or output and without a lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_inherited: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def call_in_child(action: Callable[[], None]) -> None:
    """Call a function in every process that this one forks from now on."""
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=action)


def renew_in_child(thing: T, renew: Callable[[T], None]) -> None:
    """Call ``renew(thing)`` in every process that this one forks while ``thing`` exists.

    Args:
        thing: An object that can be hashed and referenced weakly.
        renew: A function that doesn't refer to ``thing``.
    """
    _inherited[thing] = renew


def _renew() -> None:
    failure: Exception | None = None
    for thing, renew in list(_inherited.items()):
        try:
            renew(thing)
        except Exception as error:  # noqa: BLE001 - the other objects have to be renewed, too
            failure = error
    if failure is not None:
        raise failure


def detach(descriptor: int) -> None:
    """Replace a descriptor by the null device: its number stays taken, and what is sent there reaches nobody."""
    os.close(descriptor)  # first: the process may be at its limit of descriptors
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor, inheritable=False)
        os.close(null)


call_in_child(_renew)
