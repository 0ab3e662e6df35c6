"""`rma agent install` and `uninstall`: the agent as a service of the system."""

from __future__ import annotations

import asyncio
import getpass
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rma_core.commands import common
from rma_core.commands.machine import settings_of
from rma_core.errors import AgentAbsent, RMAError, StartFailed, UsageProblem
from rma_core.settings import default_home

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from rma_core.agent.installing import Job, Manager
    from rma_core.settings import AgentSettings

    F = TypeVar("F", bound=Callable[..., Any])

#: Seconds in which an agent that was started answers, and how often it is asked.
STARTS_WITHIN_S, LOOK_S = 60.0, 0.25
#: So often in a row it must not run before it is given up.
GONE_LOOKS = 8


def agent_options(command: F) -> F:
    """Add the options with which an agent runs, in the foreground or as a service."""
    for option in (
        common.home_option,
        common.log_options,
        common.model_option,
        common.attach_option,
        click.option(
            "--runtime", "runtimes", multiple=True, metavar="NAME", help="docker, podman or process, in your order."
        ),
        click.option(
            "--insecure-http", is_flag=True, help="Speak plain http to a coordinator that is not this machine."
        ),
        click.option("--coordinator", "coordinator_url", metavar="URL", help="Address of the coordinator."),
    ):
        command = option(command)
    return command


def flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `agent_options` as settings take them: what was not given is ``None``."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {name: value or None for name, value in plain.items()}


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Return `agent_options`, but for the state folder, as they are typed anywhere. Raises UsageProblem."""
    from rma_core.agent.attach.attachable import addresses
    from rma_core.agent.llm.own_models import own_files

    # Both are told here rather than to a log that nobody reads yet.
    addresses(options["attach"])
    options = {**options, "home": None, "models": tuple(one.text for one in own_files(options["models"]))}
    names = {"coordinator_url": "coordinator", "runtimes": "runtime", "models": "model"}
    words: list[str] = []
    for name, value in options.items():
        option = f"--{names.get(name, name).replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value:
            words += [f"{option}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return words


@click.command()
@agent_options
@click.option("--print", "only_print", is_flag=True, help="Print the service's file; change nothing.")
@common.json_option
def install(only_print: bool, as_json: bool, **options: Any) -> None:
    """Have the agent start with this machine, as a service of systemd or launchd, and again when it fails.

    It runs as you, with the options given here and the settings in rma.toml, and no start-up code of installed packages
    runs before it.
    """
    from rma_core.agent.installing import install as write
    from rma_core.agent.installing import job, manager_of, place

    # Whose folder that is comes first: nothing of somebody else's is read.
    home = home_of(options["home"])
    place(home)
    settings = settings_of(**flags(options))
    if settings.home_path != home:
        raise UsageProblem("rma.toml names another state folder", hints=(f"use --home {settings.home_path}",))
    _member(home)
    work = job(home, _arguments(options), os.environ)
    manager = manager_of(work)
    told = {"manager": manager.name, "service": work.name, "file": str(manager.file), "command": list(work.command)}
    _left_behind(settings, work)
    if only_print:
        text = manager.text().decode()
        common.show({**told, "text": text}, as_json, lambda _: click.echo(text, nl=False))
        return
    if manager.runs():
        common.say("The agent that runs finishes what it has …")
    else:
        _not_running_yet(work)
    hint = write(manager, lambda: common.run_async(_answers(home, manager)))
    common.show({**told, "hint": hint}, as_json, lambda out: _show(out, work, manager, hint))


@click.command()
@common.home_option
@common.json_option
def uninstall(home: str | None, as_json: bool) -> None:
    """Stop the agent that `rma agent install` has started, and start it no more; the machine stays a member.

    It finishes what it has first (`drain_s`).
    """
    from rma_core.agent.installing import manager_of, place
    from rma_core.agent.installing import uninstall as remove

    # No settings: what is wrong with them must not keep anybody from stopping it.
    work = place(home_of(home))
    manager = manager_of(work)
    if manager.runs():
        common.say("The agent finishes what it has …")
    remove(manager)
    common.say(f"Stopped, and {manager.file} is gone.")
    if as_json:
        told = {"manager": manager.name, "service": work.name, "file": str(manager.file)}
        common.show(told, as_json, lambda _: None)


def remains(home: Path) -> str:
    """Return what to type to take away the agent that is still installed for a state folder, or nothing."""
    from rma_core.agent.installing import manager_of, place

    try:
        work = place(home)
        return f"rma agent uninstall{_where(work)}" if manager_of(work).file.exists() else ""
    except RMAError:
        return ""


def home_of(home: str | None) -> Path:
    """Return the state folder that an option or the environment names, else the usual one."""
    return Path(home or default_home()).expanduser()


def _where(work: Job) -> str:
    """Return the option that names the job's state folder, where commands would take another."""
    from rma_core.agent.installing import spelled

    return "" if work.home == Path(default_home()).absolute() else f" --home {spelled([str(work.home)])}"


def _member(home: Path) -> None:
    """Raise UsageProblem for a machine that has joined no pool."""
    from rma_core.agent.state import StateFolder

    if (StateFolder(home).load_record() if home.exists() else None) is None:
        raise UsageProblem(
            f"the machine with the state folder {home} has joined no pool",
            hints=("first: rma join URL TOKEN --enrol-only",),
        )


def _left_behind(settings: AgentSettings, work: Job) -> None:
    """Say what this shell has that the agent goes by and the service will not have."""
    from rma_core.agent.installing import PROXIES
    from rma_core.settings import FILE_NAME, describe

    ours = {info.environment for info in describe(type(settings))} | {"COORDINATOR_URL"}
    left = sorted(name for name in ours - {*work.environment, "RMA_HOME"} if os.environ.get(name))
    if left:
        file = settings.home_path / FILE_NAME
        common.say(f"The service does not have this shell's {', '.join(left)}: write what it needs into {file}")
    secret = sorted(name for name in PROXIES if os.environ.get(name) and name not in work.environment)
    if secret:
        common.say(f"The service does not have this shell's {', '.join(secret)}: there is a password in it.")


def _not_running_yet(work: Job) -> None:
    """Raise UsageProblem where an agent runs with the state folder that is not this service."""
    from rma_core.agent.control import ask

    try:
        common.run_async(ask(work.home, "status"))
    except AgentAbsent:
        return
    raise UsageProblem(
        f"an agent runs already with the state folder {work.home}",
        hints=(f"stop it first: Ctrl-C, or `rma drain{_where(work)}`",),
    )


async def _answers(home: Path, manager: Manager) -> None:
    """Wait until the agent answers. Raises StartFailed."""
    from rma_core.agent.control import ask

    deadline, gone = asyncio.get_running_loop().time() + STARTS_WITHIN_S, 0
    while asyncio.get_running_loop().time() < deadline and gone < GONE_LOOKS:
        try:
            await ask(home, "status")
        except AgentAbsent:
            gone = 0 if await asyncio.to_thread(manager.runs) else gone + 1
            await asyncio.sleep(LOOK_S)
        else:
            return
    where = manager.log or "`rma agent` in this shell"
    raise StartFailed("the agent was started and does not answer, so that is taken back", hints=(f"why: {where}",))


def _show(out: Console, work: Job, manager: Manager, hint: str) -> None:
    """Print what runs now, with commands to be copied: each in one line, however long."""
    lines = [f"The agent runs as {getpass.getuser()}, by {manager.name}: {manager.file}"]
    lines += [f"How it stands:  rma status{_where(work)}"]
    lines += [f"What it says:   {manager.log} --follow"] if manager.log else []
    lines += [f"To stop it:     rma agent uninstall{_where(work)}", hint]
    for line in filter(None, lines):
        out.print(common.safe(line), soft_wrap=True)


COMMANDS: list[click.Command] = [install, uninstall]
