"""What a client may ask for, beside the document itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rma_ocr import languages
from rma_service import options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ENGINES = ("auto", "rapidocr", "tesseract")
ORIENTATIONS = ("auto", "0", "90", "180", "270")
TEXT_LAYERS = ("ignore", "prefer")
#: Dots per inch that pages of a PDF are drawn with.
DEFAULT_DPI, MIN_DPI, MAX_DPI = 200, 50, 600


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a request; ``pages`` count from 1, None means all of them; no ``languages`` means the engine's own."""

    engine: str = "auto"
    languages: tuple[str, ...] = ()
    orientation: str = "auto"
    pages: frozenset[int] | None = None
    dpi: int = DEFAULT_DPI
    text_layer: str = "ignore"
    filename: str | None = None


def parse(given: Mapping[str, object]) -> Options:
    """Return options from words (a query, a form) or JSON values; raises BadOptions, which names each that is wrong."""
    return options.parse(given, Options, _READERS)


def _one_of(names: tuple[str, ...]) -> Callable[[object], str]:
    def read(value: object) -> str:
        word = str(value).strip().lower() if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if word not in names:
            raise ValueError(f"one of {', '.join(names)} is expected")
        return word

    return read


_READERS: dict[str, Callable[[object], object]] = {
    "engine": _one_of(ENGINES),
    "languages": languages.read,
    "orientation": _one_of(ORIENTATIONS),
    "pages": options.pages,
    "dpi": options.number(MIN_DPI, MAX_DPI),
    "text_layer": _one_of(TEXT_LAYERS),
    "filename": options.filename,
}
