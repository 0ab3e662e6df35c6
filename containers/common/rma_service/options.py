"""Options of a request: words of a query or a form, or JSON values, read one by one and refused together."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rma_service.problems import BadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
MAX_PAGE = 100_000
MAX_FILENAME = 255
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_NUMBER = re.compile(r"\d{1,9}")


def parse(given: Mapping[str, object], into: type[T], readers: Mapping[str, Callable[[object], object]]) -> T:
    """Return the options as a record; raises BadOptions, which names each one that is wrong.

    A reader takes one option's value and raises ValueError with the sentence for the client.
    """
    values: dict[str, object] = {}
    errors: dict[str, str] = {}
    for name, value in given.items():
        reader = readers.get(name)
        try:
            if reader is None:
                raise ValueError(f"there is no such option; there are {', '.join(readers)}")
            values[name] = reader(value)
        except ValueError as error:
            errors[name[:MAX_FILENAME]] = str(error)
    if errors:
        raise BadOptions(errors)
    return msgspec.convert(values, into)


def number(lowest: int, highest: int) -> Callable[[object], int]:
    """Return a reader of whole numbers within bounds."""

    def read(value: object) -> int:
        found = int(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value
        if not isinstance(found, int) or isinstance(found, bool) or not lowest <= found <= highest:
            raise ValueError(f"a whole number from {lowest} to {highest} is expected")
        return found

    return read


def pages(value: object) -> frozenset[int]:
    """Read page numbers and ranges, like ``1-3,7``."""
    words = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    found: set[int] = set()
    for part in words.split(",") if isinstance(words, str) else [""]:
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= MAX_PAGE:
            raise ValueError(f"page numbers and ranges from 1 to {MAX_PAGE} are expected, like 1-3,7")
        found.update(range(first, last + 1))
    return frozenset(found)


def filename(value: object) -> str | None:
    """Read a file's name, of which the last part counts."""
    if not isinstance(value, str) or len(value) > MAX_FILENAME or not value.isprintable():
        raise ValueError(f"a name of up to {MAX_FILENAME} printable characters is expected")
    return re.split(r"[/\\]", value)[-1] or None


def filename_of(given: Mapping[str, object], sent: str = "") -> str | None:
    """Return the option ``filename``, else the name the file was sent with; one that does not fit is none.

    An option that does not fit is refused with all the others, see `parse`.
    """
    for value in (given.get("filename"), sent[-MAX_FILENAME:]):
        with contextlib.suppress(ValueError):
            if found := filename(value):
                return found
    return None
