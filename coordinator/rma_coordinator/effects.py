"""What another tier policy would mean beside tiers: containers that stop and start, what must come, what is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.census import NOTHING, Census
from rma_coordinator.domain.fleet import lanes_of
from rma_coordinator.domain.placement import runs_containers
from rma_coordinator.switching import AT_ONCE
from rma_core.models.worker import lane

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from rma_coordinator.choices import Change, Plan
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.worker_records import WorkerRecord
    from rma_coordinator.pool import Pool
    from rma_core.catalog import CatalogEntry
    from rma_core.model_catalog import ModelEntry
    from rma_core.models.worker import Assignment


#: What of a `Moved` is fetched.
FETCHED = ("images", "image_bytes", "images_unknown", "model_bytes")


class Moved(NamedTuple):
    """What one worker would stop and start (a service, or a service with its model), and have to fetch.

    ``image_bytes`` is what those of its ``images`` take whose size is known, and ``images_unknown`` counts the others.
    """

    stops: tuple[str, ...]
    starts: tuple[str, ...]
    images: int
    image_bytes: int
    images_unknown: int
    model_bytes: int


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of a service, or of one of its models: wanted, now and then; ``short`` where some would be lacking."""

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
    counts, moves, census = Counter(pool.fleet.assigned()), dict[str, Moved](), Census()
    sizes = image_sizes(pool.fleet.workers.values())
    # As it is now: whoever is placed meanwhile is counted as something else.
    were = {one.id: (one.counted, one.stood) for one in pool.fleet.workers.values()}
    for _, stood in were.values():
        census.add(stood)
    for number, row in enumerate(plan.moves):
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
        worker = pool.fleet.workers.get(row.worker_id)
        if worker is not None:
            counted, stood = were.get(worker.id, ((), NOTHING))
            counts.subtract(counted)
            census.remove(stood)
            moves[worker.id] = _move(pool, worker, row, counts, census, sizes=sizes)
    return Effects(moves, capacity(pool.catalog, pool.fleet.assigned(), counts, pool.model_entries))


def image_sizes(workers: Iterable[Worker]) -> dict[str, int]:
    """Return what images take, unpacked, in bytes by name, as workers that are present tell of what they run.

    Each has one say about an image, and the median counts, the lower of two: who lies alone moves it little.
    """
    told: dict[str, list[int]] = {}
    for worker in workers:
        if worker.present:
            for image, size in _told(worker).items():
                told.setdefault(image, []).append(size)
    return {image: sorted(sizes)[(len(sizes) - 1) // 2] for image, sizes in told.items()}


def _told(worker: Worker) -> dict[str, int]:
    images = {one.name: one.image for one in worker.brief.assignment}
    return {images[one.name]: one.image_bytes for one in worker.containers if one.image_bytes and one.name in images}


def capacity(
    catalog: Mapping[str, CatalogEntry],
    now: Mapping[str, int],
    then: Mapping[str, int],
    models: Iterable[ModelEntry] = (),
) -> list[Capacity]:
    """Return every service, with its copies now and then, and the ``models`` of which there would be more or fewer."""
    wanted = [(name, entry.wanted) for name, entry in sorted(catalog.items())]
    of_models = sorted((lane(entry.service, entry.name), entry.wanted) for entry in models)
    wanted += [(name, count) for name, count in of_models if now.get(name, 0) != then.get(name, 0)]
    return [
        Capacity(service=name, wanted=count, now=now.get(name, 0), then=then.get(name, 0)) for name, count in wanted
    ]


def _move(
    pool: Pool, worker: Worker, row: Change, counts: Counter[str], census: Census, *, sizes: Mapping[str, int]
) -> Moved:
    """Return what a worker would do as a policy says of it, and count it so."""
    record = worker.record
    prefers = record.prefers if row.prefers is None else row.prefers
    ruling = pool.ruling(worker.id, record.labels, prefers, census, draining=worker.draining)
    chosen = pool.placement(record, record.report, row.new_tier, worker_id=worker.id, counts=counts, ruling=ruling)
    if worker.present:
        counts.update(lanes_of(chosen.assignments, worker.containers))
        census.add(pool.fleet.stands(worker, chosen.standing))
    return moved(record, chosen.assignments, sizes)


def moved(record: WorkerRecord, chosen: tuple[Assignment, ...], sizes: Mapping[str, int]) -> Moved:
    """Return what a worker with this record would do to run what was chosen; ``sizes`` are those of `image_sizes`."""
    now, then = _by_lane(record.assignment), _by_lane(chosen)
    new = [then[lane] for lane in then if lane not in now]
    # What runs as a plain process is no image.
    images = {one.image for one in new} if runs_containers(record.runtimes) else set()
    images -= {one.image for one in record.assignment}
    return Moved(
        stops=tuple(lane for lane in now if lane not in then),
        starts=tuple(one.lane for one in new),
        images=len(images),
        image_bytes=sum(sizes.get(image, 0) for image in images),
        images_unknown=len(images - sizes.keys()),
        model_bytes=sum(one.model.size_bytes for one in new if one.model and one.model.name not in record.own_models),
    )


def fetched(moves: Collection[Moved]) -> dict[str, int]:
    """Return what all of them together would have to fetch."""
    return {part: sum(getattr(one, part) for one in moves) for part in FETCHED}


def _by_lane(assignments: tuple[Assignment, ...]) -> dict[str, Assignment]:
    return {one.lane: one for one in assignments}
