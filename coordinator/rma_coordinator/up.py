"""`rma up`: a coordinator, its status page and a worker on this machine in one go; Ctrl-C stops all of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from rma_coordinator import local_worker, up_words
from rma_coordinator.app import load_catalog, load_model_catalog, pool_of
from rma_coordinator.certificate import own_pair, pin_of
from rma_coordinator.engine_choice import choose_runtimes, service_sources
from rma_coordinator.server import Listener, listen, make_config, run_server, spare_pauses
from rma_coordinator.serving import client_key, first_key, make_app, stopped
from rma_core.agent.attach.attachable import addresses
from rma_core.agent.llm.own_models import LLAMA_CPP, own_files
from rma_core.agent.state import StateFolder
from rma_core.commands import common, sharing
from rma_core.commands.machine import settings_of
from rma_core.errors import SettingProblem, UsageProblem
from rma_core.models.worker import ATTACHED
from rma_core.settings import FILE_NAME, FILE_VARIABLE

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from pathlib import Path

    from quart import Quart

    from rma_coordinator.engine_choice import Choice
    from rma_core.catalog import CatalogEntry
    from rma_core.models.worker import ContainerStatus
    from rma_core.settings import CoordinatorSettings

#: Ports that are tried when 8080 is taken and nobody asked for it.
MORE_PORTS = 20
#: Seconds between two starts of a worker that ends by itself: doubled each time, with jitter.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
#: So often a service may fail while it gets ready before `rma up` goes on without it; the worker goes on trying.
TROUBLES = 2
#: How often the state of the local worker is looked at while it gets ready.
LOOK_S = 0.1

#: Of our own environment, what the local worker must not see or be confused by.
NOT_FOR_THE_AGENT = ("RMA_KEY", "COORDINATOR_URL", "RMA_INSECURE_HTTP")
LOCAL = "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - `--lan` asks for exactly this


class Keys(NamedTuple):
    """What `rma up` prints: a key with every scope, and one that only sends requests."""

    admin: str
    client: str


class Up:
    """One run of `rma up`."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        port: int | None,
        lan: bool,
        lan_port: int,
        lan_host: str | None,
        runtimes: tuple[str, ...],
        attach: tuple[str, ...],
        models: tuple[str, ...],
        no_agent: bool,
        verbose: bool,
    ) -> None:
        self.home = settings.home_path
        #: What the owner attached here, or in the settings; a wrong address ends it before anything starts.
        self.attach = () if no_agent else tuple(attach or settings_of(str(self.home)).attach)
        addresses(self.attach)
        #: Models that are shared from files, given here or in the settings.
        self.models = () if no_agent else _models(models) or tuple(settings_of(str(self.home)).models)
        self.verbose = verbose
        self.no_agent = no_agent
        self.asked = runtimes
        self.sources = service_sources()
        StateFolder(self.home).prepare()
        with contextlib.ExitStack() as taken:
            self.plain = taken.enter_context(contextlib.closing(find_listener(port, settings.port)))
            self.secure = taken.enter_context(contextlib.closing(self._secure(lan_host, lan_port))) if lan else None
            self.lan_url = self.secure.url.replace(EVERYWHERE, lan_host or lan_address()) if self.secure else ""
            self.settings = msgspec.structs.replace(
                settings, port=self.plain.port, public_url=self.lan_url or self.plain.url
            )
            self.pin = pin_of(self.secure.cert) if self.secure and self.secure.cert else ""
            self.catalog = load_catalog(self.settings)
            #: The addresses, which are held from now on.
            self._taken = taken.pop_all()
        self.agent: asyncio.subprocess.Process | None = None
        self.stopping = asyncio.Event()
        #: Whether it was said what a person needs next.
        self.shown = False

    def _secure(self, lan_host: str | None, lan_port: int) -> Listener:
        names = ["localhost", socket.gethostname(), lan_host or lan_address()]
        pair = own_pair(self.home / "tls", names=names)
        return listen(EVERYWHERE, lan_port, cert=pair.cert, key=pair.key)

    async def main(self) -> int:
        """Run until Ctrl-C."""
        with self._taken:
            return await self._main()

    async def _main(self) -> int:
        common.say("Starting the coordinator …")
        app = make_app(self.settings, pin=self.pin)
        config = make_config(self.plain, self.secure, server=self.settings.server)
        local: list[asyncio.Task[None]] = []

        async def ready() -> None:
            spare_pauses()
            keys = Keys(await first_key(app, self.settings, url=self.plain.url), await client_key(app, self.settings))
            local.append(asyncio.create_task(self._local(app, keys), name="local worker"))

        try:
            await run_server(app, config, until=lambda: self._until(local), ready=ready)
        finally:
            for task in local:
                task.cancel()
            if local:
                await asyncio.wait(local)
            common.say("Stopped.")
        return 0

    async def _until(self, local: list[asyncio.Task[None]]) -> None:
        """Wait for Ctrl-C, or for the local part to fail; then stop the worker while the coordinator still answers."""
        told = asyncio.create_task(stopped())
        # Looked at again and again: the local part begins once the server is ready, after this.
        try:
            while not told.done():
                await asyncio.wait({told}, timeout=LOOK_S)
                for task in local:
                    if task.done():
                        # A failure ends all of it: raised here, it is told with its hints once everything has stopped.
                        task.result()
        finally:
            told.cancel()
            await self._stop()

    async def _stop(self) -> None:
        """Let the worker finish and leave while the coordinator still answers."""
        self.stopping.set()
        if self.agent is not None and self.agent.returncode is None:
            await local_worker.stop(self.agent, drain_s=settings_of(str(self.home)).drain_s)

    # -- the local worker --------------------------------------------------------------------------------------

    async def _local(self, app: Quart, keys: Keys) -> None:
        """Start the worker on this machine, show how it gets ready, then keep it running."""
        if self.no_agent:
            await self._banner(app, keys, ())
            return
        choice = await choose_runtimes(self._to_run(), self.asked, self.home, self.sources)
        common.say(choice.sentence)
        token, _ = await pool_of(app).create_token(label="rma up", uses=1, ttl_s=3600)
        pause_s = FIRST_PAUSE_S
        while not self.stopping.is_set():
            began = asyncio.get_running_loop().time()
            self.agent = await self._spawn(choice, token)
            watching = asyncio.create_task(self._watch(app, keys), name="services get ready")
            try:
                code = await self._ended(watching)
            finally:
                watching.cancel()
                await asyncio.wait({watching})
            if self.stopping.is_set():
                return
            if asyncio.get_running_loop().time() - began > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            wait_s = pause_s * random.uniform(0.5, 1)  # noqa: S311 - jitter is no secret
            common.say(
                f"The worker ended by itself (exit code {code}) and is started again in {wait_s:.0f} s. "
                f"Its log: {self._log}"
            )
            await asyncio.sleep(wait_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _to_run(self) -> list[CatalogEntry]:
        """Return what this machine may be given to run; engines of models only where there are models."""
        served = {entry.format for entry in load_model_catalog(self.settings)}
        entries = [entry for entry in self.catalog if not entry.model_format or entry.model_format in served]
        return [*entries, LLAMA_CPP] if self.models else entries

    @property
    def _log(self) -> Path:
        return self.home / "agent.log"

    async def _spawn(self, choice: Choice, token: str) -> asyncio.subprocess.Process:
        """Start `rma agent` with a state folder of its own, told everything by its environment."""
        environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_AGENT}
        environment |= {
            "RMA_CONFIG": os.environ.get(FILE_VARIABLE) or str(self.home / FILE_NAME),
            "RMA_HOME": str(self.home / "agent"),
            "RMA_PLUGIN_FOLDER": os.environ.get("RMA_PLUGIN_FOLDER") or str(self.home / "plugins"),
            "RMA_COORDINATOR_URL": self.plain.url,
            "RMA_JOIN_TOKEN": token,
            "RMA_RUNTIMES": ",".join(choice.runtimes),
            "RMA_ATTACH": ",".join(self.attach),
            "RMA_MODELS": ",".join(self.models),
            "RMA_SERVICE_SOURCES": ",".join(map(str, self.sources)),
            "RMA_LOG_LEVEL": "info",
        }
        await asyncio.to_thread(local_worker.shorten, self._log)
        log = None if self.verbose else self._log.open("ab")
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "rma_core", "agent", "--until-stdin-ends",
                stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, env=environment,
                # Ctrl-C reaches the whole terminal; we tell the worker, once, while the coordinator answers.
                start_new_session=True,
            )  # fmt: skip
        finally:
            if log is not None:
                log.close()

    async def _ended(self, watching: asyncio.Task[None]) -> int:
        """Wait for the worker's end and return its exit code; what goes wrong in watching it is not lost."""
        ended = asyncio.create_task(local_worker.ended(cast("Process", self.agent), self._log), name="worker's end")
        try:
            await asyncio.wait({ended, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            return await ended
        finally:
            ended.cancel()

    async def _watch(self, app: Quart, keys: Keys) -> None:
        """Tell how the worker and its services get ready; once the first one is, say what a person needs next."""
        fleet, said, troubles = pool_of(app).fleet, dict[str, str](), Counter[str]()

        def tell(name: str, words: str) -> None:
            if said.get(name) != words:
                said[name] = words
                common.say(common.printable(f"  {name}: {words}", keep=""))

        def settled(status: ContainerStatus) -> bool:
            words, name = up_words.words(status), up_words.name(status)
            troubles[status.name] += status.state == "backoff" and said.get(name) != words
            tell(name, words)
            return status.state in ("healthy", "failed", "refused") or troubles[status.name] >= TROUBLES

        if not self.shown:
            common.say("Detecting this machine's hardware …")
        while self.agent is not None and self.agent.returncode is None:
            worker = next((w for w in fleet.workers.values() if w.status != "offline"), None)
            if worker is not None:
                tell(worker.id, worker.brief.tier_reason)
                done = {status.name for status in worker.containers if settled(status)}
                own = [status.name for status in worker.containers if status.by_owner]
                # One that is attached and away may come any time: it is told of, and not waited for.
                looked_at = sum(s.runtime == ATTACHED and s.state != "pending" for s in worker.containers)
                assigned = {assignment.name for assignment in worker.brief.assignment}
                settled_own = done.issuperset(own)
                all_done = assigned <= done and settled_own and looked_at >= len(addresses(self.attach))
                answers = any(s.service == up_words.EXAMPLE and s.state == "healthy" for s in worker.containers)
                if (all_done or (answers and settled_own)) and not self.shown:
                    self.shown = True
                    await self._banner(app, keys, worker.containers)
                if all_done:
                    return
            await asyncio.sleep(LOOK_S)

    # -- what is printed ---------------------------------------------------------------------------------------

    async def _banner(self, app: Quart, keys: Keys, services: tuple[ContainerStatus, ...]) -> None:
        """Print what a person needs next: the page, a key, a request that works, how to add a machine."""
        lines = [
            "",
            f"Ready.  Status page  {self.plain.url}/#key={keys.admin}",
            f"        Admin key    {keys.admin}   (all scopes; also in {self.home / common.CLIENT_FILE})",
            f"        Client key   {keys.client}   (sends requests, nothing else)",
        ]
        lines += up_words.examples(services, url=self.plain.url, key=keys.client, folder=self.home)
        ill = [
            common.printable(f"  {up_words.name(s)} is not ready yet: {s.reason or s.state}", keep="")
            for s in services
            if s.state != "healthy"
        ]
        beside = [] if self.no_agent else await self._beside()
        lines += ["", *ill, *beside, *await self._join_lines(app), "Ctrl-C stops everything."]
        common.say("\n".join(lines))

    async def _beside(self) -> list[str]:
        """Return what runs here and could be shared, too."""
        found = await sharing.found_by(settings_of(str(self.home)), self.plain.url, self.lan_url, *self.attach)
        return [common.printable(f"  {sharing.sentence(one, 'rma up')}", keep="") for one in found]

    async def _join_lines(self, app: Quart) -> list[str]:
        if not self.lan_url:
            return ["Add another machine: stop this and start it with  rma up --lan  (in a clone: make up ARGS=--lan)"]
        secret, _ = await pool_of(app).create_token(label="rma up --lan", uses=1, ttl_s=3600)
        return [
            "Add another machine (once, within an hour; more with `rma tokens create`):",
            f"  rma join {self.lan_url} {secret}{self.pin}",
        ]


def _models(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the models that were named on the command line. Raises UsageProblem for what is not there."""
    for text, file in zip(texts, own_files(texts), strict=True):
        if not file.path.exists():
            raise UsageProblem(f"there is no model file {file.path}")
        if "," in text:
            raise UsageProblem(f"{text!r}: a path with a comma cannot be given so", hints=("`models` in rma.toml can",))
    return texts


def find_listener(asked: int | None, usual: int) -> Listener:
    """Listen on the asked port, else on the usual one or the next that is free. Raises SettingProblem."""
    if asked is not None:
        return listen(LOCAL, asked)
    for port in range(usual, usual + MORE_PORTS):
        with contextlib.suppress(SettingProblem):
            return listen(LOCAL, port)
    return listen(LOCAL, 0)


def lan_address() -> str:
    """Return this machine's address on its network; nothing is sent to find out."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            # Connecting a datagram socket only asks the routing table which address would be used.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
