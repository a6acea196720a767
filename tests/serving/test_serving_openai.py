"""OpenAI's own client against a real server: names, sampling, streams, usage, errors."""

from __future__ import annotations

import httpx
import openai
import pytest

from loracast.answering.answers import NOT_SAID
from loracast.base.generate import Sampling
from loracast.documents import Document
from loracast.library.manifest import MANIFEST
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.resolve import in_window
from loracast.serving.settings import ServerSettings
from servers import in_process, served
from tiny import answer

pytestmark = pytest.mark.usefixtures("no_copying")

WARRANTY = "How long is the warranty of the kettle?"
ELSEWHERE = "Who painted the ceiling of the chapel in Rome, Ingrid?"


@pytest.fixture(scope="module")
def server(filled):
    """The model of a server, and OpenAI's client of it."""
    with served(create_app(filled, LocalEngine(filled.base), ServerSettings(max_tokens=256))) as url:
        yield filled, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def model(server):
    return server[0]


@pytest.fixture
def client(server):
    return server[1]


def chat(client, model, question=WARRANTY, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 12, **options})


def extra(**fields):
    return {"extra_body": fields}


def text(answer) -> str:
    return answer.choices[0].message.content


def asked(model, adapter=(), question=WARRANTY, **options) -> str:
    return model.ask(question, adapter, sampling=Sampling(12), **options)


# ---- which adapters answer


def test_models_lists_the_base_and_its_adapters_as_vllm_does(model, client):
    listed = {one.id: one for one in client.models.list()}
    base = next(id for id, one in listed.items() if one.parent is None)
    assert listed.keys() == {base, "manual", "museum", "shout"}
    assert base == model.base.name.rpartition("/")[2]
    assert listed[base].root == base
    assert listed["manual"].parent == base
    assert listed["manual"].root == model.adapter("manual").version
    assert all(one.max_model_len == model.base.window for one in listed.values())
    for name in ("manual", f"{base}:manual", model.adapter("manual").version):
        found = client.models.retrieve(name)
        assert (found.id, found.root, found.parent) == (name, model.adapter("manual").version, base)


def test_an_adapter_that_cannot_be_read_is_left_out_of_the_models(model, client, caplog):
    made = model.learn(Document.from_text("The lamp burns oil."), "lamp")
    manifest = made.folder / MANIFEST
    whole = manifest.read_bytes()
    try:
        manifest.write_bytes(whole[:100])
        assert {one.id for one in client.models.list()} >= {"manual", "shout"}
        assert "lamp is left out of the models" in caplog.text
        assert "lamp" not in {one.id for one in client.models.list()}
        manifest.write_bytes(whole)
        assert "lamp" in {one.id for one in client.models.list()}
    finally:
        model.library.remove("lamp")


def test_an_answer_is_that_of_ask(model, client):
    base = model.base.name.rpartition("/")[2]
    version = model.adapter("manual").version
    for name in ("manual", f"{base}:manual", version, f"{base}:{version}"):
        assert text(chat(client, name)) == asked(model, "manual")
    assert text(chat(client, base)) == asked(model)
    assert text(chat(client, "manual+shout")) == asked(model, ["manual", "shout"])
    assert len({asked(model, "manual"), asked(model), asked(model, ["manual", "shout"])}) == 3


def test_adapters_of_the_body_are_added_and_scaled(model, client):
    base = model.base.name.rpartition("/")[2]
    parts = [{"id": "manual", "scale": 1}, {"id": "shout"}]
    assert text(chat(client, base, **extra(adapters=parts))) == asked(model, ["manual", "shout"])
    assert text(chat(client, "manual", **extra(adapters=[{"id": "shout", "scale": 0}]))) == asked(model, "manual")
    silent = chat(client, base, **extra(adapters=[{"id": "manual", "scale": 0}], strict=True))
    assert (text(silent), silent.loracast["sources"]) == (NOT_SAID, [])
    assert silent.loracast["answered_by"] == ["refusal"] and chat(client, base).loracast["answered_by"] == ["base"]
    half = chat(client, "shout", **extra(adapters=[{"id": "manual", "scale": -0.5}]))
    prepared = model.prepare(WARRANTY, ["shout", "manual"], scales={model.adapter("manual").manifest.version: -0.5})
    wanted = answer(model.base, prepared.prompt, model.lora_of(prepared.routed), Sampling(12))
    assert text(half) == wanted.text
    assert [(one["id"].partition("@")[0], one["scale"]) for one in half.loracast["adapters"]] == [
        ("shout", 1),
        ("manual", -0.5),
    ]


def test_routing_goes_by_the_fields_of_the_request(model, client):
    for options in ({"route": 1}, {"route": None}, {"always": True}):
        answer = chat(client, "manual", ELSEWHERE, **extra(**options))
        assert text(answer) == asked(model, "manual", ELSEWHERE, **options)
    base = model.base.name.rpartition("/")[2]
    opening = "When does the museum open?"
    for name, tag in ((base, "town"), ("m*", ""), ("*", "town")):
        answer = chat(client, name, opening, **extra(tag=tag))
        assert text(answer) == asked(model, () if name == base else name, opening, tag=tag)
        assert {source["adapter"] for source in answer.loracast["sources"]} == {"museum"}


def test_a_question_about_something_else_is_answered_by_the_base_and_the_answer_says_so(model, client):
    answer = chat(client, "manual", ELSEWHERE)
    assert text(answer) == asked(model, (), ELSEWHERE)
    (used,) = answer.loracast["adapters"]
    assert not used["is_used"] and "no word of the question" in used["reason"]
    assert answer.loracast["sources"] == [] and answer.choices[0].message.annotations == []


def test_an_answer_cites_the_chunks_that_it_came_from(model, client):
    answer = chat(client, "manual")
    wanted = model.answer(WARRANTY, "manual", sampling=Sampling(12)).sources
    assert [(one["adapter"], one["chunk"]) for one in answer.loracast["sources"]] == [
        (one.adapter, one.chunk) for one in wanted
    ]
    cited = answer.choices[0].message.annotations
    assert [(one.type, one.chunk, one.start, one.index) for one in cited] == [
        ("file_citation", one.chunk, one.start, len(text(answer))) for one in wanted
    ]


@pytest.mark.parametrize(
    "name",
    ["nothing", "manual@0000", "other-base:manual", "manual+nothing", "manual+", "", "../manual", "/etc/passwd",
     "%2e%2e", "Manual", "🙂", "a" * 10_000, "nothing-*", "manual@", "manual:", "m\x00"],
)  # fmt: skip
def test_an_unknown_model_is_404_and_never_the_base(client, name):
    for create in (
        lambda: chat(client, name),
        lambda: client.completions.create(model=name, prompt="The lamp"),
        lambda: chat(client, "manual", **extra(adapters=[{"id": name}])),
        lambda: client.responses.create(model=name, input="Where?"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            create()
        assert error.value.code == "model_not_found"
        assert error.value.type == "invalid_request_error"
        assert len(error.value.message) < 500


# ---- how tokens are chosen


def test_a_stream_has_the_pieces_of_the_answer_and_its_cost(model, client):
    whole = chat(client, "manual", max_tokens=30)
    chunks = list(chat(client, "manual", max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert chunks[-1].loracast["sources"] == whole.loracast["sources"] != []
    assert len({chunk.id for chunk in chunks}) == 1
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 3


def test_usage_counts_the_tokens_of_prompt_and_answer(model, client):
    answer = chat(client, "manual")
    wanted = model.answer(WARRANTY, "manual", sampling=Sampling(12))
    assert answer.usage.prompt_tokens == wanted.n_prompt_tokens
    assert answer.usage.completion_tokens == wanted.n_tokens
    assert answer.usage.total_tokens == wanted.n_prompt_tokens + wanted.n_tokens
    assert 0 <= answer.usage.prompt_tokens_details.cached_tokens < wanted.n_prompt_tokens
    again = chat(client, "manual")
    assert again.usage.prompt_tokens_details.cached_tokens == wanted.n_prompt_tokens - 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_ends_the_answer_before_the_text(client, is_streamed):
    whole = text(chat(client, "manual", max_tokens=40))
    stop = whole[9:12]
    if is_streamed:
        chunks = list(chat(client, "manual", max_tokens=40, stop=[stop, "never this"], stream=True))
        given = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = chat(client, "manual", max_tokens=40, stop=stop)
        given, finish = text(answer), answer.choices[0].finish_reason
    assert given == whole[: whole.find(stop)].rstrip()
    assert finish == "stop"


def test_max_tokens_under_either_name_cuts_the_answer(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model="manual", messages=[{"role": "user", "content": WARRANTY}], **{name: 3}
        )
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"


def test_a_seed_repeats_a_draw_and_other_seeds_differ(client):
    def drawn(seed):
        return text(chat(client, "manual", temperature=1.5, top_p=0.9, seed=seed))

    assert drawn(7) == drawn(7)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert text(chat(client, "manual", temperature=1e-40)) == text(chat(client, "manual"))


def test_n_answers_differ_when_they_are_drawn_and_agree_when_they_are_not(client):
    likeliest = chat(client, "manual", n=3)
    assert [choice.index for choice in likeliest.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in likeliest.choices}) == 1
    drawn = chat(client, "manual", n=3, temperature=1.5, seed=1)
    assert len({choice.message.content for choice in drawn.choices}) > 1
    assert drawn.usage.completion_tokens == 36
    pieces = {0: "", 1: "", 2: ""}
    for chunk in chat(client, "manual", n=3, temperature=1.5, seed=1, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(pieces.values()) == [choice.message.content for choice in drawn.choices]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_are_those_of_the_base(model, client, is_streamed):
    given = chat(client, "manual", max_tokens=5, logprobs=True, top_logprobs=3, stream=is_streamed)
    if is_streamed:
        shown = [one for chunk in given for one in (chunk.choices[0].logprobs or _NONE).content or ()]
    else:
        shown = given.choices[0].logprobs.content
    assert len(shown) == 5
    for one in shown:
        assert one.logprob == one.top_logprobs[0].logprob <= 0  # the likeliest was taken
        assert len(one.top_logprobs) == 3
        assert bytes(one.bytes).decode() == one.token
    lora, _ = model.lora_for(WARRANTY, "manual")
    with lora.applied(model.base.model):
        import torch

        prompt = model.prepare(WARRANTY, "manual").prompt
        logits = model.base.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert shown[0].logprob == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


class _NONE:
    content = None


def test_text_parts_and_a_developer_turn_are_read_as_text(model, client):
    parts = [{"type": "text", "text": "How long is the warranty"}, {"type": "text", "text": "of the kettle?"}]
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    given = client.chat.completions.create(model="manual", messages=turns, max_tokens=12)
    joined = "How long is the warranty\nof the kettle?"
    assert text(given) == asked(model, "manual", joined, system="Be brief.")


def test_an_answer_can_be_sent_back_as_a_turn(client):
    first = chat(client, "manual").choices[0].message
    turns = [{"role": "user", "content": WARRANTY}, first, {"role": "user", "content": "And who built the bridge?"}]
    assert client.chat.completions.create(model="manual", messages=turns, max_tokens=4).choices[0].message.role


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 0.5}, {"presence_penalty": 1}, {"logit_bias": {"5": 100}}, {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, {"tool_choice": "required"},
        {"modalities": ["text", "audio"]}, {"store": True}, {"reasoning_effort": "low"}, {"n": 9}, {"n": 16384}, {"n": 0},
        {"max_tokens": 257}, {"max_tokens": -1}, {"max_tokens": 2**80}, {"temperature": 3}, {"temperature": -0.1},
        {"top_p": 1.5}, {"seed": 2**63}, {"stop": ["a"] * 5}, {"stop": ""}, {"top_logprobs": 21},
    ],
)  # fmt: skip
def test_what_is_not_supported_or_out_of_bounds_is_refused_clearly(client, options):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, "manual", **options)
    assert error.value.type == "invalid_request_error"
    assert [error.value.param] == list(options) and error.value.message


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("route", {"route": 0}), ("model", {"adapters": [{"id": "manual"}]}), ("nonsense", {"nonsense": 1}),
        ("adapters.0.scale", {"adapters": [{"id": "shout", "scale": 1e30}]}), ("temperature", {"temperature": "0.5"}),
        ("model", {"adapters": [{"id": f"a{i}"} for i in range(9)]}), ("model", {"tag": "village"}),
    ],
)  # fmt: skip
def test_fields_of_this_server_are_refused_as_clearly(client, param, fields):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        chat(client, "manual", **extra(**fields))
    assert (error.value.type, error.value.param) == ("invalid_request_error", param)
    assert error.value.message


@pytest.mark.parametrize(
    ("param", "messages"),
    [
        ("messages", []),
        (None, [{"role": "assistant", "content": "Hello"}]),
        ("messages.0.role", [{"role": "tool", "content": "4", "tool_call_id": "1"}]),
        (
            "messages.0.content.0.type",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
        ),
        ("messages.0.content", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": "word " * 600}]),
    ],
)
def test_messages_that_cannot_be_answered_are_refused(client, param, messages):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="manual", messages=messages)
    is_too_long = "word " * 600 in str(messages)
    assert (error.value.param, error.value.code) == (param, "context_length_exceeded" if is_too_long else None)


def test_parameters_that_change_nothing_are_taken(model, client):
    options = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "user": "me", "n": 1}
    options |= {"metadata": {"a": "b"}, "response_format": {"type": "text"}, "store": False, "service_tier": "auto"}
    assert text(chat(client, "manual", **options)) == asked(model, "manual")


# ---- completions


def test_a_completion_continues_the_prompt_as_it_stands(model, client):
    prompt = "The warranty of the kettle is"
    given = client.completions.create(model="manual", prompt=prompt, max_tokens=8)
    ids = model.base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert given.usage.prompt_tokens == len(ids)
    lora, _ = model.lora_for(prompt, "manual")
    wanted = answer(model.base, ids, lora, Sampling(8))
    assert given.choices[0].text.strip() == wanted.text
    as_ids = client.completions.create(model="manual", prompt=ids, max_tokens=8)
    assert as_ids.choices[0].text == given.choices[0].text
    streamed = client.completions.create(model="manual", prompt=prompt, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == given.choices[0].text


def test_several_prompts_have_their_answers_in_order(client):
    prompts = ["The museum opens", "The kettle holds"]
    both = client.completions.create(model="manual", prompt=prompts, n=2, max_tokens=6)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(model="manual", prompt=prompt, max_tokens=6)
        assert both.choices[2 * i].text == both.choices[2 * i + 1].text == alone.choices[0].text


def test_completions_tell_logprobs_in_their_own_form(client):
    shown = client.completions.create(model="manual", prompt="The lamp", max_tokens=4, logprobs=2).choices[0].logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset) == 4
    assert shown.text_offset[0] == 0
    for token, logprob, top in zip(shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True):
        assert top[token] == logprob


@pytest.mark.parametrize(
    ("param", "options"),
    [(None, {"prompt": ""}), ("prompt", {"prompt": []}), ("prompt", {"prompt": [10**9]}), ("prompt", {"prompt": [-1]}),
     ("echo", {"echo": True}), ("suffix", {"suffix": "x"}), ("best_of", {"best_of": 2}), ("n", {"prompt": ["x"] * 9}), ("n", {"prompt": ["x"] * 3, "n": 3})],
)  # fmt: skip
def test_completions_refuse_what_they_cannot_do(client, param, options):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "manual", "prompt": "The lamp", "max_tokens": 2, **options})
    assert error.value.param == param


def test_texts_stand_in_the_prompt_where_window_names_their_adapters(model, client):
    base = client.models.list().data[0].id
    answer = chat(client, base, **extra(window=["manual"]))
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": WARRANTY}]
    whole = in_window(model.base, [model.adapter("manual")], turns, 12, 10_000)
    assert answer.usage.prompt_tokens == len(model.base.chat.conversation(whole.messages))
    assert text(answer) == asked(model, question=whole.messages)
    assert answer.loracast["window"] == {"n_tokens": whole.n_tokens, "n_shown": whole.n_tokens}
    with pytest.raises(openai.BadRequestError, match="name the base as model"):
        chat(client, "museum", **extra(window=["manual"]))


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", lambda said: {"messages": [{"role": "user", "content": said}]}),
        ("/v1/completions", lambda said: {"prompt": said}),
    ],
)
def test_a_prompt_beyond_the_servers_limit_is_refused(model, path, prompt):
    api = in_process(model, max_prompt_tokens=30)
    answers = [api.post(path, json={"model": "manual", "max_tokens": 2, **prompt("lamp " * n)}) for n in (1, 40)]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert answers[1].json()["error"]["code"] == "context_length_exceeded"


# ---- responses


def test_a_response_is_the_answer_of_ask_with_its_sources(model, client):
    given = client.responses.create(model="manual", input=WARRANTY, max_output_tokens=12, metadata={"a": "b"})
    assert given.output_text == asked(model, "manual")
    assert (given.status, given.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert given.metadata == {"a": "b"}
    body = '{"model": "manual", "input": "?", "metadata": {"a": "\\ud83d"}}'
    headers = {"Content-Type": "application/json"}
    refused = httpx.post(f"{client.base_url}responses", content=body, headers=headers)
    assert refused.status_code == 400 and "not valid Unicode" in refused.text
    continued = client.completions.create(model="manual", prompt="What is this document about?", max_tokens=4)
    assert continued.usage.completion_tokens == 4 and "no model was asked" not in continued.choices[0].text
    wanted = model.answer(WARRANTY, "manual", sampling=Sampling(12))
    assert (given.usage.input_tokens, given.usage.output_tokens) == (wanted.n_prompt_tokens, wanted.n_tokens)
    (message,) = given.output
    cited = message.content[0].annotations
    assert [(one.type, one.file_id, one.chunk) for one in cited] == [
        ("file_citation", model.adapter("manual").version, one.chunk) for one in wanted.sources
    ]


def test_a_response_takes_turns_and_instructions(model, client):
    first = client.responses.create(model="manual", input=WARRANTY, max_output_tokens=6)
    turns = [{"role": "user", "content": WARRANTY}, *first.output, {"role": "user", "content": "Who built the bridge?"}]
    given = client.responses.create(model="manual", input=turns, instructions="Be brief.", max_output_tokens=8)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": WARRANTY},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Who built the bridge?"},
    ]
    assert given.output_text == model.ask(messages, "manual", sampling=Sampling(8))


def test_a_streamed_response_has_the_events_of_openai(client):
    whole = client.responses.create(model="manual", input=WARRANTY, max_output_tokens=20)
    events = list(client.responses.create(model="manual", input=WARRANTY, max_output_tokens=20, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "output_text.annotation.added", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text and len(pieces) > 3
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 20
    with client.responses.stream(model="manual", input=WARRANTY, max_output_tokens=20) as stream:
        assert [event.snapshot for event in stream if event.type == "response.output_text.delta"][-1]


def test_a_response_can_tell_logprobs(client):
    given = client.responses.create(
        model="manual", input=WARRANTY, max_output_tokens=3, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    shown = given.output[0].content[0].logprobs
    assert [len(one.top_logprobs) for one in shown] == [2, 2, 2]
    assert all(one.logprob == one.top_logprobs[0].logprob for one in shown)


@pytest.mark.parametrize(
    "options",
    [{"previous_response_id": "resp_1"}, {"background": True}, {"truncation": "auto"}, {"tools": [{"type": "web_search"}]},
     {"reasoning": {"effort": "low"}}, {"text": {"format": {"type": "json_object"}}}, {"conversation": "conv_1"},
     {"tools": [{"type": "file_search", "vector_store_ids": []}]}, {"include": ["reasoning.encrypted_content"]}],
)  # fmt: skip
def test_a_response_refuses_what_is_not_supported(client, options):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="manual", input="Where?", **options)
    assert [error.value.param.partition(".")[0]] == list(options)


def test_file_search_answers_from_a_vector_store_and_cites_its_files(model, client):
    store = client.vector_stores.create(name="manuals")
    texts = {
        "tent.txt": b"The tent of the Orla sleeps four people. It weighs 6 kg.",
        "stove.txt": b"The stove of the Brix burns for three hours. Its tank holds half a litre.",
    }
    files = {}
    for name, content in texts.items():
        attached = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(name, content))
        assert attached.status == "completed", attached.last_error
        files[name] = attached.id
    tool = {"type": "file_search", "vector_store_ids": [store.id]}
    base = client.models.list().data[0].id
    question = "How many hours does the stove of the Brix burn?"
    options = {"model": base, "input": question, "max_output_tokens": 8, "tools": [tool]}
    given = client.responses.create(**options, include=["file_search_call.results"])
    search, message = given.output
    assert search.type == "file_search_call" and search.queries == [question]
    assert {one.file_id for one in search.results} == {files["stove.txt"]}
    assert "three hours" in search.results[0].text
    assert {(one.file_id, one.filename) for one in message.content[0].annotations} == {
        (files["stove.txt"], "stove.txt")
    }
    (name,) = {one["adapter"] for one in given.loracast["sources"]}
    assert given.output_text == model.ask(question, name, sampling=Sampling(8))
    turns = [{"role": "user", "content": question}, *given.output, {"role": "user", "content": "How big is its tank?"}]
    assert client.responses.create(**{**options, "input": turns}).output[0].queries == ["How big is its tank?"]
    kinds = [event.type for event in client.responses.create(**options, stream=True)]
    assert "response.file_search_call.completed" in kinds and kinds[-1] == "response.incomplete"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**options, "tools": [{**tool, "vector_store_ids": ["vs_none"]}]})


def test_a_strict_answer_comes_from_the_document(client):
    shown = chat(client, "manual").choices[0].message
    strict = {"extra_body": {"strict": True}}
    pieces = [one.choices[0].delta.content or "" for one in chat(client, "manual", stream=True, **strict)]
    given = chat(client, "manual", **strict).choices[0]
    assert "".join(pieces) == given.message.content == shown.content and given.logprobs is None
    assert given.message.annotations == shown.annotations != []
