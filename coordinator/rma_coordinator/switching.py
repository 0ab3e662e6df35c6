"""Swapping the tier policy of a live pool: what would change, step by step, back again, and on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.audit import ITSELF, Audit, AuditEntry
from rma_coordinator.choices import Change, Choice, Plan, PolicyRecord, Start, choice_of
from rma_coordinator.domain.fleet import iso
from rma_coordinator.domain.rollout import Pulse, Rollout, Steps
from rma_coordinator.policy_versions import ChildPolicy
from rma_coordinator.shadow import Shadow
from rma_coordinator.store import Delete, Put
from rma_coordinator.tiers import NoDecision, Pending, failed_for_many
from rma_core.errors import PlanChanged, Refused, RMAError
from rma_core.interfaces import PolicyInput
from rma_core.policy_file import read_policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.pool import Pool
    from rma_core.interfaces import TierDecision, TierPolicy

logger = logging.getLogger(__name__)

#: How often turns are given and the pool is looked at.
TICK_S = 0.5
#: Workers that are decided or moved before anyone else gets a word in.
AT_ONCE = 10
#: How often a policy is asked about one worker that changes meanwhile.
ASKED_AGAIN = 3
#: Policies that a pool can go back through.
MOST_BACK = 20
#: The key of the one record.
KEY = "policy"
#: Workers that are named where a policy fails.
NAMED = 3
#: What a look at plugins has found is cut to this in the audit: their reasons are strangers' words.
MOST_WORDS = 4000


class Switching:
    """The policy in force, those before it, and workers on their way to it."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self.tiers = pool, pool.tiers
        self.audit = Audit(pool.wall)
        self.rollout: Rollout | None = None
        #: What the store holds, as far as is known; ``None`` while nothing was ever put in force.
        self._record: PolicyRecord | None = None
        #: The last choice, and its policy as it was read then.
        self._in_force: tuple[Choice, TierPolicy] | None = None
        #: A commit was given up and may be kept all the same.
        self._unsure = False
        self._start: Start | None = None
        self._one = asyncio.Lock()
        #: Held by whoever makes a plan to put in force; nobody who wants to go back waits for that.
        self._planning = asyncio.Lock()
        #: One commit at a time: entries of the audit are kept in the order of their numbers.
        self._writing = asyncio.Lock()
        self._wake = asyncio.Event()
        #: After a start the one in the shadow is asked beside everything else.
        self._shadow_due = False
        self._beside: asyncio.Task[None] | None = None

    # -- after a start -----------------------------------------------------------------------------------------

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What was put in force, oldest first; the last is in force."""
        return self._record.choices if self._record else (self._own(),)

    def _own(self) -> Choice:
        """Return the settings' own policy as a choice."""
        own = self.tiers.own
        return choice_of(own.policy, own.text) if own else Choice(name=self.tiers.wanted)

    async def open(self) -> None:
        """Go on where the last process was. What was put in force counts until the settings name another policy.

        Workers keep their tiers until the first round has looked at them all.
        """
        self.audit.restore(await self._pool.store.load(AuditEntry))
        self._record = await self._pool.store.get(PolicyRecord, KEY)
        self._start = start = self._found(self._record)
        policy = self._policy(start.choices[-1])
        assert policy is not None  # noqa: S101 - `_usable` has looked
        self.tiers.use(policy, waiting=self._pool.fleet.workers.keys())
        self._in_force = start.choices[-1], policy
        beside = self._record.shadow if self._record else None
        if beside is not None and (shadow := self._policy(beside) or self._by_name(beside)):
            self.tiers.shadow = Shadow(shadow, since=beside.at, wall=self._pool.wall)
        self._wake.set()

    def _found(self, record: PolicyRecord | None) -> Start:
        """Return what is in force now, as the store and the settings have it."""
        own = self._own()
        if record is None:
            words = f"{own.words} is in force, as the settings say"
            return Start((own,), Steps(), "policy_set", words, quiet=True)
        if record.wanted != own.digest and not record.choices[-1].same(own):
            choice = msgspec.structs.replace(own, at=self._pool.wall(), by=ITSELF)
            words = f"the settings have another policy now, {own.words}, which is in force"
            return Start((*record.choices, choice), Steps(), "policy_set", words)
        choices, lost = self._usable(record.choices), record.choices[-1].name
        if not choices[-1].same(record.choices[-1]):
            return self._replaced(record) or self._lost(record.choices[-1], choices)
        if record.steps is None:
            return Start(choices, Steps(), "policy_differs", f"{lost!r} says something else than it did", quiet=True)
        words = f"the coordinator was restarted while workers moved to {lost!r}: "
        if record.steps.on_restart == "rollback" and len(choices) > 1:
            back = self._usable(choices[:-1])
            return Start(back, Steps(), "policy_rolled_back", f"{words}back to {back[-1].name!r}, as was asked for")
        words += f"it is still stopped ({record.stopped})" if record.stopped else "it goes on"
        return Start(choices, record.steps, "policy_goes_on", words, record.total, record.stopped)

    def _replaced(self, record: PolicyRecord) -> Start | None:
        """Return the version that is installed now of what was in force; the one of then nobody can start any more."""
        was = record.choices[-1]
        known = self._by_name(was)
        if known is None:
            return None
        if record.steps and record.steps.on_restart == "rollback" and len(record.choices) > 1:
            return None
        now = choice_of(known, at=self._pool.wall(), by=ITSELF)
        words = f"{was.words} was in force, and {now.version} is installed now: that is in force"
        if now.version == was.version:
            words = f"{was.words} is in force, and its files or settings are others than they were"
        choices, steps = (*record.choices[:-1], now), record.steps or Steps()
        return Start(choices, steps, "policy_differs", words, record.total, record.stopped)

    def _by_name(self, choice: Choice) -> ChildPolicy | None:
        """Return whichever version of a plugin's policy is installed now."""
        known = self.tiers.known.get(choice.name)
        return known.policy if choice.version and known and isinstance(known.policy, ChildPolicy) else None

    def _lost(self, was: Choice, choices: tuple[Choice, ...]) -> Start:
        why = self.tiers.refused.get(was.name, "")
        words = f"{was.words} is not there any more{why and f' ({why})'}: {choices[-1].words} is in force again"
        return Start(choices, Steps(), "policy_lost", words)

    def _usable(self, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        """Return the choices up to the last one whose policy is still there; else the settings' own."""
        for end in range(len(choices), 0, -1):
            if self._policy(choices[end - 1]) is not None:
                return choices[:end]
        return (self._own(),)

    def _policy(self, choice: Choice) -> TierPolicy | None:
        """Return the policy of a choice; ``None`` for one that is not there any more."""
        own = self.tiers.own
        if own and choice.same(self._own()):
            return own.policy
        if self._in_force and choice.same(self._in_force[0]):
            return self._in_force[1]
        try:
            if choice.text:
                return read_policy(choice.text, name=choice.name, subject=choice.name)
        except RMAError as error:
            logger.warning("the tier policy %s cannot be read any more: %s", choice.name, error)
            return None
        if choice.version:
            plugins = self._pool.policy_plugins
            return plugins.find(choice.name, choice.version, choice.files) if plugins else None
        known = self.tiers.known.get(choice.name)
        return known.policy if known and not known.text else None

    @property
    def needed(self) -> list[ChildPolicy]:
        """The policies of plugins that a swap may need again, the one in force last."""
        shadow = self.tiers.shadow
        chosen = [self._policy(choice) for choice in self.choices if choice.version]
        some = [*chosen, shadow.policy if shadow else None, self.tiers.current]
        return [one for one in some if isinstance(one, ChildPolicy)]

    async def _first(self, start: Start) -> None:
        """Look at all workers once after a start, and let those move whose tier is another now."""
        with self._noting() as noted:
            policy = self.tiers.current or self.tiers.find().policy
            plan = await self.plan(policy)
            # Of a plugin's policy it is kept which version that is: the next start may find another.
            if plan.moves or not start.quiet or (self._record is None and start.choices[-1].version):
                moved = max(0, start.total - len(plan.moves))
                await self._begin(
                    start.choices, policy, start.steps, start.action, start.words, by=ITSELF, plan=plan,
                    noted=noted, moved=moved, stopped=start.stopped,
                )  # fmt: skip
            else:
                await self._release(noted | {row.worker_id for row in plan.rows if row.failed})
        self._start = None
        self._shadow_due = self.tiers.shadow is not None

    async def _release(self, due: set[str]) -> None:
        """Nobody waits any more; who told something new while all did, or failed, is decided now."""
        self.tiers.waiting = ()
        await self._pool.decide_all(sorted(due))

    # -- what would change -------------------------------------------------------------------------------------

    async def plan(self, policy: TierPolicy, text: str = "") -> Plan:
        """Return what a policy (of this text, where it is a file's) says of every worker; other work goes on."""
        rows = [await self._change(policy, worker) async for worker in self._workers(policy)]
        return Plan(rows, choice_of(policy, text).word)

    async def _workers(self, policy: TierPolicy) -> AsyncIterator[Worker]:
        """Yield every worker, for each of which the policy has been asked."""
        workers, worker_ids = self._pool.fleet.workers, sorted(self._pool.fleet.workers)
        for start in range(0, len(worker_ids), AT_ONCE):
            await asyncio.sleep(0)
            some = [workers[one] for one in worker_ids[start : start + AT_ONCE] if one in workers]
            await self.tiers.prepare((asked_of(worker) for worker in some), policy)
            for worker in some:
                yield worker

    async def _change(self, policy: TierPolicy, worker: Worker) -> Change:
        decision = await self._decision(policy, worker)
        return Change(
            worker.id, worker.brief.tier, decision.tier, decision.reason, isinstance(decision, NoDecision),
            isinstance(decision, Pending), decision.prefers if decision.prefers != worker.brief.prefers else None,
        )  # fmt: skip

    async def _decision(self, policy: TierPolicy, worker: Worker) -> TierDecision:
        """Return what a policy says of a worker as it is now: one that changes meanwhile has a turn of its own."""
        asked = asked_of(worker)
        for _ in range(ASKED_AGAIN):
            decision = self.tiers.decide(asked, policy)
            if not isinstance(decision, Pending):
                return decision
            await self.tiers.prepare([asked], policy)
        return self.tiers.decide(asked, policy)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[set[str]]:
        """While a plan is made and written, note who is decided by the policy that was in force until then."""
        noted = set[str]()
        self.tiers.noting.append(noted)
        try:
            yield noted
        finally:
            self.tiers.noting = [one for one in self.tiers.noting if one is not noted]

    # -- putting in force, and back ----------------------------------------------------------------------------

    async def activate(self, name: str, text: str, steps: Steps, *, by: str, seen: str = "") -> Plan:
        """Put a policy in force: the one of that name, or of that text. Workers move as ``steps`` say.

        ``seen`` is the digest of the plan that whoever asks has seen. Raises NotFound, ValidationProblem, PlanChanged
        when that is another now, and Refused while others still move and for a policy that fails for many. However long
        a policy takes for its plan, what is in force is looked after and can be taken back meanwhile.
        """
        async with self._planning:
            self._refuse_moving()
            before = self.choices
            policy, kept = await self._choose(name, text)
            with self._noting() as noted:
                plan = await self.plan(policy, kept)
                if plan.pending:
                    words = f"{policy.name!r} has no answer yet for {len(plan.pending)} of {len(plan.rows)} workers"
                    raise Refused(words, hints=("it is still being asked: try again in a while",))
                if seen and seen != plan.digest:
                    words = "the fleet, or the policy, has changed since that preview"
                    raise PlanChanged(words, hints=("look at it once more",))
                _refuse_failing(policy, plan)
                choice = choice_of(policy, kept, at=self._pool.wall(), by=by)
                async with self._one:
                    self._refuse_moving()
                    if self.choices != before:
                        words = f"{self.tiers.active!r} was put in force while {name!r} was asked about the workers"
                        raise Refused(words, hints=("look at what it would change once more",))
                    words = f"{choice.words} is in force, {before[-1].words} was; workers that change: "
                    await self._begin(
                        (*before, choice), policy, steps, "policy_activated", f"{words}{len(plan.moves)}", by=by,
                        plan=plan, noted=noted,
                    )  # fmt: skip
            return plan

    def _refuse_moving(self) -> None:
        if self._start is not None or (self.rollout is not None and not self.rollout.stopped):
            hints = ("wait for it, or `rma policies rollback` first",)
            raise Refused(f"workers are still moving to {self.tiers.active!r}", hints=hints)

    async def _choose(self, name: str, text: str) -> tuple[TierPolicy, str]:
        """Return a policy and its text. Raises NotFound, ValidationProblem."""
        if text:
            # A long one takes its time.
            return await asyncio.to_thread(read_policy, text, name=name, subject="the policy"), text
        known = self.tiers.find(name)
        return known.policy, known.text

    async def rollback(self, *, by: str, active: str = "") -> Plan:
        """Put the policy in force again that was before, for all at once.

        ``active`` is the one that whoever asks believes in force. Raises Refused where that is another, and where none
        was before it.
        """
        async with self._one:
            if active and active != self.tiers.active:
                hints = ("see `rma policies`",)
                raise Refused(f"{self.tiers.active!r} is in force now, not {active!r}", hints=hints)
            return await self._back(by=by)

    async def _back(self, *, by: str, why: str = "") -> Plan:
        if len(self.choices) < 2:  # noqa: PLR2004 - the one in force and one before
            raise Refused(f"{self.tiers.active!r} is in force, and nothing was before it")
        choices = self._usable(self.choices[:-1])
        policy = self._policy(choices[-1])
        assert policy is not None  # noqa: S101 - `_usable` has looked
        with self._noting() as noted:
            plan = await self.plan(policy)
            words = f"back to {choices[-1].words} from {self.choices[-1].words}; workers that change: {len(plan.moves)}"
            words += f": {why}" if why else ""
            await self._begin(choices, policy, Steps(), "policy_rolled_back", words, by=by, plan=plan, noted=noted)
        self._start = None
        return plan

    async def _begin(
        self,
        choices: tuple[Choice, ...],
        policy: TierPolicy,
        steps: Steps,
        action: str,
        words: str,
        *,
        by: str,
        plan: Plan,
        noted: set[str],
        moved: int = 0,
        stopped: str = "",
    ) -> None:
        """Put the last of the choices in force and let workers move to it; on disk before anyone moves."""
        total = moved + len(plan.moves)
        await self._commit(
            action, words, by=by, choices=choices[-MOST_BACK:], steps=steps, total=total, stopped=stopped
        )
        # Who came or was asked meanwhile was decided by the policy before.
        late = self._pool.fleet.workers.keys() - {row.worker_id for row in plan.rows}
        late |= noted & self._pool.fleet.workers.keys()
        # For whom it fails keeps the tier, and is told so when its turn comes.
        late |= {row.worker_id for row in plan.rows if row.failed} & self._pool.fleet.workers.keys()
        waiting = [*(row.worker_id for row in plan.moves), *sorted(late)]
        self.rollout = Rollout(steps, waiting, now=self._pool.clock(), pulse=self._pulse(), moved=moved)
        self.rollout.stopped = stopped
        self.tiers.use(policy, waiting=self.rollout.waiting)
        self._in_force = choices[-1], policy
        self._wake.set()

    async def _commit(self, action: str, words: str, *, by: str, **changed: object) -> None:
        """Write the record with what has changed in it, and what is said of that in the audit; then keep both."""
        base = self._record or PolicyRecord(wanted=self._own().digest, choices=self.choices)
        record = msgspec.structs.replace(base, wanted=self._own().digest, **changed)
        try:
            await self.enter(action, words, by=by, more=[Put(KEY, record)])
        except BaseException:
            # It may be kept all the same, and the next start would go by it.
            self._unsure = True
            raise
        self._unsure = False
        self._record = record
        logger.info("tier policy: %s", words, extra={"action": action})

    async def rescanned(self, words: str, *, by: str) -> None:
        """Keep in the log and the audit who had plugins looked at, and what that has found. Raises StoreFailed."""
        words = f"plugins with policies were looked at: {words}"
        words = words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]}…"
        logger.info("%s (by %s)", words, by, extra={"action": "policy_rescanned"})
        last = self.audit.latest(1)
        if last and (last[0].action, last[0].message) == ("policy_rescanned", words):
            # Whoever looks again and again pushes nothing else out.
            return
        await self.enter("policy_rescanned", words, by=by)

    async def enter(self, action: str, words: str, *, by: str, more: Iterable[Put] = ()) -> None:
        """Write an entry of the audit together with what it speaks of, then show it. Raises StoreFailed."""
        async with self._writing:
            entry = self.audit.entry(action, words, by=by)
            await self._pool.store.commit([*more, *self.audit.changes(entry)])
            self.audit.keep(entry)

    async def _make_sure(self) -> None:
        """Write once more what counts here, after a commit of which nobody knows whether it is kept."""
        change = Put(KEY, self._record) if self._record else Delete(PolicyRecord, KEY)
        await self._pool.store.commit([change])
        self._unsure = False

    # -- in the shadow -----------------------------------------------------------------------------------------

    async def shadow(self, name: str, text: str, *, by: str) -> None:
        """Ask a policy beside the one in force from now on. Raises NotFound, ValidationProblem."""
        async with self._one:
            policy, kept = await self._choose(name, text)
            choice = choice_of(policy, kept, at=self._pool.wall(), by=by)
            words = f"{choice.words} is asked in the shadow of {self.tiers.active!r}"
            await self._commit("policy_shadow", words, by=by, shadow=choice)
            self.tiers.shadow = shadow = Shadow(policy, since=choice.at, wall=self._pool.wall)
        # However long it takes: nobody who wants to go back waits for this.
        await self._ask_shadow(shadow)

    async def end_shadow(self, *, by: str) -> None:
        """Ask it no more. Raises Refused where there is none."""
        async with self._one:
            if self.tiers.shadow is None:
                raise Refused("no policy is in the shadow")
            words = f"{self.tiers.shadow.policy.name!r} is asked no more"
            await self._commit("policy_shadow_ended", words, by=by, shadow=None)
            self.tiers.shadow = None

    async def _ask_shadow(self, shadow: Shadow) -> None:
        """Ask it about every worker that there is, as long as it is the one in the shadow."""
        async for worker in self._workers(shadow.policy):
            if self.tiers.shadow is not shadow:
                return
            decision = await self._decision(shadow.policy, worker)
            has, failed = worker.brief, isinstance(decision, NoDecision)
            shadow.compare(worker.id, has.tier, decision, failed=failed, prefers=has.prefers)

    # -- meanwhile ---------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Give workers their turns, and look whether it goes well. Runs until it is cancelled."""
        try:
            await self._keep()
        finally:
            if self._beside is not None:
                self._beside.cancel()
                await asyncio.gather(self._beside, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            if self._shadow_due and self.tiers.shadow is not None:
                self._shadow_due = False
                self._beside = asyncio.create_task(self._ask_shadow(self.tiers.shadow), name="the policy in the shadow")
                self._beside.add_done_callback(_tell_failure)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_S)
            self._wake.clear()
            try:
                async with self._one:
                    await self.tick()
            except RMAError as error:
                # A disk that takes nothing now: the next round tries again.
                logger.warning("the tier policy cannot go on now: %s", error, extra={"action": "policy"})
                await asyncio.sleep(TICK_S)
            except Exception:
                logger.exception("a round of moving workers failed")
                await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """Do what is due now."""
        if self._unsure:
            await self._make_sure()
        if self._start is not None:
            await self._first(self._start)
        failing = self.tiers.failing & self._pool.fleet.workers.keys()
        if failed_for_many(len(failing), len(self._pool.fleet.workers)) and len(self.choices) > 1:
            some = ", ".join(sorted(failing)[:NAMED])
            await self._back(by=ITSELF, why=f"it fails for {len(failing)} workers ({some})")
        rollout = self.rollout
        if rollout is None or rollout.stopped:
            return
        if rollout.waiting and (trouble := rollout.trouble(self._pulse())):
            await self._trouble(rollout, trouble)
            return
        await self._move(rollout, rollout.due(self._pool.clock()))
        if not rollout.waiting:
            await self._finish(rollout)

    async def _trouble(self, rollout: Rollout, trouble: str) -> None:
        if rollout.steps.on_trouble == "rollback" and len(self.choices) > 1:
            await self._back(by=ITSELF, why=trouble)
            return
        words = f"workers move no further to {self.tiers.active!r}: {trouble}"
        await self._commit("policy_stopped", words, by=ITSELF, stopped=trouble)
        rollout.stopped = trouble

    async def _move(self, rollout: Rollout, due: Iterable[str]) -> None:
        moving, workers = list(due), self._pool.fleet.workers
        for start in range(0, len(moving), AT_ONCE):
            some = moving[start : start + AT_ONCE]
            await asyncio.sleep(0)
            await self.tiers.prepare((asked_of(workers[one]) for one in some if one in workers), self.tiers.current)
            for worker_id in some:
                rollout.done(worker_id)
                if worker_id in workers:
                    self._pool.decide_again(workers[worker_id])

    async def _finish(self, rollout: Rollout) -> None:
        # Tiers are on disk before that is: a process that starts in between would not look at them again.
        await self._pool.write_workers()
        words = f"all workers have the tiers of {self.tiers.active!r}; changed: {rollout.moved}"
        await self._commit("policy_done", words, by=ITSELF, steps=None, total=0, stopped="")
        self.tiers.waiting = ()
        self.rollout = None

    def _pulse(self) -> Pulse:
        dispatcher = self._pool.dispatcher
        seats = [seat for seat in dispatcher.seats.values() if seat.usable]
        slots = sum(sum(seat.slots.values()) for seat in seats)
        busy = sum(len(seat.running) for seat in seats)
        return Pulse(dispatcher.succeeded, dispatcher.failed, max(0, slots - busy), slots)

    def show(self) -> dict[str, Any]:
        """Return how it stands, as JSON data."""
        chosen, rollout, shadow = self.choices[-1], self.rollout, self.tiers.shadow
        moving: dict[str, Any] | None = None
        if rollout is not None:
            moving = {"total": rollout.total, "moved": rollout.moved, "stopped": rollout.stopped}
            moving |= msgspec.to_builtins(rollout.steps)
        elif self._start is not None and self._record is not None and self._record.steps is not None:
            # They moved when the last process ended, and nobody has looked yet how far they are.
            moving = {"total": self._start.total, "moved": 0, "stopped": self._start.stopped}
            moving |= msgspec.to_builtins(self._start.steps)
        return {
            "version": chosen.version,
            "since": iso(chosen.at),
            "by": chosen.by,
            "previous": [choice.name for choice in reversed(self.choices[:-1])],
            "previous_versions": [choice.version for choice in reversed(self.choices[:-1])],
            "moving": moving,
            "shadow": shadow.policy.name if shadow else None,
        }


def asked_of(worker: Worker) -> PolicyInput:
    """Return what a policy is asked about a worker."""
    record = worker.record
    return PolicyInput(report=record.report, labels=record.labels, worker_id=worker.id)


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("%s failed", task.get_name(), exc_info=task.exception(), extra={"action": "bug"})


def _refuse_failing(policy: TierPolicy, plan: Plan) -> None:
    failed = plan.failed
    if failed_for_many(len(failed), len(plan.rows)):
        some = "; ".join(f"{row.worker_id}: {row.reason}" for row in failed[:NAMED])
        raise Refused(f"{policy.name!r} fails for {len(failed)} of {len(plan.rows)} workers: {some}")
