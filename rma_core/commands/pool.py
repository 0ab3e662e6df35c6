"""Commands of admins: workers, tasks, keys, tokens."""

from __future__ import annotations

import re
from typing import Any

import click

from rma_core.commands import common
from rma_core.errors import UsageProblem
from rma_core.models.sizes import parse_size, traffic_text
from rma_core.models.worker import OWNER_NAME

#: What `rma keys create` gives when no scope is named.
DEFAULT_SCOPES = {"admin": ("admin:read", "tasks:read"), "client": ("infer:*",)}

#: Of what a key may have.
COUNT = click.IntRange(min=1)

MARKS = {"healthy": "●", "degraded": "▲", "offline": "■"}


def _owner(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | None:  # noqa: ARG001 - click's form
    """Return the name of an owner."""
    if text is not None and not re.fullmatch(OWNER_NAME.strip("^$"), text):
        raise click.BadParameter(
            "a name has up to 64 letters, digits and . _ @ + -, and begins with none of these signs"
        )
    return text


@click.command()
@click.argument("worker_id", required=False)
@click.option(
    "--owner",
    metavar="NAME",
    callback=_owner,
    help="Say whose machine it is from now on; '' is nobody's in particular.",
)
@common.pool_options
@common.json_option
def workers(worker_id: str | None, owner: str | None, as_json: bool, **options: Any) -> None:
    """List the pool's workers, or show one with its devices, plugins and the reasons for what it runs."""
    if owner is not None:
        _say_whose(worker_id, owner, options)
    if worker_id:
        one = common.call(options, "GET", f"/api/admin/workers/{common.part(worker_id)}")
        common.show(one, as_json, lambda out: _worker(out, one))
        return
    found = common.pages(options, "/api/admin/workers", "workers")
    rows = [
        (
            w["worker_id"],
            f"{MARKS.get(w['status'], '?')} {w['status']}" + _held(w),
            w["tier"] or "-",
            w["capabilities"]["cpu_cores"],
            w["capabilities"]["ram"],
            w["capabilities"]["gpu_type"] or "-",
            ", ".join(f"{c['service']} {c['state']}" for c in w["containers"]) or "-",
            f"{w['current_load']:.0%}",
            w["tasks_completed"],
            w["owner"] or "-",
            common.ago(w["last_heartbeat"]),
        )
        for w in found
    ]
    columns = ("worker", "status", "tier", "cores", "memory", "GPU", "runs", "load", "tasks", "owner", "seen ago")
    empty = (
        "No workers yet. On a machine that should join: rma join URL TOKEN (make the token with `rma tokens create`)"
    )
    common.show({"workers": found, "total": len(found)}, as_json, common.table(columns, rows, empty=empty))


def _say_whose(worker_id: str | None, owner: str, options: dict[str, Any]) -> None:
    if not worker_id:
        raise UsageProblem("which worker?", hints=("rma workers ID --owner NAME; `rma workers` lists them",))
    common.call(options, "POST", f"/api/admin/workers/{common.part(worker_id)}/owner", body={"owner": owner})


def _held(worker: dict[str, Any]) -> str:
    """Say why a worker that is well is given nothing new."""
    return " (paused by its owner)" if worker["paused"] else " (drains)" if worker["draining"] else ""


def _worker(out: Any, one: dict[str, Any]) -> None:
    short = one["capabilities"]
    gpu = "".join(f", {short[field]}" for field in ("gpu_type", "gpu_memory") if short[field])
    why = f": {one['status_reason']}" if one["status_reason"] else ""
    status = f"{MARKS.get(one['status'], '?')} {one['status']}{why}{_held(one)}"
    out.print(common.safe(f"{one['worker_id']}  {status}"))
    out.print(common.safe(f"  {one['tier_reason']}"))
    if one["owner"]:
        out.print(common.safe(f"  {one['owner']}'s machine: whose requests come first here"))
    out.print(common.safe(f"  {short['cpu_cores']} cores, {short['ram']} memory, {short['storage']} free{gpu}"))
    rows = [(c["service"], c["state"], c.get("runtime", ""), c.get("reason", "")) for c in one["containers"]]
    rows += [(service, "not here", "", reason) for service, reason in sorted(one["placement"].items())]
    common.table(("service", "state", "runtime", "why"), rows, empty="  No services.")(out)
    ill = [(p["detector"], p["state"], p["reason"]) for p in one["hardware"]["probes"]]
    common.table(("detector", "state", "why"), ill, empty="  No detectors reported.")(out)
    speeds = [
        (
            s["lane"],
            f"{s['prefill_s'] + s['service_s']:.3g} s",
            f"{s['failure_s']:.3g} s",
            f"not for {s['shut_s']:.0f} s: it failed again and again" if s["shut_s"] else "",
        )
        for s in one.get("speeds", ())
    ]
    if speeds:
        common.table(("work", "takes", "failures cost", "given"), speeds, empty="")(out)
    if "traffic" in one:
        out.print(common.safe(f"  passed this month: {_passed(one['traffic'])}"))
    plugins = [
        (p["name"], p["kind"], p["state"], common.failed(p), p["reason"])
        for p in one["plugins"]
        if p["state"] != "active" or p.get("failures")
    ]
    if plugins:
        common.table(("plugin", "kind", "state", "failed", "why"), plugins, empty="")(out)


@click.command()
@common.pool_options
@common.json_option
def backup(as_json: bool, **options: Any) -> None:
    """Copy the coordinator's state to a file in its own folder, while it runs.

    The newest seven are kept. To go back to one: stop the coordinator, move coordinator.db and coordinator.db-wal
    away, and put the copy in the place of coordinator.db.
    """
    found = common.call(options, "POST", "/api/admin/backup")
    words = f"{found['path']} ({found['bytes']} bytes)"
    common.show(found, as_json, lambda out: out.print(common.safe(words)))


@click.group(invoke_without_command=True)
@common.pool_options
@common.json_option
@click.pass_context
def keys(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """List keys; `create` and `revoke` change them."""
    ctx.obj = options
    if ctx.invoked_subcommand is None:
        found = common.call(options, "GET", "/api/admin/keys")
        rows = [
            (
                k["key_id"],
                k["kind"],
                k["label"],
                " ".join(k["scopes"]),
                "revoked" if k["revoked_at"] else k["expires_at"] or "never",
                _limits(k),
                _passed(k["traffic"]),
                k["owner"] or "-",
            )
            for k in found["keys"]
        ]
        columns = ("key", "kind", "label", "scopes", "ends", "a minute", "this month", "owner")
        common.show(found, as_json, common.table(columns, rows, empty="No keys."))


def _limits(key: dict[str, Any]) -> str:
    named = {"requests": key["requests_per_minute"], "tokens": key["tokens_per_minute"]}
    return ", ".join(f"{count} {what}" for what, count in named.items() if count is not None) or "-"


def _passed(traffic: dict[str, Any]) -> str:
    """Return what passed this month, and of how much, as people read it."""
    passed, limit = traffic_text(traffic["request_bytes"] + traffic["answer_bytes"]), traffic["limit_bytes"]
    return passed if limit is None else f"{passed} of {traffic_text(limit)}"


def _size(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | None:  # noqa: ARG001 - click's form
    """Return a size as people write it, in bytes."""
    if text is None:
        return None
    try:
        size = int(text) if text.isdecimal() else parse_size(text, binary=False)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if size < 1:
        raise click.BadParameter("that is nothing at all")
    return size


@keys.command("create")
@click.option("--client", "client", is_flag=True, help="A client key (rmac_…) instead of an admin key.")
@click.option("--scope", "scopes", multiple=True, help="What it opens; repeatable. `infer:notes`, `admin:read` …")
@click.option("--label", default="", help="What it is for.")
@click.option(
    "--ttl", type=click.FloatRange(min=60), default=90 * 86_400.0, show_default=True, help="Seconds it lasts."
)
@click.option("--requests-per-minute", type=COUNT, help="Requests it may make a minute [default: any number].")
@click.option("--tokens-per-minute", type=COUNT, help="Tokens of language models it may use a minute [default: any].")
@click.option(
    "--bytes-per-month",
    metavar="SIZE",
    callback=_size,
    help="Requests and answers of a month (UTC), such as 20GB [default: any].",
)
@click.option("--owner", metavar="NAME", callback=_owner, help="On whose machines its requests come first.")
@common.json_option
@common.pool_options
def keys_create(
    client: bool,
    scopes: tuple[str, ...],
    label: str,
    ttl: float,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    bytes_per_month: int | None,
    owner: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a key. It is shown this once."""
    kind = "client" if client else "admin"
    body = {
        "kind": kind,
        "label": label,
        "scopes": list(scopes or DEFAULT_SCOPES[kind]),
        "ttl_s": ttl,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "bytes_per_month": bytes_per_month,
        "owner": owner or "",
    }
    made = common.call(common.outer(options), "POST", "/api/admin/keys", body=body)
    common.show(made, as_json, lambda out: out.print(common.safe(made["key"])))


@keys.command("webhook-secret")
@click.argument("key_id")
@common.json_option
@common.pool_options
def keys_webhook_secret(key_id: str, as_json: bool, **options: Any) -> None:
    """Make the secret that signs a key's webhooks. It is shown this once; a former one signs too for a day."""
    path = f"/api/admin/keys/{common.part(key_id)}/webhook-secret"
    made = common.call(common.outer(options), "POST", path)
    common.show(made, as_json, lambda out: out.print(common.safe(made["secret"])))
    if made["former_until"] and not as_json:
        common.say(f"The former secret signs too until {made['former_until']}.")


@keys.command("revoke")
@click.argument("key_id")
@common.json_option
@common.pool_options
def keys_revoke(key_id: str, as_json: bool, **options: Any) -> None:
    """End a key at once."""
    done = common.call(common.outer(options), "DELETE", f"/api/admin/keys/{common.part(key_id)}")
    common.show(done, as_json, lambda out: out.print(common.safe(f"{key_id} is revoked")))


@click.group(invoke_without_command=True)
@common.pool_options
@common.json_option
@click.pass_context
def tokens(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """List join tokens; `create` and `revoke` change them."""
    ctx.obj = options
    if ctx.invoked_subcommand is None:
        found = common.call(options, "GET", "/api/admin/tokens")
        rows = [
            (
                t["token_id"],
                t["label"],
                t["uses_left"],
                "revoked" if t["revoked_at"] else t["expires_at"],
                t["owner"] or "-",
            )
            for t in found["tokens"]
        ]
        columns = ("token", "label", "uses left", "ends", "owner")
        common.show(found, as_json, common.table(columns, rows, empty="No join tokens."))


@tokens.command("create")
@click.option(
    "--uses", type=click.IntRange(1, 1000), default=1, show_default=True, help="Machines that may join with it."
)
@click.option("--ttl", type=click.FloatRange(60, 604_800), default=3600.0, show_default=True, help="Seconds it lasts.")
@click.option("--label", default="", help="Whom it is for.")
@click.option(
    "--owner", metavar="NAME", callback=_owner, help="Whose machines join with it: whose requests come first."
)
@common.json_option
@common.pool_options
def tokens_create(uses: int, ttl: float, label: str, owner: str | None, as_json: bool, **options: Any) -> None:
    """Make a join token. It is shown this once."""
    body = {"uses": uses, "ttl_s": ttl, "label": label, "owner": owner or ""}
    options = common.outer(options)
    made = common.call(options, "POST", "/api/admin/tokens", body=body)
    common.show(made, as_json, lambda out: out.print(common.safe(made["token"])))
    if not as_json:
        _say_how_to_join(made["url"] or common.target(options).url, made["token"])


def _say_how_to_join(url: str, token: str) -> None:
    from urllib.parse import urlsplit

    from rma_core.addresses import is_loopback

    if is_loopback(urlsplit(url).hostname or ""):
        common.say(f"Only this machine reaches {url}: for others start the pool with `rma up --lan` or a --public-url.")
    common.say(f"On the machine that joins:  rma join {url} {token}")


@tokens.command("revoke")
@click.argument("token_id")
@common.json_option
@common.pool_options
def tokens_revoke(token_id: str, as_json: bool, **options: Any) -> None:
    """End a join token at once."""
    done = common.call(common.outer(options), "DELETE", f"/api/admin/tokens/{common.part(token_id)}")
    common.show(done, as_json, lambda out: out.print(common.safe(f"{token_id} is revoked")))
