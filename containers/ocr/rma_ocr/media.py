"""What a body is: its first bytes decide, whatever it was sent as."""

from __future__ import annotations

from rma_service.envelope import parse_content_type
from rma_service.problems import CorruptDocument, UnsupportedMediaType

PDF = "application/pdf"
#: Media types with Pillow's name of the format; nothing else is given to it.
IMAGES = {
    "image/png": "PNG", "image/jpeg": "JPEG", "image/tiff": "TIFF", "image/gif": "GIF", "image/bmp": "BMP",
    "image/webp": "WEBP",
}  # fmt: skip
SUPPORTED = (PDF, *IMAGES)
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"II+\x00", "image/tiff"),
    (b"MM\x00+", "image/tiff"),
    (b"BM", "image/bmp"),
)
#: A PDF may have so many bytes of something else before it.
_PDF_WITHIN = 1024
_ALIASES = {
    "application/x-pdf": PDF,
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-ms-bmp": "image/bmp",
}


def kind_of(data: bytes, *, content_type: str) -> tuple[str, list[str]]:
    """Return the media type, and what is odd about it; raises UnsupportedMediaType, CorruptDocument."""
    sent, _ = parse_content_type(content_type)
    sent = _ALIASES.get(sent, sent)
    found = sniff(data)
    if found is not None:
        odd = sent in SUPPORTED and sent != found
        return found, [f"sent as {sent}, but it is {found}; it was read as that"] if odd else []
    if sent in SUPPORTED:
        raise CorruptDocument(f"this was sent as {sent}, but is no such file: it is something else, or damaged")
    what = sent if sent.startswith(("image/", "text/", "application/vnd.")) else "this kind of file"
    raise UnsupportedMediaType(
        f"{what} is not read here; PDF and PNG, JPEG, TIFF, GIF, BMP and WebP pictures are",
        members={"supported": list(SUPPORTED)},
    )


def sniff(data: bytes) -> str | None:
    """Return the media type that the first bytes tell, if it is one that is read here."""
    if b"%PDF-" in data[:_PDF_WITHIN]:
        return PDF
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((media_type for magic, media_type in _MAGIC if data.startswith(magic)), None)
