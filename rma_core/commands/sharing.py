"""Model servers that already run on the owner's machine: shown, asked for one by one, never just taken."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import click

from rma_core.commands import common

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from rma_core.agent.attach.attachable import Address
    from rma_core.agent.attach.nearby import Nearby
    from rma_core.settings import AgentSettings


async def found_by(settings: AgentSettings, *besides: str) -> tuple[Nearby, ...]:
    """Return the model servers that run here and are not attached, unless the owner wants nobody to look."""
    from rma_core.agent.attach.nearby import find

    if not settings.find_model_servers:
        return ()
    return await find((*settings.attach, settings.coordinator_url, *besides))


async def show_attached(out: Console, attached: Sequence[Address]) -> None:
    """Show what the owner shares besides; one that is away now is shared once it is there."""
    from rma_core.agent.attach.attached import AttachedServers

    servers = AttachedServers(attached)
    try:
        await servers.look()
    finally:
        await servers.aclose()
    for server in servers.servers:
        out.print(common.safe(server.sentence()))


def show_found(out: Console, found: Sequence[Nearby]) -> None:
    """Show what runs here and is not shared."""
    if found:
        rows = [(one.server, one.url, ", ".join(one.models)) for one in found]
        common.table(("it would not share", "at", "models"), rows, empty="")(out)


def ask_which(found: Iterable[Nearby]) -> list[str]:
    """Ask for each of them whether it is to be shared, and return the addresses of those."""
    if not sys.stdin.isatty():
        return []
    return [
        one.url
        for one in found
        if click.confirm(f"Share {common.printable(one.words(), keep='')} with the pool?", default=False, err=True)
    ]


def options(attach: Iterable[str]) -> str:
    """Return the options that attach these, as a shell takes them."""
    return "".join(f" --attach {shlex.quote(one)}" for one in attach)


def sentence(one: Nearby, command: str) -> str:
    """Return what an owner is told of one that was found; ``command`` is what shares it, with an option."""
    return f"{one.words()} is not shared; to share it: {command}{options([one.url])}"
