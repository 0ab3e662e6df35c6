"""What kind of document a body is: as sent, as named, or as its first bytes tell."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO
from pathlib import PurePath
from typing import NamedTuple

from rma_service.envelope import TEXT, parse_content_type
from rma_service.problems import CorruptDocument, EncryptedDocument, UnsupportedMediaType

PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
HTML = "text/html"
MARKDOWN = "text/markdown"
SUPPORTED = (PDF, DOCX, HTML, MARKDOWN, TEXT)
_ALIASES = {
    "application/x-pdf": PDF,
    "application/vnd.ms-word.document.macroenabled.12": DOCX,
    "application/xhtml+xml": HTML,
    "text/x-markdown": MARKDOWN,
    "text/x-rst": TEXT,
    "text/x-web-markdown": MARKDOWN,
}
_SUFFIXES = {
    ".pdf": PDF, ".docx": DOCX, ".docm": DOCX, ".html": HTML, ".htm": HTML, ".xhtml": HTML,
    ".md": MARKDOWN, ".markdown": MARKDOWN, ".mkd": MARKDOWN, ".txt": TEXT, ".text": TEXT, ".rst": TEXT, ".log": TEXT,
}  # fmt: skip
#: What clients send when they do not know; the second is what curl says about any --data.
_UNTOLD = frozenset(["", "application/octet-stream", "application/x-www-form-urlencoded", "binary/octet-stream"])
#: First bytes that leave no doubt; those of pictures lead to the service that reads them.
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"\x1f\x8b", "application/gzip"),
    (b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed"),
    (b"{\\rtf", "application/rtf"),
    (b"%!PS", "application/postscript"),
    (b"\x7fELF", "application/x-executable"),
)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_PACKAGE = "EncryptedPackage".encode("utf-16-le")
_HTML_START = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
#: A PDF may have so many bytes of something else before it.
_PDF_WITHIN = 1024
_SAMPLE = 65_536
_BOMS = (b"\xff\xfe", b"\xfe\xff")
_MAX_CONTROL_SHARE = 0.02


class Kind(NamedTuple):
    """The media type to read a document as, the character set it was sent with, and what is odd about it."""

    media_type: str
    charset: str | None
    warnings: list[str]


def kind_of(data: bytes, *, content_type: str, filename: str | None) -> Kind:
    """Decide how to read ``data``; raises UnsupportedMediaType, EncryptedDocument, CorruptDocument."""
    sent, charset = parse_content_type(content_type)
    sent = _ALIASES.get(sent, sent)
    named = _SUFFIXES.get(PurePath(filename).suffix.lower()) if filename else None
    found = sniff(data)
    if found == "application/x-ole-storage":
        raise _ole_problem(data)
    claimed = (named if sent == TEXT and named in (MARKDOWN, HTML) else sent) if sent not in _UNTOLD else named
    if found not in (None, TEXT, HTML):
        return Kind(_supported(found), charset, _mismatch(claimed, found))
    if claimed in (PDF, DOCX):
        what = "empty of what makes one" if found is None else "text"
        raise CorruptDocument(f"this was sent as {claimed}, but is no such document: it is {what}, or is cut off")
    if claimed is not None and claimed.startswith("image/"):
        raise UnsupportedMediaType(_sentence(claimed), members={"supported": list(SUPPORTED)})
    if found is None:
        raise UnsupportedMediaType(
            _sentence(claimed or "binary data of an unknown kind"), members={"supported": list(SUPPORTED)}
        )
    return Kind(_supported(claimed or found), charset, [])


def sniff(data: bytes) -> str | None:
    """Return the media type that the bytes tell; plain text and Markdown look alike; None is binary and unknown."""
    head = data[:_SAMPLE]
    if b"%PDF-" in head[:_PDF_WITHIN]:
        return PDF
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(data)
    if head.startswith(_OLE):
        return "application/x-ole-storage"
    for magic, media_type in _MAGIC:
        if head.startswith(magic):
            return media_type
    if _HTML_START.match(head.removeprefix(b"\xef\xbb\xbf")):
        return HTML
    return TEXT if _looks_like_text(head) else None


def _kind_of_zip(data: bytes) -> str:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError, OSError):
        return DOCX if b"word/" in data[:_SAMPLE] else "application/zip"
    if "[Content_Types].xml" not in names:
        return "application/zip"
    return DOCX if any(name.startswith("word/") for name in names) else "application/vnd.openxmlformats-officedocument"


def _looks_like_text(head: bytes) -> bool:
    if head.startswith(_BOMS) or _is_bare_utf16(head):
        return True
    controls = sum(byte < 0x20 and byte not in b"\t\n\x0b\x0c\r\x1b" for byte in head)  # noqa: PLR2004 - the first printable
    return b"\x00" not in head and controls <= _MAX_CONTROL_SHARE * len(head)


def _is_bare_utf16(head: bytes) -> bool:
    """Whether every other byte is null, as in Western text in UTF-16 without a mark."""
    return len(head) >= 4 and max(head[0::2].count(0), head[1::2].count(0)) > 0.45 * len(head)  # noqa: PLR2004 - two characters


def _mismatch(claimed: str | None, found: str) -> list[str]:
    if claimed is None or claimed == found:
        return []
    return [f"sent as {claimed}, but it is {found}; it was read as that"]


def _supported(media_type: str) -> str:
    if media_type in SUPPORTED:
        return media_type
    if media_type.startswith("text/"):
        return TEXT
    raise UnsupportedMediaType(_sentence(media_type), members={"supported": list(SUPPORTED)})


def _sentence(media_type: str) -> str:
    if media_type.startswith("image/"):
        return f"{media_type} is a picture: the ocr service reads text from pictures"
    if media_type == "application/zip":
        return "this is a ZIP archive: send the documents in it one by one"
    return f"{media_type} is not read here; PDF, DOCX, HTML, Markdown and plain text are"


def _ole_problem(data: bytes) -> Exception:
    if _ENCRYPTED_PACKAGE in data:
        return EncryptedDocument("the DOCX opens with a password only; remove the protection and send it again")
    detail = "this is an Office document of before 2007: save it as DOCX or PDF and send that"
    return UnsupportedMediaType(detail, members={"supported": list(SUPPORTED)})
