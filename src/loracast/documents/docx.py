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

from loracast.documents.clean import brief, join_blocks, normalise, sensible_title, superscript
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


def symbol(element: Any) -> str:
    """The character of a <w:sym>; UNKNOWN for one of a symbol font that is not in the tables above."""
    font, code = (element.get(qn(f"w:{name}")) or "" for name in ("font", "char"))
    if not re.fullmatch("[0-9a-fA-F]{1,4}", code):
        return UNKNOWN
    number = int(code, 16)
    table = _SYMBOLS.get(font.lower())
    if table is None and 0x20 <= number < 0xD800:  # a character of Unicode in a font of letters
        return chr(number)
    return (table or {}).get(number & 0xFF, UNKNOWN)


def linear(element: Any) -> str:
    """The text of an <m:oMath> or of a part of it, in one line."""
    name = _name(element)
    if name == "t":
        return element.text or ""
    if name in ("del", "moveFrom"):
        return ""
    children = [(_name(child), linear(child)) for child in element]
    parts = dict(children)
    base = parts.get("e", "")
    bases = [text for name, text in children if name in ("e", "mr")]
    match name:
        case "f":
            bar = _setting(element, "fPr", "type", "bar")
            # The spaces part it from the whole number before it.
            return f" {_group(parts.get('num', ''))}{'¦' if bar == 'noBar' else '/'}{_group(parts.get('den', ''))} "
        case "rad":
            degree = parts.get("deg", "")
            return f"{_group(base)}^(1/{_group(degree)})" if degree else f"√({base.strip()})"
        case "d":
            between = _setting(element, "dPr", "sepChr", "|").join(bases)
            return _setting(element, "dPr", "begChr", "(") + between.strip() + _setting(element, "dPr", "endChr", ")")
        case "m" | "eqArr":
            return "; ".join(bases)
        case "mr":
            return ", ".join(bases)
        case "nary":
            return f"{_setting(element, 'naryPr', 'chr', '∫')}{_scripts(parts)} {base}"
        case "sSub" | "sSup" | "sSubSup":
            return _group(base) + _scripts(parts)
        case "sPre":
            return _scripts(parts) + base
        case "limLow" | "limUpp":
            return base + _scripts({"sub" if name == "limLow" else "sup": parts.get("lim", "")})
        case "func":
            return f"{parts.get('fName', '')} {base}"
    return "".join(text for _, text in children)


def _name(element: Any) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _setting(element: Any, properties: str, name: str, default: str) -> str:
    found = element.find(f"{qn(f'm:{properties}')}/{qn(f'm:{name}')}")
    value: str = default if found is None else found.get(qn("m:val"), "")
    return value


def _scripts(parts: dict[str, str]) -> str:
    marks = {"_": parts.get("sub", "").strip(), "^": parts.get("sup", "").strip()}
    return "".join(mark + _group(text) for mark, text in marks.items() if text)


def _group(text: str) -> str:
    text = text.strip()
    return text if re.fullmatch(r"[-−+]?[\w.,°′*]*|\S", text) else f"({text})"


_MAX_PARTS = 10_000
_SMALL_PART = 1_000_000  # bytes; below it a ratio says nothing, since a page of blanks packs a hundredfold
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
# Deleted or moved away; the duplicate of a text box for old readers; not of this paragraph but of the box inside it.
_SKIPPED = {qn("w:del"), qn("w:moveFrom"), _FALLBACK, qn("w:txbxContent"), qn("w:pPr"), qn("w:rPr")}
_EQUATIONS = {qn("m:oMath"), qn("m:oMathPara")}
_BREAKS = {qn("w:br"): "\n", qn("w:cr"): "\n", qn("w:tab"): " ", qn("w:noBreakHyphen"): "-"}


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The text of a Word file, and the title in its properties or its Title paragraph."""
    check_package(data, label, limits)
    try:
        document = docx.Document(io.BytesIO(data))
        walker = _Walker(*_styles(document))
        blocks = [block for child in document.element.body for block in walker.blocks(child)]
        for kind in (RELATIONSHIP_TYPE.FOOTNOTES, RELATIONSHIP_TYPE.ENDNOTES):
            blocks += [block for note in _notes(document, kind) for block in walker.blocks(note)]
        blocks += _running_lines(document, walker)
        title = sensible_title(document.core_properties.title)
    except (MemoryError, RecursionError, DocumentError):
        raise
    except Exception as error:  # whatever a damaged package makes python-docx or lxml raise
        if isinstance(error, ValueError) and ("macroEnabled" in str(error) or "template" in str(error)):
            raise DocumentError(f"{label} is a Word file with macros or a template: save it as .docx") from None
        damage = f"a damaged Word file ({brief(error)})"
        raise DocumentError(f"{label} is {damage}: open it in Word and save it again") from None
    text = normalise(join_blocks(blocks))
    if not text.strip():
        raise DocumentError(f"{label} holds no text: if its pages are pictures, save it as PDF and run `ocrmypdf`")
    first_heading = next((block.lstrip("# ") for block in blocks if block.startswith("#")), "")
    fonts = ", ".join(sorted(walker.unknown))
    n_unknown = walker.unknown.total()
    warnings = (
        [f"symbols of a font that is not known here ({fonts}) read {UNKNOWN}: {n_unknown} in all"] if n_unknown else []
    )
    return Parsed(text, title or first_heading, warnings=tuple(warnings))


def check_package(data: bytes, label: str, limits: Limits) -> None:
    """Raises DocumentError unless `data` is a whole zip archive of a Word file that unfolds to a reasonable size."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as package:
            parts = package.infolist()
            names = {part.filename for part in parts}
            if "word/document.xml" not in names:
                raise DocumentError(f"{label} is {_say_zip(names)}")
            unpacked = sum(part.file_size for part in parts)
            is_bomb = unpacked > limits.max_unpacked_bytes or len(parts) > _MAX_PARTS
            ratios = [part.file_size / max(part.compress_size, 1) for part in parts if part.file_size > _SMALL_PART]
            if is_bomb or any(ratio > limits.max_ratio for ratio in ratios):
                raise DocumentError(
                    f"{label} unpacks to {unpacked / 1e6:,.0f} MB from {len(data) / 1e6:,.1f} MB, as a zip bomb does: "
                    "remove its pictures and empty tables and save it again"
                )
            for part in parts:
                if part.filename.endswith((".xml", ".rels")) and b"<!DOCTYPE" in package.read(part):
                    raise DocumentError(
                        f"{label} declares XML entities in {part.filename}, which no Word processor writes and which "
                        "can reach for other files: save its text in a new file"
                    )
    except (MemoryError, DocumentError):
        raise
    except Exception as error:  # BadZipFile, but also what zlib, seek and struct raise on damaged numbers
        raise DocumentError(
            f"{label} is a damaged or truncated Word file ({brief(error)}): copy or download it again"
        ) from None


def _say_zip(names: set[str]) -> str:
    if any(name.startswith("xl/") for name in names):
        return "an Excel file: save each sheet as CSV"
    if any(name.startswith("ppt/") for name in names):
        return "a PowerPoint file: export it as PDF"
    if "META-INF/container.xml" in names:
        return "an EPUB book: convert it with `pandoc -t markdown` or `ebook-convert`"
    if "content.xml" in names:
        return "an OpenDocument file: convert it with `soffice --headless --convert-to docx`"
    return f"a zip archive: unpack it and name the files in it ({READABLE})"


def _styles(document: Any) -> tuple[dict[str, int], set[str]]:
    """Style id -> heading level; style ids of list items. Built-in names are English in the files of every Word."""
    levels: dict[str, int] = {}
    items: set[str] = set()
    parents: dict[str, str] = {}
    for style in document.styles.element.iter(qn("w:style")):
        style_id = style.get(qn("w:styleId")) or ""
        name = (_value(style.find(qn("w:name"))) or "").lower()
        outline = _value(style.find(f"{qn('w:pPr')}/{qn('w:outlineLvl')}"))
        if found := re.fullmatch(r"heading (\d)", name):
            levels[style_id] = int(found[1])
        elif name == "title":
            levels[style_id] = 1
        elif outline is not None and outline.isdigit() and int(outline) < 9:
            levels[style_id] = int(outline) + 1
        elif name.startswith(("list bullet", "list number")):
            items.add(style_id)
        parents[style_id] = _value(style.find(qn("w:basedOn"))) or ""
    for style_id in parents:
        ancestor, steps = style_id, 0
        while ancestor and ancestor not in levels and steps < 20:  # a cycle of styles is possible in a broken file
            ancestor, steps = parents.get(ancestor, ""), steps + 1
        if ancestor in levels:
            levels.setdefault(style_id, levels[ancestor])
    return levels, items


def _value(element: Any) -> str | None:
    return None if element is None else element.get(qn("w:val"))


def _notes(document: Any, kind: str) -> Iterator[Any]:
    for relation in document.part.rels.values():
        if relation.reltype == kind and not relation.is_external:
            # The separators that Word draws above the notes have a type; notes have none.
            yield from (note for note in parse_xml(relation.target_part.blob) if note.get(qn("w:type")) is None)


def _running_lines(document: Any, walker: _Walker) -> list[str]:
    """The headers and footers, each once; not those that only count pages."""
    kinds = (RELATIONSHIP_TYPE.HEADER, RELATIONSHIP_TYPE.FOOTER)
    parts = [one.target_part for one in document.part.rels.values() if one.reltype in kinds and not one.is_external]
    blocks = (block for part in parts for child in parse_xml(part.blob) for block in walker.blocks(child))
    return [block for block in dict.fromkeys(blocks) if not PAGE_NUMBER.fullmatch(block.lstrip(ROW).rstrip("."))]


class _Walker:
    """Elements of a body to blocks of text."""

    def __init__(self, levels: dict[str, int], items: set[str]) -> None:
        self.levels, self.items = levels, items
        self.unknown: Counter[str] = Counter()  # fonts of symbols that have no character here

    def blocks(self, element: Any) -> Iterator[str]:
        if element.tag == qn("w:p"):
            yield self._paragraph(element)
            for box in element.iter(qn("w:txbxContent")):
                is_copy = any(ancestor.tag == _FALLBACK for ancestor in box.iterancestors())
                if not is_copy and next(box.iterancestors(qn("w:p"))) is element:  # boxes in boxes come by themselves
                    yield from self._children(box)
        elif element.tag == qn("w:tbl"):
            yield "\n".join(rows_to_lines(*self._table(element)))
        elif element.tag in _EQUATIONS:
            yield " ".join(linear(element).split())
        elif element.tag not in _SKIPPED:  # content controls, custom XML, tracked insertions of whole paragraphs
            yield from self._children(element)

    def _children(self, element: Any) -> Iterator[str]:
        for child in element:
            yield from self.blocks(child)

    def _paragraph(self, paragraph: Any) -> str:
        text = "\n".join(filter(None, (" ".join(line.split()) for line in self._text(paragraph).split("\n"))))
        properties = paragraph.find(qn("w:pPr"))
        if not text or properties is None:
            return text
        style = _value(properties.find(qn("w:pStyle"))) or ""
        outline = _value(properties.find(qn("w:outlineLvl"))) or ""
        level = int(outline) + 1 if outline in set("012345") else self.levels.get(style, 0)
        if level:
            return "#" * min(level, 6) + " " + " ".join(text.split())
        is_item = properties.find(qn("w:numPr")) is not None or style in self.items
        return f"- {text}" if is_item else text

    def _text(self, paragraph: Any) -> str:
        text = ""
        for is_raised, runs in groupby(self._runs(paragraph), key=itemgetter(0)):
            joined = "".join(run for _, run in runs)
            text += superscript(text, joined) if is_raised else joined
        return text

    def _table(self, table: Any) -> tuple[list[list[str]], bool | None]:
        rows: list[list[str]] = []
        has_header = None
        for row in table.iter(qn("w:tr")):  # content controls and custom XML may hold rows and cells
            if next(row.iterancestors(qn("w:tbl"))) is not table:
                continue  # of a table inside this one's cell, whose text is taken with the cell
            if not rows and row.find(f"{qn('w:trPr')}/{qn('w:tblHeader')}") is not None:
                has_header = True
            skipped = _value(row.find(f"{qn('w:trPr')}/{qn('w:gridBefore')}")) or "0"
            cells = [""] * (min(int(skipped), 100) if skipped.isdigit() else 0)
            for cell in row.iter(qn("w:tc")):
                if next(cell.iterancestors(qn("w:tbl"))) is not table:
                    continue
                merge = cell.find(f"{qn('w:tcPr')}/{qn('w:vMerge')}")
                if merge is not None and _value(merge) != "restart" and rows and len(cells) < len(rows[-1]):
                    cells.append(rows[-1][len(cells)])  # merged with the cell above: it holds for this row as well
                else:
                    cells.append(" ".join("\n".join(self._children(cell)).split()))
                span = _value(cell.find(f"{qn('w:tcPr')}/{qn('w:gridSpan')}")) or "1"
                cells += [""] * (min(int(span), 100) - 1 if span.isdigit() else 0)
            rows.append(cells)
        return rows, has_header

    def _runs(self, element: Any, is_raised: bool = False) -> Iterator[tuple[bool, str]]:
        """For each piece of text whether it is a superscript, and the piece."""
        for child in element:
            if child.tag in _SKIPPED:
                continue
            own = is_raised
            if child.tag == qn("w:r"):
                vanish = child.find(f"{qn('w:rPr')}/{qn('w:vanish')}")
                if vanish is not None and _value(vanish) not in ("0", "false", "off"):
                    continue  # hidden text
                own = _value(child.find(f"{qn('w:rPr')}/{qn('w:vertAlign')}")) == "superscript"
            if child.tag == qn("w:t"):
                yield own, child.text or ""
            elif child.tag in _EQUATIONS:
                yield own, linear(child)
            elif child.tag == qn("w:sym"):
                character = symbol(child)
                if character == UNKNOWN:
                    self.unknown[child.get(qn("w:font")) or "of none"] += 1
                yield own, character
            elif child.tag in _BREAKS:
                yield own, _BREAKS[child.tag]
            else:
                yield from self._runs(child, own)
