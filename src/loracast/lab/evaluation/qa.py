"""`loracast eval qa`: questions that people asked about real documents, a table by source and one by length.

Context distillation of each document by gradient descent: the slow way to an adapter, to measure a fast one by.

A LoRA is trained on rule-made questions about the document, towards the distributions of the base that sees the
document (or of the window LoRA, where there is one). Doc-to-LoRA is compared with it (arXiv 2602.15902, section 4).
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.answering.model import ASK_SYSTEM_TURN, Model
from loracast.base.chat import ChatFormat, Message, encode_with_offsets, without_middle
from loracast.base.generate import Sampling, answers
from loracast.documents import split_text
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import best, exact_match, has_value, rouge_l, token_f1
from loracast.lab.data.questions import make_clozes
from loracast.lab.data.rows import QuestionedDocument
from loracast.lab.evaluation import documents, report, runner
from loracast.lab.evaluation.documents import Answers, Asks, DocumentBaseline, DocumentCase, DocumentSetup
from loracast.lab.evaluation.report import Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import Answered, Baseline, Request
from loracast.lab.training.document_source import reading_prompt
from loracast.lab.training.losses import Distillation, Teacher
from loracast.lab.training.scoring import Episode, Question, pack, score_answers
from loracast.library.index import write_index
from loracast.lora.algebra import LoRA, LoRABatch
from loracast.lora.factors import Factors
from loracast.lora.target import target_from_config

_EXAMPLE = (
    "The Hartwell Bridge was opened in 1897 and is 312 metres long. It was designed by Clara Menzies, who had built "
    "two lighthouses before. Since 1975 only trams and cyclists may cross it."
)
_EXAMPLE_ANSWERS = (
    ("Who designed the Hartwell Bridge?", "Clara Menzies"),
    ("How long is the bridge?", "312 metres"),
    ("What may cross the bridge since 1975?", "only trams and cyclists"),
)
# A document with questions and answers as they are wanted: without it, the base answers with sentences.


_ALONE = "Question: {question}\nShort answer:"
_SHORT = "{document}\n\n" + _ALONE
_TWICE = "Question: {question}\n\n" + _SHORT


def _prompt(template: str, *examples: str) -> documents.Prompt:
    """A prompt of an empty system turn, the examples' questions as turns with their answers, and the real question.

    Args:
        template: of the last turn; `{document}` and `{question}` stand in it.
        examples: templates of the turns with the example's questions; with none, there are no examples.
    """

    def prompt(chat: ChatFormat, document: str, question: str) -> list[int]:
        messages: list[Message] = [{"role": "system", "content": ASK_SYSTEM_TURN}]
        for turn, (example, answer) in zip(examples, _EXAMPLE_ANSWERS, strict=False):
            messages.append({"role": "user", "content": turn.format(document=_EXAMPLE, question=example)})
            messages.append({"role": "assistant", "content": answer})
        last: Message = {"role": "user", "content": template.format(document=document, question=question)}
        return chat.conversation([*messages, last])

    return prompt


_ORDER = "Answer the question with words from the text, as short as possible."
PROMPTS: dict[str, documents.Prompt] = {
    "naive": _prompt("{document}\n\n{question}"),
    "brief": _prompt("{document}\n\nQuestion: {question}\nAnswer in a few words."),
    "quoting": _prompt(f"Text: {{document}}\n\n{_ORDER}\nQuestion: {{question}}\nAnswer:"),
    "shots": _prompt(_SHORT, _SHORT, _ALONE, _ALONE),  # the example's document stands before its first question only
    "twice": _prompt(_TWICE, _TWICE, _TWICE, _TWICE),  # the question first, so that the base knows what to read for
}
BEST = "quoting"
"""The best of them on the dev split (docs/notebook)."""


N_QUESTIONS = 25
_KINDS = ("q_proj", "v_proj", "o_proj", "down_proj")
_RANK = 8
_N_STEPS = 60
_LR = 1e-3
_N_ROWS = 5  # the questions in this many rows: attention grows with the square of a row
_NAME = "distilled"


def distil(setup: DocumentSetup, case: DocumentCase) -> LoRA:
    """Train a LoRA that answers about the document as the base does that sees it."""
    base = setup.base
    questions = _questions(setup, case)
    if not questions:  # so short that it has no sentence to ask about
        return LoRA()
    teacher = Teacher(base.model, base.pad_id, setup.window_lora)
    rows = [Episode((), tuple(questions[i::_N_ROWS])) for i in range(_N_ROWS) if questions[i::_N_ROWS]]
    distillation = Distillation(replace(teacher, lora=None), teacher)
    batch = pack(distillation.with_soft_targets(rows), base.pad_id).to(base.device)
    generator = torch.Generator().manual_seed(0)
    target = target_from_config(base.model.config, _KINDS)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in target.modules:
        a = torch.randn(1, _RANK, module.d_in, generator=generator) / module.d_in**0.5
        b = torch.zeros(1, module.d_out, _RANK)
        factors[module.name] = (a.to(base.device).requires_grad_(), b.to(base.device).requires_grad_())
    optimizer = torch.optim.AdamW([side for pair in factors.values() for side in pair], lr=_LR, weight_decay=0.0)
    loras = LoRABatch(1, {name: Factors(*pair) for name, pair in factors.items()}, {})
    with torch.enable_grad():
        for _ in range(_N_STEPS):
            scores = score_answers(base.model, loras, batch)
            optimizer.zero_grad()
            scores.distillation_loss.backward()
            optimizer.step()
    dtype = base.model.dtype
    return LoRA({name: Factors(a[0].detach().to(dtype), b[0].detach().to(dtype)) for name, (a, b) in factors.items()})


def _questions(setup: DocumentSetup, case: DocumentCase) -> list[Question]:
    """Rule-made questions, each with the answer that the base gives when it sees the document."""
    base = setup.base
    text = without_middle(base.tokenizer, case.document.full_text, base.window // 2)
    prompt = PROMPTS[BEST] if setup.window_lora is None else reading_prompt
    clozes = make_clozes(random.Random(case.doc_id), case.document.document.text, N_QUESTIONS)
    asked = [question for question, _ in clozes]
    prompts = [tuple(prompt(base.chat, text, question)) for question in asked]
    sampling = Sampling(max_new_tokens=setup.max_new_tokens)
    said = answers(base, prompts, [setup.window_lora] * len(prompts), sampling)
    return [
        Question(
            tuple(base.chat.prompt(question, "")), tuple(base.chat.answer(given.text)), window_prompt=window_prompt
        )
        for question, window_prompt, given in zip(asked, prompts, said, strict=True)
        if given.text
    ]


def learn_distilled(setup: DocumentSetup, case: DocumentCase) -> None:
    """Train the document's LoRA and keep it with the document's questions."""
    case.document.trained[_NAME] = distil(setup, case)


def request_distilled(setup: DocumentSetup, case: DocumentCase) -> Request:
    """The question alone, with the LoRA that was trained for the document."""
    return replace(setup.request(case.question), lora=runner.fixed(case.document.trained[_NAME]))


TRUNCATED_TOKENS = 128
"""Tokens that are left of a document whose middle is left out."""
PASSAGE_TOKENS = 64
"""Longest passage: two or three sentences."""


def passages(setup: DocumentSetup, case: DocumentCase, k: int) -> str:
    """The k passages that BM25 finds best, as one text in the document's order; all of them where there are no more."""
    tokenizer = setup.base.tokenizer
    text = case.document.document.text
    chunks = split_text(text, lambda part: encode_with_offsets(tokenizer, part), max_tokens=PASSAGE_TOKENS)
    if len(chunks) > k:
        with closing(sqlite3.connect(":memory:")) as index:
            write_index(index, chunks)
            chunks = [chunks[i] for i in documents.best_passages(index, case.question, len(chunks), k)]
    return "\n\n".join(chunk.text for chunk in chunks)


def _retrieved(k: int) -> Asks:
    """The k best passages in the prompt."""
    return lambda setup, case: runner.shown(
        documents.with_text(setup, PROMPTS[BEST], passages(setup, case, k), case.question)
    )


BASELINES: dict[str, DocumentBaseline] = {
    "adapter": Baseline("adapter", documents.adapter("document"), documents.learn("document")),
    "none": Baseline("no document", documents.no_document),
    "other": Baseline("another's adapter", documents.adapter("other"), documents.learn("other")),
    "beside": Baseline(
        "adapter beside another's",
        documents.adapter("document", "other"),
        documents.learn("document", "other"),
        is_optional=True,
    ),
    **documents.WITHOUT_PARTS,
    "window": Baseline("in the window", documents.whole(PROMPTS[BEST])),
    **{
        f"window_{name}": Baseline(f"window, prompt {name!r}", documents.whole(prompt), is_optional=True)
        for name, prompt in PROMPTS.items()
        if name != BEST
    },
    "truncated": Baseline(
        f"window, cut to {TRUNCATED_TOKENS} tokens", documents.whole(PROMPTS[BEST], TRUNCATED_TOKENS)
    ),
    "window_lora": documents.WINDOW_LORA,
    "bm25_lora": Baseline(
        "window LoRA, BM25 passage",
        lambda setup, case: documents.in_window_lora(setup, passages(setup, case, 1), case.question),
        needs=("window LoRA",),
    ),
    "bm25": Baseline("BM25, 1 passage", _retrieved(1)),
    "bm25_3": Baseline("BM25, 3 passages", _retrieved(3)),
    "distilled": Baseline(
        f"context distillation, {N_QUESTIONS} questions", request_distilled, learn_distilled, is_optional=True
    ),
}


LENGTHS = (128, 256, 512, 1024)
"""Where the table by length cuts, in tokens."""
MAX_NEW_TOKENS = 32
"""Longest answer: no right one has more than 20 words."""
_DOCUMENTS_PER_GROUP = 16
_N_TIMED = 3

COLUMNS = columns(
    part="documents", label="method", documents=("n", 0), n=("questions", 0), exact=("exact %", "%"),
    contained=("in answer %", "%"), f1=("F1 %", "%"), f1_low=("95 %", "interval"), rouge_l=("ROUGE-L %", "%"),
    of_window=("% of window", "%"), of_window_lora=("% of window LoRA", "%"),
    difference=("adapter minus it (95 %)", "change"), prompt_tokens=("prompt tokens", 0), update_s=("update s", 2),
    answer_s=("answer s", 2),
)  # fmt: skip


@dataclass(frozen=True)
class QaConfig(documents.QuestionedConfig, documents.WindowedConfig):
    """Settings of `loracast eval qa`."""

    POSITIVE = ("max_documents", "max_questions", "route")
    max_documents: int = 200
    """Most documents of each source, drawn at random."""
    max_questions: int | None = None
    """Most questions about one document; by default all."""
    spans_only: bool = False
    """Ask only questions whose answer stands in the document."""
    baselines: tuple[str, ...] = ()
    """Baselines to run; if empty, all but the optional ones."""
    budget_s: float | None = None
    """Begin no further documents after this many seconds; the table shows how many there were."""


MEASURES = {"exact": exact_match, "contained": has_value, "f1": token_f1, "rouge_l": rouge_l}
"""What an answer is worth: each is the best over the right answers; `contained` is whether one stands in what was said,
as whole words."""


def evaluate_qa(model: Model, config: QaConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""
    setup = config.setup(model, MAX_NEW_TOKENS)
    baselines = runner.choose_baselines(BASELINES, config.baselines, config.missing)
    parts = [_part(setup, source, some) for source, some in runner.grouped(choose(config), lambda d: d.source).items()]
    writer = Report(out, "qa", COLUMNS, config, model.base, model.documents.id)
    updates: documents.Updates = {name: [] for name in baselines}
    return documents.evaluate_documents(
        setup, writer, baselines, parts, _score, lambda answered: _tables(answered, updates), _line, _N_TIMED,
        config.budget_s, progress, updates,
    )  # fmt: skip


def _score(a: Answered[DocumentCase]) -> dict[str, float]:
    return {name: float(best(measure, a.text, a.case.answers)) for name, measure in MEASURES.items()}


def choose(config: QaConfig) -> list[QuestionedDocument]:
    """Draw the documents and their questions, source by source. Raises ConfigError where none is left."""
    chosen: list[QuestionedDocument] = []
    for source, of_source in sorted(runner.grouped(config.read(), lambda document: document.source).items()):
        rng = random.Random(f"{config.seed}/{source}")
        some = rng.sample(of_source, min(config.max_documents, len(of_source)))
        for document in some:
            asked = [question for question in document.questions if question.is_span or not config.spans_only]
            if config.max_questions is not None:
                asked = rng.sample(asked, min(config.max_questions, len(asked)))
            if asked:
                chosen.append(replace(document, questions=tuple(asked)))
    if not chosen:
        raise ConfigError("no document has a question whose answer it says; ask all questions (without --spans-only)")
    return chosen


def _part(setup: DocumentSetup, source: str, some: Sequence[QuestionedDocument]) -> documents.Part:
    """The documents of a source, the last one's other document being the first."""
    return documents.Part(source, len(some), _DOCUMENTS_PER_GROUP, lambda i: cases_of(setup, some[i % len(some)]))


def cases_of(setup: DocumentSetup, document: QuestionedDocument) -> list[DocumentCase]:
    """The questions about one document, which is learned."""
    learned = setup.keep(document.text, document.title)
    return [DocumentCase(learned, q.question, q.answers, doc_id=document.doc_id) for q in document.questions]


def _tables(answered: Mapping[str, Answers], updates: documents.Updates) -> list[dict[str, Any]]:
    """The rows of every source by itself, of all of them, and of every length."""
    every = [a for some in answered.values() for a in some]
    parts = {source or "documents": some for source, some in answered.items()}
    if len(parts) > 1:
        parts["all"] = every
    by_length = runner.grouped(every, lambda a: sum(a.case.document.n_tokens >= limit for limit in LENGTHS))
    rows = [row for part, some in parts.items() for row in _rows(part, some, updates, "source")]
    if len(by_length) > 1:
        for i, some in sorted(by_length.items()):
            rows += _rows(_length_name(i), some, updates, "length")
    return rows


def _length_name(i: int) -> str:
    low, high = (0, *LENGTHS)[i], (*LENGTHS, None)[i]
    return f"{low} to {high - 1} tokens" if high else f"{low} tokens or more"


def _rows(part: str, answered: Answers, updates: documents.Updates, kind: str) -> list[dict[str, Any]]:
    """One row a baseline, over some documents."""
    by_baseline = runner.grouped(answered, lambda a: a.baseline)
    f1 = {name: report.mean([a.scores["f1"] for a in some]) for name, some in by_baseline.items()}
    rows = []
    for name, some in by_baseline.items():
        by_document = _by_document(some)
        row: dict[str, Any] = {"kind": kind, "part": part, "baseline": name, "label": BASELINES[name].label}
        row |= {"documents": len(by_document), **runner.figures(some)}
        row |= {key: report.mean([a.scores[key] for a in some]) for key in MEASURES}
        row |= report.named_interval("f1", (f1[name], *report.cluster_bootstrap(list(by_document.values()))))
        for best_known in ("window", "window_lora"):
            row[f"of_{best_known}"] = f1[name] / f1[best_known] if f1.get(best_known) else None
        row["document_tokens"] = report.mean([a.case.document.n_tokens for a in some])
        row["update_s"] = report.mean(updates[name])
        if "adapter" in by_baseline and name != "adapter":
            mine = _by_document(by_baseline["adapter"])
            gains = [[x - y for x, y in zip(mine[key], by_document[key], strict=True)] for key in mine]
            row |= report.named_interval("difference", (f1["adapter"] - f1[name], *report.cluster_bootstrap(gains)))
        rows.append(row)
    return rows


def _by_document(answered: Answers) -> dict[str, list[float]]:
    """The F1 of each document's questions."""
    return {
        key: [a.scores["f1"] for a in some] for key, some in runner.grouped(answered, lambda a: a.case.doc_id).items()
    }


def _line(source: str, a: Answered[DocumentCase]) -> dict[str, Any]:
    """What a line of answers.jsonl says of the question."""
    return {
        "baseline": a.baseline, "source": source, "doc_id": a.case.doc_id, "question": a.case.question,
        "answers": a.case.answers, "document_tokens": a.case.document.n_tokens,
    }  # fmt: skip
