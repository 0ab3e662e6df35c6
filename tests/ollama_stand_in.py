"""A stand-in for Ollama that speaks its native API, keeps its books, and fails in the ways it is known to fail.

Shapes and behaviour as in ollama/ollama at fb30760 (August 2026): docs/api.md, api/types.go, server/routes.go and
server/sched.go. A model that is asked for with another context than it is loaded with is loaded anew; `expires_at`
moves on when an answer ends; an error behind the first line of a stream is one more line with status 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from tests.model_servers import connect

if TYPE_CHECKING:
    import http.client
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.model_servers import ModelServer

    Behaviour = Callable[["OllamaStandIn", "Exchange"], Awaitable[None]]

MODEL = "tiny:latest"
DIGEST = "365c0bd3c000a25d28ddbf732fe1c6add414de7275464c4e4d1c3b5fcb5d8ad1"
#: What it takes for a model that names no size of its own.
DEFAULT_CONTEXT = 4096
STATS = {
    "total_duration": 4_883_583_458,
    "load_duration": 1_334_875,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 342_546_000,
    "eval_count": 282,
    "eval_duration": 4_535_599_000,
}


class Exchange:
    """One request, and the way of its answer."""

    def __init__(self, path: str, body: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.path, self.body, self._reader, self._writer = path, body, reader, writer
        self.begun = False

    async def whole(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json; charset=utf-8\r\n"
        self._writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await self._writer.drain()

    async def line(self, line: object) -> None:
        """Send a line of a stream; its head goes out with the first one, as Ollama's does."""
        if not self.begun:
            self.begun = True
            self._writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
        data = (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
        self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def break_off(self) -> None:
        self._writer.transport.abort()

    async def left(self) -> None:
        """Wait until the client is gone."""
        with contextlib.suppress(OSError):
            assert await self._reader.read(1) == b"", "nothing more is asked on this connection"
        self._writer.close()


def said(path: str, text: str, **more: object) -> dict[str, Any]:
    """Return one line of an answer."""
    told = {"response": text} if path == "/api/generate" else {"message": {"role": "assistant", "content": text}}
    return {"model": MODEL, "created_at": "2026-08-21T08:52:19.385406455Z", **told, "done": False, **more}


def answering(*texts: str, reason: str = "stop", last: dict[str, Any] | None = None) -> Behaviour:
    """Answer with these pieces of text, whatever is asked."""

    async def behave(server: OllamaStandIn, exchange: Exchange) -> None:
        for text in texts:
            await exchange.line(said(exchange.path, text))
        await exchange.line(said(exchange.path, "", done=True, done_reason=reason, **STATS) | (last or {}))
        await exchange.end()

    return behave


def lines(*every: object) -> Behaviour:
    """Answer with exactly these lines."""

    async def behave(server: OllamaStandIn, exchange: Exchange) -> None:
        for line in every:
            await exchange.line(line)
        await exchange.end()

    return behave


def failing_behind(
    *texts: str, error: str = "an error was encountered while running the model: signal: killed"
) -> Behaviour:
    """Begin an answer, and then say in one more line that it failed: the runner has died."""

    async def behave(server: OllamaStandIn, exchange: Exchange) -> None:
        for text in texts:
            await exchange.line(said(exchange.path, text))
        await exchange.line({"error": error})
        await exchange.end()

    return behave


def stopping_behind(*texts: str) -> Behaviour:
    """Begin an answer and end the stream without its last line, as when a token repeats itself too often."""

    async def behave(server: OllamaStandIn, exchange: Exchange) -> None:
        for text in texts:
            await exchange.line(said(exchange.path, text))
        await exchange.end()

    return behave


def breaking_off_behind(*texts: str) -> Behaviour:
    """Begin an answer and lose the connection: Ollama itself has died."""

    async def behave(server: OllamaStandIn, exchange: Exchange) -> None:
        for text in texts:
            await exchange.line(said(exchange.path, text))
        exchange.break_off()

    return behave


def refusing(status: int, error: str) -> Behaviour:
    """Refuse with a status."""

    async def behave(server: OllamaStandIn, exchange: Exchange) -> None:
        await exchange.whole(status, {"error": error})

    return behave


async def endless(server: OllamaStandIn, exchange: Exchange) -> None:
    """Answer without end; note when the client has left."""
    leaving = asyncio.create_task(exchange.left())
    with contextlib.suppress(OSError):
        while not leaving.done():
            await exchange.line(said(exchange.path, "and "))
            await asyncio.wait({leaving}, timeout=0.01)
    await leaving
    server.left.set()


async def silent(server: OllamaStandIn, exchange: Exchange) -> None:
    """Load for ever: not even a head comes; note when the client has left."""
    await exchange.left()
    server.left.set()


class Fronting:
    """Answer with what a real llama.cpp says, as Ollama says it; its engine dies behind ``fails_behind`` pieces."""

    def __init__(self, server: ModelServer, *, fails_behind: int | None = None) -> None:
        self._server, self._fails_behind = server, fails_behind

    async def __call__(self, stand_in: OllamaStandIn, exchange: Exchange) -> None:
        events = await asyncio.to_thread(self._events, exchange.path, exchange.body)
        usage: dict[str, Any] = {}
        finish, pieces = "stop", 0
        for event in events:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                finish = choice.get("finish_reason") or finish
                text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                if text and pieces == self._fails_behind:
                    await exchange.line({"error": "an error was encountered while running the model: signal: killed"})
                    await exchange.end()
                    return
                if text:
                    pieces += 1
                    await exchange.line(said(exchange.path, text))
        told = {**STATS, "prompt_eval_count": usage["prompt_tokens"], "eval_count": usage["completion_tokens"]}
        await exchange.line(said(exchange.path, "", done=True, done_reason=finish, **told))
        await exchange.end()

    def _events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        options = body.get("options", {})
        told = {"model": self._server.model, "stream": True, "stream_options": {"include_usage": True}}
        told |= {name: options[name] for name in ("temperature", "seed", "stop", "top_p") if name in options}
        if "num_predict" in options:
            told["max_tokens"] = options["num_predict"]
        kept = {"messages": body["messages"]} if path == "/api/chat" else {"prompt": body["prompt"]}
        where = "/v1/chat/completions" if path == "/api/chat" else "/v1/completions"
        connection = connect(self._server.endpoint)
        with contextlib.closing(connection):
            connection.request("POST", where, json.dumps({**told, **kept}), {"Content-Type": "application/json"})
            response: http.client.HTTPResponse = connection.getresponse()
            assert response.status == 200, response.read()
            found = [line[5:].strip() for line in response.read().split(b"\n") if line.startswith(b"data:")]
        assert found[-1] == b"[DONE]"
        return [json.loads(data) for data in found[:-1]]


HELLO = answering("Hello", " there")


class OllamaStandIn:
    """One Ollama; ``behaviour`` answers what computes, ``asked`` is all that was asked of it, with bodies."""

    def __init__(self, behaviour: Behaviour = HELLO) -> None:
        self.behaviour = behaviour
        #: Whether a model goes on from the beginning of an answer: a probe is answered so, unless by ``probe``.
        self.goes_on = True
        self.probe: Behaviour | None = None
        #: What is asked here is never answered.
        self.mute = ""
        self.connections: list[object] = []
        self.version = "0.14.2"
        self.parameters = ""
        self.capabilities = ["completion"]
        self.digest = DIGEST
        #: What is loaded, with its context; how often something was loaded, and loaded anew for another context.
        self.loaded: dict[str, int] = {}
        self.loads = self.reloads = 0
        self.expires = 0
        self.asked: list[tuple[str, Any]] = []
        self.left = asyncio.Event()
        self.url = ""
        self._server: asyncio.Server | None = None
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def bodies(self, path: str) -> list[Any]:
        """Return the bodies of what was asked at a path."""
        return [body for where, body in self.asked if where == path]

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
        self.connections.append(writer)
        try:
            while not writer.transport.is_closing():
                await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        path = head.split()[1]
        length = next((int(part[15:]) for part in head.split("\r\n") if part.startswith("content-length:")), 0)
        body = json.loads(await reader.readexactly(length)) if length else None
        self.asked.append((path, body))
        exchange = Exchange(path, body, reader, writer)
        small = self._small(path)
        if path == self.mute:
            await exchange.left()
            return
        if small is not None:
            await exchange.whole(200, small)
        elif path in ("/api/chat", "/api/generate", "/api/embed"):
            await self._compute(exchange)
        else:
            await exchange.whole(404, {"error": "404 page not found"})

    def _small(self, path: str) -> object | None:
        if path == "/api/version":
            return {"version": self.version}
        if path == "/api/tags":
            return {"models": [{"name": MODEL, "model": MODEL, "size": 2019393189, "digest": self.digest}]}
        if path == "/api/ps":
            listed = [
                {"name": name, "digest": self.digest, "expires_at": self.moment(), "context_length": context}
                for name, context in self.loaded.items()
            ]
            return {"models": listed}
        if path == "/api/show":
            return {"parameters": self.parameters, "capabilities": self.capabilities, "model_info": {}}
        return None

    def moment(self) -> str:
        """Return when the model will leave memory, as Ollama writes it."""
        return f"2026-10-17T16:47:{self.expires % 60:02d}.93355-07:00"

    async def _compute(self, exchange: Exchange) -> None:
        wanted = exchange.body.get("options", {}).get("num_ctx")
        name, has = exchange.body["model"], self.loaded.get(exchange.body["model"])
        if has is None or wanted not in (None, has):
            self.loads, self.reloads = self.loads + 1, self.reloads + (has is not None)
            self.loaded[name] = wanted or DEFAULT_CONTEXT
        try:
            if exchange.body.get("stream") is False and exchange.path == "/api/chat":
                await self._probed(exchange)
            else:
                await self.behaviour(self, exchange)
        finally:
            self.expires += 1

    async def _probed(self, exchange: Exchange) -> None:
        """Answer the one request that is not streamed: whether the model goes on from "1, 2, 3,"."""
        if self.probe is not None:
            await self.probe(self, exchange)
            return
        text = " 4, 5, 6" if self.goes_on else "1, 2, 3, 4"
        await exchange.whole(200, said("/api/chat", text, done=True, done_reason="length", **STATS))


@contextlib.asynccontextmanager
async def ollama(behaviour: Behaviour = HELLO, **more: Any) -> AsyncIterator[OllamaStandIn]:
    """Run one."""
    made = OllamaStandIn(behaviour)
    for name, value in more.items():
        setattr(made, name, value)
    await made.open()
    try:
        yield made
    finally:
        await made.close()
