"""Questions about a document as a whole, which routing fails at ("What is it about?"), answered from its outline.

Their words stand nowhere in the document, and no few chunks hold the answer. English wordings are recognised by rule,
and only where the whole question is one: "What does this document say about refunds?" is for the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.reading.outline import Outline, read_outline
from loracast.reading.wide_route import Source, patterns_in

Wanted = Literal["about", "sections", "title"]
"""What a question wants to know of a document: what it is about, which sections it has, or its title."""

_THINGS = "documents?|text|file|pdf|manual|handbook|guide|article|paper|page|passage|excerpt|report|contract"
# "The book" may be one that the document speaks of, but "this book" is the document.
_ONLY_THIS = "book|booklet|brochure|story|letter|e-?mail|note|leaflet|website|essay|novel|recipe|policy"
_DOCUMENT = (
    rf"(?:(?:the|this|that|my|our|your)(?: whole| entire| given| attached)? (?:{_THINGS})|this (?:{_ONLY_THIS}))"
)
_IT = rf"(?:it|this|{_DOCUMENT})"
_IS = "(?:is|are|'s|s)"
_SECTIONS = "(?:sections?|chapters?|headings?|section headings|table of contents|outline)"
_PARTS = "(?:parts|contents|structure)"  # a product has them too
_TOPIC = "(?:main |central |general )?(?:topics?|subjects?|themes?|ideas?|points?|gist|purpose|content)"
_SHORT = "(?:short |brief |quick |concise )?"
_LIST = "(?:list|show|give|name|what (?:is|are)|what's|which are)(?: me)?(?: all)?(?: of)?"
_ABOUT = "(?:mainly |mostly |basically |all )?about"

_WORDINGS: dict[Wanted, tuple[str, ...]] = {
    "about": (
        rf"what ?{_IS} (?:{_DOCUMENT}|this) {_ABOUT}",
        rf"what (?:{_DOCUMENT}|this) is {_ABOUT}",
        rf"what {_DOCUMENT} (?:covers|contains|deals with)",
        rf"what this (?:{_THINGS}|{_ONLY_THIS}) is for",
        rf"(?:what|which topics|what topics|which subjects|what subjects) (?:does|do|would|can) (?:{_DOCUMENT}|i) "
        rf"(?:cover|contain|deal with|treat|discuss|talk about|speak (?:of|about)|find in {_DOCUMENT})",
        rf"(?:what|which) topics are (?:covered|discussed|treated) (?:in|by) {_DOCUMENT}",
        rf"what ?{_IS} this (?:{_THINGS}|{_ONLY_THIS}) for",
        rf"what(?: kind of {_THINGS})? ?{_IS} this (?:{_THINGS}|{_ONLY_THIS})",
        rf"what(?: ?{_IS}) (?:in|inside) {_DOCUMENT}",
        rf"(?:what ?{_IS} )?the {_TOPIC} of {_DOCUMENT}",
        rf"(?:(?:give|write|make)(?: me)? )?(?:an? |the ){_SHORT}(?:summary|overview|abstract|gist|description) of "
        rf"{_DOCUMENT}",
        rf"(?:briefly )?(?:summari[sz]e|sum up|describe) {_DOCUMENT}",
        r"tl;?dr",
    ),
    "sections": (
        rf"{_LIST} (?:the |its )?{_SECTIONS}(?: of (?:it|{_DOCUMENT}))?",
        rf"(?:what|which|how many) {_SECTIONS} (?:does|do) {_IT} have",
        rf"(?:what|which|how many) {_SECTIONS} are there(?: in {_IT})?",
        rf"(?:what|which) {_SECTIONS} are in {_IT}",
        rf"{_LIST} (?:the )?{_PARTS} of {_DOCUMENT}",
        rf"(?:what|which|how many) {_PARTS} (?:(?:does|do) {_DOCUMENT} have|are there in {_DOCUMENT})",
        rf"(?:what|which) {_PARTS} are in {_DOCUMENT}",
        rf"how ?{_IS} {_DOCUMENT} (?:structured|organi[sz]ed|divided)",
    ),
    "title": (
        rf"(?:what ?{_IS} )?(?:the (?:title|name) of {_DOCUMENT}|{_DOCUMENT}'s (?:title|name)|its title)",
        rf"what ?{_IS} {_DOCUMENT} called",
    ),
}
_RULES = {wanted: re.compile("|".join(f"(?:{one})" for one in wordings)) for wanted, wordings in _WORDINGS.items()}
_LEAD = re.compile(
    r"^(?:(?:hi|hello|hey|please|ok|okay|so|and|now|well|in a nutshell|in short|(?:can|could|would|will) you|kindly|"
    r"i(?: would|'d) like(?: to)?|i (?:want|need)(?: to)?|do you know|know|see|have|get|tell me|let me know)(?:,? |$))+"
)
_TRAIL = re.compile(
    r"(?:,? (?:please|for me|briefly|in short|in (?:a|one|two|three|a few|\d+) (?:words?|sentences?|lines?)))+$"
)
_MAX_CHARACTERS = 300
"""A longer question is about more than the document as a whole; `_TRAIL` takes time quadratic in its length."""


@dataclass(frozen=True)
class Overview:
    """An answer from outlines, and the documents whose outlines they are."""

    text: str
    sources: tuple[Source, ...]


def wanted_of(question: str) -> Wanted | None:
    """What a question wants to know of a document as a whole; None for any other question."""
    text = " ".join(question.lower().replace("’", "'").split()).rstrip(" ?!.")
    if len(text) > _MAX_CHARACTERS:
        return None
    text = _TRAIL.sub("", _LEAD.sub("", text))
    return next((wanted for wanted, rule in _RULES.items() if rule.fullmatch(text)), None)


def overview(question: str, chosen: Sequence[Adapter | str], open_named: Callable[[str], Adapter]) -> Overview | None:
    """The answer to a question about documents as a whole, from their outlines; None for any other question.

    Args:
        chosen: adapters, their names, or patterns of names. Only documents have outlines, and a pattern names none.
        open_named: opens a name.
    """
    wanted = wanted_of(question)
    if wanted is None:
        return None
    patterns = patterns_in(chosen)
    named = [open_named(one) if isinstance(one, str) else one for one in chosen if one not in patterns]
    documents = [one for one in named if one.manifest.kind == "document" and not one.manifest.is_memory]
    if not documents:
        return None
    outlines = [(one, read_outline(one.index)) for one in documents]
    text = "\n\n".join(_text_of(one, outline, wanted) for one, outline in outlines)
    return Overview(text, tuple(_whole(one) for one, outline in outlines if outline is not None))


def _whole(adapter: Adapter) -> Source:
    end = read_chunks(adapter.index)[-1].end
    manifest = adapter.manifest
    return Source(adapter.name, manifest.title, "", chunk=None, start=0, end=end, weight=1.0, version=manifest.version)


def _text_of(adapter: Adapter, outline: Outline | None, wanted: Wanted) -> str:
    name, title = adapter.name, adapter.manifest.title
    if outline is None:
        return (
            f"{name} keeps no outline, since an older version of loracast learned it: `loracast rm {name}`, and learn "
            "it again."
        )
    lines = [title] if title else []
    sections = outline.top_headings()
    if wanted != "title":
        n_left = len(outline.headings) - len(sections)
        more = f" (and {n_left} more)" * (n_left > 0)
        lines.append(f"Sections: {'; '.join(sections)}{more}." if sections else "It has no headings.")
    if wanted == "about" and outline.summary:
        lines.append(f"In its own words: {' '.join(text for _, text in outline.summary)}")
    what = {"about": "title, headings and most central sentences", "sections": "headings", "title": "title"}[wanted]
    return "\n".join([*lines, f"(The {what} of {name}, stored when it was learned; no model was asked.)"])
