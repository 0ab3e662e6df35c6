"""The commands that come with the coordinator: `rma coordinator` and `rma up`; heavy imports wait until used."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rma_core.commands import common
from rma_core.errors import SettingProblem, UsageProblem
from rma_core.settings import AgentSettings, CoordinatorSettings, load_settings

if TYPE_CHECKING:
    from quart import Quart

    from rma_core.host import Plugins

#: Where `rma up --lan` answers other machines.
LAN_PORT = 8443
#: Files that these commands make are their owner's alone.
PRIVATE = 0o077


def plugins_of(settings: CoordinatorSettings) -> Plugins:
    """Return the coordinator's plugins: policies; detectors and runtimes are the agent's."""
    from rma_core.host import Plugins

    return Plugins.discover(
        kinds=["policy"],
        blocked=frozenset(settings.block_plugins),
        only=frozenset(settings.only_plugins) or None,
        approved=frozenset(settings.approve_plugins),
        approval_required="*" not in settings.approve_plugins,
        strict=settings.strict_plugins,
        trace=settings.trace_hooks,
    )


def make_app(settings: CoordinatorSettings, *, pin: str = "") -> Quart:
    """Return the application for these settings."""
    from rma_coordinator.app import create_app
    from rma_coordinator.store import make_store

    settings.home_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = make_store(settings.store, settings.home_path)
    return create_app(settings, store=store, plugins=plugins_of(settings), pin=pin)


async def stopped() -> None:
    """Return on SIGINT or SIGTERM."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, told.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(told.set))
    await told.wait()


@click.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default 8080; 0 takes a free one).")
@click.option("--tls-cert", metavar="FILE", help="Certificate (PEM): speak https.")
@click.option("--tls-key", metavar="FILE", help="Its private key (PEM).")
@click.option("--public-url", metavar="URL", help="Address by which others reach the coordinator.")
@click.option("--store", metavar="URL", help="sqlite (in the state folder), sqlite:PATH, or memory.")
@click.option("--policy", "tier_policy", metavar="NAME", help="Active tier policy (default threshold).")
@click.option("--catalog", metavar="FOLDER", help="Catalog entries, where not those that came along.")
@click.option("--insecure-http", is_flag=True, help="Listen beyond this machine without TLS.")
@common.home_option
def coordinator(insecure_http: bool, **flags: Any) -> None:
    """Run the coordinator: it keeps the fleet, hands out work and answers clients."""
    from rma_coordinator.server import run

    settings = load_settings(CoordinatorSettings, flags=flags, known=(AgentSettings,))
    os.umask(PRIVATE)
    common.set_up_logging(settings.log_level)
    run(_coordinate(settings, insecure_http=insecure_http))


async def _coordinate(settings: CoordinatorSettings, *, insecure_http: bool) -> int:
    import msgspec

    from rma_coordinator.app import pool_of
    from rma_coordinator.certificate import pin_of
    from rma_coordinator.server import Listener, free_port, make_config, run_server, spare_pauses
    from rma_core.http import is_loopback

    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise UsageProblem("--tls-cert and --tls-key go together")
    cert, key = (Path(name) if name else None for name in (settings.tls_cert, settings.tls_key))
    if cert is None and not is_loopback(settings.host) and not insecure_http:
        raise UsageProblem(
            f"on {settings.host} credentials would travel in the clear",
            hints=("give --tls-cert and --tls-key", "behind a proxy that speaks TLS: --insecure-http"),
        )
    listener = Listener(settings.host, free_port(settings.host, settings.port), cert, key)
    settings = msgspec.structs.replace(settings, public_url=settings.public_url or listener.url)
    app = make_app(settings, pin=pin_of(cert) if cert else "")
    config = make_config(None, listener) if cert else make_config(listener, None)

    async def greet() -> None:
        spare_pauses()
        await first_key(app, settings, url=settings.public_url)
        common.say(f"The coordinator answers at {settings.public_url}  (Ctrl-C stops it)")
        common.say(f"{len(pool_of(app).catalog)} services in a catalog that is not signed: a development pool.")

    await run_server(app, config, until=stopped, ready=greet)
    return 0


async def first_key(app: Quart, settings: CoordinatorSettings, *, url: str) -> str:
    """Return the key in the state folder, or make the first one: a pool without any key could not be administered."""
    from rma_coordinator.app import pool_of

    pool = pool_of(app)
    saved = common.read_client(settings.home_path)
    if saved and saved.key and pool.keyring.valid(saved.key):
        key = saved.key
    else:
        key = await pool.first_key()
        common.say(f"A new admin key is in {settings.home_path / common.CLIENT_FILE}")
    pinned = bool(settings.tls_cert and pool.pin)
    certificate = await asyncio.to_thread(Path(settings.tls_cert).read_text, "ascii") if pinned else ""
    common.write_client(settings.home_path, common.ClientFile(url=url, key=key, certificate=certificate))
    return key


@click.command()
@click.option("--port", type=int, help="Port on this machine (default 8080, or the next that is free).")
@click.option("--lan", is_flag=True, help="Also let other machines join, over TLS with a pinned certificate.")
@click.option("--lan-port", type=int, default=LAN_PORT, show_default=True, help="Port for other machines.")
@click.option("--lan-host", metavar="ADDRESS", help="Address by which other machines reach this one.")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME", help="docker, podman or process; repeatable.")
@click.option(
    "--attach", "attach", multiple=True, metavar="URL", help="A model server that already runs here (not served yet)."
)
@click.option("--no-agent", is_flag=True, help="No worker on this machine.")
@click.option("--verbose", is_flag=True, help="Show the log of the coordinator and the agent.")
@common.home_option
def up(**flags: Any) -> None:
    """Try it: a coordinator with its status page and a worker on this machine, ready for requests.

    Everything it keeps is in one folder; Ctrl-C stops all of it.
    """
    from rma_coordinator.server import run
    from rma_coordinator.up import Up

    if flags.pop("attach"):
        raise SettingProblem(
            "--attach comes with the llm service, which is not there yet", hints=("leave it out for now",)
        )
    settings = load_settings(CoordinatorSettings, flags={"home": flags["home"]}, known=(AgentSettings,))
    os.umask(PRIVATE)
    common.set_up_logging(settings.log_level if flags["verbose"] else "warning")
    run(Up(settings, **{name: value for name, value in flags.items() if name != "home"}).main())


COMMANDS: list[click.Command] = [coordinator, up]
