"""The stub in bench/stub (Go): a model server and workers that are never the limit, and the load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

import rma_core
from bench import _common, _load
from bench._wire import Connection
from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, ModelStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench._common import Server

SOURCES = Path(__file__).parent / "stub"
#: The model it has, and the service that it is part of in a pool.
MODEL, SERVICE = "stub", "llm"
#: Seconds to build it, and to be ready.
BUILD_S, READY_S = 300.0, 30.0
#: Seconds in which a gateway must have let go of what its clients have left.
QUIET_S = 60.0
#: As many requests at once as one machine takes at most of what its owner attached.
SLOTS = 64


def build(folder: Path) -> Path:
    """Build the stub into ``folder`` and return it; ends the measurement with a sentence where it cannot be."""
    go = shutil.which("go")
    if go is None:
        sys.exit(
            "the stub is written in Go, which is not here: apt install golang-go (Debian, Ubuntu), brew install go"
        )
    target = folder / "stub"
    done = subprocess.run(
        [go, "build", "-o", str(target), "."], cwd=SOURCES, capture_output=True, text=True, timeout=BUILD_S, check=False
    )
    if done.returncode:
        sys.exit(f"the stub could not be built:\n{done.stderr}")
    return target


def request(*, tokens: int, rate: float = 0.0, stream: bool = False, model: str = MODEL) -> bytes:
    """Return a chat's JSON that asks the stub for so many tokens, at a rate a second (0: all at once)."""
    prompt = f"tokens={tokens} rate={rate:g} " + "Say something about each of the following. " * 4
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": prompt},
    ]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    return msgspec.json.encode({**body, "stream": True} if stream else body)


@contextlib.contextmanager
def backend(stub: Path, folder: Path, cores: set[int]) -> Iterator[Server]:
    """Run the model server on a free port."""
    port = _common.free_port()
    command = ["backend", "-listen", f"127.0.0.1:{port}"]
    with _common.started(command, home=folder, cores=cores, program=str(stub)) as process:
        url = f"http://127.0.0.1:{port}"
        _common.wait_until_answered(f"{url}/health", process, folder)
        yield _common.Server(url, "", psutil.Process(process.pid))


def quiet(server: Server) -> bool:
    """Wait until nobody streams from the model server any more; say whether that came."""
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{server.url}/active", timeout=READY_S) as answer:
            if json.load(answer)["active"] == 0:
                return True
        time.sleep(0.05)
    return False


# -- workers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workers(stub: Path, server: Server, count: int, cores: set[int]) -> Iterator[None]:
    """Enrol workers, and keep them open and answering."""
    lines = asyncio.run(_enrol(server, count))
    with _common.pinned(cores):
        process = subprocess.Popen([str(stub), "worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
        process.stdin.close()
        if not process.stdout.readline():
            sys.exit("the stub's workers did not begin")
        asyncio.run(listed(server, count))
        yield
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def _enrol(server: Server, count: int) -> list[dict[str, str]]:
    kinds = _load.machines()
    token = await _load.join_token(server, count)
    lines = []
    for index in range(count):
        machine = _load.Machine(server.url, kinds[index % len(kinds)], by_channel=True)
        await machine.register(token)
        lines.append({"url": server.url, "token": machine.token, **_said(machine)})
        await machine.close()
    return lines


def _said(machine: _load.Machine) -> Mapping[str, str]:
    """Return what a worker says whose owner has attached a model server."""
    slots = {SERVICE: SLOTS}
    attached = ContainerStatus(
        name="attached-8000",
        service=SERVICE,
        state="healthy",
        runtime=ATTACHED,
        isolated=False,
        slots=SLOTS,
        models=(ModelStatus(name=MODEL, context=32_768),),
    )
    beat = Heartbeat(worker_id=machine.worker_id, containers=(attached,), generation=machine.generation)
    hello = frames.Hello(worker_id=machine.worker_id, agent_version=rma_core.__version__, slots=slots)
    return {"hello": frames.pack(hello), "beat": frames.pack(frames.Beat(beat=beat, slots=slots))}


async def listed(server: Server, count: int) -> None:
    """Wait until so many workers offer the stub's model."""
    admin = Connection(server.url, server.key)
    async with asyncio.timeout(READY_S):
        while True:
            listed = (await admin.json("GET", "/v1/models"))["data"]
            if [one["x_rma"]["workers"] for one in listed if one["id"] == MODEL] == [count]:
                break
            await asyncio.sleep(0.05)
    admin.close()


# -- load ----------------------------------------------------------------------------------------------------------


class Meter(NamedTuple):
    """CPU seconds that processes have used, and seconds that they were ready and had no core."""

    cpu_s: float
    waited_s: float

    @classmethod
    def read(cls, processes: Sequence[psutil.Process]) -> Meter:
        """Read it now, of the processes and all that they started."""
        every = [one for process in processes for one in (process, *process.children(recursive=True))]
        return cls(sum(map(_common.cpu_s, every)), sum(map(_common.waited_s, every)))


class Load(NamedTuple):
    """What a load measured: answers or tokens ``done`` within ``seconds``, and their times in microseconds."""

    seconds: float
    done: int
    failed: int
    #: Streams that had begun when what counts did.
    begun: int
    failures: tuple[str, ...]
    p50_us: int
    p90_us: int
    p99_us: int
    max_us: int
    #: CPU and waiting of each watched process in that time.
    used: tuple[Meter, ...] = ()

    @property
    def per_s(self) -> float:
        """Answers or tokens a second."""
        return self.done / self.seconds if self.seconds else 0.0

    def cpu_us(self, watched: int = 0) -> float:
        """Microseconds of a watched process's CPU for each."""
        return self.used[watched].cpu_s / self.done * 1e6 if self.done else float("nan")

    def busy(self, watched: int = 0) -> float:
        """How much of one core a watched process used."""
        return self.used[watched].cpu_s / self.seconds

    def waited(self, watched: int = 0) -> float:
        """How much of the time a watched process was ready and had no core."""
        return self.used[watched].waited_s / self.seconds


class Aim(NamedTuple):
    """Where load goes: an address, a key, and the processes whose CPU is read beside it, each with its children."""

    url: str
    key: str = ""
    watched: tuple[psutil.Process, ...] = ()

    def resident_mib(self) -> float:
        """Return the MiB of memory (RSS) that the watched processes hold now."""
        every = [one for process in self.watched for one in (process, *process.children(recursive=True))]
        return round(sum(one.memory_info().rss for one in every) / _common.MIB, 1)


def load(
    stub: Path,
    kind: str,
    aim: Aim,
    body: bytes,
    *,
    count: int,
    seconds: float,
    warm_s: float,
    opening_s: float = 0.0,
    rate: float = 0.0,
    marked: Callable[[], None] | None = None,
) -> Load:
    """Run ``requests`` or ``streams`` from ``count`` connections; CPU is read exactly where the load's time is.

    That begins after ``warm_s``, or up to ``opening_s`` later, when every stream has begun. ``marked`` is called when
    it begins, and when it ends.
    """
    command = [
        str(stub), kind, "-url", aim.url, "-key", aim.key, "-body", body.decode(), "-count", str(count),
        "-seconds", f"{seconds}s", "-warm", f"{warm_s}s", "-opening", f"{opening_s}s",
        *(["-rate", str(rate)] if rate else []),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            marks = [_mark(process.stdout.readline(), aim, marked) for _ in range(2)]
            told = json.loads(process.stdout.readline())
        finally:
            process.terminate()
    used = tuple(
        Meter(after.cpu_s - before.cpu_s, after.waited_s - before.waited_s)
        for before, after in zip(*marks, strict=True)
    )
    return Load(**{**told, "failures": tuple(told["failures"])}, used=used)


def _mark(line: str, aim: Aim, marked: Callable[[], None] | None) -> list[Meter]:
    if line.strip() not in ("begin", "end"):
        sys.exit(f"the load ended early: {line!r}")
    if marked is not None:
        marked()
    return [Meter.read([process]) for process in aim.watched]
