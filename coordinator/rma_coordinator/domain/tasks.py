"""Tasks, attempts and seats: what dispatch keeps about work and about who can do it. Pure data with small rules."""

from __future__ import annotations

import secrets
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from rma_coordinator.domain import unguessable
from rma_coordinator.domain.speeds import NO_WORK
from rma_core.models.channel import ACCEPT_WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rma_coordinator.domain.affinity import Favourite, Prefix
    from rma_coordinator.domain.speeds import Expected
    from rma_core.models.worker import Fault

#: Digits of a task's id.
ID_LENGTH = 20
#: A lease lasts this long and is renewed by progress.
LEASE_S = 60.0

TaskState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
#: Classes of work, the most urgent first.
Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
AttemptState = Literal["offered", "running", "succeeded", "failed", "returned", "lost", "cancelled"]
#: Faults that are charged to a worker and count against the task.
BLAMED: frozenset[str] = frozenset({"worker", "service"})


class Promise(NamedTuple):
    """A task's place at a busy worker that will have it done sooner than any that is free."""

    worker_id: str
    until: float


class Attempt:
    """The n-th try of a task, on one worker, under one lease."""

    __slots__ = (
        "answer_bytes",
        "beside",
        "broken_at",
        "delivered",
        "ended_at",
        "expected",
        "first_byte_at",
        "first_byte_s",
        "held_s",
        "lease_id",
        "lease_s",
        "lease_until",
        "model_state",
        "number",
        "offered_at",
        "reason",
        "restored",
        "started_at",
        "state",
        "task",
        "worker_id",
    )

    def __init__(self, task: Task, number: int, worker_id: str, now: float, *, lease_id: str = "") -> None:
        self.task = task
        self.number = number
        self.worker_id = worker_id
        self.lease_id = lease_id or unguessable.source.hex(16)
        self.offered_at = now
        #: How many others its worker had of its service when it was given, and what it was expected to take there.
        self.beside = 0
        self.expected: Expected | None = None
        #: How long the service may take to its first byte here; ``None``: all the time there is.
        self.first_byte_s: float | None = task.first_byte_s
        self.started_at: float | None = None
        #: When its answer began, and how many bytes of one have come.
        self.first_byte_at: float | None = None
        self.answer_bytes = 0
        #: How long its worker could send no more of the answer, in seconds, since its client did not take it.
        self.held_s = 0.0
        self.ended_at: float | None = None
        #: What its worker said of the task's model when it began: loaded, loading or cold; empty where it has none.
        self.model_state = ""
        #: When the stream of its answer broke; the worker has a moment to say why.
        self.broken_at: float | None = None
        #: How long its claim lasts without progress, as its worker is told.
        self.lease_s = LEASE_S
        self.lease_until = now + ACCEPT_WITHIN_S
        self.state: AttemptState = "offered"
        self.reason = ""
        #: The whole answer is here; nothing that happens to its worker now can harm it.
        self.delivered = False
        #: It was given before the coordinator's last start, and its worker has not confirmed it yet.
        self.restored = False

    @property
    def open(self) -> bool:
        """Whether it may still speak for its task."""
        return self.state in ("offered", "running")

    def belongs(self, number: int, lease_id: str, worker_id: str) -> bool:
        """Say whether this is the attempt that a worker names and proves with its lease."""
        same = self.number == number and self.worker_id == worker_id
        # compare_digest takes text in ASCII only, and a request may say anything.
        return same and lease_id.isascii() and secrets.compare_digest(self.lease_id, lease_id)


class Task:
    """One client request to a service. Times are monotonic seconds of the dispatcher's clock.

    A ``durable`` task was acknowledged before it ran: it outlives its client, and its end is on disk before anyone is
    told. ``base`` is where its attempts' numbers begin: higher after each restart, so that they only ever grow.
    """

    __slots__ = (
        "answer_bytes",
        "attempts",
        "base",
        "body_bytes",
        "closing",
        "committed",
        "created_at",
        "deadline",
        "durable",
        "ended_at",
        "excluded",
        "fault",
        "favourite",
        "first_byte_s",
        "gap_s",
        "headers",
        "holder",
        "http_status",
        "id",
        "key_id",
        "lane",
        "method",
        "model",
        "owner",
        "passed_over",
        "path",
        "patience",
        "prefixes",
        "priority",
        "promise",
        "reasons",
        "service",
        "state",
        "streamed",
        "usage",
        "webhook",
        "work",
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
        model: str = "",
        task_id: str = "",
        durable: bool = False,
        base: int = 0,
        first_byte_s: float | None = None,
        gap_s: float = LEASE_S,
        priority: Priority = "normal",
        webhook: str = "",
        owner: str = "",
    ) -> None:
        self.id = task_id or new_task_id()
        self.service = service
        #: Which of the service's models answers; empty where it has none.
        self.model = model
        #: What it waits for: a place at the service, with the model.
        self.lane = f"{service} {model}" if model else service
        self.method = method
        self.path = path
        self.headers = headers
        self.body_bytes = body_bytes
        self.key_id = key_id
        self.priority: Priority = priority
        #: Where its end is to be told, where that is wanted.
        self.webhook = webhook
        #: Beginnings of its conversation, the longest first, where it is one.
        self.prefixes: tuple[Prefix, ...] = ()
        #: The worker that has such a beginning in its cache, looked up when the task came.
        self.favourite: Favourite | None = None
        #: What it is likely to be; nothing where it has no such measure.
        self.work = NO_WORK
        #: Whether its answer begins before it is whole, so that its first byte comes early.
        self.streamed = False
        #: Whose machine it would rather run on, and be first there; empty: anyone's.
        self.owner = owner
        #: How often a worker that came free took a later one of the same key.
        self.passed_over = 0
        #: The busy worker that it waits for although others are free, if any, and how often it may do so.
        self.promise: Promise | None = None
        self.patience = 1
        self.created_at = now
        self.deadline = now + timeout_s
        self.durable = durable
        self.base = base
        #: How long the service may take to its first byte (``None``: all the time there is), and between two.
        self.first_byte_s = first_byte_s
        self.gap_s = gap_s
        self.state: TaskState = "queued"
        self.ended_at: float | None = None
        self.attempts: list[Attempt] = []
        #: The attempt that speaks for the task: the newest, unless an earlier one has delivered after all.
        self.holder: Attempt | None = None
        self.excluded: set[str] = set()
        self.reasons: list[str] = []
        #: Whether any of an answer has gone to the client; from then on no other attempt can take over.
        self.committed = False
        #: The end that a durable task has come to, while that is being written down.
        self.closing: TaskState | None = None
        self.http_status: int | None = None
        self.answer_bytes = 0
        #: Whose fault the last failure was, as its worker said it.
        self.fault: Fault | None = None
        self.usage: dict[str, float] = {}

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that speaks for the task, if any."""
        return self.holder

    @property
    def next_number(self) -> int:
        """The number of its next attempt."""
        return max(self.base, max((attempt.number for attempt in self.attempts), default=0)) + 1

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in ("succeeded", "failed", "cancelled")

    @property
    def late(self) -> bool:
        """Whether its time has run out before it ended."""
        return self.ended_at is not None and self.ended_at >= self.deadline

    @property
    def undecided(self) -> bool:
        """Whether another attempt's answer could still become its end: none is known, and none is on its way out."""
        return not self.final and self.closing is None and not self.committed


def new_task_id() -> str:
    """Return an id that nobody can guess."""
    return f"task-{unguessable.source.digits(ID_LENGTH)}"


#: What a worker's quota is until it fails: shared, for there are many workers, and so never changed in place.
NO_QUOTA: Mapping[str, int] = MappingProxyType({})
#: What a worker runs that was never given anything, and how much of each service that is.
NO_ATTEMPTS: Mapping[str, Attempt] = MappingProxyType({})
NO_COUNTS: Mapping[str, int] = MappingProxyType({})
#: What a worker's models are that has none, and which of them are not loaded.
NO_MODELS: Mapping[str, frozenset[str]] = MappingProxyType({})
#: What a worker's shares are whose models have all slots of their service.
NO_SHARES: Mapping[str, int] = MappingProxyType({})
NO_LANES: frozenset[str] = frozenset()


def lanes_of(slots: Mapping[str, int], models: Mapping[str, frozenset[str]], service: str = "") -> frozenset[str]:
    """Return the lanes of what a worker offers, or of one service: that with slots, and it with each of its models."""
    services = [name for name, count in slots.items() if count > 0 and service in ("", name)]
    return frozenset((*services, *(f"{name} {model}" for name in services for model in models.get(name, ()))))


class Seat:
    """A worker as dispatch sees it: slots per service, what it runs, and whether it can be reached."""

    __slots__ = (
        "cold",
        "counts",
        "full_until",
        "gone_at",
        "last_given",
        "listed",
        "load",
        "models",
        "owner",
        "promised",
        "quota",
        "reachable",
        "rooms",
        "running",
        "shares",
        "slots",
        "unlisted",
        "usable",
        "worker_id",
    )

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.slots: dict[str, int] = {}
        #: The models of each service that has any, and the lanes whose models must be loaded first.
        self.models = NO_MODELS
        #: How many of each lane it takes at once, where its service's slots are shared out among models.
        self.shares = NO_SHARES
        self.cold = NO_LANES
        #: Slots it is given at most; halved by each failure, doubled by each success, never below one.
        self.quota = NO_QUOTA
        #: Its open attempts by lease, and how many of each service, changed by `begin` and `end` only.
        self.running = NO_ATTEMPTS
        self.counts = NO_COUNTS
        #: How many more of each service it may be given now: its slots themselves while it has nothing.
        self.rooms: Mapping[str, int] = self.slots
        #: Tasks that wait for it although others are free; made when there is one.
        self.promised: dict[str, Task] | None = None
        self.reachable = False
        self.usable = False
        self.gone_at: float | None = None
        #: It had no room for what it was given, and is given nothing until then.
        self.full_until = 0.0
        self.last_given = 0.0
        #: How busy it says it is, with whatever it does beside, 0..1.
        self.load = 0.0
        #: Whose machine it is, where somebody's tasks come first on it; changed by `Lanes.belong` only.
        self.owner = ""
        #: The lanes in whose lists of free workers it stands, which may be outdated: see `Lanes`.
        self.listed = NO_LANES
        #: It may stand in fewer of them than it has room for.
        self.unlisted = True

    def begin(self, attempt: Attempt) -> None:
        """Give it an attempt."""
        if self.running is NO_ATTEMPTS:
            self.running, self.counts = {}, {}
        running, counts = cast("dict[str, Attempt]", self.running), cast("dict[str, int]", self.counts)
        if attempt.lease_id not in running:
            service = attempt.task.service
            counts[service] = counts.get(service, 0) + 1
            self._more(service, -1)
        running[attempt.lease_id] = attempt

    def end(self, attempt: Attempt) -> None:
        """Take an attempt away, if it has it."""
        if cast("dict[str, Attempt]", self.running).pop(attempt.lease_id, None) if self.running else None:
            service = attempt.task.service
            cast("dict[str, int]", self.counts)[service] -= 1
            self._more(service, 1)

    def _more(self, service: str, change: int) -> None:
        if self.rooms is self.slots:
            self.rooms = dict(self.slots)
        rooms = cast("dict[str, int]", self.rooms)
        rooms[service] = rooms.get(service, 0) + change

    def offer(self, slots: dict[str, int], models: Mapping[str, frozenset[str]]) -> None:
        """Note what it offers; not copied, for workers with the same services share it."""
        self.slots, self.models = slots, models
        self._count_rooms()

    def limit(self, quota: Mapping[str, int]) -> None:
        """Give it no more of some services than so many at once."""
        self.quota = quota
        self._count_rooms()

    def _count_rooms(self) -> None:
        if not self.quota and not self.running:
            self.rooms = self.slots
            return
        names = self.slots.keys() | self.counts.keys()
        self.rooms = {
            name: min(self.slots.get(name, 0), self.quota.get(name, self.slots.get(name, 0))) - self.counts.get(name, 0)
            for name in names
        }

    def offers(self, service: str, model: str) -> bool:
        """Say whether it has slots for a service, with a model where one is named."""
        return self.slots.get(service, 0) > 0 and (not model or model in self.models.get(service, ()))

    def lanes(self, service: str = "") -> frozenset[str]:
        """Return all lanes, or those of one service."""
        return lanes_of(self.slots, self.models, service)

    def room(self, service: str) -> int:
        """Return how many more attempts of a service it may be given now."""
        return self.rooms.get(service, 0)

    def most(self, service: str, lane: str) -> int:
        """Return how many of a lane it takes at once, with nothing else to do."""
        return self.shares.get(lane, self.slots.get(service, 0))

    def takes(self, lane: str) -> bool:
        """Say whether a model has a slot left; those without a share have all slots of their service."""
        share = self.shares.get(lane) if self.shares else None
        return share is None or share > sum(1 for attempt in self.running.values() if attempt.task.lane == lane)

    def busy(self, service: str) -> int:
        """Return how many attempts of a service it has."""
        return self.counts.get(service, 0)

    def halve(self, service: str) -> None:
        """Give it less of a service for now."""
        quota = max(1, self.quota.get(service, self.slots.get(service, 1)) // 2)
        self.limit({**self.quota, service: quota})

    def double(self, service: str) -> None:
        """Give it more of a service again, up to its slots."""
        slots = self.slots.get(service, 1)
        if (quota := self.quota.get(service)) is not None:
            self.limit({**self.quota, service: max(1, min(slots, quota * 2))})
