"""The pool in numbers, as CONTRACT writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_coordinator.domain.traffic import POOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.speeds import Expected
    from rma_coordinator.pool import Pool


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
        "tier_policy": pool.settings.tier_policy,
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


def speeds(pool: Pool, worker_id: str) -> list[dict[str, Any]]:
    """Return what a worker's next task of each kind would take, as dispatch reckons it: the parts in seconds.

    ``shut_s`` are the seconds for which it is not given that kind at all, because it failed again and again.
    """
    dispatcher, now = pool.dispatcher, pool.clock()
    return [
        {"lane": lane, **parts(one), "shut_s": round(max(0.0, dispatcher.breakers.until(worker_id, lane) - now), 1)}
        for lane, one in sorted(dispatcher.speeds.known(worker_id).items())
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
