"""The coordinator's pages: static files that came with the package; they fetch their data with the reader's key."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

#: Only our own files may run or style a page, nothing may frame it, and it may talk to this address alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
NAMES = ("status.html", "status.css", "status.js", "docs.html", "docs.js")


@cache
def static(name: str) -> bytes:
    """Return one of the package's static files. Raises KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return (files("rma_coordinator") / "static" / name).read_bytes()


def content_type(name: str) -> str:
    """Return the media type of a static file."""
    return TYPES[name.rpartition(".")[2]]
