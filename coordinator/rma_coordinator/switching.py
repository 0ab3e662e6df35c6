"""Swapping the tier policy of a live pool: what would change, step by step, back again, and on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.audit import ITSELF, Audit, AuditEntry
from rma_coordinator.domain.fleet import iso
from rma_coordinator.domain.rollout import Pulse, Rollout, Steps
from rma_coordinator.store import Put
from rma_coordinator.tiers import NoDecision, failed_for_many
from rma_core.errors import Refused, RMAError
from rma_core.interfaces import PolicyInput
from rma_core.policy_file import read_policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.pool import Pool
    from rma_core.interfaces import TierPolicy

logger = logging.getLogger(__name__)

#: How often turns are given and the pool is looked at.
TICK_S = 0.5
#: Workers that are decided or moved before anyone else gets a word in.
AT_ONCE = 10
#: Policies that a pool can go back through.
MOST_BACK = 20
#: The key of the one record.
KEY = "policy"
#: Workers that are named where a policy fails.
NAMED = 3


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that was put in force: its name, its text where it is a file's, when (Unix seconds) and by whom."""

    name: str
    text: str = ""
    at: float = 0.0
    by: str = ""


class PolicyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was put in force, oldest first; ``wanted`` is what the settings said then, ``steps`` while workers move."""

    wanted: str
    choices: tuple[Choice, ...]
    steps: Steps | None = None
    #: Why they move no further.
    stopped: str = ""


class Change(NamedTuple):
    """What a policy says of one worker, beside what is."""

    worker_id: str
    tier: int | None
    new_tier: int | None
    reason: str
    failed: bool

    @property
    def changes(self) -> bool:
        """Whether its tier would be another; one for which the policy fails stays where it is."""
        return not self.failed and self.tier != self.new_tier


class Plan(NamedTuple):
    """What a policy says of the whole fleet, by worker."""

    rows: list[Change]

    @property
    def moves(self) -> list[Change]:
        """Those that would change."""
        return [row for row in self.rows if row.changes]

    @property
    def failed(self) -> list[Change]:
        """Those for which the policy fails."""
        return [row for row in self.rows if row.failed]

    @property
    def digest(self) -> str:
        """A word for exactly these moves: who saw a preview can say that nothing else is meant."""
        moves = [(row.worker_id, row.tier, row.new_tier) for row in self.moves]
        return hashlib.sha256(msgspec.json.encode(moves)).hexdigest()[:16]


class Switching:
    """The policy in force, those before it, and workers on their way to it."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self.tiers = pool, pool.tiers
        self.audit = Audit(pool.wall)
        self.choices: tuple[Choice, ...] = ()
        self.rollout: Rollout | None = None
        self._one = asyncio.Lock()
        self._wake = asyncio.Event()

    # -- after a start -----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Go on where the last process was. What was put in force counts until the settings name another policy."""
        pool = self._pool
        self.audit.restore(await pool.store.load(AuditEntry))
        found = await pool.store.get(PolicyRecord, KEY)
        if found is None:
            self.choices = (Choice(name=self.tiers.wanted),)
            return
        if found.wanted != self.tiers.wanted:
            choice = Choice(name=self.tiers.wanted, at=pool.wall(), by=ITSELF)
            words = f"the settings name {self.tiers.wanted!r} now, which is in force"
            await self._begin((*found.choices, choice), Steps(), "policy_set", words, by=ITSELF)
            return
        choices, policy = self._usable(found.choices)
        if len(choices) < len(found.choices):
            lost, kept = found.choices[-1].name, choices[-1].name
            words = f"{lost!r} is not there any more: {kept!r} is in force again"
            await self._begin(choices, Steps(), "policy_lost", words, by=ITSELF)
        elif found.steps is None:
            self.choices = choices
            self.tiers.use(policy)
        elif found.steps.on_restart == "rollback" and len(choices) > 1:
            words = f"the coordinator was restarted while workers moved to {choices[-1].name!r}: back to "
            words += f"{choices[-2].name!r}, as was asked for"
            await self._begin(choices[:-1], Steps(), "policy_rolled_back", words, by=ITSELF)
        else:
            words = f"the coordinator was restarted while workers moved to {choices[-1].name!r}: it goes on"
            await self._begin(choices, found.steps, "policy_goes_on", words, by=ITSELF, stopped=found.stopped)

    def _usable(self, choices: tuple[Choice, ...]) -> tuple[tuple[Choice, ...], TierPolicy]:
        """Return the choices up to the last one whose policy is still there; else the settings' own."""
        for end in range(len(choices), 0, -1):
            policy = self._policy(choices[end - 1])
            if policy is not None:
                return choices[:end], policy
        wanted = Choice(name=self.tiers.wanted)
        return (wanted,), self.tiers.known[wanted.name].policy

    def _policy(self, choice: Choice) -> TierPolicy | None:
        try:
            if choice.text:
                return read_policy(choice.text, name=choice.name, subject=choice.name)
        except RMAError as error:
            logger.warning("the tier policy %s cannot be read any more: %s", choice.name, error)
            return None
        known = self.tiers.known.get(choice.name)
        return known.policy if known else None

    # -- what would change -------------------------------------------------------------------------------------

    async def plan(self, policy: TierPolicy) -> Plan:
        """Return what a policy says of every worker; other work goes on meanwhile."""
        rows = [self._change(policy, worker) async for worker in self._workers()]
        return Plan(rows)

    async def _workers(self) -> AsyncIterator[Worker]:
        for number, worker_id in enumerate(sorted(self._pool.fleet.workers)):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            worker = self._pool.fleet.workers.get(worker_id)
            if worker is not None:
                yield worker

    def _change(self, policy: TierPolicy, worker: Worker) -> Change:
        record = worker.record
        asked = PolicyInput(report=record.report, labels=record.labels, worker_id=worker.id)
        decision = self.tiers.decide(asked, policy)
        return Change(worker.id, record.tier, decision.tier, decision.reason, isinstance(decision, NoDecision))

    # -- putting in force, and back ----------------------------------------------------------------------------

    async def activate(self, name: str, text: str, steps: Steps, *, by: str, seen: str = "") -> Plan:
        """Put a policy in force: the one of that name, or of that text. Workers move as ``steps`` say.

        ``seen`` is the digest of the plan that whoever asks has seen. Raises NotFound, ValidationProblem, and Refused
        while others still move, when the plan is another now, and for a policy that fails for many.
        """
        async with self._one:
            if self.rollout is not None and not self.rollout.stopped:
                hints = ("wait for it, or `rma policies rollback` first",)
                raise Refused(f"workers are still moving to {self.tiers.active!r}", hints=hints)
            known = self.tiers.find(name) if not text else None
            policy = known.policy if known else read_policy(text, name=name, subject="the policy")
            plan = await self.plan(policy)
            if seen and seen != plan.digest:
                raise Refused("the fleet has changed since that preview", hints=("look at it once more",))
            _refuse_failing(policy, plan)
            kept = known.text if known else text
            choice = Choice(name=policy.name, text=kept, at=self._pool.wall(), by=by)
            words = f"{policy.name!r} is in force, {self.tiers.active!r} was; workers that change: {len(plan.moves)}"
            await self._begin((*self.choices, choice), steps, "policy_activated", words, by=by, plan=plan)
            return plan

    async def rollback(self, *, by: str, why: str = "") -> Plan:
        """Put the policy in force again that was before, for all at once. Raises Refused where there is none."""
        async with self._one:
            return await self._back(by=by, why=why)

    async def _back(self, *, by: str, why: str = "") -> Plan:
        if len(self.choices) < 2:  # noqa: PLR2004 - the one in force and one before
            raise Refused(f"{self.tiers.active!r} is in force, and nothing was before it")
        choices, policy = self._usable(self.choices[:-1])
        plan = await self.plan(policy)
        words = f"back to {policy.name!r} from {self.tiers.active!r}; workers that change: {len(plan.moves)}"
        words += f": {why}" if why else ""
        await self._begin(choices, Steps(), "policy_rolled_back", words, by=by, plan=plan)
        return plan

    async def _begin(
        self,
        choices: tuple[Choice, ...],
        steps: Steps,
        action: str,
        words: str,
        *,
        by: str,
        plan: Plan | None = None,
        stopped: str = "",
    ) -> None:
        """Put the last of the choices in force and let workers move to it; on disk before anyone moves."""
        choices = choices[-MOST_BACK:]
        policy = self._policy(choices[-1])
        assert policy is not None  # noqa: S101 - whoever chose it has looked
        plan = plan or await self.plan(policy)
        moves = dict.fromkeys(row.worker_id for row in plan.moves)
        await self._commit(choices, steps, action, words, by=by, stopped=stopped)
        # Who came meanwhile was decided by the policy before.
        late = self._pool.fleet.workers.keys() - {row.worker_id for row in plan.rows}
        self.rollout = Rollout(steps, [*moves, *sorted(late)], now=self._pool.clock(), pulse=self._pulse())
        self.rollout.stopped = stopped
        self.tiers.use(policy, before=self.tiers.current, waiting=self.rollout.waiting)
        self._wake.set()

    async def _commit(
        self,
        choices: tuple[Choice, ...],
        steps: Steps | None,
        action: str,
        words: str,
        *,
        by: str,
        stopped: str = "",
    ) -> None:
        entry = self.audit.entry(action, words, by=by)
        record = PolicyRecord(wanted=self.tiers.wanted, choices=choices, steps=steps, stopped=stopped)
        await self._pool.store.commit([Put(KEY, record), *self.audit.changes(entry)])
        self.audit.keep(entry)
        self.choices = choices
        logger.info("tier policy: %s", words, extra={"action": action})

    # -- meanwhile ---------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Give workers their turns, and look whether it goes well. Runs until it is cancelled."""
        while True:
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
        failing = self.tiers.failing & self._pool.fleet.workers.keys()
        if failed_for_many(len(failing), len(self._pool.fleet.workers)) and len(self.choices) > 1:
            some = ", ".join(sorted(failing)[:NAMED])
            await self._back(by=ITSELF, why=f"it fails for {len(failing)} workers ({some})")
        rollout = self.rollout
        if rollout is None:
            return
        if rollout.stopped:
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
        await self._commit(self.choices, rollout.steps, "policy_stopped", words, by=ITSELF, stopped=trouble)
        rollout.stopped = trouble

    async def _move(self, rollout: Rollout, due: Iterable[str]) -> None:
        for number, worker_id in enumerate(due):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            rollout.done(worker_id)
            worker = self._pool.fleet.workers.get(worker_id)
            if worker is not None:
                self._pool.decide_again(worker)

    async def _finish(self, rollout: Rollout) -> None:
        # Tiers are on disk before that is: a process that starts in between would not look at them again.
        await self._pool.flush()
        words = f"all workers have the tiers of {self.tiers.active!r}; changed: {rollout.moved}"
        await self._commit(self.choices, None, "policy_done", words, by=ITSELF)
        self.tiers.before, self.tiers.waiting = None, ()
        self.rollout = None

    def _pulse(self) -> Pulse:
        dispatcher = self._pool.dispatcher
        seats = [seat for seat in dispatcher.seats.values() if seat.usable]
        slots = sum(sum(seat.slots.values()) for seat in seats)
        busy = sum(len(seat.running) for seat in seats)
        return Pulse(dispatcher.succeeded, dispatcher.failed, max(0, slots - busy), slots)

    def show(self) -> dict[str, Any]:
        """Return how it stands, as JSON data."""
        chosen, rollout = self.choices[-1], self.rollout
        moving = None
        if rollout is not None:
            moving = {
                "total": rollout.total,
                "moved": rollout.moved,
                "stopped": rollout.stopped,
                **msgspec.to_builtins(rollout.steps),
            }
        return {
            "since": iso(chosen.at),
            "by": chosen.by,
            "previous": [choice.name for choice in reversed(self.choices[:-1])],
            "moving": moving,
        }


def _refuse_failing(policy: TierPolicy, plan: Plan) -> None:
    failed = plan.failed
    if failed_for_many(len(failed), len(plan.rows)):
        some = "; ".join(f"{row.worker_id}: {row.reason}" for row in failed[:NAMED])
        raise Refused(f"{policy.name!r} fails for {len(failed)} of {len(plan.rows)} workers: {some}")
