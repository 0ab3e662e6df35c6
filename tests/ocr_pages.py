"""Pages to be recognised: a real text, drawn, then worn as a scanner wears it; the same ones in every run."""

from __future__ import annotations

import difflib
import functools
import re
import textwrap
import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pypdfium2  # type: ignore[import-untyped]  # it ships no annotations
import reportlab  # type: ignore[import-untyped]  # it ships no annotations
from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
#: Bitstream Vera, which comes with reportlab.
FONT = Path(reportlab.__file__).parent / "fonts" / "Vera.ttf"
PAPER, INK = 250, 30
GERMAN = ["Über die Größe der Schiffe", "gab es öfter Streit am Hafen,", "bis die Brücke fertig wurde."]


@functools.cache
def licence(lines: int = 44, *, width: int = 78) -> list[str]:
    """The beginning of this repository's LICENSE as lines of a page."""
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    return textwrap.wrap(text, width)[:lines]


def page(
    lines: Sequence[str], *, dpi: int = 200, points: float = 11, skew: float = 0.7, noise: float = 12,
    height: float = 11.69,
) -> Image.Image:  # fmt: skip
    """Draw lines on a sheet of A4, put it askew by so many degrees, blur it and strew grey noise over it."""
    size = (int(8.27 * dpi), int(height * dpi))
    image = Image.new("L", size, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(str(FONT), round(points * dpi / 72))
    for number, line in enumerate(lines):
        draw.text((dpi // 2, dpi // 2 + number * int(points * 1.4 * dpi / 72)), line, font=font, fill=INK)
    image = image.rotate(skew, resample=Image.Resampling.BICUBIC, fillcolor=PAPER)
    image = image.filter(ImageFilter.GaussianBlur(dpi / 400))
    grain = np.random.default_rng(1).normal(0, noise, size[::-1])
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype("uint8"))


def sign(text: str = "HARBOUR 1871", *, size: tuple[int, int] = (520, 120)) -> Image.Image:
    """A small picture with few large letters: fast to read."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((30, 25), text, font=ImageFont.truetype(str(FONT), 56), fill="black")
    return image


def sixteen_bits(image: Image.Image) -> Image.Image:
    """The picture in grey with 16 bits."""
    return Image.fromarray(np.asarray(image.convert("L")).astype("uint16") * 257)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has one row's worth of data: a bomb that is never lit."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def blank_pdf(pages: int) -> bytes:
    """A PDF of so many empty pages."""
    pdf = pypdfium2.PdfDocument.new()
    for _ in range(pages):
        pdf.new_page(100, 100)
    out = BytesIO()
    pdf.save(out)
    return out.getvalue()


def word_accuracy(found: str, wanted: str) -> float:
    """The share of the wanted words that were found, in their order, letter for letter."""
    have, want = found.split(), wanted.split()
    blocks = difflib.SequenceMatcher(None, want, have, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(want)


def letters(text: str) -> str:
    """A text without what is no letter or digit."""
    return re.sub(r"[^\w]", "", text).upper()
