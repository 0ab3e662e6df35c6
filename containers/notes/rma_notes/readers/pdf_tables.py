"""Tables of a PDF page: those with ruled cells, and those with horizontal rules only, as books set them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from rma_notes.cleaning import HYPHENS, join_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rma_notes.readers.pdf_page import Rule, Word

#: Lines that should be one are drawn up to this far apart, in points.
SNAP = 3.0
MIN_RULE = 8.0
MAX_ROWS, MAX_COLUMNS = 500, 60
#: A cell longer than this is prose between two rules.
MAX_CELL_CHARACTERS = 60
#: A cell with fewer characters is not so full that it had to be wrapped.
MIN_WRAPPED_CHARACTERS = 12
#: So many full lines between two lines of a grid are rows.
MIN_UNRULED_ROWS = 3
#: Space between columns, in font sizes.
MIN_GUTTER = 0.75


class FoundTable(NamedTuple):
    """A table's cells and the box it takes on the page."""

    rows: list[list[str]]
    x0: float
    y0: float
    x1: float
    y1: float

    def holds(self, word: Word) -> bool:
        """Whether the word's centre lies in the table."""
        return self.x0 <= (word.x0 + word.x1) / 2 <= self.x1 and self.y0 <= (word.y0 + word.y1) / 2 <= self.y1


def find_tables(words: Sequence[Word], rules: Sequence[Rule]) -> list[FoundTable]:
    """Return the page's tables from top to bottom."""
    across = _merged([(r.y0, r.x0, r.x1) for r in rules if r.y0 == r.y1 and r.x1 - r.x0 >= MIN_RULE])
    down = _merged([(r.x0, r.y0, r.y1) for r in rules if r.x0 == r.x1 and r.y1 - r.y0 >= MIN_RULE])
    found: list[FoundTable] = []
    loose: list[_Line] = []
    for own_across, own_down in _grids(across, down):
        table = _ruled(words, own_across, own_down) if own_down else None
        if table is not None:
            found.append(table)
        else:
            # A frame around something else may touch a table's rule.
            loose.extend(own_across)
    found.extend(_booktabs(words, loose, found))
    return sorted(found, key=lambda table: (table.y0, table.x0))


class _Line(NamedTuple):
    at: float
    start: float
    end: float


def _merged(lines: Iterable[tuple[float, float, float]]) -> list[_Line]:
    """Return lines with those that continue or double each other made one."""
    merged: list[_Line] = []
    for at, start, end in sorted((round(at / SNAP) * SNAP, start, end) for at, start, end in lines):
        last = merged[-1] if merged else None
        if last is not None and last.at == at and _is_one(last, start, end):
            merged[-1] = _Line(at, last.start, max(last.end, end))
        else:
            merged.append(_Line(at, start, end))
    return merged


def _is_one(line: _Line, start: float, end: float) -> bool:
    """Whether a piece goes on where the line ends, or doubles it; a frame's line above a table's is another one."""
    doubles = abs(start - line.start) <= SNAP and abs(end - line.end) <= SNAP
    return doubles or line.end - SNAP <= start <= line.end + SNAP


def _grids(across: Sequence[_Line], down: Sequence[_Line]) -> list[tuple[list[_Line], list[_Line]]]:
    """Group lines that cross or touch; a line that meets no other is a group alone."""
    parent = list(range(len(across) + len(down)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for i, row in enumerate(across):
        for j, column in enumerate(down, len(across)):
            meets = row.start - SNAP <= column.at <= row.end + SNAP and (
                column.start - SNAP <= row.at <= column.end + SNAP
            )
            if meets:
                parent[root(i)] = root(j)
    groups: dict[int, tuple[list[_Line], list[_Line]]] = {}
    for i, line in enumerate([*across, *down]):
        groups.setdefault(root(i), ([], []))[0 if i < len(across) else 1].append(line)
    return list(groups.values())


def _positions(values: Iterable[float]) -> list[float]:
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > SNAP * 1.5:
            kept.append(value)
    return kept


def _ruled(words: Sequence[Word], across: Sequence[_Line], down: Sequence[_Line]) -> FoundTable | None:
    """Return the table that a grid of lines holds, or None where it holds none (a frame, a chart)."""
    xs = _positions([line.at for line in down] + [end for line in across for end in (line.start, line.end)])
    ys = _positions([line.at for line in across] + [end for line in down for end in (line.start, line.end)])
    rows, columns = len(ys) - 1, len(xs) - 1
    if not (2 <= rows <= MAX_ROWS and 2 <= columns <= MAX_COLUMNS):  # noqa: PLR2004 - less is a frame
        return None
    owner = _cell_owners(xs, ys, across, down)
    cells: dict[tuple[int, int], list[Word]] = {}
    for word in words:
        place = _slot(ys, (word.y0 + word.y1) / 2), _slot(xs, (word.x0 + word.x1) / 2)
        if min(place) >= 0:
            cells.setdefault(owner[place], []).append(word)
    table = [line for r in range(rows) for line in _lines([cells.get((r, c), []) for c in range(columns)])]
    return _accepted(table, (xs[0], ys[0], xs[-1], ys[-1]))


def _lines(cells: Sequence[Sequence[Word]]) -> list[list[str]]:
    """Return a row as one, or line by line where its cells hold several rows that have no lines between them."""
    whole = [cell_text(cell) for cell in cells]
    lines = [set(line) for line in _rows([word for cell in cells for word in cell])]
    split = [[cell_text(word for word in cell if word in line) for cell in cells] for line in lines]
    full = sum(bool(line[0]) and sum(map(bool, line)) > 1 for line in split)
    return split if len(lines) >= MIN_UNRULED_ROWS and full >= 0.8 * len(lines) else [whole]


def _cell_owners(
    xs: Sequence[float], ys: Sequence[float], across: Sequence[_Line], down: Sequence[_Line]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Return for each place in the grid the first place of the (merged) cell it belongs to."""
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for r, (top, bottom) in enumerate(pairwise(ys)):
        for c, (left, right) in enumerate(pairwise(xs)):
            owner[r, c] = (r, c)
            if c and not _separates(down, left, (top + bottom) / 2):
                owner[r, c] = owner[r, c - 1]
            elif r and not _separates(across, top, (left + right) / 2):
                owner[r, c] = owner[r - 1, c]
    return owner


def _separates(lines: Sequence[_Line], at: float, middle: float) -> bool:
    return any(abs(line.at - at) <= SNAP * 1.5 and line.start - SNAP <= middle <= line.end + SNAP for line in lines)


def _slot(edges: Sequence[float], value: float) -> int:
    return next((i for i, (low, high) in enumerate(pairwise(edges)) if low <= value < high), -1)


def cell_text(words: Iterable[Word]) -> str:
    """Return the words of a cell, line by line."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda w: ((w.y0 + w.y1) / 2, w.x0)):
        if lines and (word.y0 + word.y1) / 2 < lines[-1][0].y1 - 0.3 * word.size:
            lines[-1].append(word)
        else:
            lines.append([word])
    return join_lines(" ".join(w.text for w in sorted(line, key=lambda w: w.x0)) for line in lines)


def _accepted(rows: list[list[str]], box: tuple[float, float, float, float]) -> FoundTable | None:
    """Drop rows and columns without text; refuse what then is no table."""
    rows = [row for row in rows if any(row)]
    used = [c for c in range(len(rows[0]) if rows else 0) if any(row[c] for row in rows)]
    rows = [[row[c] for c in used] for row in rows]
    filled = sum(bool(cell) for row in rows for cell in row)
    if len(rows) < 2 or len(used) < 2 or filled < 0.3 * len(rows) * len(used):  # noqa: PLR2004 - less is no table
        return None
    return FoundTable(rows, *box)


def _booktabs(words: Sequence[Word], rules: Sequence[_Line], taken: Sequence[FoundTable]) -> list[FoundTable]:
    """Return tables set between horizontal rules of one width."""
    families: list[list[_Line]] = []
    for rule in sorted(rules):
        for family in families:
            if abs(family[0].start - rule.start) <= 2 * SNAP and abs(family[0].end - rule.end) <= 2 * SNAP:
                family.append(rule)
                break
        else:
            families.append([rule])
    free = [word for word in words if not any(table.holds(word) for table in taken)]
    tables: list[FoundTable] = []
    runs = [run for family in families for run in _runs(family, free)]
    # The smaller first: what holds a table whole is the frame around it.
    for run in sorted(runs, key=lambda run: run[-1].at - run[0].at):
        box = _between(run[0], run[-1])
        if any(box.y0 < table.y1 and table.y0 < box.y1 and box.x0 < table.x1 and table.x0 < box.x1 for table in tables):
            continue
        table = _columns([word for word in free if box.holds(word)], [rule.at for rule in run])
        if table is not None:
            tables.append(box._replace(rows=table))
    return tables


def _between(top: _Line, bottom: _Line) -> FoundTable:
    return FoundTable([], top.start - SNAP, top.at, top.end + SNAP, bottom.at)


def _runs(family: Sequence[_Line], words: Sequence[Word]) -> list[list[_Line]]:
    """Split the rules of one width into tables: between two tables stands text without columns, or nothing."""
    runs = [[family[0]]]
    for upper, lower in pairwise(family):
        box = _between(upper, lower)
        if _has_columns([word for word in words if box.holds(word)], lower.at - upper.at):
            runs[-1].append(lower)
        else:
            runs.append([lower])
    return [run for run in runs if len(run) > 1]


def _has_columns(words: Sequence[Word], height: float) -> bool:
    """Whether most lines between two rules have wide gaps; a double rule with nothing in it has, so to say."""
    if not words:
        return height <= 2 * SNAP
    lines = [sorted(line, key=lambda word: word.x0) for line in _rows(words)]
    gaps = sum(any(b.x0 - a.x1 >= MIN_GUTTER * a.size for a, b in pairwise(line)) for line in lines)
    return gaps * 2 >= len(lines)


def _columns(words: Sequence[Word], rule_ys: Sequence[float]) -> list[list[str]] | None:
    lines = _rows(words)
    if not 2 <= len(lines) <= MAX_ROWS:  # noqa: PLR2004 - a header and a row
        return None
    size = sorted(word.size for word in words)[len(words) // 2]
    gutters = _gutters(words, MIN_GUTTER * size)
    if not gutters or len(gutters) >= MAX_COLUMNS:
        return None
    table = [_cells(line, gutters) for line in lines]
    several = sum(sum(map(bool, row)) > 1 for row in table)
    longest = sorted(len(cell) for row in table for cell in row if cell)
    if several * 2 < len(table) or longest[len(longest) * 3 // 4] > MAX_CELL_CHARACTERS:
        return None
    return _between_rules(table, lines, rule_ys)


def _rows(words: Sequence[Word]) -> list[list[Word]]:
    rows: list[list[Word]] = []
    for word in sorted(words, key=lambda w: ((w.y0 + w.y1) / 2, w.x0)):
        if rows and abs((word.y0 + word.y1) - (rows[-1][0].y0 + rows[-1][0].y1)) / 2 < 0.5 * word.size:
            rows[-1].append(word)
        else:
            rows.append([word])
    return rows


def _gutters(words: Sequence[Word], width: float) -> list[float]:
    """Return the middles of the upright stripes that no word crosses."""
    spans = sorted((word.x0, word.x1) for word in words)
    gutters, reach = [], spans[0][1]
    for start, end in spans[1:]:
        if start - reach >= width:
            gutters.append((start + reach) / 2)
        reach = max(reach, end)
    return gutters


def _cells(line: Sequence[Word], gutters: Sequence[float]) -> list[str]:
    cells: list[list[Word]] = [[] for _ in range(len(gutters) + 1)]
    for word in line:
        cells[sum(gutter < word.x0 for gutter in gutters)].append(word)
    return [" ".join(word.text for word in sorted(cell, key=lambda w: w.x0)) for cell in cells]


def _between_rules(table: list[list[str]], lines: Sequence[Sequence[Word]], rules: Sequence[float]) -> list[list[str]]:
    """Make the lines between two rules one row where every row has its rule; else keep a row per line."""
    bands = [sum(rule < (line[0].y0 + line[0].y1) / 2 for rule in rules) for line in lines]
    if len(rules) <= 3:  # noqa: PLR2004 - top, middle, bottom: only the header has a rule of its own
        bands = [band if band == 1 and len(rules) == 3 else 1000 + i for i, band in enumerate(bands)]  # noqa: PLR2004 - as above
    merged: list[tuple[int, list[str]]] = []
    for band, row in zip(bands, table, strict=True):
        if merged and (band == merged[-1][0] or _is_wrapped(merged[-1][1], row)) and not _starts(merged[-1][1], row):
            merged[-1] = (band, [join_lines(filter(None, pair)) for pair in zip(merged[-1][1], row, strict=True)])
        else:
            merged.append((band, row))
    return [row for _, row in merged]


def _starts(above: Sequence[str], row: Sequence[str]) -> bool:
    """Whether a line between the same rules as the one above is a row of its own: it has a label, and more."""
    return bool(above[0] and row[0]) and sum(map(bool, row)) > 1


def _is_wrapped(above: Sequence[str], row: Sequence[str]) -> bool:
    """Whether a line goes on with the cell above it: one cell alone, in the middle of a sentence or a word."""
    filled = [(over, cell) for over, cell in zip(above, row, strict=True) if cell]
    if len(filled) != 1 or len(filled[0][0]) < MIN_WRAPPED_CHARACTERS:
        return False
    over, cell = filled[0]
    return cell[0].islower() or cell[0] == "(" or over[-1] in HYPHENS
