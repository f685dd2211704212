"""What revision files may use: one function, whose interface never changes once a revision is released."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from gathering_pipeline import migrations, migrator

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parents[2] / "alembic"
REVISION_FILES = sorted((FOLDER / "versions").glob("*.py"))


def _imports(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", REVISION_FILES, ids=lambda path: path.stem)
def test_a_revision_file_imports_run_steps_only(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert _imports(source) == ["from gathering_pipeline.migrator import run_steps"]
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert calls == ["run_steps(revision, 'upgrade')", "run_steps(revision, 'downgrade')"]


def test_revision_files_are_the_revisions() -> None:
    assert [path.stem for path in REVISION_FILES] == migrations.revisions()


def test_the_template_of_revision_files_imports_run_steps_only() -> None:
    template = (FOLDER / "script.py.mako").read_text(encoding="utf-8").replace("${", "").replace("}", "")
    assert _imports(template) == ["from gathering_pipeline.migrator import run_steps"]


def test_run_steps_keeps_its_signature() -> None:
    assert list(inspect.signature(migrator.run_steps).parameters) == ["revision", "direction"]
    hints = get_type_hints(migrator.run_steps)
    assert (hints["revision"], hints["return"]) == (str, type(None))
    assert get_args(hints["direction"]) == ("upgrade", "downgrade")
