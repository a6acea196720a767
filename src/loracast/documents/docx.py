"""Parses DOCX into markdown-like text: headings, paragraphs, lists, tables, text boxes, equations, and footnotes.

python-docx opens the package and knows the styles; the body is walked here, since its own paragraph lists leave out
content controls, text boxes and tracked insertions, and a fact left out without a word is the worst failure.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

import docx
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.oxml import parse_xml
from docx.oxml.ns import qn
from lxml import etree

from loracast.documents.clean import join_blocks, normalise, sensible_title, superscript
from loracast.documents.file_types import READABLE, Limits, Parsed
from loracast.documents.pdf import PAGE_NUMBER
from loracast.documents.tables import ROW, rows_to_lines
from loracast.errors import DocumentError

# The characters of Adobe's Symbol font, which Word draws instead of letters, from 0x20 and from 0xA0 on.
_SYMBOL_LOW = " !∀#∃%&∋()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_\ufffdαβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
_SYMBOL_HIGH = (
    "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…\ufffd\ufffd↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈®©™∑" + "\ufffd" * 11 + "〉∫"
)
_SYMBOLS = {
    "symbol": dict(enumerate(_SYMBOL_LOW, 0x20)) | dict(enumerate(_SYMBOL_HIGH, 0xA0)),
    "wingdings": {
        0x6C: "●", 0x6E: "■", 0x6F: "☐", 0x76: "❖", 0xA7: "▪", 0xA8: "☐", 0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑",
        0xE2: "↓", 0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑",
    },
}  # fmt: skip
UNKNOWN = "\ufffd"


def _symbol(element: Any) -> str:
    """The character of a <w:sym>; UNKNOWN for one of a symbol font that is not in the tables above."""
    font, code = (element.get(qn(f"w:{name}")) or "" for name in ("font", "char"))
    number = int(code, 16) if re.fullmatch("[0-9a-fA-F]{1,4}", code) else 0
    table = _SYMBOLS.get(font.lower())
    if table is None and 0x20 <= number < 0xD800:  # a character of Unicode in a font of letters
        return chr(number)
    return (table or {}).get(number & 0xFF, UNKNOWN)


def _linear(element: Any) -> str:
    """The text of an <m:oMath> or of a part of it, in one line."""
    name = etree.QName(element).localname
    if name == "t":
        return element.text or ""
    children = [(etree.QName(child).localname, _linear(child)) for child in element]
    parts = dict(children)
    base = parts.get("e", "")
    bases = [text for part, text in children if part in ("e", "mr")]

    def setting(name: str, default: str) -> str:
        found = element.find(f"*/{qn(f'm:{name}')}")
        return default if found is None else found.get(qn("m:val"), "")

    match name:
        case "f":
            bar = "¦" if setting("type", "bar") == "noBar" else "/"
            # The spaces part it from the whole number before it.
            return f" {_group(parts.get('num', ''))}{bar}{_group(parts.get('den', ''))} "
        case "rad":
            degree = parts.get("deg", "")
            return f"{_group(base)}^(1/{_group(degree)})" if degree else f"√({base.strip()})"
        case "d":
            return setting("begChr", "(") + setting("sepChr", "|").join(bases).strip() + setting("endChr", ")")
        case "m" | "eqArr":
            return "; ".join(bases)
        case "mr":
            return ", ".join(bases)
        case "nary":
            return f"{setting('chr', '∫')}{_scripts(parts)} {base}"
        case "sSub" | "sSup" | "sSubSup":
            return _group(base) + _scripts(parts)
        case "sPre":
            return _scripts(parts) + base
        case "limLow" | "limUpp":
            return base + _scripts({"sub" if name == "limLow" else "sup": parts.get("lim", "")})
        case "func":
            return f"{parts.get('fName', '')} {base}"
    return "".join(text for _, text in children)


def _scripts(parts: dict[str, str]) -> str:
    marks = {"_": parts.get("sub", "").strip(), "^": parts.get("sup", "").strip()}
    return "".join(mark + _group(text) for mark, text in marks.items() if text)


def _group(text: str) -> str:
    text = text.strip()
    return text if re.fullmatch(r"[-−+]?[\w.,°′*]*|\S", text) else f"({text})"


_MAX_PARTS = 10_000
_MAX_STYLE_DEPTH = 20
_SMALL_PART = 1_000_000  # bytes; below it a ratio says nothing, since a page of blanks packs a hundredfold
_OTHER_PACKAGES = {
    r"xl/.*": "an Excel file: save each sheet as CSV",
    r"ppt/.*": "a PowerPoint file: export it as PDF",
    r"META-INF/container\.xml": "an EPUB book: convert it with `pandoc -t markdown` or `ebook-convert`",
    r"content\.xml": "an OpenDocument file: convert it with `soffice --headless --convert-to docx`",
    r".*": f"a zip archive: unpack it and name the files in it ({READABLE})",
}
"""What a zip archive with a file of such a name is, if it is no Word file; the first counts."""
# Deleted or moved away, and the duplicate of a text box for old readers.
_DROPPED = ("w:del", "w:moveFrom", "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback")
# Not of this paragraph but of the box inside it.
_SKIPPED = {qn("w:txbxContent"), qn("w:pPr"), qn("w:rPr")}
_EQUATIONS = {qn("m:oMath"), qn("m:oMathPara")}
_BREAKS = {qn("w:br"): "\n", qn("w:cr"): "\n", qn("w:tab"): " ", qn("w:noBreakHyphen"): "-"}
_NOTES = (RELATIONSHIP_TYPE.FOOTNOTES, RELATIONSHIP_TYPE.ENDNOTES)
_RUNNING = (RELATIONSHIP_TYPE.HEADER, RELATIONSHIP_TYPE.FOOTER)


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The text of a Word file, and the title in its properties or its Title paragraph."""
    _check_package(data, label, limits)
    try:
        document = docx.Document(io.BytesIO(data))
    except ValueError as error:
        if "macroEnabled" in str(error) or "template" in str(error):
            raise DocumentError(f"{label} is a Word file with macros or a template: save it as .docx") from None
        raise
    walker = _Walker(document)
    blocks = walker.blocks(document.element.body)
    for note in (note for kind in _NOTES for part in walker.parts(kind) for note in part):
        if note.get(qn("w:type")) is None:  # the separators that Word draws above the notes have a type
            blocks += walker.blocks(note)
    # Headers and footers, each once; not those that only count pages.
    running = dict.fromkeys(block for part in walker.parts(*_RUNNING) for block in walker.blocks(part))
    blocks += [block for block in running if not PAGE_NUMBER.fullmatch(block.lstrip(ROW).rstrip("."))]
    title = sensible_title(document.core_properties.title)
    text = normalise(join_blocks(blocks))
    if not text.strip():
        raise DocumentError(f"{label} holds no text: if its pages are pictures, save it as PDF and run `ocrmypdf`")
    first_heading = next((block.lstrip("# ") for block in blocks if block.startswith("#")), "")
    fonts, n_unknown = ", ".join(sorted(walker.unknown)), walker.unknown.total()
    warning = f"symbols of a font that is not known here ({fonts}) read {UNKNOWN}: {n_unknown} in all"
    return Parsed(text, title or first_heading, warnings=(warning,) * bool(n_unknown))


def _check_package(data: bytes, label: str, limits: Limits) -> None:
    """Raises DocumentError unless `data` is a whole zip archive of a Word file that unfolds to a reasonable size."""
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        parts, names = package.infolist(), package.namelist()
        if "word/document.xml" not in names:
            what = next(what for rule, what in _OTHER_PACKAGES.items() if any(re.fullmatch(rule, n) for n in names))
            raise DocumentError(f"{label} is {what}")
        unpacked = sum(part.file_size for part in parts)
        is_bomb = unpacked > limits.max_unpacked_bytes or len(parts) > _MAX_PARTS
        ratios = [part.file_size / max(part.compress_size, 1) for part in parts if part.file_size > _SMALL_PART]
        if is_bomb or any(ratio > limits.max_ratio for ratio in ratios):
            raise DocumentError(
                f"{label} unpacks to {unpacked / 1e6:,.0f} MB from {len(data) / 1e6:,.1f} MB, as a zip bomb does: "
                "remove its pictures and empty tables and save it again"
            )
        for name in names:
            if name.endswith((".xml", ".rels")) and b"<!DOCTYPE" in package.read(name):
                raise DocumentError(
                    f"{label} declares XML entities in {name}, which no Word processor writes and which "
                    "can reach for other files: save its text in a new file"
                )


def _value(element: Any, path: str) -> str | None:
    """The value of what stands at a path such as "w:pPr/w:pStyle" of an element, "" without one; None for nothing."""
    found = element.find("/".join(map(qn, path.split("/"))))
    return None if found is None else found.get(qn("w:val"), "")


class _Walker:
    """Elements of a body to blocks of text."""

    def __init__(self, document: Any) -> None:
        self.document = document
        self.levels: dict[str, int] = {}  # style id -> heading level
        self.items: set[str] = set()  # styles of list items
        self.unknown: Counter[str] = Counter()  # fonts of symbols that have no character here
        parents: dict[str, str] = {}  # style id -> style that it is based on
        for style in document.styles.element.iter(qn("w:style")):
            style_id = style.get(qn("w:styleId")) or ""
            name = (_value(style, "w:name") or "").lower()  # built-in names are English in the files of every Word
            outline = _value(style, "w:pPr/w:outlineLvl") or ""
            if found := re.fullmatch(r"heading (\d)", name):
                self.levels[style_id] = int(found[1])
            elif name == "title":
                self.levels[style_id] = 1
            elif outline.isdigit() and int(outline) < 9:
                self.levels[style_id] = int(outline) + 1
            elif name.startswith(("list bullet", "list number")):
                self.items.add(style_id)
            parents[style_id] = _value(style, "w:basedOn") or ""
        for _ in range(_MAX_STYLE_DEPTH):
            for style_id, parent in parents.items():
                if parent in self.levels:
                    self.levels.setdefault(style_id, self.levels[parent])

    def parts(self, *kinds: str) -> list[Any]:
        """The roots of the other parts of the document that have one of these relations to it."""
        relations = self.document.part.rels.values()
        return [parse_xml(one.target_part.blob) for one in relations if one.reltype in kinds and not one.is_external]

    def blocks(self, element: Any) -> list[str]:
        """The blocks of an element's children, without what was deleted or is hidden."""
        for run in element.iter(qn("w:r")):
            if _value(run, "w:rPr/w:vanish") not in (None, "0", "false", "off"):
                run.tag = qn("w:del")
        etree.strip_elements(element, *(qn(name) if name[0] != "{" else name for name in _DROPPED), with_tail=False)
        return list(self._children(element))

    def _children(self, element: Any) -> Iterator[str]:
        for child in element:
            if child.tag == qn("w:p"):
                yield self._paragraph(child)
                for box in child.iter(qn("w:txbxContent")):
                    if next(box.iterancestors(qn("w:p"))) is child:  # boxes in boxes come by themselves
                        yield from self._children(box)
            elif child.tag == qn("w:tbl"):
                yield "\n".join(self._rows(child))
            elif child.tag in _EQUATIONS:
                yield " ".join(_linear(child).split())
            elif child.tag not in _SKIPPED:  # content controls, custom XML, tracked insertions of whole paragraphs
                yield from self._children(child)

    def _paragraph(self, paragraph: Any) -> str:
        text = ""
        for is_raised, pieces in groupby(self._pieces(paragraph), key=itemgetter(0)):
            joined = "".join(piece for _, piece in pieces)
            text += superscript(text, joined) if is_raised else joined
        text = "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
        style = _value(paragraph, "w:pPr/w:pStyle") or ""
        outline = _value(paragraph, "w:pPr/w:outlineLvl") or ""
        level = int(outline) + 1 if outline in set("012345") else self.levels.get(style, 0)
        if text and level:
            return "#" * min(level, 6) + " " + " ".join(text.split())
        is_item = _value(paragraph, "w:pPr/w:numPr") is not None or style in self.items
        return f"- {text}" if text and is_item else text

    def _rows(self, table: Any) -> list[str]:
        def own(parent: Any, tag: str) -> list[Any]:
            """Rows or cells, which content controls and custom XML may hold, but not those of a table in a cell."""
            return [one for one in parent.iter(qn(tag)) if next(one.iterancestors(qn("w:tbl"))) is table]

        def number(element: Any, path: str, default: int) -> int:
            value = _value(element, path) or ""
            return min(int(value), 100) if value.isdigit() else default

        rows: list[list[str]] = []
        for row in own(table, "w:tr"):
            cells = [""] * number(row, "w:trPr/w:gridBefore", 0)
            for cell in own(row, "w:tc"):
                is_merged = _value(cell, "w:tcPr/w:vMerge") not in (None, "restart")
                if is_merged and rows and len(cells) < len(rows[-1]):
                    cells.append(rows[-1][len(cells)])  # with the cell above: it holds for this row as well
                else:
                    cells.append(" ".join("\n".join(self._children(cell)).split()))
                cells += [""] * (number(cell, "w:tcPr/w:gridSpan", 1) - 1)
            rows.append(cells)
        has_header = any(_value(row, "w:trPr/w:tblHeader") is not None for row in own(table, "w:tr")[:1])
        return rows_to_lines(rows, has_header or None)

    def _pieces(self, element: Any, is_raised: bool = False) -> Iterator[tuple[bool, str]]:
        """For each piece of text whether it is a superscript, and the piece."""
        for child in element:
            if child.tag == qn("w:r"):
                yield from self._pieces(child, _value(child, "w:rPr/w:vertAlign") == "superscript")
            elif child.tag == qn("w:t"):
                yield is_raised, child.text or ""
            elif child.tag in _EQUATIONS:
                yield is_raised, _linear(child)
            elif child.tag == qn("w:sym"):
                character = _symbol(child)
                if character == UNKNOWN:
                    self.unknown[child.get(qn("w:font")) or "of none"] += 1
                yield is_raised, character
            elif child.tag in _BREAKS:
                yield is_raised, _BREAKS[child.tag]
            elif child.tag not in _SKIPPED:
                yield from self._pieces(child, is_raised)
