"""Workers' lasting records, and how thousands of them are held in little memory: pressed, with a brief beside.

A record is 10 KB as objects and 150 to 400 bytes pressed. What is looked at all the time stands in the brief, which is
shared between workers that have the same.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import zlib
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from rma_core.models.hardware import HardwareReport
from rma_core.models.worker import Assignment, PluginReport, RuntimeReport

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

H = TypeVar("H", bound="Hashable")

#: Values that are kept once for all workers that have them, of each kind.
SHARED = 4096
#: How far back zlib can refer.
WINDOW_BYTES = 32_000
#: A record that stays larger than this part of itself is unlike those that the press knows.
FAMILIAR = 0.15
#: The level of zlib beyond which records get hardly smaller, and its form without a frame of its own: what is kept in
#: memory needs no checksum.
LEVEL, FRAMELESS = 6, -15
#: Bytes of a device key, and the mark of a record whose key stands before it: its id and thumbprint follow from that.
KEY_BYTES, KEYED = 32, 0x80


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What of a worker survives the coordinator. Times are Unix seconds."""

    worker_id: str
    thumbprint: str
    public_key: str
    registered_at: float
    report: HardwareReport
    agent_version: str = ""
    services: tuple[str, ...] | None = None
    agreed_models: tuple[str, ...] | None = None
    own_models: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    runtimes: tuple[RuntimeReport, ...] = ()
    plugins: tuple[PluginReport, ...] = ()
    tier: int | None = None
    tier_reason: str = ""
    #: Services that its policy would have it run before others.
    prefers: tuple[str, ...] = ()
    assignment: tuple[Assignment, ...] = ()
    placement: dict[str, str] = {}
    generation: int = 0
    epoch: int = 0
    disabled: bool = False
    #: Whose machine it is, where somebody's requests come first on it.
    owner: str = ""
    last_seen_at: float = 0.0
    #: Why it was offline when this was written; empty when it was not.
    away: str = ""


def differs(was: WorkerRecord, now: WorkerRecord) -> bool:
    """Say whether a policy wants other services of a worker than before, so that they are chosen anew."""
    return (was.tier, was.prefers) != (now.tier, now.prefers)


class Brief(msgspec.Struct, frozen=True, gc=False):
    """What of a record is looked at with every heartbeat and in every round through all workers."""

    tier: int | None
    tier_reason: str
    prefers: tuple[str, ...]
    assignment: tuple[Assignment, ...]
    generation: int
    epoch: int
    disabled: bool
    owner: str
    away: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(WorkerRecord).decode
_decode_assignments = msgspec.msgpack.Decoder(tuple[Assignment, ...]).decode


def brief(record: WorkerRecord) -> Brief:
    """Return what is looked at all the time; the same object for workers that have the same."""
    assignment, away = _encode(record.assignment), record.away
    tier = (record.tier, record.tier_reason, record.prefers)
    return _brief((*tier, assignment, record.generation, record.epoch, record.disabled, record.owner, away))


@functools.lru_cache(SHARED)
def _brief(facts: tuple[int | None, str, tuple[str, ...], bytes, int, int, bool, str, str]) -> Brief:
    tier, reason, prefers, assignment, generation, epoch, disabled, owner, away = facts
    return Brief(
        tier, same(reason), same(prefers), _assignments(assignment), generation, epoch, disabled, same(owner), away
    )


def thumbprint_of(key: bytes) -> str:
    """Return the identity of a device key: its SHA-256, hex."""
    return hashlib.sha256(key).hexdigest()


def ids_of(thumbprint: str) -> Iterator[str]:
    """Yield the ids that the worker with a key of this thumbprint may have, the usual one first."""
    return (f"worker-{thumbprint[start : start + 8]}" for start in range(len(thumbprint) - 8))


class Press:
    """Holds records in little memory: each is written with reference to a few others that are unlike one another.

    Such samples are gathered up to WINDOW_BYTES. Each time they have doubled they become a new dictionary; the older
    ones, which together are hardly larger, stay for what was written with them.
    """

    def __init__(self) -> None:
        self._samples = b""
        self._dictionaries = [b""]

    def press(self, record: WorkerRecord) -> bytes:
        """Return a record for `open` of this press."""
        key = _own_key(record)
        # What is random cannot be pressed, and most of that follows from the key.
        data = _encode(msgspec.structs.replace(record, **NAMELESS) if key else record)
        pressed = self._press(data, key)
        known = len(pressed) <= len(data) * FAMILIAR
        return pressed if known or not self._learn(data) else self._press(data, key)

    def open(self, pressed: bytes) -> WorkerRecord:
        """Return a record that was pressed."""
        keyed, number = pressed[0] & KEYED, pressed[0] & ~KEYED
        start = 1 + (KEY_BYTES if keyed else 0)
        opening = zlib.decompressobj(FRAMELESS, self._dictionaries[number])
        record = _decode(opening.decompress(pressed[start:]) + opening.flush())
        return msgspec.structs.replace(record, **_names(pressed[1:start])) if keyed else record

    def _press(self, data: bytes, key: bytes) -> bytes:
        pressing = zlib.compressobj(LEVEL, zlib.DEFLATED, FRAMELESS, zdict=self._dictionaries[-1])
        mark = (len(self._dictionaries) - 1) | (KEYED if key else 0)
        return b"".join([bytes([mark]), key, pressing.compress(data), pressing.flush()])

    def _learn(self, data: bytes) -> bool:
        """Add a sample while there is room; say whether that made a new dictionary."""
        if len(self._samples) >= WINDOW_BYTES:
            return False
        self._samples = (self._samples + data)[-WINDOW_BYTES:]
        if len(self._samples) < min(WINDOW_BYTES, 2 * len(self._dictionaries[-1])):
            return False
        self._dictionaries.append(self._samples)
        return True


#: What is left out of a record whose key is known, and what stands there instead.
NAMELESS = {"worker_id": "", "thumbprint": "", "public_key": ""}


def _names(key: bytes) -> dict[str, str]:
    """Return what follows from a device key."""
    thumbprint = thumbprint_of(key)
    text = base64.urlsafe_b64encode(key).rstrip(b"=").decode()
    return {"worker_id": next(ids_of(thumbprint)), "thumbprint": thumbprint, "public_key": text}


def _own_key(record: WorkerRecord) -> bytes:
    """Return the key from which a record's names follow; nothing where they do not."""
    try:
        key = base64.b64decode(f"{record.public_key}=", altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return b""
    names = (record.worker_id, record.thumbprint, record.public_key)
    return key if len(key) == KEY_BYTES and names == tuple(_names(key).values()) else b""


def same(value: H) -> H:
    """Return equal values as the same object."""
    return cast("H", _same(value))


@functools.lru_cache(SHARED)
def _same(value: Hashable) -> Hashable:
    return value


@functools.lru_cache(SHARED)
def _assignments(data: bytes) -> tuple[Assignment, ...]:
    return _decode_assignments(data)
