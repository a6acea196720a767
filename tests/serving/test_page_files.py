"""The page's files: what is sent, under which headers, and what no file of it may do."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import loracast.serving
from loracast.serving.errors import add_handlers
from loracast.serving.routes import server

FOLDER = Path(loracast.serving.__file__).parent / "page"
MODULES = sorted(FOLDER.glob("*.js"))


@pytest.fixture(scope="module")
def api() -> TestClient:
    app = FastAPI()
    add_handlers(app)
    app.include_router(server.router)
    return TestClient(app)


class Index(HTMLParser):
    """The elements of index.html with their attributes."""

    def __init__(self):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.lasttag = ""
        self.feed((FOLDER / "index.html").read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and data.strip():
            self.scripts.append(data)


def test_every_file_is_sent_with_its_type_and_the_policy(api):
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    paths = [path for path in FOLDER.iterdir() if path.is_file()]
    assert {path.suffix for path in paths} == set(kinds)
    for path in paths:
        answer = api.get(f"/page/{path.name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].startswith(kinds[path.suffix])
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        assert set(policy.values()) <= {"'self'", "'none'"}  # nothing inline, nothing from elsewhere
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert api.get("/").content == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize("name", ["nothing.js", "..%2f__init__.py", "%2e%2e/app.py", "index.html%00"])
def test_nothing_else_can_be_read(api, name):
    assert api.get(f"/page/{name}").status_code == 404


def test_a_browser_keeps_its_copy_until_the_file_changes(api):
    first = api.get("/page/main.js")
    again = api.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert api.get("/page/main.js", headers={"If-None-Match": '"0"'}).content == first.content


def test_the_page_loads_only_its_own_files_and_holds_no_script():
    index = Index()
    assert not index.scripts
    for tag, attributes in index.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            if (value := attributes.get(name)) is not None and not value.startswith("#"):
                assert (FOLDER / value.removeprefix("page/")).is_file(), (tag, value)


def test_every_module_that_is_imported_is_there():
    imported = [
        (module.name, name) for module in MODULES for name in re.findall(r'from "\./([\w.]+)"', module.read_text())
    ]
    assert len(imported) >= len(MODULES) - 1  # all but one are imported by another
    for module, name in imported:
        assert (FOLDER / name).is_file(), (module, name)


def test_no_module_parses_text_as_html_or_code():
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|setAttribute\(\"on|srcdoc"
    for module in MODULES:
        assert not re.search(unsafe, module.read_text()), module.name


def test_modules_are_short():
    assert all(len(path.read_text().splitlines()) < 400 for path in FOLDER.iterdir())
