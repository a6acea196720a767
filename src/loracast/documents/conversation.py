"""Reads conversations: messages as JSON lines or as OpenAI's API takes them, exports of WhatsApp and of Slack.

A message is a row, so one unit wherever sentences are told apart (units.py), and begins with who said it and when:
"Ada (Monday 8 May 2023, 13:56): I painted the kitchen." Dates that it tells relative to that day stand beside what it
says of them (dates.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from loracast.documents.dates import with_dates
from loracast.documents.file_types import Parsed
from loracast.documents.tables import ROW
from loracast.errors import DocumentError

_MOST_NAMED = 4  # speakers in a title
_SPEAKERS = ("name", "speaker", "author", "sender", "username", "user", "role")
_TEXTS = ("content", "text", "message")
_TIMES = ("time", "timestamp", "created_at", "create_time", "date", "ts")
_STAMP = re.compile(
    r"\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{2,4}),?\s+(?P<hour>\d{1,2})[:.](?P<minute>\d\d)(?:[:.]\d\d)?"
    r"\s*(?P<half>[AaPp]\.?[Mm]\.?)?\]?\s*(?:[-–]\s+)?(?P<said>.*)"
)
"""The beginning of a message in an export of WhatsApp, whose dates are written as the telephone writes them."""
_SAID = re.compile(r"([^:]{1,60}): (.*)")
_MENTION = re.compile(r"<@(\w+)(?:\|[^>]*)?>")


@dataclass(frozen=True)
class Message:
    """What somebody said."""

    name: str
    text: str
    time: datetime | str | None = None
    """A text where no date is found in it."""

    @property
    def dated(self) -> Message:
        """The message with dates beside what it says of them, as far as its own is known."""
        return self if not isinstance(self.time, datetime) else replace(self, text=with_dates(self.text, self.time))

    @property
    def line(self) -> str:
        """The message as a row of a document."""
        when = (
            f"{self.time:%A} {self.time.day} {self.time:%B %Y, %H:%M}" if isinstance(self.time, datetime) else self.time
        )
        return f"{ROW}{self.name}{f' ({when})' if when else ''}: {' '.join(self.text.split())}"


def parse_conversation(text: str, label: str, file_name: str | None) -> Parsed | None:
    """The messages of a conversation, a line each; None for a text that is none.

    Raises DocumentError for a file of JSON lines that begins with a message and has a line that is none.
    """
    is_json = (file_name or "").lower().endswith((".json", ".jsonl"))
    messages = _in_json(text, label) if is_json else _in_whatsapp(text)
    messages = [one for one in messages if one.text.strip()]
    if not messages:
        return None
    names = list(dict.fromkeys(one.name for one in messages))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    title = f"Conversation of {', '.join(names[:_MOST_NAMED])}{more}"
    return Parsed("\n".join(one.dated.line for one in messages), title)


def _in_json(text: str, label: str) -> list[Message]:
    try:
        found = json.loads(text)
    except ValueError:  # JSON lines
        return _in_lines(text, label)
    found = found.get("messages", [found]) if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return []
    names = {one["user"]: _speaker(one) for one in found if isinstance(one.get("user"), str)}
    messages = [_of_record(one, names) for one in found if one.get("role") != "system" and not one.get("subtype")]
    return [one for one in messages if one] if all(messages) else []


def _in_lines(text: str, label: str) -> list[Message]:
    messages = list[Message]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        message = _of_record(record) if isinstance(record, dict) else None
        if message is None:
            if not messages:  # some other file of lines
                return []
            raise DocumentError(f"{label}, line {number} is no message: it needs a name or role, and content")
        messages += [] if record.get("role") == "system" else [message]
    return messages


def _of_record(record: Mapping[str, Any], names: Mapping[str, str] = {}) -> Message | None:
    """A message of a JSON object, whose content may be a list of parts; `names` has those of users' ids."""
    content = next((record[key] for key in _TEXTS if key in record), None)
    if isinstance(content, list):
        content = " ".join(part["text"] for part in content if isinstance(part, dict) and part.get("type") == "text")
    name = _speaker(record)
    if not isinstance(content, str | None) or not name or not any(key in record for key in _TEXTS):
        return None
    said = _MENTION.sub(lambda mention: names.get(mention[1], mention[1]), content or "")
    return Message(name, said, _time(next((record[key] for key in _TIMES if record.get(key)), None)))


def _speaker(record: Mapping[str, Any]) -> str:
    profile = record.get("user_profile")  # of Slack
    known = profile if isinstance(profile, dict) else {}
    given = (known.get("real_name"), known.get("display_name"), *(record.get(key) for key in _SPEAKERS))
    return next((one for one in given if isinstance(one, str) and one.strip()), "")


def _time(value: Any) -> datetime | str | None:
    """A moment of ISO 8601 or in seconds since 1970, which is told in UTC; any other text as it is."""
    if value is None:
        return None
    try:
        return datetime.fromtimestamp(float(value), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        pass
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)


def _in_whatsapp(text: str) -> list[Message]:
    """The messages of an export of WhatsApp; a line without a stamp goes on with the message above it."""
    lines = text.strip().split("\n")
    if not _STAMP.fullmatch(lines[0].lstrip("\u200e")):
        return []
    stamped = list[tuple[re.Match[str], list[str]]]()
    for line in lines:
        if stamp := _STAMP.fullmatch(line.lstrip("\u200e")):
            stamped.append((stamp, [stamp["said"]]))
        else:
            stamped[-1][1].append(line)
    order = _order([stamp["date"] for stamp, _ in stamped], any(stamp["half"] for stamp, _ in stamped))
    said = [(stamp, _SAID.fullmatch(lines[0].strip()), lines[1:]) for stamp, lines in stamped]  # none: a notice
    found = [Message(who[1], "\n".join([who[2], *rest]), _moment(stamp, order)) for stamp, who, rest in said if who]
    return found if len(found) > 1 else []


def _order(dates: Sequence[str], has_halves: bool) -> str:
    """In which order the dates of a file have year, month and day, as no date of it is impossible in that order."""
    parts = [[int(part) for part in re.split("[./-]", date)] for date in dates]
    if any(first > 31 for first, _, _ in parts):
        return "ymd"
    if any(first > 12 for first, _, _ in parts):
        return "dmy"
    return "mdy" if any(second > 12 for _, second, _ in parts) or has_halves else "dmy"


def _moment(stamp: re.Match[str], order: str) -> datetime | str:
    numbers = dict(zip(order, (int(part) for part in re.split("[./-]", stamp["date"])), strict=True))
    hour = int(stamp["hour"])
    if stamp["half"]:
        hour = hour % 12 + 12 * (stamp["half"][0] in "Pp")
    year = numbers["y"] + 2000 * (numbers["y"] < 100)
    try:
        return datetime(year, numbers["m"], numbers["d"], hour, int(stamp["minute"]))
    except ValueError:
        return f"{stamp['date']}, {stamp['hour']}:{stamp['minute']}"
