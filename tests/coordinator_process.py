"""A coordinator as a process of its own: for what only a process has (memory, descriptors, a disk, an end)."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import TYPE_CHECKING

import psutil

from rma_core.http import open_client
from tests.coordinator_fixtures import PATIENCE_S
from tests.pools import Running, environment, rma, until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from rma_core.http import AsyncClient


class Coordinator:
    """`rma coordinator` in a folder; what it says is kept in ``said.text``."""

    def __init__(self, home: Path, *, before: Sequence[str] = (), **settings: object) -> None:
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        env = environment(home, {f"RMA_{name.upper()}": str(value) for name, value in settings.items()})
        self.said = Running([*before, *rma("coordinator", "--port", str(self.port))], env)

    @property
    def key(self) -> str:
        return str(json.loads((self.home / "client.json").read_text())["key"])

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.said.process.pid)

    def ready(self) -> Coordinator:
        """Wait until it answers; return itself."""
        self.said.wait_for(r"The coordinator answers at", within_s=60)
        return self

    def resident_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def client(self, key: str | None = None) -> AsyncClient:
        """Return a client with its first key."""
        return open_client(self.url, token=self.key if key is None else key, timeout_s=PATIENCE_S)

    def log(self, pattern: str, *, within_s: float = PATIENCE_S) -> None:
        self.said.wait_for(pattern, within_s=within_s)

    def ended(self, *, within_s: float = PATIENCE_S) -> int:
        """Wait until it has ended by itself; return its exit code."""
        until(lambda: self.said.process.poll() is not None, within_s=within_s, what="the coordinator ends")
        return self.said.stop()

    def kill(self) -> None:
        self.said.stop(signal.SIGKILL)


@contextlib.contextmanager
def starting(home: Path, *, before: Sequence[str] = (), **settings: object) -> Iterator[Coordinator]:
    """A coordinator that is being started; it is stopped in the end, and what it said has no traceback."""
    home.mkdir(exist_ok=True)
    found = Coordinator(home, before=before, **settings)
    try:
        yield found
    finally:
        found.said.stop()
    assert "Traceback" not in found.said.text, found.said.text


@contextlib.asynccontextmanager
async def coordinating(
    home: Path, *, before: Sequence[str] = (), **settings: object
) -> AsyncIterator[tuple[Coordinator, AsyncClient]]:
    """A coordinator that answers, and a client with a key of every scope."""
    with starting(home, before=before, **settings) as found:
        found.ready()
        async with found.client() as client:
            yield found, client
