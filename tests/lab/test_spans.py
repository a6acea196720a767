"""Marks: where a made document says its values, and the loss on what a memory writes."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from loracast.base.chat import encode_with_offsets
from loracast.hypernets.associative_memory import END, N_PLACES, OWNER, MemoryWrites
from loracast.lab.data.facts import AFTER, BEGIN, INSIDE, FactSpan, TokenLabel, find_owner, label_tokens, make_sheet
from loracast.lab.training.document_source import DataConfig, EpisodeSource
from loracast.lab.training.losses import retrieval_loss, write_loss
from loracast.lab.training.scoring import Episode, pack
from tiny import PROSE


def labels_of(base, text: str, *stated: FactSpan) -> tuple[list[str], list[TokenLabel]]:
    _, offsets = encode_with_offsets(base.tokenizer, text)
    return [text[a:b] for a, b in offsets], label_tokens(0, text, offsets, stated)


def test_a_value_its_owner_and_its_end_are_marked(base):
    statement = "The weight of the Velmo kettle is 45 kg."
    tokens, labels = labels_of(
        base, f"A title\nNothing. {statement} More.", FactSpan(statement, "the Velmo kettle", "45 kg")
    )
    said = [m for m in labels if m.gate != AFTER]
    assert "".join(tokens[m.token] for m in said).strip() == "45 kg"
    assert [m.gate for m in said] == [BEGIN] + [INSIDE] * (len(said) - 1)
    assert [m.place for m in labels] == list(range(len(labels)))
    assert {tokens[m.owner] for m in said} == {tokens[said[0].owner]} and "kettle".endswith(
        tokens[said[0].owner].strip()
    )
    assert labels[-1].gate == AFTER and labels[-1].token == said[-1].token + 1 and labels[-1].owner == said[0].owner
    assert {tokens[m.end] for m in labels} == {"."} and {m.end for m in labels} == {tokens.index(".", said[-1].token)}


@pytest.mark.parametrize(
    ("statement", "owner", "value", "at"),
    [
        ("Line 24 takes 24 minutes.", "Line 24", "24 minutes", 14),
        ("12 people live in House 12.", "House 12", "12", 0),  # the last "12" is the house's
        ("Nobody owns 7 boats.", "", "7", 12),
    ],
)
def test_a_value_is_not_found_in_its_owners_name(base, statement, owner, value, at):
    _, offsets = encode_with_offsets(base.tokenizer, statement)
    labels = label_tokens(0, statement, offsets, [FactSpan(statement, owner, value)])
    said = [m for m in labels if m.gate != AFTER]
    assert offsets[said[0].token][1] > at and offsets[said[0].token][0] <= at
    assert offsets[said[-1].token][1] == at + len(value)
    assert all((m.owner >= 0) == bool(owner) for m in said)


def test_an_owner_is_found_whatever_its_first_letters_case():
    assert find_owner("The Velmo kettle is red.", "the Velmo kettle") == (0, 16)
    assert find_owner("Red is every Velmo kettle.", "the Velmo kettle") == (13, 25)
    assert find_owner("Something else.", "the Velmo kettle") is None


def test_a_statement_that_is_not_whole_in_the_chunk_has_no_labels(base):
    assert labels_of(base, "The weight is 4", FactSpan("The weight is 45 kg.", "", "45 kg"))[1] == []


def test_the_labels_of_sheets_and_needles_spell_their_answers(base, tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    config = DataConfig(texts=(str(tmp_path / "prose.txt"),), diluted_share=0.5, max_chunk_tokens=200, max_chunks=2)
    source = EpisodeSource(config, base.tokenizer, base.chat)
    rng = random.Random(1)
    n_owned = 0
    for episode in [source.fact_episode(rng, 4, 200) for _ in range(8)] + [
        source.needle_episode(rng, 3, 120, 2) for _ in range(8)
    ]:
        answers = {base.tokenizer.decode(q.answer[:-1]).strip() for q in episode.questions}
        values: list[list[TokenLabel]] = []
        for label in episode.token_labels:
            if label.gate == BEGIN:
                values.append([])
            if label.gate != AFTER:
                values[-1].append(label)
                n_owned += label.owner >= 0
        spelled = {base.tokenizer.decode([episode.chunks[m.chunk][m.token] for m in value]).strip() for value in values}
        assert len(values) >= len(episode.questions) - 1  # a sheet may be cut inside a statement
        assert sum(any(answer in text for text in spelled) for answer in answers) >= len(answers) - 1
    assert n_owned > 50


def test_sheets_are_marked_in_the_chunk_that_states_them(base):
    sheet = make_sheet(random.Random(2), 12, split="train")
    source = EpisodeSource(DataConfig(), base.tokenizer, base.chat)
    episode = source.fact_episode(random.Random(2), 12, 240)
    assert len(episode.chunks) > 1 and {m.chunk for m in episode.token_labels} == set(range(len(episode.chunks)))
    assert len(sheet.facts) == sum(m.gate == BEGIN for m in episode.token_labels)
    for label in episode.token_labels:
        if label.gate == BEGIN:  # a label's statement is the question's of the same number
            answer = base.tokenizer.decode(episode.questions[label.statement].answer[:-1]).strip()
            assert answer.startswith(base.tokenizer.decode([episode.chunks[label.chunk][label.token]]).strip())


def writes_for(episode: Episode, right: bool) -> tuple[MemoryWrites, object]:
    """What a memory would have to say to be wholly right (or undecided) about an episode."""
    batch = pack([episode, dataclasses.replace(episode, chunks=episode.chunks[:1], token_labels=())], 0)
    n, t = batch.chunk_ids.shape
    writes = MemoryWrites(torch.zeros(n, 3, t, t), torch.full((n, t, 3), -30.0 * right), torch.zeros(n, t, N_PLACES))
    for row, token, gate, owner, place, end, _ in batch.token_labels.tolist() if right else []:
        writes.gate_logits[row, token, gate] = 30
        writes.place_logits[row, token, min(place, N_PLACES - 1)] = 60
        writes.pointer_scores[row, END, token, end] = 60
        if owner >= 0:
            writes.pointer_scores[row, OWNER, token, owner] = 60
    return writes, batch


def test_the_loss_on_writing_against_formulas(base):
    source = EpisodeSource(DataConfig(), base.tokenizer, base.chat)
    episode = source.fact_episode(random.Random(3), 8, 96)
    right = write_loss(*writes_for(episode, right=True))
    assert right.loss.item() == pytest.approx(0, abs=1e-6)
    assert set(right.figures.values()) == {1.0} and len(right.figures) == 4
    undecided = write_loss(*writes_for(episode, right=False))
    t = max(len(chunk) for chunk in episode.chunks)
    assert undecided.loss.item() == pytest.approx(math.log(2) + math.log(N_PLACES) + 2 * math.log(t), rel=1e-5)
    unlabelled, batch = writes_for(dataclasses.replace(episode, token_labels=()), right=False)
    assert write_loss(unlabelled, batch).loss is None


def test_the_loss_on_finding_against_a_formula(base):
    """Every token of the chunks is written. Undecided, each answer token is sought among those of its document that say something else."""
    source = EpisodeSource(DataConfig(), base.tokenizer, base.chat)
    episodes = [source.fact_episode(random.Random(seed), 8, 96) for seed in (3, 4)]
    batch = pack(episodes, 0)
    k, (n, t) = batch.chunks_per_document, batch.chunk_ids.shape
    assert k > 1
    tokens = torch.arange(t).expand(n, t).masked_fill(~batch.chunk_mask, -1)
    blank = MemoryWrites(
        torch.zeros(n, 3, t, t), torch.zeros(n, t, 3), torch.zeros(n, t, N_PLACES), tokens, torch.ones(2) / 2
    )
    # Right keys: of each token its own axis; at each answer token comes in what its label's token was stored under.
    keys = torch.eye(k * t).expand(2, -1, -1)
    entering = torch.zeros(len(batch.answer_ids), k * t)
    losses: dict[bool, list[float]] = {True: [], False: []}  # of first tokens, of others
    starts, first = batch.answer_question.diff(prepend=torch.tensor([-1])).nonzero().squeeze(1), 0
    for episode in episodes:
        for label in episode.token_labels:
            question = first + label.statement
            answer = int(starts[question]) + label.place
            if label.place >= int((batch.answer_question == question).sum()):
                continue
            entering[answer, label.chunk * t + label.token] = 1
            said = [i for chunk in episode.chunks for i in chunk]
            others = sum(i != episode.chunks[label.chunk][label.token] for i in said)
            losses[label.place == 0].append(math.log(1 + others))
        first += len(episode.questions)
    right = retrieval_loss({"one": (keys, 5 * entering), "two": (keys, 5 * entering)}, blank, batch)
    assert right[1] == 1.0 and right[0].item() == pytest.approx(0, abs=1e-6)
    none = torch.zeros_like(entering)
    undecided = retrieval_loss({"one": (keys, none), "two": (keys, none)}, blank, batch)
    assert undecided[0].item() == pytest.approx(sum(sum(some) / len(some) / 2 for some in losses.values()), rel=1e-5)
    closed = torch.zeros(len(episodes), batch.input_ids.shape[1], k * t)  # no sentence weighs anything
    gated = retrieval_loss({"one": (keys, 5 * entering), "two": (keys, 5 * entering)}, blank, batch, closed)
    assert gated[0].item() == pytest.approx(undecided[0].item(), rel=1e-5)
    opened = retrieval_loss({"one": (keys, 5 * entering), "two": (keys, 5 * entering)}, blank, batch, closed + 1)
    assert opened[0].item() == pytest.approx(right[0].item(), abs=1e-6)
    silent = pack([dataclasses.replace(episode, token_labels=()) for episode in episodes], 0)
    assert retrieval_loss({"one": (keys, none), "two": (keys, none)}, blank, silent) is None
