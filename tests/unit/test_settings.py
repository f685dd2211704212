from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from gathering_pipeline.errors import ConfigurationError
from gathering_pipeline.settings import DatabaseSettings, parse_url


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"])
def test_urls_of_postgresql_get_our_driver(scheme: str) -> None:
    url = parse_url(f"{scheme}://user:p%40ss@host:5433/name?sslmode=require")
    assert url.render_as_string(hide_password=False) == (
        "postgresql+psycopg://user:p%40ss@host:5433/name?sslmode=require"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mysql://u:hunter2@h/d", r"mysql:// is not PostgreSQL: write a URL that begins with postgresql://"),
        ("sqlite://", r"sqlite:// is not PostgreSQL"),
        ("postgresql+psycopg2://u:hunter2@h/d", r"the driver of postgresql\+psycopg2:// is not supported"),
        ("u:hunter2@h/d", r"the database URL can't be read"),
        ("postgresql://u:hunter2@h:port/d", r"the database URL can't be read"),
        ("", r"the database URL can't be read"),
    ],
)
def test_other_urls_are_refused_in_a_sentence_without_the_password(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse_url(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_the_url_comes_from_our_variable_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DatabaseSettings.load().url() is None
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/theirs")
    assert str(DatabaseSettings.load().url()) == "postgresql+psycopg://h/theirs"
    monkeypatch.setenv("GATHERING_DATABASE_URL", "postgresql://h/ours")
    assert str(DatabaseSettings.load().url()) == "postgresql+psycopg://h/ours"
    monkeypatch.setenv("GATHERING_DATABASE_URL", "")
    assert str(DatabaseSettings.load().url()) == "postgresql+psycopg://h/theirs"


@pytest.mark.parametrize("variable", ["DATABASE_URL", "GATHERING_DATABASE_URL"])
def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "postgresql://h/environment")
    settings = DatabaseSettings(database_url=SecretStr("postgresql://h/argument"))
    assert str(settings.url()) == "postgresql+psycopg://h/argument"


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIGRATION_URL": "postgresql://h/direct",
        "DATA_DIR": "/data",
        "POOL_SIZE": "3",
        "CONNECT_TIMEOUT": "2",
        "ANSWER_TIMEOUT": "none",
        "STATEMENT_TIMEOUT": "1.5",
        "PREPARE_THRESHOLD": "none",
    }.items():
        monkeypatch.setenv(f"GATHERING_{name}", value)
    settings = DatabaseSettings.load()
    assert settings.migration_url == SecretStr("postgresql://h/direct")
    assert settings.data_dir == Path("/data")
    assert settings.pool_size == 3
    assert settings.answer_timeout is None
    arguments = settings.connect_arguments(parse_url("postgresql://h/d"))
    assert arguments["connect_timeout"] == 2
    assert arguments["options"] == "-c statement_timeout=1500"
    assert arguments["prepare_threshold"] is None


def test_what_the_url_says_is_left_to_it() -> None:
    arguments = DatabaseSettings().connect_arguments(parse_url("postgresql://h/d?connect_timeout=3&keepalives=0"))
    assert "connect_timeout" not in arguments
    assert "keepalives" not in arguments
    assert arguments["tcp_user_timeout"] == 10_000


def test_the_password_is_never_shown() -> None:
    settings = DatabaseSettings(database_url=SecretStr("postgresql://u:hunter2@h/d"))
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("name", "value"), [("POOL_SIZE", "many"), ("POOL_SIZE", "0"), ("CONNECT_TIMEOUT", "-1"), ("ANSWER_TIMEOUT", "0")]
)
def test_a_variable_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"GATHERING_{name}", value)
    with pytest.raises(ConfigurationError, match=f"^GATHERING_{name} can't be used: "):
        DatabaseSettings.load()


def test_defaults_end_a_call_within_20_seconds() -> None:
    settings = DatabaseSettings()
    assert settings.answer_timeout is not None
    probe = timedelta(seconds=3)
    assert max(settings.pool_timeout, settings.connect_timeout) + settings.answer_timeout + probe < timedelta(
        seconds=20
    )
