"""The page in a real browser: learn, ask, compare, chat, keep the library; keyboard, phone, dark mode, hostile text."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from browser import Page, chromium
from loracast.documents import Document
from loracast.reading.routing import route_adapter
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings, keys_in
from servers import served

pytestmark = pytest.mark.browser

LAMP = (
    "# Lamp\n\nThe lamp on the desk was made in the north. Its cable is two metres long.\n\n"
    "## Warranty\n\nThe warranty of the lamp is 24 months. The service line opens at nine."
)
HOSTILE = (
    '<script>window.hacked = 1</script><img src="/page/none.png" onerror="window.hacked = 2"> &lt;b&gt;bold&lt;/b&gt;'
)
ENTER, ESCAPE, TAB, LEFT = "\ue007", "\ue00c", "\ue004", "\ue012"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def driver(folder):
    with chromium(folder) as driver:
        yield driver


@pytest.fixture
def page(driver, model, home):
    """The page of a server of the tiny base, whose library holds a document in several chunks and a short one."""
    model.learn(Document.from_text(LAMP, title="Lamp"), "lamp", max_chunk_tokens=32)
    model.learn(Document.from_text("The kettle holds 1.7 litres of water.", title="Kettle"), "kettle")
    with served(create_app(model, LocalEngine(model.base), ServerSettings())) as url:
        page = Page(driver, url)
        page.complaints()
        yield page


def choose(page: Page, *names: str) -> None:
    for name in names:
        page.one(f"#choices input[value='{name}']").click()


def ask(page: Page, question: str) -> None:
    page.one("#question").send_keys(question, ENTER)


def figures(page: Page, column: str) -> dict[str, str]:
    """The figures of a column, once its answer is whole."""

    def read():
        names = [one.text for one in page.all(f"#answer-{column} dt")]
        values = [one.text for one in page.all(f"#answer-{column} dd")]
        return dict(zip(names, values, strict=True)) if values and "–" not in values else None

    return page.until(read, f"the figures of {column}")


def tokens(text: str) -> int:
    return int(re.sub(r"\D", "", text))


# ---- learning


def test_a_file_is_learned_and_its_chunks_are_shown(page, folder):
    file = folder / "Fire Station.txt"
    file.write_text("The fire station opens at six. The engine is red.")
    page.open().one("#files").send_keys(str(file))
    page.one("#choices input[value='fire-station']:checked")
    page.until(lambda: "The engine is red." in page.text("#document"), "the chunks")
    assert page.text("#answer-adapter h2") == "fire-station"
    page.until(lambda: page.text("#jobs .note") == "done")
    assert not page.complaints()


def test_a_file_that_cannot_be_read_says_why_and_ends_nothing(page, folder):
    (folder / "empty.txt").write_text("")
    page.open().one("#files").send_keys(str(folder / "empty.txt"))
    page.until(lambda: "empty" in page.text("#jobs .failed .note"), "the fault")
    page.one("#jobs .failed button").click()
    assert not page.all("#jobs li")


def test_a_name_that_is_taken_can_be_replaced(page, folder, model):
    before = model.library.find("lamp").version
    (folder / "lamp.txt").write_text("The lamp is now made in the south.")
    page.open().one("#files").send_keys(str(folder / "lamp.txt"))
    page.until(lambda: [one for one in page.all("#jobs button") if one.text == "Replace it"], "the offer")[0].click()
    page.until(lambda: model.library.find("lamp").version != before, "the new version")


def test_a_task_is_cast_from_its_description_and_examples(page, model, hypernetwork):
    model._hypernetworks["task"] = hypernetwork
    page.open().one("#task").send_keys("Say the opposite.")
    page.one("#examples").send_keys("hot => cold\nbig =>")
    page.one("#task-form button").click()
    page.until(lambda: "write input => output" in page.text("main"), "what is wrong with the second line")
    page.one("#examples").send_keys(" small")
    page.one("#task-form button").click()
    page.one("#choices input[value='say-the-opposite']:checked")
    manifest = model.adapter("say-the-opposite").manifest
    assert (manifest.kind, manifest.title, manifest.n_examples) == ("task", "Say the opposite.", 2)
    assert not page.one("#examples").get_property("value") and not page.complaints()
    page.one("#task").send_keys("Say the opposite.")
    page.one("#examples").send_keys("hot => warm")
    page.one("#task-form button").click()
    page.until(lambda: [one for one in page.all("#jobs button") if one.text == "Replace it"], "the offer")
    assert page.one("#examples").get_property("value") == "hot => warm"  # what was typed is not lost


# ---- asking


def test_three_answers_stream_side_by_side_with_their_costs(page):
    choose(page.open(), "lamp")
    ask(page, "How long is the warranty of the lamp?")
    costs = {column: figures(page, column) for column in ("adapter", "base", "window")}
    assert all(page.text(f"#answer-{column} .answer") for column in costs)
    assert costs["adapter"]["Prompt"] == costs["base"]["Prompt"]  # the question alone
    assert tokens(costs["window"]["Prompt"]) > tokens(costs["base"]["Prompt"]) + 40
    boxes = [page.one(f"#answer-{column}").rect for column in costs]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    counted = [tokens(one.text) for one in page.all("#cost dd.number")]
    assert counted == [tokens(costs["adapter"]["Prompt"]), tokens(costs["window"]["Prompt"])]
    assert not page.complaints()


def test_the_chunks_and_sentences_of_an_answer_are_highlighted(page, model):
    choose(page.open(), "lamp")
    page.until(lambda: "service line" in page.text("#document"), "the document")
    assert not page.all("#document mark")
    ask(page, "How long is the warranty of the lamp?")
    best = page.until(lambda: page.all("#document mark"), "marks")
    marked = [mark.get_property("textContent").strip() for mark in best]
    assert "The warranty of the lamp is 24 months." in marked
    # exactly the chunks that the model itself would take
    route = route_adapter(model.adapter("lamp"), "How long is the warranty of the lamp?")
    used = {int(one.get_attribute("data-number")) - 1 for one in page.all("#document .chunk.used")}
    assert used == set(route.chunks)


def test_columns_can_be_left_out_and_nothing_chosen_asks_the_base(page):
    page.open().one("#with-window").click()
    ask(page, "What is it?")
    figures(page, "base")
    assert not page.text("#answer-adapter .answer") and not page.text("#answer-window .answer")
    assert page.all("#cost[hidden]")  # no document was spared


def test_an_error_of_the_server_is_a_sentence_in_its_column(page, model):

    choose(page.open(), "lamp")
    model.library.remove("lamp")
    ask(page, "How long is the warranty?")
    page.until(lambda: "does not exist" in page.text("#answer-adapter .note"), "the error")
    assert page.text("#answer-adapter .note")[0].isupper()
    assert figures(page, "base")["Prompt"]


def test_all_documents_answer_and_those_that_match_are_shown(page):
    choose(page.open(), "*")
    ask(page, "How much water does the kettle hold?")
    figures(page, "adapter")
    page.until(lambda: "1.7 litres" in page.text("#document"), "the kettle")
    assert "north" not in page.text("#document")


# ---- hostile text


def test_text_of_documents_is_never_run(page, model):
    model.learn(Document.from_text(f"{HOSTILE} The code is 4711.", title=HOSTILE), "bad")
    choose(page.open(), "bad")
    ask(page, "What is the code?")
    page.until(lambda: page.all("#document .chunk.used"), "the chunk")
    assert HOSTILE in page.text("#document")
    page.driver.get(f"{page.url}/#library")
    page.until(lambda: HOSTILE in page.text("#library-table"), "the title")
    assert page.script("return window.hacked") is None
    assert page.script("return document.images.length + document.querySelectorAll('main script').length") == 0
    assert not [one for one in page.complaints() if "none.png" in one or "Policy" in one]


def test_text_of_models_and_errors_is_never_run(page):
    page.open()
    page.one("#choices input")
    page.script(
        """const real = window.fetch, text = arguments[0];
        window.fetch = (path, options) => {
          if (!String(path).includes("completions")) return real(path, options);
          if (options.body.includes("fail"))
            return Promise.resolve(Response.json({ error: { message: text } }, { status: 400 }));
          const chunk = { choices: [{ delta: { content: text } }], usage: { prompt_tokens: 1, completion_tokens: 1 } };
          return Promise.resolve(new Response(`data: ${JSON.stringify(chunk)}\\n\\ndata: [DONE]\\n\\n`));
        };""",
        HOSTILE,
    )
    ask(page, "hello")
    page.until(lambda: page.text("#answer-base .answer") == HOSTILE, "the answer")
    page.one("#question").clear()
    ask(page, "fail")
    page.until(lambda: HOSTILE[:20] in page.text("#answer-base .note"), "the error")
    assert page.script("return window.hacked") is None
    assert page.script("return document.images.length") == 0


# ---- the library


def test_the_library_is_searched_tagged_and_filtered(page, model):
    page.open("library")
    rows = lambda: [row.text for row in page.all("#library-table tbody button.link")]  # noqa: E731
    page.until(lambda: rows() == ["kettle", "lamp"], "the table")
    page.one("#library-table tbody tr:nth-child(2) button.link").click()
    page.one("#details .joined input").send_keys("desk", ENTER)
    page.until(lambda: model.library.find("lamp").tags == ("desk",), "the tag")
    page.until(lambda: page.all("#library-tag option[value=desk]"), "the filter")[0].click()
    page.until(lambda: rows() == ["lamp"], "the filtered table")
    page.one("#details .chips button").click()
    page.until(lambda: model.library.find("lamp").tags == (), "no tag")
    page.one("#library-search").send_keys("kett")
    page.until(lambda: rows() == ["kettle"], "what was searched")
    assert not page.complaints()


def test_an_adapter_goes_only_when_that_is_confirmed(page, model):
    page.open("library").one("#library-table tbody button.link").click()
    for answer, left in (("cancel", ["kettle", "lamp"]), ("yes", ["lamp"])):
        page.one("#details button.danger").click()
        assert page.text("#confirm-title") == "Delete kettle?"
        page.one(f"#confirm button[value={answer}]").click()
        page.until(lambda left=left: model.library.names() == left, str(left))
    page.until(lambda: len(page.all("#library-table tbody tr")) == 1, "the table")


def test_adapters_are_combined_with_the_weights_of_the_sliders(page, model):
    page.open("library").one("#library-table tbody tr")
    for box in page.all("#library-table tbody input"):
        box.click()
    page.one("#combine input[type=range]").send_keys(LEFT * 3)  # left: three tenths less
    page.one("#combine-name").send_keys("both", ENTER)
    page.until(lambda: "both" in model.library.names(), "the combination")
    assert model.adapter("both").manifest.title == "kettle:0.7 + lamp"


def test_an_adapter_is_exported_as_a_file(page, folder):
    page.open("library").one("#library-table tbody button.link").click()
    page.one("#details select option[value=peft]").click()
    [button] = [one for one in page.all("#details button") if one.text == "Export"]
    button.click()
    file = folder / "downloads" / "kettle-peft.zip"
    page.until(file.exists, "the download")
    assert "adapter_model.safetensors" in " ".join(zipfile.ZipFile(file).namelist())


def test_versions_are_listed_newest_first(page, model):
    model.learn(Document.from_text("The kettle holds two litres."), "kettle", replace=True)
    page.open("library").one("#library-table tbody button.link").click()
    shown = page.until(lambda: [one.text for one in page.all("#details .versions code")], "versions")
    assert len(shown) == 2 and model.library.find("kettle").version.startswith(shown[0])


def test_watched_folders_are_listed_with_what_failed(driver, model, home, tmp_path):
    watched = tmp_path / "papers"
    watched.mkdir()
    (watched / "note.txt").write_text("The note says 17.")
    (watched / "empty.txt").write_text("")
    with served(create_app(model, LocalEngine(model.base), ServerSettings(watched=(watched,)))) as url:
        page = Page(driver, url)

        def shown():
            text = page.open("library").text("#watched")
            return "1 document" in text and "1 file failed" in text and "empty.txt" in text

        page.until(shown, "the watched folder")


# ---- chat


def test_a_chat_sends_its_history_and_survives_a_reload(page):
    page.open("chat")
    page.script(
        """const real = window.fetch; window.sent = [];
        window.fetch = (path, options) => {
          if (!String(path).includes("completions")) return real(path, options);
          const body = { ...JSON.parse(options.body), max_tokens: 8 }; // the tiny base's window is soon full
          window.sent.push(body);
          return real(path, { ...options, body: JSON.stringify(body) });
        };"""
    )
    for number, text in enumerate(("The lamp is mine.", "Whose is the lamp?"), 1):
        page.one("#message").send_keys(text, ENTER)
        notes = page.until(lambda n=number: len(page.all("#messages .assistant")) == n and page.all("#messages .note"))
        page.until(lambda notes=notes: "prompt tokens" in notes[-1].get_property("textContent"), "the reply's note")
    first, second = page.script("return window.sent")
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0] == {"role": "user", "content": "The lamp is mine."}
    page.driver.refresh()
    page.until(lambda: len(page.all("#messages .user")) == 2, "the history")
    page.one("#new-chat").click()
    assert not page.all("#messages .user")


def test_a_memory_is_named_shown_and_forgotten(page, model):
    page.open("chat").one("#memory").send_keys("me", TAB)
    page.one("#message").send_keys("My kettle is called Bella.", ENTER)
    page.until(lambda: model.memory("me").messages() == ["My kettle is called Bella."], "the memory")
    page.one("#remembered summary").click()
    page.until(lambda: "Bella" in page.text("#messages-remembered"), "the message")
    page.one("#messages-remembered button").click()
    page.until(lambda: model.memory("me").messages() == [], "nothing")
    page.until(lambda: page.text("#messages-remembered") == "Nothing yet.")


# ---- keys, small screens, the dark, and those who do not see


def test_a_key_is_asked_for_once_and_sent(driver, model, home):
    secret = "sk-admin-0123456789"
    with served(create_app(model, LocalEngine(model.base), ServerSettings(keys=keys_in(f"admin:{secret}")))) as url:
        page = Page(driver, url).open()
        page.until(lambda: page.all("#key-dialog[open]"), "the dialog")
        page.one("#key").send_keys(secret, ENTER)
        page.until(lambda: model.base.name.rpartition("/")[2] in page.text("#server"), "the server's base")
        assert not page.all("#key-dialog[open]")


def test_everything_can_be_done_from_the_keyboard(page):
    page.open().one("#choices input")
    body = page.one("body")
    body.send_keys(TAB)  # Tab: the first stop leads past the navigation
    assert page.script("return document.activeElement.className") == "skip"
    page.script("document.activeElement.blur()")
    body.send_keys("/")
    active = page.driver.switch_to.active_element
    assert active.get_attribute("id") == "question" and active.get_property("value") == ""
    outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    ask(page, "Tell me everything")
    figures(page, "base")


def test_escape_stops_the_answers(page):
    choose(page.open(), "lamp")
    page.script(
        """window.fetch = (path, { signal }) => new Promise((resolve, reject) =>
          signal.addEventListener("abort", () => reject(new DOMException("", "AbortError"))));"""
    )
    ask(page, "Tell me everything")
    page.one("#answer-adapter.waits")
    page.one("#question").send_keys(ESCAPE)
    page.until(lambda: page.text("#answer-adapter .note") == "Stopped.", "the end")


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (800, False), (1280, True)])
def test_every_view_is_readable_and_named(page, model, width, dark):
    model.library.describe("lamp", tags=["desk", "home"])
    page.open(width=width, dark=dark)
    if width < 960:
        page.one("#fold summary").click()
    choose(page, "lamp")
    ask(page, "How long is the warranty of the lamp?")
    page.until(lambda: page.all("#document mark"), "marks")
    figures(page, "window")
    assert page.faults() == []
    page.driver.get(f"{page.url}/#library")
    page.one("#library-table tbody button.link").click()
    for box in page.all("#library-table tbody input"):
        box.click()
    page.one("#details h2")
    assert page.faults() == []
    page.one("#details button.danger").click()
    assert page.faults() == []
    page.one("#confirm button[value=cancel]").click()
    page.driver.get(f"{page.url}/#chat")
    page.one("#message").send_keys("Hello", ENTER)
    page.until(lambda: "prompt tokens" in page.text("#messages .assistant .note"), "the reply")
    assert page.faults() == []
    shade = [int(n) for n in re.findall(r"\d+", page.script("return getComputedStyle(document.body).backgroundColor"))]
    assert (max(shade) < 64) is dark


def test_streams_are_told_to_screen_readers(page):
    page.open()
    for selector in ("#answer-adapter .answer", "#messages", "#jobs"):
        assert page.one(selector).get_attribute("aria-live") == "polite"
    assert page.one("#problem").get_attribute("role") == "alert"
    assert {one.tag_name for one in page.all("header, nav, main, aside")} == {"header", "nav", "main", "aside"}
