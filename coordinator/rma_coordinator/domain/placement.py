"""Placement: which services of the catalog one machine gets, and why it does not get the others. Pure.

A tier is a ranking, not a fence: what prefers the machine's tier comes first, then whatever the pool lacks. What is
chosen fits the machine together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.worker_records import same
from rma_core.catalog import ISOLATED_ONLY, Room
from rma_core.models.worker import Assignment

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from rma_coordinator.domain.worker_records import WorkerRecord
    from rma_core.catalog import CatalogEntry
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import RuntimeReport

#: Comes after every place in an entry's list of tiers, which has at most 32.
NOT_PREFERRED = 99


class Placement(NamedTuple):
    """What a worker should run, best reason first, and for each service it does not get a sentence that says why."""

    assignments: tuple[Assignment, ...]
    reasons: dict[str, str]


class _Wish(NamedTuple):
    """What bears on one machine's placement beside the machine itself."""

    tier: int
    pool: Mapping[str, int]
    allowed: Collection[str] | None
    runtimes: Collection[RuntimeReport]
    current: Collection[str]


def place(
    entries: Iterable[CatalogEntry],
    report: HardwareReport,
    tier: int | None,
    *,
    pool: Mapping[str, int],
    allowed: Collection[str] | None = None,
    runtimes: Collection[RuntimeReport] = (),
    current: Collection[str] = (),
    env: Mapping[str, str] | None = None,
) -> Placement:
    """Choose services for one machine; the order of ``entries`` does not matter.

    ``pool`` counts the copies of each service on *other* workers; ``allowed`` are the services the owner agreed to
    (``None``: all); ``runtimes`` is what the agent said of its runtimes (empty: it said nothing, and containers are
    taken for granted); ``current`` are the services the worker runs: they stay as long as they fit, so that nothing
    flaps (leave them out to place anew, as after a change of tier). ``env`` goes into every container.
    """
    if tier is None:
        return Placement((), {entry.service: "the machine is below the lowest tier" for entry in entries})
    wish = _Wish(tier, pool, allowed, runtimes, current)
    room, chosen, reasons = Room.of(report), [], dict[str, str]()
    for entry in sorted(entries, key=lambda entry: _rank(entry, wish)):
        reason = _refusal(entry, wish) or _take(entry, room, runtimes)
        if reason:
            reasons[entry.service] = reason
        else:
            chosen.append(assignment(entry, env=env or {}))
    return Placement(tuple(chosen), reasons)


def could_run(entries: Iterable[CatalogEntry], machine: WorkerRecord) -> frozenset[str]:
    """Return the services that a machine could run if it ran nothing else.

    What is installed there might work again, and its owner might agree: neither is asked.
    """
    if machine.tier is None:
        return same(frozenset())
    installed = [one for one in machine.runtimes if one.state != "undetected"]
    runtimes = [msgspec.structs.replace(one, state="healthy") for one in installed] or machine.runtimes
    room = Room.of(machine.report)
    found = frozenset(
        entry.service
        for entry in entries
        if any(not room.lacks(entry.needs, contained=contained) for contained in _forms(entry, runtimes))
    )
    return same(found)


def assignment(entry: CatalogEntry, *, env: Mapping[str, str]) -> Assignment:
    """Return a catalog entry as it is sent to a worker; ``env`` is the pool's and wins over the catalog's."""
    return Assignment(
        name=entry.name,
        service=entry.service,
        image=entry.image,
        image_digest=entry.image_digest,
        port=entry.port,
        requires_gpu=entry.needs.gpu,
        env={**entry.env, **env},
        health_path=entry.health_path,
        start_timeout_s=entry.start_timeout_s,
        routes=entry.routes,
        slots=entry.slots,
        needs=entry.needs,
        limits=entry.limits,
        process=entry.process,
        trusted=entry.trusted,
    )


def _rank(entry: CatalogEntry, wish: _Wish) -> tuple[bool, int, bool, int, str]:
    """Order: what runs already; what prefers this tier most; what nobody offers; what is lacked most; by name.

    Among what runs already the pool's needs do not count: they change all the time, and nothing may flap for them.
    """
    position = entry.tiers.index(wish.tier) if wish.tier in entry.tiers else NOT_PREFERRED
    if entry.service in wish.current:
        return (False, position, False, 0, entry.service)
    running = wish.pool.get(entry.service, 0)
    return (True, position, running > 0, running - entry.wanted, entry.service)


def _refusal(entry: CatalogEntry, wish: _Wish) -> str:
    """Say why the machine does not get a service, whatever room there is; an empty string when nothing does."""
    if wish.allowed is not None and entry.service not in wish.allowed:
        return "the owner has not agreed"
    if not _forms(entry, wish.runtimes):
        return _no_runtime(entry, wish.runtimes)
    running = wish.pool.get(entry.service, 0)
    extra = wish.tier not in entry.tiers and entry.service not in wish.current
    if extra and running >= entry.wanted:
        return f"enough copies in the pool ({running} running, {entry.wanted} wanted)"
    return ""


def _take(entry: CatalogEntry, room: Room, runtimes: Collection[RuntimeReport]) -> str:
    """Take what a service needs, as a container where that is possible; say why when it does not fit."""
    reasons = []
    for contained in _forms(entry, runtimes):
        reason = room.lacks(entry.needs, contained=contained)
        if not reason:
            room.take(entry.needs, contained=contained)
            return ""
        reasons.append(reason)
    return reasons[0]


def _forms(entry: CatalogEntry, runtimes: Collection[RuntimeReport]) -> list[bool]:
    """Return how the service can run here: ``True`` as a container, ``False`` as a process."""
    usable = [runtime for runtime in runtimes if runtime.state == "healthy"]
    if not entry.trusted:
        return [True] * any(runtime.isolated and not runtime.cannot_limit for runtime in usable)
    contained = not runtimes or any(runtime.isolated for runtime in usable)
    as_process = entry.process is not None and entry.service not in ISOLATED_ONLY
    bare = as_process and any(not runtime.isolated for runtime in usable)
    return [True] * contained + [False] * bare


def _no_runtime(entry: CatalogEntry, runtimes: Collection[RuntimeReport]) -> str:
    ill = "; ".join(
        sorted(f"{r.name}: {r.reason}" for r in runtimes if r.isolated and r.reason and r.state != "healthy")
    )
    why = f" ({ill})" if ill else ""
    loose = [r for r in runtimes if r.isolated and r.state == "healthy"]
    if not entry.trusted and (loose or not runtimes):
        told = "; ".join(sorted(f"{r.name} cannot limit {', '.join(r.cannot_limit)}" for r in loose))
        return f"its image is not trusted, and no engine here can limit it ({told or 'the worker told of none'})"
    if entry.process is None or entry.service in ISOLATED_ONLY:
        return f"only as a container, and no engine works here{why}"
    return f"no engine works here{why}, and the owner does not let services run as plain processes"
