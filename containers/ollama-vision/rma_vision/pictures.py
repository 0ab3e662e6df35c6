"""What kind of picture a body is: its first bytes decide, whatever it was sent as."""

from __future__ import annotations

from rma_service.problems import UnsupportedMediaType

SUPPORTED = ("image/png", "image/jpeg", "image/webp")


def check(data: bytes) -> str:
    """Return the media type; raises UnsupportedMediaType."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise UnsupportedMediaType("PNG, JPEG and WebP pictures are looked at", members={"supported": list(SUPPORTED)})
