"""What a client may ask for, beside the document itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rma_service import options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PARTS = ("text", "pages", "outline", "tables", "metadata", "key_phrases", "summary")
DEFAULT_SENTENCES, MAX_SENTENCES = 5, 50
DEFAULT_PHRASES, MAX_PHRASES = 10, 100


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a request; ``pages`` count from 1, None means all of them."""

    summary_sentences: int = DEFAULT_SENTENCES
    key_phrases: int = DEFAULT_PHRASES
    pages: frozenset[int] | None = None
    include: frozenset[str] = frozenset(PARTS)
    filename: str | None = None


def parse(given: Mapping[str, object]) -> Options:
    """Return options from words (a query, a form) or JSON values; raises BadOptions, which names each that is wrong."""
    return options.parse(given, Options, _READERS)


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


_READERS: dict[str, Callable[[object], object]] = {
    "summary_sentences": options.number(0, MAX_SENTENCES),
    "key_phrases": options.number(0, MAX_PHRASES),
    "pages": options.pages,
    "include": _include,
    "filename": options.filename,
}
