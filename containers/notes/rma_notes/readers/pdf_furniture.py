"""Running heads, feet and page numbers: found by where and how often they stand, and left out."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from rma_notes.readers.pdf_layout import Segment, rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

#: So many rows at the top and at the bottom of a page may be running heads and feet.
DEPTH = 3
#: A line that stands on so many pages in one place is no text of any of them.
MIN_PAGES = 3
_NUMBER = re.compile(r"\d+|\b[ivxlc]{1,7}\b", re.IGNORECASE)
_PAGE_NUMBER = re.compile(r"^\W*(?:page\s+)?(?:\d{1,4}|[ivxlc]{1,7})(?:\s*(?:/|of)\s*\d{1,4})?\W*$", re.IGNORECASE)
_CARRIES_NUMBER = re.compile(r"^\W*(?:\d{1,4}|[ivxlc]{1,7})\b|\b(?:\d{1,4}|[ivxlc]{1,7})\W*$", re.IGNORECASE)

_Key = tuple[bool, int, str]


def without_furniture(pages: Sequence[list[Segment]]) -> list[list[Segment]]:
    """Return the pages' segments without what only repeats from page to page."""
    candidates = [_edges(page) for page in pages]
    seen = Counter[_Key]()
    for edges in candidates:
        seen.update({_key(top, row) for top, row in edges})
    places = Counter[tuple[bool, int]]()
    for key, count in seen.items():
        if count >= MIN_PAGES:
            places[key[:2]] += count
    kept = []
    for page, edges in zip(pages, candidates, strict=True):
        drop: set[int] = set()
        for top, row in edges:
            key = _key(top, row)
            if seen[key] >= MIN_PAGES or (places[key[:2]] >= MIN_PAGES and _CARRIES_NUMBER.search(_text(row))):
                drop.update(segment.order for segment in row)
        kept.append([segment for segment in page if segment.table or segment.order not in drop])
    return [_without_page_number(page) for page in kept] if len(pages) > 1 else kept


def _edges(page: Sequence[Segment]) -> list[tuple[bool, list[Segment]]]:
    """Return (whether at the top, row) for the outermost rows of a page."""
    rows = [row for row in rows_of(page) if not row[0].table]
    if len(rows) <= DEPTH:
        return [(i == 0, row) for i, row in enumerate(rows)]
    below = rows[max(DEPTH, len(rows) - DEPTH) :]
    return [(True, row) for row in rows[:DEPTH]] + [(False, row) for row in below]


def _text(row: Sequence[Segment]) -> str:
    return " ".join(segment.text for segment in row)


def _key(top: bool, row: Sequence[Segment]) -> _Key:  # noqa: FBT001 - half of a pair, not a switch
    return top, round(row[0].y0 / 4), _NUMBER.sub("#", _text(row).lower())


def _without_page_number(page: list[Segment]) -> list[Segment]:
    rows = [row for row in rows_of(page) if not row[0].table]
    if not rows or not _PAGE_NUMBER.match(_text(rows[-1])):
        return page
    drop = {segment.order for segment in rows[-1]}
    return [segment for segment in page if segment.table or segment.order not in drop]
