"""Teacher-forced figures, against the answers' own probabilities one question at a time."""

from __future__ import annotations

import pytest
import torch

from loracast.answering.model import Model
from loracast.errors import ConfigError
from loracast.lab.evaluation.likelihood import TeacherForcedConfig, evaluate_teacher_forced
from loracast.lab.training.document_source import DataConfig, EpisodeSource
from loracast.lora.algebra import LoRA, inject
from questions import write_documents
from tiny import make_hypernet


@pytest.fixture
def data(tmp_path) -> DataConfig:
    documents = (write_documents(tmp_path / "qa.jsonl"),)
    return DataConfig(questions_per_step=6, max_chunk_tokens=128, max_chunks=4, max_facts=3, documents=documents)


def test_figures_are_those_of_each_question_alone(base, data, tmp_path):
    model = Model(base, tmp_path / "library", make_hypernet(base))
    caster = model.documents
    config = TeacherForcedConfig(data=data, kinds=("facts", "questions"), steps=2)
    report = evaluate_teacher_forced(model, config, tmp_path / "out")
    source = EpisodeSource(data, base.tokenizer, base.chat, split="dev")
    for kind in config.kinds:
        right: list[list[bool]] = []
        for step in range(2):
            for episode in source.of_kind(kind, step):
                parts = [caster.loras_of(caster.encode([chunk])).row(0) for chunk in episode.chunks]
                factors = {
                    name: type(pair)(
                        torch.cat([part.factors[name].a for part in parts]),
                        torch.cat([part.factors[name].b for part in parts], dim=1),
                    )
                    for name, pair in parts[0].factors.items()
                }
                for question in episode.questions:
                    ids = torch.tensor([[*question.prompt, *question.answer]])
                    with torch.no_grad(), inject(base.model, LoRA(factors)):
                        said = base.model(input_ids=ids).logits[0, len(question.prompt) - 1 : -1].argmax(-1)
                    right.append((said == torch.tensor(question.answer)).tolist())
        row = next(row for row in report.rows if (row["kind"], row["baseline"]) == (kind, "adapter"))
        assert row["questions"] == len(right)
        assert row["exact"] == pytest.approx(sum(all(r) for r in right) / len(right))
        tokens = [token for r in right for token in r]
        assert row["accuracy"] == pytest.approx(sum(tokens) / len(tokens))
    assert (tmp_path / "out" / "table.md").is_file()


def test_what_cannot_be_drawn_is_reported(base, data, tmp_path):
    model = Model(base, tmp_path / "library", make_hypernet(base))
    with pytest.raises(ConfigError, match="--texts FILE"):
        evaluate_teacher_forced(model, TeacherForcedConfig(data=data, kinds=("needle",), steps=1), tmp_path / "out")
    with pytest.raises(ConfigError, match="--documents FILE"):
        evaluate_teacher_forced(model, TeacherForcedConfig(kinds=("reading",), steps=1), tmp_path / "out")
    with pytest.raises(ConfigError, match="kinds must be some of"):
        TeacherForcedConfig(kinds=("songs",))  # type: ignore[arg-type]
