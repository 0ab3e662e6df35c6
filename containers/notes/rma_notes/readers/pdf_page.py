"""What stands on a PDF page: words with their boxes, and ruling lines; y grows downwards, units are points."""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pypdfium2.raw as pdfium  # type: ignore[import-untyped]  # it ships no annotations

from rma_notes.cleaning import clean_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pypdfium2

_SPACES = frozenset([0x00, 0x09, 0x0A, 0x0D, 0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000])
#: PDFium writes these for a hyphen at a line's end, and no line break after it.
_LINE_END_HYPHENS = frozenset([0x02, 0xFFFE])
#: Many fonts map every hyphen to the soft one.
_HYPHEN_CODES = _LINE_END_HYPHENS | {0xAD}
_FIXED_PITCH, _FORCE_BOLD = 1, 1 << 18
_BOLD = re.compile(rb"bold|black|heavy|semibold|demi|cmbx|-bd", re.IGNORECASE)
_MONO = re.compile(rb"courier|mono|cmtt|cmsltt|consol|typewriter|menlo", re.IGNORECASE)
#: Text up to this far off a right angle still runs along a line; beyond it is a watermark.
_SLANT_DEGREES = 8
_FONT_NAME_BYTES = 128
#: A drawing has more paths than a table; looking for tables in it costs time and finds none.
MAX_PATHS = 4_000
MAX_PATH_POINTS = 400
#: What is thinner than this is a line, however it was drawn.
_RULE_THICKNESS = 2.5
_FLAT = 1.0


class Word(NamedTuple):
    """A word, its box, its font, and its place in the order in which the page draws."""

    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    size: float
    bold: bool
    mono: bool
    order: int
    turn: int


class Rule(NamedTuple):
    """A horizontal (y0 == y1) or vertical (x0 == x1) line."""

    x0: float
    y0: float
    x1: float
    y1: float


class PageContent(NamedTuple):
    """The words that run the page's main way, those that run another way, the rules, and whether there are images."""

    words: list[Word]
    turned: list[Word]
    rules: list[Rule]
    has_images: bool


def read_page(page: pypdfium2.PdfPage) -> PageContent:
    """Return what stands on the page, turned so that most of its text runs from left to right."""
    textpage = page.get_textpage()
    try:
        words = _without_doubles(_words(textpage.raw))
    finally:
        textpage.close()
    votes = Counter[int]()
    for word in words:
        votes[word.turn] += len(word.text)
    turn = max(votes, key=lambda key: votes[key]) if votes else 0
    rules, has_images = _drawings(page, turn)
    return PageContent(
        [word for word in words if word.turn == turn],
        [word for word in words if word.turn not in (turn, -1)],
        rules,
        has_images,
    )


def _without_doubles(words: Iterator[Word]) -> list[Word]:
    """Drop words drawn twice in one place, which is how some programs print bold."""
    seen: dict[tuple[str, int, int], Word] = {}
    for word in words:
        seen.setdefault((word.text, round(word.x0 / 2), round(word.y0 / 2)), word)
    return list(seen.values())


def _words(textpage: Any) -> Iterator[Word]:  # noqa: ANN401 - a ctypes handle
    get_unicode = pdfium.FPDFText_GetUnicode
    codes: list[int] = []
    first = 0
    reader = _WordReader(textpage)
    for index in range(pdfium.FPDFText_CountChars(textpage)):
        code = get_unicode(textpage, index)
        if code in _SPACES:
            if codes:
                yield from reader.word(first, index - 1, codes)
                codes = []
            continue
        if not codes:
            first = index
        codes.append(code)
        if code in _LINE_END_HYPHENS:
            yield from reader.word(first, index, codes)
            codes = []
    if codes:
        yield from reader.word(first, pdfium.FPDFText_CountChars(textpage) - 1, codes)


class _WordReader:
    """Reads a word's box and font; holds the buffers that PDFium writes to."""

    def __init__(self, textpage: Any) -> None:  # noqa: ANN401 - a ctypes handle
        self._textpage = textpage
        self._box = pdfium.FS_RECTF()
        self._matrix = pdfium.FS_MATRIX()
        self._flags = ctypes.c_int()
        self._name = ctypes.create_string_buffer(_FONT_NAME_BYTES)
        self._order = 0

    def word(self, first: int, last: int, codes: list[int]) -> Iterator[Word]:
        """Yield the word of characters ``first`` to ``last``, unless it has no text or no extent."""
        text = clean_line("".join("-" if code in _HYPHEN_CODES else chr(code) for code in codes if code < 0x110000))  # noqa: PLR2004 - the end of Unicode
        start, end = self._corners(first), self._corners(last)
        if not text or start is None or end is None:
            return
        size, turn = self._size_and_turn(first)
        x0, y0, x1, y1 = _turned(
            min(start[0], end[0]), min(start[1], end[1]), max(start[2], end[2]), max(start[3], end[3]), max(turn, 0)
        )
        bold, mono = self._style(first)
        self._order += 1
        yield Word(text, x0, y0, x1, y1, size or y1 - y0, bold, mono, self._order, turn)

    def _corners(self, index: int) -> tuple[float, float, float, float] | None:
        box = self._box
        if not pdfium.FPDFText_GetLooseCharBox(self._textpage, index, box):
            return None
        corners = (box.left, box.bottom, box.right, box.top)
        return corners if all(map(math.isfinite, corners)) else None

    def _size_and_turn(self, index: int) -> tuple[float, int]:
        """Return the font size as seen, and how many quarter turns the text makes (-1: something between)."""
        size, matrix = pdfium.FPDFText_GetFontSize(self._textpage, index), self._matrix
        if not pdfium.FPDFText_GetMatrix(self._textpage, index, matrix):
            return size, 0
        angle = math.degrees(math.atan2(matrix.b, matrix.a))
        quarter = round(angle / 90)
        turn = quarter % 4 if abs(angle - 90 * quarter) <= _SLANT_DEGREES else -1
        return round(size * (math.hypot(matrix.c, matrix.d) or 1.0), 1), turn

    def _style(self, index: int) -> tuple[bool, bool]:
        pdfium.FPDFText_GetFontInfo(self._textpage, index, self._name, _FONT_NAME_BYTES, self._flags)
        name, flags = self._name.value, max(self._flags.value, 0)
        return bool(flags & _FORCE_BOLD or _BOLD.search(name)), bool(flags & _FIXED_PITCH or _MONO.search(name))


def _turned(left: float, bottom: float, right: float, top: float, turn: int) -> tuple[float, float, float, float]:
    """Return a box of the page as x0, y0, x1, y1 with the text upright and y downwards."""
    if turn == 0:
        return left, -top, right, -bottom
    if turn == 1:
        return bottom, left, top, right
    if turn == 2:  # noqa: PLR2004 - quarter turns
        return -right, bottom, -left, top
    return -top, -right, -bottom, -left


def _drawings(page: pypdfium2.PdfPage, turn: int) -> tuple[list[Rule], bool]:
    rules: list[Rule] = []
    paths, has_images = 0, False
    for item in page.get_objects(max_depth=5):
        has_images = has_images or item.type == pdfium.FPDF_PAGEOBJ_IMAGE
        if item.type == pdfium.FPDF_PAGEOBJ_PATH:
            paths += 1
            if paths > MAX_PATHS:
                return [], has_images
            rules.extend(_rules(item, turn))
    return rules, has_images


def _rules(path: Any, turn: int) -> Iterator[Rule]:  # noqa: ANN401 - a page object, which has no public type of its own
    for left, bottom, right, top in _boxes(path):
        x0, y0, x1, y1 = _turned(left, bottom, right, top, turn)
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            continue
        if y1 - y0 <= _RULE_THICKNESS < x1 - x0:
            yield Rule(x0, (y0 + y1) / 2, x1, (y0 + y1) / 2)
        elif x1 - x0 <= _RULE_THICKNESS < y1 - y0:
            yield Rule((x0 + x1) / 2, y0, (x0 + x1) / 2, y1)


def _boxes(path: Any) -> Iterator[tuple[float, float, float, float]]:  # noqa: ANN401 - as above
    """Yield a box for a thin path, and for each straight piece of any other."""
    left, bottom, right, top = path.get_bounds()
    if min(right - left, top - bottom) <= _RULE_THICKNESS:
        yield left, bottom, right, top
        return
    points = _points(path)
    for (xa, ya), (xb, yb) in points:
        if abs(xa - xb) <= _FLAT or abs(ya - yb) <= _FLAT:
            yield min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def _points(path: Any) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:  # noqa: ANN401 - as above
    """Yield the straight pieces of a path in page coordinates."""
    count = pdfium.FPDFPath_CountSegments(path)
    if count > MAX_PATH_POINTS:
        return
    matrix = path.get_matrix()
    outer = path.container
    while outer is not None:
        matrix = matrix.multiply(outer.get_matrix())
        outer = outer.container
    x, y = ctypes.c_float(), ctypes.c_float()
    start: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    for index in range(count):
        segment = pdfium.FPDFPath_GetPathSegment(path, index)
        kind = pdfium.FPDFPathSegment_GetType(segment)
        if not pdfium.FPDFPathSegment_GetPoint(segment, x, y):
            continue
        point = matrix.on_point(x.value, y.value)
        if kind == pdfium.FPDF_SEGMENT_MOVETO:
            start = point
        elif kind == pdfium.FPDF_SEGMENT_LINETO and last is not None:
            yield last, point
        last = point
        if pdfium.FPDFPathSegment_GetClose(segment) and start is not None:
            yield point, start
