"""What a client may ask for, beside the document itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from rma_notes.problems import BadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PARTS = ("text", "pages", "outline", "tables", "metadata", "key_phrases", "summary")
DEFAULT_SENTENCES, MAX_SENTENCES = 5, 50
DEFAULT_PHRASES, MAX_PHRASES = 10, 100
MAX_PAGE = 100_000
MAX_FILENAME = 255
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_NUMBER = re.compile(r"\d{1,9}")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a request; ``pages`` count from 1, None means all of them."""

    summary_sentences: int = DEFAULT_SENTENCES
    key_phrases: int = DEFAULT_PHRASES
    pages: frozenset[int] | None = None
    include: frozenset[str] = frozenset(PARTS)
    filename: str | None = None


def parse(given: Mapping[str, object]) -> Options:
    """Return options from words (a query, a form) or JSON values; raises BadOptions, which names each that is wrong."""
    values: dict[str, object] = {}
    errors: dict[str, str] = {}
    for name, value in given.items():
        reader = _READERS.get(name)
        try:
            if reader is None:
                raise ValueError(f"there is no such option; there are {', '.join(_READERS)}")
            values[name] = reader(value)
        except ValueError as error:
            errors[name[:MAX_FILENAME]] = str(error)
    if errors:
        raise BadOptions(errors)
    return msgspec.convert(values, Options)


def _number(highest: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = int(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= highest:
            raise ValueError(f"a whole number from 0 to {highest} is expected")
        return number

    return read


def _include(value: object) -> frozenset[str]:
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"names with commas between them are expected, of {', '.join(PARTS)}")
    names = {name.strip() for name in listed} - {""}
    if not names or names - set(PARTS):
        raise ValueError(
            f"{', '.join(sorted(names - set(PARTS))) or 'nothing'} is no part; there are {', '.join(PARTS)}"
        )
    return frozenset(names)


def _pages(value: object) -> frozenset[int]:
    words = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    pages: set[int] = set()
    for part in words.split(",") if isinstance(words, str) else [""]:
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= MAX_PAGE:
            raise ValueError(f"page numbers and ranges from 1 to {MAX_PAGE} are expected, like 1-3,7")
        pages.update(range(first, last + 1))
    return frozenset(pages)


def _filename(value: object) -> str | None:
    if not isinstance(value, str) or len(value) > MAX_FILENAME or not value.isprintable():
        raise ValueError(f"a name of up to {MAX_FILENAME} printable characters is expected")
    return re.split(r"[/\\]", value)[-1] or None


_READERS: dict[str, Callable[[object], object]] = {
    "summary_sentences": _number(MAX_SENTENCES),
    "key_phrases": _number(MAX_PHRASES),
    "pages": _pages,
    "include": _include,
    "filename": _filename,
}
