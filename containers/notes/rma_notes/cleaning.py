"""Characters made clean, and lines joined to paragraphs."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet

SOFT_HYPHEN = "\u00ad"
HYPHENS = "-\u2010\u2011" + SOFT_HYPHEN
#: Ligatures are how a font draws letters, not letters; search would not find words that have them.
_LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}
_SPACES = dict.fromkeys([0x09, 0x0B, 0x0C, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF])
_INLINE: dict[int, str | None] = {**_CONTROLS, **_INVISIBLE, **_LIGATURES, **_SPACES, 0x0A: " ", 0x0D: " "}
_LINES = {**_INLINE, 0x09: "\t", 0x0A: "\n", 0x0D: None}
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef]")
_LAST_WORD = re.compile(r"[^\W\d_]+$")
_FIRST_WORD = re.compile(r"^[^\W\d_]+")
#: Shorter words stand beside a hyphen by chance too often to say that both halves are words.
_SHORTEST_HALF = 3
#: A second half that begins like another word of the document is a word itself ("sleep-deprived", "deprivation").
_TELLING_TAIL = 5


def encodable(text: str) -> str:
    """Return ``text`` with surrogate pairs joined and lone surrogates replaced: JSON has no room for them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_line(text: str) -> str:
    """Return ``text`` as one line: no ligatures, controls or invisible characters, single spaces, NFC."""
    return " ".join(unicodedata.normalize("NFC", encodable(text).translate(_INLINE)).split())


def clean_lines(text: str) -> str:
    """Return ``text`` cleaned like a line, but with its line breaks, tabs and indentation."""
    text = encodable(text).replace("\r\n", "\n").replace("\r", "\n").translate(_LINES)
    return "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n")).strip("\n")


def join_lines(lines: Iterable[str], *, words: AbstractSet[str] = frozenset()) -> str:
    """Return lines as one, hyphenation undone; ``words`` are the document's, to tell "con-tain" from "well-known"."""
    joined = ""
    for line in lines:
        joined = _join(joined, line, words) if joined else line
    return joined


def _join(left: str, right: str, words: AbstractSet[str]) -> str:
    if not right:
        return left
    if left[-1] in HYPHENS and len(left) > 1 and left[-2].isalnum():
        return _unhyphenate(left, right, words)
    if _CJK.match(left[-1]) and _CJK.match(right[0]):
        return left + right
    return f"{left} {right}"


def _unhyphenate(left: str, right: str, words: AbstractSet[str]) -> str:
    head, tail = _LAST_WORD.search(left[:-1]), _FIRST_WORD.search(right)
    if head is None or tail is None or not right[0].islower():
        return left + right
    if left[-1] == SOFT_HYPHEN or not _is_compound(head[0].lower(), tail[0].lower(), words):
        return left[:-1] + right
    return left + right


def _is_compound(head: str, tail: str, words: AbstractSet[str]) -> bool:
    """Whether the hyphen belongs to the word, as far as the rest of the document tells."""
    if head + tail in words:
        return False
    if f"{head}-{tail}" in words:
        return True
    if len(tail) >= _TELLING_TAIL and head in words:
        return any(word.startswith(tail[:_TELLING_TAIL]) for word in words)
    return min(len(head), len(tail)) >= _SHORTEST_HALF and head in words and tail in words
