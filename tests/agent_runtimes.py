"""Container runtimes for tests of the agent, each a named failure mode; containers exist only in their memory."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from rma_core.errors import ImageMissing, ImagePullFailed, OutOfSpace, RuntimeAbsent, StartFailed
from rma_core.interfaces import (
    ContainerHandle,
    ContainerRuntime,
    ContainerSpec,
    ContainerState,
    ContainerStats,
    PullProgress,
    RuntimeHealth,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class MemoryRuntime(ContainerRuntime):
    """Does what it is told, in memory; ``images`` are there, ``registry`` can be pulled."""

    def __init__(
        self,
        name: str = "memory",
        *,
        isolated: bool = True,
        endpoint: str = "http://127.0.0.1:9",
        images: tuple[str, ...] = (),
        features: tuple[str, ...] = (),
        image_bytes: int = 0,
    ) -> None:
        self.features, self.image_bytes = features, image_bytes
        self.name, self.isolated, self._endpoint = name, isolated, endpoint
        self.images = set(images)
        self.registry = {"ghcr.io/rma/notes-worker:latest", "ghcr.io/rma/ner-worker:latest"}
        self.containers: dict[str, ContainerHandle] = {}
        self.states: dict[str, ContainerState] = {}
        self.specs: dict[str, ContainerSpec] = {}
        self.calls: list[str] = []
        self.down = ""
        self._ids = itertools.count(1)

    def check(self, call: str) -> None:
        self.calls.append(call)
        if self.down:
            raise RuntimeAbsent(self.down)

    async def probe(self) -> RuntimeHealth:
        return (
            RuntimeHealth(state="unhealthy", reason=self.down)
            if self.down
            else RuntimeHealth(state="healthy", version="1", features=self.features)
        )

    async def has_image(self, spec: ContainerSpec) -> bool:
        self.check("has_image")
        return spec.image in self.images

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        self.check("pull")
        if spec.image not in self.registry:
            raise ImageMissing(f"no registry has {spec.image}")
        progress(PullProgress(done_bytes=1, total_bytes=2))
        self.images.add(spec.image)

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        self.check("start")
        if any(handle.name == spec.name for handle in self.containers.values()):
            raise StartFailed(f"the name {spec.name} is taken")
        handle = ContainerHandle(
            runtime=self.name, id=f"c{next(self._ids)}", name=spec.name, service=spec.service, spec_hash=spec.spec_hash,
            image_bytes=self.image_bytes,
        )  # fmt: skip
        self.containers[handle.id] = handle
        self.specs[handle.id] = spec
        self.states[handle.id] = ContainerState(state="running")
        return handle

    async def inspect(self, handle: ContainerHandle) -> ContainerState:
        self.check("inspect")
        return self.states.get(handle.id, ContainerState(state="missing"))

    async def endpoint(self, handle: ContainerHandle) -> str:
        self.check("endpoint")
        return self._endpoint

    async def logs(self, handle: ContainerHandle, *, tail_lines: int = 100) -> str:
        return "first\nlast words" if handle.id in self.containers else ""

    async def stats(self, handle: ContainerHandle) -> ContainerStats:
        return ContainerStats(cpu_seconds=0, memory_bytes=0)

    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        self.check("stop")
        self.containers.pop(handle.id, None)
        self.states.pop(handle.id, None)

    async def list_owned(self, worker_id: str) -> list[ContainerHandle]:
        self.check("list_owned")
        return list(self.containers.values())

    # What a test does to it behind the agent's back.

    def kill(self, name: str, reason: str = "out of memory") -> None:
        for handle in self.containers.values():
            if handle.name == name:
                self.states[handle.id] = ContainerState(state="exited", exit_code=137, reason=reason)

    def running(self) -> set[str]:
        return {h.name for h in self.containers.values() if self.states[h.id].state == "running"}


class PullBreaksRuntime(MemoryRuntime):
    """Every pull breaks off in the middle."""

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        self.check("pull")
        raise ImagePullFailed("the connection to the registry was reset")


class HangsRuntime(MemoryRuntime):
    """One of its calls never returns; a pull reports ``reports`` times before that."""

    def __init__(self, call: str, reports: int = 0) -> None:
        super().__init__()
        self.hangs, self.reports = call, reports

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        if self.hangs == "pull":
            self.check("pull")
            for number in range(self.reports):
                progress(PullProgress(done_bytes=number))
                await asyncio.sleep(0.05)
            await asyncio.Event().wait()
        await super().pull(spec, progress)

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        if self.hangs == "start":
            self.check("start")
            await asyncio.Event().wait()
        return await super().start(spec)


class FullDiskRuntime(MemoryRuntime):
    """Every pull fills the disk."""

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        self.check("pull")
        raise OutOfSpace("the disk is full")


class CrashLoopRuntime(MemoryRuntime):
    """What it starts ends at once."""

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        handle = await super().start(spec)
        self.states[handle.id] = ContainerState(state="exited", exit_code=3)
        return handle


class RaisingRuntime(MemoryRuntime):
    """A plugin with a bug."""

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        raise KeyError("oops")


class NoEngineRuntime(MemoryRuntime):
    """Its engine is not installed."""

    async def probe(self) -> RuntimeHealth:
        return RuntimeHealth(state="undetected", reason="not installed")
