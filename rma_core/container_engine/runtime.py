"""One runtime for every engine that speaks Docker's API; it reconnects by itself when the engine has been away."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, TypeVar

from rma_core.container_engine import containers, images, volumes
from rma_core.container_engine.abilities import cannot_limit, features, unusable, warnings
from rma_core.container_engine.connection import Address, Engine, NotInstalled, connect, introduce, knock
from rma_core.container_engine.images import Layers, find_image, reference
from rma_core.container_engine.sayings import Action, explain
from rma_core.errors import ImagePullFailed, RuntimeAbsent, RuntimeFailure
from rma_core.interfaces import ContainerHandle, ContainerRuntime, ContainerState, ContainerStats, RuntimeHealth

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import requests

    from rma_core.container_engine.connection import Product
    from rma_core.interfaces import ContainerSpec, PullProgress

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds to wait for a removal that somebody else has begun.
REMOVAL_S = 30.0
#: Seconds between two looks at such a removal.
REMOVAL_LOOK_S = 0.2


class EngineRuntime(ContainerRuntime):
    """Runs services in the containers of one engine; a plugin says which (`product`) and where (`_locate`)."""

    isolated = True
    product: Product

    def __init__(self) -> None:
        """Contact nothing; the engine is looked for at the first call."""
        self._lock = threading.Lock()
        self._filling = threading.Lock()
        self._engine: Engine | None = None
        self._was_there = True

    @abstractmethod
    def _locate(self) -> Address:
        """Return where the engine is; called in a thread, when there is no connection. Raises RuntimeAbsent."""

    async def _prepare(self) -> None:
        """Do before each call what an engine needs done, such as starting it. Raises RuntimeAbsent."""

    async def probe(self) -> RuntimeHealth:
        """Say whether the engine can be used now: who does not have it is ``undetected``, all else has an advice."""
        try:
            # Asked anew each time: an engine that was upgraded meanwhile has other features.
            engine = await self._run(self._refreshed, "ask")
        except RuntimeFailure as failure:
            state: Literal["undetected", "unhealthy"]
            state = "undetected" if isinstance(failure, NotInstalled) else "unhealthy"
            return RuntimeHealth(state=state, reason=failure.message)
        reason = unusable(engine.info, self.product.title)
        if reason:
            return RuntimeHealth(state="unhealthy", reason=reason, version=engine.version)
        return RuntimeHealth(
            state="healthy",
            reason="; ".join(warnings(engine.info, self.product.title)),
            version=engine.version,
            features=tuple(features(engine.info)),
            cannot_limit=cannot_limit(engine.info),
        )

    async def has_image(self, spec: ContainerSpec) -> bool:
        """Say whether the engine has the image, in the digest that is asked for, and a volume with the files."""
        return await self._run(
            lambda engine: find_image(engine, spec) is not None and volumes.is_filled(engine, spec), "ask"
        )

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        """Pull by digest where there is one; ends when for two minutes nothing moved, however long it takes in all."""
        if await self._run(lambda engine: find_image(engine, spec), "ask") is None:
            await self._pull_image(spec, progress)
        if spec.files is not None:
            await self._fill(spec, progress)

    async def _pull_image(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        response = await self._run(lambda engine: images.open_pull(self.product, engine, spec), "pull")
        try:
            await self._follow(response, spec, progress)
        finally:
            images.cut(response)
        if await self._run(lambda engine: find_image(engine, spec), "ask") is None:
            raise ImagePullFailed(f"{self.product.title} pulled {reference(spec)}, but does not have it now")

    async def _fill(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        """Copy the files into their volume; who gives up waiting leaves no half of it."""
        abandoned = threading.Event()

        def job(engine: Engine) -> None:
            # One that was given up clears away before another begins.
            with self._filling:
                if not volumes.is_filled(engine, spec) and (image := find_image(engine, spec)) is not None:
                    volumes.fill(engine, spec, str(image["Id"]), progress, abandoned)

        try:
            await self._run(job, "pull")
        except asyncio.CancelledError:
            abandoned.set()
            raise

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        """Make and start the container; who gives up waiting leaves none behind."""
        abandoned = threading.Event()
        try:
            return await self._run(lambda engine: containers.start(self.product, engine, spec, abandoned), "start")
        except asyncio.CancelledError:
            abandoned.set()
            raise

    async def inspect(self, handle: ContainerHandle) -> ContainerState:
        """Say how it stands, with the last words of one that ended."""
        return await self._run(lambda engine: containers.inspect(engine, handle.id), "ask")

    async def endpoint(self, handle: ContainerHandle) -> str:
        """Return the loopback address that its port is published at."""
        return await self._run(lambda engine: containers.endpoint(engine, handle), "ask")

    async def logs(self, handle: ContainerHandle, *, tail_lines: int = 100) -> str:
        """Return its last output, both streams together."""
        return await self._run(lambda engine: containers.logs(engine, handle.id, tail_lines), "ask")

    async def stats(self, handle: ContainerHandle) -> ContainerStats:
        """Return what it uses; caches that the kernel can drop do not count as memory."""
        return await self._run(lambda engine: containers.stats(self.product, engine, handle), "ask")

    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        """SIGTERM, SIGKILL after ``grace_s`` (whole seconds for engines), then remove it with its volumes."""
        await self._run(lambda engine: containers.stop(engine, handle.id, grace_s), "ask")
        for _ in range(int(REMOVAL_S / REMOVAL_LOOK_S)):
            if (await self.inspect(handle)).state == "missing":
                return
            await asyncio.sleep(REMOVAL_LOOK_S)
        waited = f"{self.product.title} has been removing {handle.name} for {REMOVAL_S:.0f} s"
        raise RuntimeFailure(f"{waited}; restart it if this lasts")

    async def list_owned(self, worker_id: str) -> list[ContainerHandle]:
        """Return this worker's containers, the oldest first."""
        return await self._run(lambda engine: containers.owned(self.product, engine, worker_id), "ask")

    async def forget_files(self, worker_id: str, keep: Collection[str]) -> None:
        """Remove a worker's volumes of files, except those that are kept, or that a container still uses."""
        await self._run(lambda engine: volumes.forget(engine, worker_id, keep), "ask")

    async def aclose(self) -> None:
        """Close the connections."""
        await asyncio.to_thread(self._forget)

    async def _run(self, job: Callable[[Engine], T], action: Action) -> T:
        try:
            await self._prepare()
        except RuntimeFailure as failure:
            await asyncio.to_thread(self._note, failure)
            raise
        return await asyncio.to_thread(self._attempt, lambda: job(self._connected()), action)

    def _attempt(self, job: Callable[[], T], action: Action) -> T:
        """Do ``job`` in this thread; what the SDK and its HTTP library raise becomes a RuntimeFailure."""
        try:
            answer = job()
        except RuntimeFailure as failure:
            self._note(failure)
            raise
        except Exception as error:
            if not isinstance(error, _expected()):
                raise
            explained = explain(error, action, self.product)
            self._note(explained)
            raise explained from error
        self._note(None)
        return answer

    def _note(self, failure: RuntimeFailure | None) -> None:
        """Drop the connection to an engine that went away; the agent tells its owner, so this is for debugging."""
        absent = isinstance(failure, RuntimeAbsent)
        if absent:
            self._forget()
        if absent == self._was_there:
            self._was_there = not absent
            told = failure if absent else "answers again"
            logger.debug("%s: %s", self.product.title, told, extra={"action": "runtime"})

    def _connected(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._engine = connect(self.product, self._locate())
            engine = self._engine
        if engine.address.host.startswith("unix:"):
            # Cheap, says plainly what is wrong, and the SDK leaks a socket for each connection it is refused.
            knock(self.product, engine.address)
        return engine

    def _refreshed(self, engine: Engine) -> Engine:
        version, info = introduce(self.product, engine.api, engine.address)
        fresh = engine._replace(info=info, version=str(version.get("Version", "")))
        with self._lock:
            if self._engine is engine:
                self._engine = fresh
        return fresh

    def _forget(self) -> None:
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.api.close()
            engine.slow.close()

    async def _follow(
        self, response: requests.Response, spec: ContainerSpec, progress: Callable[[PullProgress], None]
    ) -> None:
        """Read a pull to its end, reporting progress, as long as there is some."""
        loop = asyncio.get_running_loop()
        layers = Layers()
        lines = response.iter_lines()
        deadline = loop.time() + layers.patience_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await asyncio.to_thread(self._attempt, lambda: images.next_event(lines), "pull")
            except TimeoutError:
                waited = f"nothing arrived for {layers.patience_s:.0f} s"
                raise ImagePullFailed(f"pulling {reference(spec)} broke off: {waited}") from None
            if event is None:
                return
            if "error" in event:
                raise explain(str(event["error"]), "pull", self.product)
            if layers.take(event):
                deadline = loop.time() + layers.patience_s
                progress(layers.progress())


def _expected() -> tuple[type[Exception], ...]:
    """Return what the SDK and its HTTP library raise; they are not imported before something was raised."""
    import requests.exceptions
    import urllib3.exceptions
    from docker.errors import DockerException

    return (DockerException, requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError)
