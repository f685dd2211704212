"""The constraints of development, with the lowest versions that pyproject.toml declares in place of the newest.

``python -m tests.support.lowest`` prints them, for ``make lowest``.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOUND = re.compile(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?>=([0-9.]+)")
FOLLOWS = {"pydantic": "pydantic-core", "psycopg": "psycopg-binary"}
"""Packages whose version follows from another one's."""


def constraints() -> list[str]:
    """Lines of a constraints file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {match[1]: match[2] for item in project["dependencies"] if (match := BOUND.match(item))}
    free = {*lowest, *(FOLLOWS[name] for name in lowest if name in FOLLOWS)}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in pinned if re.split("[=<>~ ]", line.lower().replace("_", "-"))[0] not in free]
    return [*kept, *(f"{name}=={version}" for name, version in lowest.items())]


if __name__ == "__main__":
    print("\n".join(constraints()))
