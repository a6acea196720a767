"""Hooks of mkdocs: pages of the repository's root and the tutorial's notebook become pages, and links keep working."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
"""Pages of the root, and what they are called in the site."""


def on_files(files, config):
    """Add the pages of the root, and the tutorial, to those of docs."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    files.append(File.generated(config, "tutorial.md", content="\n\n".join(map(cell_text, notebook["cells"]))))
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
    source = {to: name for name, to in ROOT_PAGES.items()}.get(here, f"docs/{here}")

    def relinked(link: re.Match) -> str:
        text, path, anchor = link.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            return link[0]  # the strict build says that it is broken
        if target not in ROOT_PAGES and not target.startswith("docs/"):
            return text
        to = ROOT_PAGES.get(target, target.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\[([^\[\]]+)\]\((?!\w+:)([^()#\s]+)((?:#[^()\s]*)?)\)", relinked, markdown)
