"""From lines in reading order to blocks: headings, paragraphs, list items, code, contents, tables."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from rma_notes.cleaning import HYPHENS, join_lines
from rma_notes.records import Block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from rma_notes.readers.pdf_layout import Line

#: A heading is this much larger than the text, or bold.
HEADING_RATIO = 1.12
MAX_HEADING_CHARACTERS, MAX_HEADING_LINES = 160, 4
#: A letter alone is a formula or an initial.
MIN_HEADING_LETTERS = 2
#: Lines farther apart than this, in usual distances, begin a new paragraph.
PARAGRAPH_GAP = 1.3
#: Listings have empty lines in them.
MAX_CODE_GAP = 2.5
INDENT = 0.8
#: A page with so many lines that lead to page numbers holds a table of contents.
MIN_CONTENTS_LINES = 3
_DEFAULT_LEADING = 1.2
_NUMBERED = re.compile(
    r"^(?:(?:chapter|section|part|appendix)\s+)?(?:\d{1,3}|[A-Z])(?:\.\d{1,3}){0,5}\.?\s+\S", re.IGNORECASE
)
_ITEM = re.compile(r"^(?:[•◦▪▫‣·∙●○■□➢✓\u2013\u2014*-]|\(?\d{1,3}[.)]|\(?[a-z][.)]|\[\d{1,3}\])\s+\S")
_ENDS = re.compile(r"[.!?:;。！？][\"'”’)\]]*$")  # noqa: RUF001 - CJK punctuation
_TO_PAGE = re.compile(r"\s(\d{1,4}|[ivxlc]{1,7})$")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)?")


class PageLines(NamedTuple):
    """The lines of a page, which counts from 1."""

    page: int
    lines: list[Line]


def blocks_of(pages: Sequence[PageLines]) -> list[Block]:
    """Return the document's blocks; a paragraph that goes on in the next column or page is one."""
    pages = [PageLines(page.page, _as_contents(page.lines)) for page in pages]
    body = _body_style(pages)
    words = _vocabulary(pages)
    levels = _levels(pages, body)
    blocks: list[Block] = []
    for page in pages:
        for group in _groups(page.lines, body):
            block = _block(group, page.page, body, levels, words)
            if blocks and _goes_on(blocks[-1], block):
                begun = blocks.pop()
                block = Block(kind=begun.kind, text=join_lines([begun.text, block.text], words=words), page=begun.page)
            blocks.append(block)
    return blocks


def _as_contents(lines: list[Line]) -> list[Line]:
    """On a page of contents, mark the entries that have no dots (chapters, mostly) like those that have."""
    if sum(line.has_leaders for line in lines) < MIN_CONTENTS_LINES:
        return lines
    return [line._replace(text=_TO_PAGE.sub(r" … \1", line.text)) if not line.has_leaders else line for line in lines]


class _Style(NamedTuple):
    size: float
    bold: bool


def _body_style(pages: Sequence[PageLines]) -> _Style:
    votes = Counter[_Style]()
    for page in pages:
        for line in page.lines:
            if not line.mono:
                votes[_Style(_rounded(line.size), line.bold)] += len(line.text)
    return max(votes, key=lambda style: votes[style], default=_Style(10.0, bold=False))


def _rounded(size: float) -> float:
    return round(size * 2) / 2


def _vocabulary(pages: Sequence[PageLines]) -> AbstractSet[str]:
    """Return the document's words, without the two that a line's end may have cut."""
    words: set[str] = set()
    for page in pages:
        for line in page.lines:
            found = _WORD.findall(line.text.lower())
            ends_cut = line.text[-1:] in HYPHENS
            words.update(found[1:-1] if ends_cut else found[1:])
    return words


def is_heading(line: Line, body: _Style) -> bool:
    """Whether the line looks like a heading beside text of style ``body``."""
    text = line.text
    if line.table or line.mono or line.has_leaders or len(text) > MAX_HEADING_CHARACTERS:
        return False
    if len(_LETTER.findall(text)) < MIN_HEADING_LETTERS:
        return False
    if line.size >= body.size * HEADING_RATIO:
        return not text.endswith(",")
    if not line.bold or body.bold or line.size < body.size * 0.95:
        return False
    return bool(_NUMBERED.match(text)) or not re.search(r"[.,;]$", text)


def _levels(pages: Sequence[PageLines], body: _Style) -> dict[_Style, int]:
    styles = {_Style(_rounded(n.size), n.bold) for page in pages for n in page.lines if is_heading(n, body)}
    ranked = sorted(styles, key=lambda style: (-style.size, not style.bold))
    return {style: min(rank, 6) for rank, style in enumerate(ranked, 1)}


def _groups(lines: Sequence[Line], body: _Style) -> Iterator[list[Line]]:
    """Yield the lines of each block."""
    group: list[Line] = []
    leading = _leading(lines)
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else None
        if group and not _belongs(group, line, following, leading, body):
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def _leading(lines: Sequence[Line]) -> float:
    """Return the usual distance between lines, in line heights."""
    ratios = sorted(
        (b.y0 - a.y0) / a.size
        for a, b in itertools.pairwise(lines)
        if a.region == b.region and a.size and abs(a.size - b.size) < 1 and 0.8 < (b.y0 - a.y0) / a.size < 2.5  # noqa: PLR2004 - what a line's distance can be
    )
    return ratios[len(ratios) // 3] if ratios else _DEFAULT_LEADING


def _belongs(group: Sequence[Line], line: Line, following: Line | None, leading: float, body: _Style) -> bool:
    """Whether ``line`` goes on with the block that ``group`` has begun."""
    last = group[-1]
    if not _is_next(last, line, leading) or (line.mono != last.mono and not _flows(group, line, leading)):
        return False
    heading = is_heading(line, body)
    if heading != is_heading(last, body):
        return False
    if heading:
        more = line.bold == last.bold and len(group) < MAX_HEADING_LINES and not _NUMBERED.match(line.text)
        return more and _aligned(group, line)
    return line.mono or not _begins(group, line, following)


def _aligned(group: Sequence[Line], line: Line) -> bool:
    """Whether a heading's next line is set like it: a centred title is not gone on with by a heading at the margin."""
    last, near = group[-1], INDENT * line.size
    hangs = bool(_NUMBERED.match(group[0].text)) and line.x0 > group[0].x0
    centred = abs((line.x0 + line.x1) - (last.x0 + last.x1)) / 2 < near
    return hangs or centred or abs(line.x0 - last.x0) < near or abs(line.x1 - last.x1) < near


def _is_next(last: Line, line: Line, leading: float) -> bool:
    """Whether ``line`` stands right below ``last``, in letters of the same size."""
    if line.table or last.table or line.has_leaders or last.has_leaders or line.region != last.region:
        return False
    if abs(line.size - last.size) > max(0.5, 0.12 * last.size):
        return False
    pitch = (line.y0 - last.y0) / (last.size or 1.0)
    return 0 < pitch <= leading * (MAX_CODE_GAP if line.mono else PARAGRAPH_GAP)


def _flows(group: Sequence[Line], line: Line, leading: float) -> bool:
    """Whether a line in another kind of font is the same sentence: code within prose, and not a listing after it."""
    last = group[-1]
    near = (line.y0 - last.y0) / (last.size or 1.0) <= leading * 1.1
    return near and not _ENDS.search(last.text) and abs(line.x0 - last.x0) < INDENT * line.size


def _begins(group: Sequence[Line], line: Line, following: Line | None) -> bool:
    """Whether the line begins a new paragraph or item, by bullet, indentation or a short line before it."""
    last = group[-1]
    if _ITEM.match(line.text) and (_ITEM.match(group[0].text) or _ENDS.search(last.text)):
        return True
    step = (line.x0 - last.x0) / (line.size or 1.0)
    if step > INDENT:
        hanging = following is not None and abs(following.x0 - line.x0) < INDENT * line.size
        return not (len(group) == 1 and (hanging or following is None or _ITEM.match(last.text)))
    if step < -INDENT:
        return len(group) > 1
    short = last.x1 < last.right - 0.2 * (last.right - last.left)
    return short and bool(_ENDS.search(last.text)) and not line.text[:1].islower()


def _block(group: Sequence[Line], page: int, body: _Style, levels: dict[_Style, int], words: AbstractSet[str]) -> Block:
    first = group[0]
    if first.table:
        return Block(kind="table", rows=first.table.rows, page=page)
    if sum(len(line.text) for line in group if line.mono) * 2 > sum(len(line.text) for line in group):
        return Block(kind="code", text=_code(group), page=page)
    text = join_lines((line.text for line in group), words=words)
    if first.has_leaders:
        return Block(kind="contents", text=text, page=page)
    if is_heading(first, body):
        return Block(kind="heading", text=text, level=levels[_Style(_rounded(first.size), first.bold)], page=page)
    return Block(kind="item" if _ITEM.match(text) else "paragraph", text=text, page=page)


def _code(group: Sequence[Line]) -> str:
    left = min(line.x0 for line in group)
    width = max(0.6 * group[0].size, 1.0)
    return "\n".join(" " * min(round((line.x0 - left) / width), 80) + line.text for line in group)


def _goes_on(before: Block, after: Block) -> bool:
    if before.kind not in ("paragraph", "item") or after.kind != "paragraph" or not before.text or not after.text:
        return False
    return not _ENDS.search(before.text) and after.text[0].islower()
