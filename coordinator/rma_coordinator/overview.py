"""The pool in numbers, as CONTRACT writes them."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

from rma_coordinator.domain.fleet import ATTACHABLE
from rma_coordinator.domain.traffic import POOL
from rma_core.models.worker import lane

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.models import ModelView
    from rma_coordinator.domain.speeds import Expected
    from rma_coordinator.pool import Pool
    from rma_core.model_catalog import ModelEntry

#: Workers whose whole records are opened to find out why nobody has a model: each costs some ten microseconds.
ASKED_WORKERS = 64


def stats(pool: Pool) -> dict[str, Any]:
    """Return what the pool is and does now."""
    workers, dispatcher = list(pool.fleet.workers.values()), pool.dispatcher
    tiers: dict[str, list[Worker]] = {}
    for worker in workers:
        tiers.setdefault(str(worker.brief.tier or "none"), []).append(worker)
    return {
        "total_workers": len(workers),
        "healthy_workers": sum(worker.status == "healthy" for worker in workers),
        "degraded_workers": sum(worker.status == "degraded" for worker in workers),
        "offline_workers": sum(worker.status == "offline" for worker in workers),
        "by_tier": {tier: _tier(members) for tier, members in sorted(tiers.items())},
        "tasks": {
            "queued": dispatcher.queued,
            "running": dispatcher.running,
            "succeeded": dispatcher.succeeded,
            "failed": dispatcher.failed,
        },
        "services": services(pool),
        "traffic": pool.traffic.show(POOL, pool.settings.bytes_per_month),
        "webhooks": {"waiting": pool.webhooks.waiting},
        "uptime_s": pool.uptime_s,
        "tier_policy": pool.tiers.active,
        "signed_catalog": False,
    }


def _tier(members: Sequence[Worker]) -> dict[str, float]:
    """Return one tier's row; what is offline has no load."""
    loads = [worker.current_load for worker in members if worker.status != "offline"]
    return {
        "workers": len(members),
        "healthy": sum(worker.status == "healthy" for worker in members),
        "average_load": round(sum(loads) / len(loads), 4) if loads else 0.0,
    }


def services(pool: Pool) -> dict[str, dict[str, int]]:
    """Return for each service of the catalog: copies wanted, assigned and healthy."""
    assigned, running = pool.fleet.assigned(), pool.fleet.running()
    return {
        name: {"wanted": entry.wanted, "assigned": assigned.get(name, 0), "healthy": running.get(name, 0)}
        for name, entry in sorted(pool.catalog.items())
    }


def models(pool: Pool) -> list[dict[str, Any]]:
    """Return every model of the catalog, and what owners offer besides, by name."""
    views, assigned = pool.models(), pool.fleet.assigned()
    rows = [_of_catalog(pool, entry, views[entry.name], assigned) for entry in pool.model_entries]
    listed = {entry.name for entry in pool.model_entries}
    return rows + [_row(view) for name, view in views.items() if name not in listed]


def _of_catalog(pool: Pool, entry: ModelEntry, view: ModelView, assigned: Mapping[str, int]) -> dict[str, Any]:
    estimate, name = entry.memory(), lane(entry.service, entry.name)
    return _row(view) | {
        "service": entry.service,
        "format": entry.format,
        "in_catalog": True,
        "size_bytes": entry.all_bytes,
        "memory_bytes": estimate.total_bytes,
        "memory": estimate.words,
        "licence": entry.licence,
        "licence_url": entry.licence_url,
        "context": entry.context,
        "slots": entry.slots,
        "wanted": entry.wanted,
        "assigned": assigned.get(name, 0),
        "reason": "" if assigned.get(name, 0) else _why_nowhere(pool, name),
    }


def _row(view: ModelView) -> dict[str, Any]:
    return {
        "model": view.name,
        "service": ATTACHABLE,
        "format": "",
        "in_catalog": False,
        "state": view.state,
        "progress": view.progress,
        "eta_s": view.eta_s,
        "workers": view.workers,
        "coming": view.coming,
        "context": view.context,
        "size_bytes": 0,
        "memory_bytes": 0,
        "memory": "",
        "licence": "",
        "licence_url": "",
        "slots": None,
        "wanted": 0,
        "assigned": 0,
        "reason": "",
    }


def _why_nowhere(pool: Pool, name: str) -> str:
    """Return what most workers say about a model that none of them was given; of many workers some are asked."""
    some = islice((one for one in pool.fleet.workers.values() if one.present), ASKED_WORKERS)
    told = Counter(reason for one in some if (reason := one.record.placement.get(name)))
    if not told:
        return "" if pool.fleet.workers else "no worker has joined yet"
    [(reason, count)] = told.most_common(1)
    return reason if len(told) == 1 else f"{reason} ({count} of {told.total()} workers)"


def speeds(pool: Pool, worker_id: str) -> list[dict[str, Any]]:
    """Return what a worker's next task of each kind would take, as dispatch reckons it: the parts in seconds.

    ``shut_s`` are the seconds for which it is not given that kind at all, because it failed again and again.
    """
    dispatcher, now = pool.dispatcher, pool.clock()
    return [
        {"lane": name, **parts(one), "shut_s": round(max(0.0, dispatcher.breakers.until(worker_id, name) - now), 1)}
        for name, one in sorted(dispatcher.speeds.known(worker_id).items())
    ]


def parts(expected: Expected) -> dict[str, Any]:
    """Return the parts of a score in seconds, and whether they are known or an average stands in for them."""
    return {
        "wait_s": round(expected.wait, 4),
        "load_s": round(expected.load, 4),
        "prefill_s": round(expected.prefill, 4),
        "service_s": round(expected.service, 4),
        "saved_s": round(expected.saved, 4),
        "failure_s": round(expected.failure, 4),
        "known": expected.known,
    }
