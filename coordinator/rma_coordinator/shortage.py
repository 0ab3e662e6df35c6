"""Why the pool runs fewer copies of a service than it wants: what its workers say, summed up."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.overview import ASKED_WORKERS
from rma_coordinator.overview import services as counted
from rma_core.models.worker import lane

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.worker_records import WorkerRecord
    from rma_coordinator.pool import Pool

#: Reasons that are told of one service; workers that are looked at, and told of, where one is asked about.
TOLD, MOST_LOOKED_AT, MOST_SHOWN = 5, 5000, 100
#: Workers that are looked at before anyone else gets a word in.
AT_ONCE = 25
#: What of a reason is one machine's own: how much it has.
OWN = re.compile(r", (?:there is [^;]*|[^;,]* free)")


def services(pool: Pool) -> list[dict[str, Any]]:
    """Return every service of the catalog with its counts, and of those that are short the reasons, commonest first."""
    rows = counted(pool)
    short = [name for name, row in rows.items() if row["healthy"] < row["wanted"]]
    some = list(islice((one for one in pool.fleet.workers.values() if one.present), ASKED_WORKERS)) if short else []
    records = [(worker, worker.record) for worker in some]
    return [
        {"service": name, **row, "most": pool.arranging.now.rules.of(name).most, "reasons": _told(name, records, short)}
        for name, row in rows.items()
    ]


def _told(name: str, records: Iterable[tuple[Worker, WorkerRecord]], short: Iterable[str]) -> list[dict[str, Any]]:
    return _ranked(Counter(_why(name, *one) for one in records)) if name in short else []


async def service(pool: Pool, name: str) -> dict[str, Any]:
    """Return one service: its counts, its rule, the workers that have it, and why others have not."""
    here: list[dict[str, Any]] = []
    reasons, looked_at = Counter[str](), 0
    for worker in islice(list(pool.fleet.workers.values()), MOST_LOOKED_AT):
        if looked_at % AT_ONCE == 0:
            await asyncio.sleep(0)
        looked_at += 1
        if not worker.present:
            continue
        reasons[_why(name, worker, record := worker.record)] += 1
        lanes, states = _lanes(name, worker, record), [one for one in worker.containers if one.service == name]
        if lanes and len(here) < MOST_SHOWN:
            state = "; ".join(sorted({one.state for one in states})) or "assigned"
            why = "; ".join(sorted({one.reason for one in states} - {""}))
            here.append({"worker_id": worker.id, "tier": record.tier, "lanes": lanes, "state": state, "reason": why})
    rules, entry = pool.arranging.now.rules, pool.catalog[name]
    rule = rules.of(name)
    return {
        "service": name,
        **counted(pool)[name],
        "most": rule.most,
        "strategy": rules.strategy_of(rule),
        "rule": msgspec.to_builtins(rule),
        "prefer": rule.prefer.words if rule.prefer else _tiers(entry.tiers),
        "only": rule.only.words if rule.only else "",
        "needs": msgspec.to_builtins(entry.needs),
        "workers": here,
        "reasons": _ranked(reasons),
        "looked_at": looked_at,
    }


def _tiers(tiers: tuple[int, ...]) -> str:
    return f"machines of tier {', '.join(map(str, tiers))}" if tiers else ""


def _why(name: str, worker: Worker, record: WorkerRecord) -> str:
    """Say why a worker has no healthy copy of a service; an empty string where it has."""
    if _lanes(name, worker, record):
        states = [one for one in worker.containers if one.service == name]
        if any(one.state == "healthy" for one in states):
            return ""
        said = {f"{one.state}: {one.reason}" if one.reason else one.state for one in states}
        return "; ".join(sorted(said)) or "it was assigned just now"
    reasons = {reason for of, reason in record.placement.items() if of.partition(" ")[0] == name}
    return "; ".join(sorted({OWN.sub("", reason) for reason in reasons}))


def _lanes(name: str, worker: Worker, record: WorkerRecord) -> list[str]:
    """Return what of a service a worker is to run, and what its owner offers of it."""
    own = [one for one in worker.containers if one.service == name and one.unassigned]
    offered = [lane(name, model.name) for one in own for model in one.models] or ([name] if own else [])
    return [one.lane for one in record.assignment if one.service == name] + offered


def _ranked(reasons: Counter[str]) -> list[dict[str, Any]]:
    del reasons[""]
    return [{"reason": reason, "workers": count} for reason, count in reasons.most_common(TOLD)]
