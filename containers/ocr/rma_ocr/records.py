"""The answer of the service."""

from __future__ import annotations

from typing import Literal

import msgspec

#: Four corners, ``[x, y]`` each, clockwise from the upper left one, in pixels of the page as it stands upright.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
EngineName = Literal["rapidocr", "tesseract"]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of text, or a piece of one; ``confidence`` is 0.0 to 1.0, null for what a PDF carries as text."""

    text: str
    confidence: float | None
    box: Box


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One page (frame, picture); ``orientation`` is by how many degrees it was turned clockwise to stand upright.

    ``width`` and ``height`` are in pixels, of the page upright; ``source`` says where the text comes from.
    """

    page: int
    width: int
    height: int
    dpi: int | None
    orientation: Literal[0, 90, 180, 270]
    languages: list[str]
    source: Literal["ocr", "text_layer"]
    confidence: float | None
    text: str
    lines: list[Line]
    seconds: float


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of work: pictures decoded and pages rendered, orientation found, text recognised; and all of it."""

    decode_s: float
    orientation_s: float
    recognition_s: float
    total_s: float


class Recognition(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; ``document_pages`` is how many there are, ``pages`` has those that were asked for."""

    engine: EngineName
    engine_version: str
    media_type: str
    filename: str | None
    document_pages: int
    text: str
    pages: list[Page]
    timings: Timings
    warnings: list[str]
