"""Services as plain processes: not isolated, so only where the owner said so; they live and die with the agent.

A service is started as ``python -m MODULE`` in its own environment and told where to listen: ``--uds PATH`` (a Unix
socket in a folder only this user can enter), or ``--host 127.0.0.1 --port N`` where there are no Unix sockets or their
path would be too long. It answers HTTP there, and ends on SIGTERM. What it gets of the machine: ``env`` of its catalog
entry, a search path, the language settings, and a private folder as working, home and temporary folder.

Limits without containers: on Linux each process may address twice the memory limit of its service, and open 4096
files; the supervisor looks every two seconds at what the whole service uses and ends one above its limit of memory or
processes. CPU time is not limited, but the service steps back behind the owner's programs (nice 5).
"""

from __future__ import annotations

import asyncio
import logging
import platform
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from msgspec import Meta

from rma_core.builtin import process_install, process_service, supervised
from rma_core.errors import (
    ImageMissing,
    PortTaken,
    RuntimeAbsent,
    RuntimeFailure,
    StartFailed,
)
from rma_core.host import hookimpl
from rma_core.interfaces import (
    ContainerHandle,
    ContainerRuntime,
    ContainerSpec,
    ContainerState,
    ContainerStats,
    RuntimeHealth,
)
from rma_core.models.strict import convert
from rma_core.service_platforms import python_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_core.builtin.supervised import Supervised
    from rma_core.interfaces import PluginConfig, PullProgress

logger = logging.getLogger(__name__)

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: How long `start` watches a new process for a sudden end; one that listens sooner is returned sooner.
SETTLE_S = 1.0
#: How often it looks meanwhile.
LOOK_S = 0.02
#: Ports that are tried when somebody else takes the one that was free a moment ago.
PORT_TRIES = 3
#: How long services get to end when the agent ends.
GRACE_S = 5.0


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[plugins.process]``, which the agent completes from its own settings."""

    home: Annotated[str, Meta(description="State folder; environments and running services live below it.")] = ""
    sources: Annotated[
        list[str], Meta(description="Folders with the services' distributions, as source projects or wheels.")
    ] = []


class _Run(NamedTuple):
    """One service that was started and not yet removed."""

    spec: ContainerSpec
    handle: ContainerHandle
    folder: Path
    environment: Path
    address: process_service.Address
    program: Supervised


@hookimpl
def rma_container_runtimes(config: PluginConfig) -> Iterable[ContainerRuntime]:
    """Return the runtime named ``process``."""
    settings = convert(config, ProcessSettings, subject="[plugins.process]")
    return [ProcessRuntime(home=settings.home, sources=settings.sources)]


class ProcessRuntime(ContainerRuntime):
    """Runs services as supervised processes of this user, each in a virtual environment of its own."""

    name = "process"
    isolated = False

    def __init__(self, *, home: str, sources: Iterable[str], grace_s: float = GRACE_S) -> None:
        """Use the state folder ``home`` and the owner's folders ``sources``; touches nothing yet.

        ``grace_s`` is what services get to end when the agent does, whether it closes or dies.
        """
        self._home = Path(home).expanduser().absolute() if home else None
        self._folders = tuple(Path(folder).expanduser().absolute() for folder in sources)
        self._grace_s = grace_s
        self._runs: dict[str, _Run] = {}
        self._installing = asyncio.Lock()
        self._swept = False

    async def probe(self) -> RuntimeHealth:
        """Say whether environments can be made and there is anything to make them from."""
        version = f"Python {platform.python_version()}"
        reason = await asyncio.to_thread(self._unusable)
        if reason:
            return RuntimeHealth(state="unhealthy", reason=reason, version=version)
        return RuntimeHealth(
            state="healthy",
            reason="processes are not isolated",
            version=version,
            features=("limit:memory", "limit:pids"),
        )

    def _unusable(self) -> str:
        if self._home is None:
            return "the process runtime has no state folder: set `home`"
        if not any(folder.is_dir() for folder in self._folders):
            named = ", ".join(map(str, self._folders)) or "none"
            return f"there is no folder of services (named: {named}): set `service_sources`"
        return process_install.missing_tools()

    def _state_folder(self) -> Path:
        if self._home is None:
            raise RuntimeAbsent(self._unusable())
        return self._home

    async def _source(self, spec: ContainerSpec) -> process_install.Source:
        """Look the distribution up. Raises ImageMissing."""
        if spec.process is None:
            message = f"the catalog does not say how {spec.service} runs as a process; it runs in containers only"
            raise ImageMissing(message)
        wanted = spec.process.distribution
        try:
            source = await asyncio.to_thread(process_install.find_source, wanted, self._folders)
        except OSError as error:
            message = f"the source of {wanted} cannot be read: {error}"
            raise ImageMissing(message) from None
        if source is None:
            looked = ", ".join(map(str, self._folders)) or "no folder is named"
            message = f"no folder of services holds {wanted} ({looked}): {process_install.SOURCE_HINT}"
            raise ImageMissing(message)
        return source

    async def has_image(self, spec: ContainerSpec) -> bool:
        """Say whether the environment for the source as it is now is complete."""
        home = self._state_folder()
        try:
            source = await self._source(spec)
        except ImageMissing:
            return False
        return process_install.is_complete(process_install.environment_of(home, source))

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        """Make the environment, one at a time, and remove those that it replaces."""
        home = self._state_folder()
        source = await self._source(spec)
        async with self._installing:
            if process_install.is_complete(process_install.environment_of(home, source)):
                return
            await process_install.install(source, home=home, folders=self._folders, progress=progress)
            used = frozenset(run.environment for run in self._runs.values())
            await asyncio.to_thread(process_install.remove_others, source, home=home, used=used)

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        """Start the service, and return once it listens, or has run for a second without doing so."""
        home = self._state_folder()
        source = await self._source(spec)
        environment = process_install.environment_of(home, source)
        if not process_install.is_complete(environment):
            message = f"{source.distribution} is not installed yet; it has to be pulled first"
            raise ImageMissing(message)
        process_service.refuse_dangerous(spec)
        for run in [r for r in self._runs.values() if _same_service(r.spec, spec)]:
            await self.stop(run.handle)
        for _ in range(PORT_TRIES):
            run = await self._launch(spec, environment, source.key)
            if await self._settle(run):
                return run.handle
            ended = await self.inspect(run.handle)
            await self.stop(run.handle, grace_s=0)
            if not process_service.in_use(ended.reason):
                message = f"{spec.name} {ended.reason}"
                raise StartFailed(message)
        message = f"{spec.name} found its port taken {PORT_TRIES} times; something on this machine takes many ports"
        raise PortTaken(message)

    async def _launch(self, spec: ContainerSpec, environment: Path, key: str) -> _Run:
        """Start one process and remember it; a failure leaves nothing of it. Raises StartFailed, OutOfSpace."""
        run_id = secrets.token_hex(4)
        folder = self._state_folder() / "run" / run_id
        try:
            await asyncio.to_thread(process_service.make_folders, folder)
            address = process_service.choose_address(folder)
            order = process_service.order_for(spec, folder, python_of(environment), address, grace_s=self._grace_s)
            program = await supervised.launch(order, errors=folder / process_service.COMPLAINTS)
            handle = ContainerHandle(
                runtime=self.name,
                id=run_id,
                name=spec.name,
                service=spec.service,
                spec_hash=spec.spec_hash,
                image_id=key,
            )
            run = self._runs[run_id] = _Run(spec, handle, folder, environment, address, program)
            return run
        except OSError as error:
            if process_install.is_out_of_space(error):
                raise process_install.out_of_space(folder.parent) from None
            message = f"{spec.name} cannot be started: {error}"
            raise StartFailed(message) from None
        finally:
            if run_id not in self._runs:
                shutil.rmtree(folder, ignore_errors=True)

    async def _settle(self, run: _Run) -> bool:
        """Wait until the service listens or has run for a while; say whether it still runs."""
        try:
            async with asyncio.timeout(SETTLE_S):
                while not run.program.ended_or_gone and not await asyncio.to_thread(  # noqa: ASYNC110 - nobody tells when
                    process_service.listens, run.address, run.folder, run.program.keeper, run.program.order.mark
                ):
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            await asyncio.shield(self.stop(run.handle, grace_s=0))
            raise
        return not run.program.ended_or_gone

    async def inspect(self, handle: ContainerHandle) -> ContainerState:
        """Say how the service stands; why it ended, with its last words."""
        run = self._runs.get(handle.id)
        if run is None:
            return ContainerState(state="missing")
        if not run.program.ended_or_gone:
            return ContainerState(state="running")
        ended = run.program.ended
        code = ended.code if ended is not None else None
        return ContainerState(
            state="exited",
            exit_code=128 - code if code is not None and code < 0 else code,
            reason=await asyncio.to_thread(process_service.how_it_ended, ended, run.folder, run.spec),
        )

    async def endpoint(self, handle: ContainerHandle) -> str:
        """Return ``unix:PATH`` or ``http://127.0.0.1:PORT``. Raises RuntimeFailure for an unknown handle."""
        return self._run(handle).address.endpoint

    def _run(self, handle: ContainerHandle) -> _Run:
        run = self._runs.get(handle.id)
        if run is None:
            message = f"{handle.name} does not run"
            raise RuntimeFailure(message)
        return run

    async def logs(self, handle: ContainerHandle, *, tail_lines: int = 100) -> str:
        """Return the last output that was kept (up to 2 MiB are)."""
        run = self._runs.get(handle.id)
        return "" if run is None else await asyncio.to_thread(process_service.read_log, run.folder, tail_lines)

    async def stats(self, handle: ContainerHandle) -> ContainerStats:
        """Add up what the service's processes use, and the time of those that ended."""
        run = self._run(handle)
        if run.program.ended_or_gone:
            message = f"{handle.name} does not run any more"
            raise RuntimeFailure(message)
        return await asyncio.to_thread(process_service.measure, run.program.keeper, run.program.order.mark)

    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        """End the service with all it started, and remove its folder; its environment stays."""
        run = self._runs.get(handle.id)
        if run is None:
            return
        await run.program.stop(grace_s=grace_s)
        self._runs.pop(handle.id, None)
        await asyncio.to_thread(shutil.rmtree, run.folder, ignore_errors=True)

    async def list_owned(self, worker_id: str) -> list[ContainerHandle]:
        """Return this worker's services; processes do not outlive their agent, so a new one begins with none.

        What a killed agent and a killed supervisor left behind together is ended here.
        """
        home = self._state_folder()
        if not self._swept:
            self._swept = True
            swept = await asyncio.to_thread(supervised.sweep, home / "run", keep=frozenset(self._runs))
            if swept:
                words = "what a killed agent had left running was ended first: %d services"
                logger.info(words, swept, extra={"action": "swept", "runtime": self.name})
        return [run.handle for run in self._runs.values() if run.spec.worker_id == worker_id]

    async def aclose(self) -> None:
        """End every service: processes live and die with their agent."""
        await asyncio.gather(*(self.stop(run.handle, grace_s=self._grace_s) for run in list(self._runs.values())))


def _same_service(one: ContainerSpec, other: ContainerSpec) -> bool:
    return (one.worker_id, one.name) == (other.worker_id, other.name)
