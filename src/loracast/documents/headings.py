"""Finds the headings of a markdown text: `# ` lines and underlined ones, but not the comments inside code fences."""

from __future__ import annotations

import re
from typing import NamedTuple

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")  # "```x```" is code within a line
_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)")
_UNDERLINE = re.compile(r" {0,3}(=+|-{3,})")
_BLOCK_START = re.compile(r"\s|[-*+>|#]|\d+[.)] |$")  # lines that an underline does not turn into a heading


class Heading(NamedTuple):
    start: int  # offset of its line
    end: int  # offset after its last line, before the newline
    level: int  # 1..6
    title: str  # without marks


def find_headings(text: str) -> list[Heading]:
    """Every heading in order. A text without markdown gives an empty list."""
    headings: list[Heading] = []
    fence = ""
    previous, previous_start, is_first = "", 0, True  # is_first: the line before it is blank, so it opens a paragraph
    offset = 0
    for line in text.split("\n"):
        if len(line) > 1000:  # no heading; spares the patterns a line of megabytes
            previous, offset = " ", offset + len(line) + 1
            continue
        was_code, fence = bool(fence), fence_after(line, fence)
        if was_code or fence:
            previous = ""
        elif atx := _ATX.fullmatch(line):
            title = re.sub(r"(^|[ \t])#+$", "", atx[2].rstrip()).strip(" \t*_")
            if title:
                headings.append(Heading(offset, offset + len(line), len(atx[1]), title))
            previous = ""
        elif is_first and (under := _UNDERLINE.fullmatch(line.rstrip())) and not _BLOCK_START.match(previous):
            level = 1 if under[1][0] == "=" else 2
            headings.append(Heading(previous_start, offset + len(line), level, previous.strip(" \t*_")))
            previous = ""
        else:
            is_first = not previous
            previous, previous_start = line, offset
        offset += len(line) + 1
    return headings


def fence_after(line: str, fence: str) -> str:
    """The marks that began the block of code that goes on below a line, "" outside of code; `fence` those above it."""
    mark = _FENCE.match(line)
    if not fence:
        return mark[1] if mark else ""
    return "" if mark and mark[1].startswith(fence) and line.strip() == mark[1] else fence


_FRONT_MATTER_TITLE = re.compile(r"^title:[ \t]*(.+)$", re.M)


def markdown_title(text: str) -> str:
    """The title of the front matter, else the first heading, else ""."""
    end = text.find("\n---", 4) if text.startswith("---\n") else -1
    if end > 0 and (found := _FRONT_MATTER_TITLE.search(text, 4, end)):
        return found[1].strip().strip("\"'")
    return next((heading.title for heading in find_headings(text)), "")
