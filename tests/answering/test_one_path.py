"""One path to an answer: whichever way a question is asked, the answer, its sources and what gave it are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracast.answering.answers import NOT_SAID, SourcedAnswer
from loracast.base.generate import Sampling
from loracast.serving.engine import LocalEngine
from servers import in_process
from tiny import drained

QUESTIONS = (
    "How long is the warranty of the kettle?",
    "When does the museum open?",
    "Who painted the ceiling of the chapel in Rome, Ingrid?",
    "What is this document about?",
)
CHOSEN = ((), ("manual",), ("museum",), ("manual", "museum"), ("manual", "shout"), ("shout",), ("m*",), ("*", "shout"))
SAMPLING = Sampling(6)
Seen = tuple[str, str, tuple[str, ...]]
"""The text of an answer, what gave it, and its sources."""


@pytest.fixture(scope="module")
def api(filled) -> Iterator[TestClient]:
    """A server of the same model."""
    engine = LocalEngine(filled.base)
    yield in_process(filled, engine)
    engine.close()


@st.composite
def options(draw) -> dict[str, bool]:
    """Strict, always, or neither."""
    kind = draw(st.sampled_from(["", "strict", "always"]))
    return {"strict": kind == "strict", "always": kind == "always"}


def seen(answer: SourcedAnswer) -> Seen:
    return answer.text, answer.answered_by, tuple(map(str, answer.sources))


def over_http(api: TestClient, question: str, chosen: tuple[str, ...], wanted: dict[str, bool]) -> Seen:
    """The same from a server, which tells of sources in the form of `Source`."""
    body = {"model": api.get("/v1/models").json()["data"][0]["id"], "adapters": [{"id": one} for one in chosen]}
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    answer = api.post("/v1/chat/completions", json={**body, **wanted, "messages": messages, "max_tokens": 6}).json()
    account = answer["loracast"]
    sources = tuple(
        f"{one['adapter']}"
        + ("" if one["chunk"] is None else f", chunk {one['chunk']}")
        + f": {one['heading'] or one['title']}"
        for one in account["sources"]
    )
    return answer["choices"][0]["message"]["content"], account["answered_by"][0], sources


@pytest.mark.usefixtures("no_copying")
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(CHOSEN)), min_size=1, max_size=3),
    wanted=options(),
)
def test_the_way_of_asking_changes_nothing(filled, api, asked, wanted):
    """A batch keeps the order of its questions; streams and a server give what `answer` gives."""
    # Without documents nothing is strict, which is refused (test_ask_library.py).
    asked = [one for one in asked if not wanted["strict"] or one[1] not in ((), ("shout",))]
    batch = filled.answer([q for q, _ in asked], [list(c) for _, c in asked], sampling=SAMPLING, **wanted)
    assert len(batch) == len(asked)
    for (question, chosen), of_batch in zip(asked, batch, strict=True):
        alone = filled.answer(question, list(chosen), sampling=SAMPLING, **wanted)
        pieces, streamed = drained(filled.stream(question, list(chosen), sampling=SAMPLING, **wanted))
        assert seen(alone) == seen(of_batch) == seen(streamed)
        assert "".join(pieces).rstrip() == alone.text  # blanks at its end are known to be the last too late
        if alone.answered_by in ("outline", "refusal"):
            assert len(pieces) == 1  # no model is asked
        assert over_http(api, question, chosen, wanted) == seen(alone)
        if alone.answered_by == "refusal":
            assert alone.text == NOT_SAID and wanted["strict"] and not alone.sources
        if alone.answered_by == "base":
            assert not alone.sources and all(route.is_empty for _, route in alone.routed)
