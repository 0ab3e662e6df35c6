"""Commands of volunteers about belonging to a pool: join, agent, leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from rma_core.commands import common, installed, sharing
from rma_core.commands.machine import agent_settings, print_report, settings_of
from rma_core.errors import AgentAbsent, SettingProblem, UsageProblem
from rma_core.models.sizes import human

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from rma_core.agent.attach.nearby import Nearby
    from rma_core.agent.join import Invitation
    from rma_core.agent.lifecycle import Agent
    from rma_core.agent.llm.own_models import Offered
    from rma_core.agent.state import StateFolder
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.weights import AssignedModel
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
@common.model_option
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
    models: tuple[str, ...],
    home: str | None,
    as_json: bool,
) -> None:
    """Give this machine to the pool at URL.

    Shows what was detected, the tier the machine would get and what it would run, and asks before anything is kept.
    Model servers that run here already are found, shown, and asked for one by one: without your word none is shared.
    """
    _own_folder(home)
    flags = {"runtimes": list(runtimes) or None, "insecure_http": insecure_http or None}
    given = {"attach": list(attach) or None, "models": list(models) or None}
    settings = settings_of(home, coordinator_url=url, **flags, **given)
    joined = common.run_async(_join(settings, token, yes=yes, as_json=as_json, attach_found=attach_found))
    settings = msgspec.structs.replace(settings, attach=[*settings.attach, *joined.shared])
    if as_json:
        common.show(_joined(settings, joined), as_json, lambda _: None)
    again = sharing.options((*attach, *joined.shared))
    again += "".join(f" --model {shlex.quote(one)}" for one in models)
    if enrol_only:
        common.say(f"Enrolled. Start working with:  rma agent{again}")
        common.say(f"Or have it start with the machine:  rma agent install{again}")
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
    from rma_core.agent import detecting
    from rma_core.agent.attach.attachable import addresses
    from rma_core.agent.consent import Consent
    from rma_core.agent.join import enrol, invited, registration
    from rma_core.agent.llm.own_models import offered as offered_files
    from rma_core.agent.llm.own_models import own_files
    from rma_core.agent.state import StateFolder

    # Before anything is asked of anyone: a wrong address is the owner's to mend.
    addresses(settings.attach)
    files = own_files(settings.models)
    folder = StateFolder(settings.home_path)
    known = folder.load_record() if settings.home_path.exists() else None
    if known is not None and known.coordinator_url.rstrip("/") != settings.coordinator_url.rstrip("/"):
        raise UsageProblem(
            f"this machine already works for {known.coordinator_url}",
            hints=("give this pool a state folder of its own: --home FOLDER", f"or remove {settings.home_path}"),
        )
    invitation = await invited(settings.coordinator_url, token, insecure_http=settings.insecure_http)
    common.say("Detecting this machine's hardware …")
    plugins = detecting.discover(settings)
    report, engines, found = await asyncio.gather(
        detecting.look(settings, plugins), _probe(settings, plugins), sharing.found_by(settings)
    )
    shared = [one.url for one in found] if attach_found else []
    services = tuple(settings.services) or None
    own = await asyncio.to_thread(offered_files, files, report, engines)
    request = registration(
        report,
        runtimes=engines,
        plugins=plugins.reports(),
        services=services,
        own_models=own.paths,
        labels=settings.labels,
    )
    # Whoever agrees must see it; stdout is the program's that asked for JSON.
    out = common.console(err=as_json)
    offered = await _shown(out, invitation, request, report, engines)
    _show_own(out, own)
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
        named = msgspec.structs.replace(request, services=agreed.names, agreed_models=agreed.model_names)
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
        (a.lane, a.image, f"{human(a.limits.memory_bytes)}, {a.limits.cpus:g} CPUs", a.limits.pids)
        for a in offered.containers
    ]
    common.table(("it would run", "image", "at most", "processes"), runs, empty="It would run nothing.")(out)
    models = [_model_row(a.model) for a in offered.containers if a.model]
    if models:
        common.table(("it would download", "size", "from", "licence"), models, empty="")(out)
    absent = sorted(offered.placement.items())
    if absent:
        common.table(("it would not run", "why"), absent, empty="")(out)
    return offered


def _model_row(model: AssignedModel) -> tuple[str, str, str, str]:
    """Return a model as its owner-to-be is shown it: how large, from where, on which terms."""
    from urllib.parse import urlsplit

    hosts = sorted({urlsplit(file.url).hostname or "" for file in model.files if file.url})
    terms = f"{model.licence} ({model.licence_url})" if model.licence_url else model.licence
    return model.name, human(model.size_bytes), ", ".join(hosts) or "a file on this machine", terms


def _show_own(out: Console, own: Offered) -> None:
    """Show which of the owner's own models are shared, and why others are not."""
    for one in own.assignments:
        if one.model is not None:
            file = own.paths[one.model.name]
            out.print(common.safe(f"shared: the model {one.model.name} ({human(one.model.size_bytes)}, {file})"))
    for words in own.left_out:
        out.print(common.safe(f"not shared: {words}"))


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UsageProblem("nobody can be asked here", hints=("--yes agrees to what is shown",))
    if not click.confirm("Do you agree to run this?", default=False, err=True):
        common.say("Nothing was kept.")
        raise click.exceptions.Exit(1)


@click.group(invoke_without_command=True)
@installed.agent_options
@click.option("--until-stdin-ends", is_flag=True, hidden=True, help="Stop when whoever started it is gone.")
@common.errors_option
@click.pass_context
def agent(ctx: click.Context, /, until_stdin_ends: bool, **options: Any) -> None:
    """Run the agent in the foreground: work for the pool that this machine has joined.

    `rma agent install` has it start with the machine instead.
    """
    if ctx.invoked_subcommand is not None:
        typed = (ctx.get_parameter_source(name) for name in (*options, "until_stdin_ends", "as_json"))
        if click.core.ParameterSource.COMMANDLINE in typed:
            raise UsageProblem(f"write the options behind: rma agent {ctx.invoked_subcommand} …")
        return
    _own_folder(options["home"])
    settings = settings_of(**installed.flags(options))
    common.set_up_logging(settings.log_level, as_json=settings.log_json)
    _run_agent(settings, ready=_tied_to_stdin if until_stdin_ends else _untied)


def _own_folder(home: str | None) -> None:
    """Raise SettingProblem where the state folder is another user's: its settings name plugins, and these would run."""
    from rma_core.agent.state import StateFolder

    StateFolder(installed.home_of(home)).check_owner()


def _run_agent(settings: AgentSettings, *, ready: Callable[[Agent], None] | None = None) -> None:
    from rma_core.agent.start import run_agent
    from rma_core.settings import AgentSettings, CoordinatorSettings, load_settings

    def again() -> AgentSettings:
        return load_settings(AgentSettings, flags={"home": settings.home}, known=(CoordinatorSettings,))

    common.run_async(run_agent(settings, again=again, ready=ready or _untied))


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


for _command in installed.COMMANDS:
    agent.add_command(_command)


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.home_option
@common.json_option
def leave(yes: bool, home: str | None, as_json: bool) -> None:
    """Take this machine out of its pool: say goodbye, forget the pool, the machine's key and downloaded models."""
    settings = settings_of(home)
    if not yes and not (sys.stdin.isatty() and click.confirm("Leave the pool for good?", default=False, err=True)):
        raise UsageProblem("nothing was changed", hints=("--yes leaves without being asked",))
    left = common.run_async(_leave(settings))
    common.say(f"This machine is no longer {left['worker_id']} of {left['coordinator']}; its key is gone.")
    if command := installed.remains(settings.home_path):
        common.say(f"Its service remains, and this takes it away:  {command}")
    if as_json:
        common.show(left, as_json, lambda _: None)


async def _leave(settings: AgentSettings) -> dict[str, str]:
    from rma_core.agent.control import ask
    from rma_core.agent.leaving import forget_models
    from rma_core.agent.state import StateFolder

    settings = agent_settings(settings)
    home = settings.home_path
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
        for sentence in await forget_models(settings, record.worker_id):
            common.say(sentence)
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


COMMANDS: list[click.Command] = [agent, join, leave]
