"""A database that a module shares, emptied before each test."""

from __future__ import annotations

import pytest

from tests.support import databases


@pytest.fixture
def database_url(module_database_url: str) -> str:
    databases.empty(module_database_url)
    return module_database_url
