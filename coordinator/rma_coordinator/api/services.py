"""Services and where they run, over HTTP: wanted, running, why not; and the rules of placement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator import shortage
from rma_coordinator.api.bodies import RulesApplied, RulesPreview
from rma_coordinator.domain.fleet import iso
from rma_coordinator.effects import fetched
from rma_core.errors import NotFound
from rma_core.models.strict import decode

if TYPE_CHECKING:
    from rma_coordinator.api.web import Web
    from rma_coordinator.arranging import Draft
    from rma_coordinator.pool import Pool


async def services(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """Services: wanted, assigned, healthy, and why there are fewer than wanted."""
    return {"services": shortage.services(pool)}


async def service(pool: Pool, web: Web) -> object:
    """One service: where it runs, by which rule, and why it does not run elsewhere."""
    name = web.parts["service"]
    if name not in pool.catalog:
        known = ", ".join(sorted(pool.catalog)) or "none"
        raise NotFound(f"this pool has no service {name!r}", hints=(f"it has: {known}",))
    return await shortage.service(pool, name)


async def placement_rules(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The rules of placement that are in force."""
    arranging = pool.arranging
    record = arranging.record
    return {
        "text": record.text,
        "since": iso(record.at),
        "by": record.by,
        "trouble": arranging.trouble,
        "rules": msgspec.to_builtins(arranging.now.rules),
    }


async def preview_rules(pool: Pool, web: Web) -> object:
    """What rules of placement would change in the live fleet."""
    asked = decode(await web.body(), RulesPreview, subject="rules of placement")
    arranging = pool.arranging
    return _draft(await arranging.draft(await arranging.read(asked.file)))


async def apply_rules(pool: Pool, web: Web) -> object:
    """Put rules of placement in force."""
    by = pool.keyring.principal(web.bearer).id
    asked = decode(await web.body(), RulesApplied, subject="rules of placement")
    was = pool.arranging.record.text
    draft = await pool.arranging.apply(asked.file, by=by, seen=asked.plan)
    return {**_draft(draft), "was": was}


def _draft(draft: Draft) -> dict[str, Any]:
    moves = draft.moves
    return {
        "workers": [{"worker_id": worker_id, **one._asdict()} for worker_id, one in moves.items()],
        "looked_at": len(draft.lanes),
        "changes": len(moves),
        **fetched(moves.values()),
        "services": [{**msgspec.to_builtins(one), "short": one.short} for one in draft.capacity],
        "plan": draft.digest,
    }
