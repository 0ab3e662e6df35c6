"""What another tier policy would mean beside tiers: containers that stop and start, what must come, what is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.fleet import lanes_of
from rma_coordinator.switching import AT_ONCE

if TYPE_CHECKING:
    from rma_coordinator.choices import Plan
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.pool import Pool
    from rma_core.models.worker import Assignment


class Moved(NamedTuple):
    """What one worker would stop and start (a service, or a service with its model), and have to fetch."""

    stops: tuple[str, ...]
    starts: tuple[str, ...]
    images: int
    model_bytes: int


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of a service: those that the pool wants, has now, and would have; ``short`` where it would lack some."""

    service: str
    wanted: int
    now: int
    then: int

    @property
    def short(self) -> bool:
        """Whether it would have fewer than it wants, and fewer than it has."""
        return self.then < min(self.wanted, self.now)


class Effects(NamedTuple):
    """By worker what it would do, and every service."""

    moved: dict[str, Moved]
    capacity: list[Capacity]


async def effects(pool: Pool, plan: Plan) -> Effects:
    """Place every worker that would change as if its turn had come, one after the other; other work goes on meanwhile.

    Placement looks at what the pool has, so this is what would come of it if nothing else changed.
    """
    counts, moved = Counter(pool.fleet.assigned()), dict[str, Moved]()
    for number, row in enumerate(plan.moves):
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
        worker = pool.fleet.workers.get(row.worker_id)
        if worker is not None:
            moved[worker.id] = _move(pool, worker, row.new_tier, counts)
    now = pool.fleet.assigned()
    capacity = [
        Capacity(service=name, wanted=entry.wanted, now=now.get(name, 0), then=counts.get(name, 0))
        for name, entry in sorted(pool.catalog.items())
    ]
    return Effects(moved, capacity)


def _move(pool: Pool, worker: Worker, tier: int | None, counts: Counter[str]) -> Moved:
    """Return what a worker would do in that tier, and count it so."""
    record = worker.record
    counts.subtract(worker.counted)
    chosen = pool.placement(record, record.report, tier, worker_id=worker.id, counts=counts).assignments
    if worker.present:
        counts.update(lanes_of(chosen, worker.containers))
    now, then = _by_lane(record.assignment), _by_lane(chosen)
    new = [then[lane] for lane in then if lane not in now]
    return Moved(
        stops=tuple(lane for lane in now if lane not in then),
        starts=tuple(one.lane for one in new),
        images=len({one.image for one in new} - {one.image for one in record.assignment}),
        model_bytes=sum(one.model.size_bytes for one in new if one.model and one.model.name not in record.own_models),
    )


def _by_lane(assignments: tuple[Assignment, ...]) -> dict[str, Assignment]:
    return {one.lane: one for one in assignments}
