"""Workers' lasting records, and how thousands of them are held in little memory: pressed, with a brief beside.

A record is 10 KB as objects and 200 to 400 bytes pressed. What is looked at all the time stands in the brief, whose
parts are shared between workers that have the same.
"""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from rma_core.models.hardware import HardwareReport
from rma_core.models.worker import Assignment, PluginReport, RuntimeReport

if TYPE_CHECKING:
    from collections.abc import Hashable

H = TypeVar("H", bound="Hashable")

#: Values that are kept once for all workers that have them, of each kind.
SHARED = 4096
#: How far back zlib can refer.
WINDOW_BYTES = 32_000
#: A record that stays larger than this part of itself is unlike those that the press knows.
FAMILIAR = 0.15
#: The level of zlib beyond which records get hardly smaller.
LEVEL = 6


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


class Brief(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What of a record is looked at with every heartbeat and in every round through all workers."""

    tier: int | None
    tier_reason: str
    assignment: tuple[Assignment, ...]
    generation: int
    epoch: int
    disabled: bool
    owner: str
    last_seen_at: float
    away: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(WorkerRecord).decode
_decode_assignments = msgspec.msgpack.Decoder(tuple[Assignment, ...]).decode


def brief(record: WorkerRecord) -> Brief:
    """Return what is looked at all the time."""
    return Brief(
        tier=record.tier,
        tier_reason=same(record.tier_reason),
        assignment=_assignments(_encode(record.assignment)),
        generation=record.generation,
        epoch=record.epoch,
        disabled=record.disabled,
        owner=same(record.owner),
        last_seen_at=record.last_seen_at,
        away=record.away,
    )


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
        data = _encode(record)
        pressed = self._press(data)
        known = len(pressed) <= len(data) * FAMILIAR
        return pressed if known or not self._learn(data) else self._press(data)

    def open(self, pressed: bytes) -> WorkerRecord:
        """Return a record that was pressed."""
        opening = zlib.decompressobj(zdict=self._dictionaries[pressed[0]])
        return _decode(opening.decompress(pressed[1:]) + opening.flush())

    def _press(self, data: bytes) -> bytes:
        pressing = zlib.compressobj(LEVEL, zdict=self._dictionaries[-1])
        return bytes([len(self._dictionaries) - 1]) + pressing.compress(data) + pressing.flush()

    def _learn(self, data: bytes) -> bool:
        """Add a sample while there is room; say whether that made a new dictionary."""
        if len(self._samples) >= WINDOW_BYTES:
            return False
        self._samples = (self._samples + data)[-WINDOW_BYTES:]
        if len(self._samples) < min(WINDOW_BYTES, 2 * len(self._dictionaries[-1])):
            return False
        self._dictionaries.append(self._samples)
        return True


def same(value: H) -> H:
    """Return equal values as the same object."""
    return cast("H", _same(value))


@functools.lru_cache(SHARED)
def _same(value: Hashable) -> Hashable:
    return value


@functools.lru_cache(SHARED)
def _assignments(data: bytes) -> tuple[Assignment, ...]:
    return _decode_assignments(data)
