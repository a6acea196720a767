"""The engine: every request gets the tokens that transformers' generate gives it alone, whatever runs beside it."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracast.base.generate import AnswerText, Sampling
from loracast.base.load import Base
from loracast.errors import AdapterError
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.lora.algebra import LoRA, concat, stack
from loracast.lora.factors import Factors
from loracast.serving.engine import LocalEngine, token_bytes
from loracast.serving.generation import EngineBusy, EngineConfig, EngineStopped, GenerationRequest
from servers import eventually
from tiny import FAMILIES, PROSE, answer, make_model, make_tokenizer

SMALL = EngineConfig(n_slots=4, slot_tokens=48, prefill_tokens=5, prefill_tokens_alone=9)
"""Prompts are read in several pieces, and some requests are longer than a slot."""


def make_lora(base, seed: int, rank: int = 3, kinds=("down_proj", "o_proj")) -> LoRA:
    """A random LoRA of the base that changes its answers."""
    free = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in base.model.named_modules():
        if name.endswith(kinds):
            a = torch.randn(rank, module.in_features, generator=free)
            factors[name] = Factors(a, 0.1 * torch.randn(module.out_features, rank, generator=free))
    return LoRA(factors)


def memory_like(base, seed: int, static: LoRA) -> LoRA:
    """A LoRA as documents have it: the same B in o_proj of all layers, and a static LoRA, to which down_proj adds."""
    free = torch.Generator().manual_seed(seed)
    b = 0.1 * torch.randn(base.model.config.hidden_size, 6, generator=free)
    own = make_lora(base, seed, 2, ("down_proj",))
    keys = {
        name: Factors(torch.randn(6, module.in_features, generator=free), b)
        for name, module in base.model.named_modules()
        if name.endswith("o_proj")
    }
    return concat([LoRA(keys), static, own])


def dense(lora: LoRA) -> LoRA:
    return LoRA({}, {name: lora.delta(name) for name in lora.names})


@cache
def family(name: str) -> Base:
    return Base(name, make_model(name), make_tokenizer())


@cache
def loras(name: str) -> list[LoRA | None]:
    """Of several ranks and modules, dense and shared; None for the plain base."""
    base = family(name)
    static = make_lora(base, 9, 2, ("q_proj", "v_proj", "down_proj"))
    static = LoRA(static.factors, static=frozenset(static.names))
    made = [make_lora(base, 1), make_lora(base, 2, 5), dense(make_lora(base, 3)), make_lora(base, 4, 3, ("gate_proj",))]
    return [None, *made, *(memory_like(base, seed, static) for seed in (5, 6, 7))]


@cache
def expected(name: str, ids: tuple[int, ...], which: int, n_tokens: int) -> tuple[str, int]:
    given = answer(family(name), ids, loras(name)[which], Sampling(n_tokens))
    return given.text, given.n_tokens


@pytest.fixture
def engine(base):
    made = LocalEngine(base)
    yield made
    made.close()


def prompt(base, words: int, skip: int = 0) -> list[int]:
    return base.chat.prompt(" ".join((PROSE * 3).split()[skip : skip + words]))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_every_family_answer_as_they_do_alone(name):
    """Mixed lengths, LoRAs of all sorts, prompts in pieces, long rows, and requests that come in the middle."""
    base, engine = family(name), LocalEngine(family(name), SMALL)
    asked = [(tuple(prompt(base, 2 + 5 * i % 17, i)), i % 8, 5 + 3 * i % 11) for i in range(10)]
    tickets = []
    for i, (ids, which, n_tokens) in enumerate(asked):
        key = f"lora {which}" if i % 3 else None
        tickets.append(engine.submit(GenerationRequest(ids, loras(name)[which], key, Sampling(n_tokens))))
        if i % 5 == 4:
            next(iter(tickets[-1]))
    for (ids, which, n_tokens), ticket in zip(asked, tickets, strict=True):
        assert (ticket.text(), ticket.n_tokens) == expected(name, ids, which, n_tokens)
    engine.close()


SCHEDULES = st.lists(
    st.tuples(
        st.integers(1, 25), st.integers(0, 7), st.integers(1, 12), st.booleans(), st.none() | st.integers(0, 5)
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip
"""Words of the prompt, LoRA, new tokens, whether it has a key, tokens after which it is cancelled if at all."""


@settings(max_examples=15, deadline=None)
@given(SCHEDULES, st.integers(1, 5), st.integers(1, 40), st.sampled_from([20, 60, 600]), st.sampled_from([0, 10**9]))
def test_any_schedule_gives_the_same_tokens(schedule, n_slots, prefill_tokens, slot_tokens, prefix_bytes):
    config = EngineConfig(
        n_slots, slot_tokens=slot_tokens, prefill_tokens=prefill_tokens, prefill_tokens_alone=prefill_tokens,
        prefix_bytes=prefix_bytes, adapter_bytes=30_000,
    )  # fmt: skip
    base, engine = family("llama"), LocalEngine(family("llama"), config)
    try:
        tickets = []
        for words, which, n_tokens, has_key, cancelled_after in schedule:
            key = f"lora {which}" if has_key else None
            ids = tuple(prompt(base, words))
            ticket = engine.submit(GenerationRequest(ids, loras("llama")[which], key, Sampling(n_tokens)))
            tickets.append((ticket, cancelled_after is not None, expected("llama", ids, which, n_tokens)))
            if cancelled_after is not None:
                for _, _token in zip(range(cancelled_after), ticket, strict=False):
                    pass
                ticket.cancel()
        for ticket, is_cancelled, (text, n_tokens) in tickets:
            if is_cancelled:
                assert text.startswith(ticket.text())
            else:
                assert (ticket.text(), ticket.n_tokens) == (text, n_tokens)
        assert engine.drain(30)
        assert engine.stats().n_running == engine.stats().n_queued == 0
    finally:
        engine.close()


def test_figures_of_an_answer(base, engine):
    ids = prompt(base, 9)
    given = answer(base, ids, None, Sampling(12))
    ticket = engine.submit(GenerationRequest(ids, sampling=Sampling(12)))
    assert ticket.text() == given.text
    assert (ticket.n_prompt_tokens, ticket.n_tokens) == (given.n_prompt_tokens, given.n_tokens)
    assert ticket.finish == ("stop" if given.finished else "length")
    assert 0 < ticket.first_token_s <= ticket.total_s


def test_a_lora_is_read_once_for_its_key(base, engine):
    lora, n_reads = make_lora(base, 2), []

    def read():
        n_reads.append(1)
        return lora

    asked = GenerationRequest(prompt(base, 5), read, "two", Sampling(8))
    texts = [engine.submit(asked).text() for _ in range(3)]
    assert texts == [answer(base, prompt(base, 5), lora, Sampling(8)).text] * 3
    assert len(n_reads) == engine.stats().n_adapters_in_memory == 1


def test_loras_leave_memory_under_a_budget(base):
    one = sum(t.numel() * 4 for pair in make_lora(base, 0).factors.values() for t in pair)
    engine = LocalEngine(base, EngineConfig(adapter_bytes=2 * one))
    for i in range(5):
        engine.submit(GenerationRequest(prompt(base, 4), make_lora(base, i), str(i), Sampling(2))).text()
    assert (engine.stats().n_adapters_in_memory, engine.stats().adapter_bytes) == (2, 2 * one)
    engine.close()


def test_prompts_come_from_the_prefix_cache(base, engine):
    """The prompt of several answers, and a conversation that goes on; never with another LoRA."""
    ids, lora = prompt(base, 12), make_lora(base, 3)
    tickets = [engine.submit(GenerationRequest(ids, lora, "three", Sampling(6))) for _ in range(3)]
    expected = answer(base, ids, lora, Sampling(6)).text
    assert [ticket.text() for ticket in tickets] == [expected] * 3
    assert [ticket.n_cached_tokens for ticket in tickets] == [0, len(ids) - 1, len(ids) - 1]
    said = [token.id for token in tickets[0] if token.id is not None]
    more = [*ids, *said, *prompt(base, 4, 20)]
    on = engine.submit(GenerationRequest(more, lora, "three", Sampling(6)))
    assert on.text() == answer(base, more, lora, Sampling(6)).text
    assert on.n_cached_tokens >= len(ids) + len(said) - 1
    for other, key in ((None, None), (make_lora(base, 4), "four"), (lora, None)):
        ticket = engine.submit(GenerationRequest(ids, other, key, Sampling(6)))
        assert ticket.text() == answer(base, ids, other, Sampling(6)).text
        assert ticket.n_cached_tokens == 0
    assert engine.stats().n_cached_tokens == 2 * (len(ids) - 1) + on.n_cached_tokens


def test_asyncio_gets_the_same_tokens(base, engine):
    async def read(ticket):
        return [token async for token in ticket]

    ticket = engine.submit(GenerationRequest(prompt(base, 5), sampling=Sampling(8)))
    assert asyncio.run(read(ticket)) == list(ticket)
    assert len([token for token in ticket if token.id is not None]) == ticket.n_tokens > 0


def test_logprobs_are_those_of_the_base(base, engine):
    ids = prompt(base, 6)
    first = next(iter(engine.submit(GenerationRequest(ids, sampling=Sampling(3, temperature=0.5), n_logprobs=4))))
    with torch.no_grad(), base.lock:  # the engine goes on
        logprobs = base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert first.logprob == pytest.approx(logprobs[first.id].item(), abs=1e-4)
    assert [i for i, _ in first.top_logprobs] == logprobs.topk(4).indices.tolist()


@pytest.mark.parametrize(
    "rules", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 30}], ids=str
)
def test_rules_are_those_of_generate(base, engine, rules):
    sampling = Sampling(30, **rules)
    ids = prompt(base, 8)
    lora = make_lora(base, 1) if "min_new_tokens" in rules else None  # whose answer ends early
    given = answer(base, ids, lora, sampling)
    assert engine.submit(GenerationRequest(ids, lora, sampling=sampling)).text() == given.text
    assert given.text != answer(base, ids, lora, Sampling(30)).text


def test_a_seed_gives_the_same_answer_beside_others(base, engine):
    asked = GenerationRequest(prompt(base, 6), sampling=Sampling(10, temperature=1.5, top_p=0.9, seed=7))
    others = GenerationRequest(prompt(base, 9), sampling=Sampling(10, temperature=1.5))
    alone = engine.submit(asked).text()
    tickets = [engine.submit(one) for one in (others, asked, others, asked)]
    assert [ticket.text() for ticket in tickets][1::2] == [alone, alone]
    assert tickets[0].text() != alone


def test_tokens_are_drawn_with_their_probability(base):
    """Of the two likeliest tokens only, as often as their logits at this temperature say."""
    ids, n = prompt(base, 6), 200
    engine = LocalEngine(base, EngineConfig(n_slots=50, max_queued=n))
    sampling = [Sampling(1, temperature=2.0, top_k=2, seed=seed, min_new_tokens=1) for seed in range(n)]
    tickets = [engine.submit(GenerationRequest(ids, sampling=one)) for one in sampling]
    drawn = [next(iter(ticket)).id for ticket in tickets]
    engine.close()
    with torch.no_grad():
        logits = base.model(torch.tensor([ids])).logits[0, -1]
    logits[list(base.end_ids)] = float("-inf")
    best = logits.topk(2)
    share = (best.values / 2).softmax(-1)[0].item()
    assert set(drawn) == set(best.indices.tolist())
    assert drawn.count(best.indices[0].item()) / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_a_request_that_cannot_be_served_is_refused_at_once(base, engine):
    wrong = Factors(torch.ones(2, 7), torch.ones(9, 2))
    with pytest.raises(AdapterError, match="does not fit"):
        engine.submit(GenerationRequest([5, 6], LoRA({"model.layers.0.mlp.down_proj": wrong})))
    small = LocalEngine(base, EngineConfig(kv_bytes=10_000))
    assert small.window == 10_000 // token_bytes(base) < engine.window == base.window
    small.close()


def test_a_full_queue_refuses(base):
    engine = LocalEngine(base, EngineConfig(n_slots=1, max_queued=2))
    with base.lock:  # nothing moves
        tickets = [engine.submit(GenerationRequest(prompt(base, 3), sampling=Sampling(3)))]
        with pytest.raises(EngineBusy) as refused:
            for _ in range(4):
                tickets.append(engine.submit(GenerationRequest(prompt(base, 3), sampling=Sampling(3))))
    assert refused.value.retry_after_s >= 1
    assert len({ticket.text() for ticket in tickets}) == 1
    engine.close()


def test_cancelled_requests_leave_the_queue_and_the_slots(base):
    engine = LocalEngine(base, EngineConfig(n_slots=1))
    long = Sampling(400, min_new_tokens=400)
    running, waiting, last = (engine.submit(GenerationRequest(prompt(base, 3), sampling=long)) for _ in range(3))
    next(iter(running))
    waiting.cancel()
    running.cancel()
    next(iter(last))
    assert (running.finish, waiting.finish, waiting.n_tokens) == (None, None, 0)
    assert 0 < running.n_tokens < 400
    last.cancel()
    assert engine.drain(10)
    engine.close()


def test_what_nobody_waits_for_makes_no_queue_full(base):
    """Neither behind a request that waits for room."""
    engine = LocalEngine(base, EngineConfig(n_slots=1, max_queued=3))
    long = Sampling(400, min_new_tokens=400)
    running = engine.submit(GenerationRequest(prompt(base, 3), sampling=long))
    next(iter(running))
    head, *gone = (engine.submit(GenerationRequest(prompt(base, 3), sampling=long)) for _ in range(3))
    for ticket in gone:
        ticket.cancel()
        assert ticket.text() == ""
    again = [engine.submit(GenerationRequest(prompt(base, 3), sampling=long)) for _ in gone]
    for ticket in (running, head, *again):
        ticket.cancel()
    assert engine.drain(10)
    engine.close()


def test_a_drained_engine_takes_nothing_more(base, engine):
    ticket = engine.submit(GenerationRequest(prompt(base, 6), sampling=Sampling(10)))
    assert engine.drain(30)
    assert ticket.finish
    with pytest.raises(EngineStopped):
        engine.submit(GenerationRequest(prompt(base, 6)))


def test_closing_fails_what_is_not_done(base):
    engine = LocalEngine(base, EngineConfig(n_slots=1))
    sampling = Sampling(400, min_new_tokens=400)
    tickets = [engine.submit(GenerationRequest(prompt(base, 6), sampling=sampling)) for _ in range(2)]
    next(iter(tickets[0]))
    engine.close()
    for ticket in tickets:
        with pytest.raises(EngineStopped):
            list(ticket)


def test_a_step_that_fails_is_reported_and_the_engine_goes_on(base, engine, monkeypatch):
    lora = make_lora(base, 1)

    def explode(*given, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("loracast.serving.packed_lora._Step.apply", explode)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.submit(GenerationRequest(prompt(base, 5), lora, "one", Sampling(5))).text()
    again = engine.submit(GenerationRequest(prompt(base, 5), lora, "one", Sampling(5)))
    assert again.text() == answer(base, prompt(base, 5), lora, Sampling(5)).text


def test_a_lora_that_overflows_fails_alone(base):
    engine = LocalEngine(base, EngineConfig(n_slots=2))
    good, ids = make_lora(base, 1), prompt(base, 9)
    expected = answer(base, ids, good, Sampling(40)).text
    bad = make_lora(base, 2).scale(1e38)
    for _ in range(2):
        beside = engine.submit(GenerationRequest(ids, good, "good", Sampling(40)))
        with pytest.raises(AdapterError, match="not finite"):
            engine.submit(GenerationRequest(ids, bad, "bad", Sampling(4))).text()
        assert beside.text() == expected
    assert [engine.submit(GenerationRequest(ids, good, str(i), Sampling(40))).text() for i in range(2)] == [
        expected
    ] * 2
    engine.close()


def test_others_use_the_base_while_requests_run(base, engine):
    """Learning takes the base's lock again and again; neither waits for the other to end, and both compute right."""
    ids = torch.tensor([prompt(base, 6)])
    with torch.no_grad():
        before = base.model(ids).logits
    sampling = Sampling(150, min_new_tokens=150)
    ticket = engine.submit(GenerationRequest(prompt(base, 9), make_lora(base, 1), "one", sampling))
    next(iter(ticket))
    for _ in range(5):
        with base.lock, torch.no_grad():
            time.sleep(0.01)
            assert torch.equal(base.model(ids).logits, before)
    assert ticket.total_s is None
    assert ticket.text() == answer(base, prompt(base, 9), make_lora(base, 1), sampling).text


def test_requests_go_on_between_the_blocks_of_a_text_that_is_read(base, engine):
    encoder = HiddenStatesEncoder(base.model, (4,), key_modules=["model.layers.2.self_attn.o_proj"], with_values=True,
                                  tokenizer=base.tokenizer)  # fmt: skip
    ids = torch.tensor([prompt(base, 100)] * 16)
    before, sampling = encoder(ids), Sampling(150, min_new_tokens=150)
    ticket = engine.submit(GenerationRequest(prompt(base, 9), make_lora(base, 1), "one", sampling))
    next(iter(ticket))
    with base.lock:
        n_steps = engine.stats().n_steps
        read = encoder(ids)
        assert engine.stats().n_steps > n_steps and ticket.total_s is None
    assert torch.equal(read.states, before.states) and torch.equal(read.keys, before.keys)
    assert ticket.text() == answer(base, prompt(base, 9), make_lora(base, 1), sampling).text


@pytest.mark.parametrize("has_lora", [True, False])
def test_threads_that_read_at_once_read_what_each_reads_alone(has_lora):
    """They give way to each other before every block, and their hooks and encoder LoRAs stay apart."""
    base = Base("own", make_model(), make_tokenizer())
    lora = stack([make_lora(base, 1)]) if has_lora else None
    encoder = HiddenStatesEncoder(
        base.model, (2,), True, key_modules=["model.layers.3.self_attn.o_proj"], tokenizer=base.tokenizer,
        lora=lambda: lora,
    )  # fmt: skip
    ids = [torch.tensor([prompt(base, 20 + i)]) for i in range(3)]
    expected = [encoder(one) for one in ids]
    start, same = threading.Barrier(3), []

    def read(i: int) -> None:
        start.wait(30)
        for _ in range(10):
            with base.lock:
                features = encoder(ids[i])
            same.append(torch.equal(features.states, expected[i].states))
            same.append(torch.equal(features.keys, expected[i].keys))

    threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert same == [True] * 60


def test_who_gives_way_has_the_lock_back_as_often_as_before(base):
    got, other = [], threading.Thread(target=lambda: base.lock.acquire() and (got.append(1), base.lock.release()))
    with base.lock, base.lock:
        base.lock.give_way()  # to nobody
        other.start()
        while not got:
            base.lock.give_way()
        assert base.lock.is_owned()
    assert not base.lock.is_owned()
    with pytest.raises(RuntimeError):
        base.lock.give_way()


def test_the_lock_goes_to_who_asked_first(base):
    got = []

    def take(i: int) -> None:
        with base.lock, base.lock:
            got.append(i)

    with base.lock:
        threads = []
        for i in range(4):
            threads.append(threading.Thread(target=take, args=(i,)))
            threads[-1].start()
            eventually(lambda i=i: len(base.lock._waiting) == i + 1)
        assert not got
        assert base.lock.is_owned()
    for thread in threads:
        thread.join()
    assert got == [0, 1, 2, 3]
    assert not base.lock.is_owned()
    with pytest.raises(RuntimeError):
        base.lock.release()


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


def test_a_stop_string_ends_an_answer(base, engine):
    whole = answer(base, prompt(base, 7), None, Sampling(30)).text
    stop = whole[len(whole) // 2 :][:3]
    ticket = engine.submit(GenerationRequest(prompt(base, 7), sampling=Sampling(30), stop=(stop,)))
    assert ticket.text() == whole[: whole.index(stop)].rstrip()
    assert ticket.finish == "stop"


@pytest.mark.base
@pytest.mark.usefixtures("one_embedded_base")
def test_documents_of_the_embedded_base_answer_as_they_do_alone(tmp_path):
    """With the shipped hypernetwork: the static LoRA is found and kept once, and so is each memory's B."""
    import loracast
    from loracast.reading.routing import routing_key

    model = loracast.load(library=tmp_path)
    texts = [
        "The harbour lantern was built in 1804. Its code is 4711. It weighs 35 kilograms.",
        "The museum kettle holds 1.7 litres of water. The service line is 205. It is open on Tuesday mornings.",
        "The old bridge over the river was painted green in 1950 by two brothers. The toll was three coins.",
    ]
    adapters = [model.learn(loracast.Document.from_text(text), str(i)) for i, text in enumerate(texts)]
    asked = [("What is the code of the lantern?", 0), ("What is the service line?", 1), ("Who painted the bridge?", 2)]
    engine, tickets, expected = LocalEngine(model.base), [], []
    for question, which in [*asked, ("What is the code?", None), *asked[1:]]:
        prepared = model.prepare(question, () if which is None else adapters[which], always=True)
        lora, key = model.lora_of(prepared.routed), routing_key(prepared.routed)
        tickets.append(engine.submit(GenerationRequest(prepared.prompt, lora, key, Sampling(16))))
        expected.append(answer(model.base, prepared.prompt, lora, Sampling(16)).text)
    assert [ticket.text() for ticket in tickets] == expected
    config = model.documents.hypernetwork.config
    packed = engine._packed(tickets[2].request)
    assert packed.shared.pairs.keys() >= {name for name, *_ in config.static_modules}
    assert packed.own.keys() == {name for name, *_ in config.memory_modules}
    assert len({packed.same_b[name] for name in packed.own}) == 1
    engine.close()
