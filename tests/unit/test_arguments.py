"""Checks of arguments: what passes, and the sentence about what doesn't."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from gathering_pipeline.arguments import (
    MAX_BIGINT,
    MAX_COUNT,
    MAX_DURATION,
    check_count,
    check_cursor,
    check_duration,
    check_flag,
    check_id,
    check_json,
    check_pipeline_id,
    check_run_id,
    check_status,
    check_text,
    check_token,
    check_type,
    encode_json,
)
from gathering_pipeline.errors import (
    InvalidCursorError,
    InvalidDataError,
    PipelineError,
    PipelineNotFoundError,
    RunNotFoundError,
)
from gathering_pipeline.lifecycle import RunStatus

check_text_of_3 = partial(check_text, max_length=3)
check_duration_or_zero = partial(check_duration, allow_zero=True)

ACCEPTED: list[tuple[Callable[[Any, str], Any], Any, Any]] = [
    (check_id, 0, 0),
    (check_id, -5, -5),
    (check_id, MAX_BIGINT, MAX_BIGINT),
    (check_id, MAX_BIGINT + 1, -1),
    (check_id, -MAX_BIGINT - 1, -1),
    (check_text, "", ""),
    (check_text, "\U0001f600", "\U0001f600"),
    (check_text_of_3, "abc", "abc"),
    (check_flag, False, False),
    (check_count, 1, 1),
    (check_count, MAX_COUNT, MAX_COUNT),
    (check_duration, timedelta(microseconds=1), 0.000001),
    (check_duration, MAX_DURATION, MAX_DURATION.total_seconds()),
    (check_duration_or_zero, timedelta(0), 0.0),
    (encode_json, None, None),
    (encode_json, {"a": [1, None, "é"]}, '{"a":[1,null,"é"]}'),
]

REFUSED: list[tuple[Callable[[Any, str], Any], Any, str]] = [
    (check_id, True, r"it must be a whole number below 10\^100, not True"),
    (check_id, "1", "it must be a whole number .* not '1'"),
    (check_id, 1.0, "it must be a whole number .* not 1.0"),
    (check_id, None, "it must be a whole number .* not None"),
    (check_id, 10**100, "it must be a whole number"),
    (check_text, None, "it must be a string, not NoneType"),
    (check_text, b"a", "it must be a string, not bytes"),
    (check_text, "a\0", "it contains NUL"),
    (check_text, "\ud800", "it contains a lone surrogate"),
    (check_text_of_3, "", "it must have 1 to 3 characters, not 0"),
    (check_text_of_3, "abcd", "it must have 1 to 3 characters, not 4"),
    (check_flag, None, "it must be True or False, not None"),
    (check_flag, 1, "it must be True or False, not 1"),
    (check_count, 0, "it must be a whole number from 1 to 2147483646, not 0"),
    (check_count, MAX_COUNT + 1, "it must be a whole number from 1"),
    (check_count, True, "it must be a whole number from 1 .* not True"),
    (check_count, 1.5, "it must be a whole number from 1 .* not 1.5"),
    (check_duration, 60, "it must be a timedelta above 0 and at most 36500 days, not 60"),
    (check_duration, timedelta(0), "it must be a timedelta above 0"),
    (check_duration, MAX_DURATION + timedelta.resolution, "it must be a timedelta above 0 and at most"),
    (check_duration_or_zero, -timedelta.resolution, "it must be a timedelta from 0 and at most"),
    (check_json, {"a": [1, math.nan], "b": b""}, r"it\.a\[1\] is nan, .*; it\.b is not JSON but a bytes"),
    (encode_json, {1: 2}, "it has a key that is not a string: 1"),
]


@pytest.mark.parametrize(("check", "value", "expected"), ACCEPTED)
def test_check_of_a_good_value_returns_what_the_database_takes(
    check: Callable[[Any, str], Any], value: Any, expected: Any
) -> None:
    assert check(value, "it") == expected


@pytest.mark.parametrize(("check", "value", "message"), REFUSED)
def test_check_of_a_bad_value_raises_a_sentence_with_the_name(
    check: Callable[[Any, str], Any], value: Any, message: str
) -> None:
    with pytest.raises(InvalidDataError, match=f"^{message}"):
        check(value, "it")


def test_check_json_of_a_storable_value_passes() -> None:
    check_json({"a": [1, None, "x"]}, "it")


def test_check_json_of_many_bad_places_has_a_short_message() -> None:
    with pytest.raises(InvalidDataError) as caught:
        check_json([math.nan] * 10_000, "it")
    assert len(str(caught.value)) <= 1_000


def test_check_id_of_a_number_too_long_to_write_out_raises_a_short_sentence() -> None:
    with pytest.raises(InvalidDataError, match="^it must be a whole number below .*, not a int too large to be shown$"):
        check_id(10**5_000, "it")


@pytest.mark.parametrize(
    ("check", "error"), [(check_pipeline_id, PipelineNotFoundError), (check_run_id, RunNotFoundError)]
)
def test_check_of_an_id_that_no_row_can_have_raises_not_found(
    check: Callable[[int], int], error: type[PipelineError]
) -> None:
    assert check(MAX_BIGINT) == MAX_BIGINT
    with pytest.raises(error, match=f" {2**63} does not exist"):
        check(2**63)
    with pytest.raises(InvalidDataError, match="_id must be a whole number"):
        check("1")  # type: ignore[arg-type]


def test_check_token_passes_none() -> None:
    assert check_token(None) is None
    assert check_token(2**63) == -1
    with pytest.raises(InvalidDataError, match="^token must be a whole number"):
        check_token("1")


def test_check_status_takes_names_and_members() -> None:
    assert check_status("failed", RunStatus) == check_status(RunStatus.FAILED, RunStatus) == "failed"
    with pytest.raises(InvalidDataError, match="^status must be one of pending, running, .*, not 'active'$"):
        check_status("active", RunStatus)


def test_check_cursor_gives_the_id_below_which_the_page_starts() -> None:
    assert [check_cursor(after) for after in (None, 7, -1, 2**70)] == [MAX_BIGINT, 7, 0, MAX_BIGINT]
    for after in (True, "7", 7.0):
        with pytest.raises(InvalidCursorError, match="^after must be the next_cursor of a page, not "):
            check_cursor(after)


def test_check_type_names_the_first_type_and_the_hint() -> None:
    check_type(1, int, "it", "hint")
    check_type("a", (int, str), "it", "hint")
    with pytest.raises(InvalidDataError, match="^it must be of type int, not list: hint$"):
        check_type([], (int, str), "it", "hint")
