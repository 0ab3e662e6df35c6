"""The rules of placement that are in force, what others would change, and putting those in force on a live pool."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.census import NOBODY, NOTHING, Census
from rma_coordinator.domain.fleet import lanes_of
from rma_coordinator.domain.rules import NO_RULES, Rules, read_rules
from rma_coordinator.domain.worker_records import same
from rma_coordinator.effects import Capacity, Moved, capacity, image_sizes, moved
from rma_coordinator.store import Put
from rma_coordinator.switching import AT_ONCE
from rma_core.errors import PlanChanged, ValidationProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from rma_coordinator.domain.census import Standing
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.placement import Placement
    from rma_coordinator.domain.worker_records import WorkerRecord
    from rma_coordinator.pool import Pool
    from rma_core.catalog import CatalogEntry
    from rma_core.model_catalog import ModelEntry
    from rma_core.models.worker import Assignment

logger = logging.getLogger(__name__)

#: The key of the one record.
KEY = "rules"
#: How often all workers are looked at: what one gives up another may take.
ROUNDS = 5


class RulesRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The rules that were put in force: their text, when (Unix seconds) and by whom."""

    text: str = ""
    at: float = 0.0
    by: str = ""


class Arranged(NamedTuple):
    """What placement goes by: the rules, and catalog and models with as many copies wanted as they say."""

    rules: Rules
    entries: tuple[CatalogEntry, ...]
    catalog: dict[str, CatalogEntry]
    models: tuple[ModelEntry, ...]


class Draft(NamedTuple):
    """What rules would come to: who would run which lanes then, what of that is new, and every service.

    Nothing of a worker's record is kept: of a large fleet that would be as much as the coordinator has. ``sizes`` are
    those of images as they were known when it was begun.
    """

    arranged: Arranged
    lanes: dict[str, tuple[str, ...]]
    moves: dict[str, Moved]
    counts: Counter[str]
    census: Census
    stands: dict[str, Standing]
    capacity: list[Capacity]
    sizes: Mapping[str, int]

    @property
    def digest(self) -> str:
        """A word for exactly these moves: who saw a preview can say that nothing else is meant."""
        moves = [(worker_id, one.stops, one.starts) for worker_id, one in self.moves.items()]
        return hashlib.sha256(msgspec.json.encode([self.arranged.rules, moves])).hexdigest()[:16]


class Arranging:
    """The rules in force, over the catalog that the pool was given."""

    def __init__(self, pool: Pool, entries: Sequence[CatalogEntry], models: Sequence[ModelEntry]) -> None:
        self._pool = pool
        self._entries, self._models = tuple(entries), tuple(models)
        self.record = RulesRecord()
        self.now = self._arranged(NO_RULES)
        #: Why rules that were put in force are not; empty while they are.
        self.trouble = ""
        self._one, self._drafting = asyncio.Lock(), asyncio.Lock()
        #: A commit was given up and may be kept all the same.
        self._unsure = False

    def _arranged(self, rules: Rules) -> Arranged:
        entries = rules.entries(self._entries)
        catalog = {entry.service: entry for entry in reversed(entries)}
        return Arranged(rules, entries, catalog, rules.wanted_models(self._models))

    async def open(self) -> None:
        """Go on with the rules that were in force. What they name and the catalog has no more counts for nothing."""
        record = await self._pool.store.get(RulesRecord, KEY)
        if record is None:
            return
        self.record = record
        try:
            rules = read_rules(record.text)
        except ValidationProblem as error:
            self.trouble = str(error)
            words = "the rules of placement cannot be read any more, and none are in force: %s"
            logger.error(words, error, extra={"action": "rules_lost"})  # noqa: TRY400 - expected
            return
        self.now = self._arranged(rules)
        if unknown := rules.unknown(self._entries, self._models):
            words, about = "rules of placement name what the catalog does not have: %s", {"action": "rules_unknown"}
            logger.warning(words, ", ".join(unknown), extra=about)
        if rules.governing:
            # Who has what must be known before anyone is placed.
            fleet = self._pool.fleet
            counts = Counter(fleet.assigned())
            async for worker in self._workers():
                fleet.stand(worker, self._count(self.now, worker, counts).standing)

    # -- what would change -------------------------------------------------------------------------------------

    async def read(self, text: str) -> Rules:
        """Return the rules in a text, for this pool. Raises ValidationProblem, naming every problem with its line."""
        # A long one takes its time.
        return await asyncio.to_thread(read_rules, text, entries=self._entries, models=self._models)

    async def draft(self, rules: Rules) -> Draft:
        """Return what rules would come to, if nothing else changed; other work goes on meanwhile.

        First it is counted who has room for what. Then every worker is looked at, again and again until none changes.
        """
        # One at a time: each takes seconds of a large fleet.
        async with self._drafting:
            arranged, pool = self._arranged(rules), self._pool
            sizes = image_sizes(pool.fleet.workers.values())
            found = Draft(arranged, {}, {}, Counter(pool.fleet.assigned()), Census(), {}, [], sizes)
            before = pool.fleet.assigned()
            # As it is now: whoever is placed meanwhile is counted as something else.
            were = {worker.id: worker.counted for worker in pool.fleet.workers.values()}
            if rules.governing:
                async for worker in self._workers():
                    standing = self._count(arranged, worker, found.counts).standing
                    self._stand(found, worker, standing)
            for _ in range(ROUNDS):
                if not [worker.id async for worker in self._workers() if self._redraft(found, worker, were)]:
                    break
            models = arranged.models
            return found._replace(capacity=capacity(arranged.catalog, before, found.counts, models))

    def _redraft(self, found: Draft, worker: Worker, were: Mapping[str, tuple[str, ...]]) -> bool:
        """Choose a worker's services once more; say whether they are others than before."""
        record = worker.record
        known = found.lanes.get(worker.id)
        was = _lanes(record.assignment) if known is None else known
        counted = were.get(worker.id, ()) if known is None else _counted(known, worker)
        found.counts.subtract(counted)
        chosen = self._chosen(found, worker, record, was)
        now = found.lanes[worker.id] = same(_lanes(chosen.assignments))
        found.counts.update(_counted(now, worker))
        self._stand(found, worker, chosen.standing)
        moves = moved(record, chosen.assignments, found.sizes)
        if moves.stops or moves.starts:
            found.moves[worker.id] = moves
        else:
            found.moves.pop(worker.id, None)
        return now != was

    def _chosen(self, found: Draft, worker: Worker, record: WorkerRecord, current: tuple[str, ...]) -> Placement:
        """Choose a worker's services beside what all others have in a draft, which counts this one no more."""
        found.census.remove(found.stands.pop(worker.id, NOTHING))
        rules, census = found.arranged.rules, found.census
        ruling = self._pool.ruling(
            worker.id, record.labels, record.prefers, census, draining=worker.draining, rules=rules
        )
        return self._pool.placement(
            record, record.report, record.tier, worker_id=worker.id, current=current, counts=found.counts,
            arranged=found.arranged, ruling=ruling,
        )  # fmt: skip

    def _count(self, arranged: Arranged, worker: Worker, counts: Counter[str]) -> Placement:
        """Find out what a worker has and has room for, whatever others have."""
        record = worker.record
        ruling = self._pool.ruling(worker.id, record.labels, record.prefers, NOBODY, rules=arranged.rules)
        return self._pool.placement(
            record, record.report, record.tier, worker_id=worker.id, current=_lanes(record.assignment), counts=counts,
            arranged=arranged, ruling=ruling._replace(counted=True),
        )  # fmt: skip

    def _stand(self, found: Draft, worker: Worker, standing: Standing) -> None:
        stands = found.stands[worker.id] = same(self._pool.fleet.stands(worker, standing))
        found.census.add(stands)

    async def _workers(self) -> AsyncIterator[Worker]:
        """Yield every worker that counts; who is away is placed when it comes back."""
        workers = self._pool.fleet.workers
        for number, worker_id in enumerate(sorted(workers)):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            worker = workers.get(worker_id)
            if worker is not None and worker.present:
                yield worker

    # -- putting in force --------------------------------------------------------------------------------------

    async def apply(self, text: str, *, by: str, seen: str = "") -> Draft:
        """Put the rules in a text in force; no text is no rules. Workers learn of it with their next heartbeat.

        ``seen`` is the digest of the draft that whoever asks has seen. Raises ValidationProblem, and PlanChanged where
        it is another now.
        """
        async with self._one:
            rules = await self.read(text)
            draft = await self.draft(rules)
            if seen and seen != draft.digest:
                hints = ("look at it once more",)
                raise PlanChanged("the fleet, or the rules, have changed since that preview", hints=hints)
            record = RulesRecord(text=text, at=self._pool.wall(), by=by)
            what = "rules of placement are in force" if text else "no rules of placement are in force any more"
            await self._commit(record, f"{what}; workers whose services change: {len(draft.moves)}", by=by)
            self.record, self.now, self.trouble = record, draft.arranged, ""
            logger.info(
                "%s, by %s; workers that change: %d", what, by, len(draft.moves), extra={"action": "rules_applied"}
            )
            await self._give(draft)
            return draft

    async def _commit(self, record: RulesRecord, words: str, *, by: str) -> None:
        try:
            await self._pool.switching.enter("rules_applied", words, by=by, more=[Put(KEY, record)])
        except BaseException:
            # It may be kept all the same, and the next start would go by it.
            self._unsure = True
            raise
        self._unsure = False

    async def make_sure(self) -> None:
        """Write once more what counts here, after a commit of which nobody knows whether it is kept."""
        if self._unsure and not self._one.locked():
            async with self._one:
                await self._pool.store.commit([Put(KEY, self.record)])
                self._unsure = False

    async def _give(self, draft: Draft) -> None:
        """Give the workers what was drafted, each as it is now: of one something else may be known by now."""
        fleet, pool = self._pool.fleet, self._pool
        fleet.new_census()
        for worker_id, standing in draft.stands.items():
            if (worker := fleet.workers.get(worker_id)) is not None:
                fleet.stand(worker, standing)
        for number, (worker_id, lanes) in enumerate(draft.lanes.items()):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            worker = fleet.workers.get(worker_id)
            if worker is not None and worker.present:
                record = worker.record
                draft.counts.subtract(_counted(lanes, worker))
                chosen = self._chosen(draft, worker, record, lanes)
                draft.counts.update(_counted(_lanes(chosen.assignments), worker))
                self._stand(draft, worker, chosen.standing)
                pool.give(worker, record, chosen)


def _lanes(assignments: Iterable[Assignment]) -> tuple[str, ...]:
    return tuple(one.lane for one in assignments)


def _counted(lanes: Iterable[str], worker: Worker) -> tuple[str, ...]:
    """Return what a worker with these lanes counts for, as `lanes_of` has it."""
    own = lanes_of((), worker.containers)
    return tuple(part for one in lanes for part in ([one.partition(" ")[0], one] if " " in one else [one])) + own
