"""Reads e-mails (.eml): who wrote what to whom and when, and the text. Attachments are named and not read."""

from __future__ import annotations

import re
from email import message_from_bytes, policy
from typing import Any

from loracast.documents.clean import normalise
from loracast.documents.file_types import Limits, Parsed
from loracast.documents.html import parse as parse_html
from loracast.errors import DocumentError

_SHOWN = ("Subject", "From", "To", "Cc", "Date")


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The text of an e-mail below its headers, and its subject. Of two forms of a text the plain one counts."""
    message = message_from_bytes(data, policy=policy.default)
    headers = {name: " ".join(str(message.get(name) or "").split()) for name in _SHOWN}
    body = message.get_body(("plain", "html"))
    text = "" if body is None else _text(body, label, limits)
    attached = [one.get_filename() or one.get_content_type() for one in message.iter_attachments()]
    if not text.strip():
        also = f"; save its attachments ({', '.join(attached[:5])}) and learn them" if attached else ""
        raise DocumentError(f"{label} is an e-mail without text{also}")
    above = "\n".join(f"{name}: {value}" for name, value in headers.items() if value)
    warnings = (f"attachments are not read: {', '.join(attached[:10])}",) if attached else ()
    return Parsed(normalise(f"{above}\n\n{text}".strip()), headers["Subject"], warnings=warnings)


def _text(body: Any, label: str, limits: Limits) -> str:
    content = body.get_content()
    if body.get_content_subtype() != "html":
        return re.sub(r"^-- ?$.*\Z", "", content, flags=re.M | re.S)  # the signature of a mail begins with "-- "
    return parse_html(b"\xef\xbb\xbf" + content.encode(errors="replace"), label, limits).text
