"""What the pool may ask of the model: a few paths, passed on without the caller's headers, under limits.

llama.cpp's server does more than this: it tokenizes and fills templates for anyone, lets a stream be read again under
an id that the client chose, and does not notice that a client left who does not stream, or whose prompt is still read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

from rma_llama_cpp import __version__, upstream
from rma_llama_cpp.answers import Answer, Failed, beginning
from rma_llama_cpp.exchange import Refused, answered, problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rma_llama_cpp.exchange import Exchange, Request
    from rma_llama_cpp.keeper import Engine

logger = logging.getLogger(__name__)

#: What whoever runs the service may ask, and nobody else: the agent lets no request of the pool get there.
CONTROL = frozenset({"/load", "/unload"})
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
EMBEDDING = "/v1/embeddings"
#: Requests that wait for a slot, for each slot; more are told to come again.
WAITING_PER_SLOT = 2
#: What a request may not choose: which slot it gets, which would bypass the choice by cached prompt.
NOT_PASSED_ON = ("id_slot",)
#: Of llama.cpp's `/props`; the rest are paths and defaults.
PROPS = ("total_slots", "chat_template", "chat_template_caps", "modalities", "build_info", "is_sleeping")
#: Seconds between two comments on a stream that waits for its model.
TELL_S = 2.0
#: How an event with nothing but the prompt's progress is told from a text about it: a quote in a text is escaped.
PROGRESS = b'"prompt_progress":{'


class Front:
    """Answers requests, at most so many at once."""

    def __init__(self, engine: Engine) -> None:
        """Pass requests on to ``engine`` once it is ready."""
        self._engine = engine
        self._taken = 0
        # They wait here: llama.cpp was seen to leave a slot idle for ten seconds after some of its own queue had left.
        self._free = asyncio.Semaphore(engine.settings.slots)
        self._quick: dict[str, Callable[[Exchange, Request], Awaitable[None]]] = {
            "/health": self._health, "/v1/models": self._models, "/slots": self._slots, "/props": self._props,
        }  # fmt: skip

    async def answer(self, exchange: Exchange, request: Request) -> None:
        """Answer one request. Raises Gone, Refused, Broken."""
        if request.method == "GET" and request.path in self._quick:
            await self._quick[request.path](exchange, request)
        elif request.path in GENERATING | {EMBEDDING} | CONTROL:
            if request.method != "POST":
                raise Refused(405, "method_not_allowed", f"{request.path} wants POST")
            if request.path in CONTROL:
                await self._control(exchange, request.path)
            else:
                await self._generate(exchange, request)
        else:
            raise Refused(404, "not_found_error", f"there is nothing at {request.method} {request.path[:200]} here")

    async def _health(self, exchange: Exchange, _: Request) -> None:
        engine = self._engine
        facts: dict[str, Any] = {
            "model": engine.settings.model, "slots": engine.settings.slots, "busy": self._taken,
            "embeddings": engine.settings.embeddings, "version": __version__,
        }  # fmt: skip
        if engine.state in ("ready", "cold"):
            await answered(exchange, 200, {"status": "cold" if engine.state == "cold" else "ok", **facts})
            return
        share = engine.progress()
        progress = {} if share is None else {"progress": round(share, 3)}
        loading = {"status": "loading", "phase": engine.state, **progress, **facts}
        if engine.settled:
            # Requests are taken, and held until it is ready.
            await answered(exchange, 200, loading)
            return
        error = problem(503, "unavailable_error", "Loading model")
        await answered(exchange, 503, {**loading, **error}, **{"Retry-After": "1"})

    async def _control(self, exchange: Exchange, path: str) -> None:
        """Load the model, or give its memory back unless requests are at it."""
        if path == "/load":
            self._engine.load()
        elif self._taken:
            raise Refused(409, "conflict_error", f"requests are at the model: {self._taken}")
        else:
            await self._engine.unload()
        await answered(exchange, 200, {"status": self._engine.state})

    async def _models(self, exchange: Exchange, _: Request) -> None:
        if self._engine.settled and not self._engine.ready.is_set():
            known = {"id": self._engine.settings.model, "object": "model", "owned_by": "llamacpp"}
            await answered(exchange, 200, {"object": "list", "data": [known]})
            return
        status, listed = await self._asked("/v1/models")
        if status == 200 and self._engine.settings.embeddings:  # noqa: PLR2004 - HTTP's OK
            # llama.cpp says `completion` of everything, and completes nothing while it makes vectors.
            models = [{**model, "capabilities": ["embedding"]} for model in listed.get("models", ())]
            listed = {**listed, "models": models}
        await answered(exchange, status, listed)

    async def _slots(self, exchange: Exchange, request: Request) -> None:
        """Which slots are at work, and nothing of what they work on."""
        status, slots = await self._asked("/slots")
        if status == 200 and isinstance(slots, list):  # noqa: PLR2004 - HTTP's OK
            if "fail_on_no_slot" in request.query and all(slot.get("is_processing") for slot in slots):
                raise Refused(503, "unavailable_error", "no slot is free")
            slots = [{name: slot.get(name) for name in ("id", "n_ctx", "is_processing")} for slot in slots]
        await answered(exchange, status, slots)

    async def _props(self, exchange: Exchange, _: Request) -> None:
        status, props = await self._asked("/props")
        if status == 200 and isinstance(props, dict):  # noqa: PLR2004 - HTTP's OK
            context = props.get("default_generation_settings", {}).get("n_ctx")
            shown = {name: props[name] for name in PROPS if name in props}
            props = {"model_alias": self._engine.settings.model, "n_ctx": context, **shown}
        await answered(exchange, status, props)

    async def _asked(self, path: str) -> tuple[int, Any]:
        self._must_be_ready()
        return await upstream.quick(self._engine, path)

    def _must_be_ready(self) -> None:
        if not self._engine.ready.is_set():
            words = "The model is not loaded" if self._engine.state == "cold" else "Loading model"
            raise Refused(503, "unavailable_error", words, retry_after_s=1)

    async def _generate(self, exchange: Exchange, request: Request) -> None:
        if not self._engine.settled:
            self._must_be_ready()
        embeds = self._engine.settings.embeddings
        if embeds != (request.path == EMBEDDING):
            does = "embeddings" if embeds else "text"
            raise Refused(400, "invalid_request_error", f"the model {self._engine.settings.model} is for {does} here")
        asked = read_json(request.body)
        if self._taken >= self._engine.settings.slots * (1 + WAITING_PER_SLOT):
            raise Refused(503, "unavailable_error", "all slots are taken and others wait already", retry_after_s=1)
        self._taken += 1
        try:
            await self._loaded(exchange, streams=request.path in GENERATING and bool(asked.get("stream")))
            async with self._free:
                await (self._embed if embeds else self._text)(exchange, request.path, asked)
        finally:
            self._taken -= 1

    async def _loaded(self, exchange: Exchange, *, streams: bool) -> None:
        """Wait until the model is there, and say on a stream how far it is."""
        self._engine.load()
        while not self._engine.ready.is_set():
            if streams:
                if not exchange.begun:
                    await exchange.begin_stream()
                share = self._engine.progress()
                done = "" if share is None else f" {share:.0%}"
                await exchange.piece(f": {self._engine.state}{done}\n\n".encode())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await self._engine.ready.wait()

    async def _embed(self, exchange: Exchange, path: str, asked: dict[str, Any]) -> None:
        async with upstream.asked(self._engine, "POST", path, json.dumps(asked).encode()) as answering:
            reply = await answering.whole()
        await exchange.whole(reply.status, reply.body)

    async def _text(self, exchange: Exchange, path: str, asked: dict[str, Any]) -> None:
        """Ask for a stream in any case: its connection is the only one whose end llama.cpp looks at."""
        streams = bool(asked.get("stream"))
        told = {name: value for name, value in asked.items() if name not in NOT_PASSED_ON}
        told |= {"stream": True, "return_progress": True}
        if not streams:
            told["stream_options"] = {"include_usage": True}
        async with upstream.asked(self._engine, "POST", path, json.dumps(told).encode()) as answering:
            if not answering.streams:
                await _refused(exchange, await answering.whole())
            elif streams:
                await _passed_on(exchange, answering, progress=bool(asked.get("return_progress")))
            else:
                begin = beginning(asked) if path == "/v1/chat/completions" else ""
                await _gathered(exchange, answering, begin)


async def _refused(exchange: Exchange, reply: upstream.Reply) -> None:
    """Pass a refusal on: with its status, or as an event of a stream that has begun to wait for the model."""
    if not exchange.begun:
        await exchange.whole(reply.status, reply.body)
        return
    await exchange.piece(b"data: " + b" ".join(reply.body.split(b"\n")) + b"\n\n")
    await exchange.end_stream()


async def _passed_on(exchange: Exchange, answering: upstream.Answering, *, progress: bool) -> None:
    """Pass a stream on; the status waits for the first event, which may be an error."""
    said = False
    async for event in answering.events():
        if not said and not exchange.begun:
            if (error := _error(event)) is not None:
                raise Refused(error.status, str(error.error.get("type")), str(error.error.get("message")))
            await exchange.begin_stream()
        said = True
        await exchange.piece((event if progress else without_progress(event)) + b"\n\n")
    if not said:
        raise upstream.Broken("llama.cpp said nothing")
    await exchange.end_stream()


async def _gathered(exchange: Exchange, answering: upstream.Answering, begin: str) -> None:
    answer = Answer(begin)
    try:
        async for event in answering.events():
            data = _data(event)
            if data and PROGRESS not in data:
                answer.take(data)
    except Failed as failed:
        await exchange.whole(failed.status, json.dumps({"error": failed.error}).encode())
        return
    if not answer.ended:
        raise upstream.Broken("the stream ended too soon")
    await exchange.whole(200, answer.json())


def without_progress(event: bytes) -> bytes:
    """Return the event, or a comment in its place that keeps the stream awake: no client expects progress unasked."""
    if PROGRESS not in event:
        return event
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(_data(event))["prompt_progress"]
        return b": prompt %d of %d" % (int(told["processed"]), int(told["total"]))
    return b": prompt"


def _data(event: bytes) -> bytes:
    """Return what stands behind ``data:``, or behind ``error:`` as an object with that member."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            return line[5:].strip()
        if line.startswith(b"error:"):
            return b'{"error":' + line[6:].strip() + b"}"
    return b""


def _error(event: bytes) -> Failed | None:
    try:
        Answer().take(_data(event) or b"{}")
    except Failed as failed:
        return failed
    return None


def read_json(body: bytes) -> dict[str, Any]:
    """Return the object in a request's body. Raises Refused."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused(400, "invalid_request_error", "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "invalid_request_error", "the body is not a JSON object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(name)
