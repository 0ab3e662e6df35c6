"""Random bytes that nobody can foresee, fetched from the system a page at a time: a call for each name costs more.

They are used once and in order. A process that forks begins with bytes of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes that are fetched at once.
PAGE_BYTES = 4096
DIGITS = b"0123456789abcdefghijklmnopqrstuvwxyz"
#: The largest number of bytes' values that all digits share evenly; those beyond are left out.
_EVEN = 256 // len(DIGITS) * len(DIGITS)
_TO_DIGITS = bytes(DIGITS[value % len(DIGITS)] for value in range(256))
_LEFT_OUT = bytes(range(_EVEN, 256))


class Source:
    """Hands out what ``fetch`` gives, which takes a number of bytes."""

    def __init__(self, fetch: Callable[[int], bytes] = os.urandom) -> None:
        self._fetch = fetch
        self._page, self._at = b"", 0

    def take(self, count: int) -> bytes:
        """Return so many bytes, at most a page."""
        at = self._at + count
        if at > len(self._page):
            self._page, at = self._fetch(PAGE_BYTES), count
        self._at = at
        return self._page[at - count : at]

    def hex(self, count: int) -> str:
        """Return so many bytes as hexadecimal digits, two for each."""
        return self.take(count).hex()

    def digits(self, count: int) -> str:
        """Return so many digits out of 36, each as likely as any other."""
        found = b""
        while len(found) < count:
            found += self.take(2 * count).translate(_TO_DIGITS, _LEFT_OUT)
        return found[:count].decode()

    def forget(self) -> None:
        """Begin with a new page."""
        self._page, self._at = b"", 0


source = Source()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=source.forget)
