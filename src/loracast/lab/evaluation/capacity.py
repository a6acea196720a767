"""`loracast eval capacity`: how many facts one merged LoRA tells apart, by their number and the length of their values.

A document states N facts about invented names, each value of the same number of tokens. Beside the share of values that
are written right stands the share of their tokens that are right behind the true ones before: where the second is high
and the first low, the facts are told apart, and the values are too long.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch

from loracast.answering.model import Model
from loracast.base.chat import ChatFormat
from loracast.base.generate import Sampling
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import is_exact
from loracast.lab.data.facts import Split, expand, fill, make_entity, wordings_of
from loracast.lab.data.needles import N_DEV, Needle
from loracast.lab.data.rows import read_content
from loracast.lab.evaluation import documents, report, runner
from loracast.lab.evaluation.documents import DocumentCase, DocumentSetup
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress
from loracast.lab.training.scoring import Episode, Question, pack, score_answers
from loracast.lora.algebra import LoRA, stack

_FACTS_PER_NAME = 4
_LONGEST_VALUE = 32
_MAX_DRAWS = 1000  # of a value, before there is none of that many tokens
_WORDS = ("adjective", "noun", "animal", "colour", "city")

BASELINES = {
    "merged": documents.WITHOUT_PARTS["merged"],
    "routed": documents.WITHOUT_PARTS["lora"],
    "none": runner.Baseline("no document", documents.no_document),
}
COLUMNS = columns(
    value_tokens=("tokens of a value", 0), facts=("facts", 0), label="method", documents=("documents", 0),
    chunks=("chunks", 1), n=("questions", 0), exact=("exact %", "%"), exact_low=("95 %", "interval"),
    tokens=("tokens right %", "%"),
)  # fmt: skip


@dataclass(frozen=True)
class CapacityConfig(documents.RoutedConfig):
    """Settings of `loracast eval capacity`."""

    POSITIVE = ("facts", "value_tokens", "questions", "route")
    facts: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Facts that a document states, a size each."""
    value_tokens: tuple[int, ...] = (1, 4, 12)
    """Tokens of each value, a length each."""
    questions: int = 40
    """Questions of each size and length: about several documents of few facts, or about some of many facts."""
    baselines: tuple[str, ...] = ("merged", "routed")
    """Baselines to run: merged, routed (without copying), none."""
    split: Literal["dev", "test"] = "dev"
    """Split of wordings and names: `dev` to choose between settings, `test` for figures that are reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        runner.check_names(self.baselines, BASELINES)
        if max(self.value_tokens, default=0) > _LONGEST_VALUE:
            raise ConfigError(f"a value may have {_LONGEST_VALUE} tokens at most")


def make_facts(rng: random.Random, n: int, n_tokens: int, chat: ChatFormat, split: Split) -> list[Needle]:
    """Draw facts about invented names, a few about each; a value has `n_tokens` tokens, words or digits."""
    content = read_content("needles")
    kinds = ("word", "words", "number", "number4") if n_tokens > 1 else ("word", "words")  # ten digits are too few
    labels = [(label, kind) for kind in kinds for label in wordings_of(content["kinds"][kind], "", split, N_DEV)]
    frames, facts = content["keyed"], list[Needle]()
    names: set[str] = set()
    while len(facts) < n:
        name = make_entity(rng, "{name} {name}", split)
        if name in names:
            continue
        names.add(name)
        for label, kind in rng.sample(labels, min(_FACTS_PER_NAME, n - len(facts), len(labels))):
            slots = {"label": label, "key": name, "v": _value(rng, n_tokens, chat, kind.startswith("number"))}
            state, ask = (rng.choice(wordings_of(frames, prefix, split, N_DEV)) for prefix in ("state_", "ask_"))
            facts.append(Needle(fill(state, **slots), fill(ask, **slots), slots["v"], name))
    return facts


def _value(rng: random.Random, n_tokens: int, chat: ChatFormat, is_number: bool) -> str:
    """A value that has exactly so many tokens as an answer, the end of the turn not counted."""
    for _ in range(_MAX_DRAWS):
        pieces: list[str] = []
        length = 0
        while length < n_tokens:
            pieces.append(rng.choice("0123456789") if is_number else expand(rng, f"{{{rng.choice(_WORDS)}}}"))
            value = ("" if is_number else " ").join(pieces)
            length = len(chat.answer(value)) - 1
        if length == n_tokens:
            return value
    raise ConfigError(f"this base's tokenizer gives no value of {n_tokens} tokens; choose others (--value-tokens)")


@torch.no_grad()
def right_tokens(setup: DocumentSetup, requests: Sequence[runner.Request], values: Sequence[str]) -> list[list[bool]]:
    """For each request, which tokens of its value are the likeliest behind the true ones before them."""
    base, found = setup.base, list[list[bool]]()
    held: dict[runner.LoRASource | None, LoRA | None] = {}
    for start in range(0, len(requests), runner.MAX_ROWS):
        some = requests[start : start + runner.MAX_ROWS]
        loras = runner.made(base, some, held)
        held = {r.lora: lora for r, lora in zip(some, loras, strict=True)}
        answers = [tuple(base.chat.answer(value)) for value in values[start : start + len(some)]]
        questions = [Question(tuple(r.prepared.prompt), answer) for r, answer in zip(some, answers, strict=True)]
        batch = pack([Episode((), (question,)) for question in questions], base.pad_id).to(base.device)
        given = loras[:1] if len(held) == 1 else loras  # one LoRA serves all rows
        right = score_answers(base.model, stack(given), batch).logits.argmax(-1) == batch.answer_ids
        found += [row[:-1].tolist() for row in right.split([len(answer) for answer in answers])]
    return found


@dataclass(frozen=True)
class _Seen:
    """What became of one question."""

    document: documents.LearnedDocument
    is_exact: bool
    tokens: list[bool]


def evaluate_capacity(model: Model, config: CapacityConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the table is in `out` after every document."""
    setup = DocumentSetup(model, config)
    writer = Report(out, "capacity", COLUMNS, config, model.base, model.documents.id)
    rows: list[dict[str, Any]] = []
    sizes = [(n_tokens, n) for n_tokens in config.value_tokens for n in config.facts]
    n_documents = {n: ceil(config.questions / n) for n in config.facts}
    n_done, total = 0, sum(n_documents[n] for _, n in sizes)
    for n_tokens, n in sizes:
        seen: dict[str, list[_Seen]] = {name: [] for name in config.baselines}
        for i in range(n_documents[n]):
            for name, line in _asked(setup, config, n_tokens, n, i, writer).items():
                seen[name] += line
            n_done += 1
            progress(n_done, total)
        rows += [{"value_tokens": n_tokens, "facts": n, **_row(name, some)} for name, some in seen.items()]
        writer.write(rows, is_complete=False)
    return writer.write(rows)


def _asked(
    setup: DocumentSetup, config: CapacityConfig, n_tokens: int, n: int, i: int, writer: Report
) -> Mapping[str, list[_Seen]]:
    """Ask every baseline about the i-th document of a size, which is freed again; the answers are noted."""
    rng = random.Random(f"{config.seed}/capacity/{n_tokens}/{n}/{i}")
    facts = make_facts(rng, n, n_tokens, setup.base.chat, config.split)
    document = setup.keep(" ".join(fact.statement for fact in facts), "Notes")
    asked = rng.sample(facts, min(n, config.questions))
    cases = [DocumentCase(document, fact.question, (fact.answer,)) for fact in asked]
    sampling = Sampling(max_new_tokens=n_tokens + 4)
    baselines = {name: BASELINES[name] for name in config.baselines}
    answered = runner.grouped(
        runner.ask(setup, baselines, dict.fromkeys(baselines, cases), sampling), lambda a: a.baseline
    )
    found = {}
    for name, some in answered.items():
        requests = [baselines[name].request(setup, a.case) for a in some]
        tokens = right_tokens(setup, requests, [a.case.answers[0] for a in some])
        exact = [is_exact(a.text, a.case.answers[0]) for a in some]
        found[name] = [_Seen(document, *one) for one in zip(exact, tokens, strict=True)]
        writer.add_answers(
            {
                "value_tokens": n_tokens, "facts": n, "baseline": name, "question": a.case.question,
                "value": a.case.answers[0], **a.said, "exact": is_right, "tokens": right,
            }
            for a, is_right, right in zip(some, exact, tokens, strict=True)
        )  # fmt: skip
    setup.free([document])
    return found


def _row(baseline: str, seen: Sequence[_Seen]) -> dict[str, Any]:
    """The figures of one baseline at one size."""
    learned = {one.document: None for one in seen}
    n_exact = sum(one.is_exact for one in seen)
    return {
        "baseline": baseline,
        "label": BASELINES[baseline].label.format(route=""),
        "documents": len(learned),
        "chunks": report.mean([len(document.chunks) for document in learned]),
        "n": len(seen),
        **report.named_interval("exact", (n_exact / len(seen), *report.wilson(n_exact, len(seen)))),
        "tokens": report.mean([right for one in seen for right in one.tokens]),
    }
