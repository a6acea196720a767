"""Sets manual.md as manual.pdf, the invented owner's manual that the demo and the tests internalise.

    python examples/make_manual.py        (needs fpdf2, a development dependency)

The product, its maker and every fact are made up, so that no model can know an answer that it has not read. The same
input gives the same bytes: the creation date is fixed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fpdf import FPDF

FOLDER = Path(__file__).resolve().parent
BODY_PT, HEADING_PT, TITLE_PT = 11.5, 15, 20


class Manual(FPDF):
    """A4 with page numbers, as manuals have them: the reader must cope with a footer between two paragraphs."""

    def footer(self) -> None:
        self.set_y(-15)
        self.set_font("Helvetica", size=8)
        self.cell(0, 8, f"Page {self.page_no()} of {{nb}}", align="C")


def make_manual(markdown: str) -> FPDF:
    """One block of the markdown a paragraph; "# " is the title, "## " a heading, everything else body text."""
    pdf = Manual(format="A4")
    pdf.set_margins(22, 20)
    pdf.set_auto_page_break(True, margin=20)
    pdf.set_creation_date(datetime(2024, 1, 1, tzinfo=UTC))
    pdf.add_page()
    for block in markdown.strip().split("\n\n"):
        if block.startswith("# "):
            title = block.removeprefix("# ")
            pdf.set_title(title)
            pdf.set_font("Helvetica", "B", TITLE_PT)
            pdf.multi_cell(0, 10, title, align="L", new_x="LMARGIN", new_y="NEXT")
            pdf.ln(4)
        elif block.startswith("## "):
            pdf.ln(3)
            if pdf.will_page_break(30):  # no heading alone at the foot of a page
                pdf.add_page()
            pdf.set_font("Helvetica", "B", HEADING_PT)
            pdf.multi_cell(0, 8, block.removeprefix("## "), align="L", new_x="LMARGIN", new_y="NEXT")
            pdf.ln(1)
        else:
            pdf.set_font("Helvetica", size=BODY_PT)
            pdf.multi_cell(0, 6.2, block, align="L", new_x="LMARGIN", new_y="NEXT")
            pdf.ln(2.5)
    return pdf


if __name__ == "__main__":
    make_manual((FOLDER / "manual.md").read_text(encoding="utf-8")).output(str(FOLDER / "manual.pdf"))
