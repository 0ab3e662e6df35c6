"""Tasks, attempts and seats: what dispatch keeps about work and about who can do it. Pure data with small rules."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Literal

from rma_core.models.channel import ACCEPT_WITHIN_S

if TYPE_CHECKING:
    from rma_core.models.worker import Fault

#: A lease lasts this long and is renewed by progress.
LEASE_S = 60.0

TaskState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
AttemptState = Literal["offered", "running", "succeeded", "failed", "returned", "lost", "cancelled"]
#: Faults that are charged to a worker and count against the task.
BLAMED: frozenset[str] = frozenset({"worker", "service"})


class Attempt:
    """The n-th try of a task, on one worker, under one lease."""

    __slots__ = (
        "broken_at",
        "ended_at",
        "lease_id",
        "lease_until",
        "number",
        "offered_at",
        "reason",
        "started_at",
        "state",
        "task",
        "worker_id",
    )

    def __init__(self, task: Task, number: int, worker_id: str, now: float) -> None:
        self.task = task
        self.number = number
        self.worker_id = worker_id
        self.lease_id = secrets.token_hex(16)
        self.offered_at = now
        self.started_at: float | None = None
        self.ended_at: float | None = None
        #: When the stream of its answer broke; the worker has a moment to say why.
        self.broken_at: float | None = None
        self.lease_until = now + ACCEPT_WITHIN_S
        self.state: AttemptState = "offered"
        self.reason = ""

    @property
    def open(self) -> bool:
        """Whether it may still speak for its task."""
        return self.state in ("offered", "running")

    def belongs(self, number: int, lease_id: str, worker_id: str) -> bool:
        """Say whether this is the open attempt that a worker names and proves with its lease."""
        same = self.open and self.number == number and self.worker_id == worker_id
        # compare_digest takes text in ASCII only, and a request may say anything.
        return same and lease_id.isascii() and secrets.compare_digest(self.lease_id, lease_id)


class Task:
    """One client request to a service. Times are monotonic seconds of the dispatcher's clock."""

    __slots__ = (
        "attempts",
        "body_bytes",
        "committed",
        "created_at",
        "deadline",
        "ended_at",
        "excluded",
        "fault",
        "headers",
        "http_status",
        "id",
        "key_id",
        "method",
        "path",
        "reasons",
        "service",
        "state",
        "usage",
    )

    def __init__(
        self,
        *,
        service: str,
        method: str,
        path: str,
        headers: tuple[tuple[str, str], ...],
        body_bytes: int,
        key_id: str,
        now: float,
        timeout_s: float,
    ) -> None:
        self.id = "task-" + "".join(secrets.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(20))
        self.service = service
        self.method = method
        self.path = path
        self.headers = headers
        self.body_bytes = body_bytes
        self.key_id = key_id
        self.created_at = now
        self.deadline = now + timeout_s
        self.state: TaskState = "queued"
        self.ended_at: float | None = None
        self.attempts: list[Attempt] = []
        self.excluded: set[str] = set()
        self.reasons: list[str] = []
        #: Whether any of an answer has gone to the client; from then on no other attempt can take over.
        self.committed = False
        self.http_status: int | None = None
        #: Whose fault the last failure was, as its worker said it.
        self.fault: Fault | None = None
        self.usage: dict[str, float] = {}

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt, if any."""
        return self.attempts[-1] if self.attempts else None

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in ("succeeded", "failed", "cancelled")


class Seat:
    """A worker as dispatch sees it: slots per service, what it runs, and whether it can be reached."""

    __slots__ = ("gone_at", "last_given", "quota", "reachable", "running", "slots", "usable", "worker_id")

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.slots: dict[str, int] = {}
        #: Slots it is given at most; halved by each failure, doubled by each success, never below one.
        self.quota: dict[str, int] = {}
        self.running: dict[str, Attempt] = {}
        self.reachable = False
        self.usable = False
        self.gone_at: float | None = None
        self.last_given = 0.0

    def room(self, service: str) -> int:
        """Return how many more attempts of a service it may be given now."""
        slots = self.slots.get(service, 0)
        busy = sum(1 for attempt in self.running.values() if attempt.task.service == service)
        return min(slots, self.quota.get(service, slots)) - busy

    def halve(self, service: str) -> None:
        """Give it less of a service for now."""
        self.quota[service] = max(1, self.quota.get(service, self.slots.get(service, 1)) // 2)

    def double(self, service: str) -> None:
        """Give it more of a service again, up to its slots."""
        slots = self.slots.get(service, 1)
        self.quota[service] = max(1, min(slots, self.quota.get(service, slots) * 2))
