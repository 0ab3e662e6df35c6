"""WebSocket's frames as a server reads and writes them (RFC 6455, 5 to 7): bytes in, messages out; no extensions.

A library's cost more than all else that the coordinator does with a message of the channel.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias

try:
    from websockets.speedups import apply_mask
except ImportError:  # where nobody compiled it
    from websockets.utils import apply_mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
#: Bits of a frame's first byte, and of its second.
FIN, RESERVED, KIND = 0x80, 0x70, 0x0F
MASKED, LENGTH = 0x80, 0x7F
#: The first byte of a whole message of bytes.
WHOLE = FIN | BINARY
#: The longest payload whose length stands in the second byte, all that a control frame may have; what stands there for
#: a length in two bytes that follow; the longest of those.
SHORT, IN_TWO, MEDIUM = 125, 126, 0xFFFF
MASK_BYTES = 4
#: Why a connection ends (7.4.1): as it should, because somebody leaves, against the rules, without a reason, as nobody
#: announced, with text that is none, with a message that is too long, by a fault of ours.
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_STATUS, ABNORMAL = 1000, 1001, 1002, 1005, 1006
BAD_TEXT, TOO_LONG, FAILED = 1007, 1009, 1011
#: Reasons that somebody may give: those that are registered, and those of libraries and applications.
REGISTERED, NEVER_SENT, FREE = range(1000, 1015), frozenset({1004, NO_STATUS, ABNORMAL}), range(3000, 5000)
_CODE = struct.Struct("!H")


class Ping(NamedTuple):
    """The other side wants to have this said back."""

    payload: bytes


class End(NamedTuple):
    """The other side closes the connection, or broke the rules; ``answer`` is the payload of the last frame to it."""

    code: int
    answer: bytes


Found: TypeAlias = str | bytes | Ping | End


class _BrokenError(Exception):
    """What came is against the rules; ``code`` is what the other side is told."""

    def __init__(self, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(code)
        self.code = code


class Frames:
    """Bytes of a client in, and out of them its messages of at most ``most`` bytes, its pings, and its end.

    The ``first`` message may have so many bytes, where that is another number.
    """

    def __init__(self, most: int, *, first: int | None = None) -> None:
        self._most = most
        #: The most of the message that comes next.
        self._limit = most if first is None else first
        #: The beginning of a frame that is not whole.
        self._unread = bytearray()
        #: What is there of a message in several frames, and its kind; ``None`` while there is no such message.
        self._parts = bytearray()
        self._kind: int | None = None
        self._over = False

    def feed(self, data: bytes) -> list[Found]:
        """Return what is whole now; nothing comes behind an `End`."""
        found: list[Found] = []
        if self._over:
            return found
        if self._unread:
            self._unread += data
        try:
            read = self._read(self._unread or data, found)
        except _BrokenError as broken:
            self._over = True
            found.append(End(broken.code, _CODE.pack(broken.code)))
        else:
            if self._unread:
                del self._unread[:read]
            elif read < len(data):
                self._unread += data[read:]
        return found

    def _read(self, data: bytes | bytearray, found: list[Found]) -> int:
        """Read the frames that are whole, and return where the first one begins that is not. Raises _BrokenError."""
        at, size = 0, len(data)
        while size - at > 1 and not self._over:
            first, second = data[at], data[at + 1]
            length, start = second & LENGTH, at + 2
            if first & RESERVED or not second & MASKED:
                raise _BrokenError
            if length > SHORT:
                least, start = (SHORT, at + 4) if length == IN_TWO else (MEDIUM, at + 10)
                if start > size:
                    break
                length = int.from_bytes(data[at + 2 : start])
                if length <= least:
                    raise _BrokenError
            # Nearly all that comes is that, and goes the shortest way.
            whole = first == WHOLE and self._kind is None
            if not whole:
                self._check(first, length)
            elif length > self._limit:
                raise _BrokenError(TOO_LONG)
            start += MASK_BYTES
            end = start + length
            if end > size:
                break
            payload = apply_mask(data[start:end], data[start - MASK_BYTES : start])
            if whole:
                self._limit = self._most
                found.append(payload)
            else:
                self._take(first, payload, found)
            at = end
        return at

    def _check(self, first: int, length: int) -> None:
        """Look at a frame before all of it is here. Raises _BrokenError."""
        kind = first & KIND
        if kind >= CLOSE:
            if kind > PONG or length > SHORT or not first & FIN:
                raise _BrokenError
        elif kind > BINARY or (kind == CONTINUATION) is (self._kind is None):
            raise _BrokenError
        elif length + len(self._parts) > self._limit:
            raise _BrokenError(TOO_LONG)

    def _take(self, first: int, payload: bytes, found: list[Found]) -> None:
        kind = first & KIND
        if kind == PING:
            found.append(Ping(payload))
        elif kind == CLOSE:
            self._over = True
            found.append(_end(payload))
        elif kind != PONG:
            kind = self._kind or kind
            if not first & FIN:
                self._kind = kind
                self._parts += payload
                return
            if self._kind is not None:
                payload, self._parts, self._kind = bytes(self._parts + payload), bytearray(), None
            self._limit = self._most
            found.append(_text(payload) if kind == TEXT else payload)


def frame(kind: int, payload: bytes) -> bytes:
    """Return a whole message, or what controls the connection, in one frame."""
    size = len(payload)
    if size <= SHORT:
        return bytes((FIN | kind, size)) + payload
    if size <= MEDIUM:
        return struct.pack("!BBH", FIN | kind, IN_TWO, size) + payload
    return struct.pack("!BBQ", FIN | kind, IN_TWO + 1, size) + payload


def closing(code: int, reason: str = "") -> bytes:
    """Return the last frame."""
    # A character that is cut is left out.
    said = reason.encode()[: SHORT - _CODE.size].decode(errors="ignore").encode()
    return frame(CLOSE, _CODE.pack(code) + said)


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise _BrokenError(BAD_TEXT) from None


def _end(payload: bytes) -> End:
    """Return what a closing frame says. Raises _BrokenError."""
    if not payload:
        return End(NO_STATUS, b"")
    code = int.from_bytes(payload[: _CODE.size])
    if len(payload) < _CODE.size or (code not in FREE and (code not in REGISTERED or code in NEVER_SENT)):
        raise _BrokenError
    _text(payload[_CODE.size :])
    return End(code, payload[: _CODE.size])
