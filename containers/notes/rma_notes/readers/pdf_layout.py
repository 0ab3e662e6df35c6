"""From words on a page to lines in reading order: segments, columns, rows."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rma_notes.readers.pdf_page import Word
    from rma_notes.readers.pdf_tables import FoundTable

#: Words farther apart than this, in font sizes, are not one run of text.
MAX_WORD_GAP = 1.0
#: A column has at least so many lines; fewer side by side are a form, a title page, a formula.
MIN_COLUMN_LINES = 3
#: Between columns is this much room, in font sizes.
MIN_GUTTER = 0.5
#: Columns are drawn one after the other. Where lines alternate between the sides, it is a table, or one column with
#: wide spaces, unless there are so many lines, so long, so far apart.
SURE_LINES, PROSE_CHARACTERS, SURE_GUTTER = 8, 25, 1.5
#: Columns are looked for between these shares of the width, at so many places.
_EDGE, _PLACES = 0.2, 60
_MAX_DEPTH = 4
_BULLET = re.compile(r"[•◦▪▫‣●○■□➢]\s")
_LEADERS = re.compile(r"(?:\s?[.·…]){4,}\s?")
_TO_A_PAGE = re.compile(r" … (?:\d{1,4}|[ivxlc]{1,7})$", re.IGNORECASE)


class Segment(NamedTuple):
    """Words that follow each other on one line, or a table, which the text flows around."""

    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    size: float
    bold: bool
    mono: bool
    order: int
    table: FoundTable | None = None


class Line(NamedTuple):
    """A line of text as it is read, with the column it stands in (its number on the page, left and right edge)."""

    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    size: float
    bold: bool
    mono: bool
    region: int
    left: float
    right: float
    table: FoundTable | None = None

    @property
    def has_leaders(self) -> bool:
        """Whether dots lead to a page number: a line of a table of contents."""
        return bool(_TO_A_PAGE.search(self.text))


def segments_of(words: Iterable[Word]) -> list[Segment]:
    """Return runs of words, in the order in which the page draws them."""
    runs: list[list[Word]] = []
    for word in words:
        if runs and _continues(runs[-1][-1], word):
            runs[-1].append(word)
        else:
            runs.append([word])
    return [_segment(run) for run in runs]


def _continues(last: Word, word: Word) -> bool:
    size = max(last.size, word.size)
    overlap = min(last.y1, word.y1) - max(last.y0, word.y0)
    level = overlap >= 0.5 * min(last.y1 - last.y0, word.y1 - word.y0)
    return level and -0.5 * size <= word.x0 - last.x1 <= MAX_WORD_GAP * size


def _segment(run: Sequence[Word]) -> Segment:
    letters = sum(len(word.text) for word in run)
    biggest = max(run, key=lambda word: len(word.text))
    return Segment(
        " ".join(word.text for word in run),
        min(word.x0 for word in run),
        min(word.y0 for word in run),
        max(word.x1 for word in run),
        max(word.y1 for word in run),
        biggest.size,
        sum(len(word.text) for word in run if word.bold) * 2 > letters,
        sum(len(word.text) for word in run if word.mono) * 2 > letters,
        run[0].order,
    )


def table_segment(table: FoundTable) -> Segment:
    """Return a table as a segment, so that it takes its place between columns and paragraphs."""
    return Segment("", table.x0, table.y0, table.x1, table.y1, 0.0, bold=False, mono=False, order=0, table=table)


def lines_of(segments: Sequence[Segment]) -> list[Line]:
    """Return a page's lines in reading order, columns one after the other."""
    lines: list[Line] = []
    for number, region in enumerate(_regions(list(segments), 0)):
        left, right = min(s.x0 for s in region), max(s.x1 for s in region)
        lines.extend(_line(row, number, left, right) for row in rows_of(region))
    return lines


def _regions(segments: list[Segment], depth: int) -> list[list[Segment]]:
    """Split into regions that are read one after the other."""
    if depth >= _MAX_DEPTH or len(segments) < 2 * MIN_COLUMN_LINES:
        return [segments] if segments else []
    best = max(_candidates(segments), key=lambda plan: plan[0], default=(0, 0.0, []))
    if not best[0]:
        return [segments]
    regions: list[list[Segment]] = []
    single: list[Segment] = []
    for left, right in best[2]:
        if right:
            regions += [single] if single else []
            single = []
            regions += _regions(left, depth + 1) + _regions(right, depth + 1)
        else:
            single += left
    return regions + ([single] if single else [])


_Bands = list[tuple[list[Segment], list[Segment]]]


def _candidates(segments: Sequence[Segment]) -> Iterable[tuple[int, float, _Bands]]:
    """Yield for each place a column boundary could be: how many lines it explains, the place, and the bands."""
    low, high = min(s.x0 for s in segments), max(s.x1 for s in segments)
    ordered = sorted(segments, key=lambda s: (s.y0 + s.y1) / 2)
    for step in range(_PLACES + 1):
        x = low + (high - low) * (_EDGE + (1 - 2 * _EDGE) * step / _PLACES)
        bands = _bands(ordered, x)
        score = sum(len(left) + len(right) for left, right in bands if right)
        yield score, x, bands


def _bands(ordered: Sequence[Segment], x: float) -> _Bands:
    """Cut at segments that cross ``x``; a band with columns has two sides, any other is all on the left one."""
    bands: _Bands = []
    left: list[Segment] = []
    right: list[Segment] = []

    def close() -> None:
        if _are_columns(left, right):
            bands.append((list(left), list(right)))
        elif left or right:
            bands.append(([*left, *right], []))
        left.clear()
        right.clear()

    for segment in ordered:
        if segment.x0 < x < segment.x1:
            close()
            bands.append(([segment], []))
        else:
            (left if segment.x1 <= x else right).append(segment)
    close()
    return bands


def _are_columns(left: Sequence[Segment], right: Sequence[Segment]) -> bool:
    if min(len(left), len(right)) < MIN_COLUMN_LINES:
        return False
    size = sorted(s.size for s in left)[len(left) // 2] or 1.0
    gutter = (min(s.x0 for s in right) - max(s.x1 for s in left)) / size
    lines = min(len(rows_of(left)), len(rows_of(right)))
    if gutter < MIN_GUTTER or lines < MIN_COLUMN_LINES or not _side_by_side(left, right):
        return False
    turns = sum(a != b for a, b in pairwise(side for _, side in _drawn(left, right)))
    if turns <= max(2, lines // 5):
        return True
    length = min(_median_length(left), _median_length(right))
    return lines >= SURE_LINES and length >= PROSE_CHARACTERS and gutter >= SURE_GUTTER


def _side_by_side(left: Sequence[Segment], right: Sequence[Segment]) -> bool:
    """Whether a good part of the lower side stands beside the other, rather than above or below it."""
    top, bottom = (
        max(min(s.y0 for s in left), min(s.y0 for s in right)),
        min(max(s.y1 for s in left), max(s.y1 for s in right)),
    )
    shorter = min(max(s.y1 for s in side) - min(s.y0 for s in side) for side in (left, right))
    return bottom - top > 0.5 * shorter


def _median_length(segments: Sequence[Segment]) -> int:
    lengths = sorted(len(s.text) for s in segments if s.table is None)
    return lengths[len(lengths) // 2] if lengths else 0


def _drawn(left: Sequence[Segment], right: Sequence[Segment]) -> list[tuple[int, bool]]:
    """Return (drawing order, whether on the right), in drawing order: columns are drawn whole, tables row by row."""
    return sorted([(s.order, False) for s in left if not s.table] + [(s.order, True) for s in right if not s.table])


def rows_of(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Group segments that stand on one line, from top to bottom, each row from left to right."""
    rows: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: ((s.y0 + s.y1) / 2, s.x0)):
        if rows and _same_row(rows[-1], segment):
            rows[-1].append(segment)
        else:
            rows.append([segment])
    return [sorted(row, key=lambda s: s.x0) for row in rows]


def _same_row(row: Sequence[Segment], segment: Segment) -> bool:
    first = max(row, key=lambda s: len(s.text))
    if first.table or segment.table:
        return False
    overlap = min(first.y1, segment.y1) - max(first.y0, segment.y0)
    return overlap > 0.5 * min(first.y1 - first.y0, segment.y1 - segment.y0)


def _line(row: Sequence[Segment], region: int, left: float, right: float) -> Line:
    main = max(row, key=lambda s: len(s.text))
    text = _LEADERS.sub(" … ", " ".join(s.text for s in row)).strip()
    letters = sum(len(s.text) for s in row)
    bold = sum(len(s.text) for s in row if s.bold) * 2 > letters
    mono = sum(len(s.text) for s in row if s.mono) * 2 > letters and not _BULLET.match(text)
    x0, x1 = row[0].x0, max(s.x1 for s in row)
    return Line(text, x0, main.y0, x1, main.y1, main.size, bold, mono, region, left, right, main.table)
