"""Draw the rooms of `src/loracast` by floors from the code's own imports: `python docs/architecture.py`.

A room stands above all rooms that it imports, its width is its lines of code, and an arrow leads to a room that it
imports. An arrow that a chain of others says as well is left out. docs/images/architecture.svg is what it writes.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "loracast"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
SAYS = {
    "errors": "errors with what to do",
    "files": "files, caches, the hub",
    "text": "words and stems",
    "documents": "files to text, chunks, units",
    "lora": "LoRA algebra, injection, PEFT",
    "base": "the frozen language model",
    "hypernets": "features to LoRA rows",
    "library": "adapters, names, versions",
    "reading": "question and document to a Route",
    "cast": "read, encode, cast, keep",
    "export": "files for other runtimes",
    "answering": "route, prompt, LoRA, answer",
    "serving": "engine, HTTP API, page",
    "cli": "commands",
    "lab": "training, data, evaluation",
}
"""What each room is for, in a few words."""
WIDTH, FLOOR, HEIGHT, GAP = 720, 84, 50, 26  # pixels; `FLOOR` from one floor to the next


def rooms() -> dict[str, list[Path]]:
    """The modules of each room: a package, or a module that stands alone."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__"):
            found[name].append(path)
    return dict(found)


def imports(paths: list[Path]) -> set[str]:
    """The rooms that modules import, also inside functions."""
    named = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "loracast":
                parts = (node.module or "").split(".")
                named |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return named


def arrows() -> dict[str, set[str]]:
    """Each room with those that it imports."""
    found = rooms()
    return {name: (imports(paths) & found.keys()) - {name} for name, paths in found.items()}


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room, from 0. Raises ValueError where rooms import each other in a circle."""
    found: dict[str, int] = {}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"rooms import each other: {' -> '.join((*above, name))}")
        if name not in found:
            found[name] = 1 + max((floor(one, (*above, name)) for one in below[name]), default=-1)
        return found[name]

    for name in below:
        floor(name)
    return found


def reduced(below: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no chain of others says as well."""

    def reached(name: str) -> set[str]:
        return below[name].union(*map(reached, below[name])) if below[name] else set()

    return {name: ones - set().union(*(reached(one) for one in ones)) for name, ones in below.items()}


def draw() -> str:
    """The picture as SVG."""
    below, found = arrows(), rooms()
    level = floors(below)
    lines = {name: sum(len(path.read_text("utf-8").splitlines()) for path in paths) for name, paths in found.items()}
    height = FLOOR * (max(level.values()) + 1)
    boxes: dict[str, tuple[float, float, float]] = {}  # x and y of the upper left corner, width
    for floor in range(max(level.values()) + 1):
        here = sorted((name for name in level if level[name] == floor), key=lambda name: -lines[name])
        widths = [max(216.0, min(420.0, lines[name] / 16)) for name in here]
        x = (WIDTH - sum(widths) - GAP * (len(here) - 1)) / 2
        for name, width in zip(here, widths, strict=True):
            boxes[name] = (x, height - FLOOR * (floor + 1) + 10, width)
            x += width + GAP
    parts = []
    for name, ones in reduced(below).items():
        x, y, width = boxes[name]
        for i, one in enumerate(sorted(ones, key=lambda one: boxes[one][0])):
            to_x, to_y, to_width = boxes[one]
            start = x + width * (i + 1) / (len(ones) + 1)
            end = min(max(start, to_x + 12), to_x + to_width - 12)
            parts.append(f'<path d="M{start:.0f} {y + HEIGHT} L{end:.0f} {to_y:.0f}" marker-end="url(#tip)"/>')
    for name, (x, y, width) in boxes.items():
        middle = x + width / 2
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>')
        parts.append(f'<text x="{middle:.0f}" y="{y + 20:.0f}" class="name">{name} ({lines[name]:,})</text>')
        parts.append(f'<text x="{middle:.0f}" y="{y + 39:.0f}">{escape(SAYS[name])}</text>')
    style = (
        "rect{fill:#eef3fb;stroke:#3b5b92} path{stroke:#8a9bb8;fill:none} text{font:12px sans-serif;text-anchor:middle;"
        "fill:#223} .name{font-weight:bold}"
    )
    tip = (
        '<marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6"/></marker>'
    )
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    ground = f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>'
    return "\n".join([frame, f"<style>{style}</style><defs>{tip}</defs>", ground, *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
