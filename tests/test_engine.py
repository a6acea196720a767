"""The engine: its tokens are those of transformers' generate for each request alone, whatever runs beside it."""

from __future__ import annotations

import asyncio

import pytest
import torch

from loracast.base.generate import Sampling, answer
from loracast.errors import BaseModelError
from loracast.lora.algebra import Factors, LoRA
from loracast.serving.answer_text import AnswerText
from loracast.serving.engine import LocalEngine
from loracast.serving.request import EngineStopped, GenerationRequest
from tiny import PROSE


def make_lora(base, seed: int, rank: int = 3, kinds=("down_proj", "o_proj")) -> LoRA:
    """A random LoRA of the base that changes its answers."""
    free = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in base.model.named_modules():
        if name.endswith(kinds):
            a = torch.randn(rank, module.in_features, generator=free)
            factors[name] = Factors(a, 0.1 * torch.randn(module.out_features, rank, generator=free))
    return LoRA(factors)


@pytest.fixture
def engine(base):
    made = LocalEngine(base)
    yield made
    made.close()


def prompt(base, words: int) -> list[int]:
    return base.chat.prompt(" ".join(PROSE.split()[:words]))


def test_text_and_figures_of_an_answer(base, engine):
    lora = make_lora(base, 1)
    expected = answer(base, prompt(base, 9), lora, Sampling(12))
    ticket = engine.submit(GenerationRequest(prompt(base, 9), lora, sampling=Sampling(12)))
    assert ticket.text() == expected.text != answer(base, prompt(base, 9), None, Sampling(12)).text
    assert (ticket.n_prompt_tokens, ticket.n_tokens) == (expected.n_prompt_tokens, expected.n_tokens)
    assert ticket.finish == ("stop" if expected.finished else "length")
    assert 0 < ticket.first_token_s <= ticket.total_s


def test_a_lora_may_be_read_by_a_function(base, engine):
    lora = make_lora(base, 2)
    ticket = engine.submit(GenerationRequest(prompt(base, 5), lambda: lora, "two", Sampling(8)))
    assert ticket.text() == answer(base, prompt(base, 5), lora, Sampling(8)).text


def test_asyncio_gets_the_same_tokens(base, engine):
    async def read(ticket):
        return [token async for token in ticket]

    ticket = engine.submit(GenerationRequest(prompt(base, 5), sampling=Sampling(8)))
    assert asyncio.run(read(ticket)) == list(ticket)
    assert len(list(ticket)) >= ticket.n_tokens


def test_logprobs_are_those_of_the_base(base, engine):
    ids = prompt(base, 6)
    first = next(iter(engine.submit(GenerationRequest(ids, sampling=Sampling(3, temperature=0.5), n_logprobs=4))))
    with torch.no_grad():
        logprobs = base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert first.logprob == pytest.approx(logprobs[first.id].item(), abs=1e-4)
    assert [i for i, _ in first.top_logprobs] == logprobs.topk(4).indices.tolist()


def test_a_seed_gives_the_same_answer_again(base, engine):
    sampling = Sampling(10, temperature=1.5, top_p=0.9, seed=7)
    one, two = (engine.submit(GenerationRequest(prompt(base, 6), sampling=sampling)).text() for _ in range(2))
    assert one == two


def test_too_long_a_prompt_is_refused(base, engine):
    with pytest.raises(BaseModelError, match="window"):
        engine.submit(GenerationRequest([5] * 500, sampling=Sampling(100)))


def test_a_drained_engine_takes_nothing_more(base, engine):
    ticket = engine.submit(GenerationRequest(prompt(base, 6), sampling=Sampling(10)))
    assert engine.drain(30)
    assert ticket.finish
    with pytest.raises(EngineStopped):
        engine.submit(GenerationRequest(prompt(base, 6)))


@pytest.mark.parametrize("stop", [(), ("the lamp",), ("e l", "desk"), ("zzz",), ("  ",)])
def test_pieces_add_up_to_the_text_before_a_stop_string(base, stop):
    text = "  The lamp on the desk: 日本 é 🌍 e lamp. \n"
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream, shown = AnswerText(base.tokenizer, stop), ""
    for token in ids:
        piece, is_stopped = stream.add(token)
        shown += piece
        if is_stopped:
            break
    else:
        shown += stream.rest()
    ends = [at for one in stop if (at := text.lstrip().find(one)) >= 0]
    assert shown == text.lstrip()[: min(ends, default=None)].rstrip()
