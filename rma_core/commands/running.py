"""Commands about the agent that runs on this machine: status, pause, resume, drain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from rma_core.commands import common, sharing
from rma_core.commands.machine import agent_home, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from rma_core.agent.attach.nearby import Nearby


@click.command()
@common.home_option
@common.json_option
def status(home: str | None, as_json: bool) -> None:
    """Show the agent that runs on this machine: what it does, and why not more."""
    from rma_core.agent.control import ask

    settings = settings_of(home)

    async def look() -> tuple[dict[str, Any], tuple[Nearby, ...]]:
        now = await ask(agent_home(settings), "status")
        return now, await sharing.found_by(settings, now["coordinator"], *now.get("attached", ()))

    now, found = common.run_async(look())
    now["attachable"] = [msgspec.to_builtins(one) for one in found]
    common.show(now, as_json, lambda out: _print_status(out, now, found))


def _print_status(out: Console, now: dict[str, Any], found: Sequence[Nearby] = ()) -> None:
    why = f" ({now['standing_reason']})" if now["standing_reason"] else ""
    where = f"{now['worker_id']} at {now['coordinator']}"
    out.print(common.safe(f"{where}: {now['standing']}{why}, connection: {now['connection']}"))
    out.print(common.safe(f"  {now['tier_reason']}"))
    state = "draining" if now["draining"] else f"paused: {now['paused']}" if now["paused"] else "working"
    done = f"{now['tasks_succeeded']} requests answered, {now['tasks_failed']} failed"
    out.print(common.safe(f"  {state}, load {now['current_load']:.0%}, {len(now['attempts'])} running, {done}"))
    rows = [(_lane(c), _state(c), _where(c), c.get("reason", "")) for c in now["containers"]]
    common.table(("service", "state", "runtime", "why"), rows, empty="  No services.")(out)
    for words in now["left_out"]:
        out.print(common.safe(f"  not shared: {words}"))
    engines = [(r["name"], r["state"], r["reason"] or r["version"]) for r in now["runtimes"]]
    common.table(("runtime", "state", "why"), engines, empty="  No runtimes.")(out)
    ill = [(p["detector"], p["state"], p["reason"]) for p in now["probes"] if p["state"] == "unhealthy"]
    if ill:
        common.table(("detector", "state", "why"), ill, empty="")(out)
    for one in found:
        out.print(common.safe(f"  {sharing.sentence(one, 'rma agent')}"))


def _lane(container: dict[str, Any]) -> str:
    """Return a container's service, with its model where it serves one of its own."""
    models = container.get("models", ())
    return f"{container['service']} {models[0]['name']}" if _has_own_model(container) else str(container["service"])


def _has_own_model(container: dict[str, Any]) -> bool:
    return container.get("runtime") != "attached" and len(container.get("models", ())) == 1


def _state(container: dict[str, Any]) -> str:
    """Return a container's state; of one that is well, its model's."""
    state: str = container["state"]
    if not _has_own_model(container) or state not in ("healthy", "starting"):
        return state
    model = container["models"][0]
    done = "" if model.get("progress") is None else f" {model['progress']:.0%}"
    return f"{state}, {model.get('state', 'loaded')}{done}"


def _where(container: dict[str, Any]) -> str:
    """Return what runs it; of several attached servers, which one."""
    runtime: str = container.get("runtime", "")
    return str(container["name"]) if runtime == "attached" else runtime


@click.command()
@common.home_option
@common.json_option
def pause(home: str | None, as_json: bool) -> None:
    """Take this machine back for now: what runs goes to others, services stop, their memory is free in seconds.

    It stays so, also over a restart of the agent, until `rma resume`.
    """
    from rma_core.agent.control import ask

    done = common.run_async(ask(agent_home(settings_of(home)), "pause"))
    common.say(f"Paused after {done['seconds']:.1f} s; requests that went on elsewhere: {done['given_back']}.")
    if done["still_stopping"]:
        common.say(f"Still stopping: {', '.join(done['still_stopping'])}. `rma status` shows when that is done.")
    if as_json:
        common.show(done, as_json, lambda _: None)


@click.command()
@common.home_option
@common.json_option
def resume(home: str | None, as_json: bool) -> None:
    """Let this machine work for its pool again."""
    from rma_core.agent.control import ask

    done = common.run_async(ask(agent_home(settings_of(home)), "resume"))
    common.say("The machine works again." if done["was_paused"] else "The machine was not paused.")
    if as_json:
        common.show(done, as_json, lambda _: None)


@click.command()
@common.home_option
@common.json_option
def drain(home: str | None, as_json: bool) -> None:
    """Let the agent on this machine finish what it has, return the rest, and stop."""
    from rma_core.agent.control import ask

    answer = common.run_async(ask(agent_home(settings_of(home)), "drain"))
    common.say("The agent finishes what it has and stops.")
    if as_json:
        common.show(answer, as_json, lambda _: None)


COMMANDS: list[click.Command] = [drain, pause, resume, status]
