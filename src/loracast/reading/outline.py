"""Outline of a document: its headings and the sentences that say best what it is about, kept in its index.

A sentence is a TF-IDF vector over word stems, in which a stem weighs by how few of the sentences have it. The summary
holds the sentences nearest to the centroid of all of them (Radev et al., Centroid-based summarization of multiple
documents, 2004), each less what it repeats of those picked before (maximal marginal relevance: Carbonell and Goldstein,
1998). No model is needed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loracast.documents.units import find_headings
from loracast.library.adapter import Adapter
from loracast.library.index import Index, changing_index, open_index, read_chunks, read_sentences, write_index
from loracast.reading.routing import Source, patterns_in
from loracast.text import stem_words

if TYPE_CHECKING:
    from loracast.documents import Chunk

SUMMARY_SENTENCES = 3
MAX_HEADINGS = 40
_REPETITION = 0.5
"""What a sentence loses by its cosine with one that is picked, beside what it gains by that with the centroid."""
_MIN_WORDS, _MAX_WORDS = 6, 40
"""Words of a sentence of the summary: fewer say nothing alone, more are no summary."""
_PROSE = re.compile(r"[^\W_a-z].*[.!?][\"'”’)]*", re.S)
"""A sentence from its capital or number to its full stop: no item of a list, no row of a table."""
_WORD = re.compile(r"[^\W_]+")
Vector = Mapping[str, float]


@dataclass(frozen=True)
class Outline:
    """What a document is about, in its own words."""

    headings: tuple[tuple[int, str], ...]
    """Level (1 is the highest) and title of each, in order, without those that repeat the document's title."""
    summary: tuple[tuple[int, str], ...]
    """Chunk and text of each sentence, in the document's order."""

    def top_headings(self, most: int = MAX_HEADINGS) -> list[str]:
        """The titles of the headings, of as many levels from the top as hold at most so many; never more than that."""
        for lowest in sorted({level for level, _ in self.headings}, reverse=True):
            kept = [title for level, title in self.headings if level <= lowest]
            if len(kept) <= most:
                return kept
        return kept[:most] if self.headings else []


def write_document_index(index: Index, chunks: Sequence[Chunk], title: str) -> None:
    """Store what an adapter keeps of a document's text: its chunks, its sentences and its outline.

    Args:
        title: of the document; headings that repeat it are left out.
    """
    write_index(index, chunks)
    headings = [
        (heading.level, heading.title)
        for heading in find_headings("\n\n".join(chunk.text for chunk in chunks))
        if heading.title.casefold() != title.casefold()
    ]
    texts = {}
    for number, (i, start, end) in enumerate(read_sentences(index)):
        prompt = chunks[i].prompt
        is_in_heading, sentence = start < len(prompt) - len(chunks[i].text), prompt[start:end]
        n_words = len(_WORD.findall(sentence))
        if not is_in_heading and _PROSE.fullmatch(sentence) and _MIN_WORDS <= n_words <= _MAX_WORDS:
            texts[number] = sentence
    numbers = list(texts)
    with changing_index(index) as database:
        database.execute("CREATE TABLE headings (number INTEGER PRIMARY KEY, level INTEGER, title TEXT)")
        database.executemany("INSERT INTO headings (level, title) VALUES (?, ?)", headings)
        database.execute("CREATE TABLE summary (sentence INTEGER PRIMARY KEY)")
        picked = central(list(texts.values()), SUMMARY_SENTENCES)
        database.executemany("INSERT INTO summary VALUES (?)", [(numbers[i],) for i in picked])


def read_outline(index: Index) -> Outline | None:
    """The outline in an index; None in one that an older version wrote."""
    with open_index(index) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'summary'").fetchone():
            return None
        headings = database.execute("SELECT level, title FROM headings ORDER BY number").fetchall()
        places = database.execute(
            "SELECT chunk, start, stop FROM summary JOIN sentence_places USING (sentence) ORDER BY sentence"
        ).fetchall()
        chunks = read_chunks(database, [chunk for chunk, _, _ in places])
    summary = (
        (i, " ".join(chunk.prompt[start:end].split())) for chunk, (i, start, end) in zip(chunks, places, strict=True)
    )
    return Outline(tuple(headings), tuple(summary))


def central(sentences: Sequence[str], n: int) -> list[int]:
    """The numbers of the n sentences nearest to the centre of all that do not repeat each other, in order.

    A sentence that occurs several times, such as a page's footer, counts once.
    """
    distinct = list(dict.fromkeys(sentences))
    vectors = _tf_idf(distinct)
    total: Counter[str] = Counter()
    for vector in vectors:
        total.update(vector)
    centroid = _unit(total)
    gains = [_dot(vector, centroid) for vector in vectors]
    likeness = [0.0] * len(vectors)  # to the picked sentence that is most like it
    picked: list[int] = []
    for _ in range(min(n, len(vectors))):
        rest = [i for i in range(len(vectors)) if i not in picked]
        picked.append(max(rest, key=lambda i: gains[i] - _REPETITION * likeness[i]))
        likeness = [max(old, _dot(vector, vectors[picked[-1]])) for old, vector in zip(likeness, vectors, strict=True)]
    return sorted(sentences.index(distinct[i]) for i in picked)


def _tf_idf(sentences: Sequence[str]) -> list[Vector]:
    """A vector of length 1 for each sentence, by word stem; an empty one where all others have its words."""
    words = [[word.lower() for word in _WORD.findall(sentence)] for sentence in sentences]
    distinct = list(dict.fromkeys(word for of_sentence in words for word in of_sentence))
    stems = dict(zip(distinct, stem_words(distinct), strict=True))
    counts = [Counter(stems[word] for word in of_sentence) for of_sentence in words]
    n_with = Counter(stem for one in counts for stem in one)
    return [_unit({stem: n * math.log(len(words) / n_with[stem]) for stem, n in one.items()}) for one in counts]


def _unit(vector: Vector) -> Vector:
    length = math.sqrt(sum(value * value for value in vector.values()))
    return {key: value / length for key, value in vector.items() if value}


def _dot(one: Vector, other: Vector) -> float:
    return sum(value * other.get(key, 0.0) for key, value in one.items())


# ---- questions about a document as a whole

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
    texts, sources = [], []
    for adapter in documents:
        outline, manifest = read_outline(adapter.index), adapter.manifest
        texts.append(_text_of(adapter, outline, wanted))
        if outline is not None:
            end = read_chunks(adapter.index)[-1].end
            sources.append(Source(adapter.name, manifest.title, "", None, 0, end, 1.0, manifest.version))
    return Overview("\n\n".join(texts), tuple(sources))


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
