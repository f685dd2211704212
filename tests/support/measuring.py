"""Coverage of the programs that tests start."""

from __future__ import annotations

import os

COVERAGE = "GATHERING_TEST_COVERAGE"
"""Variable with the configuration of coverage, where that is measured; see ``conftest.py``."""


def measured(**variables: str) -> dict[str, str]:
    """The environment of a program that is measured if the tests are."""
    configuration = os.environ.get(COVERAGE)
    return os.environ | ({} if configuration is None else {"COVERAGE_PROCESS_START": configuration}) | variables
