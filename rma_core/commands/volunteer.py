"""Commands of volunteers: join, agent, status, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from rma_core.commands import common, sharing
from rma_core.commands.machine import agent_settings, print_report, settings_of
from rma_core.errors import AgentAbsent, SettingProblem, UsageProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from rma_core.agent.join import Invitation
    from rma_core.agent.lifecycle import Agent
    from rma_core.agent.nearby import Nearby
    from rma_core.agent.state import StateFolder
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import RegisterRequest, RegisterResponse, RuntimeReport
    from rma_core.settings import AgentSettings


#: Seconds a running agent gets to finish before `rma leave` gives up, and how often it is looked for.
LEAVE_WITHIN_S, LOOK_S = 90.0, 0.2


@click.command()
@click.argument("url")
@click.argument("token")
@click.option("--yes", is_flag=True, help="Agree to what is shown, without being asked.")
@click.option("--enrol-only", is_flag=True, help="Enrol, but do not run the agent yet.")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME", help="docker, podman or process, in your order.")
@click.option("--insecure-http", is_flag=True, help="Speak plain http to a coordinator that is not this machine.")
@common.attach_option
@click.option("--attach-found", is_flag=True, help="Share all model servers that are found at their usual ports, too.")
@common.home_option
@common.json_option
def join(
    url: str,
    token: str,
    yes: bool,
    enrol_only: bool,
    runtimes: tuple[str, ...],
    insecure_http: bool,
    attach: tuple[str, ...],
    attach_found: bool,
    home: str | None,
    as_json: bool,
) -> None:
    """Give this machine to the pool at URL.

    Shows what was detected, the tier the machine would get and what it would run, and asks before anything is kept.
    Model servers that run here already are found, shown, and asked for one by one: without your word none is shared.
    """
    flags = {"runtimes": list(runtimes) or None, "insecure_http": insecure_http or None, "attach": list(attach) or None}
    settings = settings_of(home, coordinator_url=url, **flags)
    joined = common.run_async(_join(settings, token, yes=yes, as_json=as_json, attach_found=attach_found))
    settings = msgspec.structs.replace(settings, attach=[*settings.attach, *joined.shared])
    if as_json:
        common.show(_joined(settings, joined), as_json, lambda _: None)
    again = sharing.options((*attach, *joined.shared))
    if enrol_only:
        common.say(f"Enrolled. Start working with:  rma agent{again}")
        return
    if joined.shared:
        common.say(f"The next time, share it again with:  rma agent{again}")
    common.set_up_logging(settings.log_level, as_json=settings.log_json)
    _run_agent(settings)


class Joined(NamedTuple):
    """What came of joining: the pool's answer, and of the servers found here the shared ones and the others."""

    answer: RegisterResponse
    shared: tuple[str, ...]
    left: tuple[Nearby, ...]


def _joined(settings: AgentSettings, joined: Joined) -> dict[str, object]:
    """Return what `join --json` prints."""
    answer = joined.answer
    return {
        "worker_id": answer.worker_id,
        "coordinator": settings.coordinator_url,
        "tier": answer.tier,
        "tier_reason": answer.tier_reason,
        "services": [assignment.service for assignment in answer.containers],
        "attached": settings.attach,
        "attachable": [msgspec.to_builtins(one) for one in joined.left],
    }


async def _join(settings: AgentSettings, token: str, *, yes: bool, as_json: bool, attach_found: bool) -> Joined:
    from rma_core.agent import start
    from rma_core.agent.attachable import addresses
    from rma_core.agent.consent import Consent
    from rma_core.agent.join import enrol, invited, registration
    from rma_core.agent.state import StateFolder

    # Before anything is asked of anyone: a wrong address is the owner's to mend.
    addresses(settings.attach)
    folder = StateFolder(settings.home_path)
    known = folder.load_record() if settings.home_path.exists() else None
    if known is not None and known.coordinator_url.rstrip("/") != settings.coordinator_url.rstrip("/"):
        raise UsageProblem(
            f"this machine already works for {known.coordinator_url}",
            hints=("give this pool a state folder of its own: --home FOLDER", f"or remove {settings.home_path}"),
        )
    invitation = await invited(settings.coordinator_url, token, insecure_http=settings.insecure_http)
    common.say("Detecting this machine's hardware …")
    plugins = start.discover(settings)
    report, engines, found = await asyncio.gather(
        start.look(settings, plugins), _probe(settings, plugins), sharing.found_by(settings)
    )
    shared = [one.url for one in found] if attach_found else []
    services = tuple(settings.services) or None
    request = registration(
        report, runtimes=engines, plugins=plugins.reports(), services=services, labels=settings.labels
    )
    # Whoever agrees must see it; stdout is the program's that asked for JSON.
    out = common.console(err=as_json)
    offered = await _shown(out, invitation, request, report, engines)
    await sharing.show_attached(out, addresses((*settings.attach, *shared)))
    found = tuple(one for one in found if one.url not in shared)
    sharing.show_found(out, found)
    if not yes:
        _ask()
        shared += sharing.ask_which(found)
    elif found:
        common.say("What is found here is shared with --attach URL, or all of it with --attach-found.")
    folder.prepare()
    folder.lock()
    try:
        agreed = Consent.to(offered.containers)
        named = msgspec.structs.replace(request, services=agreed.names)
        answer = await enrol(invitation, named, folder, consent=agreed)
    finally:
        folder.unlock()
    common.say(f"This machine is {answer.worker_id} in the pool.")
    return Joined(answer, tuple(shared), tuple(one for one in found if one.url not in shared))


async def _probe(settings: AgentSettings, plugins: Any) -> tuple[RuntimeReport, ...]:
    """Return how the owner's runtimes stand."""
    from rma_core.agent.engines import in_order
    from rma_core.agent.start import plugin_tables

    engines = in_order(plugins.runtimes(plugin_tables(settings)), settings.runtimes)
    await asyncio.gather(*(engine.look("worker-00000000") for engine in engines))
    reports = tuple(engine.report() for engine in engines)
    await asyncio.gather(*(engine.runtime.aclose() for engine in engines))
    return reports


async def _shown(
    out: Console,
    invitation: Invitation,
    request: RegisterRequest,
    report: HardwareReport,
    engines: tuple[RuntimeReport, ...],
) -> RegisterResponse:
    """Ask the pool what it would make of this machine, and show that to the owner."""
    from rma_core.agent.join import preview

    offered = await preview(invitation, request)
    print_report(out, report)
    rows = [(e.name, e.state, "yes" if e.isolated else "NO", e.reason or e.version) for e in engines]
    common.table(("runtime", "state", "isolated", "why"), rows, empty="No runtimes.")(out)
    out.print(common.safe(f"In the pool at {invitation.url}: {offered.tier_reason}"))
    if not offered.signed_catalog:
        out.print("The pool's catalog is not signed: it is a development pool.")
    runs = [
        (a.service, a.image, f"{a.limits.memory}, {a.limits.cpus:g} CPUs", a.limits.pids) for a in offered.containers
    ]
    common.table(("it would run", "image", "at most", "processes"), runs, empty="It would run nothing.")(out)
    absent = sorted(offered.placement.items())
    if absent:
        common.table(("it would not run", "why"), absent, empty="")(out)
    return offered


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UsageProblem("nobody can be asked here", hints=("--yes agrees to what is shown",))
    if not click.confirm("Do you agree to run this?", default=False, err=True):
        common.say("Nothing was kept.")
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--coordinator", "coordinator_url", metavar="URL", help="Address of the coordinator.")
@click.option("--insecure-http", is_flag=True, help="Speak plain http to a coordinator that is not this machine.")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME", help="docker, podman or process, in your order.")
@common.attach_option
@click.option("--until-stdin-ends", is_flag=True, hidden=True, help="Stop when whoever started it is gone.")
@common.log_options
@common.home_option
@common.errors_option
def agent(
    coordinator_url: str | None,
    insecure_http: bool,
    runtimes: tuple[str, ...],
    attach: tuple[str, ...],
    until_stdin_ends: bool,
    home: str | None,
    log_level: str | None,
    log_json: bool | None,
) -> None:
    """Run the agent in the foreground: work for the pool that this machine has joined."""
    flags = {"coordinator_url": coordinator_url, "insecure_http": insecure_http or None}
    lists = {"runtimes": list(runtimes) or None, "attach": list(attach) or None}
    logs = {"log_level": log_level, "log_json": log_json}
    settings = settings_of(home, **flags, **lists, **logs)
    common.set_up_logging(settings.log_level, as_json=settings.log_json)
    _run_agent(settings, ready=_tied_to_stdin if until_stdin_ends else _untied)


def _run_agent(settings: AgentSettings, *, ready: Callable[[Agent], None] | None = None) -> None:
    from rma_core.agent.start import run_agent

    common.run_async(run_agent(settings, ready=ready or _untied))


def _untied(_: Agent) -> None:
    """Run until a signal."""


def _tied_to_stdin(running: Agent) -> None:
    """Stop the agent when its stdin ends: however its parent dies, nothing is left behind."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(running.stop)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


@click.command()
@common.home_option
@common.json_option
def status(home: str | None, as_json: bool) -> None:
    """Show the agent that runs on this machine: what it does, and why not more."""
    from rma_core.agent.control import ask

    settings = settings_of(home)

    async def look() -> tuple[dict[str, Any], tuple[Nearby, ...]]:
        now = await ask(_agent_home(settings), "status")
        return now, await sharing.found_by(settings, now["coordinator"], *now.get("attached", ()))

    now, found = common.run_async(look())
    now["attachable"] = [msgspec.to_builtins(one) for one in found]
    common.show(now, as_json, lambda out: _print_status(out, now, found))


def _agent_home(settings: AgentSettings) -> Path:
    """Return the folder of the agent: the state folder itself, or the one `rma up` keeps inside it."""
    return agent_settings(settings).home_path


def _print_status(out: Console, now: dict[str, Any], found: Sequence[Nearby] = ()) -> None:
    why = f" ({now['standing_reason']})" if now["standing_reason"] else ""
    where = f"{now['worker_id']} at {now['coordinator']}"
    out.print(common.safe(f"{where}: {now['standing']}{why}, connection: {now['connection']}"))
    out.print(common.safe(f"  {now['tier_reason']}"))
    state = "draining" if now["draining"] else f"paused: {now['paused']}" if now["paused"] else "working"
    done = f"{now['tasks_succeeded']} requests answered, {now['tasks_failed']} failed"
    out.print(common.safe(f"  {state}, load {now['current_load']:.0%}, {len(now['attempts'])} running, {done}"))
    rows = [(c["service"], c["state"], _where(c), c.get("reason", "")) for c in now["containers"]]
    common.table(("service", "state", "runtime", "why"), rows, empty="  No services.")(out)
    engines = [(r["name"], r["state"], r["reason"] or r["version"]) for r in now["runtimes"]]
    common.table(("runtime", "state", "why"), engines, empty="  No runtimes.")(out)
    ill = [(p["detector"], p["state"], p["reason"]) for p in now["probes"] if p["state"] == "unhealthy"]
    if ill:
        common.table(("detector", "state", "why"), ill, empty="")(out)
    for one in found:
        out.print(common.safe(f"  {sharing.sentence(one, 'rma agent')}"))


def _where(container: dict[str, Any]) -> str:
    """Return what runs it; of several attached servers, which one."""
    runtime: str = container.get("runtime", "")
    return str(container["name"]) if runtime == "attached" else runtime


@click.command()
@common.home_option
@common.json_option
def drain(home: str | None, as_json: bool) -> None:
    """Let the agent on this machine finish what it has, return the rest, and stop."""
    from rma_core.agent.control import ask

    answer = common.run_async(ask(_agent_home(settings_of(home)), "drain"))
    common.say("The agent finishes what it has and stops.")
    if as_json:
        common.show(answer, as_json, lambda _: None)


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.home_option
@common.json_option
def leave(yes: bool, home: str | None, as_json: bool) -> None:
    """Take this machine out of its pool: say goodbye, and forget the pool and the machine's key."""
    settings = settings_of(home)
    if not yes and not (sys.stdin.isatty() and click.confirm("Leave the pool for good?", default=False, err=True)):
        raise UsageProblem("nothing was changed", hints=("--yes leaves without being asked",))
    left = common.run_async(_leave(_agent_home(settings)))
    common.say(f"This machine is no longer {left['worker_id']} of {left['coordinator']}; its key is gone.")
    if as_json:
        common.show(left, as_json, lambda _: None)


async def _leave(home: Path) -> dict[str, str]:
    from rma_core.agent.control import ask
    from rma_core.agent.state import StateFolder

    folder = StateFolder(home)
    record = await asyncio.to_thread(lambda: folder.load_record() if home.exists() else None)
    if record is None:
        raise UsageProblem(f"the machine with the state folder {home} has joined no pool")
    with contextlib.suppress(AgentAbsent, UsageProblem):
        # A running agent says goodbye itself once it has finished what it has.
        await ask(home, "drain")
    await _locked(folder)
    try:
        folder.forget()
    finally:
        folder.unlock()
    return {"worker_id": record.worker_id, "coordinator": record.coordinator_url}


async def _locked(folder: StateFolder) -> None:
    """Wait until no agent runs with this folder. Raises SettingProblem when one still does after LEAVE_WITHIN_S."""
    deadline = asyncio.get_running_loop().time() + LEAVE_WITHIN_S
    while True:
        try:
            folder.lock()
        except SettingProblem:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(LOOK_S)
        else:
            return


COMMANDS: list[click.Command] = [agent, drain, join, leave, status]
