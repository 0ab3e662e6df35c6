"""Commands of admins about services: where each runs, why there are fewer than wanted, and rules of placement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rma_core import toml_lines
from rma_core.commands import common, effects
from rma_core.errors import UsageProblem

if TYPE_CHECKING:
    from rich.console import Console

#: A large fleet is looked at several times over.
LOOKED_S = 120.0


@click.group(invoke_without_command=True)
@common.pool_options
@common.json_option
@click.pass_context
def services(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """List the pool's services: wanted, assigned, healthy, and why there are fewer than wanted.

    `rules` are what the pool wants beside tiers: how many copies, on which machines; `apply` changes them.
    """
    ctx.obj = options
    if ctx.invoked_subcommand is None:
        _list_services(options, as_json=as_json)


@services.command("list")
@common.json_option
@common.pool_options
def services_list(as_json: bool, **options: Any) -> None:
    """List the pool's services: wanted, assigned, healthy, and why there are fewer than wanted."""
    _list_services(common.outer(options), as_json=as_json)


def _list_services(options: dict[str, Any], *, as_json: bool) -> None:
    found = common.call(options, "GET", "/api/admin/services")
    rows = [(s["service"], _wanted(s), s["assigned"], s["healthy"], _why(s["reasons"])) for s in found["services"]]
    columns = ("service", "wanted", "assigned", "healthy", "why not")
    common.show(found, as_json, common.table(columns, rows, empty="An empty catalog."))


def _wanted(service: dict[str, Any]) -> str:
    most = service["most"]
    return str(service["wanted"]) + ("" if most is None else f" to {most}")


def _why(reasons: list[dict[str, Any]]) -> str:
    if not reasons:
        return ""
    first, more = reasons[0], f", and {len(reasons) - 1} more reasons" if len(reasons) > 1 else ""
    return f"{first['reason']} (workers: {first['workers']}){more}"


@services.command("show")
@click.argument("service")
@common.json_option
@common.pool_options
def services_show(service: str, as_json: bool, **options: Any) -> None:
    """Show where a service runs, by which rule, and why it does not run elsewhere."""
    found = common.call(common.outer(options), "GET", f"/api/admin/services/{common.part(service)}")
    common.show(found, as_json, lambda out: _print_service(out, found))


def _print_service(out: Console, found: dict[str, Any]) -> None:
    counts = f"wanted {_wanted(found)}, assigned {found['assigned']}, healthy {found['healthy']}"
    out.print(common.safe(f"{found['service']}: {counts}"))
    _print_rule(out, found)
    for one in found["models"]:
        out.print(common.safe(f"  {one['model']}: wanted {_wanted(one)}, assigned {one['assigned']}"))
        _print_rule(out, one, indent="    ")
    rows = [
        (w["worker_id"], w["tier"] or "-", ", ".join(w["lanes"]), w["state"], w["reason"]) for w in found["workers"]
    ]
    common.table(("worker", "tier", "runs", "state", "why"), rows, empty="  No worker has it.")(out)
    reasons = [(one["reason"], one["workers"]) for one in found["reasons"]]
    if reasons:
        common.table(("why not elsewhere", "workers"), reasons, empty="")(out)


def _print_rule(out: Console, found: dict[str, Any], *, indent: str = "  ") -> None:
    if found["only"]:
        out.print(common.safe(f"{indent}kept to {found['only']}"))
    if found["prefer"]:
        out.print(common.safe(f"{indent}first on {found['prefer']}"))
    if found["strategy"] != "fill" or found["over"]:
        over = f", shared out over {found['over']}" if found["over"] else ""
        out.print(common.safe(f"{indent}strategy {found['strategy']}{over}"))


@services.command("rules")
@common.json_option
@common.pool_options
def services_rules(as_json: bool, **options: Any) -> None:
    """Print the rules of placement that are in force, as the file that they were."""
    found = common.call(common.outer(options), "GET", "/api/admin/placement")
    common.show(found, as_json, lambda out: _print_rules(out, found))


def _print_rules(out: Console, found: dict[str, Any]) -> None:
    if not found["text"]:
        out.print("No rules are in force: the catalog alone says how many copies are wanted.")
        return
    out.print(common.safe(found["text"].rstrip()), soft_wrap=True)
    if found["trouble"]:
        common.say(f"They are not in force: {found['trouble']}")
    common.say(f"In force since {found['since']}, by {found['by']}.")


@services.command("preview")
@click.argument("file", type=click.Path(path_type=Path))
@common.json_option
@common.pool_options
def services_preview(file: Path, as_json: bool, **options: Any) -> None:
    """Show what rules in FILE would change: which workers stop and start what. Nothing is changed."""
    found = _preview(common.outer(options), toml_lines.load(file))
    common.show(found, as_json, lambda out: _print_draft(out, found))


def _preview(options: dict[str, Any], text: str) -> dict[str, Any]:
    found: dict[str, Any] = common.call(
        options, "POST", "/api/admin/placement/preview", body={"file": text}, timeout_s=LOOKED_S
    )
    return found


def _print_draft(out: Console, found: dict[str, Any]) -> None:
    rows = [(w["worker_id"], ", ".join(w["stops"]), ", ".join(w["starts"])) for w in found["workers"]]
    empty = f"They would change nothing (workers: {found['looked_at']})."
    common.table(("worker", "stops", "starts"), rows, empty=empty)(out)
    effects.show(out, found)


@services.command("apply")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--none", "no_rules", is_flag=True, help="Go back to what the catalog says, without any rules.")
@click.option("--yes", is_flag=True, help="Agree to whatever it comes to: nothing is shown or asked.")
@common.json_option
@common.pool_options
def services_apply(file: Path | None, no_rules: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Put the rules in FILE in force: what changes is shown, and you are asked. Workers finish what they run.

    Where machines came or went while you read, it is shown and asked once more.

    The pool keeps the file's text, which stands in place of the rules that were: `rules` prints those first.
    """
    if (file is None) is not no_rules:
        raise UsageProblem("give a file, or --none", hints=("`rma services rules` prints those in force",))
    options = common.outer(options)
    text = toml_lines.load(file) if file else ""

    def ask(found: dict[str, Any]) -> None:
        _print_draft(common.console(err=True), found)
        common.ask(f"Put these rules in force? Workers that change: {found['changes']}")

    def put(plan: dict[str, Any]) -> dict[str, Any]:
        body = {"file": text, **plan}
        applied: dict[str, Any] = common.call(options, "PUT", "/api/admin/placement", body=body, timeout_s=LOOKED_S)
        return applied

    # Who was asked has seen exactly this; who was not agrees to whatever it comes to.
    done = put({}) if yes else effects.agreed(lambda: _preview(options, text), ask, put)
    words = "The rules are in force" if text else "No rules are in force"
    common.show(done, as_json, lambda out: out.print(f"{words}; workers that change: {done['changes']}."))
