"""A service to try engines with, made of one static program, and what tests of several engines share."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec
import pytest
from docker import APIClient

from rma_core import ContainerRuntime, ContainerSpec, Limits, StartFailed
from rma_core.testing import RuntimeCase
from rma_core.testing.runtimes import becomes, fetch, given_files, of_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rma_core.interfaces import PullProgress
    from rma_core.testing.runtimes import Check

MIB = 1024**2
SERVICE = "rma-test/service:latest"
APPLETS = ("cat", "echo", "env", "grep", "httpd", "id", "ls", "sh", "sleep", "wc")
# What it does is chosen by variables, as a spec has no command of its own.
PROGRAM = b"""#!/bin/sh
echo "$GREETING"
case "$MODE" in
    exits) exit 3 ;;
    stubborn) trap '' TERM ;;
    hungry) x=xxxxxxxx; while :; do x="$x$x"; done ;;
esac
exec httpd -f -p 8000 -h /www
"""
SHELL = b"""#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
eval "$(httpd -d "$QUERY_STRING")" 2>&1
"""
SPEC = ContainerSpec(
    worker_id="worker-0badcafe",
    name="tiny",
    service="tiny",
    image=SERVICE,
    image_digest=None,
    port=8000,
    env={"GREETING": "hello"},
    limits=Limits(memory="64MiB", cpus=0.5, pids=64, tmp="8MiB", shm="4MiB"),
    spec_hash="0",
)


def image_tar(files: dict[str, bytes]) -> bytes:
    """Return a root file system with busybox and these files."""
    program = shutil.which("busybox")
    if program is None:
        pytest.skip("busybox is not installed (Debian: apt-get install busybox-static)")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("dev", "proc", "sys", "tmp", "run"):
            folder = tarfile.TarInfo(name)
            # Engines mount memory there with the modes that the image has.
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name in ("tmp", "run") else 0o755
            tar.addfile(folder)
        for name in APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name, content in {"bin/busybox": Path(program).read_bytes(), **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def doing(mode: str) -> ContainerSpec:
    return msgspec.structs.replace(SPEC, env={"MODE": mode, "GREETING": mode})


async def shell(endpoint: str, command: str) -> str:
    _, body = await fetch(endpoint, f"/cgi-bin/sh?{quote(command)}")
    return body.decode()


def by_name(check: Check) -> str:
    return check.__name__


def contract_of(runtime: ContainerRuntime, healthy: ContainerSpec) -> RuntimeCase:
    """Return as much of a case as `started` and `inside` need."""
    return RuntimeCase(runtime=runtime, healthy=healthy, exits=SPEC, stubborn=SPEC, no_image=SPEC, shell=shell)


async def how_it_fails(runtime: ContainerRuntime, spec: ContainerSpec) -> str:
    """Return what is said of a service that ends at once, by either way of saying it."""
    spec = of_worker(spec)
    try:
        handle = await runtime.start(spec)
    except StartFailed as failure:
        assert await runtime.list_owned(spec.worker_id) == []
        return failure.message
    try:
        return (await becomes(runtime, handle, "exited")).reason
    finally:
        await runtime.stop(handle)


async def no_thread_left() -> None:
    """Wait until the threads of this loop have nothing to do."""
    await asyncio.get_running_loop().shutdown_default_executor()
    asyncio.get_running_loop()._default_executor = None  # type: ignore[attr-defined]
    asyncio.get_running_loop()._executor_shutdown_called = False  # type: ignore[attr-defined]


class Valve:
    """A TCP proxy in front of the registry that lets so many bytes through and then ``stall``s or ``cut``s."""

    def __init__(self, target: str, *, most_bytes: int, then: str) -> None:
        self._host, _, port = target.partition(":")
        self._port, self._left, self._then = int(port), most_bytes, then
        self.closed_up = asyncio.Event()

    async def _pass(self, caller: asyncio.StreamReader, answers_to: asyncio.StreamWriter) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        upward = asyncio.create_task(pump(caller, writer))
        try:
            while data := await reader.read(65536):
                self._left -= len(data)
                if self._left < 0:
                    self.closed_up.set()
                    if self._then == "cut":
                        break
                    await asyncio.sleep(3600)
                answers_to.write(data)
                await answers_to.drain()
        except ConnectionError:
            pass
        finally:
            upward.cancel()
            writer.close()
            answers_to.close()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Listen until the end of the block; gives its ``host:port``."""
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.create_task(self._pass(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


def from_registry(address: str, repository: str, digest: str | None = None) -> ContainerSpec:
    return of_worker(msgspec.structs.replace(SPEC, image=f"{address}/{repository}:latest", image_digest=digest))


async def break_off_a_copy(runtime: ContainerRuntime, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a copy of files fail, and the agent be gone when it has removed ``kept`` things; the copy passes for none."""
    removals = {name: getattr(APIClient, name) for name in ("remove_container", "remove_volume")}
    removed: list[str] = []

    def until_killed(name: str) -> Callable[..., object]:
        def remove(*arguments: object, **options: object) -> object:
            if len(removed) == kept:
                raise ConnectionError("the agent is gone")
            removed.append(name)
            return removals[name](*arguments, **options)

        return remove

    def fail(step: PullProgress) -> None:
        if step.done_bytes:
            for name in removals:
                patch.setattr(APIClient, name, until_killed(name))
            raise OSError("a broken disk")

    with given_files(SPEC, b"x" * 3_000_000) as spec:
        with monkeypatch.context() as patch, pytest.raises(Exception, match="agent is gone"):
            await runtime.pull(spec, fail)
        assert len(removed) == kept
        assert not await runtime.has_image(spec), "half a copy passes for a whole one"
        await runtime.pull(spec, lambda _: None)
        assert await runtime.has_image(spec)
        await runtime.forget_files(spec.worker_id, ())
        assert not await runtime.has_image(spec)
