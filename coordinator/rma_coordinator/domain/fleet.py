"""The fleet: every worker, its state and why; pure, given clocks. Nothing here waits or speaks to anyone."""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.domain.census import NOTHING, Census
from rma_coordinator.domain.tasks import NO_MODELS, NO_SHARES
from rma_coordinator.domain.worker_records import SHARED, Press, WorkerRecord, brief, ids_of, same
from rma_core.errors import NotFound
from rma_core.models.worker import lane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rma_coordinator.domain.census import Standing
    from rma_core.models.hardware import Capabilities
    from rma_core.models.worker import Assignment, ContainerStatus, Heartbeat, WorkerStatus

logger = logging.getLogger(__name__)

__all__ = ["Fleet", "Worker", "WorkerRecord", "iso"]

_press = Press()

#: After this many intervals without a heartbeat a worker gets no new work.
DEGRADED_AFTER = 1.5
#: After this many it counts as offline.
OFFLINE_AFTER = 3.0
#: How long the coordinator marks nobody offline after its own start or stall, or a mass silence.
AMNESTY_S = 300.0
#: How often the fleet is swept; a sweep that comes this much too late means that the coordinator itself stood still.
SWEEP_S = 2.0
STALL_S = 5.0
#: When a third of at least ten workers falls silent within a minute, the fault is probably ours.
MASS_SHARE, MASS_LEAST, MASS_WITHIN_S = 1 / 3, 10, 60.0


#: The service that owners may attach servers for, outside tiers, and the most slots that one machine may bring so.
ATTACHABLE = "llm"
MOST_ATTACHED = 64


#: The slots of a worker that has none; not to be changed.
NO_SLOTS: dict[str, int] = {}


class Worker:
    """One worker as it is now: its lasting record and what its heartbeats said."""

    __slots__ = (
        "_pressed",
        "brief",
        "completed",
        "containers",
        "could",
        "counted",
        "current_load",
        "draining",
        "heard",
        "id",
        "ip_address",
        "last_beat",
        "left",
        "paused",
        "placed",
        "reason",
        "said",
        "slots",
        "slots_of",
        "slots_within",
        "standing",
        "status",
        "stood",
        "written",
    )

    def __init__(self, record: WorkerRecord, *, now: float) -> None:
        self.id = sys.intern(record.worker_id)
        self.record = record
        self.last_beat = now
        #: Whether it has said anything since the coordinator started.
        self.heard = False
        self.ip_address = ""
        self.status: WorkerStatus = "offline" if record.away else "degraded"
        self.reason = record.away or "not heard of since the coordinator started"
        self.said: tuple[str, str] = ("healthy", "")
        self.current_load = 0.0
        self.containers: tuple[ContainerStatus, ...] = ()
        #: The hash of ``containers`` as its heartbeats by HTTP write them; 0 while that is not known.
        self.written = 0
        #: The services that it could run if it ran nothing else; ``None`` until that is known.
        self.could: frozenset[str] | None = None
        #: Which of the pool's needs its services were last chosen for; -1 for none.
        self.placed = -1
        #: The slots it offers, and the containers and the assignment from which they were counted.
        self.slots: dict[str, int] = NO_SLOTS
        self.slots_of: tuple[ContainerStatus, ...] = ()
        self.slots_within: tuple[Assignment, ...] = ()
        #: The services for which the fleet counts it, kept by `Fleet.recount`.
        self.counted: tuple[str, ...] = ()
        #: What it has of what rules govern and has room for, as it was last placed; and what the census counts of that.
        self.standing = self.stood = NOTHING
        self.draining = False
        #: Its owner wants the machine back for now.
        self.paused = False
        self.left = False
        #: Tasks that the ledger has of it.
        self.completed = 0

    @property
    def record(self) -> WorkerRecord:
        """Its whole record, made anew each time: what is wanted often is in ``brief``."""
        return _press.open(self._pressed)

    @record.setter
    def record(self, record: WorkerRecord) -> None:
        self._pressed = _press.press(record)
        self.brief = brief(record)

    @property
    def present(self) -> bool:
        """Whether what it runs and is assigned counts: it is not offline or paused, and nobody has shut it out."""
        return self.status != "offline" and not self.paused and not self.brief.disabled

    @property
    def usable(self) -> bool:
        """Whether it may be given new work."""
        away = self.draining or self.paused or self.left
        return self.status == "healthy" and not away and not self.brief.disabled

    def offered(self, said: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return the slots it offers: those it says, else those of its healthy containers; not to be changed.

        Never more than it was assigned, or than an owner may attach: who claims a thousand slots would be given all
        there is.
        """
        assignment = self.brief.assignment
        if said is not None:
            return _within(said, assignment, self.containers)
        if self.slots_of is not self.containers or self.slots_within is not assignment:
            healthy = [one for one in self.containers if one.state == "healthy"]
            self.slots = _within(_count(healthy), assignment, self.containers)
            self.slots_of, self.slots_within = self.containers, assignment
        return self.slots

    def state_of(self, service: str, model: str) -> str:
        """Return what it last said of a model: loaded, loading or cold; empty for one that it has not."""
        # Asked for each attempt: plain loops cost a quarter of a generator.
        for container in self.containers:
            if container.service == service:
                for one in container.models:
                    if one.name == model:
                        return one.state
        return ""

    @property
    def models(self) -> Mapping[str, frozenset[str]]:
        """The models of each healthy service that has any; not to be changed."""
        # Most workers have none, and hashing what a worker runs costs more than looking.
        if any(one.models for one in self.containers):
            return _models(self.containers)
        return NO_MODELS

    @property
    def shares(self) -> Mapping[str, int]:
        """How many of each lane it takes at once, where several containers share out a service; not to be changed."""
        if any(one.models for one in self.containers):
            return _shares(self.containers)
        return NO_SHARES

    @property
    def cold(self) -> frozenset[str]:
        """The lanes whose models must be loaded before they answer; ask only where there are models."""
        return _cold(self.containers)


def _within(
    slots: Mapping[str, int], assignment: Iterable[Assignment], containers: Iterable[ContainerStatus]
) -> dict[str, int]:
    limits = _count(assignment)
    attached = sum(one.slots for one in containers if one.unassigned and one.service == ATTACHABLE)
    if attached:
        limits[ATTACHABLE] = limits.get(ATTACHABLE, 0) + min(attached, MOST_ATTACHED)
    return _least(tuple(slots.items()), tuple(limits.items()))


@functools.lru_cache(SHARED)
def _models(containers: tuple[ContainerStatus, ...]) -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for one in containers:
        if one.state == "healthy" and one.models:
            found.setdefault(one.service, set()).update(model.name for model in one.models)
    return {service: frozenset(names) for service, names in found.items()}


@functools.lru_cache(SHARED)
def _shares(containers: tuple[ContainerStatus, ...]) -> Mapping[str, int]:
    healthy = [one for one in containers if one.state == "healthy"]
    services = Counter(one.service for one in healthy)
    found = Counter[str]()
    for one in healthy:
        if services[one.service] > 1:
            found.update({lane(one.service, model.name): one.slots for model in one.models})
    return found or NO_SHARES


@functools.lru_cache(SHARED)
def _cold(containers: tuple[ContainerStatus, ...]) -> frozenset[str]:
    named = [(f"{one.service} {model.name}", model.state) for one in containers for model in one.models]
    ready = {lane for lane, state in named if state == "loaded"}
    return frozenset(lane for lane, _ in named if lane not in ready)


@functools.lru_cache(SHARED)
def _least(slots: tuple[tuple[str, int], ...], most: tuple[tuple[str, int], ...]) -> dict[str, int]:
    limits = dict(most)
    return {service: min(count, limits[service]) for service, count in slots if service in limits}


def _count(parts: Iterable[Assignment] | Iterable[ContainerStatus]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for one in parts:
        counted[one.service] = counted.get(one.service, 0) + one.slots
    return counted


def lanes_of(assignments: Iterable[Assignment], containers: Iterable[ContainerStatus]) -> tuple[str, ...]:
    """Return what a worker counts for: its services, and each model of them, also those that its owner offers."""
    found: list[str] = []
    for assignment in assignments:
        found.append(assignment.service)
        if assignment.model is not None:
            found.append(assignment.lane)
    for one in containers:
        if one.unassigned:
            found += (lane(one.service, model.name) for model in one.models)
    return tuple(found)


class Fleet:
    """All workers in memory. ``clock`` is monotonic seconds, ``wall`` Unix seconds."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        interval_s: float,
        beats_per_s: float,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._least_s = interval_s
        #: Seconds between heartbeats: longer for a large fleet, so that the coordinator is never flooded.
        self.interval_s = interval_s
        self._beats_per_s = beats_per_s
        now = clock()
        self.workers: dict[str, Worker] = {}
        self._assigned: dict[str, int] = {}
        self.census = Census()
        #: Counted up whenever what the pool has, or has room for, is something else: services are then chosen again.
        self.need = 0
        self.started_at = now
        self.amnesty_until = now + AMNESTY_S
        self.amnesty_reason = "the coordinator has just started"
        self._last_sweep = now
        self._silenced: deque[float] = deque(maxlen=10_000)
        #: Workers whose record is newer than what the store holds; whoever writes them takes them out.
        self.changed: set[str] = set()

    def restore(self, records: Iterable[WorkerRecord]) -> None:
        """Take in what was known of workers before the coordinator started."""
        for record in records:
            worker = self.workers[record.worker_id] = Worker(record, now=self.started_at)
            self.recount(worker)
        self._pace()

    def _pace(self) -> None:
        self.interval_s = max(self._least_s, len(self.workers) / self._beats_per_s)

    def get(self, worker_id: str) -> Worker:
        """Return one worker. Raises NotFound."""
        worker = self.workers.get(worker_id)
        if worker is None:
            raise NotFound(f"there is no worker {worker_id!r}", hints=("see `rma workers`",))
        return worker

    def by_thumbprint(self, thumbprint: str) -> Worker | None:
        """Return the worker with that key, if any."""
        # Its id is a part of its key, so nothing more need be kept to find it.
        known = (self.workers.get(candidate) for candidate in ids_of(thumbprint))
        return next((worker for worker in known if worker and worker.record.thumbprint == thumbprint), None)

    def new_id(self, thumbprint: str) -> str:
        """Return a free worker id, from the key where it can be."""
        for candidate in ids_of(thumbprint):
            if candidate not in self.workers:
                # Each of its tokens names it too.
                return sys.intern(candidate)
        raise NotFound("no worker id is free for this key", hints=("make a new key: remove the agent's state folder",))

    def add(self, record: WorkerRecord, *, ip_address: str) -> Worker:
        """Take a registered worker in, or its new registration."""
        worker = self.workers.get(record.worker_id)
        if worker is None:
            worker = self.workers[record.worker_id] = Worker(record, now=self._clock())
            self._pace()
        worker.record = record
        worker.could = None
        worker.ip_address = same(ip_address)
        worker.draining = worker.paused = False
        worker.said = ("healthy", "")
        self._seen(worker)
        self.recount(worker)
        return worker

    def beat(self, worker: Worker, heartbeat: Heartbeat, *, ip_address: str) -> None:
        """Take a heartbeat in."""
        status, reason = worker.said
        if status != heartbeat.status or reason != heartbeat.reason:
            worker.said = same((heartbeat.status, heartbeat.reason))
        worker.current_load = heartbeat.current_load
        if worker.containers is not heartbeat.containers and worker.containers != heartbeat.containers:
            # What was counted from them is known by their identity.
            worker.containers = same(heartbeat.containers)
            worker.written = 0
            self.recount(worker)
        if worker.draining != heartbeat.draining:
            worker.draining = heartbeat.draining
            self.recount(worker)
        if worker.paused != heartbeat.paused:
            self._pause(worker, paused=heartbeat.paused)
        if worker.ip_address != ip_address:
            worker.ip_address = same(ip_address)
        self._seen(worker)

    def _pause(self, worker: Worker, *, paused: bool) -> None:
        worker.paused = paused
        words = "has paused it" if paused else "lets it go on"
        about = {"action": "worker_paused" if paused else "worker_resumed", "worker": worker.id}
        logger.info("%s: its owner %s", worker.id, words, extra=about)
        self.recount(worker)

    def touch(self, worker: Worker) -> None:
        """Note that the worker spoke in some other way."""
        self._seen(worker)

    def leave(self, worker: Worker) -> None:
        """The worker said goodbye; it stays listed, offline."""
        worker.left = True
        worker.containers = ()
        worker.written = 0
        worker.current_load = 0.0
        self._to(worker, "offline", "it left by itself")

    def sweep(self) -> list[Worker]:
        """Mark who fell silent; return those that went offline now. Call it every few seconds."""
        now = self._clock()
        if now - self._last_sweep > SWEEP_S + STALL_S:
            self._suspect_self(now, f"the coordinator stood still for {now - self._last_sweep:.0f} s")
        self._last_sweep = now
        silent = [
            w
            for w in self.workers.values()
            if w.status == "healthy" and now - w.last_beat > DEGRADED_AFTER * self.interval_s
        ]
        for worker in silent:
            self._silenced.append(now)
            self._to(worker, "degraded", "missed a heartbeat")
        self._watch_mass_silence(now)
        if now < self.amnesty_until:
            return []
        gone = [
            w
            for w in self.workers.values()
            if w.status != "offline" and now - w.last_beat > OFFLINE_AFTER * self.interval_s
        ]
        for worker in gone:
            self._to(worker, "offline", f"no heartbeat for {now - worker.last_beat:.0f} s")
        return gone

    def _watch_mass_silence(self, now: float) -> None:
        while self._silenced and now - self._silenced[0] > MASS_WITHIN_S:
            self._silenced.popleft()
        known = sum(1 for w in self.workers.values() if w.status != "offline")
        if known >= MASS_LEAST and len(self._silenced) >= known * MASS_SHARE and now >= self.amnesty_until:
            self._suspect_self(now, f"{len(self._silenced)} of {known} workers fell silent within a minute")

    def _suspect_self(self, now: float, reason: str) -> None:
        self.amnesty_until = now + AMNESTY_S
        self.amnesty_reason = reason
        self._silenced.clear()
        logger.warning(
            "%s; nobody is marked offline for %d s", reason, AMNESTY_S, extra={"action": "amnesty", "reason": reason}
        )

    def _seen(self, worker: Worker) -> None:
        worker.last_beat = self._clock()
        worker.heard, worker.left = True, False
        said, reason = worker.said
        status: WorkerStatus = "degraded" if said == "degraded" else "healthy"
        # Who is away is offline, so nothing else can have changed.
        if worker.status != status or worker.reason != reason:
            self._to(worker, status, reason)

    def _to(self, worker: Worker, status: WorkerStatus, reason: str) -> None:
        """Change a state and log it, once."""
        moved = worker.status != status
        if moved:
            logger.info(
                "%s is %s%s",
                worker.id,
                status,
                f": {reason}" if reason else "",
                extra={"action": f"worker_{status}", "worker": worker.id},
            )
        worker.status = status
        worker.reason = reason
        away = reason if status == "offline" else ""
        if worker.brief.away != away:
            seen = self.last_seen(worker)
            worker.record = msgspec.structs.replace(worker.record, away=away, last_seen_at=seen)
            self.changed.add(worker.id)
        if moved:
            self.recount(worker)

    def running(self) -> dict[str, int]:
        """Return how many healthy copies of each service there are, on workers that may be given work."""
        counts: dict[str, int] = {}
        for worker in self.workers.values():
            if worker.present:
                for container in worker.containers:
                    if container.state == "healthy":
                        counts[container.service] = counts.get(container.service, 0) + 1
        return counts

    def assigned(self, *, besides: str = "") -> dict[str, int]:
        """Return how many workers count for each service and each lane, ``besides`` one: not those that are away."""
        counts = dict(self._assigned)
        worker = self.workers.get(besides)
        for service in worker.counted if worker else ():
            counts[service] -= 1
        return counts

    def recount(self, worker: Worker) -> None:
        """Keep `assigned` and the census true; to be called whenever what a worker has or its presence has changed."""
        counted = lanes_of(worker.brief.assignment, worker.containers) if worker.present else ()
        if counted != worker.counted:
            self.need += 1
            for service in worker.counted:
                self._assigned[service] -= 1
            for service in counted:
                self._assigned[service] = self._assigned.get(service, 0) + 1
            worker.counted = same(counted)
        standing = self.stands(worker, worker.standing)
        if standing != worker.stood:
            self.need += 1
            self.census.remove(worker.stood)
            self.census.add(standing)
            worker.stood = same(standing)

    @staticmethod
    def stands(worker: Worker, standing: Standing) -> Standing:
        """Return what of how a worker was placed counts: nothing of who is away, no room of who takes nothing more."""
        if not worker.present:
            return NOTHING
        return standing._replace(room=()) if worker.draining and standing.room else standing

    def stand(self, worker: Worker, standing: Standing) -> None:
        """Note what a worker has of what rules govern, and has room for."""
        if standing != worker.standing:
            worker.standing = same(standing)
            self.recount(worker)

    def new_census(self) -> None:
        """Forget how workers stand: other rules are in force, and all are to be placed by them."""
        self.need += 1
        self.census = Census()
        for worker in self.workers.values():
            worker.standing = worker.stood = NOTHING

    def wall_time(self, monotonic: float) -> float:
        """Return the Unix time at which the monotonic clock showed ``monotonic``."""
        return self._wall() - (self._clock() - monotonic)

    def last_seen(self, worker: Worker) -> float:
        """Return the Unix time at which a worker last said anything."""
        return self.wall_time(worker.last_beat) if worker.heard else worker.record.last_seen_at

    def show(self, worker: Worker, *, full: bool = False) -> dict[str, Any]:
        """Return a worker as CONTRACT writes it; ``full`` adds devices, probes, plugins, runtimes and placement."""
        record = worker.record
        view: dict[str, Any] = {
            "worker_id": worker.id,
            "tier": record.tier,
            "tier_reason": record.tier_reason,
            "prefers": record.prefers,
            "status": worker.status,
            "status_reason": worker.reason,
            "draining": worker.draining,
            "paused": worker.paused,
            "disabled": record.disabled,
            "owner": record.owner,
            "ip_address": worker.ip_address,
            "registered_at": iso(record.registered_at),
            "last_heartbeat": iso(self.last_seen(worker)),
            "current_load": worker.current_load,
            "tasks_completed": worker.completed,
            "agent_version": record.agent_version,
            "capabilities": capabilities_view(record.report.capabilities),
            "assigned_containers": [assignment_view(a) for a in record.assignment],
            "containers": msgspec.to_builtins(worker.containers),
        }
        if full:
            view["hardware"] = msgspec.to_builtins(record.report)
            view["runtimes"] = msgspec.to_builtins(record.runtimes)
            view["plugins"] = msgspec.to_builtins(record.plugins)
            view["placement"] = record.placement
            view["labels"] = record.labels
            view["generation"] = record.generation
        return view


def iso(unix_s: float) -> str | None:
    """Return a time as CONTRACT writes it (UTC, seconds); ``None`` for never."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if unix_s else None


def capabilities_view(capabilities: Capabilities) -> dict[str, Any]:
    """Return the short form of a machine as plain JSON data."""
    view: dict[str, Any] = msgspec.to_builtins(capabilities)
    return view


def assignment_view(assignment: Assignment) -> dict[str, Any]:
    """Return a container as CONTRACT writes it, with every field that people rely on."""
    view: dict[str, Any] = msgspec.to_builtins(assignment)
    view.setdefault("image_digest", None)
    view.setdefault("requires_gpu", assignment.requires_gpu)
    view.setdefault("env", assignment.env)
    return view
