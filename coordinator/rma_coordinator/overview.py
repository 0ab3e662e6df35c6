"""The pool in numbers, as CONTRACT writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_coordinator.domain.traffic import POOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rma_coordinator.domain.fleet import Worker
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
    """Return what a worker's next task of each kind would take, as dispatch reckons it: the parts in seconds."""
    return [
        {"lane": lane, "service_s": round(one.service, 4), "failure_s": round(one.failure, 4), "known": one.known}
        for lane, one in sorted(pool.dispatcher.speeds.known(worker_id).items())
    ]
