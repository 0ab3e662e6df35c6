"""The commands that come with the coordinator: `rma coordinator` and `rma up`; heavy imports wait until used."""

from __future__ import annotations

import os
from typing import Any

import click

from rma_core.commands import common
from rma_core.settings import AgentSettings, CoordinatorSettings, load_settings

#: Where `rma up --lan` answers other machines.
LAN_PORT = 8443
#: Files that these commands make are their owner's alone.
PRIVATE = 0o077


#: 0 takes a free one.
PORT = click.IntRange(0, 65_535)


@click.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=PORT, help="Port to listen on (default 8080; 0 takes a free one).")
@click.option("--tls-cert", metavar="FILE", help="Certificate (PEM): speak https.")
@click.option("--tls-key", metavar="FILE", help="Its private key (PEM).")
@click.option("--public-url", metavar="URL", help="Address by which others reach the coordinator.")
@click.option(
    "--server",
    type=click.Choice(("hypercorn", "uvicorn")),
    help="What serves HTTP (default hypercorn); uvicorn for large pools: pip install 'rma-coordinator[uvicorn]'.",
)
@click.option("--store", metavar="URL", help="sqlite (in the state folder), sqlite:PATH, or memory.")
@click.option(
    "--policy",
    "tier_policy",
    metavar="NAME",
    help="Active tier policy: an installed one, or a file in the folder policies (threshold).",
)
@click.option("--catalog", metavar="FOLDER", help="Catalog entries, where not those that came along.")
@click.option("--insecure-http", is_flag=True, help="Listen beyond this machine without TLS.")
@common.log_options
@common.home_option
@common.errors_option
def coordinator(insecure_http: bool, **flags: Any) -> None:
    """Run the coordinator: it keeps the fleet, hands out work and answers clients."""
    from rma_coordinator.server import run
    from rma_coordinator.serving import coordinate

    settings = load_settings(CoordinatorSettings, flags=flags, known=(AgentSettings,))
    os.umask(PRIVATE)
    common.set_up_logging(settings.log_level, as_json=settings.log_json)
    run(coordinate(settings, insecure_http=insecure_http))


@click.command()
@click.option("--port", type=PORT, help="Port on this machine (default 8080, or the next that is free).")
@click.option(
    "--lan",
    is_flag=True,
    envvar="RMA_LAN",
    help="Also let other machines join, over TLS with a pinned certificate (RMA_LAN).",
)
@click.option(
    "--lan-port",
    type=PORT,
    default=LAN_PORT,
    show_default=True,
    envvar="RMA_LAN_PORT",
    help="Port for other machines (RMA_LAN_PORT).",
)
@click.option(
    "--lan-host",
    metavar="ADDRESS",
    envvar="RMA_LAN_HOST",
    help="Address by which other machines reach this one (RMA_LAN_HOST).",
)
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME", help="docker, podman or process; repeatable.")
@common.attach_option
@common.model_option
@click.option("--no-agent", is_flag=True, envvar="RMA_NO_AGENT", help="No worker on this machine (RMA_NO_AGENT).")
@click.option(
    "--verbose", is_flag=True, envvar="RMA_VERBOSE", help="Show the log of the coordinator and the agent (RMA_VERBOSE)."
)
@common.home_option
@common.errors_option
def up(**flags: Any) -> None:
    """Try it: a coordinator with its status page and a worker on this machine, ready for requests.

    Everything it keeps is in one folder; Ctrl-C stops all of it.
    """
    from rma_coordinator.server import run
    from rma_coordinator.up import Up

    settings = load_settings(CoordinatorSettings, flags={"home": flags["home"]}, known=(AgentSettings,))
    os.umask(PRIVATE)
    common.set_up_logging(settings.log_level if flags["verbose"] else "warning", as_json=settings.log_json)
    run(Up(settings, **{name: value for name, value in flags.items() if name != "home"}).main())


COMMANDS: list[click.Command] = [coordinator, up]
