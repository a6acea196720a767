"""Files to text: every kind, every refusal, and the fence around the parsers. files/make_files.py made the files."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import time
import zipfile
from email.message import EmailMessage
from pathlib import Path
from typing import BinaryIO

import docx
import pypdf
import pytest

from loracast.documents import Document, Limits, read_document
from loracast.documents.clean import normalise, readable_stem, sensible_title
from loracast.documents.pdf import Line, join_lines
from loracast.documents.units import find_headings
from loracast.errors import DocumentError

FILES = Path(__file__).parents[1] / "files"
EXAMPLES = Path(__file__).parents[2] / "examples"


def read_bytes(data: bytes | str, name: str | None = None, limits: Limits | None = None) -> Document:
    return read_document(io.BytesIO(data.encode() if isinstance(data, str) else data), file_name=name, limits=limits)


def refusal(source: Path | BinaryIO | str, **options) -> str:
    """The message with which `source` is refused."""
    with pytest.raises(DocumentError) as caught:
        read_document(source, **options)
    return str(caught.value)


# --- what each kind becomes ---


def test_text_file() -> None:
    document = read_document(FILES / "notes.txt")
    data = (FILES / "notes.txt").read_bytes()
    assert document == Document(
        title="notes",
        text="The Halden kiln reaches 1,140 degrees.\nIts door is made of grog.\n\nDr. Ostrom fires it every 9 days.",
        file_name="notes.txt",
        media_type="text/plain",
        sha256=hashlib.sha256(data).hexdigest(),
        n_bytes=len(data),
    )


def test_a_path_may_be_a_string_and_a_stream_may_be_named() -> None:
    by_path = read_document(str(FILES / "notes.txt"))
    with (FILES / "notes.txt").open("rb") as stream:
        by_stream = read_document(stream, file_name="../uploads\\notes.txt")
    assert by_path == by_stream
    assert read_document(FILES / "guide.md", file_name="other.txt").media_type == "text/plain"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"# Piped\n\nThe lamp is green.\n")

    monkeypatch.setattr(sys, "stdin", Stdin)
    document = read_document("-")
    assert (document.title, document.file_name, document.text) == ("Piped", None, "# Piped\n\nThe lamp is green.")
    Stdin.buffer = io.BytesIO(b" \n")
    assert refusal("-").startswith("standard input holds only white space")


def test_markdown_stays_as_it_is() -> None:
    document = read_document(FILES / "guide.md")
    assert document.text == (FILES / "guide.md").read_text().rstrip("\n")
    assert (document.title, document.media_type) == ("Halden Kiln", "text/markdown")
    assert read_bytes("---\ntitle: 'From the front'\n---\n# Later\n", "x.md").title == "From the front"


def test_html() -> None:
    document = read_document(FILES / "page.html")
    assert document.text == (
        "# Kilns\n\nThe kiln stands in Halden. It has three legs.\n\n## Parts\n\n- a door\n- a shelf\n\n"
        "Part Handle, Weight: 13 g.\nPart: Shelf.\n\nFirst line\nsecond line\n\n```\na  b\nc\n```"
    )
    assert (document.title, document.media_type) == ("Halden & Sons", "text/html")
    unnamed = read_bytes("<!DOCTYPE html><p>By its content")
    assert (unnamed.media_type, unnamed.text) == ("text/html", "By its content")


@pytest.mark.usefixtures("in_child")
def test_html_that_is_nested_deeply_or_lays_out_by_tables() -> None:
    assert read_bytes("<html>" + "<div>" * 1500 + "deep<p>end", "x.html").text == "deep\n\nend"
    assert "nested too deeply" in refusal(io.BytesIO(b"<html>" + b"<div>" * 5000 + b"deep<p>end"), file_name="x.html")
    layout = (
        "<table><tr><td><h1>Head</h1><p>One</p></td><td><table><tr><td>a</td><td>b</td></tr></table></td></tr></table>"
    )
    assert read_bytes(layout, "x.html").text == "# Head\n\nOne\n\na: b."
    assert read_bytes("<table><tr><td><p>One</p></td><td>Two</td></tr></table>", "x.html").text == "One\n\nTwo"


def test_html_tables_of_word_have_a_paragraph_in_each_cell() -> None:
    rows = (("Room", "Code"), ("Attic", "4711"), ("Cellar", ""), ("Hall", "1234"))
    cells = ("".join(f"<td><p class=MsoNormal>{cell}</p></td>" for cell in row) for row in rows)
    assert table(*cells) == "Room: Code.\nAttic: 4711.\nCellar.\nHall: 1234."
    prose = f"<td><p>{'It rained. ' * 30}</p><td><p>b</p>"
    assert table(prose, prose).count("\n\n") == 3  # a page that is laid out
    assert table("<td><p>a</p><p>b</p><td>c", "<td><p>d</p><td>e") == "a\n\nb\n\nc\n\nd\n\ne"


def table(*rows: str) -> str:
    """The text of an HTML table of these rows."""
    return read_bytes(f"<table>{''.join(f'<tr>{row}' for row in rows)}</table>", "x.html").text


def test_html_tables_with_cells_that_span_rows_and_columns() -> None:
    head = "<th>Country<th>City<th>Height"
    rows = "<td rowspan=2>Germany<td>Berlin<td>34", "<td>Hamburg<td>6", "<td>France<td colspan=2>none", "<td>Spain"
    expected = (
        "Country Germany, City: Berlin. Country Germany, Height: 34.\n"
        "Country Germany, City: Hamburg. Country Germany, Height: 6.\n"
        "Country France, City: none.\nCountry: Spain."
    )
    assert table(head, *rows) == expected
    assert table(f"<thead><tr>{head}</thead><tbody>", *rows) == expected
    assert table("<th rowspan=2>Pump<th colspan=2>Power", "<th>low<th>high", "<td>K-1<td>3<td>4") == (
        "Pump K-1, Power low: 3. Pump K-1, Power high: 4."
    )
    # The last column is held from above beyond a row that ends before it; a group ends what spans its rows.
    assert table("<td>a<td>b<td>c<td rowspan=0>d", "<td>e<tbody><tr><td>f<td>g<td>h<td>i") == (
        "a e, d: d.\na f, b: g. a f, c: h. a f, d: i."
    )


def test_a_first_row_of_one_cell_is_a_title_and_no_header() -> None:
    assert (
        table("<th colspan=2>Titanic", "<th>Length<td>269 m", "<th>Mass<td>46 t")
        == "Titanic\nLength: 269 m.\nMass: 46 t."
    )
    assert table("<td colspan=3>Pumps", "<th>Name<th>Price<th>Mass", "<td>K-1<td>9<td>3") == (
        "Pumps\nName K-1, Price: 9. Name K-1, Mass: 3."
    )
    assert table("<td colspan=3>Pumps", "<td>Name<td>Price<td>Mass", "<td>K-1<td>9<td>3") == (
        "Pumps\nName K-1, Price: 9. Name K-1, Mass: 3."
    )
    assert table("<th><th>2020", "<td>Income<td>5") == "Income, 2020: 5."


@pytest.mark.parametrize("span", ["", "x", "-3", "1e9", "9" * 5000, "100%", "0"])
def test_a_span_that_is_none_or_enormous(span: str) -> None:
    text = table("<td>a<td>b<td>c", f"<td colspan='{span}' rowspan='{span}'>d")
    assert text == "a: d."


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("5×10<sup>6</sup> m<sup>2</sup>.", "5×10^6 m^2."),
        ("x<sup>n+1</sup> 10<sup>-3</sup> e<sup>x<sup>2</sup></sup>", "x^(n+1) 10^-3 e^(x^2)"),
        ("24<sup>1</sup> months, 3.<sup>2</sup> ", "24^1 months, 3.^2"),
        ("24<sup><a href='#1'>1</a></sup> months, 7<a href='#2'><sup>[2]</sup></a>", "24[1] months, 7[2]"),
        ("the <a href='#'>10<sup>6</sup> pumps</a>", "the 10^6 pumps"),
        ("the 1<sup>st</sup> and 22<sup>nd</sup>", "the 1st and 22nd"),
        ("a<sup> </sup>b<sup></sup>c <sup>1</sup>d<sup>2 </sup>e", "a bc 1d^2 e"),
        ("<del>24</del><ins>36</ins> <s>9</s> <strike>8</strike>7", "36 7"),
        ("a<sup hidden>1</sup>", "a"),
    ],
)
def test_html_superscripts_and_struck_out_text(html: str, text: str) -> None:
    assert read_bytes(f"<p>{html}", "x.html").text == text
    assert table("<td>a<td>b", f"<td>c<td>{html}") == f"a: b.\nc: {text.removesuffix('.')}."


def test_html_code_is_fenced() -> None:
    page = "<h1>Run</h1><ul><li><pre>\n# not this\n  pip  x\n</pre>more<li>next</ul><pre><div># a</div><div>``` b</div></pre>end"
    document = read_bytes(page, "x.html")
    assert document.text == "# Run\n\n```\n# not this\n  pip  x\n```\n\nmore\n\n- next\n\n````\n# a\n``` b\n````\n\nend"
    assert [heading.title for heading in find_headings(document.text)] == ["Run"]


def test_html_in_the_encoding_that_it_declares() -> None:
    page = "<html><meta charset='windows-1252'><p>Grønvik – 3 €".encode("cp1252")
    assert read_bytes(page, "x.html").text == "Grønvik – 3 €"
    assert "not UTF-8" in refusal(io.BytesIO(page.replace(b"windows-1252", b"utf-7")), file_name="x.html")


@pytest.mark.parametrize(
    ("label", "written", "text"),
    [
        ("iso-8859-1", "cp1252", "„3 €“ – Grønvik’s"),
        ("latin1", "cp1252", "3 €"),
        ("US-ASCII", "cp1252", "3 € – ø"),
        ("iso-8859-9", "cp1254", "3 € ş"),
        ("iso-8859-15", "iso-8859-15", "3 €"),
        ("gb2312", "gb18030", "朱镕基 㐀"),
        ("gbk", "gb18030", "3 € 㐀"),
        ("Shift_JIS", "cp932", "①髙橋"),
        ("euc-kr", "cp949", "똠방각하"),
    ],
)
def test_html_labels_of_encodings_mean_what_browsers_take_them_for(label: str, written: str, text: str) -> None:
    assert read_bytes(f"<html><meta charset={label}><p>{text}".encode(written), "x.html").text == text


def test_pdf() -> None:
    document = read_document(FILES / "report.pdf")
    assert document.text == (
        "# Kiln Report\n\n"
        "The kiln in Halden was built of fireclay bricks by the Ostrom company and has a remarkable door. "
        "The well-known smith Ada Lund forged its hinges of well-known steel.\n\n"
        "The chimney of the kiln is 7.5 metres tall and the flue is 31 centimetres wide."
    )
    assert (document.title, document.n_pages, document.warnings) == ("Kiln Report", 2, ())
    assert document.media_type == "application/pdf"


def test_pdf_that_anyone_may_open_is_read_although_it_is_encrypted() -> None:
    assert read_document(FILES / "owner_locked.pdf").text == read_document(FILES / "report.pdf").text


def test_pdf_with_a_scanned_page_says_which() -> None:
    document = read_document(FILES / "half_scanned.pdf")
    assert "chimney" in document.text
    assert document.warnings == ("only pictures on 1 of 3 pages (3): `ocrmypdf --skip-text` reads scans",)


def test_pdf_forms_that_are_filled_in() -> None:
    writer = pypdf.PdfWriter(clone_from=FILES / "report.pdf")
    name, text = pypdf.generic.NameObject, pypdf.generic.TextStringObject

    def annotation(kind: str, **values: object) -> pypdf.generic.DictionaryObject:
        return pypdf.generic.DictionaryObject(
            {name("/Subtype"): name(kind), **{name(f"/{k}"): v for k, v in values.items()}}
        )

    group = writer._add_object(annotation("/None", T=text("Policy"), V=text("KX-\n4711"), FT=name("/Tx")))
    fields = [
        annotation("/Widget", T=text("n1"), TU=text("Name"), V=text("Ann Oyelaran"), FT=name("/Tx")),
        annotation("/Widget", Parent=group),
        annotation("/Widget", T=text("Smoker"), V=name("/Off"), FT=name("/Btn")),
        annotation("/Widget", T=text("Driver"), V=name("/On"), FT=name("/Btn")),
        annotation("/Widget", T=text("Empty"), V=text(" "), FT=name("/Tx")),
        annotation("/FreeText", Contents=text("Paid on 3 May.")),
        annotation("/Link", Contents=text("a link")),
        pypdf.generic.NullObject(),
    ]
    listed = pypdf.generic.ArrayObject(map(writer._add_object, fields))
    writer.pages[0][name("/Annots")] = writer._add_object(listed)
    stream = io.BytesIO()
    writer.write(stream)
    found = read_bytes(stream.getvalue()).text
    filled = "- Name: Ann Oyelaran\n- Policy: KX- 4711\n- Driver: yes\n- Paid on 3 May."
    assert filled in found and "Smoker" not in found and "Empty" not in found and "a link" not in found


def test_an_empty_page_is_no_scan() -> None:
    writer = pypdf.PdfWriter(clone_from=FILES / "report.pdf")
    writer.add_blank_page()
    stream = io.BytesIO()
    writer.write(stream)
    document = read_bytes(stream.getvalue())
    assert (document.n_pages, document.warnings) == (3, ())


def test_the_example_manual_comes_back_as_it_was_written() -> None:
    written, read = (read_document(EXAMPLES / f"manual.{suffix}") for suffix in ("md", "pdf"))
    assert read.text == written.text
    assert read.title == written.title
    assert 700 <= len(read.text.split()) <= 1200


def test_docx() -> None:
    document = read_document(FILES / "letter.docx")
    assert document.text == (
        "# Delivery\n\nThe kiln leaves Halden on 3 May.\n\n- one door\n- two shelves\n\n## Prices\n\n"
        "Part Handle, Weight: 13 g. Part Handle, Price: 4.50.\nPart Shelf, Price: 19.00.\n\n"
        "Height: 2 m.\nFuse: 13 A.\n\n"
        "Kept. Inserted.\n\nIn a content control.\n\nIn a text box.\n\nIn a footnote."
    )
    assert document.title == "Kiln Letter"
    assert document.media_type.endswith("wordprocessingml.document")


def rewritten(part: str, old: bytes, new: bytes) -> io.BytesIO:
    """letter.docx with a change in one of its parts."""
    target = io.BytesIO()
    with zipfile.ZipFile(FILES / "letter.docx") as source, zipfile.ZipFile(target, "w") as package:
        for entry in source.infolist():
            content = source.read(entry)
            assert entry.filename != part or old in content
            package.writestr(entry.filename, content.replace(old, new) if entry.filename == part else content)
    target.seek(0)
    return target


def test_docx_tables_with_merged_cells_and_a_repeated_header() -> None:
    document = docx.Document()
    table = document.add_table(rows=4, cols=2)
    for cells, texts in zip(
        table.rows, (("Year", "2021"), ("Model", "Gauge"), ("K-1", "3 mm"), ("", "4 mm")), strict=True
    ):
        for cell, text in zip(cells.cells, texts, strict=True):
            cell.text = text
    table.cell(2, 0).merge(table.cell(3, 0))
    stream = io.BytesIO()
    document.save(stream)
    assert read_bytes(stream.getvalue()).text == "Year: 2021.\nModel: Gauge.\nK-1: 3 mm.\nK-1: 4 mm."
    row = table.rows[0]._tr
    row.get_or_add_trPr().append(docx.oxml.parse_xml(f"<w:tblHeader {docx.oxml.ns.nsdecls('w')}/>"))
    stream = io.BytesIO()
    document.save(stream)
    assert read_bytes(stream.getvalue()).text.endswith("Year K-1, 2021: 3 mm.\nYear K-1, 2021: 4 mm.")


def test_docx_headers_and_footers_once_each() -> None:
    document = docx.Document()
    document.add_paragraph("The kiln is hot.")
    for section in (document.sections[0], document.add_section()):
        section.header.is_linked_to_previous = section.footer.is_linked_to_previous = False
        section.header.paragraphs[0].text = "Invoice 4711"
        section.footer.paragraphs[0].text = "Page 1 of 3"
    stream = io.BytesIO()
    document.save(stream)
    assert read_bytes(stream.getvalue()).text == "The kiln is hot.\n\nInvoice 4711"


def test_docx_rows_that_begin_in_a_later_column() -> None:
    def row(*cells: str, before: str = "") -> str:
        texts = "".join(f"<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>" for cell in cells)
        return f"<w:tr><w:trPr>{before}</w:trPr>{texts}</w:tr>"

    rows = row("Item", "Price", "Stock") + row("Lamp", "12", "3") + row("20", "7", before='<w:gridBefore w:val="1"/>')
    assert word(f"<w:tbl>{rows}</w:tbl>").text == "Item Lamp, Price: 12. Item Lamp, Stock: 3.\nPrice: 20. Stock: 7."


def word(body: str) -> Document:
    """A Word file with this XML in its body."""
    file = docx.Document()
    parsed = docx.oxml.parse_xml(f"<w:body {docx.oxml.ns.nsdecls('w', 'm')}>{body}</w:body>")
    for element in reversed(list(parsed)):
        file.element.body.insert(0, element)
    stream = io.BytesIO()
    file.save(stream)
    return read_bytes(stream.getvalue())


def m_run(text: str) -> str:
    return f"<m:r><m:t>{text}</m:t></m:r>"


FRACTION = f"<m:f><m:num>{m_run('1')}</m:num><m:den>{m_run('2')}</m:den></m:f>"
POWER = f"<m:sSup><m:e>{m_run('10')}</m:e><m:sup>{m_run('6')}</m:sup></m:sSup>"


@pytest.mark.parametrize(
    ("equation", "text"),
    [
        (m_run("x = 5"), "x = 5"),
        (m_run("3") + FRACTION + m_run("m"), "3 1/2 m"),
        (f"<m:f><m:num>{m_run('a+b')}</m:num><m:den>{FRACTION}</m:den></m:f>", "(a+b)/(1/2)"),
        (m_run("4×") + POWER, "4×10^6"),
        (f"<m:sSup><m:e>{m_run('s')}</m:e><m:sup>{m_run('-2')}</m:sup></m:sSup>", "s^-2"),
        (f"<m:sSubSup><m:e>{m_run('x')}</m:e><m:sub>{m_run('1')}</m:sub><m:sup>{m_run('n+1')}</m:sup></m:sSubSup>", "x_1^(n+1)"),
        (f"<m:rad><m:deg/><m:e>{m_run('2')}</m:e></m:rad>", "√(2)"),
        (f"<m:rad><m:deg>{m_run('3')}</m:deg><m:e>{m_run('8')}</m:e></m:rad>", "8^(1/3)"),
        (m_run("2") + f"<m:d><m:e>{m_run('3+4')}</m:e></m:d>", "2(3+4)"),
        (f"<m:d><m:dPr><m:begChr m:val='['/><m:endChr m:val=''/></m:dPr><m:e>{m_run('3')}</m:e></m:d>", "[3"),
        (f"<m:nary><m:naryPr><m:chr m:val='∑'/></m:naryPr><m:sub>{m_run('i=1')}</m:sub><m:e>{m_run('i')}</m:e></m:nary>", "∑_(i=1) i"),
        (f"<m:m><m:mr><m:e>{m_run('1')}</m:e><m:e>{m_run('2')}</m:e></m:mr><m:mr><m:e>{m_run('3')}</m:e></m:mr></m:m>", "1, 2; 3"),
    ],
)  # fmt: skip
def test_docx_equations(equation: str, text: str) -> None:
    math = f"<m:oMath>{equation}</m:oMath>"
    document = word(f"<w:p><w:r><w:t>It is</w:t><w:tab/></w:r>{math}</w:p><w:p><m:oMathPara>{math}</m:oMathPara></w:p>")
    assert document.text == f"It is {text}\n\n{text}"


def test_docx_equations_nested_deeply_take_linear_time() -> None:
    equation = m_run("1")
    for _ in range(40):
        equation = f"<m:d><m:e>{equation}</m:e></m:d>"
    assert word(f"<w:p><m:oMath>{equation}</m:oMath></w:p>").text == "(" * 40 + "1" + ")" * 40


def test_docx_superscripts() -> None:
    def run(text: str, raised: str = "") -> str:
        align = f"<w:rPr><w:vertAlign w:val='{raised}'/></w:rPr>" if raised else ""
        return f"<w:r>{align}<w:t xml:space='preserve'>{text}</w:t></w:r>"

    power = run("5×10") + run("-", "superscript") + run("6", "superscript")
    link = f"<w:hyperlink>{run('n+1', 'superscript')}</w:hyperlink>"
    ends = run("H") + run("2", "subscript") + run("O, the 1") + run("st ", "superscript") + run("of May")
    math = f"{run('3', 'superscript')}<m:oMath>{m_run('x')}</m:oMath>"
    body = f"<w:p>{power}{run(' x')}{link} {run(', ')}{ends}{math}</w:p>"
    assert word(body).text == "5×10^-6 x^(n+1), H2O, the 1st of May^3x"
    gap = "<w:r><w:rPr><w:vertAlign w:val='superscript'/></w:rPr><w:tab/></w:r>"
    assert word(f"<w:p>{run('a')}{gap}{run('b')}</w:p>").text == "a b"


def test_docx_symbols() -> None:
    def sym(font: str, code: str) -> str:
        return f"<w:r><w:sym w:font='{font}' w:char='{code}'/></w:r>"

    five = "<w:r><w:t xml:space='preserve'>5 </w:t></w:r>"
    known = (
        sym("Symbol", "F0B1")
        + sym("Symbol", "B3")
        + sym("Symbol", "F06D")
        + sym("Wingdings", "F0FE")
        + sym("Arial", "00B5")
    )
    document = word(f"<w:p>{five}{known}</w:p>")
    assert (document.text, document.warnings) == ("5 ±≥μ☑µ", ())
    document = word(f"<w:p>{five}{sym('Webdings', 'F061')}{sym('Symbol', 'x')}</w:p>")
    assert document.text == "5 \ufffd\ufffd"
    assert document.warnings == ("symbols of a font that is not known here (Symbol, Webdings) read \ufffd: 2 in all",)


def test_docx_rows_in_content_controls_and_custom_xml() -> None:
    def row(*cells: str) -> str:
        return f"<w:tr>{''.join(f'<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>' for cell in cells)}</w:tr>"

    inner = f"<w:tbl>{row('deep', 'er')}</w:tbl>"
    rows = (
        row("Part", "Mass")
        + f"<w:sdt><w:sdtContent>{row('Door', '7 kg')}</w:sdtContent></w:sdt>"
        + f"<w:customXml><w:sdt><w:sdtContent>{row('Shelf', '2 kg')}</w:sdtContent></w:sdt></w:customXml>"
        + f"<w:tr><w:tc><w:p/>{inner}</w:tc></w:tr>"
    )
    assert word(f"<w:tbl>{rows}</w:tbl>").text == "Part: Mass.\nDoor: 7 kg.\nShelf: 2 kg.\ndeep: er."


def test_docx_whose_inside_is_broken_or_has_macros() -> None:
    assert "damaged Word file" in refusal(rewritten("word/document.xml", b"</w:body>", b""))
    assert "damaged Word file" in refusal(rewritten("_rels/.rels", b"officeDocument", b"nothing"))
    main = b"wordprocessingml.document.main+xml"
    macros = rewritten(
        "[Content_Types].xml",
        b"vnd.openxmlformats-officedocument." + main,
        b"vnd.ms-word.document.macroEnabled.main+xml",
    )
    assert "macros or a template" in refusal(macros)


def test_an_e_mail_is_its_headers_and_its_text() -> None:
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = "Kiln: Köln", "Ann <ann@example.org>", "bob@example.org"
    message["Date"] = "Mon, 30 Nov 2026 10:00:00 +0000"
    message.set_content("The kiln opens at 9.\n\n-- \nAnn Smith, Kiln Ltd\n", cte="base64")
    message.add_alternative("<html><p>The <b>kiln</b> is red.</html>", subtype="html")
    read = read_bytes(message.as_bytes(), "mail.eml")
    headers = (
        "Subject: Kiln: Köln\nFrom: Ann <ann@example.org>\nTo: bob@example.org\nDate: Mon, 30 Nov 2026 10:00:00 +0000"
    )
    assert (read.text, read.title, read.media_type) == (
        f"{headers}\n\nThe kiln opens at 9.",
        "Kiln: Köln",
        "message/rfc822",
    )

    page = EmailMessage()
    page.set_content("<html><p>The kiln costs 9&nbsp;€.", subtype="html", charset="iso-8859-15")
    page.add_attachment(b"%PDF-", maintype="application", subtype="pdf", filename="bill.pdf")
    read = read_bytes(page.as_bytes(), "bill.eml")
    assert read.text == "The kiln costs 9 €." and read.title == "bill"
    assert read.warnings == ("attachments are not read: bill.pdf",)
    empty = EmailMessage()
    empty.add_attachment(b"%PDF-", maintype="application", subtype="pdf", filename="bill.pdf")
    assert "save its attachments (bill.pdf)" in refusal(io.BytesIO(empty.as_bytes()), file_name="bill.eml")


ALIGNED = """\
Prices for members:

Article            Price   Stock
Blue lamp            9     in Riga
Amber bulb, old      4

  12 Mon  b
  3 Tue   c"""
RECORDS = """\
Name: Ada Olsen
Room: B2

Name: Kim Novak
Room: C4
Phone: 17: 30

Note: one alone
Date: May

```
Name: Ada Olsen
Room: B2

Name: Kim Novak
Room: C4
```"""


def test_aligned_columns_and_records_are_rows() -> None:
    document = Document.from_text(ALIGNED)
    assert document.text.splitlines() == [
        "Prices for members:", "", "Blue lamp, Price: 9. Blue lamp, Stock: in Riga.".replace("Blue", "Article Blue"),
        "Article Amber bulb, old, Price: 4.", "", "  12 Mon  b", "  3 Tue   c",
    ]  # fmt: skip
    assert [document.text[row:].partition(",")[0] for row in document.rows] == [
        "Article Blue lamp",
        "Article Amber bulb",
    ]
    document = Document.from_text(RECORDS)
    code = RECORDS[RECORDS.index("Note") :]
    assert document.text == (
        "Name Ada Olsen, Room: B2.\n\nName Kim Novak, Room: C4. Name Kim Novak, Phone: 17: 30.\n\n" + code
    )
    assert len(document.rows) == 2


def test_csv_rows_keep_their_meaning_alone() -> None:
    document = read_document(FILES / "parts.csv")
    assert document.text == (
        "Part Handle, Weight: 13 g. Part Handle, Price, net: 4.50.\nPart Shelf, upper, Price, net: 19.00."
    )
    assert document.media_type == "text/csv"
    assert read_bytes("name;age\nAda;36\n\nBo;\n", "x.csv").text == "name Ada, age: 36.\nname: Bo."
    assert read_bytes("a\tb, c\n1\t2, 3\n", "x.tsv").text == "a 1, b, c: 2, 3."
    assert read_bytes("1,2\n3,4,5\n", "x.csv").text == "1: 2.\n3: 4. 3: 5."
    assert read_bytes('a,b\n"two\nlines",x\n', "x.csv").text == "a two lines, b: x."
    assert read_bytes('a, b, c\nx, "1 High St, Leeds", z\n', "x.csv").text == "a x, b: 1 High St, Leeds. a x, c: z."


@pytest.mark.parametrize("break_", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c"])
def test_csv_cells_with_breaks_that_end_no_record(break_: str) -> None:
    assert read_bytes(f"name,note\nAda,a{break_}b\nBo,c\n", "x.csv").text == "name Ada, note: a b.\nname Bo, note: c."
    assert read_bytes("name,note\nAda,a\u037e\nBo,c\u00ad\n", "x.csv").text == "name Ada, note: a;.\nname Bo, note: c."
    assert "only white space" in refusal(io.BytesIO(b" \n\n"), file_name="x.csv")


def test_csv_whose_first_line_names_the_delimiter() -> None:
    for line in ("sep=;", "SEP=;"):
        assert read_bytes(f"{line}\r\nname;age, in years\r\nAda;36\r\n", "x.csv").text == "name Ada, age, in years: 36."
    assert read_bytes("sep=\t\nname\tage\nAda\t36\n", "x.csv").text == "name Ada, age: 36."
    assert "line 3" in refusal(io.BytesIO(b'sep=;\na;b\n"1;2\n'), file_name="x.csv")
    assert read_bytes("sep=;\nname|age;x\nAda|36;y\n", "x.tsv").text == "name|age Ada|36, x: y."


def test_years_name_columns_and_other_numbers_do_not() -> None:
    named = read_bytes("Country,Code,2019,2020\nPeru,PE,3,4\n", "x.csv").text
    assert named == "Country Peru, Code: PE. Country Peru, 2019: 3. Country Peru, 2020: 4."
    assert table("<td>Country<td>2019<td>2020", "<td>Peru<td>3<td>4") == "Country Peru, 2019: 3. Country Peru, 2020: 4."
    for first in ("Ada,2019,2019", "Ada,1815,1852", "2019,2020,2021", "Ada,2019,12", "Ada,1990,London"):
        lines = read_bytes(f"{first}\nx,3,4\n", "x.csv").text.split("\n")
        assert len(lines) == 2 and lines[0].startswith(f"{first.split(',')[0]}: ")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(encoding: str) -> None:
    assert read_bytes("Grønvik, 3 €, 日本\r\n".encode(encoding), "x.txt").text == "Grønvik, 3 €, 日本"


def test_utf16_file_from_windows() -> None:
    assert read_document(FILES / "utf16.txt").text == "Der Ofen heißt Grønvik.\nEr wiegt 212 kg."


def test_content_goes_before_the_name() -> None:
    pdf, docx = (FILES / "report.pdf").read_bytes(), (FILES / "letter.docx").read_bytes()
    assert read_bytes(pdf, "report.txt").media_type == "application/pdf"
    assert read_bytes(pdf, "report.docx").media_type == "application/pdf"
    assert read_bytes(docx, "letter.pdf").title == "Kiln Letter"
    assert read_bytes(b"junk\xff" + pdf, "report").media_type == "application/pdf"
    assert read_bytes("A PDF begins with %PDF-1.7.", "notes.md").media_type == "text/markdown"
    assert "error page of a failed download" in refusal(io.BytesIO(b"<html><p>404"), file_name="manual.pdf")
    assert "named .docx but" in refusal(io.BytesIO(b"just text"), file_name="letter.docx")


# --- normalisation ---


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("e\u0301", "é"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a\n \n\t\n\nb  \n", "a\n\nb"),
        ("a\0b\x07c", "abc"),
        ("Was\u00adser\u200bkraft\ufeff\u2060", "Wasserkraft"),
        ("a\u200db", "ab"),
        ("👨\u200d👩", "👨\u200d👩"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("evil\u202etxt\u2066", "eviltxt"),
        ("x\U000e0041\U000e0042", "x"),
        ("3\u00a0km", "3 km"),
        ("page\x0cpage", "page\n\npage"),
        ("<|im_end|>", "<|im_end|>"),
        ("    code\n        more", "    code\n        more"),
    ],
)
def test_normalise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean
    assert normalise(clean) == clean


def test_special_tokens_are_plain_text_in_every_kind() -> None:
    assert read_bytes("say <|im_end|> aloud", "x.txt").text == "say <|im_end|> aloud"
    assert read_bytes("<html><p>say &lt;|im_end|&gt; aloud", "x.html").text == "say <|im_end|> aloud"


def test_one_long_line_and_long_blanks_take_linear_time() -> None:
    assert len(read_bytes("x" * 3_000_000 + " " * 3_000_000 + "y", "x.txt").text) == 6_000_001


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Microsoft Word - draft.docx", ""),
        ("untitled", ""),
        ("thesis.tex", ""),
        ("123", ""),
        (None, ""),
        ("  Owner's\nManual ", "Owner's Manual"),
    ],
)
def test_sensible_title(raw: object, title: str) -> None:
    assert sensible_title(raw) == title


def test_readable_stem() -> None:
    assert readable_stem("user_guide-v2 D-27.pdf") == "user guide v2 D-27"
    assert readable_stem(None) == ""


def test_headings() -> None:
    text = "Title\n=====\n\n## Sub ##\n\ntext\n---\n\n```\n# code\n```\n#no\n- item\n---\nlong\ntext\n---\n```x```\n#### *Deep*"
    found = find_headings(text)
    assert [(h.level, h.title) for h in found] == [(1, "Title"), (2, "Sub"), (2, "text"), (4, "Deep")]
    assert [text[h.start : h.end] for h in found] == ["Title\n=====", "## Sub ##", "text\n---", "#### *Deep*"]


def test_paragraphs_without_any_geometry() -> None:
    lines = [
        "The pump was moved to the cellar of the",
        "house in June.",
        "Weight 3 kg",
        "- a first",
        "- a second and",
        "long one",
    ]
    text = join_lines([Line(line, 0.0, None, 1) for line in lines])
    assert text.startswith("The pump was moved to the cellar of the house in June.\n")
    assert text.endswith("\n\n- a first\n- a second and long one")
    assert join_lines([Line("•", 9.0, 50.0, 1), Line("alone", 9.0, 50.0, 1)]) == "- alone"


def test_running_headers_page_numbers_and_suspended_hyphens() -> None:
    lines = []
    for page, colour in enumerate(("Red", "Blue", "Green", "White"), 1):
        lines.append(Line("Annual Report", 10.0, 800.0, page))
        lines.append(Line(f"{colour} ink marks the odd-", 10.0, 700.0, page))
        lines.append(Line("and even-numbered rows.", 10.0, 688.0, page))
        lines.append(Line(f"The {colour.lower()} ones end here.", 10.0, 676.0, page))
        lines.append(Line(f"- {page} -", 10.0, 30.0, page))
    text = join_lines(lines)
    assert text.count("Annual Report") == 1
    assert text.count("ink marks the odd- and even-numbered rows. The") == 4
    assert "- 2 -" not in text
    assert join_lines([Line("1999", 10.0, 700.0, 1)]) == "1999"


def paged(*edges: str, foot: bool = False) -> str:
    """Pages of text with these lines at their top, or at their foot."""
    lines = []
    for page, edge in enumerate(edges, 1):
        own = [Line(edge, 10.0, 30.0 if foot else 800.0, page)] if edge else []
        body = [Line(f"Ink of page {'abcdefgh'[page]} weighs a gram.", 10.0, 700.0, page)]
        lines += body + own if foot else own + body
    return join_lines(lines)


@pytest.mark.parametrize("foot", [False, True])
@pytest.mark.parametrize(
    "edges",
    [
        ("Question 1", "Question 4", "Question 7", "Question 9"),
        ("12 34 56", "13 35 57", "14 36 58", "15 37 59"),
        ("1 17", "2 18", "3 19", "4 20"),
        ("Total 120", "Total 340", "Total 560"),
        ("1999", "2004", "1987"),
        ("Day 1 of the trip", "Day 3 of the trip", "Day 5 of the trip"),
        ("3 pumps in 7", "4 pumps in 2", "9 pumps in 5"),
    ],
)
def test_a_line_whose_number_is_not_that_of_the_page_is_text(edges: tuple[str, ...], foot: bool) -> None:
    text = paged(*edges, foot=foot)
    assert all(text.count(edge) == 1 for edge in edges)


def test_headings_that_count_from_one_on_each_page_are_text() -> None:
    assert all(f"Day {day}" in paged("Day 1", "Day 2", "Day 3", "Day 4") for day in range(1, 5))


@pytest.mark.parametrize("foot", [False, True])
@pytest.mark.parametrize(
    "edges",
    [
        ("Kiln Manual 1", "Kiln Manual 2", "Kiln Manual 3"),
        ("", "2 Kiln Manual", "", "4 Kiln Manual", "", "6 Kiln Manual", ""),
        ("", "Kilns 17", "Kilns 18", "Kilns 19", "Doors 20", "Doors 21", "Doors 22"),
        ("12 CHAPTER 1. KILNS", "13 CHAPTER 1. KILNS", "14 CHAPTER 1. KILNS"),
        ("7", "8", "9", "3.5 m"),
        ("Page 3 of 9", "Page 4 of 9"),
        ("1/3", "2/3", "3/3"),
    ],
)
def test_page_numbers_and_titles_beside_them_go(edges: tuple[str, ...], foot: bool) -> None:
    text = paged(*edges, foot=foot)
    assert not any(edge in text for edge in edges if edge and edge != "3.5 m")
    assert text.count("Ink of page") == len(edges)


def test_a_heading_that_comes_on_every_page_is_no_running_header() -> None:
    lines = []
    for page, colour in enumerate(("Red", "Blue", "Green"), 1):
        lines += [
            Line("Data", 14.0, 800.0, page),
            Line(f"{colour} ink weighs {page} g a line or so.", 10.0, 770.0, page),
        ]
    assert join_lines(lines).count("# Data\n\n") == 3


def test_a_sign_is_no_bullet_and_an_initial_no_number() -> None:
    lines = [
        Line("The mean of January in the valley of the river was", 10.0, 80.0, 1),
        Line("-5 degrees, as measured in the year of the frost by", 10.0, 68.0, 1),
        Line("J. Smith.", 10.0, 56.0, 1),
    ]
    assert join_lines(lines) == " ".join(line.text for line in lines)


def test_a_paragraph_without_end_takes_linear_time() -> None:
    line = "word word word word word word word word word word word word"
    start = time.process_time()
    text = join_lines([Line(line, 10.0, -12.0 * i, 1) for i in range(60_000)])
    assert len(text) == 60_000 * (len(line) + 1) - 1
    assert time.process_time() - start < 4  # about 0.5 s


# --- refusals: each names the cause and the remedy ---


@pytest.mark.parametrize(
    ("name", "cause", "remedy"),
    [
        ("nowhere.txt", "does not exist", "check the path"),
        (".", "is a directory", "name a file"),
        ("encrypted.pdf", "is encrypted", "qpdf --password=... --decrypt"),
        ("encrypted_aes.pdf", "is encrypted", "qpdf --password=... --decrypt"),
        ("scan.pdf", "no text layer", "ocrmypdf"),
        ("truncated.pdf", "truncated PDF", "download it again"),
        ("damaged.pdf", "damaged PDF", "qpdf"),
        ("cyclic.pdf", "damaged PDF", "qpdf"),
        ("bomb.pdf", "safety limit", "if you trust it"),
        ("truncated.docx", "truncated or damaged Word file", "download it again"),
        ("bomb.docx", "zip bomb", "save it again"),
        ("entity.docx", "declares XML entities", "new file"),
        ("empty.docx", "holds no text", "ocrmypdf"),
        ("locked.docx", "locked with a password", "remove the password"),
        ("legacy.doc", "old .doc format", "soffice --headless --convert-to docx"),
        ("book.xlsx", "Excel file", "save each sheet as CSV"),
        ("latin1.txt", "not UTF-8 (byte 0xDF at offset 12)", "iconv -f WINDOWS-1252"),
    ],
)
def test_refused_files(name: str, cause: str, remedy: str) -> None:
    message = refusal(FILES / name)
    assert str(FILES / name) in message
    assert cause in message
    assert remedy in message.split(cause)[1]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "name", "cause"),
    [
        (b"", "x.txt", "empty (0 bytes)"),
        (b"", "x.pdf", "an empty PDF (0 bytes)"),
        (b" \n\t\xc2\xa0\xe2\x80\x8b", "x.txt", "only white space"),
        (b"\xef\xbb\xbf", "x.md", "only white space"),
        (b"<html><script>x()</script>", "x.html", "no visible text"),
        (b"<html>", "x.html", "no visible text"),
        (b"a,b\n", "x.csv", "no row below it"),
        (b'a,b\n"1,2\n3,4\n', "x.csv", "quotation mark never closed"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "x.txt", "a PNG image"),
        (b"\x1f\x8b\x08" + bytes(50), "x", "gzip"),
        (b"{\\rtf1 hello}", "x.txt", "an RTF file"),
        (bytes(range(256)) * 4, "x.bin", "binary file of an unknown kind"),
        (b"\x01\x02\x03\x04" * 100, "x.bin", "binary file of an unknown kind"),
        ("Text".encode("utf-16-le") * 9, "x.txt", "without a byte order mark"),
        ("Text".encode("utf-16") + b"\x00", "x.txt", "breaks off"),
        (b"PK\x03\x04" + bytes(100), "x.docx", "truncated or damaged Word file"),
        (b"%PDF-1.7\n", "x.pdf", "truncated PDF"),
        (b"%PDF-1.7\n%%EOF\n", "x.pdf", "damaged PDF"),
    ],
)
def test_refused_bytes(data: bytes, name: str, cause: str) -> None:
    assert cause in refusal(io.BytesIO(data), file_name=name)


def test_a_name_cannot_forge_a_line_in_a_log() -> None:
    message = refusal(io.BytesIO(b""), file_name="a\n\x1b[31mERROR.txt" + "x" * 5000)
    assert message.isprintable()
    assert len(message) < 500


def test_limits_on_bytes_pages_and_text() -> None:
    assert "larger than 10 bytes" in refusal(FILES / "notes.txt", limits=Limits(max_bytes=10))
    assert "2 pages, more than 1" in refusal(FILES / "report.pdf", limits=Limits(max_pages=1))
    assert "more than 50 bytes of text" in refusal(FILES / "notes.txt", limits=Limits(max_text_bytes=50))
    assert "more than 50 bytes of text" in refusal(FILES / "letter.docx", limits=Limits(max_text_bytes=50))
    assert "zip bomb" in refusal(FILES / "letter.docx", limits=Limits(max_unpacked_bytes=1000))


@pytest.mark.skipif(sys.platform == "win32", reason="needs /dev/zero")
def test_a_device_without_end_is_refused() -> None:
    assert "pipe or a device" in refusal("/dev/zero")
    with open("/dev/zero", "rb") as stream:
        assert "larger than" in refusal(stream, limits=Limits(max_bytes=1000))


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    """In a process of its own: opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-m", "loracast", "learn", str(tmp_path / "pipe")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "is a pipe or a device" in done.stderr and "Traceback" not in done.stderr
