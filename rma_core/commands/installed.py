"""`rma agent install` and `uninstall`: the agent as a service of the system."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rma_core.commands import common
from rma_core.commands.machine import settings_of
from rma_core.errors import AgentAbsent, RMAError, StartFailed, UsageProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rich.console import Console

    from rma_core.agent.installing import Job, Manager
    from rma_core.settings import AgentSettings

    F = TypeVar("F", bound=Callable[..., Any])

#: Seconds in which an agent that was started answers, and how often it is asked.
STARTS_WITHIN_S, LOOK_S = 60.0, 0.25


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

    It runs as you, with the options given here and the settings in rma.toml, and without any start-up code of
    installed packages: nothing runs in it that you have not approved. As root it is a service of the machine, and runs
    as the user whose state folder it is.
    """
    from rma_core.agent.installing import install as write
    from rma_core.agent.installing import manager_of

    settings = settings_of(**flags(options))
    _member(settings)
    work = _job(settings, _arguments(options))
    manager = manager_of(work)
    told = {"manager": manager.name, "service": work.name, "file": str(manager.file), "command": list(work.command)}
    _left_behind(settings)
    if only_print:
        text = manager.text().decode()
        common.show({**told, "text": text}, as_json, lambda _: click.echo(text, nl=False))
        return
    if not manager.running():
        _not_running_yet(settings.home_path)
    hint = write(manager)
    common.run_async(_answers(settings.home_path, manager))
    common.show({**told, "hint": hint}, as_json, lambda out: _show(out, work, manager, hint))


@click.command()
@common.home_option
@common.json_option
def uninstall(home: str | None, as_json: bool) -> None:
    """Stop the agent that `rma agent install` has started, and start it no more; the machine stays a member."""
    from rma_core.agent.installing import manager_of
    from rma_core.agent.installing import uninstall as remove

    settings = settings_of(home)
    work = _job(settings, [])
    manager = manager_of(work)
    remove(manager)
    told = {"manager": manager.name, "service": work.name, "file": str(manager.file)}
    common.say(f"Stopped, and {manager.file} is gone.")
    if as_json:
        common.show(told, as_json, lambda _: None)


def remains(settings: AgentSettings) -> str:
    """Return the file of an agent that is still installed, or nothing."""
    from rma_core.agent.installing import manager_of

    try:
        file = manager_of(_job(settings, [])).file
    except RMAError:
        return ""
    return str(file) if file.exists() else ""


def _job(settings: AgentSettings, arguments: list[str]) -> Job:
    from rma_core.agent.installing import job

    return job(settings.home_path, arguments, os.environ, drain_s=settings.drain_s)


def _member(settings: AgentSettings) -> None:
    """Raise UsageProblem for a machine that has joined no pool."""
    from rma_core.agent.state import StateFolder

    home = settings.home_path
    if (StateFolder(home).load_record() if home.exists() else None) is None:
        raise UsageProblem(
            f"the machine with the state folder {home} has joined no pool",
            hints=("first: rma join URL TOKEN --enrol-only",),
        )


def _left_behind(settings: AgentSettings) -> None:
    """Say which settings of this shell the service will not have."""
    from rma_core.agent.installing import KEPT
    from rma_core.settings import FILE_NAME, describe

    names = {info.environment for info in describe(type(settings))} | {"COORDINATOR_URL"}
    left = sorted(name for name in names - {*KEPT, "RMA_HOME"} if os.environ.get(name))
    if left:
        file = settings.home_path / FILE_NAME
        common.say(f"The service does not have this shell's {', '.join(left)}: write what it needs into {file}")


def _not_running_yet(home: Path) -> None:
    """Raise UsageProblem where an agent runs with the folder that is no service."""
    from rma_core.agent.control import ask

    try:
        common.run_async(ask(home, "status"))
    except AgentAbsent:
        return
    raise UsageProblem(
        f"an agent runs already with the state folder {home}", hints=("stop it first: Ctrl-C, or `rma drain`",)
    )


async def _answers(home: Path, manager: Manager) -> None:
    """Wait until the agent answers. Raises StartFailed."""
    from rma_core.agent.control import ask

    deadline = asyncio.get_running_loop().time() + STARTS_WITHIN_S
    while asyncio.get_running_loop().time() < deadline:
        try:
            await ask(home, "status")
        except AgentAbsent:
            if not await asyncio.to_thread(manager.running):
                break
            await asyncio.sleep(LOOK_S)
        else:
            return
    raise StartFailed(
        "the service was started, and its agent does not answer",
        hints=(f"what it says: {manager.log}" if manager.log else "what it says: `rma agent` in this shell",),
    )


def _show(out: Console, work: Job, manager: Manager, hint: str) -> None:
    from rma_core.agent.installing import spelled

    out.print(common.safe(f"The agent runs as {work.user or 'you'}, by {manager.name}: {manager.file}"))
    where = "" if work.usual else f" --home {spelled([str(work.home)])}"
    out.print(common.safe(f"How it stands:  rma status{where}"))
    if manager.log:
        out.print(common.safe(f"What it says:   {manager.log}"))
    out.print(common.safe(f"To stop it:     rma agent uninstall{where}"))
    if hint:
        out.print(common.safe(hint))


COMMANDS: list[click.Command] = [install, uninstall]
