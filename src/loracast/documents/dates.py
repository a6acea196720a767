"""Writes the date beside what a message says of it ("last Sunday [7 May 2023]"), from the day on which it was said.

A library finds expressions of time, in English. One counts where it moves with the day of the message, as "last Sunday"
does and "2019" does not; where it is the same whether dates are looked for before or after that day, as "two weeks ago"
is and "Sunday" or "three years" are not; and where it is another day than the message's own.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dateparser.date import DateDataParser

_MOVED = timedelta(days=400)
_SLACK = timedelta(days=4)  # months and years differ in length
_LANGUAGES = ["en"]
_FORMS = {"year": "%Y", "month": "%B %Y", "week": "the week of {0.day} %B %Y"}
_DAY = "{0.day} %B %Y"


def with_dates(text: str, said: datetime) -> str:
    """The text with the date in brackets behind each expression that is told relative to the day of the message."""
    at, parts = 0, list[str]()
    for phrase in _candidates(text, said):
        found = text.find(phrase, at)
        if date := _date(phrase, said):
            shorter = phrase
            while " " in shorter and _date(shorter.rpartition(" ")[0], said) == date:  # "last Sunday in"
                shorter = shorter.rpartition(" ")[0]
            end = found + len(shorter)
            parts.append(f"{text[at:end]} [{date}]")
            at = end
    return "".join([*parts, text[at:]])


def _candidates(text: str, said: datetime) -> list[str]:
    from dateparser.search import search_dates

    return [phrase for phrase, _ in search_dates(text, languages=_LANGUAGES, settings=_settings(said)) or []]


def _date(phrase: str, said: datetime) -> str | None:
    """The day, week, month or year that a phrase means; None where it does not go by the day of the message."""
    found, period = _read(phrase, said)
    after, _ = _read(phrase, said, "future")
    moved, _ = _read(phrase, said + _MOVED)
    if found is None or moved is None or after != found or found.date() == said.date():
        return None
    if abs(moved - found - _MOVED) > _SLACK:
        return None
    return found.strftime(_FORMS.get(period, _DAY).format(found))


def _read(phrase: str, said: datetime, prefer: str = "past") -> tuple[datetime | None, str]:
    data = _parser(said, prefer).get_date_data(phrase)
    return data.date_obj, data.period


def _parser(said: datetime, prefer: str) -> DateDataParser:
    from dateparser.date import DateDataParser

    return DateDataParser(languages=_LANGUAGES, settings=_settings(said, prefer))


def _settings(said: datetime, prefer: str = "past") -> dict[str, Any]:
    return {"RELATIVE_BASE": said.replace(tzinfo=None), "PREFER_DATES_FROM": prefer, "RETURN_AS_TIMEZONE_AWARE": False}
