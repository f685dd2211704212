"""How the tests and the package are laid out."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "gathering_pipeline"


def imported(path: Path) -> set[str]:
    """The modules that a file imports, each name of a ``from`` counted as one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_of_a_test_module_name_no_other_test_module() -> None:
    """What two of them need stands in ``tests/support``."""
    modules = sorted(TESTS.rglob("*.py"))
    assert len(modules) > 50
    wrong = {
        str(path.relative_to(TESTS)): name
        for path in modules
        for name in imported(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    }
    assert wrong == {}


def test_only_connections_makes_engines_and_connections() -> None:
    makers = {"create_engine", "create_async_engine", "engine_from_config", "connect"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            owner, _, method = name.rpartition(".")
            # engine.connect() takes a connection of an engine that exists
            if method in makers and (method != "connect" or "psycopg" in owner or owner.endswith("Connection")):
                found.add(str(path.relative_to(PACKAGE)))
    assert found == {"connections.py"}
