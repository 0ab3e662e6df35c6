"""Heartbeats by HTTP, the hottest call there is: containers written as in the one before are not decoded again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec

from rma_coordinator.api.asgi import json_head
from rma_core.models.strict import decode, encode
from rma_core.models.worker import Heartbeat, HeartbeatAnswer

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Message
    from rma_coordinator.domain.fleet import Worker


#: A parked worker calls again only in half a minute: its connection would cost as much as the channel that it spares.
LAST_CALL = {"connection": "close"}
#: Answers that are kept as they are sent: machines of the same kind to which nothing new is said get the same one.
ANSWERS = 256


class _Beat(Heartbeat, frozen=True, kw_only=True, gc=False):
    """A heartbeat whose containers, which are most of it and seldom change, are left as they were written."""

    #: Whether it is an id at all is looked at only when it is not the one of the worker that beats.
    worker_id: str
    containers: msgspec.Raw = msgspec.Raw(b"[]")  # type: ignore[assignment]  # it never leaves this module


_beats = msgspec.json.Decoder(_Beat)


def read_beat(data: bytes, worker: Worker) -> Heartbeat:
    """Return the heartbeat of a worker. Raises ValidationProblem."""
    quick: _Beat | None
    try:
        quick = _beats.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        # The whole decoding says what is wrong with it.
        quick = None
    # Only a hash is kept, for there are many workers; one that made its own collide would deceive nobody else.
    digest = hash(bytes(quick.containers)) if quick is not None else 0
    if quick is not None and digest == worker.written and quick.worker_id == worker.id:
        # Nobody else has it yet; another one with these containers would cost as much as reading this.
        msgspec.structs.force_setattr(quick, "containers", worker.containers)
        return quick
    found = decode(data, Heartbeat, subject="heartbeat")
    if found.containers == worker.containers:
        worker.written = digest
    return found


@functools.lru_cache(ANSWERS)
def nothing_new(  # noqa: PLR0917 - keys of the cache
    interval_s: float,
    generation: int,
    tier: int | None,
    tier_reason: str,
    connect: bool,  # noqa: FBT001 - a key
    process: str,
) -> tuple[Message, Message]:
    """Return the answer that says only what the worker knows, as the two messages of ASGI; not to be changed."""
    said = HeartbeatAnswer(
        heartbeat_interval_s=interval_s,
        generation=generation,
        tier=tier,
        tier_reason=tier_reason,
        connect=connect,
        process=process,
    )
    body = encode(said)
    more = [] if connect else [(name.encode(), value.encode()) for name, value in LAST_CALL.items()]
    return json_head(len(body), more=more), {"type": "http.response.body", "body": body, "more_body": False}
