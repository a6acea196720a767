"""Text to chunks: they cover the text, fit the limit, end where a reader would pause, and take linear time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracast.documents import Chunk, split_text
from loracast.documents.units import ends_sentence

Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


def stub(pattern: str) -> Encode:
    """A tokenizer whose tokens are the matches of `pattern`."""
    compiled = re.compile(pattern, re.S)

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        offsets = [match.span() for match in compiled.finditer(text)]
        return list(range(len(offsets))), offsets

    return encode


words = stub(r"\S+")  # a word of any length is one token
spaced = stub(r" ?[^\W\d_]{1,4}| ?\d| ?[^\w\s]|\s|_")  # like a byte-pair tokenizer: the space belongs to the next word
characters = stub(r".")


def moody(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """As `words`, but three tokens more for the first word of a string: a worse seam than any real tokenizer's."""
    ids, offsets = words(text)
    return list(range(len(ids) + 3)), offsets[:1] * 4 + offsets[1:] if offsets else [(0, 0)] * 3


def check(chunks: list[Chunk], text: str, encode: Encode, max_tokens: int) -> None:
    """What holds for any text and any tokenizer."""
    position = 0
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text == chunk.text.strip() != ""
        assert not text[position : chunk.start].strip(), "lost text, overlap or disorder"
        assert chunk.n_tokens == len(encode(chunk.prompt)[0]) <= max_tokens
        assert "\n" not in chunk.heading
        position = chunk.end
    assert not text[position:].strip(), "lost the end"


def sentences(n: int, n_words: int = 9) -> str:
    return " ".join(f"S{i} " + "word " * (n_words - 2) + "end." for i in range(n))


# --- properties ---

texts = st.one_of(
    st.text(max_size=400),
    st.text(alphabet="ab. \n#-_\t", max_size=600),
    st.text(alphabet="汉字。é\u0301👨\u200d \n", max_size=300),
    st.lists(
        st.sampled_from(["Word", "e.g.", "end.", "\n\n", "\n", "# Head\n\n", "- item", "x" * 90, "3.5"]), max_size=300
    ).map(" ".join),
)


@settings(max_examples=150, deadline=None)
@given(
    texts,
    st.sampled_from([words, spaced, characters, moody]),
    st.integers(16, 90),
    st.sampled_from(["", "A Title, or Two"]),
)
def test_chunks_cover_any_text_within_the_limit(text: str, encode: Encode, max_tokens: int, title: str) -> None:
    check(split_text(text, encode, max_tokens=max_tokens, title=title), text, encode, max_tokens)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(16, 80))
def test_words_are_whole_and_sizes_even(n_words: int, max_tokens: int) -> None:
    text = " ".join(f"w{i}" for i in range(n_words))
    chunks = split_text(text, words, max_tokens=max_tokens)
    check(chunks, text, words, max_tokens)
    assert [word for chunk in chunks for word in chunk.text.split()] == text.split()
    sizes = [chunk.n_tokens for chunk in chunks]
    assert max(sizes) - min(sizes) <= max(2, max_tokens // 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_sentences_are_whole_where_they_fit(lengths: list[int]) -> None:
    text = " ".join(" ".join(["Word"] * n) + "." for n in lengths)
    chunks = split_text(text, words, max_tokens=64)
    check(chunks, text, words, 64)
    assert all(chunk.text.endswith(".") for chunk in chunks)


pieces = ["a", "B.", "cc", "Dd!", "B. a a a a a a", "c c c c. D", "e" * 600, "f" * 980, "g" * 1000, "h" * 1000 + "."]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(pieces), max_size=60))
def test_long_words_are_whole_as_long_as_they_fit(parts: list[str]) -> None:
    # The longest have 251 tokens. Seams are looked at in stretches of 16 tokens, of which a better one than the blank
    # before such a word must not be the only one kept.
    text = " ".join(parts)
    chunks = split_text(text, spaced, max_tokens=256)
    check(chunks, text, spaced, 256)
    assert [word for chunk in chunks for word in chunk.text.split()] == text.split()


# --- shapes ---


def test_nothing_becomes_no_chunk_and_a_little_becomes_one() -> None:
    assert split_text("", words) == []
    assert split_text(" \n\t ", words) == []
    assert split_text("  One.\n", words) == [Chunk("One.", 2, 6, "", 1)]


def test_three_hundred_tokens_become_two_halves() -> None:
    text = sentences(30, 10)
    sizes = [chunk.n_tokens for chunk in split_text(text, words, max_tokens=256)]
    assert sum(sizes) == 300
    assert len(sizes) == 2
    assert min(sizes) >= 140


def test_no_more_chunks_than_needed() -> None:
    text = sentences(500, 10)
    sizes = [chunk.n_tokens for chunk in split_text(text, words, max_tokens=256)]
    assert len(sizes) <= 5000 // 250 + 1
    assert max(sizes) - min(sizes) <= 20


def test_paragraphs_are_kept_whole() -> None:
    text = "\n\n".join(sentences(11) for _ in range(6))  # 99 words each
    chunks = split_text(text, words, max_tokens=256)
    assert [chunk.text for chunk in chunks] == ["\n\n".join([sentences(11)] * 2)] * 3


def test_chunks_start_at_headings_and_never_end_with_one() -> None:
    section = "## Part {}\n\n" + sentences(20)
    text = "# Book\n\n" + "\n\n".join(section.format(i) for i in range(6))
    chunks = split_text(text, words, max_tokens=256, title="Book")
    check(chunks, text, words, 256)
    assert chunks[0].text.startswith("# Book\n\n## Part 0")
    assert [chunk.text.split("\n")[0] for chunk in chunks[1:]] == [f"## Part {i}" for i in range(1, 6)]
    assert [chunk.heading for chunk in chunks] == ["Book", *(f"Book / Part {i}" for i in range(1, 6))]
    tight = split_text(text, words, max_tokens=40)
    assert all(not chunk.text.split("\n")[-1].startswith("#") for chunk in tight)


def test_a_chunk_of_the_middle_of_a_section_carries_its_heading() -> None:
    text = f"# Manual\n\n{sentences(30)}\n\n## Warranty *terms*\n\n{sentences(60)}"
    chunks = split_text(text, words, max_tokens=100, title="Manual X")
    last = chunks[-1]
    assert last.heading == "Manual X / Warranty *terms"
    assert last.prompt == last.heading + "\n" + last.text
    assert last.text.startswith("S")
    assert split_text("Plain.", words)[0].prompt == "Plain."


def test_headings_are_short() -> None:
    text = "# " + "many words of a section " * 20 + "\n\nText."
    chunk = split_text(text, words, title="some words of a title " * 20)[0]
    assert len(words(chunk.heading)[0]) <= 24
    assert chunk.heading.startswith("some words")
    assert "/ many words" in chunk.heading
    assert len(words(split_text(text, words, max_tokens=200)[0].heading)[0]) <= 24


def test_rows_and_items_are_kept_whole() -> None:
    rows = "\n".join(f"part: p{i}; note: Works. Well made; weight: {i} g" for i in range(100))
    chunks = split_text(rows, words, max_tokens=60)
    check(chunks, rows, words, 60)
    assert all(chunk.text.startswith("part: ") and chunk.text.endswith(" g") for chunk in chunks)


def test_a_wrapped_line_is_no_place_to_cut() -> None:
    lines = (
        "This sentence is wrapped by an editor at about seventy characters",
        "and goes on in the second line, where it comes to its end here. Then",
        "Xaver comes in, who is a name at the start of a line of the text",
    )
    wrapped = "\n".join(lines * 30)
    chunks = split_text(wrapped + ".", words, max_tokens=64)
    assert all(chunk.text.endswith("here.") for chunk in chunks[:-1])
    assert len(chunks) > 5


def test_a_word_is_cut_only_where_it_alone_exceeds_the_limit() -> None:
    text = f"short words here {'x' * 300} and {'y' * 1000} after them"
    chunks = split_text(text, spaced, max_tokens=100)
    check(chunks, text, spaced, 100)
    assert any("x" * 300 in chunk.text for chunk in chunks)  # 75 tokens
    ends = [chunk.text[-1] for chunk in chunks if "y" in chunk.text]
    assert ends == ["y"] * (len(ends) - 1) + ["m"]  # cut between y and y, and the rest goes with "after them"


def test_accents_and_emoji_are_not_torn() -> None:
    text = "e\u0301\u0302" * 300 + "👨\u200d👩\u200d👧" * 100
    for chunk in split_text(text, characters, max_tokens=32):
        assert chunk.text[0] in "e👨👩👧"
        assert chunk.text[0] != "\u200d" != chunk.text[-1]


def test_limits_that_cannot_hold() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        split_text("text", words, max_tokens=15)
    with pytest.raises(ValueError, match="alone has 20 tokens"):
        split_text(
            "ab",
            lambda text: (list(range(20 * len(text))), [(i // 20, i // 20 + 1) for i in range(20 * len(text))]),
            max_tokens=16,
        )


@pytest.mark.parametrize(
    ("text", "is_end"),
    [
        ("It works. | The", True),
        ("It works! | The", True),
        ("in 2023. | The", True),
        ("He paid 3. | Then", True),
        ("Mr. | Smith", False),
        ("e.g. | Bolts", False),
        ("i.e. | The", False),
        ("J. | Smith", False),
        ("It is 8 °C. | Bring", True),
        ("Yongle (r. | 1402", False),
        ("the U.S. | Army", False),
        ("No. | 5", False),
        ("He said no. | The", True),
        ("Fig. | 3", False),
        ("etc. | The", True),
        ("Yahoo! | is", False),
        ("and so on... | The", True),
        ("1. | First", False),
        ("Really?! | “Yes", True),
    ],
)
def test_sentence_ends(text: str, is_end: bool) -> None:
    before, after = text.split("| ")
    mark = re.search(r"[.!?]+ $", before)
    assert mark
    assert ends_sentence(before + after, mark.start(), mark.end() - 1) is is_end


# --- cost ---


def test_each_character_is_encoded_at_most_a_few_times() -> None:
    seen = [0]

    def counting(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        seen[0] += len(text)
        return spaced(text)

    text = "\n\n".join(sentences(20) for _ in range(100))
    split_text(text, counting, title="T")
    assert seen[0] < 2.5 * len(text)


@pytest.mark.parametrize(
    "line", ["x" * 300_000, "a " * 150_000, "a" + " " * 300_000 + "b", "a\n" * 150_000, "汉" * 300_000]
)
def test_monotonous_megabytes_take_linear_time(line: str) -> None:
    def fixed(text: str) -> tuple[list[int], list[tuple[int, int]]]:  # quick: four characters a token
        offsets = [(i, min(i + 4, len(text))) for i in range(0, len(text), 4)]
        return list(range(len(offsets))), offsets

    start = time.process_time()
    chunks = split_text(line, fixed)
    assert time.process_time() - start < 3  # about 0.15 s; a quadratic pass takes minutes
    check(chunks, line, fixed, 256)


def test_a_run_of_accents_takes_linear_time() -> None:
    started = time.perf_counter()
    assert split_text("a" + 40_000 * "\u0301" + " b", stub("."), max_tokens=64)
    assert time.perf_counter() - started < 10
