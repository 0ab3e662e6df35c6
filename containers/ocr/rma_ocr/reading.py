"""A document read page by page: decoded, turned upright, recognised, and put in reading order."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from rma_ocr import cpus, engines, layout, rapid, sheets, tesseract
from rma_ocr.records import Line, Page, Recognition, Timings
from rma_ocr.turns import TURNS, Turn, turned

if TYPE_CHECKING:
    from PIL import Image

    from rma_ocr.options import Options
    from rma_ocr.records import EngineName
    from rma_ocr.sheets import Sheet, Sheets

#: Seconds that one page may take; native code cannot be asked to stop, so the process ends with it.
PAGE_S = 60.0


class Reader(NamedTuple):
    """How the pages of one request are read."""

    options: Options
    engine: EngineName
    languages: tuple[str, ...]


class Text(NamedTuple):
    """What was found on a page, which was turned so; ``is_layer``: the PDF had it as text."""

    text: str
    lines: list[Line]
    turn: Turn
    is_layer: bool = False


class _Spent:
    """Seconds by kind of work."""

    def __init__(self) -> None:
        self.decode = self.orientation = self.recognition = 0.0


def read(data: bytes, media_type: str, options: Options, *, filename: str | None, warnings: list[str]) -> Recognition:
    """Return the text of a document; raises ServiceProblem."""
    began = time.monotonic()
    engine, languages = engines.chosen(options)
    reader = Reader(options, engine, languages)
    spent = _Spent()
    _alarm(PAGE_S)
    document = sheets.opened(data, media_type, options)
    pages = [_page(document, number, reader, spent) for number in document.chosen(options.pages)]
    _alarm(0)
    empty = [str(page.page) for page in pages if not page.lines]
    if empty:
        warnings = [*warnings, f"no text was found on page {', '.join(empty)}"]
    return Recognition(
        engine=engine,
        engine_version=engines.described()[engine]["version"],
        media_type=media_type,
        filename=filename,
        document_pages=document.count,
        text="\n\n".join(page.text for page in pages if page.text),
        pages=pages,
        timings=Timings(
            decode_s=round(spent.decode, 3), orientation_s=round(spent.orientation, 3),
            recognition_s=round(spent.recognition, 3), total_s=round(time.monotonic() - began, 3),
        ),
        warnings=warnings,
    )  # fmt: skip


def _alarm(seconds: float) -> None:
    """End this process after so many seconds, whatever it is at then; 0 takes it back."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _page(document: Sheets, number: int, reader: Reader, spent: _Spent) -> Page:
    _alarm(PAGE_S)
    began = time.monotonic()
    sheet = document.sheet(number)
    decoded = time.monotonic()
    spent.decode += decoded - began
    layer = document.text_layer(number) if reader.options.text_layer == "prefer" else None
    if layer is not None:
        text = Text(layer[0], layer[1], 0, is_layer=True)
    else:
        turn = _turn(sheet.image, reader)
        found = time.monotonic()
        spent.orientation += found - decoded
        text = Text(*_recognised(turned(sheet.image, turn), sheet, reader), turn)
        spent.recognition += time.monotonic() - found
    return _made(number, sheet, text, reader.languages, seconds=time.monotonic() - began)


def _made(number: int, sheet: Sheet, text: Text, languages: tuple[str, ...], *, seconds: float) -> Page:
    width, height = sheet.size if text.turn in (0, 180) else sheet.size[::-1]
    sure = [(line.confidence, len(line.text)) for line in text.lines if line.confidence is not None]
    letters = sum(length for _, length in sure)
    return Page(
        page=number, width=width, height=height, dpi=sheet.dpi, orientation=text.turn,
        languages=[] if text.is_layer else list(languages),
        source="text_layer" if text.is_layer else "ocr",
        confidence=round(sum(one * length for one, length in sure) / letters, 4) if letters else None,
        text=text.text, lines=text.lines if text.is_layer else [_scaled(line, sheet.scale) for line in text.lines],
        seconds=round(seconds, 3),
    )  # fmt: skip


def _turn(image: Image.Image, reader: Reader) -> Turn:
    asked = reader.options.orientation
    if asked != "auto":
        return TURNS[asked]
    found = tesseract.installed() if reader.engine == "tesseract" else None
    told = tesseract.turn_of(image, found=found, threads=cpus.mine()) if found else None
    return rapid.turn_of(image) if told is None else told


def _recognised(image: Image.Image, sheet: Sheet, reader: Reader) -> tuple[str, list[Line]]:
    found = tesseract.installed() if reader.engine == "tesseract" else None
    if found is None:
        rows = layout.ordered(rapid.read(image))
        return layout.text_of(rows), [line for row in rows for line in row]
    dpi = round(sheet.dpi / sheet.scale) if sheet.dpi else None
    paragraphs = tesseract.read(image, found=found, languages=reader.languages, dpi=dpi, threads=cpus.mine())
    lines = [line for paragraph in paragraphs for line in paragraph]
    return "\n\n".join("\n".join(line.text for line in paragraph) for paragraph in paragraphs), lines


def _scaled(line: Line, scale: float) -> Line:
    if scale == 1:
        return line
    first, second, third, fourth = ((round(x * scale), round(y * scale)) for x, y in line.box)
    return Line(text=line.text, confidence=line.confidence, box=(first, second, third, fourth))
