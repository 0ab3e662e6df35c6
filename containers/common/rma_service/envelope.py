"""The three forms of a request (the file itself, a form, JSON) made one: a document, its type, and options."""

from __future__ import annotations

import base64
import binascii
import re
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from multipart import MultipartError, MultipartParser, parse_options_header  # type: ignore[import-untyped]  # no annotations

from rma_service.options import filename_of
from rma_service.problems import BadOptions, BadRequest, EmptyDocument

MAX_QUERY_FIELDS = 32
MAX_FORM_FIELDS = 32
MAX_FIELD_BYTES = 10_000
TEXT = "text/plain"
_DATA_URL = re.compile(r"data:([^,]{0,500}?)(;base64)?,", re.IGNORECASE)


class Submission(NamedTuple):
    """A document as it was sent; ``options`` are words (query, form) or JSON values, not yet looked at."""

    data: bytes
    content_type: str
    filename: str | None
    options: dict[str, object]


def open_envelope(body: bytes, *, content_type: str, query: str, takes_text: bool = False) -> Submission:
    """Return the document and its options; raises BadRequest, BadOptions, EmptyDocument.

    ``takes_text``: JSON may hold the member ``text`` in place of ``file``.
    """
    asked = _query(query)
    media_type, _ = parse_content_type(content_type)
    if media_type == "multipart/form-data":
        found = _form(body, content_type, asked)
    elif media_type == "application/json" or media_type.endswith("+json"):
        found = _json(body, asked, takes_text=takes_text)
    else:
        found = Submission(body, content_type, filename_of(asked), asked)
    if not found.data.strip(b" \t\r\n\x00"):
        raise EmptyDocument("the document has no content: the file is empty")
    return found


def parse_content_type(value: str) -> tuple[str, str | None]:
    """Return the media type in lower case, and the charset where one is given."""
    media_type, *parameters = value.split(";")
    charset = next((p.partition("=")[2] for p in parameters if p.strip().lower().startswith("charset=")), "")
    return media_type.strip().lower(), charset.strip(" \"'").lower() or None


def _query(query: str) -> dict[str, object]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS, errors="strict")
    except (ValueError, UnicodeDecodeError) as error:
        raise BadRequest(f"the query cannot be read: {error}") from None
    return _once(pairs)


def _once(pairs: list[tuple[str, str]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    doubled = {name: "this option is given more than once" for name in names if names.count(name) > 1}
    if doubled:
        raise BadOptions(doubled)
    return dict(pairs)


def _form(body: bytes, content_type: str, asked: dict[str, object]) -> Submission:
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get("boundary")
    if not boundary:
        raise BadRequest("the form has no boundary: let the client library set the Content-Type")
    try:
        parser = MultipartParser(
            BytesIO(body), boundary, len(body), part_limit=MAX_FORM_FIELDS,
            spool_limit=len(body) + 1, memory_limit=len(body) + 1, disk_limit=0,
        )  # fmt: skip
        parts = parser.parts()
        fields = [
            (part.name, part.raw.decode()) for part in parts if part.name != "file" and part.size <= MAX_FIELD_BYTES
        ]
    except UnicodeDecodeError:
        raise BadRequest("a field of the form is not UTF-8") from None
    except (MultipartError, ValueError, LookupError) as error:
        raise BadRequest(f"the form cannot be read: {error}") from None
    files = [part for part in parts if part.name == "file"]
    if len(files) != 1:
        raise BadRequest(f"the form has {len(files)} fields named file; send one document in a field of that name")
    given = {**asked, **_once(fields)}
    sent = files[0]
    # A part without a filename is a plain field, whose type nobody has set.
    sent_type = sent.content_type if sent.filename else ""
    return Submission(sent.raw, sent_type, filename_of(given, sent.filename or ""), given)


def _json(body: bytes, asked: dict[str, object], *, takes_text: bool) -> Submission:
    how = 'send {"file": "data:application/pdf;base64,…"}' + (' or {"text": "…"}' if takes_text else "")
    try:
        members: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {error}; {how}") from None
    if not isinstance(members, dict):
        raise BadRequest(f"the JSON is no object; {how}")
    file = members.pop("file", None)
    text = members.pop("text", None) if takes_text else None
    if (file is None) == (text is None):
        what = "both a file and a text, or neither" if takes_text else "no file"
        raise BadRequest(f"the JSON has {what}; {how}")
    given = {**asked, **members}
    if text is not None:
        if not isinstance(text, str):
            raise BadRequest(f"`text` is no string; {how}")
        return Submission(text.encode(errors="replace"), f"{TEXT};charset=utf-8", filename_of(given), given)
    data, content_type = _data_url(file)
    return Submission(data, content_type, filename_of(given), given)


def _data_url(value: object) -> tuple[bytes, str]:
    match = _DATA_URL.match(value) if isinstance(value, str) else None
    if match is None or not isinstance(value, str):
        raise BadRequest("`file` is no data: URL; it looks like data:application/pdf;base64,…")
    try:
        if match[2]:
            return base64.b64decode("".join(value[match.end() :].split()), validate=True), match[1]
        return unquote_to_bytes(value[match.end() :]), match[1] or f"{TEXT};charset=us-ascii"
    except (binascii.Error, ValueError):
        raise BadRequest("the data: URL in `file` is no base64") from None
