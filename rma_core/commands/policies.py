"""Commands of admins about tier policies: which there are, what one would change, putting one in force, and back."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rma_core.commands import common, effects
from rma_core.commands.policies_offline import POLICY_FILES, decided, machines_in
from rma_core.errors import Refused, UsageProblem

if TYPE_CHECKING:
    from rich.console import Console


#: The options of steps, and what the pool calls them.
STEPS = {
    "canary": "canary",
    "hold": "hold_s",
    "per_minute": "per_minute",
    "most_failures": "most_failures",
    "least_free": "least_free",
    "on_trouble": "on_trouble",
    "on_restart": "on_restart",
}
PERCENT = click.FloatRange(0, 100)
#: How long a command waits for workers to move, and how often it looks.
WAITED_S, LOOK_AGAIN_S = 60.0, 0.3
#: A plugin's policy may hang, and every plugin that is new is started: such calls may take this long.
ASKED_S = 120.0


@click.group(invoke_without_command=True)
@common.pool_options
@common.json_option
@click.pass_context
def policies(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """List tier policies; `preview` shows what one would do, `activate` does it, `rollback` undoes it."""
    ctx.obj = options
    if ctx.invoked_subcommand is None:
        _list_policies(options, as_json=as_json)


@policies.command("list")
@common.json_option
@common.pool_options
def policies_list(as_json: bool, **options: Any) -> None:
    """List tier policies; which one is active."""
    _list_policies(common.outer(options), as_json=as_json)


def _list_policies(options: dict[str, Any], *, as_json: bool) -> None:
    found = common.call(options, "GET", "/api/admin/policies")
    common.show(found, as_json, lambda out: _print_policies(out, found))


def _print_policies(out: Console, found: dict[str, Any]) -> None:
    listed = [*found["policies"], *found["unused"]]
    states = ["active" if p["active"] else "" for p in found["policies"]] + [p["state"] for p in found["unused"]]
    words = [p["summary"] for p in found["policies"]] + [p["reason"] for p in found["unused"]]
    some = any(common.failed(p) for p in listed)
    rows = [
        (p["name"], p["version"], state, *([common.failed(p)] if some else []), said)
        for p, state, said in zip(listed, states, words, strict=True)
    ]
    columns = ("policy", "version", "", *(["failed"] if some else []), "what it does")
    common.table(columns, rows, empty="No policies.")(out)
    if found["since"]:
        before = f", {_before(found)} was before" if found["previous"] else ""
        active = _called(found["active"], found["version"])
        out.print(common.safe(f"{active} is in force since {found['since']}, by {found['by']}{before}."))
    if found["moving"]:
        out.print(common.safe(_moving(found)))


def _called(name: str, version: str) -> str:
    """Return a policy as people read it: one of a plugin with its version."""
    return f"{name} {version}".rstrip()


def _before(found: dict[str, Any]) -> str:
    return _called(found["previous"][0], found["previous_versions"][0])


def _moving(found: dict[str, Any]) -> str:
    moving = found["moving"]
    words = f"{moving['moved']} of {moving['total']} workers have moved to {found['active']}"
    return f"{words}; it has stopped: {moving['stopped']}" if moving["stopped"] else f"{words}."


@policies.command("rescan")
@common.json_option
@common.pool_options
def policies_rescan(as_json: bool, **options: Any) -> None:
    """Have the coordinator look for policies of plugins that were installed, replaced or uninstalled since.

    Nothing is put in force by that: what is in force stays so until another is activated.
    """
    found = common.call(common.outer(options), "POST", "/api/admin/policies/rescan", timeout_s=ASKED_S)
    common.show(found, as_json, lambda out: _print_rescan(out, found))


def _print_rescan(out: Console, found: dict[str, Any]) -> None:
    rows = [(p["name"], p["version"], "new", "") for p in found["new"]]
    rows += [(p["name"], p["now"], "changed", _changed(p)) for p in found["changed"]]
    rows += [(name, "", "gone", "") for name in found["gone"]]
    rows += [(p["name"], p["version"], p["state"], p["reason"]) for p in found["unused"]]
    common.table(("policy", "version", "", ""), rows, empty="Nothing has changed.")(out)
    active = _called(found["active"], found["version"])
    out.print(common.safe(f"{active} stays in force; `rma policies preview NAME` shows what another would do."))


def _changed(policy: dict[str, Any]) -> str:
    return f"{policy['was']} was before" if policy["was"] != policy["now"] else "other files or settings than before"


@policies.command("show")
@click.argument("name")
@common.json_option
@common.pool_options
def policies_show(name: str, as_json: bool, **options: Any) -> None:
    """Show a tier policy: its text, where it is a file's, and what was done with policies lately."""
    found = common.call(common.outer(options), "GET", f"/api/admin/policies/{common.part(name)}")
    common.show(found, as_json, lambda out: _print_policy(out, found))


def _print_policy(out: Console, found: dict[str, Any]) -> None:
    state = " (in force)" if found["active"] else ""
    out.print(common.safe(f"{_called(found['name'], found['version'])}{state}: {found['summary']}"))
    if failed := common.failed(found):
        out.print(common.safe(f"It has failed {failed}."))
    if found["text"]:
        out.print()
        out.print(common.safe(found["text"].rstrip()))
    rows = [(entry["at"], entry["by"], entry["message"]) for entry in found["entries"]]
    if rows:
        common.table(("when", "by", "what was done with policies"), rows, empty="")(out)


@policies.command("preview")
@click.argument("name", required=False, default="threshold")
@click.option(
    "--report", "report", metavar="FILE", help="Machines to ask about: reports or capabilities (JSON; - reads stdin)."
)
@common.json_option
@common.pool_options
def policies_preview(name: str, report: str | None, as_json: bool, **options: Any) -> None:
    """Show which tier a policy gives, and why: to the live fleet, or to machines in a file (then no pool is needed).

    NAME is an installed policy, or a file (NAME.toml).
    """
    if report is None:
        asked = _policy_text(Path(name)) if name.endswith(POLICY_FILES) else {"policy": name}
        answer = _look(common.outer(options), asked)
        common.show(answer, as_json, lambda out: _print_plan(out, name, answer))
        return
    machines = common.run_async(decided(name, common.outer(options).get("home"), machines_in(report)))
    rows = [(m["name"], m["tier"] or "-", m["reason"]) for m in machines]
    common.show(
        {"policy": name, "machines": machines},
        as_json,
        common.table(("machine", "tier", "why"), rows, empty="No machines."),
    )


def _look(options: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = common.call(options, "POST", "/api/admin/policies/preview", body=asked, timeout_s=ASKED_S)
    return found


def _print_plan(out: Console, name: str, answer: dict[str, Any]) -> None:
    """Print who would change, and for whom a policy fails."""
    rows = [
        (
            w["worker_id"],
            w["from"] or "-",
            "fails" if w["failed"] else w["to"] or "-",
            w["reason"],
            ", ".join(w.get("stops", ())),
            ", ".join(w.get("starts", ())),
        )
        for w in answer["workers"]
        if w["changes"] or w["failed"]
    ]
    empty = f"{name} would change nothing (workers: {len(answer['workers'])})."
    common.table(("worker", "from", "to", "why", "stops", "starts"), rows, empty=empty)(out)
    if answer["unknown_services"]:
        out.print(common.safe(f"It prefers what this pool does not have: {', '.join(answer['unknown_services'])}."))
    effects.show(out, answer)


@policies.command("activate")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Agree to whatever it comes to: nothing is shown or asked.")
@click.option("--canary", type=PERCENT, metavar="PERCENT", help="So many of those that change go first.")
@click.option("--hold", type=click.FloatRange(0, 86_400), metavar="SECONDS", help="Then wait (default 300).")
@click.option("--per-minute", type=click.FloatRange(0, min_open=True), metavar="N", help="Move so many a minute.")
@click.option(
    "--most-failures", type=PERCENT, metavar="PERCENT", help="Stop when more requests fail meanwhile (default 20)."
)
@click.option(
    "--least-free", type=PERCENT, metavar="PERCENT", help="Stop when fewer of all slots are free (default 0)."
)
@click.option("--on-trouble", type=click.Choice(["rollback", "stop"]), help="What stopping means (default rollback).")
@click.option(
    "--on-restart", type=click.Choice(["continue", "rollback"]), help="If the coordinator restarts (default continue)."
)
@common.json_option
@common.pool_options
def policies_activate(name: str, yes: bool, as_json: bool, **options: Any) -> None:
    """Put a policy in force: what changes is shown, and you are asked. Workers finish what they run.

    NAME is a policy of `rma policies`, or a file (NAME.toml) whose text the pool keeps. Where machines came, went or
    changed while you read, it is shown and asked once more.
    """
    steps = _steps({option: options.pop(option) for option in STEPS})
    asked = _policy_text(Path(name)) if name.endswith(POLICY_FILES) else {"policy": name}
    options = common.outer(options)

    def ask(found: dict[str, Any]) -> None:
        _print_plan(common.console(err=True), name, found)
        common.ask(f"Put {asked['policy']} in force? Workers that change: {found['changes']}")

    def put(plan: dict[str, Any]) -> dict[str, Any]:
        body = {**asked, **plan, "steps": steps}
        begun: dict[str, Any] = common.call(options, "PUT", "/api/admin/policies/active", body=body, timeout_s=ASKED_S)
        return begun

    # Who was asked has seen exactly this; who was not agrees to whatever it comes to.
    done = put({}) if yes else effects.agreed(lambda: _look(options, asked), ask, put)
    # Steps may take hours, and how far they are can be asked for.
    _told(options, done, as_json=as_json, wait=not steps.keys() & {"canary", "per_minute"})


@policies.command("rollback")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.json_option
@common.pool_options
def policies_rollback(yes: bool, as_json: bool, **options: Any) -> None:
    """Put the policy in force again that was before this one."""
    options = common.outer(options)
    found = common.call(options, "GET", "/api/admin/policies")
    if found["previous"] and not yes:
        common.ask(f"Go back from {_called(found['active'], found['version'])} to {_before(found)}?")
    # Whatever happened while you were asked: it goes back from this one and no other.
    done = common.call(
        options, "POST", "/api/admin/policies/rollback", body={"active": found["active"]}, timeout_s=ASKED_S
    )
    _told(options, done, as_json=as_json, wait=True)


@policies.command("shadow")
@click.argument("name", required=False)
@click.option("--off", is_flag=True, help="Ask it no more.")
@common.json_option
@common.pool_options
def policies_shadow(name: str | None, off: bool, as_json: bool, **options: Any) -> None:
    """Ask a policy beside the one in force, whenever that is asked, and show where it says something else.

    NAME is a policy of `rma policies`, or a file (NAME.toml). Without it: what the one in the shadow has said so far.
    """
    options = common.outer(options)
    if off and name:
        raise UsageProblem("give a policy or --off, not both")
    if off:
        found = common.call(options, "DELETE", "/api/admin/policies/shadow")
    elif name:
        asked = _policy_text(Path(name)) if name.endswith(POLICY_FILES) else {"policy": name}
        found = common.call(options, "PUT", "/api/admin/policies/shadow", body=asked, timeout_s=ASKED_S)
    else:
        found = common.call(options, "GET", "/api/admin/policies/shadow")
    common.show(found, as_json, lambda out: _print_shadow(out, found))


def _print_shadow(out: Console, found: dict[str, Any]) -> None:
    rows = [
        (w["worker_id"], w["tier"] or "-", w["shadow_tier"] or "-", w["reason"], w["times"]) for w in found["workers"]
    ]
    columns = ("worker", found["active"], found["policy"], "why", "times")
    empty = f"{found['policy']} has said the same as {found['active']}."
    common.table(columns, rows, empty=empty)(out)
    failed = f"; it failed {found['failed']} times" if found["failed"] else ""
    out.print(common.safe(f"{found['policy']} was asked {found['asked']} times since {found['since']}{failed}."))


def _steps(given: dict[str, Any]) -> dict[str, Any]:
    """Return the steps as the pool takes them: what was not said is left to it."""
    steps = {STEPS[name]: value for name, value in given.items() if value is not None}
    endless = [name for name, value in steps.items() if isinstance(value, float) and not math.isfinite(value)]
    if endless:
        raise UsageProblem(f"--{endless[0].replace('_', '-').removesuffix('-s')} is no number")
    if "hold_s" in steps and "canary" not in steps:
        raise UsageProblem("--hold is the wait after a canary", hints=("give --canary too",))
    shares = ("canary", "most_failures", "least_free")
    return {name: value / 100 if name in shares else value for name, value in steps.items()}


def _told(options: dict[str, Any], done: dict[str, Any], *, as_json: bool, wait: bool) -> None:
    """Say what is in force now, once all workers have moved where that is to be waited for."""
    if wait and done["changes"]:
        now = _wait(options, quiet=as_json)
        if now["active"] != done["policy"]:
            raise Refused(f"{now['active']} is in force again", hints=("`GET /api/admin/audit` says why",))
    active, was = (_called(done[name], done[f"{name}_version"]) for name in ("policy", "was"))
    common.show(done, as_json, lambda out: out.print(common.safe(f"{active} is in force; {was} was.")))
    if not wait and not as_json:
        common.say("Workers move in steps: `rma policies` shows how far, `rma policies rollback` goes back.")


def _wait(options: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Show how far workers are, for a while, and return how it stands: they move whether anyone waits or not."""
    from rich.progress import Progress

    end = time.monotonic() + WAITED_S
    with Progress(console=common.console(err=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("moving workers", total=None)
        while True:
            now: dict[str, Any] = common.call(options, "GET", "/api/admin/policies")
            moving = now["moving"]
            if moving is None or moving["stopped"] or time.monotonic() > end:
                break
            bar.update(task, total=moving["total"], completed=moving["moved"])
            time.sleep(LOOK_AGAIN_S)
    if moving is not None and not quiet:
        common.say(_moving(now))
    return now


def _policy_text(path: Path) -> dict[str, str]:
    """Return what a pool is asked about a file; what is wrong with that is said here."""
    from rma_core.policy_file import load, read_policy

    name, text = load(path)
    read_policy(text, name=name, subject=path.name)
    return {"policy": name, "file": text}
