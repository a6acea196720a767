"""Writes the equations and drawn symbols of Word files as one line of text: (a+b)/2, 10^6, x_1, √(2), ±."""

from __future__ import annotations

import re
from typing import Any

from docx.oxml.ns import qn

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
