"""Hooks of mkdocs: pages of the repository's root and the tutorial's notebook become pages, and links keep working."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
"""Files of the repository that are pages of the site, beside docs/*.md, and what they are called there."""


def on_files(files, config):
    """Add the pages that are no Markdown files of docs."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text()
        if name.endswith(".ipynb"):
            text = "\n\n".join(map(cell_text, json.loads(text)["cells"]))
        files.append(File.generated(config, page, content=text))
    return files


def cell_text(cell):
    """A cell of a notebook as Markdown, with what it printed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    printed = "".join(line for output in cell["outputs"] for line in output["text"])
    return f"```python\n{source}\n```" + f"\n\n```text\n{printed}```" * bool(printed)


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages; what is no page stays as text."""
    here = page.file.src_uri
    source = {to: name for name, to in PAGES.items()}.get(here, f"docs/{here}")

    def relinked(link: re.Match) -> str:
        text, path, anchor = link.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            return link[0]  # the strict build says that it is broken
        if target not in PAGES and not target.startswith("docs/"):
            return text
        to = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\[([^\[\]]+)\]\((?!\w+:)([^()#\s]+)((?:#[^()\s]*)?)\)", relinked, markdown)
