"""Options of a migration."""

from pathlib import Path

import pytest
from alembic import command

from gathering_pipeline import migrations
from gathering_pipeline.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
)
from tests.support.databases import Connect
from tests.support.revisions import BIG_TABLE, INDEX, run_alembic, write_revision

pytestmark = pytest.mark.once


@pytest.mark.parametrize("value", [False, "false", "off", "0"])
def test_option_spelled_as_false_is_off(
    scripts: Path, empty_database_url: str, connect: Connect, value: object
) -> None:
    raw = connect(empty_database_url)
    raw.execute(BIG_TABLE)
    write_revision(scripts, "one", None, f"-- == index: circle.idx_t\n{INDEX}")
    config = migrations.config(empty_database_url)
    config.attributes.update({"yield": value, "patience": 0, "lock_timeout": 50})
    with raw.transaction():
        raw.execute(
            "SET LOCAL idle_in_transaction_session_timeout = '10s'"
        )  # for as long a concurrent build would wait
        raw.execute("UPDATE circle.t SET id = id WHERE id = 1")
        # not built concurrently, so it waits for the writer's lock
        with pytest.raises(DatabaseUnavailableError, match="a lock was not free within 50"):
            command.upgrade(config, "head")


@pytest.mark.parametrize(
    ("name", "value"),
    [("yield", "nein"), ("yield", ""), ("lock_timeout", "soon"), ("lock_timeout", 0), ("lock_timeout", "1s; SELECT 1"),
     ("patience", "nan"), ("patience", "-1"), ("patience", "long")],
)  # fmt: skip
def test_option_with_bad_value_raises(empty_database_url: str, name: str, value: object) -> None:
    config = migrations.config(empty_database_url)
    config.attributes[name] = value
    with pytest.raises(ConfigurationError, match=f"the option {name} can't be {value!r}: write "):
        command.upgrade(config, "head")


def test_unknown_option_raises(empty_database_url: str) -> None:
    done = run_alembic(empty_database_url, "-x", "patience=5", "-x", "pattience=5", "upgrade", "head")
    assert done.returncode != 0
    assert "there is no option 'pattience': there are lock_timeout, patience, yield" in done.stdout + done.stderr
    with pytest.raises(ConfigurationError, match="there is no option 'pattience'"):
        migrations.upgrade(empty_database_url, options={"pattience": 5})
