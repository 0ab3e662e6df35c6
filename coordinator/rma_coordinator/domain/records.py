"""What of tasks is kept on disk: durable tasks, their bodies and results, idempotency keys, the ledger.

Times are Unix seconds, for they must mean something to the next process.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

from rma_coordinator.domain.tasks import AttemptState, Priority, TaskState
from rma_core.models.worker import Fault, Headers


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt as it was when its task was written."""

    number: int
    worker_id: str
    lease_id: str
    state: AttemptState
    reason: str = ""
    offered_at: float = 0.0
    #: 0 for what has not happened.
    started_at: float = 0.0
    first_byte_at: float = 0.0
    ended_at: float = 0.0
    answer_bytes: int = 0
    model_state: str = ""


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A durable task; ``epoch`` counts the coordinator's starts, so that attempts' numbers never come twice."""

    task_id: str
    service: str
    method: str
    path: str
    headers: Headers
    key_id: str
    created_at: float
    timeout_s: float
    epoch: int
    model: str = ""
    body_bytes: int = 0
    first_byte_s: float | None = None
    gap_s: float = 60.0
    priority: Priority = "normal"
    state: TaskState = "queued"
    ended_at: float | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    reasons: tuple[str, ...] = ()
    fault: Fault | None = None
    http_status: int | None = None
    answer_bytes: int = 0
    #: Whether its time had run out when it ended.
    late: bool = False
    usage: dict[str, float] = {}
    #: Where its end is to be told, where that is wanted.
    webhook: str = ""
    #: On whose machine it comes first, if on anybody's.
    owner: str = ""
    #: Key of its idempotency record, which ends with it.
    idempotency: str = ""


class TaskBody(msgspec.Struct, frozen=True, kw_only=True):
    """A small request body; a large one is in a file of the task's name."""

    task_id: str
    data: bytes


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a durable task; ``data`` of ``None`` means that it is in a file."""

    task_id: str
    status: Annotated[int, Meta(ge=200, le=599)]
    headers: Headers
    size: int
    data: bytes | None = None


class IdempotencyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was made under an Idempotency-Key: what it was, and its task."""

    key: str
    fingerprint: str
    task_id: str


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One finished task and who did it, counted by the coordinator; at most one for each task."""

    task_id: str
    worker_id: str
    attempt: int
    service: str
    ended_at: float
    seconds: float
    bytes_in: int
    bytes_out: int


class LedgerPage(msgspec.Struct, frozen=True, kw_only=True):
    """Entries of tasks that were answered at once, written together; ``key`` is the first one's task."""

    key: str
    entries: tuple[LedgerEntry, ...]


class LedgerTotal(msgspec.Struct, frozen=True, kw_only=True):
    """What older entries of one worker and service came to."""

    worker_id: str
    service: str
    tasks: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def key(self) -> str:
        """Its key in the store."""
        return f"{self.worker_id}/{self.service}"

    def plus(self, entry: LedgerEntry) -> LedgerTotal:
        """Return the total with one more entry in it."""
        return msgspec.structs.replace(
            self,
            tasks=self.tasks + 1,
            seconds=self.seconds + entry.seconds,
            bytes_in=self.bytes_in + entry.bytes_in,
            bytes_out=self.bytes_out + entry.bytes_out,
        )


def idempotency_key(*, key_id: str, method: str, path: str, key: str) -> str:
    """Return under what a request with an Idempotency-Key is found: one client's keys are none of another's."""
    return hashlib.sha256(f"{key_id}\0{method}\0{path}\0{key}".encode()).hexdigest()
