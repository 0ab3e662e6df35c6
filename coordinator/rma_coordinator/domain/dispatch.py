"""Dispatch: tasks meet free workers; attempts, leases and blame. Pure: a clock goes in, effects come out.

A task is `queued` until a worker with a free slot for its service exists, `running` while an attempt has it, and ends
exactly once. (task, attempt) is the fence: only the newest attempt may speak for its task, unless an earlier one comes
with its whole answer while nothing final is known and nothing of a later one has gone to the client.
A durable task ends in two steps: its end is decided (`closing`), written down, and only then known (`closed`).
"""

from __future__ import annotations

import logging
import random
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Protocol

from rma_coordinator.domain import dispatch_log, timings
from rma_coordinator.domain.affinity import Affinity
from rma_coordinator.domain.breakers import Breakers
from rma_coordinator.domain.choosing import Chooser
from rma_coordinator.domain.lanes import Lanes
from rma_coordinator.domain.matching import Matcher
from rma_coordinator.domain.speeds import LOAD_S, Measured, Speeds
from rma_coordinator.domain.tasks import BLAMED, LEASE_S, NO_LANES, NO_MODELS, NO_SHARES, Attempt, Seat, Task
from rma_core.errors import NotFound, TryLater
from rma_core.models.channel import ACCEPT_WITHIN_S, RESUME_WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from rma_coordinator.domain.speeds import Expected
    from rma_coordinator.domain.tasks import AttemptState, TaskState
    from rma_core.models.worker import AttemptRef, Fault

logger = logging.getLogger(__name__)

#: Different workers that may fail a task before it has failed.
MAX_BLAMED = 3
#: Attempts a task gets at most, blamed or not, so that nothing goes round for ever.
MAX_ATTEMPTS = 10
#: Finished tasks that are remembered for `rma tasks`.
REMEMBERED = 1000
#: A worker that gives a task back before it began it is given nothing for so long: it is full, or about to say why.
FULL_S = 1.0
#: Where everybody else has given it back too, it is given nothing for longer each time, up to this.
MOST_FULL_S = 16.0
#: A tick that comes later than this after the one before means that the coordinator itself stood still.
STALL_S = 2.0


class Effects(Protocol):
    """What the dispatcher makes others do; calls are immediate and must not wait, nor call the dispatcher."""

    def ready(self, worker_id: str) -> bool:
        """Say whether an attempt can be handed to a worker now."""

    def offer(self, attempt: Attempt) -> bool:
        """Hand an attempt to its worker; ``False`` when that failed after all."""

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """Tell the worker that nobody wants this attempt's answer any more."""

    def accepted(self, attempt: Attempt) -> None:
        """The worker has begun."""

    def restarted(self, task: Task) -> None:
        """The attempt was lost before anything reached the client; another one will follow."""

    def closing(self, task: Task) -> None:
        """The end of a durable task is decided; once it is written down, `Dispatcher.closed` is to be called."""

    def finished(self, task: Task) -> None:
        """The task has ended; its state says how."""


class Dispatcher:
    """Queues, seats and open attempts; every method leaves them consistent and then matches again."""

    def __init__(
        self,
        effects: Effects,
        *,
        clock: Callable[[], float],
        max_queued: int,
        lease_s: float = LEASE_S,
        chance: random.Random | None = None,
    ) -> None:
        self._effects = effects
        self._clock = clock
        self._max_queued = max_queued
        self._lease_s = lease_s
        self._ticked = clock()
        self.seats: dict[str, Seat] = {}
        self.tasks: dict[str, Task] = {}
        self.finished: OrderedDict[str, Task] = OrderedDict()
        self.speeds, self.affinity, self.breakers = Speeds(clock), Affinity(), Breakers()
        # What it draws replays with the process's own seed.
        chance = self._chance = chance or random.Random(random.getrandbits(64))  # noqa: S311 - whom to look at is no secret
        lanes = self._lanes = Lanes()
        chooser = Chooser(lanes, self.speeds, self.affinity, self.breakers, ready=effects.ready, chance=chance)
        self._matcher = Matcher(self.seats, lanes, chooser, clock=clock, give=self._give)
        self.succeeded = 0
        self.failed = 0

    # -- tasks -------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """How many tasks wait."""
        return self._matcher.waiting

    @property
    def running(self) -> int:
        """How many tasks an attempt has."""
        return sum(1 for task in self.tasks.values() if task.state == "running")

    def check_room(self, *, coming: int = 0) -> None:
        """Raise TryLater when as many tasks wait, or are ``coming``, as may."""
        if self.queued + coming >= self._max_queued:
            raise TryLater(f"{self.queued} requests are waiting already", retry_after_s=5)

    def submit(self, task: Task) -> None:
        """Take a task in. Raises TryLater when the queue is full, unless the task was acknowledged already."""
        if not task.durable:
            self.check_room()
        self.tasks[task.id] = task
        self._matcher.add(task)

    def restore(self, task: Task, given: Attempt | None) -> None:
        """Take a durable task up again after the coordinator's restart; ``given`` is the attempt that may still run."""
        self.tasks[task.id] = task
        task.excluded |= {attempt.worker_id for attempt in task.attempts if attempt.state == "failed"}
        if given is None:
            self._matcher.restore(task)
            return
        given.state, given.restored = "running", True
        task.state, task.holder = "running", given
        self.progress(given)
        self.seat(given.worker_id).begin(given)

    def cancel(self, task: Task, reason: str) -> None:
        """End a task that nobody wants any more."""
        if not task.final:
            self._close(task, "cancelled", reason)

    def closed(self, task: Task) -> None:
        """The end of a durable task is on disk: from now on it is known."""
        if task.closing is not None and not task.final:
            self._finish(task, task.closing)

    def find(self, task_id: str) -> Task:
        """Return a task, also one that ended a while ago. Raises NotFound."""
        task = self.tasks.get(task_id) or self.finished.get(task_id)
        if task is None:
            raise NotFound(f"there is no task {task_id!r}", hints=("finished tasks are remembered for a while only",))
        return task

    def all(self) -> Iterator[Task]:
        """Yield every task that is remembered, newest first."""
        yield from sorted([*self.tasks.values(), *self.finished.values()], key=lambda task: -task.created_at)

    # -- workers -----------------------------------------------------------------------------------------------

    def seat(self, worker_id: str) -> Seat:
        """Return the worker's seat, made when it is first needed."""
        return self.seats.get(worker_id) or self.seats.setdefault(worker_id, Seat(worker_id))

    def arrived(self, worker_id: str, *, keeps: Collection[AttemptRef] = ()) -> list[Attempt]:
        """A worker can be reached (again); attempts it does not list are lost at once. Return those that go on.

        Listing an attempt accepts it, or renews its lease: the time without a connection is not held against it.
        One that was given up meanwhile goes on too, when its task still waits for another worker. The worker is given
        nothing new before `offers` tells what it can take now.
        """
        seat = self.seat(worker_id)
        leases = {ref.lease_id for ref in keeps}
        self._unreachable(seat)
        for attempt in list(seat.running.values()):
            attempt.restored = False
            if attempt.lease_id in leases:
                self.accept(attempt)
            else:
                self._lose(attempt, "the connection broke and the worker did not keep the task")
        for ref in keeps:
            lost = self._find(ref.task_id, ref.attempt, ref.lease_id, worker_id)
            if lost is not None and not lost.open and lost.task.state == "queued":
                self.revive(lost)
        self._lanes.offer(seat, {}, NO_MODELS)
        seat.reachable, seat.gone_at = True, None
        return list(seat.running.values())

    def heard(self, worker_id: str, refs: Collection[AttemptRef]) -> None:
        """A worker without a channel lists what it works on: what it had before our restart and lists no more is free.

        Listing an attempt accepts it, or renews its lease.
        """
        seat = self.seats.get(worker_id)
        if seat is None:
            return
        leases = {ref.lease_id for ref in refs}
        for attempt in list(seat.running.values()):
            if attempt.lease_id in leases:
                attempt.restored = False
                self.accept(attempt)
            elif attempt.restored:
                self._lose(attempt, "its worker did not keep it over the coordinator's restart")

    def polling(self, worker_id: str, *, waiting: bool) -> None:
        """A worker without a channel opened or ended a long poll: it can be given tasks only while it waits."""
        seat = self.seat(worker_id)
        seat.reachable, seat.gone_at = waiting, None
        if waiting:
            self._matcher.freed(seat)
        else:
            self._unreachable(seat)

    def departed(self, worker_id: str) -> None:
        """A worker's connection broke; it may come back within RESUME_WITHIN_S."""
        seat = self.seats.get(worker_id)
        if seat is not None:
            self._unreachable(seat)
            seat.gone_at = self._clock()
            dispatch_log.channel_ended(seat)

    def _unreachable(self, seat: Seat) -> None:
        seat.reachable = False
        self._matcher.lost(seat)

    def offers(
        self,
        worker_id: str,
        slots: dict[str, int],
        *,
        usable: bool,
        models: Mapping[str, frozenset[str]] = NO_MODELS,
        shares: Mapping[str, int] = NO_SHARES,
        cold: frozenset[str] = NO_LANES,
    ) -> None:
        """A worker says what it can take, in all and of each model, and whose models must be loaded first.

        New slots start with a full quota.
        """
        seat = self.seat(worker_id)
        self._lanes.offer(seat, slots, models)
        seat.shares, seat.cold = shares, cold
        if seat.quota:
            seat.limit({name: quota for name, quota in seat.quota.items() if name in slots})
        self.set_usable(seat, usable=usable)
        if usable:
            self._matcher.freed(seat)

    def belongs(self, worker_id: str, owner: str) -> None:
        """A worker is somebody's machine, whose tasks come first on it; an empty ``owner``: nobody's in particular."""
        self._lanes.belong(self.seat(worker_id), owner)

    def set_usable(self, seat: Seat, *, usable: bool) -> None:
        """A worker may be given work, or none for now."""
        if usable != seat.usable:
            seat.usable = usable
            if usable:
                self._matcher.freed(seat)
            else:
                self._matcher.lost(seat)

    def gone(self, worker_id: str, reason: str, *, blame: bool) -> None:
        """A worker is not there any more (offline, left): its attempts are lost now."""
        seat = self.seats.pop(worker_id, None)
        if seat is None:
            return
        self._lanes.offer(seat, {}, NO_MODELS)
        self._lanes.belong(seat, "")
        seat.usable = False
        self._matcher.lost(seat)
        for attempt in list(seat.running.values()):
            self._lose(attempt, reason, blame=blame and attempt.state == "running")
        self._give_up()

    def can_serve(self, service: str, model: str = "", *, besides: Collection[str] = ()) -> bool:
        """Say whether any worker that may be given work offers the service now, with the model where one is named."""
        seats = self._lanes.offering(f"{service} {model}" if model else service)
        return any(seat.usable and seat.worker_id not in besides for seat in seats)

    def turn_s(self, service: str, model: str = "") -> float | None:
        """Return the seconds until one more task of a full lane comes free, where the length of its tasks is known."""
        lane = f"{service} {model}" if model else service
        slots = sum(seat.most(service, lane) for seat in self._lanes.offering(lane) if seat.usable)
        mean_s = self.speeds.expected("", lane, beside=0).service
        return mean_s / slots if slots and mean_s else None

    def spare(self) -> Counter[str]:
        """Return for each lane how many reachable workers have room for it; none while its service's tasks wait."""
        counts: Counter[str] = Counter()
        waiting = self._matcher.services()
        for seat in self.seats.values():
            if seat.usable and seat.reachable:
                for service in seat.slots.keys() - waiting:
                    if seat.room(service) > 0:
                        counts.update(filter(seat.takes, seat.lanes(service)))
        return counts

    # -- attempts ----------------------------------------------------------------------------------------------

    def current(self, task_id: str, number: int, lease_id: str, worker_id: str) -> Attempt:
        """Return the open attempt that a worker speaks for. Raises NotFound when it is outdated or another's."""
        attempt = self._find(task_id, number, lease_id, worker_id)
        if attempt is None or not attempt.open:
            raise NotFound(
                f"attempt {number} of {task_id} is not yours or is outdated",
                hints=("drop it: the task goes on elsewhere or has ended",),
            )
        return attempt

    def named(self, task_id: str, number: int, lease_id: str, worker_id: str) -> Attempt:
        """Return the attempt that a worker names, whatever became of it. Raises NotFound."""
        attempt = self._find(task_id, number, lease_id, worker_id)
        return attempt or self.current(task_id, number, lease_id, worker_id)

    def may_come_late(self, attempt: Attempt) -> bool:
        """Say whether an attempt that was given up may still end its task, if it comes with a whole answer."""
        holder = attempt.task.holder
        overtaken = holder is not None and holder.delivered
        return attempt.state in ("lost", "failed") and attempt.task.undecided and not overtaken

    def revive(self, attempt: Attempt) -> bool:
        """Let an attempt that was given up speak for its task again; a later one that runs is told to stop."""
        if not self.may_come_late(attempt):
            return False
        task, rival = attempt.task, attempt.task.holder
        if rival is not None and rival.open:
            self._end(rival, "cancelled", "an earlier attempt has delivered after all")
            self._effects.withdraw(rival, rival.reason)
        self._unqueue(task)
        task.state, task.holder = "running", attempt
        task.excluded.discard(attempt.worker_id)
        attempt.state, attempt.reason, attempt.ended_at, attempt.broken_at = "running", "", None, None
        self.seat(attempt.worker_id).begin(attempt)
        attempt.started_at = self._clock() if attempt.started_at is None else attempt.started_at
        self._effects.restarted(task)
        # It may never have been accepted in this life of the coordinator: somebody must take its answer in.
        self._effects.accepted(attempt)
        self.progress(attempt)
        self._matcher.tick(self._clock())
        return True

    def accept(self, attempt: Attempt) -> None:
        """The worker has begun."""
        now = self._clock()
        if attempt.state == "offered":
            attempt.state = "running"
            attempt.started_at = now
            self._effects.accepted(attempt)
        # A broken upload begins anew, or its worker still lists it: there is nothing left to explain.
        attempt.broken_at = None
        attempt.lease_until = now + self._lease_s

    def progress(self, attempt: Attempt) -> None:
        """The attempt lives: its lease is renewed."""
        attempt.lease_until = self._clock() + self._lease_s

    def broke(self, attempt: Attempt, reason: str) -> None:
        """The stream of an answer broke; the worker has RESUME_WITHIN_S to say why before it is charged."""
        if attempt.open and attempt.broken_at is None:
            attempt.broken_at, attempt.reason = self._clock(), reason

    def give_back(self, attempt: Attempt, reason: str) -> None:
        """The attempt never reached its worker: it goes back, and the same worker may be given the task again."""
        self._lose(attempt, reason)

    def delivered(self, attempt: Attempt, *, usage: dict[str, float]) -> None:
        """The whole answer is here. A durable task has succeeded once it is also kept: then `succeed` is called."""
        if not attempt.open:
            return
        attempt.task.usage = usage
        attempt.delivered = True
        if not attempt.task.durable:
            self.succeed(attempt)

    def spoilt(self, attempt: Attempt, fault: Fault, reason: str) -> None:
        """What has come of an answer cannot be kept, by no fault of the worker's."""
        attempt.delivered = False
        self.fail(attempt, fault, reason)

    def succeed(self, attempt: Attempt) -> None:
        """The answer is whole, and wherever it is to be."""
        if not attempt.open:
            return
        task, worker_id, now = attempt.task, attempt.worker_id, self._clock()
        self._end(attempt, "succeeded", "")
        seat = self.seats.get(worker_id)
        if seat is not None and seat.quota:
            seat.double(task.service)
        if attempt.started_at is not None and not attempt.restored:
            # From when it was given: who says later that it has begun has not been quicker for that.
            took_s = now - attempt.offered_at - attempt.held_s
            self.speeds.learn(worker_id, task.lane, took_s, beside=attempt.beside, answer_bytes=task.answer_bytes)
        if task.prefixes:
            self.affinity.remember(task.lane, task.prefixes, worker_id)
        if self.breakers and self.breakers.succeeded(worker_id, task.lane, now):
            dispatch_log.breaker(worker_id, task.lane, shut_s=0.0)
        self._close(task, "succeeded", "")

    def measured(self, task: Task, found: Measured, *, tokens: float, said: int) -> None:
        """The engine of a task whose answer is whole says what it did, or was seen to.

        The answer has ``tokens``, as far as anyone knows, and its text ``said`` bytes.
        """
        attempt = task.holder
        if attempt is not None and attempt.started_at is not None and not attempt.restored:
            ended_at = self._clock() if attempt.ended_at is None else attempt.ended_at
            found = timings.believed(
                found, ended_at - attempt.offered_at - attempt.held_s, asked=task.body_bytes, said=said
            )
            self.speeds.measured(attempt.worker_id, task.lane, found, beside=attempt.beside)
        if tokens > 0 and said:
            self.speeds.answered(task.key_id, task.lane, min(tokens, said))

    def silence_s(self, attempt: Attempt) -> float:
        """Return how long an attempt's engine may say nothing in the middle of a streamed answer."""
        task = attempt.task
        return timings.silence_s(*self.speeds.per_token(attempt.worker_id, task.lane), task.gap_s)

    def fail(self, attempt: Attempt, fault: Fault, reason: str) -> None:
        """The attempt ended without a whole answer; whose fault it was decides what follows."""
        if not attempt.open or attempt.delivered:
            return
        attempt.task.fault = fault
        if fault == "request":
            self._end(attempt, "failed", reason)
            self._close(attempt.task, "failed", reason)
        elif fault in BLAMED:
            self._lose(attempt, reason, blame=True)
        elif fault == "coordinator":
            # Nothing speaks against the worker: with nobody else there, it may have the task again.
            self._lose(attempt, reason)
        elif attempt.state == "running":
            self._lose(attempt, reason, state="returned")
        else:
            # It had no room for it just then, which is no reason to try nobody but others from now on.
            self.seat(attempt.worker_id).full_until = self._clock() + FULL_S
            self.give_back(attempt, reason)

    def tick(self) -> None:
        """Let go of what ran out of time: offers, leases, connections, tasks. Call it about once a second."""
        now = self._clock()
        if now - self._ticked > STALL_S:
            self._forgive(now - self._ticked)
        self._ticked = now
        for seat in list(self.seats.values()):
            self._check_seat(seat, now)
        for task in [t for t in self.tasks.values() if now > t.deadline and not (t.holder and t.holder.delivered)]:
            what = "no worker was free" if task.state == "queued" else "no whole answer"
            self._close(task, "failed", f"{what} within {task.deadline - task.created_at:.0f} s")
        self._matcher.tick(now)

    # -- inside ------------------------------------------------------------------------------------------------

    def _forgive(self, seconds: float) -> None:
        """Give everyone the time during which the coordinator itself stood still and heard nothing."""
        words = "the coordinator stood still for %.1f s; leases are extended"
        logger.warning(words, seconds, extra={"action": "stall"})
        for seat in self.seats.values():
            if seat.gone_at is not None:
                seat.gone_at += seconds
            for attempt in seat.running.values():
                attempt.lease_until += seconds
                if attempt.broken_at is not None:
                    attempt.broken_at += seconds

    def _check_seat(self, seat: Seat, now: float) -> None:
        away = seat.gone_at is not None and now - seat.gone_at > RESUME_WITHIN_S
        for attempt in [attempt for attempt in seat.running.values() if not attempt.delivered]:
            if away:
                self._lose(attempt, "the worker's connection broke", blame=attempt.state == "running")
            elif attempt.broken_at is not None and now - attempt.broken_at > RESUME_WITHIN_S:
                self._lose(attempt, attempt.reason, blame=True)
            elif seat.gone_at is None and now > attempt.lease_until:
                self._expire(seat, attempt)
        if away:
            seat.gone_at = None

    def _expire(self, seat: Seat, attempt: Attempt) -> None:
        if attempt.restored:
            self._lose(attempt, "its worker did not come back after the coordinator's restart")
        elif attempt.state == "offered":
            seat.halve(attempt.task.service)
            self._lose(attempt, f"not accepted within {ACCEPT_WITHIN_S:.0f} s", exclude=True)
        else:
            self._lose(attempt, f"no progress for {self._lease_s:.0f} s", blame=True)

    def _lose(
        self,
        attempt: Attempt,
        reason: str,
        *,
        blame: bool = False,
        state: AttemptState = "lost",
        exclude: bool | None = None,
    ) -> None:
        """End an attempt without an answer; the task goes back to the queue unless it cannot.

        A worker that is blamed or gave it back is not given the task again (``exclude`` says otherwise), unless nobody
        but those that gave it back is left.
        """
        if not attempt.open or attempt.delivered:
            return
        task = attempt.task
        self._end(attempt, "failed" if blame else state, reason)
        self._effects.withdraw(attempt, reason)
        seat = self.seats.get(attempt.worker_id)
        if blame:
            self.speeds.failed(attempt.worker_id, task.lane)
            if self.breakers.failed(attempt.worker_id, task.lane, self._clock()):
                until = self.breakers.until(attempt.worker_id, task.lane)
                dispatch_log.breaker(attempt.worker_id, task.lane, shut_s=until - self._clock(), reason=reason)
            if seat:
                seat.halve(task.service)
        if exclude if exclude is not None else (blame or state == "returned"):
            task.excluded.add(attempt.worker_id)
        task.reasons.append(f"{attempt.worker_id}: {reason}")
        dispatch_log.attempt_lost(attempt)
        self._go_on(task, reason)

    def _go_on(self, task: Task, reason: str) -> None:
        """Queue a task again whose attempt was lost, or end it with every reason."""
        blamed = {attempt.worker_id for attempt in task.attempts if attempt.state == "failed"}
        tried = sum(attempt.number > task.base for attempt in task.attempts)
        self._readmit(task)
        if task.committed:
            self._close(task, "failed", f"the answer broke off: {reason}")
        elif len(blamed) >= MAX_BLAMED or tried >= MAX_ATTEMPTS:
            for worker_id in blamed:
                # What breaks everybody is more likely itself to blame.
                self.breakers.forgive(worker_id, task.lane)
            self._close(task, "failed", f"given up after {len(task.attempts)} attempts")
        elif self._forlorn(task):
            self._close(task, "failed", f"no other worker offers {task.lane}")
        else:
            task.state = "queued"
            self._effects.restarted(task)
            self._matcher.again(task)

    def _give_up(self) -> None:
        """A worker has gone: end what was tried and nobody is left for, as if the last one had had it too."""
        for task in [task for task in self._matcher if task.attempts]:
            self._readmit(task)
            if self._forlorn(task):
                self._close(task, "failed", f"no other worker offers {task.lane}")

    def _forlorn(self, task: Task) -> bool:
        """Say whether nobody is left for a task; one that was acknowledged waits, unless a worker has failed it."""
        patient = task.durable and not any(attempt.state == "failed" for attempt in task.attempts)
        return not patient and not self.can_serve(task.service, task.model, besides=task.excluded)

    def _readmit(self, task: Task) -> None:
        """Once nobody else offers a task's lane, let those have it again that only gave it back, after a moment.

        And those that it was only better not to ask: who lost the beginning of the answer that it is to go on with.
        """
        if not task.excluded or self.can_serve(task.service, task.model, besides=task.excluded):
            return
        failed = {attempt.worker_id for attempt in task.attempts if attempt.state == "failed"}
        returned = {attempt.worker_id for attempt in task.attempts if attempt.state == "returned"} - failed
        task.excluded -= returned | (task.excluded - {attempt.worker_id for attempt in task.attempts})
        # Longer each time, and not all at once: what made them give it back may last.
        wait_s = min(MOST_FULL_S, FULL_S * 2 ** min(len(task.attempts) - 1, 8)) * self._chance.uniform(0.5, 1.0)
        for seat in filter(None, map(self.seats.get, returned)):
            seat.full_until = max(seat.full_until, self._clock() + wait_s)

    def _end(self, attempt: Attempt, state: AttemptState, reason: str) -> None:
        attempt.state, attempt.reason, attempt.ended_at = state, reason, self._clock()
        seat = self.seats.get(attempt.worker_id)
        if seat is not None:
            seat.end(attempt)
            self._lanes.open(seat)
        if self.breakers:
            self.breakers.ended(attempt.worker_id, attempt.task.lane, attempt.lease_id)

    def _find(self, task_id: str, number: int, lease_id: str, worker_id: str) -> Attempt | None:
        task = self.tasks.get(task_id) or self.finished.get(task_id)
        attempts = task.attempts if task else ()
        return next((attempt for attempt in attempts if attempt.belongs(number, lease_id, worker_id)), None)

    def _unqueue(self, task: Task) -> None:
        if task.state == "queued":
            self._matcher.remove(task)

    def _close(self, task: Task, state: TaskState, reason: str) -> None:
        """Decide the end of a task, once."""
        if task.closing is not None:
            return
        attempt = task.attempt
        if attempt and attempt.open:
            self._end(attempt, "cancelled", reason)
            self._effects.withdraw(attempt, reason)
        self._unqueue(task)
        if reason:
            task.reasons.append(reason)
        task.closing, task.ended_at = state, self._clock()
        if task.durable:
            self._effects.closing(task)
        else:
            self._finish(task, state)
        seat = self.seats.get(attempt.worker_id) if attempt else None
        if seat is not None:
            self._matcher.freed(seat, task.service)

    def _finish(self, task: Task, state: TaskState) -> None:
        """Record the end of a task and tell everyone."""
        task.state = state
        # Nobody asks for these any more, and a client may have sent many of them.
        task.headers, task.path = (), ""
        self.succeeded += state == "succeeded"
        self.failed += state == "failed"
        self.tasks.pop(task.id, None)
        self.finished[task.id] = task
        while len(self.finished) > REMEMBERED:
            self.finished.popitem(last=False)
        dispatch_log.task_ended(task)
        self._effects.finished(task)

    def _give(self, task: Task, seat: Seat, expected: Expected) -> None:
        now = self._clock()
        attempt = Attempt(task, task.next_number, seat.worker_id, now)
        attempt.lease_s, attempt.expected = self._lease_s, expected
        attempt.beside = seat.busy(task.service)
        if task.streamed and expected.known and expected.prefill:
            load_s = self.speeds.load_s(seat.worker_id, task.lane)
            if self.speeds.per_token(seat.worker_id, task.lane)[0] and (load_s or task.lane not in seat.cold):
                attempt.first_byte_s = timings.first_byte_s(expected, load_s or LOAD_S, task.first_byte_s)
        task.attempts.append(attempt)
        task.state, task.holder = "running", attempt
        seat.begin(attempt)
        seat.last_given = now
        if self.breakers:
            self.breakers.given(seat.worker_id, task.lane, attempt.lease_id)
        if not self._effects.offer(attempt):
            self._lose(attempt, "the worker could not be reached")
