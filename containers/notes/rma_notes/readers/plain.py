"""Plain text: its encoding, its paragraphs, and what looks like headings."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from charset_normalizer import from_bytes

from rma_notes.cleaning import clean_line, clean_lines, join_lines
from rma_notes.records import Block, Document

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: More of a text tells no more about its encoding.
_SAMPLE = 100_000
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNDERLINE = re.compile(r"^\s*([=\-~^*#])\1{2,}\s*$")
_NUMBERED = re.compile(r"^(\d{1,2}(?:\.\d{1,3}){0,4})\.?\s+[A-Z\u00c0-\u00de]")
_ITEM = re.compile(r"^\s*(?:[-*•+o]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s+\S")
_MAX_HEADING = 80
_UNDERLINE_LEVELS = "=-~^*#"
#: A paragraph whose lines reach this far was wrapped by a program; shorter lines were broken by a person.
_WRAPPED_AT, _FULL = 55, 0.65


def decode(data: bytes, *, charset: str | None) -> tuple[str, list[str]]:
    """Return text and warnings; the charset that was sent comes first, then marks, UTF-8, and a guess."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data.decode(name, "replace"), []
    for name in filter(None, (charset, "utf-8")):
        try:
            return data.decode(name), []
        except (UnicodeError, LookupError):
            continue
    best = from_bytes(data[:_SAMPLE]).best()
    guess = best.encoding if best else "cp1252"
    return data.decode(guess, "replace"), [f"no UTF-8; read as {guess}, which is a guess: send a charset"]


def read(data: bytes, *, charset: str | None = None) -> Document:
    """Return the text's paragraphs, items, and headings."""
    text, warnings = decode(data, charset=charset)
    return Document(blocks=list(blocks_of(clean_lines(text.replace("\f", "\n\n")))), warnings=warnings)


def blocks_of(text: str) -> Iterator[Block]:
    """Yield the blocks of clean text; empty lines part them."""
    for chunk in re.split(r"\n\s*\n", text):
        lines = [line for line in chunk.split("\n") if line.strip()]
        if lines:
            yield from _chunk(lines)


def _chunk(lines: Sequence[str]) -> Iterator[Block]:
    heading, rest = _heading(lines)
    if heading is not None:
        yield heading
    if not rest:
        return
    if sum(bool(_ITEM.match(line)) for line in rest) > 1 or _ITEM.match(rest[0]):
        yield from _items(rest)
    elif all(line.startswith(("    ", "\t")) for line in rest) and _is_code("\n".join(rest)):
        yield Block(kind="code", text="\n".join(rest))
    elif _is_wrapped(rest):
        yield Block(kind="paragraph", text=join_lines(clean_line(line) for line in rest))
    else:
        yield Block(kind="paragraph", text="\n".join(clean_line(line) for line in rest))


def _heading(lines: Sequence[str]) -> tuple[Block | None, Sequence[str]]:
    """Take a heading off the beginning: underlined, numbered, or a line of capitals alone."""
    first = lines[0].strip()
    if (
        len(lines) > 1
        and len(first) <= _MAX_HEADING
        and (mark := _UNDERLINE.match(lines[1]))
        and any(map(str.isalpha, first))
    ):
        return Block(
            kind="heading", text=clean_line(first), level=_UNDERLINE_LEVELS.index(mark[1]) // 2 + 1 + (mark[1] == "-")
        ), lines[2:]
    if len(lines) > 1 or len(first) > _MAX_HEADING or first.endswith((".", ",", ";", ":")):
        return None, lines
    if (number := _NUMBERED.match(lines[0])) is not None:
        return Block(kind="heading", text=clean_line(first), level=number[1].count(".") + 1), []
    letters = [c for c in first if c.isalpha()]
    if len(letters) >= 4 and all(map(str.isupper, letters)) and not lines[0].startswith("    "):  # noqa: PLR2004 - shorter ones are initials
        return Block(kind="heading", text=clean_line(first), level=1), []
    return None, lines


def _items(lines: Sequence[str]) -> Iterator[Block]:
    item: list[str] = []
    for line in lines:
        if _ITEM.match(line) and item:
            yield Block(kind="item", text=join_lines(item))
            item = []
        item.append(clean_line(line))
    yield Block(kind="item", text=join_lines(item))


def _is_code(text: str) -> bool:
    marks = sum(c in "{}()[]<>=;_|/\\$#&+*" for c in text)
    return marks > 0.06 * len(text)


def _is_wrapped(lines: Sequence[str]) -> bool:
    longest = max(map(len, lines))
    full = sum(len(line.rstrip()) >= _FULL * longest for line in lines[:-1])
    return len(lines) == 1 or (longest >= _WRAPPED_AT and full >= 0.7 * (len(lines) - 1))
