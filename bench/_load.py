"""The load: machines that register and beat like agents, and a schedule that never waits for a slow answer."""

from __future__ import annotations

import asyncio
import json
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from websockets.exceptions import WebSocketException

import rma_core
from bench._common import percentiles
from bench._wire import CallFailedError, Channel, Connection
from rma_core.agent.keys import DeviceKey
from rma_core.models.hardware import read_reports
from rma_core.models.strict import encode
from rma_core.models.worker import (
    ContainerStatus,
    Heartbeat,
    HeartbeatAnswer,
    PluginReport,
    RegisterRequest,
    RegisterResponse,
    RuntimeReport,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from bench._common import Server
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import Assignment

MACHINES = Path(__file__).parents[1] / "tests" / "data" / "machines"
RUNTIMES = (RuntimeReport(name="docker", isolated=True, state="healthy", version="27.3.1"),)
PLUGINS = tuple(
    PluginReport(name=name, kind=kind, state="active", distribution=f"rma-{name}", version="0.1.0", import_seconds=0.01)
    for name, kind in (("host", "detector"), ("nvidia", "detector"), ("docker", "runtime"), ("process", "runtime"))
)

#: A catalog of the size that CONTRACT's tiers describe: service, tiers, wanted copies, cores, memory, GPU memory.
CATALOG = (
    ("llm", (1,), 3, 4, "8GB", "8GB"),
    ("vision", (1,), 2, 2, "4GB", "6GB"),
    ("compute", (1,), 2, 2, "2GB", "4GB"),
    ("rag", (2,), 2, 1, "1GB", ""),
    ("ner", (2,), 2, 1, "1GB", ""),
    ("notes", (2, 3), 2, 1, "512MB", ""),
    ("chromadb", (2,), 1, 1, "1GB", ""),
    ("ocr", (2,), 2, 1, "1GB", ""),
    ("embeddings", (2,), 2, 1, "1GB", ""),
    ("postgres", (3,), 1, 1, "512MB", ""),
    ("redis", (3,), 1, 0.5, "256MB", ""),
    ("neo4j", (3,), 1, 1, "1GB", ""),
)


def write_catalog(folder: Path) -> Path:
    """Write the catalog as a coordinator reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for service, tiers, wanted, cores, size, gpu in CATALOG:
        lines = [
            f'service = "{service}"',
            f'name = "rma-{service}-worker"',
            f'image = "ghcr.io/rma/{service}-worker:latest"',
            f'routes = ["POST /{service}"]',
            f"tiers = {list(tiers)}",
            f"wanted = {wanted}",
            "[needs]",
            f"cpu_cores = {cores}",
            f'memory = "{size}"',
            *([f'gpu_memory = "{gpu}"', 'gpu_api = ["cuda"]'] if gpu else []),
        ]
        (folder / f"{service}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def machines() -> list[HardwareReport]:
    """Return the recorded machines that the tests use."""
    files = sorted(MACHINES.glob("*.json"))
    return [report for file in files for report in read_reports(json.loads(file.read_text("utf-8")), subject=file.name)]


async def join_token(server: Server, uses: int) -> str:
    """Return a fresh join token."""
    admin = Connection(server.url, server.key)
    answer = await admin.json("POST", "/api/admin/tokens", {"label": "bench", "uses": uses})
    admin.close()
    return str(answer["token"])


class Machine:
    """One worker as the coordinator sees it; ``by_channel`` says how it beats."""

    def __init__(self, url: str, report: HardwareReport, *, by_channel: bool) -> None:
        self.worker_id = ""
        self.by_channel = by_channel
        self._url, self._report, self._key = url, report, DeviceKey.generate()
        self._http = Connection(url)
        self._channel: Channel | None = None
        self.generation = 0
        self._containers: tuple[ContainerStatus, ...] = ()
        self._slots: dict[str, int] = {}

    async def register(self, join_token: str) -> None:
        """Take a nonce, sign the proof, register: what `rma join` does."""
        self._http.token = ""
        nonce = await self._http.json("GET", "/api/worker/nonce")
        request = RegisterRequest(
            capabilities=self._report.capabilities,
            report=self._report,
            public_key=self._key.public_key,
            proof=self._key.proof(issuer=nonce["issuer"], nonce=nonce["nonce"], join_token=join_token),
            agent_version=rma_core.__version__,
            runtimes=RUNTIMES,
            plugins=PLUGINS,
        )
        self._http.token = join_token
        data = await self._http.call("POST", "/api/worker/register", encode(request))
        answer = msgspec.json.decode(data, type=RegisterResponse)
        self.worker_id, self._http.token = answer.worker_id, answer.access_token
        self._run(answer.generation, answer.containers)

    async def connect(self) -> None:
        """Open the channel where this machine has one."""
        if self.by_channel:
            self._http.close()
            self._channel = await Channel.open(self._url, self._http.token, self.worker_id)

    @property
    def token(self) -> str:
        """The worker token."""
        return self._http.token

    def request(self) -> bytes:
        """Return a heartbeat as its body by HTTP."""
        return encode(self._heartbeat())

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker_id=self.worker_id,
            current_load=round(random.random(), 3),
            containers=self._containers,
            generation=self.generation,
        )

    async def beat(self) -> HeartbeatAnswer:
        """Send a heartbeat and do as its answer says, as if every container were healthy at once; return that."""
        if self._channel is not None:
            answer = await self._channel.beat(self._heartbeat(), self._slots)
        else:
            data = await self._http.call("POST", "/api/worker/heartbeat", self.request())
            answer = msgspec.json.decode(data, type=HeartbeatAnswer)
        if answer.containers is not None:
            self._run(answer.generation, answer.containers)
        return answer

    def _run(self, generation: int, assignments: Iterable[Assignment]) -> None:
        self.generation = generation
        self._containers = tuple(
            ContainerStatus(
                name=a.name,
                service=a.service,
                state="healthy",
                runtime="docker",
                image_id=f"sha256:{'0' * 64}",
                slots=a.slots,
            )
            for a in assignments
        )
        self._slots = {container.service: container.slots for container in self._containers}

    async def close(self) -> None:
        """Let go of every connection."""
        self._http.close()
        if self._channel is not None:
            await self._channel.close()


#: What a call that fails raises; a timeout is an OSError.
FAILURES = (CallFailedError, OSError, WebSocketException)


class Event(NamedTuple):
    """Something to be done ``at_s`` after the schedule begins, measured under ``name``."""

    at_s: float
    name: str
    act: Callable[[], Awaitable[object]]


class Measured:
    """Latencies by name, in seconds; ``lag`` is how late the load itself was."""

    def __init__(self) -> None:
        self.latencies: dict[str, list[float]] = {}
        self.lag: list[float] = []
        self.failures: list[str] = []

    def table(self) -> dict[str, dict[str, float]]:
        """Return percentiles by name."""
        return {name: percentiles(found) for name, found in self.latencies.items()}


def every(rate: float, seconds: float, name: str, act: Callable[[int], Awaitable[object]]) -> list[Event]:
    """Return events at ``rate`` a second, each moved by chance within its own slot; ``act`` is given its number."""
    count = max(1, round(rate * seconds))
    return [Event((index + random.random()) * seconds / count, name, partial(act, index)) for index in range(count)]


async def run_schedule(events: Iterable[Event], measured: Measured) -> None:
    """Do each event at its time, whatever became of those before; latency counts from the intended time."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def run(event: Event) -> None:
        intended = began + event.at_s
        measured.lag.append(loop.time() - intended)
        try:
            await event.act()
        except FAILURES as error:
            measured.failures.append(f"{event.name}: {type(error).__name__}: {error}")
        else:
            measured.latencies.setdefault(event.name, []).append(loop.time() - intended)

    async with asyncio.TaskGroup() as group:
        for event in sorted(events, key=lambda event: event.at_s):
            if (early := began + event.at_s - loop.time()) > 0:
                await asyncio.sleep(early)
            group.create_task(run(event))


async def saturate(acts: Iterable[Callable[[], Awaitable[object]]], seconds: float) -> tuple[int, float, list[str]]:
    """Repeat each act without a pause, all at once; return how often in all, in which time, and what failed."""
    loop = asyncio.get_running_loop()
    began, done, failures = loop.time(), 0, list[str]()

    async def repeat(act: Callable[[], Awaitable[object]]) -> None:
        nonlocal done
        while loop.time() - began < seconds:
            await act()
            done += 1

    async def guarded(act: Callable[[], Awaitable[object]]) -> None:
        try:
            await repeat(act)
        except FAILURES as error:
            failures.append(f"{type(error).__name__}: {error}")

    async with asyncio.TaskGroup() as group:
        for act in acts:
            group.create_task(guarded(act))
    return done, loop.time() - began, failures
