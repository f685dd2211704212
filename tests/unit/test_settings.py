from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from gathering_pipeline.connections import connect_arguments
from gathering_pipeline.errors import ConfigurationError
from gathering_pipeline.settings import DatabaseSettings
from gathering_pipeline.urls import parse_url


@pytest.mark.parametrize("variable", ["GATHERING_DATABASE_URL", "DATABASE_URL"])
@pytest.mark.parametrize(("value", "what"), [("", "empty"), ("none", "none"), ("None", "none")])
def test_an_empty_url_is_refused_not_taken_for_the_embedded_server(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, what: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/theirs")
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        ConfigurationError, match=f"^{variable} can't be used: it is {what}: set it to postgresql://USER"
    ):
        DatabaseSettings.load()


def test_other_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIGRATION_URL", "DATA_DIR", "POOL_SIZE", "ANSWER_TIMEOUT"):
        monkeypatch.setenv(f"GATHERING_{name}", "")
    assert DatabaseSettings.load() == DatabaseSettings.model_construct()


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIGRATION_URL": "postgresql://h/direct",
        "DATA_DIR": "/data",
        "POOL_SIZE": "3",
        "CONNECT_TIMEOUT": "2",
        "ANSWER_TIMEOUT": "None",
        "STATEMENT_TIMEOUT": "1.5",
        "PREPARE_THRESHOLD": "NONE",
    }.items():
        monkeypatch.setenv(f"GATHERING_{name}", value)
    settings = DatabaseSettings.load()
    assert settings.migration_url == SecretStr("postgresql://h/direct")
    assert settings.data_dir == Path("/data")
    assert settings.pool_size == 3
    assert settings.answer_timeout is None
    arguments = connect_arguments(parse_url("postgresql://h/d"), settings)
    assert arguments["connect_timeout"] == 2
    assert arguments["options"] == "-c statement_timeout=1500"
    assert arguments["prepare_threshold"] is None


def test_what_the_url_says_is_left_to_it() -> None:
    arguments = connect_arguments(parse_url("postgresql://h/d?connect_timeout=3&keepalives=0"), DatabaseSettings())
    assert "connect_timeout" not in arguments
    assert "keepalives" not in arguments
    assert arguments["tcp_user_timeout"] == 10_000


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", "-c statement_timeout=2000"),
        ("?options=-c%20work_mem%3D1MB", "-c statement_timeout=2000 -c work_mem=1MB"),
        ("?options=-c%20a.b%3D1&options=-c%20a.c%3D2", "-c statement_timeout=2000 -c a.b=1 -c a.c=2"),
    ],
)
def test_options_of_the_url_come_after_ours(query: str, options: str) -> None:
    settings = DatabaseSettings(statement_timeout=timedelta(seconds=2))
    assert connect_arguments(parse_url(f"postgresql://h/d{query}"), settings)["options"] == options


def test_those_of_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=1MB")
    settings = DatabaseSettings(statement_timeout=timedelta(seconds=2))
    arguments = connect_arguments(parse_url("postgresql://h/d"), settings)
    assert arguments["options"] == "-c statement_timeout=2000 -c work_mem=1MB"


def test_the_password_is_never_shown() -> None:
    settings = DatabaseSettings(database_url=SecretStr("postgresql://u:hunter2@h/d"))
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("POOL_SIZE", "many", "a whole number, 1 or more"),
        ("POOL_SIZE", "0", "a whole number, 1 or more"),
        ("MAX_OVERFLOW", "none", "a whole number, 0 or more"),
        ("POOL_TIMEOUT", "-1", "a number of seconds, 0 or more"),
        ("IDLE_LIMIT", "0", "a number of seconds from 1 to 2147483, or none"),
        ("CONNECT_TIMEOUT", "-1", "a number of seconds from 1 to 2147483"),
        ("TCP_USER_TIMEOUT", "10ms", "a number of seconds from 1 to 2147483"),
        ("ANSWER_TIMEOUT", "0", "a number of seconds from 1 to 2147483, or none"),
        ("STATEMENT_TIMEOUT", "2147484", "a number of seconds from 1 to 2147483, or none"),
        ("TCP_USER_TIMEOUT", "1e10", "a number of seconds from 1 to 2147483"),
        ("STATEMENT_TIMEOUT", "30s", "a number of seconds from 1 to 2147483, or none"),
        ("PREPARE_THRESHOLD", "never", "a whole number, 0 or more, or none"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, form: str
) -> None:
    monkeypatch.setenv(f"GATHERING_{name}", value)
    with pytest.raises(ConfigurationError, match=f"^GATHERING_{name} can't be used: write {form}$"):
        DatabaseSettings.load()


def test_defaults_end_a_call_within_20_seconds() -> None:
    settings = DatabaseSettings()
    assert settings.answer_timeout is not None
    probe = timedelta(seconds=3)
    assert max(settings.pool_timeout, settings.connect_timeout) + settings.answer_timeout + probe < timedelta(
        seconds=20
    )
