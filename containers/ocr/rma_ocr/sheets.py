"""Pages as pictures: the frames of an image, or the pages of a PDF drawn by PDFium; checked before they are decoded."""

from __future__ import annotations

import ctypes
import math
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import pypdfium2  # type: ignore[import-untyped]  # it ships no annotations
import pypdfium2.raw as pdfium  # type: ignore[import-untyped]  # it ships no annotations
from PIL import Image, ImageOps, UnidentifiedImageError

from rma_ocr.media import IMAGES, PDF
from rma_ocr.records import Box, Line
from rma_service.problems import BadOptions, CorruptDocument, EncryptedDocument, TooComplex

if TYPE_CHECKING:
    from rma_ocr.options import Options

#: Pages of one request.
MAX_PAGES = 50
#: Pixels of a picture that is decoded at all; A4 at 600 dpi has 35 million.
MAX_PIXELS = 50_000_000
#: Larger pictures are made smaller to this before text is looked for; A4 at 300 dpi has 9 million.
WORK_PIXELS = 12_000_000
#: Pictures with a side shorter than this hold no text.
MIN_SIDE = 8
_POINTS_PER_INCH = 72
_SIXTEEN_BITS = 256
_SCALABLE = ("L", "RGB", "RGBA", "CMYK")
_MAX_DPI_TOLD = 2400


class Sheet(NamedTuple):
    """A page to be read, as RGB; ``scale`` leads from its pixels to those of the page, which are told to the client."""

    image: Image.Image
    size: tuple[int, int]
    dpi: int | None

    @property
    def scale(self) -> float:
        """Pixels of the page for one of the picture."""
        return self.size[0] / self.image.width


class Sheets:
    """A document's pages by number, from 1."""

    count: int

    def sheet(self, number: int) -> Sheet:
        """Return one page as a picture; raises CorruptDocument, TooComplex."""
        raise NotImplementedError

    def text_layer(self, number: int) -> tuple[str, list[Line]] | None:  # noqa: ARG002 - pictures have none
        """Return the text that a page of a PDF carries already, if any, in pixels of its `sheet`."""
        return None

    def chosen(self, pages: frozenset[int] | None) -> list[int]:
        """Return the numbers of those that were asked for; raises BadOptions, TooComplex."""
        numbers = [n for n in range(1, self.count + 1) if pages is None or n in pages]
        if not numbers:
            raise BadOptions({"pages": f"the document has {self.count} pages, and none of these"})
        if len(numbers) > MAX_PAGES:
            limit = f"{MAX_PAGES} are read at once: ask for fewer, like pages=1-{MAX_PAGES}"
            detail = f"{len(numbers)} pages are too many; {limit}"
            raise TooComplex(detail, members={"document_pages": self.count, "limit_pages": MAX_PAGES})
        return numbers


def opened(data: bytes, media_type: str, options: Options) -> Sheets:
    """Open a document; raises CorruptDocument, EncryptedDocument."""
    return _PdfSheets(data, options.dpi) if media_type == PDF else _ImageSheets(data, media_type)


class _ImageSheets(Sheets):
    def __init__(self, data: bytes, media_type: str) -> None:
        # Our own limit comes before any decoding, and says what to do.
        Image.MAX_IMAGE_PIXELS = None
        try:
            self._image = Image.open(BytesIO(data), formats=[IMAGES[media_type]])
            _check_size(*self._image.size)
            self.count = int(getattr(self._image, "n_frames", 1))
        except (OSError, ValueError, SyntaxError, EOFError, UnidentifiedImageError) as error:
            raise _damaged(media_type) from error
        self._media_type = media_type

    def sheet(self, number: int) -> Sheet:
        try:
            self._image.seek(number - 1)
            _check_size(*self._image.size)
            self._image.load()
            # What can be made smaller as it is takes a third of the memory that way.
            small = _reduced(self._image if self._image.mode in _SCALABLE else _plain(self._image))
            upright = _plain(ImageOps.exif_transpose(small))
        except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
            raise _damaged(self._media_type) from error
        lies = (small.width > small.height) != (upright.width > upright.height)
        size = self._image.size[::-1] if lies else self._image.size
        return Sheet(upright, size, _dpi(self._image.info.get("dpi")))


class _PdfSheets(Sheets):
    def __init__(self, data: bytes, dpi: int) -> None:
        self._dpi = dpi
        try:
            self._pdf = pypdfium2.PdfDocument(data)
            self.count = len(self._pdf)
        except pypdfium2.PdfiumError as error:
            if getattr(error, "err_code", None) in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY):
                detail = "the PDF opens with a password only; remove the protection and send it again"
                raise EncryptedDocument(detail) from None
            raise _damaged(PDF) from error
        if self.count == 0:
            raise CorruptDocument("the PDF has no pages")

    def sheet(self, number: int) -> Sheet:
        page, scale = self._page(number)
        try:
            image = page.render(scale=scale).to_pil().convert("RGB")
        except (pypdfium2.PdfiumError, OSError, ValueError) as error:
            raise CorruptDocument(f"page {number} of the PDF cannot be drawn: it is damaged") from error
        finally:
            page.close()
        return Sheet(image, image.size, round(scale * _POINTS_PER_INCH))

    def text_layer(self, number: int) -> tuple[str, list[Line]] | None:
        page, scale = self._page(number)
        try:
            size = tuple(math.ceil(side * scale) for side in page.get_size())
            found = page.get_textpage()
            text = found.get_text_bounded().replace("\r\n", "\n").strip()
            boxes = [found.get_rect(n) for n in range(found.count_rects())] if text else []
            lines = [
                Line(text=words, confidence=None, box=_on_page(page, size, box))
                for box in boxes
                if (words := found.get_text_bounded(*box).strip())
            ]
        except pypdfium2.PdfiumError:
            return None
        finally:
            page.close()
        return (text, lines) if lines else None

    def _page(self, number: int) -> tuple[pypdfium2.PdfPage, float]:
        """Return a page, and pixels per point to draw it with: fewer where it is a poster."""
        try:
            page = self._pdf[number - 1]
            width, height = page.get_size()
        except pypdfium2.PdfiumError as error:
            raise CorruptDocument(f"page {number} of the PDF cannot be read: it is damaged") from error
        scale = self._dpi / _POINTS_PER_INCH
        return page, min(
            scale, math.sqrt(WORK_PIXELS / max(1.0, width * height)), WORK_PIXELS / max(1.0, width, height) / MIN_SIDE
        )


def _on_page(page: pypdfium2.PdfPage, size: tuple[int, ...], box: tuple[float, float, float, float]) -> Box:
    """Return a box of a PDF's own coordinates in pixels of the page as it is drawn."""
    left, bottom, right, top = box
    corners = []
    for x, y in ((left, top), (right, top), (right, bottom), (left, bottom)):
        to_x, to_y = ctypes.c_int(), ctypes.c_int()
        pdfium.FPDF_PageToDevice(page, 0, 0, size[0], size[1], 0, x, y, to_x, to_y)
        corners.append((to_x.value, to_y.value))
    return corners[0], corners[1], corners[2], corners[3]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        detail = f"the picture has {width:,} x {height:,} pixels; {MAX_PIXELS:,} in all are the limit: make it smaller"
        raise TooComplex(detail, members={"limit_pixels": MAX_PIXELS})
    if min(width, height) < MIN_SIDE:
        raise TooComplex(f"the picture has {width} x {height} pixels: too few for any text")


def _plain(image: Image.Image) -> Image.Image:
    """Return the picture as RGB with 8 bits; what is transparent gets a ground on which something is seen."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_ground(image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    lowest, highest = image.getextrema()
    if not isinstance(lowest, int | float) or not isinstance(highest, int | float):
        return image.convert("L")
    if image.mode.startswith("I;16") and lowest >= 0:
        lowest, highest = 0, _SIXTEEN_BITS**2 - 1
    scale = 255 / (highest - lowest) if highest > lowest else 0.0
    return image.convert("F").point(lambda value: value * scale - lowest * scale).convert("L")


def _on_ground(image: Image.Image) -> Image.Image:
    for ground in ("white", "black"):
        made = Image.new("RGBA", image.size, ground)
        made.alpha_composite(image)
        made = made.convert("RGB")
        if any(low != high for low, high in made.getextrema()):  # type: ignore[misc]  # RGB has three pairs
            break
    return made


def _reduced(image: Image.Image) -> Image.Image:
    factor = math.sqrt(WORK_PIXELS / (image.width * image.height))
    if factor >= 1:
        return image
    size = (max(MIN_SIDE, round(image.width * factor)), max(MIN_SIDE, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _dpi(told: Any) -> int | None:  # noqa: ANN401 - whatever a file says of itself
    """Return what the picture says of itself, where it is believable."""
    try:
        value = float(told[0])
    except (TypeError, ValueError, LookupError, ArithmeticError):
        return None
    return round(value) if _POINTS_PER_INCH <= value <= _MAX_DPI_TOLD else None


def _damaged(media_type: str) -> CorruptDocument:
    return CorruptDocument(f"this {media_type} cannot be read: the file is damaged or cut off")
