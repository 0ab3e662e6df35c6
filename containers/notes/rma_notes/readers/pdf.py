"""PDF, read with PDFium."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
import pypdfium2  # type: ignore[import-untyped]  # it ships no annotations
import pypdfium2.raw as pdfium  # type: ignore[import-untyped]  # it ships no annotations

from rma_notes.cleaning import clean_line
from rma_notes.readers.pdf_furniture import without_furniture
from rma_notes.readers.pdf_layout import Segment, lines_of, segments_of, table_segment
from rma_notes.readers.pdf_page import PageContent, read_page
from rma_notes.readers.pdf_paragraphs import PageLines, blocks_of
from rma_notes.readers.pdf_tables import find_tables
from rma_notes.records import Block, Document, Heading, Properties
from rma_service.problems import CorruptDocument, EncryptedDocument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Longer documents are read so far, with a warning.
MAX_PAGES = 3_000
MAX_OUTLINE = 5_000
#: Sideways text shorter than this is the label of an axis.
MIN_TURNED_CHARACTERS = 20
#: With fewer characters on average, a page of pictures has no text layer worth the name.
MIN_CHARACTERS_PER_PAGE = 5
#: Titles that a program made up: a file's name, or nothing.
_MADE_UP = re.compile(
    r"^(?:microsoft (?:word|powerpoint|excel) - .*|untitled.*|"
    r".*\.(?:docx?|pptx?|xlsx?|dvi|tex|pdf|indd|qxd|rtf|odt|fo|xml))$|^$",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?:\d{1,3}|[A-Z]|[IVX]{1,5})[.\s)]")
_DATE = re.compile(r"D?:?(\d{4})(\d\d)?(\d\d)?(\d\d)?(\d\d)?(\d\d)?\s*(?:(Z)|([+-])(\d\d)'?(\d\d)?'?)?")


def read(data: bytes, *, pages: frozenset[int] | None = None) -> Document:
    """Return the PDF's content, of the given ``pages`` (from 1) only; raises EncryptedDocument, CorruptDocument."""
    pdf = _open(data)
    try:
        return _read(pdf, pages)
    finally:
        pdf.close()


def _open(data: bytes) -> pypdfium2.PdfDocument:
    try:
        return pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        reason = getattr(error, "err_code", None)
        if reason in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY):
            raise EncryptedDocument(
                "the PDF opens with a password only; remove the protection and send it again"
            ) from None
        raise CorruptDocument("this is no PDF that can be read: the file is damaged or cut off") from None


def _read(pdf: pypdfium2.PdfDocument, wanted: frozenset[int] | None) -> Document:
    count = len(pdf)
    if not count:
        raise CorruptDocument("the PDF has no pages: it is damaged or cut off")
    numbers = [n for n in range(1, count + 1) if wanted is None or n in wanted]
    warnings = [f"only the first {MAX_PAGES} of {count} pages were read"] if len(numbers) > MAX_PAGES else []
    contents, broken = _contents(pdf, numbers[:MAX_PAGES])
    if not contents and broken:
        raise CorruptDocument("none of the PDF's pages can be read: it is damaged or cut off")
    warnings += [f"pages that could not be read: {_listed(broken)}"] if broken else []
    warnings += _about_scans(contents)
    segments = without_furniture([_segments(content) for content in contents.values()])
    lines = [PageLines(number, lines_of(page)) for number, page in zip(contents, segments, strict=True)]
    blocks = [block for page in _with_turned(blocks_of(lines), contents) for block in page]
    properties = _properties(pdf, count)
    return _finished(blocks, properties, _bookmarks(pdf), warnings)


def _contents(pdf: pypdfium2.PdfDocument, numbers: Iterable[int]) -> tuple[dict[int, PageContent], list[int]]:
    contents: dict[int, PageContent] = {}
    broken: list[int] = []
    for number in numbers:
        try:
            page = pdf[number - 1]
            try:
                contents[number] = read_page(page)
            finally:
                page.close()
        except pypdfium2.PdfiumError:
            broken.append(number)
    return contents, broken


def _segments(content: PageContent) -> list[Segment]:
    tables = find_tables(content.words, content.rules)
    outside = [word for word in content.words if not any(table.holds(word) for table in tables)]
    return segments_of(outside) + [table_segment(table) for table in tables]


def _about_scans(contents: dict[int, PageContent]) -> list[str]:
    """Return a warning about pages that are pictures of text, as far as one can tell."""
    scans = [
        number
        for number, content in contents.items()
        if content.has_images and sum(len(word.text) for word in content.words) < MIN_CHARACTERS_PER_PAGE
    ]
    if not scans:
        return []
    what = "no page has text" if len(scans) == len(contents) else f"no text on page {_listed(scans)}"
    return [f"{what}, only images: this looks scanned; the ocr service reads text from images"]


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: ``1-3, 7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, bounds)) for bounds in ranges)


def _with_turned(blocks: Sequence[Block], contents: dict[int, PageContent]) -> Iterable[list[Block]]:
    """Yield each page's blocks with the text that runs sideways at its end."""
    by_page: dict[int, list[Block]] = {number: [] for number in contents}
    for block in blocks:
        by_page[block.page or 1].append(block)
    for number, content in contents.items():
        turned = [s.text for s in segments_of(content.turned) if len(s.text) >= MIN_TURNED_CHARACTERS]
        yield by_page[number] + [Block(kind="item", text=text, page=number) for text in turned]


def _properties(pdf: pypdfium2.PdfDocument, count: int) -> Properties:
    facts = {key: clean_line(value) for key, value in pdf.get_metadata_dict().items()}
    title = facts.get("Title", "")
    return Properties(
        title=None if _MADE_UP.match(title) else title,
        author=facts.get("Author") or None,
        subject=facts.get("Subject") or None,
        keywords=[word.strip() for word in re.split(r"[,;]", facts.get("Keywords", "")) if word.strip()],
        created=pdf_date(facts.get("CreationDate", "")),
        modified=pdf_date(facts.get("ModDate", "")),
        pages=count,
    )


def pdf_date(text: str) -> str | None:
    """Return a PDF date (``D:20240131120000+01'00'``) in RFC 3339 as far as it goes, None where it is none."""
    match = _DATE.match(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, utc, sign, hours, minutes = match.groups()
    if hour is None:
        return "-".join(filter(None, (year, month, day)))
    zone = "Z" if utc else f"{sign}{hours}:{minutes or '00'}" if sign else ""
    return f"{year}-{month}-{day}T{hour}:{minute or '00'}:{second or '00'}{zone}"


def _bookmarks(pdf: pypdfium2.PdfDocument) -> list[Heading]:
    outline: list[Heading] = []
    for bookmark in pdf.get_toc():
        if len(outline) >= MAX_OUTLINE:
            break
        destination = bookmark.get_dest()
        index = destination.get_index() if destination else None
        page = index + 1 if index is not None and 0 <= index < len(pdf) else None
        title = clean_line(bookmark.get_title())
        if title:
            outline.append(Heading(level=bookmark.level + 1, title=title, page=page))
    return outline


def _finished(blocks: list[Block], properties: Properties, bookmarks: list[Heading], warnings: list[str]) -> Document:
    """Take the title from the page where the document does not tell it, and out of the outline."""
    headings = [block for block in blocks if block.kind == "heading"]
    if not headings or headings[0].page != 1 or headings[0].level != 1:
        return Document(blocks=blocks, properties=properties, outline=bookmarks, warnings=warnings)
    first, others = headings[0], headings[1:]
    alone = bool(others) and all(block.level > 1 for block in others)
    is_title = alone or first.text == properties.title or _stands_above(first, others)
    outline = [
        Heading(level=block.level - alone, title=block.text, page=block.page)
        for block in (others if is_title else headings)
    ]
    titled = properties if properties.title else msgspec.structs.replace(properties, title=first.text)
    return Document(blocks=blocks, properties=titled, outline=bookmarks or outline, warnings=warnings)


def _stands_above(first: Block, others: Sequence[Block]) -> bool:
    """Whether the others of its level are numbered and it is not: then it names the document, and they its parts."""
    level = [block for block in others if block.level == first.level]
    numbered = sum(bool(_NUMBERED.match(block.text)) for block in level)
    return numbered * 2 > len(level) and not _NUMBERED.match(first.text)
