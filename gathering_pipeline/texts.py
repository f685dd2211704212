"""Texts for people: what a terminal or a page can show."""

from __future__ import annotations

from datetime import timedelta


def printable(text: str) -> str:
    """Escape what can't be shown: a name may hold escape sequences of terminals, or turn the direction of the text."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def printable_lines(text: str) -> str:
    """``printable`` for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: str) -> str:
    """A text in one line, with single blanks."""
    return printable(" ".join(text.split()))


def duration_text(span: timedelta) -> str:
    """A duration in its largest two units, such as ``2 h 05 min``; a negative one is none."""
    seconds = max(span.total_seconds(), 0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds else "0 s"
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.3g} s"
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left:02} h"
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {seconds_left:02} s"
