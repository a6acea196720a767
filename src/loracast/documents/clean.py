"""Decodes bytes and normalises text to the one form that the rest of loracast sees; makes titles and names readable.

An encoding is never guessed: a wrong guess would be cast into weights without anyone noticing.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import PurePath

from loracast.documents.file_types import READABLE
from loracast.errors import DocumentError

_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What pages mean by the encodings that they declare (WHATWG, Encoding Standard, 4.2): as Python names them.
_MEANT = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
_CONTROLS = re.compile(r"[\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


def decode(data: bytes, label: str, declared: str | None = None) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, or in what the file itself declares (HTML)."""
    encoding = next((encoding for bom, encoding in _BOMS if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8" and declared:
            try:
                return data.decode(_MEANT.get(codecs.lookup(declared).name, declared))
            except (UnicodeDecodeError, LookupError):
                raise DocumentError(f"{label} declares the encoding {declared} but is not written in it") from None
        if encoding != "utf-8":
            said = f"starts as {encoding.upper()} but breaks off at byte {error.start}: save it again as UTF-8"
        elif b"\0" in data:
            said = f"is a binary file of an unknown kind: {READABLE}"
        else:
            said = (
                f"is not UTF-8 (byte 0x{data[error.start]:02X} at offset {error.start}): find its encoding out and "
                "convert it, e.g. `iconv -f WINDOWS-1252 -t UTF-8 in.txt > out.txt`"
            )
        raise DocumentError(f"{label} {said}") from None
    if text.count("\0") > len(text) // 4:  # every second byte of Latin text in UTF-16
        raise DocumentError(
            f"{label} looks like UTF-16 or UTF-32 without a byte order mark: "
            "convert it with `iconv -f UTF-16LE -t UTF-8` (or UTF-16BE) and read the result"
        )
    head = text[:100_000]
    if len(_CONTROLS.findall(head)) + head.count("\0") > len(head) // 20:
        raise DocumentError(f"{label} is a binary file of an unknown kind: {READABLE}")
    return text


# Invisible: soft hyphen, Mongolian separator, zero-width space, bidirectional marks and overrides, word joiner and the
# like, the byte order mark, annotation anchors, and the tag characters that smuggle ASCII past a reader's eye.
_INVISIBLE = re.compile(
    "[\x00\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# Joiners shape Arabic, Indic and emoji sequences, where they stay; between other characters they show nothing.
_JOINERS = re.compile("(?<![\u0600-\U0010ffff])[\u200c\u200d]|[\u200c\u200d](?![\u0600-\U0010ffff])")
_SPACES = re.compile("[\u00a0\u2007\u202f]")
_BREAKS = re.compile("\r\n?|[\x0b\u0085\u2028]")
_PARAGRAPHS = re.compile("[\x0c\u2029]")
_BLANK_LINES = re.compile(r"\n{3,}")


def normalise(text: str) -> str:
    """NFC, unix newlines, nothing invisible, no white space at line ends, at most one blank line in a row."""
    text = _PARAGRAPHS.sub("\n\n", _BREAKS.sub("\n", text))
    text = _CONTROLS.sub("", _JOINERS.sub("", _INVISIBLE.sub("", text)))
    text = _SPACES.sub(" ", text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    # Line by line: a pattern such as `[ ]+\n` takes quadratic time on a long run of spaces.
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


_ORDINAL = re.compile("st|nd|rd|th|er|re|ème", re.I)


def superscript(before: str, raised: str) -> str:
    """What is written for raised text behind `before`: "^6" after "10" and "^(n+1)" after "x", but "st" after "1"."""
    is_apart = not before or before[-1].isspace() or not raised or raised[0].isspace()
    bare = raised.rstrip()
    if is_apart or (before[-1].isdigit() and _ORDINAL.fullmatch(bare)):
        return raised
    is_one = re.fullmatch(r"[-−+]?[\w.,]+|\W", bare)
    return (f"^{bare}" if is_one else f"^({bare})") + raised[len(bare) :]


def join_blocks(blocks: Iterable[str]) -> str:
    """Blocks of text as paragraphs after blank lines; items of one list stay together."""
    parts: list[str] = []
    for above, block in pairwise(["", *filter(None, blocks)]):
        parts += ["\n" if above.startswith("- ") and block.startswith("- ") else "\n\n", block]
    return "".join(parts)


_FILE_LIKE = re.compile(r"\.(docx?|pdf|indd|tex|dvi|rtf|odt|html?|txt|xlsx?|pptx?|qxd|pmd)$", re.I)
_NO_TITLES = {"untitled", "document", "dokument", "title", "word document", "powerpoint presentation", "none", "null"}


def sensible_title(raw: object) -> str:
    """`raw` as a title on one line, or "" where it is one that a program made up ("Microsoft Word - x.doc")."""
    if not isinstance(raw, str):
        return ""
    title = " ".join(normalise(raw).split())
    is_made_up = title.lower().startswith("microsoft word - ") or title.lower() in _NO_TITLES
    is_title = 2 <= len(title) <= 200 and any(c.isalpha() for c in title)
    return "" if is_made_up or not is_title or _FILE_LIKE.search(title) else title


def readable_stem(file_name: str | None) -> str:
    """ "user_guide-v2.pdf" -> "user guide v2"; a hyphen before a digit stays, since it names models ("D-27")."""
    stem = PurePath(file_name or "").stem
    return " ".join(re.sub(r"_|-(?!\d)", " ", normalise(stem)).split())


def bare_name(file_name: str | None) -> str | None:
    """The name without its folders, whichever system wrote it, and without characters that do not print."""
    if not file_name:
        return None
    name = re.split(r"[/\\]", file_name)[-1]
    return "".join(c for c in name if c.isprintable())[:255] or None


def brief(error: Exception) -> str:
    """The message of a parser's error on one line, of at most 120 characters."""
    return " ".join(str(error).split())[:120] or type(error).__name__
