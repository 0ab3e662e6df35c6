"""Running a coordinator in this process: what `rma coordinator` does, and what `rma up` shares with it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rma_coordinator.app import create_app, pool_of
from rma_coordinator.certificate import pin_of
from rma_coordinator.server import Listener, listen, make_config, run_server, spare_pauses
from rma_coordinator.store import make_store
from rma_core.addresses import is_loopback
from rma_core.agent.state import StateFolder
from rma_core.commands import common
from rma_core.errors import UsageProblem
from rma_core.host import Plugins
from rma_core.settings import AgentSettings, CoordinatorSettings, load_settings

if TYPE_CHECKING:
    from quart import Quart

#: Seconds that the client key of `rma up` lasts: as long as its admin key.
CLIENT_KEY_S = 90 * 86_400.0


async def coordinate(settings: CoordinatorSettings, *, insecure_http: bool) -> int:
    """Run a coordinator until it is told to stop. Raises UsageProblem when credentials would travel in the clear."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise UsageProblem("--tls-cert and --tls-key go together")
    cert, key = (Path(name) if name else None for name in (settings.tls_cert, settings.tls_key))
    if cert is None and not is_loopback(settings.host) and not insecure_http:
        raise UsageProblem(
            f"on {settings.host} credentials would travel in the clear",
            hints=("give --tls-cert and --tls-key", "behind a proxy that speaks TLS: --insecure-http"),
        )
    with contextlib.closing(listen(settings.host, settings.port, cert=cert, key=key)) as listener:
        return await _coordinate(settings, listener)


async def _coordinate(settings: CoordinatorSettings, listener: Listener) -> int:
    cert = listener.cert
    settings = msgspec.structs.replace(settings, public_url=settings.public_url or listener.url)
    app = make_app(settings, pin=pin_of(cert) if cert else "")
    config = make_config(None if cert else listener, listener if cert else None, server=settings.server)

    async def greet() -> None:
        spare_pauses()
        await first_key(app, settings, url=settings.public_url)
        common.say(f"The coordinator answers at {settings.public_url}  (Ctrl-C stops it)")
        services = ", ".join(sorted(pool_of(app).catalog)) or "none"
        common.say(f"Services: {services}. The catalog is not signed: this is a development pool.")

    await run_server(app, config, until=stopped, ready=greet)
    return 0


def make_app(settings: CoordinatorSettings, *, pin: str = "") -> Quart:
    """Return the application for these settings; its plugins are policies only, the others are the agent's."""
    StateFolder(settings.home_path).prepare()
    store = make_store(settings.store, settings.home_path)
    plugins = Plugins.discover(kinds=["policy"], **settings.plugin_rules())

    def settings_now() -> CoordinatorSettings:
        return load_settings(CoordinatorSettings, flags={"home": settings.home}, known=(AgentSettings,))

    return create_app(settings, store=store, plugins=plugins, pin=pin, settings_now=settings_now)


async def stopped() -> None:
    """Return on SIGINT or SIGTERM."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, told.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(told.set))
    await told.wait()


async def first_key(app: Quart, settings: CoordinatorSettings, *, url: str) -> str:
    """Return the key in the state folder, or make the first one: a pool without any key could not be administered."""
    pool = pool_of(app)
    saved = common.read_client(settings.home_path)
    if saved and saved.key and pool.keyring.valid(saved.key):
        key = saved.key
    else:
        key = await pool.first_key()
        common.say(f"A new admin key is in {settings.home_path / common.CLIENT_FILE}")
    pinned = bool(settings.tls_cert and pool.pin)
    certificate = await asyncio.to_thread(Path(settings.tls_cert).read_text, "ascii") if pinned else ""
    # Another pool's client key would only be refused.
    client_key = saved.client_key if saved and pool.keyring.valid(saved.client_key) else ""
    made = common.ClientFile(url=url, key=key, client_key=client_key, certificate=certificate)
    common.write_client(settings.home_path, made)
    return key


async def client_key(app: Quart, settings: CoordinatorSettings) -> str:
    """Return the client key in the state folder, or make one: it opens services only. Comes after `first_key`."""
    pool, saved = pool_of(app), common.read_client(settings.home_path)
    if saved is None or saved.client_key:
        return saved.client_key if saved else ""
    key, _ = await pool.create_key(kind="client", label="rma up", scopes=("infer:*",), ttl_s=CLIENT_KEY_S)
    common.write_client(settings.home_path, msgspec.structs.replace(saved, client_key=key))
    return key
