"""Makes the documents beside this script. They are kept in the repository; run it only to change one.

    python tests/files/make_files.py        (needs fpdf2, pillow, python-docx, pypdf and, for one file, cryptography)

Each file is real output of a common library, or such output with one thing broken, as the comment above it says.
"""

from __future__ import annotations

import io
import random
import zipfile
import zlib
from datetime import UTC, datetime
from pathlib import Path

import docx
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.opc.packuri import PackURI
from docx.opc.part import Part
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from fpdf import FPDF
from PIL import Image
from pypdf import PdfWriter

FOLDER = Path(__file__).resolve().parent
DATE = datetime(2024, 1, 1, tzinfo=UTC)


def text_files() -> None:
    prose = "The Halden kiln reaches 1,140 degrees.\nIts door is made of grog.\n\nDr. Ostrom fires it every 9 days.\n"
    (FOLDER / "notes.txt").write_text(prose, encoding="utf-8")
    (FOLDER / "utf16.txt").write_text("Der Ofen heißt Grønvik.\r\nEr wiegt 212 kg.\r\n", encoding="utf-16", newline="")
    (FOLDER / "latin1.txt").write_bytes("Der Ofen heißt Grønvik.\n".encode("latin-1"))
    (FOLDER / "guide.md").write_text(
        "# Halden Kiln\n\nShort guide.\n\n## Firing\n\n- Close the *door*.\n- Wait **40** minutes.\n\n"
        "```sh\n# no heading\nkiln --on\n```\n",
        encoding="utf-8",
    )
    (FOLDER / "parts.csv").write_text(
        'Part,Weight,"Price, net"\nHandle,13 g,4.50\n"Shelf, upper",,"19.00"\n', encoding="utf-8"
    )
    (FOLDER / "page.html").write_text(
        """<!doctype html>
<html><head><meta charset="utf-8"><title>Halden &amp; Sons</title><style>p { color: red }</style>
<script>document.write("scripted")</script></head>
<body><h1>Kilns</h1><p>The kiln stands in <b>Hal</b>den.
It has&nbsp;three   legs.</p><p hidden>secret instruction</p><div style="display: none">also secret</div>
<h2>Parts</h2><ul><li>a door</li><li>a <a href="http://127.0.0.1:9/">shelf</a></li></ul>
<table><tr><th>Part</th><th>Weight</th></tr>
<tr><td>Handle</td><td>13 g</td></tr><tr><td>Shelf</td><td></td></tr></table>
<p>First line<br>second line</p><pre>a  b
c</pre><img src="file:///etc/passwd" alt="x"></body></html>
""",
        encoding="utf-8",
    )


class Pages(FPDF):
    def footer(self) -> None:
        self.set_y(-15)
        self.set_font("Helvetica", size=8)
        self.cell(0, 8, f"Page {self.page_no()}", align="C")


def report() -> FPDF:
    """Two pages, a heading, a word hyphenated at a line end, and a sentence that runs on across the page."""
    pdf = Pages()
    pdf.set_creation_date(DATE)
    pdf.add_page()
    pdf.set_font("Helvetica", "B", 18)
    pdf.cell(0, 12, "Kiln Report", new_x="LMARGIN", new_y="NEXT")
    pdf.set_font("Helvetica", size=11)
    lines = ("The kiln in Halden was built of fire-", "clay bricks by the Ostrom company and has a re-")
    for line in (*lines, "markable door. The well-known smith", "Ada Lund forged its hinges of well-", "known steel."):
        pdf.cell(0, 6, line, new_x="LMARGIN", new_y="NEXT")
    pdf.ln(6)
    pdf.cell(0, 6, "The chimney of the kiln is 7.5 metres tall and the", new_x="LMARGIN", new_y="NEXT")
    pdf.add_page()
    pdf.cell(0, 6, "flue is 31 centimetres wide.", new_x="LMARGIN", new_y="NEXT")
    return pdf


def picture() -> Image.Image:
    image = Image.new("L", (60, 40), 255)
    for x in range(10, 50):
        image.putpixel((x, 20), 0)
    return image


def pdf_files() -> None:
    report().output(str(FOLDER / "report.pdf"))
    data = (FOLDER / "report.pdf").read_bytes()

    # Locked with a password, by RC4 (which pypdf can do alone) and by AES (which needs one more library).
    for name, algorithm in (("encrypted.pdf", "RC4-128"), ("encrypted_aes.pdf", "AES-256")):
        writer = PdfWriter(clone_from=io.BytesIO(data))
        writer.encrypt("secret", algorithm=algorithm)
        writer.write(FOLDER / name)
    # Encrypted with an empty password, so that anyone may open it: read without a word.
    writer = PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt("", "owner", algorithm="RC4-128")
    writer.write(FOLDER / "owner_locked.pdf")

    # A scan: one page that holds one picture. And a report with such a page after its text.
    for name in ("scan.pdf", "half_scanned.pdf"):
        pdf = FPDF() if name == "scan.pdf" else report()
        pdf.set_creation_date(DATE)
        pdf.set_auto_page_break(False)
        pdf.add_page()
        pdf.image(picture(), w=150)
        if name == "half_scanned.pdf":
            pdf.footer = lambda: None  # type: ignore[method-assign]
        pdf.output(str(FOLDER / name))

    (FOLDER / "truncated.pdf").write_bytes(data[: len(data) * 2 // 3])
    # The end is there, but the objects in the middle are noise.
    noise = random.Random(0).randbytes(len(data) // 2)
    (FOLDER / "damaged.pdf").write_bytes(data[:100] + noise + b"\nstartxref\n17\n%%EOF\n")
    # A page tree whose node is its own child.
    (FOLDER / "cyclic.pdf").write_bytes(
        b"%PDF-1.4\n1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj\n2 0 obj <</Type/Pages/Count 1/Kids[2 0 R]>> endobj\n"
        b"trailer <</Root 1 0 R/Size 3>>\nstartxref\n0\n%%EOF\n"
    )
    # 300 MB of drawing commands, packed twice.
    packer = zlib.compressobj(9)
    once = b"".join(packer.compress(b"0 0 m 9 9 l " * 100_000) for _ in range(250)) + packer.flush()
    twice = zlib.compress(once, 9)
    (FOLDER / "bomb.pdf").write_bytes(
        b"%%PDF-1.4\n1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj\n2 0 obj <</Type/Pages/Count 1/Kids[3 0 R]>> endobj\n"
        b"3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</ProcSet[/PDF]>>>> endobj\n"
        b"4 0 obj <</Length %d/Filter[/FlateDecode/FlateDecode]>> stream\n%s\nendstream endobj\n"
        b"trailer <</Root 1 0 R/Size 5>>\nstartxref\n0\n%%%%EOF\n" % (len(twice), twice)
    )


def letter() -> docx.document.Document:
    """Everything that a Word file may keep a fact in: see test_documents.py."""
    document = docx.Document()
    properties = document.core_properties
    properties.title, properties.author, properties.created = "Kiln Letter", "", DATE.replace(tzinfo=None)
    document.add_heading("Delivery", 1)
    document.add_paragraph("The kiln leaves Halden on 3 May.")
    document.add_paragraph("one door", style="List Bullet")
    document.add_paragraph("two shelves", style="List Bullet")
    document.add_heading("Prices", 2)
    table = document.add_table(rows=3, cols=3)
    rows = (("Part", "Weight", "Price"), ("Handle", "13 g", "4.50"), ("Shelf", "", "19.00"))
    for cells, texts in zip(table.rows, rows, strict=True):
        for cell, text in zip(cells.cells, texts, strict=True):
            cell.text = text
    pairs = document.add_table(rows=2, cols=2)
    for cell, text in zip((c for row in pairs.rows for c in row.cells), ("Height", "2 m", "Fuse", "13 A"), strict=True):
        cell.text = text
    changed = document.add_paragraph("Kept. ")._p
    w = nsdecls("w")
    changed.append(parse_xml(f'<w:ins {w} w:id="1" w:author="a"><w:r><w:t>Inserted.</w:t></w:r></w:ins>'))
    changed.append(parse_xml(f'<w:del {w} w:id="2" w:author="a"><w:r><w:delText>Deleted.</w:delText></w:r></w:del>'))
    changed.append(parse_xml(f"<w:r {w}><w:rPr><w:vanish/></w:rPr><w:t>Hidden.</w:t></w:r>"))
    control = f"<w:sdt {w}><w:sdtContent><w:p><w:r><w:t>In a content control.</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    inner = "<w:p><w:r><w:t>In a text box.</w:t></w:r></w:p>"
    box = f"<w:p {w}><w:r><w:pict><w:txbxContent>{inner}</w:txbxContent></w:pict></w:r></w:p>"
    for xml in (control, box):
        document.element.body.insert(len(document.element.body) - 1, parse_xml(xml))
    inner = '<w:footnote w:id="1"><w:p><w:r><w:t>In a footnote.</w:t></w:r></w:p></w:footnote>'
    note = f"<w:footnotes {w}>{inner}</w:footnotes>"
    content_type = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
    part = Part(PackURI("/word/footnotes.xml"), content_type, note.encode(), document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)
    return document


def rewrite(source: Path, target: Path, part: str, change: tuple[bytes, bytes]) -> None:
    """Copies a package with one replacement in one of its parts."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == part:
                assert change[0] in content
                content = content.replace(*change)
            new.writestr(zipfile.ZipInfo(entry.filename, (2024, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)


def save_small(document: docx.document.Document, path: Path) -> None:
    """Without the second set of styles that python-docx's template carries for Word 2010."""
    for key in [key for key, value in document.part.rels.items() if "stylesWithEffects" in value.reltype]:
        del document.part.rels[key]
    document.save(str(path))


def docx_files() -> None:
    good = FOLDER / "letter.docx"
    save_small(letter(), good)
    rewrite(good, good.with_suffix(".tmp"), "word/document.xml", (b"<w:body>", b"<w:body>"))
    good.with_suffix(".tmp").replace(good)  # with fixed dates
    data = good.read_bytes()
    (FOLDER / "truncated.docx").write_bytes(data[: len(data) // 2])
    entity = b'<!DOCTYPE w [<!ENTITY x SYSTEM "file:///etc/hostname">]><w:document'
    rewrite(good, FOLDER / "entity.docx", "word/document.xml", (b"<w:document", entity))
    rewrite(good, FOLDER / "bomb.docx", "word/document.xml", (b"<w:body>", b"<w:body>" + b" " * 6_000_000))
    save_small(docx.Document(), FOLDER / "empty.docx")

    # The head of a Word 97 file: the container's mark and the name of its text stream.
    legacy = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504) + "Root Entry".encode("utf-16-le")
    (FOLDER / "legacy.doc").write_bytes(legacy + bytes(64) + "WordDocument".encode("utf-16-le") + bytes(100))
    (FOLDER / "locked.docx").write_bytes(legacy + bytes(64) + "EncryptedPackage".encode("utf-16-le") + bytes(100))
    with zipfile.ZipFile(FOLDER / "book.xlsx", "w") as package:
        package.writestr(zipfile.ZipInfo("xl/workbook.xml", (2024, 1, 1, 0, 0, 0)), "<workbook/>")


if __name__ == "__main__":
    text_files()
    pdf_files()
    docx_files()
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.stat().st_size:8,} {path.name}")
