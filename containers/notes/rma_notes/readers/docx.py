"""DOCX, opened with python-docx and walked in document order."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO
from typing import TYPE_CHECKING, Any

import docx
from docx.oxml.ns import qn
from docx.text.paragraph import Paragraph
from lxml import etree  # type: ignore[import-untyped]  # it ships no annotations

from rma_notes.cleaning import clean_line
from rma_notes.records import Block, Document, Properties
from rma_service.problems import CorruptDocument, TooComplex

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

#: A document unpacks to at most so many bytes, in so many parts.
MAX_UNPACKED_BYTES = 200_000_000
MAX_PARTS = 5_000
#: Text and markup shrink to a tenth or so; what shrinks to less than this was made to fill memories.
MAX_RATIO = 250
MIN_RATIO_BYTES = 20_000_000
_P, _TBL, _SDT, _CONTENT = qn("w:p"), qn("w:tbl"), qn("w:sdt"), qn("w:sdtContent")
_T, _TAB, _BR, _CR = qn("w:t"), qn("w:tab"), qn("w:br"), qn("w:cr")
_HYPHEN = qn("w:noBreakHyphen")
_SKIPPED = frozenset(
    [qn("w:del"), qn("w:pPr"), qn("w:rPr"), "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"]
)
_WRAPPERS = frozenset([qn("w:ins"), qn("w:customXml"), qn("w:smartTag"), qn("w:moveTo")])
_HEADING = re.compile(r"heading (\d)", re.IGNORECASE)
_CONTENTS = re.compile(r"toc( heading|\s*\d)?", re.IGNORECASE)
_MAX_STYLES = 12


def read(data: bytes) -> Document:
    """Return the document's blocks; raises CorruptDocument, TooComplex."""
    pages = _checked(data)
    try:
        opened = docx.Document(BytesIO(data))
        blocks = list(_blocks(opened.element.body, opened))
        properties = _properties(opened, pages)
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        AttributeError,
        IndexError,
        OSError,
        EOFError,
        etree.LxmlError,
    ) as error:
        raise CorruptDocument("the DOCX cannot be read: a part of it is missing or damaged") from error
    except Exception as error:
        # zlib and python-docx have exceptions of their own that share no public parent.
        if type(error).__module__.startswith(("docx", "zlib")):
            raise CorruptDocument("the DOCX cannot be read: a part of it is missing or damaged") from error
        raise
    return Document(blocks=blocks, properties=properties)


def _checked(data: bytes) -> int | None:
    """Refuse archives made to fill memory; return the number of pages that the program that saved it counted."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            parts = archive.infolist()
            unpacked, packed = sum(p.file_size for p in parts), sum(p.compress_size for p in parts) or 1
            if any(part.flag_bits & 1 for part in parts):
                raise CorruptDocument("the parts of the DOCX are encrypted; send it without protection")
            too_dense = unpacked > MIN_RATIO_BYTES and unpacked / packed > MAX_RATIO
            if unpacked > MAX_UNPACKED_BYTES or len(parts) > MAX_PARTS or too_dense:
                raise TooComplex(f"the DOCX unpacks to {unpacked:,} bytes in {len(parts):,} parts, which is too much")
            return _pages(archive)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise CorruptDocument("the DOCX is no whole ZIP archive: it is damaged or cut off") from error


def _pages(archive: zipfile.ZipFile) -> int | None:
    try:
        found = re.search(rb"<Pages>(\d{1,6})</Pages>", archive.read("docProps/app.xml"))
    except Exception:  # noqa: BLE001 - an extra that is damaged is no reason to refuse; the document's own parts decide
        return None
    return int(found[1]) if found else None


def _properties(opened: Any, pages: int | None) -> Properties:  # noqa: ANN401 - python-docx keeps its document type apart
    core = opened.core_properties
    return Properties(
        title=clean_line(core.title or "") or None,
        author=clean_line(core.author or "") or None,
        subject=clean_line(core.subject or "") or None,
        keywords=[word.strip() for word in re.split(r"[,;]", core.keywords or "") if word.strip()],
        created=_time(core.created),
        modified=_time(core.modified),
        language=(core.language or "")[:2].lower() or None,
        pages=pages,
    )


def _time(value: datetime | None) -> str | None:
    """Return a time in RFC 3339; the format has them in UTC."""
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if value else None


def _blocks(parent: Any, opened: Any) -> Iterator[Block]:  # noqa: ANN401 - elements of lxml, which ships no annotations
    for child in parent:
        if child.tag == _P:
            yield from _paragraph(child, opened)
        elif child.tag == _TBL:
            rows = _rows(child, opened)
            if rows:
                yield Block(kind="table", rows=rows)
        elif child.tag == _SDT:
            yield from _blocks(child.find(_CONTENT) if child.find(_CONTENT) is not None else (), opened)
        elif child.tag in _WRAPPERS:
            yield from _blocks(child, opened)


def _paragraph(element: Any, opened: Any) -> Iterator[Block]:  # noqa: ANN401 - as above
    text = "\n".join(filter(None, map(clean_line, _text(element).split("\n"))))
    if not text:
        return
    paragraph = Paragraph(element, opened)
    names = _style_names(paragraph)
    level = _level(element, names)
    if any(_CONTENTS.fullmatch(name) for name in names):
        yield Block(kind="contents", text=text)
    elif level:
        yield Block(kind="heading", text=clean_line(text), level=level)
    elif (
        any(name.lower().startswith("list") for name in names)
        or element.find(f"{qn('w:pPr')}/{qn('w:numPr')}") is not None
    ):
        yield Block(kind="item", text=f"• {text}")
    elif any(re.search(r"code|preformatted|listing", name, re.IGNORECASE) for name in names):
        yield Block(kind="code", text=text)
    else:
        yield Block(kind="paragraph", text=text)


def _text(element: Any) -> str:  # noqa: ANN401 - as above
    """Return a paragraph's text with what was inserted and linked, and without what was deleted."""
    parts: list[str] = []
    walk = etree.iterwalk(element, events=("start",))
    for _, node in walk:
        if node.tag in _SKIPPED:
            walk.skip_subtree()
        elif node.tag == _T:
            parts.append(node.text or "")
        elif node.tag == _TAB:
            parts.append("\t")
        elif node.tag in (_BR, _CR):
            parts.append("\n")
        elif node.tag == _HYPHEN:
            parts.append("-")
    return "".join(parts)


def _style_names(paragraph: Paragraph) -> list[str]:
    """Return the paragraph's style and those it is based on."""
    names: list[str] = []
    style: Any = paragraph.style
    while style is not None and len(names) < _MAX_STYLES:
        names.append(style.name or "")
        style = style.base_style
    return names


def _level(element: Any, names: list[str]) -> int:  # noqa: ANN401 - as above
    outline = element.find(f"{qn('w:pPr')}/{qn('w:outlineLvl')}")
    if outline is not None and (value := outline.get(qn("w:val")) or "").isdecimal() and int(value) < 9:  # noqa: PLR2004 - 9 is body text
        return int(value) + 1
    if names and names[0].lower() == "title":
        return 1
    return next((int(match[1]) for name in names if (match := _HEADING.fullmatch(name))), 0)


def _rows(table: Any, opened: Any) -> list[list[str]]:  # noqa: ANN401 - as above
    """Return a table's cells; of merged ones the first has the text."""
    rows: list[list[str]] = []
    for tr in table.iter(qn("w:tr")):
        if next(tr.iterancestors(_TBL)) is not table:
            continue
        row: list[str] = []
        for tc in (node for node in tr.iter(qn("w:tc")) if next(node.iterancestors(qn("w:tr"))) is tr):
            text = clean_line(" ".join(_cell_texts(tc, opened)))
            row += [text] + [""] * (_span(tc) - 1)
        rows.append(row)
    width = max(map(len, rows), default=0)
    return [row + [""] * (width - len(row)) for row in rows if any(row)]


def _cell_texts(cell: Any, opened: Any) -> Iterator[str]:  # noqa: ANN401 - as above
    merged = cell.find(f"{qn('w:tcPr')}/{qn('w:vMerge')}")
    if merged is not None and merged.get(qn("w:val")) != "restart":
        return
    for block in _blocks(cell, opened):
        yield block.text if block.kind != "table" else " ".join(filter(None, (c for row in block.rows for c in row)))


def _span(cell: Any) -> int:  # noqa: ANN401 - as above
    span = cell.find(f"{qn('w:tcPr')}/{qn('w:gridSpan')}")
    value = span.get(qn("w:val")) if span is not None else "1"
    return min(int(value), 100) if value and value.isdecimal() and int(value) else 1
