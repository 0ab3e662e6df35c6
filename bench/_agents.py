"""A real agent beside a coordinator, with one trivial service: as a container where there is Docker, else a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from bench import _common, _load
from bench._wire import Connection
from tests import base_image, tiny_service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench._common import Server

SERVICE, MODULE, DISTRIBUTION = "hello", "rma_bench_hello", "rma-bench-hello"
#: Seconds until the service must be healthy.
READY_S = 120.0

ENTRY = f"""
service = "{SERVICE}"
name = "rma-{SERVICE}-worker"
image = "{{image}}"
port = 8000
health_path = "/health"
routes = ["POST /{SERVICE}"]
tiers = [1, 2, 3]
slots = 64

[needs]
cpu_cores = 0.1
memory = "16MB"

[limits]
memory = "64MB"
pids = 32
tmp = "8MB"

[process]
distribution = "{DISTRIBUTION}"
module = "{MODULE}"
"""

#: The least that a service can do: HTTP/1.1, kept alive, a fixed JSON.
SOURCE = """
import argparse, asyncio, re

HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 15\\r\\n\\r\\n"
LENGTH = re.compile(rb"content-length: *(\\d+)", re.I)


async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            found = LENGTH.search(head)
            if found:
                await reader.readexactly(int(found[1]))
            elif b"chunked" in head:
                while (size := int(await reader.readline(), 16)):
                    await reader.readexactly(size + 2)
                await reader.readline()
            writer.write(HEAD + b'{\"hello\":\"you\"}')
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.uds:
        server = await asyncio.start_unix_server(serve, options.uds)
    else:
        server = await asyncio.start_server(serve, options.host, options.port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
"""


class Agent(NamedTuple):
    """A running agent whose service is healthy."""

    process: psutil.Process
    runtime: str


def docker() -> str:
    """Return the address of a Docker that answers, else an empty string."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["docker", "--host", host, "version"], capture_output=True, timeout=10, check=False)
        return host if asked.returncode == 0 else ""
    return ""


def write_catalog(folder: Path, *, host: str) -> Path:
    """Write the catalog, and see that its image is in the engine, where there is one."""
    folder.mkdir(parents=True)
    image = base_image.ensure(base_image.BUSYBOX, ["docker", "--host", host]) if host else "ghcr.io/rma/hello:latest"
    (folder / "hello.toml").write_text(ENTRY.format(image=image), encoding="utf-8")
    return folder


@contextlib.contextmanager
def agent(home: Path, server: Server, *, runtime: str, cores: set[int], host: str = "") -> Iterator[Agent]:
    """Enrol and run an agent; it is there once its service is healthy."""
    token = asyncio.run(_load.join_token(server, 1))
    wheels = tiny_service.write_wheel(home / "wheels", module=MODULE, source=SOURCE).parent
    env = {
        "RMA_COORDINATOR_URL": server.url,
        "RMA_JOIN_TOKEN": token,
        "RMA_RUNTIMES": runtime,
        "RMA_SERVICE_SOURCES": str(wheels),
        **({"DOCKER_HOST": host} if host else {}),
    }
    with _common.started(["-m", "rma_core", "agent"], home=home, cores=cores, env=env) as process:
        _wait_healthy(server, process, home)
        yield Agent(psutil.Process(process.pid), runtime)


def _wait_healthy(server: Server, process: subprocess.Popen[bytes], home: Path) -> None:
    deadline, seen = time.monotonic() + READY_S, ""
    while time.monotonic() < deadline and process.poll() is None:
        workers = asyncio.run(_ask(server, "/api/admin/workers"))["workers"]
        states = [container["state"] for worker in workers for container in worker["containers"]]
        if states == ["healthy"]:
            return
        seen = str([worker["containers"] for worker in workers])
        time.sleep(0.2)
    sys.exit(f"the service is not healthy: {seen}\n{(home / 'log').read_text(encoding='utf-8')[-2000:]}")


async def _ask(server: Server, path: str) -> Any:  # noqa: ANN401 - JSON
    admin = Connection(server.url, server.key)
    try:
        return await admin.json("GET", path)
    finally:
        admin.close()
