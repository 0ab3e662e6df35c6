"""Tier policies over HTTP: which there are, what one would change, putting one in force, and what was done."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.api.bodies import PolicyActivation, PolicyPreview, PolicyRollback, PolicyShadow
from rma_coordinator.api.problems import HTTPProblem
from rma_coordinator.domain.fleet import iso
from rma_coordinator.effects import effects, fetched
from rma_coordinator.policy_versions import ChildPolicy
from rma_coordinator.tiers import Known
from rma_core.errors import NotFound, PluginError, Refused, SettingProblem, ValidationProblem
from rma_core.interfaces import PolicyInput
from rma_core.models.hardware import read_reports
from rma_core.models.strict import convert, decode, parse
from rma_core.policy_file import read_policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rma_coordinator.api.web import Web
    from rma_coordinator.audit import AuditEntry
    from rma_coordinator.choices import Choice, Plan
    from rma_coordinator.effects import Effects
    from rma_coordinator.pool import Pool
    from rma_core.interfaces import TierPolicy
    from rma_core.models.hardware import HardwareReport

#: Entries of the audit that are shown unless more are asked for, and at most.
SHOWN, MOST_SHOWN = 100, 1000
#: Machines that are put before a policy at a time.
ASKED_AT_ONCE = 50
#: Entries that stand beside a policy.
LATELY = 20


async def policies(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """Tier policies; which one is in force, since when, and how far workers have moved to it."""
    active, known = pool.tiers.active, dict(pool.tiers.look())
    installed = known.get(active)
    if pool.tiers.current is not None:
        # It may have been put in force from a text that is no file here, or is another one now.
        known[active] = Known(pool.tiers.current)
    rows = [_row(pool, one.policy, active=name == active) for name, one in sorted(known.items())]
    if installed and isinstance(installed.policy, ChildPolicy) and installed.policy is not pool.tiers.current:
        rows.append(_row(pool, installed.policy, active=False))
    return {"active": active, "policies": rows, "unused": _unused(pool), **pool.switching.show()}


def _row(pool: Pool, policy: TierPolicy, *, active: bool) -> dict[str, Any]:
    version, failed = policy.version if isinstance(policy, ChildPolicy) else "", pool.tiers.failed(policy)
    about = {"name": policy.name, "version": version, "summary": policy.summary, "active": active}
    return {**about, "failures": failed.times, "failed_at": failed.at}


def _unused(pool: Pool) -> list[dict[str, Any]]:
    """Return the plugins with policies that cannot be used, each with its reason."""
    fields = ("name", "distribution", "version", "state", "reason", "failures", "failed_at")
    unused = pool.policy_plugins.unused() if pool.policy_plugins else []
    return [{field: getattr(one, field) for field in fields} for one in unused]


async def rescan_policies(pool: Pool, web: Web) -> object:
    """Look for plugins' policies that were installed, replaced or uninstalled; what is in force stays in force."""
    by = pool.keyring.principal(web.bearer).id
    try:
        found = await pool.look_at_policies(by=by)
    except (SettingProblem, ValidationProblem, PluginError) as error:
        raise Refused(f"plugins cannot be taken in: {error}", hints=error.hints) from None
    return {
        "new": [{"name": one.name, "version": one.version} for one in found.new],
        "changed": [one._asdict() for one in found.changed],
        "gone": found.gone,
        "unused": _unused(pool),
        "active": pool.tiers.active,
        "version": pool.switching.choices[-1].version,
    }


async def show_policy(pool: Pool, web: Web) -> object:
    """One policy: its text, where it is a file's, and what was done with policies lately."""
    name = web.parts["name"]
    chosen = pool.switching.choices[-1]
    if name == chosen.name and pool.tiers.current is not None:
        known = Known(pool.tiers.current, chosen.text)
    else:
        known = pool.tiers.find(name)
    return {
        **_row(pool, known.policy, active=name == pool.tiers.active),
        "text": known.text,
        "entries": [_entry(one) for one in pool.switching.audit.latest(LATELY, prefix="policy_")],
    }


async def preview_policy(pool: Pool, web: Web) -> object:
    """Which tiers a policy would give, and why: for given machines, or what would change in the live fleet."""
    # Its reports may hold anything: what is in them is looked through before it is used.
    asked = convert(parse(await web.body(), subject="policy preview"), PolicyPreview, subject="policy preview")
    if asked.file:
        # A long one takes its time.
        policy: TierPolicy = await asyncio.to_thread(
            read_policy, asked.file, name=asked.policy or "file", subject="the policy"
        )
        text = asked.file
    else:
        policy, text = pool.tiers.find(asked.policy)
    if asked.reports is not None:
        reports = read_reports(asked.reports, subject="reports")
        return {"machines": [one async for one in _machines(pool, policy, reports)]}
    plan = await pool.switching.plan(policy, text)
    found = await effects(pool, plan)
    unknown = {name for row in plan.rows for name in row.prefers or ()} - pool.catalog.keys()
    return {"policy": policy.name, "unknown_services": sorted(unknown), **_plan(plan, found), **_effects(found)}


async def _machines(pool: Pool, policy: TierPolicy, reports: Sequence[HardwareReport]) -> AsyncIterator[dict[str, Any]]:
    """Ask a policy about machines; other work goes on meanwhile."""
    for start in range(0, len(reports), ASKED_AT_ONCE):
        await asyncio.sleep(0)
        some = [PolicyInput(report=report) for report in reports[start : start + ASKED_AT_ONCE]]
        await pool.tiers.prepare(some, policy)
        for index, asked in enumerate(some, start):
            decision = pool.tiers.decide(asked, policy)
            yield {
                "index": index,
                "tier": decision.tier,
                "reason": decision.reason,
                "capabilities": msgspec.to_builtins(asked.report.capabilities),
            }


def _effects(found: Effects) -> dict[str, Any]:
    moved = found.moved.values()
    return {
        "stops": sum(len(one.stops) for one in moved),
        "starts": sum(len(one.starts) for one in moved),
        **fetched(moved),
        "services": [{**msgspec.to_builtins(one), "short": one.short} for one in found.capacity],
    }


def _plan(plan: Plan, found: Effects | None = None) -> dict[str, Any]:
    moved = found.moved if found else {}
    rows = [
        {
            "worker_id": row.worker_id,
            "from": row.tier,
            "to": row.tier if row.failed else row.new_tier,
            "reason": row.reason,
            "changes": row.changes,
            "failed": row.failed,
            **(moved[row.worker_id]._asdict() if row.worker_id in moved else {}),
        }
        for row in plan.rows
    ]
    return {"workers": rows, "changes": len(plan.moves), "failed": len(plan.failed), "plan": plan.digest}


async def activate_policy(pool: Pool, web: Web) -> object:
    """Put a policy in force, at once or in steps; workers move in the background."""
    by = pool.keyring.principal(web.bearer).id
    asked = decode(await web.body(), PolicyActivation, subject="policy activation")
    before = pool.switching.choices[-1]
    plan = await pool.switching.activate(asked.policy, asked.file, asked.steps, by=by, seen=asked.plan)
    return {**_swapped(pool, before), **_plan(plan)}


async def rollback_policy(pool: Pool, web: Web) -> object:
    """Put the policy in force again that was before this one; workers move in the background, all at once."""
    by = pool.keyring.principal(web.bearer).id
    before = pool.switching.choices[-1]
    asked = decode(await web.body(), PolicyRollback, subject="policy rollback")
    plan = await pool.switching.rollback(by=by, active=asked.active)
    return {**_swapped(pool, before), **_plan(plan)}


def _swapped(pool: Pool, was: Choice) -> dict[str, str]:
    now = pool.switching.choices[-1]
    return {"policy": now.name, "policy_version": now.version, "was": was.name, "was_version": was.version}


async def shadow_policy(pool: Pool, web: Web) -> object:
    """Ask a policy beside the one in force from now on."""
    by = pool.keyring.principal(web.bearer).id
    asked = decode(await web.body(), PolicyShadow, subject="policy in the shadow")
    await pool.switching.shadow(asked.policy, asked.file, by=by)
    return _shadow(pool)


async def show_shadow(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """Where the policy in the shadow differs from the one in force."""
    return _shadow(pool)


async def end_shadow(pool: Pool, web: Web) -> object:
    """Ask the policy in the shadow no more."""
    before = _shadow(pool)
    await pool.switching.end_shadow(by=pool.keyring.principal(web.bearer).id)
    return before


def _shadow(pool: Pool) -> dict[str, Any]:
    shadow = pool.tiers.shadow
    if shadow is None:
        raise NotFound("no policy is in the shadow", hints=("`rma policies shadow NAME` begins one",))
    rows = [{**one._asdict(), "at": iso(one.at)} for one in shadow.disagreements()]
    return {
        "policy": shadow.policy.name,
        "active": pool.tiers.active,
        "since": iso(shadow.since),
        "asked": shadow.asked,
        "failed": shadow.failed,
        "workers": rows,
    }


async def audit(pool: Pool, web: Web) -> object:
    """What was done to the pool, newest first."""
    limit = web.query.get("limit", str(SHOWN))
    if not limit.isdecimal() or len(limit) > len(str(MOST_SHOWN)) or not 1 <= int(limit) <= MOST_SHOWN:
        raise HTTPProblem(400, f"limit is a number from 1 to {MOST_SHOWN}, not {limit!r}", code="query")
    return {"entries": [_entry(one) for one in pool.switching.audit.latest(int(limit))]}


def _entry(one: AuditEntry) -> dict[str, Any]:
    return {**msgspec.to_builtins(one), "at": iso(one.at)}
