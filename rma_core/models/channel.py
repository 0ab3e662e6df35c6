"""The frames of the worker's channel: control as JSON, bytes as they are; several may share one message.

Down: TASK, BODY, CANCEL, ASSIGN, CREDIT. Up: HELLO, HEARTBEAT, ACCEPT, HEAD, DATA, PROGRESS, END, ERROR, CREDIT.
Every frame about an attempt carries its ``stream``, a number the coordinator chose, unique on that channel.
A text message is one control frame. A binary message is a row of records, each with a head of nine bytes (stream, kind,
length of what follows): DATA_PART and DATA_LAST are bytes of a BODY (down) or DATA (up), CONTROL is a control frame's
JSON. A message costs both sides more than a small frame in it, so what is ready to leave leaves together. Each
direction of a stream may have WINDOW_BYTES on the way that the receiver has not yet given back as CREDIT.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from rma_core.catalog import ServiceName
from rma_core.models.hardware import Name, Reason
from rma_core.models.strict import decode, encode
from rma_core.models.worker import (
    AttemptRef,
    Fault,
    Headers,
    Heartbeat,
    HeartbeatAnswer,
    TaskOffer,
    WorkerId,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Bytes of one stream and direction that may be on the way before the receiver gives CREDIT.
WINDOW_BYTES = 256 * 1024
#: A data frame is never larger, so that one stream cannot hold the channel for long.
MAX_DATA_BYTES = 32 * 1024
#: A control frame is never larger; a hardware report of a large machine is about 100 KiB.
MAX_CONTROL_BYTES = 1024 * 1024
#: A task not accepted within this goes back to the queue, blaming nobody.
ACCEPT_WITHIN_S = 5.0
#: A broken channel may come back within this and go on; then its attempts are lost.
RESUME_WITHIN_S = 10.0

Stream = Annotated[int, Meta(ge=1, le=2**32 - 1)]
#: Kinds of records: bytes of a stream, its last bytes, a control frame (of stream 0).
DATA_PART, DATA_LAST, CONTROL = range(3)
#: Small frames share a message up to about this many bytes.
BUNDLE_BYTES = 64 * 1024
_RECORD = struct.Struct("!IBI")


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """What all control frames share: a ``type``."""


class Hello(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="HELLO"):
    """Up, first: who speaks, the slots of each service, and the attempts still running after a broken channel."""

    worker_id: WorkerId
    agent_version: Annotated[str, Meta(max_length=100)] = ""
    slots: Annotated[dict[ServiceName, Annotated[int, Meta(ge=0, le=1024)]], Meta(max_length=64)] = {}
    attempts: Annotated[tuple[AttemptRef, ...], Meta(max_length=1024)] = ()


class Beat(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="HEARTBEAT"):
    """Up: a heartbeat; answered by ASSIGN."""

    beat: Heartbeat
    slots: Annotated[dict[ServiceName, Annotated[int, Meta(ge=0, le=1024)]], Meta(max_length=64)] = {}


class Task(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="TASK"):
    """Down: a task with its lease; its body follows as BODY frames unless the offer has a ``body_url``."""

    stream: Stream
    offer: TaskOffer


class Cancel(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="CANCEL"):
    """Down: stop this attempt; nobody wants its answer any more."""

    stream: Stream
    reason: Reason = ""


class Assign(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="ASSIGN"):
    """Down: the answer to a heartbeat, or a new desired state on its own."""

    answer: HeartbeatAnswer


class Credit(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="CREDIT"):
    """Both ways: the receiver has taken this many bytes of a stream; as many more may be sent."""

    stream: Stream
    bytes: Annotated[int, Meta(ge=1, le=2**31)]


class Accept(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="ACCEPT"):
    """Up: the attempt runs from now on, and its lease with it."""

    stream: Stream


class Head(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="HEAD"):
    """Up: status and headers of the answer."""

    stream: Stream
    status: Annotated[int, Meta(ge=100, le=599)]
    headers: Headers = ()


class Progress(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="PROGRESS"):
    """Up: the attempt lives although no bytes flow; renews its lease."""

    stream: Stream
    note: Reason = ""


class End(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="END"):
    """Up: the answer is whole. ``usage`` in the service's own units, ``timings`` in seconds."""

    stream: Stream
    usage: Annotated[dict[Name, float], Meta(max_length=32)] = {}
    timings: Annotated[dict[Name, float], Meta(max_length=32)] = {}


class Error(Frame, frozen=True, kw_only=True, omit_defaults=True, tag="ERROR"):
    """Up: the attempt ended without an answer; whose fault it was and why. ``owner`` gives the task back unblamed."""

    stream: Stream
    fault: Fault
    reason: Reason


Up = Hello | Beat | Accept | Head | Progress | End | Error | Credit
Down = Task | Cancel | Assign | Credit


def pack(frame: Frame) -> str:
    """Return a control frame as text, which is a message by itself."""
    return encode(frame).decode()


def unpack_up(text: str | bytes) -> Up:
    """Return a worker's control frame. Raises ValidationProblem."""
    return decode(text, Up, subject="channel frame")  # type: ignore[arg-type]


def unpack_down(text: str | bytes) -> Down:
    """Return a coordinator's control frame. Raises ValidationProblem."""
    return decode(text, Down, subject="channel frame")  # type: ignore[arg-type]


def pack_data(stream: int, data: bytes, *, end: bool = False) -> bytes:
    """Return bytes of a stream as the record that carries them; a record by itself is a message."""
    return _RECORD.pack(stream, DATA_LAST if end else DATA_PART, len(data)) + data


def bundle(frames: Sequence[str | bytes]) -> str | bytes:
    """Return the message that carries packed frames, control as `pack` gives it and records, in their order."""
    if len(frames) == 1:
        return frames[0]
    return b"".join([_control(frame) if isinstance(frame, str) else frame for frame in frames])


def _control(text: str) -> bytes:
    data = text.encode()
    return _RECORD.pack(0, CONTROL, len(data)) + data


def sole_piece(message: str | bytes) -> tuple[int, bytes] | None:
    """Return stream and bytes of a message that is one piece of an answer, but not its last; for others see `records`.

    Nearly all messages of a streamed answer are such.
    """
    if isinstance(message, str) or len(message) < _RECORD.size:
        return None
    stream, kind, length = _RECORD.unpack_from(message)
    whole = kind == DATA_PART and _RECORD.size + length == len(message)
    return (stream, message[_RECORD.size :]) if whole else None


def records(message: str | bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (stream, kind, bytes) of each record of a message. Raises ValueError for what is none."""
    if isinstance(message, str):
        yield 0, CONTROL, message.encode()
        return
    position, size = 0, len(message)
    while position < size:
        start = position + _RECORD.size
        if start > size:
            text = f"a record's head has {_RECORD.size} bytes, this one has {size - position}"
            raise ValueError(text)
        stream, kind, length = _RECORD.unpack_from(message, position)
        position = start + length
        if position > size or kind > CONTROL:
            text = f"no record of kind {kind} with {length} bytes is here: {size - start} bytes follow"
            raise ValueError(text)
        yield stream, kind, message[start:position]
