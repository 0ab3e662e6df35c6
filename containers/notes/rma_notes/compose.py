"""From a document's blocks to the answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_notes import language, media, phrases, summary
from rma_notes.cleaning import clean_line, encodable
from rma_notes.records import Block, Document, Heading, KeyPhrase, Metadata, Notes, PageSpan, Summary, Table
from rma_service.problems import EmptyDocument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rma_notes.options import Options

#: Longer texts are cut, with a warning: an answer has to fit into memories along the way.
MAX_CHARACTERS = 10_000_000
#: Phrases and summary come from so much of the text, with a warning where there is more.
MAX_ANALYSED = 1_500_000
MAX_TITLE = 300
#: What follows a heading like these is no part of what the document says.
_BACK_MATTER = re.compile(
    r"^(?:[\dA-Z.]+\s+)?(?:references|bibliography|works cited|literatur(?:verzeichnis)?|bibliographie|"
    r"index|concept index|.*\b(?:license|licence)|"
    r"copyright|copying(?: information)?|acknowledge?ments?|affiliation)\b\W*$",
    re.IGNORECASE,
)


class Source(NamedTuple):
    """What is known about a document before it is read."""

    kind: media.Kind
    filename: str | None
    size: int


def read(data: bytes, source: Source, options: Options) -> Document:
    """Read ``data`` as what it is; each reader is imported only where it is needed."""
    if source.kind.media_type == media.PDF:
        from rma_notes.readers import pdf

        return pdf.read(data, pages=options.pages)
    if source.kind.media_type == media.DOCX:
        from rma_notes.readers import docx

        return docx.read(data)
    if source.kind.media_type == media.HTML:
        from rma_notes.readers import html

        return html.read(data, charset=source.kind.charset)
    if source.kind.media_type == media.MARKDOWN:
        from rma_notes.readers import markdown

        return markdown.read(data, charset=source.kind.charset)
    from rma_notes.readers import plain

    return plain.read(data, charset=source.kind.charset)


def compose(document: Document, source: Source, options: Options) -> Notes:
    """Return the answer with the parts that ``options`` include; raises EmptyDocument."""
    text, pages = _text(document.blocks)
    warnings = [*source.kind.warnings, *document.warnings]
    if not text and not document.warnings and document.properties.pages is None:
        raise EmptyDocument("there is no text in the document")
    if not text and not warnings:
        warnings.append("there is no text in the document")
    warnings += _about_size(text)
    metadata = _metadata(document, source, text)
    parts: dict[str, Callable[[], object]] = {
        "text": lambda: text[:MAX_CHARACTERS],
        "pages": lambda: pages,
        "outline": lambda: _outline(document),
        "tables": lambda: [Table(page=b.page, rows=_even(b.rows)) for b in document.blocks if b.kind == "table"],
        "metadata": lambda: metadata,
        "key_phrases": lambda: _phrases(document, metadata, options.key_phrases),
        "summary": lambda: _summary(document, metadata, options.summary_sentences),
    }
    wanted = {name: part() for name, part in parts.items() if name in options.include}
    return msgspec.convert({**wanted, "warnings": warnings}, Notes, from_attributes=True)


def _text(blocks: Sequence[Block]) -> tuple[str, list[PageSpan]]:
    """Return the text, and where its pages are."""
    parts: list[str] = []
    spans: dict[int, tuple[int, int]] = {}
    length = 0
    before: Block | None = None
    for block in blocks:
        piece = encodable("\n".join(" | ".join(row) for row in block.rows) if block.kind == "table" else block.text)
        gap = ("\n" if _is_listed(before, block) else "\n\n") if before else ""
        parts.append(gap + piece)
        if block.page is not None:
            start, _ = spans.get(block.page, (length + len(gap), 0))
            spans[block.page] = (start, length + len(gap) + len(piece))
        length += len(gap) + len(piece)
        before = block
    return "".join(parts), [PageSpan(page=page, start=start, end=end) for page, (start, end) in sorted(spans.items())]


def _is_listed(before: Block | None, block: Block) -> bool:
    return before is not None and before.kind == block.kind and block.kind in ("item", "contents")


def _about_size(text: str) -> list[str]:
    if len(text) > MAX_CHARACTERS:
        return [f"the text has {len(text):,} characters; the first {MAX_CHARACTERS:,} are given"]
    if len(text) > MAX_ANALYSED:
        return [f"key phrases and summary come from the first {MAX_ANALYSED:,} of {len(text):,} characters"]
    return []


def _outline(document: Document) -> list[Heading]:
    return document.outline or [
        Heading(level=block.level, title=clean_line(block.text)[:MAX_TITLE], page=block.page)
        for block in document.blocks
        if block.kind == "heading"
    ]


def _even(rows: list[list[str]]) -> list[list[str]]:
    width = max(map(len, rows), default=0)
    return [row + [""] * (width - len(row)) for row in rows]


def _metadata(document: Document, source: Source, text: str) -> Metadata:
    told = document.properties
    prose = " ".join(_prose(document, limit=language.SAMPLE_CHARACTERS)) or text[: language.SAMPLE_CHARACTERS]
    title = told.title or next((b.text for b in document.blocks if b.kind == "heading"), None)
    return Metadata(
        media_type=source.kind.media_type,
        filename=source.filename,
        title=clean_line(title)[:MAX_TITLE] if title else None,
        author=told.author,
        subject=told.subject,
        keywords=told.keywords,
        created=told.created,
        modified=told.modified,
        language=language.detect(prose) or told.language,
        pages=told.pages,
        characters=len(text),
        words=sum(1 for _ in re.finditer(r"\w+(?:['’-]\w+)*", text)),  # noqa: RUF001 - the apostrophe that books use
        bytes=source.size,
    )


def _prose(document: Document, *, limit: int, items: bool = False) -> list[str]:
    """Return paragraphs (and list items) up to ``limit`` characters, without references, licences and index."""
    kinds = ("paragraph", "item") if items else ("paragraph",)
    texts: list[str] = []
    length, skipping = 0, 0
    for block in document.blocks:
        if block.kind == "heading" and (not skipping or block.level <= skipping):
            skipping = block.level if _BACK_MATTER.match(block.text) else 0
        if block.kind in kinds and not skipping:
            texts.append(block.text[: limit - length])
            length += len(block.text)
        if length >= limit:
            break
    return texts


def _phrases(document: Document, metadata: Metadata, limit: int) -> list[KeyPhrase]:
    texts = _prose(document, limit=MAX_ANALYSED, items=True)
    headings = [
        block.text for block in document.blocks if block.kind == "heading" and not _BACK_MATTER.match(block.text)
    ]
    titles = [metadata.title] if metadata.title else []
    return phrases.key_phrases(texts, headings=[*titles, *headings], language=metadata.language, limit=limit)


def _summary(document: Document, metadata: Metadata, limit: int) -> Summary:
    texts = _prose(document, limit=MAX_ANALYSED) or _prose(document, limit=MAX_ANALYSED, items=True)
    return summary.summarize(texts, title=metadata.title, language=metadata.language, limit=limit)
