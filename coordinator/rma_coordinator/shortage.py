"""Why the pool runs fewer copies of a service than it wants: what its workers say, summed up."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.domain.placement import AS_MANY, ENOUGH
from rma_coordinator.overview import ASKED_WORKERS
from rma_coordinator.overview import services as counted
from rma_core.models.worker import lane

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.rules import Rule, Rules
    from rma_coordinator.pool import Pool

#: Reasons that are told of one service; workers that are looked at, and told of, where one is asked about.
TOLD, MOST_LOOKED_AT, MOST_SHOWN = 5, 5000, 100
#: Workers that are looked at before anyone else gets a word in.
AT_ONCE = 25
#: Why a machine has not got what others have.
PLENTY = (ENOUGH, AS_MANY)
#: Why there are fewer than wanted where no machine says anything.
NOBODY = "no machine is online and takes part"
NO_OTHER = "each machine that is online and takes part runs a copy, and gets no second one"
#: What of a reason is one machine's own: how much it has.
OWN = re.compile(r", (?:there is [^;]*|[^;,]* free)")


def services(pool: Pool) -> list[dict[str, Any]]:
    """Return every service of the catalog with its counts, and of those that are short the reasons."""
    rows = counted(pool)
    told = {name: _Told() for name, row in rows.items() if row["healthy"] < row["wanted"]}
    looked_at = 0
    for worker in pool.fleet.workers.values() if told else ():
        if not worker.present:
            continue
        has = _services(worker)
        for name in told.keys() & has:
            told[name].ill[_ill(name, worker)] += 1
        lacks = told.keys() - has
        # A whole record costs much more to look at: some are enough.
        placement = worker.record.placement if lacks and (looked_at := looked_at + 1) <= ASKED_WORKERS else {}
        for name in lacks:
            told[name].without[_why_not(name, placement)] += 1
    rules = pool.arranging.now.rules
    return [
        {
            "service": name,
            **row,
            "most": rules.of(name).most,
            "reasons": told[name].ranked(conclude=not pool.catalog[name].model_format) if name in told else [],
        }
        for name, row in rows.items()
    ]


async def service(pool: Pool, name: str) -> dict[str, Any]:
    """Return one service: its counts, its rule, the workers that have it, and why others have not."""
    here: list[dict[str, Any]] = []
    told, looked_at = _Told(), 0
    for worker in islice(list(pool.fleet.workers.values()), MOST_LOOKED_AT):
        if looked_at % AT_ONCE == 0:
            await asyncio.sleep(0)
        looked_at += 1
        if not worker.present:
            continue
        if name not in _services(worker):
            told.without[_why_not(name, worker.record.placement)] += 1
            continue
        told.ill[_ill(name, worker)] += 1
        if len(here) < MOST_SHOWN:
            here.append(_copy(name, worker))
    rules, entry = pool.arranging.now.rules, pool.catalog[name]
    ruled = [one for one in pool.model_entries if one.service == name and one.name in rules.models]
    assigned, counts = pool.fleet.assigned(), counted(pool)[name]
    short = counts["healthy"] < counts["wanted"] and looked_at >= len(pool.fleet.workers)
    return {
        "service": name,
        **counts,
        **_rule(rules, rules.of(name), entry.tiers),
        "models": [
            {
                "model": one.name,
                "wanted": one.wanted,
                "assigned": assigned.get(lane(name, one.name), 0),
                **_rule(rules, rules.of(name, one.name), entry.tiers),
            }
            for one in ruled
        ],
        "needs": msgspec.to_builtins(entry.needs),
        "workers": here,
        "reasons": told.ranked(conclude=short and not entry.model_format),
        "looked_at": looked_at,
    }


class _Told:
    """Why a service has no healthy copy: on machines that have it, and on those that have not been given it."""

    def __init__(self) -> None:
        self.ill, self.without = Counter[str](), Counter[str]()

    def ranked(self, *, conclude: bool) -> list[dict[str, Any]]:
        """Return the commonest reasons: first those of machines that have it, where any does not run well.

        Others then have not got it because there are enough, which is no reason. To ``conclude`` that there are too few
        machines where no reason is found, all must have been looked at, and each get one copy at most.
        """
        well, unknown = self.ill.pop("", 0), self.without.pop("", 0)
        others = [(why, n) for why, n in self.without.most_common() if not self.ill or not why.startswith(PLENTY)]
        found = self.ill.most_common() + others
        if conclude and not found and not unknown:
            found = [(NO_OTHER if well else NOBODY, well)]
        return [{"reason": why, "workers": count} for why, count in found[:TOLD]]


def _copy(name: str, worker: Worker) -> dict[str, Any]:
    """Return what a worker runs of a service, and how that stands."""
    states = [one for one in worker.containers if one.service == name]
    own = [one for one in states if one.unassigned]
    lanes = [one.lane for one in worker.brief.assignment if one.service == name]
    lanes += [lane(name, model.name) for one in own for model in one.models] or ([name] if own else [])
    return {
        "worker_id": worker.id,
        "tier": worker.brief.tier,
        "lanes": lanes,
        "state": "; ".join(sorted({one.state for one in states})) or "assigned",
        "reason": "; ".join(sorted({one.reason for one in states} - {""})),
    }


def _rule(rules: Rules, rule: Rule, tiers: tuple[int, ...]) -> dict[str, Any]:
    of_tiers = f"machines of tier {', '.join(map(str, tiers))}" if tiers else ""
    return {
        "most": rule.most,
        "strategy": rules.strategy_of(rule),
        "over": rule.over,
        "prefer": rule.prefer.words if rule.prefer else of_tiers,
        "only": rule.only.words if rule.only else "",
    }


def _services(worker: Worker) -> set[str]:
    """Return the services that a worker is to run, and those that its owner offers."""
    own = {one.service for one in worker.containers if one.unassigned}
    return own.union(one.service for one in worker.brief.assignment)


def _ill(name: str, worker: Worker) -> str:
    """Say how a worker's copy of a service stands; an empty string where it is healthy."""
    states = [one for one in worker.containers if one.service == name]
    if any(one.state == "healthy" for one in states):
        return ""
    said = {f"{one.state}: {one.reason}" if one.reason else one.state for one in states}
    return "; ".join(sorted(said)) or "it was assigned just now"


def _why_not(name: str, placement: Mapping[str, str]) -> str:
    """Say why a worker was not given a service."""
    reasons = {reason for of, reason in placement.items() if of.partition(" ")[0] == name}
    return "; ".join(sorted({OWN.sub("", reason) for reason in reasons}))
