"""Stand-ins for model servers that owners attach, and an agent that has one attached."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from rma_core.agent import channel as channel_module
from rma_core.agent import heart as heart_module
from rma_core.agent.attach.attachable import addresses
from rma_core.agent.attach.attached import AttachedServer
from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened
from rma_core.backoff import Backoff
from rma_core.models import channel as frames
from rma_core.models.strict import decode, encode
from rma_core.models.worker import ContainerStatus
from rma_core.settings import AgentSettings
from tests.agent_service import PATIENCE_S
from tests.agent_stand_in import StandIn, offer, stand_in
from tests.test_agent_lifecycle import REPORT, detect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import pytest

    from tests.agent_stand_in import Line

CHAT = "/v1/chat/completions"

# What servers answer, as their own documentation shows it: Ollama's /api/tags, /api/ps and /api/version at
# docs.ollama.com/api (October 2025), with the `remote_host` that its lists give cloud models; LM Studio's
# /api/v0/models at lmstudio.ai/docs/api/rest-api, and what it says to any path it does not know, from reports of its
# users; vLLM's /v1/models from its documentation and a public server; llama.cpp's from its tools/server/README.md.
OLLAMA_TAGS = {
    "models": [
        {
            "name": "gemma3:4b",
            "model": "gemma3:4b",
            "modified_at": "2025-10-03T23:34:03.409490317-07:00",
            "size": 3338801804,
            "digest": "a2af6cc3eb7fa8be8504abaf9b04e88f17a119ec3f04a3addf55f92841195f5a",
            "details": {"format": "gguf", "family": "gemma", "families": ["gemma"], "parameter_size": "4.3B"},
        },
        {"name": "llama3.2:latest", "model": "llama3.2:latest", "size": 2019393189, "digest": "a8", "details": {}},
        {
            "name": "gpt-oss:120b-cloud",
            "model": "gpt-oss:120b-cloud",
            "remote_model": "gpt-oss:120b",
            "remote_host": "https://ollama.com:443",
            "size": 384,
            "digest": "b8",
        },
    ]
}
OLLAMA_PS = {
    "models": [
        {
            "name": "gemma3:4b",
            "model": "gemma3:4b",
            "size": 6591830464,
            "digest": "a2af6cc3eb7fa8be8504abaf9b04e88f17a119ec3f04a3addf55f92841195f5a",
            "details": {"parent_model": "", "format": "gguf", "family": "gemma3", "quantization_level": "Q4_K_M"},
            "expires_at": "2025-10-17T16:47:07.93355-07:00",
            "size_vram": 5333539264,
            "context_length": 4096,
        }
    ]
}
OLLAMA: Mapping[str, object] = {"/api/version": {"version": "0.12.6"}, "/api/tags": OLLAMA_TAGS, "/api/ps": OLLAMA_PS}
LM_STUDIO: Mapping[str, object] = {
    "/api/v0/models": {
        "object": "list",
        "data": [
            {
                "id": "qwen2-vl-7b-instruct",
                "object": "model",
                "type": "vlm",
                "publisher": "mlx-community",
                "state": "not-loaded",
                "max_context_length": 32768,
            },
            {
                "id": "meta-llama-3.1-8b-instruct",
                "object": "model",
                "type": "llm",
                "state": "loaded",
                "max_context_length": 131072,
                "loaded_context_length": 4096,
            },
        ],
    }
}
VLLM: Mapping[str, object] = {
    "/v1/models": {
        "object": "list",
        "data": [
            {
                "id": "facebook/opt-125m",
                "object": "model",
                "created": 1677610602,
                "owned_by": "vllm",
                "root": "facebook/opt-125m",
                "parent": None,
                "max_model_len": 2048,
            }
        ],
    }
}
LLAMA_CPP: Mapping[str, object] = {
    "/props": {
        "default_generation_settings": {"id": 0, "n_ctx": 4096, "is_processing": False},
        "total_slots": 4,
        "model_path": "/home/someone/models/qwen2.5-7b-q4_k_m.gguf",
        "chat_template": "...",
        "is_sleeping": False,
    },
    "/v1/models": {
        "object": "list",
        "data": [{"id": "/home/someone/models/qwen2.5-7b-q4_k_m.gguf", "object": "model", "owned_by": "llamacpp"}],
    },
}


class Server:
    """A stand-in for somebody's model server: ``answers`` by path, else 404 (``unknown`` in its place)."""

    def __init__(self, answers: Mapping[str, object], *, unknown: object = None) -> None:
        self.answers, self.unknown = dict(answers), unknown
        self.url = ""
        self.asked: list[str] = []
        self.hangs = False
        #: What is asked here is never answered.
        self.mute = ""
        self.raw: bytes | None = None
        self._server: asyncio.Server | None = None
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                await self._one(reader, writer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, *_ = (await reader.readuntil(b"\r\n\r\n")).decode().split()
        self.asked.append(f"{method} {path}")
        if self.hangs or path == self.mute:
            await asyncio.Event().wait()
        if self.raw is not None:
            writer.write(self.raw)
            await writer.drain()
            writer.close()
            return
        found = self.answers.get(path, self.unknown)
        if isinstance(found, EndlessAnswer):
            await found.write(writer)
            return
        status = "404 Not Found" if found is None else "200 OK"
        if isinstance(found, Refusing):
            status, found = f"{found.status} X", found.body
        body = found if isinstance(found, bytes) else encode(found)
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


class Refusing(NamedTuple):
    """An answer that is none."""

    status: int
    body: Any


#: What llama.cpp answers while it loads.
LOADING = Refusing(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})


class EndlessAnswer:
    """An answer of a gigabyte; ``sent_bytes`` is what was taken of it."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def write(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while self.sent_bytes < 1_000_000_000:
            writer.write(b" " * 65536)
            await writer.drain()
            self.sent_bytes += 65536


@contextlib.asynccontextmanager
async def running(answers: Mapping[str, object], *, unknown: object = None) -> AsyncIterator[Server]:
    server = Server(answers, unknown=unknown)
    await server.open()
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def attached(url: str, **more: Any) -> AsyncIterator[AttachedServer]:
    [address] = addresses([url])
    one = AttachedServer(address, **more)
    try:
        yield one
    finally:
        await one.aclose()


async def looked(answers: Mapping[str, object], *, unknown: object = None, fragment: str = "") -> ContainerStatus:
    """Return what a heartbeat says of such a server, once it was looked at."""
    async with running(answers, unknown=unknown) as server, attached(server.url + fragment) as one:
        await one.look()
        status = one.status()
        # As the coordinator reads it.
        return decode(encode(status), ContainerStatus, subject="status")


def listed(status: ContainerStatus) -> list[tuple[str, str, int]]:
    return [(model.name, model.state, model.context) for model in status.models]


class House:
    """A pool, and an agent with one attached server."""

    def __init__(self, pool: StandIn, line: Line, agent: Agent) -> None:
        self.pool, self.line, self.agent = pool, line, agent
        self._number = 0

    async def ask(self, body: object, *, path: str = CHAT, method: str = "POST", **more: Any) -> int:
        """Offer a task with this body and return its stream."""
        self._number += 1
        data = body if isinstance(body, bytes) else encode(body)
        told = {"service": "llm", "model": "tiny", "headers": [["content-type", "application/json"]], **more}
        task = offer(path, number=self._number, method=method, body_bytes=len(data), **told)
        await self.line.say(frames.Task(stream=self._number, offer=task))
        if data:
            await self.line.body(self._number, data)
        return self._number

    async def refused(self, body: object, **more: Any) -> tuple[str, str]:
        error = await self.line.frame(frames.Error, await self.ask(body, **more))
        return error.fault, error.reason


@contextlib.asynccontextmanager
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *urls: str, **more: Any) -> AsyncIterator[House]:
    monkeypatch.setattr("rma_core.agent.membership.Backoff", lambda: Backoff(base_s=0.05, cap_s=0.2))
    monkeypatch.setattr(heart_module, "GATHER_HTTP_S", 0.05)
    monkeypatch.setattr(channel_module, "RETRY_BASE_S", 0.02)
    async with stand_in() as pool:
        settings = AgentSettings(
            home=str(tmp_path / "home"), coordinator_url=pool.url, join_token=pool.token, runtimes=[], drain_s=5,
            attach=list(urls),
        )  # fmt: skip
        async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
            assert report is REPORT
            agent = Agent(settings, folder, record, key, report=report, runtimes={}, **more)
            running_agent = asyncio.create_task(agent.run())
            try:
                line = await pool.line()
                await line.wait(lambda: any(slots(f).get("llm") for f in line.control))
                yield House(pool, line, agent)
            finally:
                agent.stop()
                agent.stop()
                async with asyncio.timeout(PATIENCE_S):
                    await running_agent


def slots(frame: frames.Up) -> dict[str, int]:
    return frame.slots if isinstance(frame, frames.Hello | frames.Beat) else {}


def beats(line: Line) -> list[frames.Beat]:
    return [frame for frame in line.control if isinstance(frame, frames.Beat)]
