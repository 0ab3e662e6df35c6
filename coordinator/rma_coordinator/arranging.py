"""The rules of placement that are in force, what others would change, and putting those in force on a live pool."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.census import NOTHING, Census
from rma_coordinator.domain.fleet import lanes_of
from rma_coordinator.domain.rules import NO_RULES, Rules, read_rules
from rma_coordinator.effects import Capacity, Moved, capacity, moved
from rma_coordinator.store import Put
from rma_coordinator.switching import AT_ONCE
from rma_core.errors import Refused, ValidationProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rma_coordinator.domain.census import Standing
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.placement import Placement
    from rma_coordinator.domain.worker_records import WorkerRecord
    from rma_coordinator.pool import Pool
    from rma_core.catalog import CatalogEntry
    from rma_core.model_catalog import ModelEntry

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


class _Draft(NamedTuple):
    """What one worker would run, chosen for its record as it was then."""

    record: WorkerRecord
    chosen: Placement


class Draft(NamedTuple):
    """What rules would come to: by worker what it would run, and every service."""

    arranged: Arranged
    workers: dict[str, _Draft]
    moves: dict[str, Moved]
    capacity: list[Capacity]

    @property
    def digest(self) -> str:
        """A word for exactly these moves: who saw a preview can say that nothing else is meant."""
        moves = [(worker_id, one.stops, one.starts) for worker_id, one in self.moves.items()]
        rules = msgspec.json.encode([self.arranged.rules, moves])
        return hashlib.sha256(rules).hexdigest()[:16]


class Arranging:
    """The rules in force, over the catalog that the pool was given."""

    def __init__(self, pool: Pool, entries: Sequence[CatalogEntry], models: Sequence[ModelEntry]) -> None:
        self._pool = pool
        self._entries, self._models = tuple(entries), tuple(models)
        self.record = RulesRecord()
        self.now = self._arranged(NO_RULES)
        #: Why rules that were put in force are not; empty while they are.
        self.trouble = ""
        self._one = asyncio.Lock()

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
            async for worker, record_now in self._workers():
                counted = self._place(self.now, record_now, _lanes(record_now), Counter(), fleet.census, counted=True)
                fleet.stand(worker, counted.standing)

    # -- what would change -------------------------------------------------------------------------------------

    async def read(self, text: str) -> Rules:
        """Return the rules in a text, for this pool. Raises ValidationProblem, naming every problem with its line."""
        # A long one takes its time.
        return await asyncio.to_thread(read_rules, text, entries=self._entries, models=self._models)

    async def draft(self, rules: Rules) -> Draft:
        """Return what rules would come to, if nothing else changed; other work goes on meanwhile.

        First it is counted who has room for what. Then every worker is looked at, again and again until none changes.
        """
        arranged, pool = self._arranged(rules), self._pool
        counts, census = Counter(pool.fleet.assigned()), Census()
        stands: dict[str, Standing] = {}
        workers: dict[str, _Draft] = {}
        if rules.governing:
            async for worker, record in self._workers():
                chosen = self._place(arranged, record, _lanes(record), counts, census, counted=True)
                census.add(chosen.standing)
                stands[worker.id] = chosen.standing
        for _ in range(ROUNDS):
            changed = False
            async for worker, record in self._workers():
                known = workers.get(worker.id)
                current = known.chosen.assignments if known else record.assignment
                counts.subtract(lanes_of(current, worker.containers))
                census.remove(stands.get(worker.id, NOTHING))
                chosen = self._place(arranged, record, tuple(one.lane for one in current), counts, census)
                counts.update(lanes_of(chosen.assignments, worker.containers))
                census.add(chosen.standing)
                stands[worker.id] = chosen.standing
                workers[worker.id] = _Draft(record, chosen)
                changed |= chosen.assignments != current
            if not changed:
                break
        moves = {
            worker_id: moved(one.record, one.chosen.assignments)
            for worker_id, one in workers.items()
            if one.chosen.assignments != one.record.assignment
        }
        return Draft(arranged, workers, moves, capacity(arranged.catalog, pool.fleet.assigned(), counts))

    async def _workers(self) -> AsyncIterator[tuple[Worker, WorkerRecord]]:
        """Yield every worker that counts, with its record; who is away is placed when it comes back."""
        workers = self._pool.fleet.workers
        for number, worker_id in enumerate(sorted(workers)):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            worker = workers.get(worker_id)
            if worker is not None and worker.present:
                yield worker, worker.record

    def _place(
        self,
        arranged: Arranged,
        record: WorkerRecord,
        current: Sequence[str],
        counts: Counter[str],
        census: Census,
        *,
        counted: bool = False,
    ) -> Placement:
        return self._pool.placement(
            record, record.report, record.tier, worker_id=record.worker_id, prefers=record.prefers, current=current,
            counts=counts, arranged=arranged, census=census, counted=counted,
        )  # fmt: skip

    # -- putting in force --------------------------------------------------------------------------------------

    async def apply(self, text: str, *, by: str, seen: str = "") -> Draft:
        """Put the rules in a text in force; no text is no rules. Workers learn of it with their next heartbeat.

        ``seen`` is the digest of the draft that whoever asks has seen. Raises ValidationProblem, and Refused where it
        is another now.
        """
        async with self._one:
            rules = await self.read(text)
            draft = await self.draft(rules)
            if seen and seen != draft.digest:
                hints = ("look at it once more",)
                raise Refused("the fleet, or the rules, have changed since that preview", hints=hints)
            record = RulesRecord(text=text, at=self._pool.wall(), by=by)
            audit = self._pool.switching.audit
            what = "rules of placement are in force" if text else "no rules of placement are in force any more"
            entry = audit.entry("rules_applied", f"{what}; workers whose services change: {len(draft.moves)}", by=by)
            await self._pool.store.commit([Put(KEY, record), *audit.changes(entry)])
            audit.keep(entry)
            self.record, self.now, self.trouble = record, draft.arranged, ""
            logger.info("%s by %s: %s", what, by, len(draft.moves), extra={"action": "rules_applied"})
            await self._give(draft)
            return draft

    async def _give(self, draft: Draft) -> None:
        """Give the workers what was drafted; who has changed since is placed by the new rules."""
        fleet, pool = self._pool.fleet, self._pool
        pool.look_at_all_again()
        fleet.new_census()
        for worker_id, one in draft.workers.items():
            if (worker := fleet.workers.get(worker_id)) is not None:
                fleet.stand(worker, one.chosen.standing)
        for number, (worker_id, one) in enumerate(draft.workers.items()):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            worker = fleet.workers.get(worker_id)
            if worker is None:
                continue
            record = worker.record
            same = (record.report, record.tier, record.prefers, record.generation, record.runtimes) == (
                one.record.report, one.record.tier, one.record.prefers, one.record.generation, one.record.runtimes,
            )  # fmt: skip
            if same and worker.present:
                pool.give(worker, record, one.chosen)
            else:
                pool.place(worker)


def _lanes(record: WorkerRecord) -> tuple[str, ...]:
    return tuple(one.lane for one in record.assignment)
