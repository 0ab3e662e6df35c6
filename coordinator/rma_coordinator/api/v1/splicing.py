"""The shortest way for the commonest event: a piece of text in the same wrapping as the one before it.

Engines write each event of an answer alike but for its text. Of one that was read and made right in full, what stands
before and after its text is kept, as it came and as it went. The next one that has the same before and after it, and
one JSON string between, can only mean the same with another text: it need be neither read nor written anew.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

_text: Callable[[bytes], str] = msgspec.json.Decoder(str).decode
#: A JSON string; of a long one most is passed over in one step.
STRING = re.compile(rb' *("[^"\\]*(?:\\.[^"\\]*)*")')
DATA, END, QUOTE = b"data: ", b"\n\n", b'"'
#: Bytes of a text: a longer one is no piece like others, and many are kept until they are counted.
MOST_TEXT = 1024
NONE = (b"", "")


class Wrapping:
    """What stands around the text of an engine's events, and of those that clients get for them."""

    __slots__ = ("_after", "_before", "_least", "_most", "_our_after", "_our_before", "_start", "_stop", "size")

    def __init__(self, theirs: tuple[bytes, bytes], ours: tuple[bytes, bytes]) -> None:
        # With the text's quotation marks: white space around it may be a line's end.
        self._before, self._after = DATA + theirs[0] + QUOTE, QUOTE + theirs[1] + END
        self._our_before, self._our_after = ours
        self._least = len(self._before) + len(self._after)
        self._most = self._least + MOST_TEXT
        self._start, self._stop = len(self._before) - 1, 1 - len(self._after)
        #: Bytes of what clients get around the text, with its quotation marks.
        self.size = len(ours[0]) + len(ours[1]) + 2

    @classmethod
    def of(cls, payload: bytes, event: bytes, name: bytes) -> Wrapping | None:
        """Return the wrapping of an event's data and of what the client got for it; the text is a member ``name``."""
        theirs, ours = _around(payload, name), _around(event, name)
        return cls(theirs, ours) if theirs and ours else None

    def take(self, data: bytes) -> tuple[bytes, str]:
        """Return what the client gets for an event, and the text in it.

        Nothing for one that is not wrapped like this, and for a long one.
        """
        if not self._least < len(data) <= self._most or not (
            data.startswith(self._before) and data.endswith(self._after)
        ):
            return NONE
        middle = data[self._start : self._stop]
        try:
            # Anything but exactly one string is something else in the same wrapping, and half a character is none.
            return self._our_before + middle + self._our_after, _text(middle)
        except (msgspec.DecodeError, UnicodeError):
            return NONE


def _around(data: bytes, name: bytes) -> tuple[bytes, bytes] | None:
    """Return what stands before and after the one string that is a member of that name; nothing without such a one."""
    mark = b'"%s":' % name
    # Within a string its quotation marks would be escaped: this is the member itself, or one further inside.
    if data.count(mark) != 1:
        return None
    start = data.index(mark) + len(mark)
    found = STRING.match(data, start)
    return (data[: found.start(1)], data[found.end(1) :]) if found else None
