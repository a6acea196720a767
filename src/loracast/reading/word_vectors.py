"""Where in a document the answer to a question stands, by the meaning of words, beside BM25.

Each common word stem has two vectors, one as a word of questions and one as a word of texts, so that "How long ...
water pass my lips?" finds "You must not eat in the 10 hours before". For each place of a text, the best match of each
word of the question counts, the less the further away it is (late interaction: Khattab and Zaharia, ColBERT, arXiv
2004.12832, without context), and whether the word there and those beside it are of the kind that is asked for: 10 is,
of "how long". A sentence matches as its places do together.

`loracast train words` makes the vectors, word_vectors.safetensors (lab/training/word_vectors.py); reading and matching
take numpy alone. Words are stems and kinds (a number, a day, a name); in a sentence each has a position, in which
commas, tabs and "and" are steps of their own, so that what they part stands further apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize
from weakref import WeakKeyDictionary

from loracast.library.index import Index, OpenIndex, SentencePlace, open_index, read_chunks, read_sentences
from loracast.text import stem_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loracast.documents import Chunk


_WORD = re.compile(r"[£$€]?\d(?:[\d,.:]*\d)?|[^\W\d_]+(?:['’][^\W\d_]+)?|%")
_PART = re.compile(rf"({_WORD.pattern})|[,;:()|=\t\n–—]|\s-\s")
_PARTING = frozenset(["and", "but", "or", "whereas", "while"])
_STEPS_OF_A_MARK = 2
_TIME = re.compile(r"\d{1,2}[:.]\d\d")
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_CURRENCIES = "£$€"
_ASKING = frozenset(["at", "by", "for", "from", "how", "in", "of", "on", "to", "until", "what", "which"])
"""Words that make one word with the next one: "how long", "what time"."""
_DAY = re.compile(r"(?:mon|tues|wednes|thurs|fri|satur|sun)day", re.IGNORECASE)
_MONTH = re.compile(
    r"january|february|march|april|may|june|july|august|september|october|november|december", re.IGNORECASE
)
MOST_NAMES = 2
"""What one word of a text is called at most: its kind and its stem, or two kinds."""


class PlacedWord(NamedTuple):
    """A word of a sentence."""

    position: int
    names: tuple[str, ...]
    """Its kinds and its stem, as the word vectors know it; none for a word without either."""
    start: int
    """Its first character in the sentence in normal form (NFC)."""
    end: int


def words_of_sentence(text: str) -> list[PlacedWord]:
    """The words of a sentence with their positions."""
    position, words = 0, list[tuple[int, re.Match[str]]]()
    for part in _PART.finditer(normalize("NFC", text)):
        if part[1] is None:
            position += _STEPS_OF_A_MARK
        else:
            words.append((position, part))
            position += 2 if part[1].lower() in _PARTING else 1
    named = _names([part[1] for _, part in words])
    return [PlacedWord(at, names, *part.span()) for (at, part), names in zip(words, named, strict=True)]


def words_of_question(text: str) -> list[str]:
    """The stems of a question, what its numbers and names are, and pairs such as "how long"."""
    words = _WORD.findall(normalize("NFC", text))
    pairs = pairwise(word.lower() for word in words)
    names = [name for names in _names(words) for name in names]
    return names + [f"{one}_{other}" for one, other in pairs if one in _ASKING]


def _names(words: Sequence[str]) -> list[tuple[str, ...]]:
    stems = stem_words([word.lower() for word in words])
    return [_named(word, stem, i == 0) for i, (word, stem) in enumerate(zip(words, stems, strict=True))]


def _named(word: str, stem: str, is_first: bool) -> tuple[str, ...]:
    if word[0] in _CURRENCIES:
        return ("<money>",)
    if word[0].isdigit():
        kind = "<time>" if _TIME.fullmatch(word) else "<year>" if _YEAR.fullmatch(word) else ""
        return (kind, "<number>") if kind else ("<number>",)
    kinds = {
        "<day>": _DAY.fullmatch(word),
        "<month>": _MONTH.fullmatch(word),
        "<name>": not is_first and word[0].isupper(),
    }
    return (*[kind for kind, fits in kinds.items() if fits][:1], *[stem] * bool(stem))


WORST = -5.0
"""What a word of the question gets in a sentence without words that have vectors."""
APART = 40.0
"""What a match would lose from one sentence to the next, so that none reaches it."""
GAP = 3
"""Positions between two sentences, whose words do not stand beside each other."""
_NO_WORD = PlacedWord(0, (), 0, 0)


@dataclass(frozen=True, eq=False)
class ReadText:
    """The words of some sentences, as numbers of a table of vectors."""

    vocabulary: NDArray[Any]
    """The words that occur, each once [u]."""
    names: NDArray[Any]
    """The places in `vocabulary` of what each word of the text is called [t, 2]."""
    positions: NDArray[Any]
    """Of each word in the text [t]."""
    sentences: NDArray[Any]
    """The sentence of each word [t]."""
    starts: NDArray[Any]
    """The first word of each sentence [n]; each has one at least."""
    characters: NDArray[Any]
    """The first character of each word in its sentence in normal form (NFC) [t]."""
    kinds: NDArray[Any]
    """What kind of answer begins at each word [t, 2 k]."""


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """How likely the answer to a question stands where: logits, but for a constant."""

    words: NDArray[Any]
    """It begins at each word [t]."""
    sentences: NDArray[Any]
    """It begins in each sentence [n]."""
    nowhere: float
    """The text does not answer the question."""


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Vectors of word stems; number 0 stands for all others, which match nothing and are of no kind."""

    numbers: Mapping[str, int]
    asked: NDArray[Any]
    """As words of questions [v, d]."""
    said: NDArray[Any]
    """As words of texts [v, d]."""
    weights: NDArray[Any]
    """How much each counts in a question [v]."""
    least: NDArray[Any]
    """How well each must match at least, where the answer stands [v]."""
    wanted: NDArray[Any]
    """What kind of answer each word of a question asks for [v, 2 k], by the answer's first word and by those beside."""
    kinds: Mapping[str, NDArray[Any]]
    """What kind of answer begins at each word ("own"), behind it ("before") and before it ("behind") [v, k]."""
    fade: float
    """What a match loses with each position."""
    bm25: float
    """What the best sentence by BM25 gets beside."""

    def read(self, sentences: Sequence[str]) -> ReadText:
        """Look up the words of some sentences."""
        import numpy as np

        of_each = [words_of_sentence(text) or [_NO_WORD] for text in sentences]
        words = [word for some in of_each for word in some]
        numbers = np.zeros((len(words), MOST_NAMES), dtype=np.int32)
        for i, word in enumerate(words):
            for j, name in enumerate(word.names):
                numbers[i, j] = self.numbers.get(name, 0)
        starts = np.cumsum([0, *map(len, of_each[:-1])])
        owners = np.repeat(np.arange(len(of_each)), [*map(len, of_each)])
        firsts = np.cumsum([0, *(some[-1].position + GAP for some in of_each[:-1])])
        positions = firsts[owners] + [word.position for word in words]
        vocabulary, names = np.unique(numbers, return_inverse=True)
        characters = np.array([word.start for word in words])
        names = names.reshape(numbers.shape).astype(np.int32)
        return ReadText(vocabulary, names, positions, owners, starts, characters, self._kinds(numbers, positions))

    def _kinds(self, numbers: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
        """What kind of answer begins at each word [t, 2 k], by itself and by the two positions on either side."""
        import numpy as np

        n = int(positions[-1]) + 1
        at = {side: table[numbers].sum(1) for side, table in self.kinds.items()}  # [t, k]
        beside = np.zeros((n + 4, at["own"].shape[1]), dtype=np.float32)  # two positions more at either end
        for distance, share in ((1, 1.0), (2, 0.5)):
            beside[positions + 2 - distance] += share * at["behind"]
            beside[positions + 2 + distance] += share * at["before"]
        return np.concatenate([at["own"], beside[positions + 2]], axis=1)

    def places(self, question: str, text: ReadText) -> Likelihoods | None:
        """How likely the answer begins at each word of a text, and in no place; None where no word asked is known."""
        import numpy as np

        asked = [self.numbers[word] for word in words_of_question(question) if word in self.numbers]
        if not asked:
            return None
        alike = self.asked[asked] @ self.said[text.vocabulary].T  # [words asked, u]
        alike[:, text.vocabulary == 0] = WORST
        best = np.maximum(alike[:, text.names].max(2), WORST)  # [words asked, t]
        lost = self.fade * text.positions + APART * text.sentences
        before = np.maximum.accumulate(best + lost, axis=1) - lost
        behind = np.maximum.accumulate((best - lost)[:, ::-1], axis=1)[:, ::-1] + lost
        matched = self.weights[asked] @ np.maximum(before, behind)
        of_words = matched + text.kinds @ self.wanted[asked].sum(0)
        of_sentences = np.logaddexp.reduceat(of_words, text.starts)
        return Likelihoods(of_words, of_sentences, float(self.weights[asked] @ self.least[asked]))


@cache
def shipped_vectors() -> WordVectors:
    """The vectors of reading/word_vectors.safetensors."""
    with as_file(files("loracast.reading") / "word_vectors.safetensors") as path:
        return load_vectors(path)


def load_vectors(path: Any) -> WordVectors:
    """Read vectors that `lab/training/word_vectors.py` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as stored:
        words = json.loads(stored.metadata()["words"])
        tables = {
            name: stored.get_tensor(name) * stored.get_tensor(f"{name}.scale")
            for name in ("asked", "said", "wanted", "own", "before", "behind")
        }
        of_words = {name: stored.get_tensor(name) for name in ("weights", "least")}
        scalars = dict(zip(("fade", "bm25"), stored.get_tensor("scalars").tolist(), strict=True))
    kinds = {side: tables.pop(side) for side in ("own", "before", "behind")}
    return WordVectors({word: i for i, word in enumerate(words) if i}, kinds=kinds, **tables, **of_words, **scalars)


@dataclass(frozen=True, eq=False)
class ReadIndex:
    """The text of a document, the words of its sentences, and the sentences of each chunk."""

    text: ReadText
    chunks: Sequence[Chunk]
    places: Sequence[SentencePlace]
    """Where the sentences stand."""
    spans: Mapping[int, tuple[int, int]]
    """By chunk, its first sentence and the one behind its last."""

    def sentences(self, chunk: int) -> list[str]:
        """The sentences of a chunk."""
        prompt = self.chunks[chunk].prompt
        return [prompt[start:end] for _, start, end in self.places[slice(*self.spans[chunk])]]


_READ: WeakKeyDictionary[OpenIndex, ReadIndex] = WeakKeyDictionary()


def read_index(index: Index) -> ReadIndex | None:
    """Read an index and look up its words, kept as long as it is open; None where it has no sentences."""
    if isinstance(index, OpenIndex) and (kept := _READ.get(index)) is not None:
        return kept
    with open_index(index) as database:
        places = read_sentences(database)
        if not places:
            return None
        chunks = read_chunks(database)
    spans: dict[int, tuple[int, int]] = {}
    for i, place in enumerate(places):
        spans[place.chunk] = (spans.get(place.chunk, (i, i))[0], i + 1)
    prompts = [chunk.prompt for chunk in chunks]
    text = shipped_vectors().read([prompts[chunk][start:end] for chunk, start, end in places])
    read = ReadIndex(text, chunks, places, spans)
    if isinstance(index, OpenIndex):
        _READ[index] = read
    return read
