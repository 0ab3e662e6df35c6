"""Documents for the tests of the service `notes`, written by tools that it does not read them with."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import docx
from docx.shared import Pt
from reportlab.lib import colors, pdfencrypt  # type: ignore[import-untyped]
from reportlab.lib.pagesizes import A4  # type: ignore[import-untyped]
from reportlab.lib.styles import ParagraphStyle, getSampleStyleSheet  # type: ignore[import-untyped]
from reportlab.pdfgen.canvas import Canvas  # type: ignore[import-untyped]
from reportlab.platypus import (  # type: ignore[import-untyped]
    BaseDocTemplate,
    Frame,
    NextPageTemplate,
    PageBreak,
    PageTemplate,
    Paragraph,
    SimpleDocTemplate,
    Spacer,
    Table,
    TableStyle,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

TITLE = "Harbour Tides and Harbour Trade"
PARAGRAPHS = (
    (
        "Harbour tides decide when a loaded ship may enter the port, and harbour masters have kept tide tables for "
        "three hundred years. The tide tables list the height of the water for every hour of the day. Pilots read the "
        "tide tables before they take a ship across the bar."
    ),
    (
        "Trade through the port grew quickly after the new quay was built. Cargo ships bring timber and grain, and "
        "they leave with machinery from the inland towns. The harbour board counts every cargo ship that crosses "
        "the bar."
    ),
    (
        "Storm surges raise the water far above the height that tide tables predict. The harbour board therefore warns "
        "pilots when a storm surge is expected. A storm surge in the year of the great flood destroyed the old quay."
    ),
)
CARGO = [["Cargo", "Ships", "Tonnes"], ["Timber", "120", "48,000"], ["Grain", "85", "61,500"], ["Coal", "12", "9,750"]]


def report_pdf(*, table_style: str = "grid") -> bytes:
    """Return a report: a title, numbered headings, running head and page numbers, a table, an outline, metadata."""
    out = io.BytesIO()
    styles = getSampleStyleSheet()
    template = _Report(out, pagesize=A4, title=TITLE, author="Ada Mason", subject="Tides", keywords="tides, trade")
    story: list[Any] = [Paragraph(TITLE, styles["Title"])]
    for number, (name, text) in enumerate(zip(("Tides", "Trade", "Storms"), PARAGRAPHS, strict=True), 1):
        story += [Paragraph(f"{number}. {name}", styles["Heading1"]), Paragraph(text, styles["BodyText"])]
        if name == "Trade":
            story += [
                Paragraph("2.1. Cargo by kind", styles["Heading2"]),
                cargo_table(table_style),
                Spacer(1, 12),
                Paragraph("The table counts one year.", styles["BodyText"]),
            ]
        story.append(PageBreak())
    template.build(story, onFirstPage=_furniture, onLaterPages=_furniture)
    return out.getvalue()


class _Report(SimpleDocTemplate):  # type: ignore[misc]  # reportlab ships no annotations
    def afterFlowable(self, flowable: Any) -> None:  # noqa: N802 - reportlab's name
        level = {"Heading1": 0, "Heading2": 1}.get(getattr(getattr(flowable, "style", None), "name", ""))
        if level is not None:
            text = flowable.getPlainText()
            self.canv.bookmarkPage(text)
            self.canv.addOutlineEntry(text, text, level=level)


def _furniture(canvas: Canvas, document: Any) -> None:
    canvas.setFont("Helvetica", 8)
    canvas.drawString(72, A4[1] - 40, "Annual report of the harbour board")
    canvas.drawCentredString(A4[0] / 2, 30, f"Page {document.page} of 3")


def cargo_table(style: str = "grid") -> Table:
    """Return the table of cargo, with all lines (``grid``) or as books set it (``rules``)."""
    table = Table([list(row) for row in CARGO], colWidths=[120, 80, 80])
    if style == "grid":
        table.setStyle(TableStyle([("GRID", (0, 0), (-1, -1), 0.5, colors.black)]))
    else:
        lines = [("LINEABOVE", (0, 0), (-1, 0), 1, colors.black), ("LINEBELOW", (0, 0), (-1, 0), 0.5, colors.black)]
        table.setStyle(TableStyle([*lines, ("LINEBELOW", (0, -1), (-1, -1), 1, colors.black)]))
    return table


def columns_pdf() -> bytes:
    """Return a page with a title across and two columns of justified prose below it."""
    out = io.BytesIO()
    width, height = A4
    column = (width - 144 - 24) / 2
    frames = [
        Frame(72, height - 140, width - 144, 70),
        Frame(72, 72, column, height - 230),
        Frame(72 + column + 24, 72, column, height - 230),
    ]
    style = ParagraphStyle("body", fontName="Times-Roman", fontSize=10, leading=12, alignment=4, spaceAfter=6)
    head = ParagraphStyle("head", fontName="Helvetica-Bold", fontSize=18, leading=22)
    story: list[Any] = [NextPageTemplate("two"), Paragraph("A Title Across Both Columns", head), Spacer(1, 60)]
    for number in range(1, 25):
        words = " ".join(f"word{number}x{n} alongside others" for n in range(12))
        story.append(Paragraph(f"Paragraph {number} begins here. {words}. Paragraph {number} ends here.", style))
    document = BaseDocTemplate(out, pagesize=A4)
    document.addPageTemplates([PageTemplate("two", frames)])
    document.build(story)
    return out.getvalue()


def lines_pdf(pages: Sequence[Sequence[str]], *, leading: float = 14, password: str = "") -> bytes:
    """Return a PDF with one text line for each string, ``leading`` points apart."""
    out = io.BytesIO()
    encryption = pdfencrypt.StandardEncryption(password) if password else None
    canvas = Canvas(out, pagesize=A4, encrypt=encryption)
    for page in pages:
        canvas.setFont("Times-Roman", 11)
        for number, line in enumerate(page):
            canvas.drawString(72, A4[1] - 100 - leading * number, line)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def scanned_pdf() -> bytes:
    """Return two pages that are pictures."""
    from PIL import Image
    from reportlab.lib.utils import ImageReader  # type: ignore[import-untyped]

    out = io.BytesIO()
    canvas = Canvas(out, pagesize=A4)
    for shade in (200, 230):
        canvas.drawImage(ImageReader(Image.new("L", (400, 600), shade)), 50, 50, 400, 600)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def report_docx() -> bytes:
    """Return the report as DOCX: styles for headings, a list, a table with merged cells, a link, core properties."""
    document = docx.Document()
    document.core_properties.title = TITLE
    document.core_properties.author = "Ada Mason"
    document.add_heading(TITLE, level=0)
    for name, text in zip(("Tides", "Trade", "Storms"), PARAGRAPHS, strict=True):
        document.add_heading(name, level=1)
        document.add_paragraph(text).runs[0].font.size = Pt(11)
    document.add_heading("Cargo by kind", level=2)
    for item in ("Timber first", "Grain second"):
        document.add_paragraph(item, style="List Bullet")
    table = document.add_table(rows=0, cols=3)
    for row in CARGO:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text
    merged = table.add_row().cells
    merged[0].merge(merged[1]).text = "All but coal"
    merged[2].text = "109,500"
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def docx_bomb(megabytes: int = 400) -> bytes:
    """Return a small DOCX whose main part unpacks to ``megabytes``."""
    source, out = zipfile.ZipFile(io.BytesIO(report_docx())), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if name != "word/document.xml":
                target.writestr(name, source.read(name))
        with target.open("word/document.xml", "w", force_zip64=True) as part:
            for _ in range(megabytes):
                part.write(b" " * 1_000_000)
    return out.getvalue()


REPORT_HTML = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{TITLE} | Harbour Board</title>
<meta name="author" content="Ada Mason"><meta property="article:published_time" content="2024-05-06T07:08:09Z">
<style>p {{ color: red }}</style><script>var secret = "script text";</script></head><body>
<header><div>Harbour Board</div></header>
<nav><ul><li><a href="/">Home</a></li><li><a href="/ships">Ships</a></li></ul></nav>
<div class="cookie-banner">We use cookies.</div>
<main><article><h1>{TITLE}</h1><p>{PARAGRAPHS[0]}</p><h2>Trade</h2><p>{PARAGRAPHS[1]}
<ol start="3"><li>Timber<li>Grain <ul><li>Wheat</ul></ol>
<pre><code>if tide &gt; 4:
    enter()</code></pre>
<table><caption>Cargo</caption><tr><th colspan=2>Cargo and ships</th><th>Tonnes</th></tr>
<tr><td rowspan=2>Dry</td><td>120</td><td>48,000</td></tr><tr><td>85</td><td>61,500</td></tr></table>
<p hidden>Nobody sees this.</p><h2>Storms<a class="headerlink" href="#s">¶</a></h2>
<p>{PARAGRAPHS[2]}</p></article></main>
<aside>Related stories</aside><footer>Imprint and contact</footer></body></html>"""

REPORT_MARKDOWN = f"""---
title: "{TITLE}"
author: Ada Mason
date: 2024-05-06
---

# Tides

{PARAGRAPHS[0]}

## Trade *and* quays

{PARAGRAPHS[1]}

- Timber
- Grain
  1. Wheat
  2. Rye

| Cargo | Ships |
|-------|------:|
| Grain | `85`  |

```python
def enter(): ...
```

Storms
======

<div>Markup <b>inside</b></div>

{PARAGRAPHS[2]}
"""
