"""How well the sentences of a document match a question by the meaning of their words, beside BM25.

Each common word stem has two vectors, one as a word of questions and one as a word of sentences, so that "How long ...
water pass my lips?" finds "You must not eat in the 10 hours before". Of each word of a question the best match in a
sentence counts, and the matches add up (late interaction: Khattab and Zaharia, ColBERT, arXiv 2004.12832, without
context). Numbers, times, prices and names count as what they are, too. `loracast train words` makes the vectors
(training/word_vectors.py), data/content/word_vectors.safetensors; reading and matching take numpy alone.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unicodedata import normalize
from weakref import WeakKeyDictionary

from loracast.library.index import Index, IndexInMemory, OpenIndex, open_index, read_chunks, read_sentences
from loracast.library.relevance import stem_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORD = re.compile(r"[£$€]?\d(?:[\d,.:]*\d)?|[^\W\d_]+(?:['’][^\W\d_]+)?|%")
_TIME = re.compile(r"\d{1,2}[:.]\d\d")
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_CURRENCIES = "£$€"
_ASKING = frozenset(["at", "by", "for", "from", "how", "in", "of", "on", "to", "until", "what", "which"])
"""Words that make one word with the next one: "how long", "what time"."""
_DAY = re.compile(r"(?:mon|tues|wednes|thurs|fri|satur|sun)day", re.IGNORECASE)
_MONTH = re.compile(
    r"january|february|march|april|may|june|july|august|september|october|november|december", re.IGNORECASE
)
WORST = -5.0
"""What a word of the question gets in a sentence without words that have vectors."""


def words_of_sentence(text: str) -> list[str]:
    """The stems of a sentence, and what its numbers and names are."""
    words = _words(text)
    return [*words, "<?>"] if text.rstrip().endswith("?") else words


def words_of_question(text: str) -> list[str]:
    """The stems of a question, what its numbers and names are, and pairs such as "how long"."""
    low = [word.lower() for word in _WORD.findall(normalize("NFC", text))]
    pairs = pairwise(low)
    return _words(text) + [f"{one}_{other}" for one, other in pairs if one in _ASKING]


def _words(text: str) -> list[str]:
    found = _WORD.findall(normalize("NFC", text))
    words = list[str]()
    for i, (word, stem) in enumerate(zip(found, stem_words([word.lower() for word in found]), strict=True)):
        if word[0] in _CURRENCIES:
            words.append("<money>")
        elif word[0].isdigit():
            words += ["<time>"] * bool(_TIME.fullmatch(word)) + ["<year>"] * bool(_YEAR.fullmatch(word)) + ["<number>"]
        else:
            kinds = {
                "<day>": _DAY.fullmatch(word),
                "<month>": _MONTH.fullmatch(word),
                "<name>": i and word[0].isupper(),
            }
            words += [*[kind for kind, fits in kinds.items() if fits][:1], *[stem] * bool(stem)]
    return words


@dataclass(frozen=True, eq=False)
class ReadSentences:
    """The words of a document's sentences, as numbers of a table of vectors."""

    known: NDArray[Any]
    """The words that occur, each once [u]."""
    words: NDArray[Any]
    """The place in `known` of each word of the text [t]."""
    starts: NDArray[Any]
    """The first word of each sentence [n]; each has one at least."""


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Vectors of word stems; number 0 stands for all others, which match nothing."""

    numbers: Mapping[str, int]
    asked: NDArray[Any]
    """As words of questions [v, d]."""
    said: NDArray[Any]
    """As words of sentences [v, d]."""
    weights: NDArray[Any]
    """How much each counts in a question [v]."""
    bm25: float
    """What the best sentence by BM25 gets beside their sum."""

    def read(self, sentences: Sequence[str]) -> ReadSentences:
        """Look up the words of some sentences."""
        import numpy as np

        of_each = [[self.numbers.get(word, 0) for word in words_of_sentence(text)] or [0] for text in sentences]
        known, words = np.unique(np.array([n for some in of_each for n in some], dtype=np.int32), return_inverse=True)
        starts = np.cumsum([0, *map(len, of_each[:-1])])
        return ReadSentences(known, words.astype(np.int32), starts)

    def match(self, question: str, sentences: ReadSentences) -> NDArray[Any]:
        """How well each sentence matches a question [n]: a logit, but for a constant."""
        import numpy as np

        asked = [self.numbers[word] for word in words_of_question(question) if word in self.numbers]
        if not asked:
            return np.zeros(len(sentences.starts), dtype=np.float32)
        alike = self.asked[asked] @ self.said[sentences.known].T  # [words asked, u]
        alike[:, sentences.known == 0] = WORST
        best = np.maximum.reduceat(alike[:, sentences.words], sentences.starts, axis=1)  # [words asked, n]
        return np.asarray(self.weights[asked] @ np.maximum(best, WORST))


@cache
def shipped_vectors() -> WordVectors:
    """The vectors of data/content/word_vectors.safetensors."""
    with as_file(files("loracast.data") / "content" / "word_vectors.safetensors") as path:
        return load_vectors(path)


def load_vectors(path: Any) -> WordVectors:
    """Read vectors that `training/word_vectors.py` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as stored:
        words = json.loads(stored.metadata()["words"])
        asked, said = (stored.get_tensor(name) * stored.get_tensor(f"{name}.scale") for name in ("asked", "said"))
        weights, bm25 = stored.get_tensor("weights"), float(stored.get_tensor("bm25")[0])
    return WordVectors({word: i for i, word in enumerate(words) if i}, asked, said, weights, bm25)


@dataclass(frozen=True, eq=False)
class ReadIndex:
    """The words of a document's sentences, and the sentences of each chunk."""

    words: ReadSentences
    chunks: Mapping[int, tuple[int, int]]
    """By chunk, its first sentence and the one behind its last."""


_READ: WeakKeyDictionary[OpenIndex | IndexInMemory, ReadIndex] = WeakKeyDictionary()
_READING = threading.Lock()


def read_index(index: Index) -> ReadIndex | None:
    """Look up the words of all sentences of an index, kept as long as it is open; None where it has no sentences."""
    if isinstance(index, OpenIndex | IndexInMemory) and (kept := _READ.get(index)) is not None:
        return kept
    with open_index(index) as database:
        places = read_sentences(database)
        if not places:
            return None
        prompts = [chunk.prompt for chunk in read_chunks(database)]
        chunks: dict[int, tuple[int, int]] = {}
        for i, place in enumerate(places):
            chunks[place.chunk] = (chunks.get(place.chunk, (i, i))[0], i + 1)
        words = shipped_vectors().read([prompts[place.chunk][place.start : place.end] for place in places])
    read = ReadIndex(words, chunks)
    if isinstance(index, OpenIndex | IndexInMemory):
        with _READING:
            _READ[index] = read
    return read
