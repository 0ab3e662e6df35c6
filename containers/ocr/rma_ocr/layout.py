"""Lines of text in the order in which people read them: columns one after the other, else row by row."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rma_ocr.records import Line

#: A line that takes more of the text's width than this belongs to no column.
_SPANS = 0.6
#: What stands side by side is two columns only if each has so many lines, and they are so wide: else it is a table.
_COLUMN_LINES, _COLUMN_WIDTH = 3, 0.25
#: Two pieces are in one row when they overlap in height by so much of the lower one.
_ROW_OVERLAP = 0.5

Span = tuple[float, float]


def ordered(lines: Sequence[Line]) -> list[list[Line]]:
    """Return rows in reading order; each row has its pieces from left to right."""
    if not lines:
        return []
    left, right = min(_x(line)[0] for line in lines), max(_x(line)[1] for line in lines)
    width = max(1.0, right - left)
    rows: list[list[Line]] = []
    for band in _bands(lines, width):
        for column in _columns(band, width):
            rows += _rows(column)
    return rows


def text_of(rows: Sequence[Sequence[Line]]) -> str:
    """Return the rows as text, one line each."""
    return "\n".join(" ".join(line.text for line in row) for row in rows)


def _bands(lines: Sequence[Line], width: float) -> Iterator[list[Line]]:
    """Cut the page at lines that span it."""
    band: list[Line] = []
    spanning = False
    for line in sorted(lines, key=lambda line: sum(_y(line))):
        spans = _x(line)[1] - _x(line)[0] > _SPANS * width
        if band and spans != spanning:
            yield band
            band = []
        spanning = spans
        band.append(line)
    yield band


def _columns(band: list[Line], width: float) -> list[list[Line]]:
    """Cut a band at gutters that no line crosses, unless what they part is no column."""
    columns: list[list[Line]] = []
    reach = float("-inf")
    for line in sorted(band, key=_x):
        if _x(line)[0] > reach:
            columns.append([])
        columns[-1].append(line)
        reach = max(reach, _x(line)[1])
    prose = all(
        len(column) >= _COLUMN_LINES and median(_x(line)[1] - _x(line)[0] for line in column) > _COLUMN_WIDTH * width
        for column in columns
    )
    return columns if prose else [band]


def _rows(lines: Sequence[Line]) -> list[list[Line]]:
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: sum(_y(line))):
        if rows and _same_row(rows[-1][-1], line):
            rows[-1].append(line)
        else:
            rows.append([line])
    return [sorted(row, key=_x) for row in rows]


def _same_row(one: Line, other: Line) -> bool:
    (top, bottom), (other_top, other_bottom) = _y(one), _y(other)
    overlap = min(bottom, other_bottom) - max(top, other_top)
    return overlap > _ROW_OVERLAP * max(1.0, min(bottom - top, other_bottom - other_top))


def _x(line: Line) -> Span:
    return min(x for x, _ in line.box), max(x for x, _ in line.box)


def _y(line: Line) -> Span:
    """Return how high a line stands: the middle of its ends, because a scan is seldom straight."""
    upper_left, upper_right, lower_right, lower_left = line.box
    return (upper_left[1] + upper_right[1]) / 2, (lower_left[1] + lower_right[1]) / 2
