"""The admin API: the fleet, tasks, keys, tokens, policies and plugins, and what anyone may see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

import rma_core
from rma_coordinator import overview
from rma_coordinator.api import pages
from rma_coordinator.api.bodies import KeyRequest, TokenMake, WebhookSecretAnswer, WorkerOwner
from rma_coordinator.api.openapi import document
from rma_coordinator.api.tasks import attempt, since, webhook
from rma_coordinator.domain.credentials import JoinTokenRecord, KeyRecord, check_scopes
from rma_coordinator.domain.fleet import iso
from rma_coordinator.domain.limits import Limits
from rma_core.errors import NotFound
from rma_core.models.strict import decode

if TYPE_CHECKING:
    from rma_coordinator.api.web import Web
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.records import TaskRecord
    from rma_coordinator.domain.tasks import Task
    from rma_coordinator.pool import Pool


# -- what anyone may see -----------------------------------------------------------------------------------------


async def health(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """Whether the coordinator works and takes new work, and what it is."""
    status = (
        {"status": "degraded", "reason": f"no new work is taken: {pool.unwell}"} if pool.unwell else {"status": "ok"}
    )
    return {**status, "version": rma_core.__version__, "issuer": pool.record.issuer}


async def openapi(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The OpenAPI document."""
    return document(rma_core.__version__, pool.record.issuer)


async def docs(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The API as a page."""
    return _static(web, "docs.html")


async def page(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The status page."""
    return _static(web, "status.html")


async def static(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """A file of the pages."""
    return _static(web, web.parts["name"])


def _static(web: Web, name: str) -> bytes:
    try:
        data = pages.static(name)
    except KeyError:
        raise NotFound(f"there is no file {name!r}") from None
    web.content_type = pages.content_type(name)
    web.headers.update(pages.HEADERS)
    return data


# -- the fleet ---------------------------------------------------------------------------------------------------


async def workers(pool: Pool, web: Web) -> object:
    """All workers, by id."""
    found = sorted(pool.fleet.workers.values(), key=lambda one: one.id)
    return web.page(found, "workers", key=lambda one: one.id, show=pool.fleet.show)


async def worker(pool: Pool, web: Web) -> object:
    """One worker with everything known of it."""
    found = pool.fleet.get(web.parts["worker_id"])
    return {
        **pool.fleet.show(found, full=True),
        "speeds": overview.speeds(pool, found.id),
        "traffic": pool.traffic.show(found.id, pool.settings.worker_bytes_per_month),
    }


async def disable(pool: Pool, web: Web) -> object:
    """Shut a worker out at once."""
    found = pool.fleet.get(web.parts["worker_id"])
    await pool.set_disabled(found, disabled=True)
    return pool.fleet.show(found)


async def enable(pool: Pool, web: Web) -> object:
    """Let a worker in again."""
    found = pool.fleet.get(web.parts["worker_id"])
    await pool.set_disabled(found, disabled=False)
    return pool.fleet.show(found)


async def worker_owner(pool: Pool, web: Web) -> object:
    """Say whose machine a worker is."""
    asked = decode(await web.body(), WorkerOwner, subject="owner")
    found = pool.fleet.get(web.parts["worker_id"])
    await pool.set_owner(found, asked.owner)
    return pool.fleet.show(found)


async def stats(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The pool in numbers."""
    return overview.stats(pool)


async def admin_health(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The coordinator's own state."""
    fleet, store = pool.fleet, pool.store.state
    amnesty = fleet.amnesty_until - pool.clock()
    return {
        "status": "ok" if store.ok else "degraded",
        "reason": store.reason,
        "store_state": store.code,
        "hints": list(store.hints),
        "version": rma_core.__version__,
        "store": pool.settings.store,
        "uptime_s": pool.uptime_s,
        "amnesty_s": round(max(0.0, amnesty), 1),
        "amnesty_reason": fleet.amnesty_reason if amnesty > 0 else "",
        "connected_workers": len(pool.hub.sinks),
    }


async def backup(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """Copy the state to a file in the coordinator's folder, while it runs."""
    path, size = await pool.backup()
    return {"path": str(path), "bytes": size}


async def pool_models(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """Models of the catalog, and those that owners offer."""
    return {"models": overview.models(pool)}


async def tasks(pool: Pool, web: Web) -> object:
    """Tasks that run, wait, or ended lately; newest first."""
    found = list(pool.dispatcher.all())
    return web.page(found, "tasks", key=lambda one: one.id, show=lambda one: _task(pool, one))


async def task(pool: Pool, web: Web) -> object:
    """The whole life of one task; times are seconds since it came. A durable one is known as long as it is kept."""
    task_id = web.parts["task_id"]
    found: Task | None = None
    try:
        found = pool.dispatcher.find(task_id)
    except NotFound:
        record = await pool.books.record(task_id)
        if record is None:
            raise
    else:
        record = pool.books.written(found, decided=found.final)
    shown = await _life(pool, record)
    shown["seconds"] = round((record.ended_at or pool.wall()) - record.created_at, 4)
    return shown | _reckoned(found, shown["attempts"]) if found is not None else shown


def _reckoned(task: Task, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what dispatch expected of each attempt, beside what is shown of it, and for whom the task waits."""
    expected = {a.number: overview.parts(a.expected) for a in task.attempts if a.expected is not None}
    waits = {"waits_for": task.promise.worker_id} if task.promise is not None else {}
    return {"attempts": [{**one, "expected": expected.get(one["attempt"])} for one in attempts], **waits}


async def _life(pool: Pool, record: TaskRecord) -> dict[str, Any]:
    told = {"webhook": webhook(record, await pool.webhooks.record(record.task_id))} if record.webhook else {}
    return {
        "task_id": record.task_id,
        "service": record.service,
        "model": record.model,
        "status": record.state,
        "created_at": iso(record.created_at),
        "http_status": record.http_status,
        "key": record.key_id,
        "priority": record.priority,
        "reasons": record.reasons,
        "usage": record.usage,
        "body_bytes": record.body_bytes,
        "answer_bytes": record.answer_bytes,
        "deadline_s": round(record.timeout_s, 4),
        "ended_s": since(record, record.ended_at),
        "attempts": [{**attempt(record, one), "offered_at": iso(one.offered_at)} for one in record.attempts],
        **told,
    }


def _task(pool: Pool, task: Task) -> dict[str, Any]:
    moment = pool.fleet.wall_time
    return {
        "task_id": task.id,
        "service": task.service,
        "model": task.model,
        "status": task.state,
        "created_at": iso(moment(task.created_at)),
        "seconds": round((task.ended_at or pool.clock()) - task.created_at, 4),
        "http_status": task.http_status,
        "key": task.key_id,
        "priority": task.priority,
        "reasons": task.reasons,
        "usage": task.usage,
        "attempts": [
            {
                "attempt": a.number,
                "worker_id": a.worker_id,
                "status": a.state,
                "reason": a.reason,
                "offered_at": iso(moment(a.offered_at)),
            }
            for a in task.attempts
        ],
    }


# -- plugins ----------------------------------------------------------------------------------------


async def plugins(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """The coordinator's plugins, and for each worker those plugins and probes that are not well, or have failed."""
    return {
        "coordinator": msgspec.to_builtins(pool.plugins()),
        "workers": [row for _, found in sorted(pool.fleet.workers.items()) if (row := _unwell(found))],
    }


def _unwell(found: Worker) -> dict[str, Any] | None:
    bad_plugins = [p for p in found.record.plugins if p.state != "active" or p.failures]
    bad_probes = [p for p in found.record.report.probes if p.state == "unhealthy"]
    if not bad_plugins and not bad_probes:
        return None
    return {
        "worker_id": found.id,
        "plugins": msgspec.to_builtins(bad_plugins),
        "probes": msgspec.to_builtins(bad_probes),
    }


# -- keys --------------------------------------------------------------------------------------------------------


async def keys(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """All keys, without their secrets."""
    return {"keys": [_key(pool, record) for record in pool.keyring.all_keys()]}


async def create_key(pool: Pool, web: Web) -> object:
    """Make a key; its secret is shown this once."""
    principal = pool.keyring.principal(web.bearer)
    asked = decode(await web.body(), KeyRequest, subject="key")
    scopes = check_scopes(asked.scopes, principal)
    limits = Limits(
        requests_per_minute=asked.requests_per_minute,
        tokens_per_minute=asked.tokens_per_minute,
        bytes_per_month=asked.bytes_per_month,
    )
    secret, record = await pool.create_key(
        kind=asked.kind, label=asked.label, scopes=scopes, ttl_s=asked.ttl_s, limits=limits, owner=asked.owner
    )
    return {"key": secret, **_key(pool, record)}


async def webhook_secret(pool: Pool, web: Web) -> object:
    """Make a new secret that signs a key's webhooks; it is shown this once, and the former signs too for a day."""
    made = await pool.renew_webhook_secret(web.parts["key_id"])
    until = next((one.until for one in made.secrets[1:]), None)
    return WebhookSecretAnswer(key_id=made.key_id, secret=made.shown, former_until=iso(until or 0))


async def revoke_key(pool: Pool, web: Web) -> object:
    """End a key or join token at once."""
    await pool.revoke(web.parts["key_id"])
    return {"revoked": web.parts["key_id"]}


def _key(pool: Pool, record: KeyRecord) -> dict[str, Any]:
    limits, subject = record.limits or Limits(), f"key:{record.key_id}"
    return {
        "key_id": record.key_id,
        "kind": record.kind,
        "label": record.label,
        "scopes": list(record.scopes),
        "created_at": iso(record.created_at),
        "expires_at": iso(record.expires_at or 0),
        "revoked_at": iso(record.revoked_at or 0),
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "bytes_per_month": limits.bytes_per_month,
        "owner": record.owner,
        "traffic": pool.traffic.show(subject, limits.bytes_per_month),
        "webhook_secret": bool(pool.keyring.webhook_secrets(record.key_id)),
    }


async def join_tokens(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """All join tokens, without their secrets."""
    return {"tokens": [_join_token(record) for record in pool.keyring.all_tokens()]}


async def create_token(pool: Pool, web: Web) -> object:
    """Make a join token; its secret is shown this once."""
    asked = decode(await web.body(), TokenMake, subject="join token")
    secret, record = await pool.create_token(label=asked.label, uses=asked.uses, ttl_s=asked.ttl_s, owner=asked.owner)
    return {"token": secret + pool.pin, "url": pool.settings.public_url, **_join_token(record)}


def _join_token(record: JoinTokenRecord) -> dict[str, Any]:
    return {
        "token_id": record.token_id,
        "label": record.label,
        "owner": record.owner,
        "uses_left": record.uses - len(record.used_by),
        "created_at": iso(record.created_at),
        "expires_at": iso(record.expires_at),
        "revoked_at": iso(record.revoked_at or 0),
    }
