"""A pool whose agents and model servers are killed and come again, requests to it, and what clients have in the end.

Everything is real: the coordinator, agents with a llama.cpp server each, the same weights, OpenAI's SDK.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import httpx2
import openai

from tests import crash_kit
from tests.model_servers import SOLID, SOLID_PROMPT, SOLID_TOKENS, Brake, processors, serving

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from tests.crash_kit import Town
    from tests.model_servers import ModelServer

#: Who is killed: an agent; the process that holds the model, behind its service; that service with all it started.
Victim = Literal["agent", "engine", "server"]
VICTIMS: tuple[Victim, ...] = ("agent", "engine", "agent", "server")
#: What is asked for, by whether it is a chat.
SAYS: dict[bool, tuple[str, ...]] = {True: SOLID, False: (SOLID_PROMPT,)}
#: Requests that a model server takes at once.
SLOTS = 2


class Ask(NamedTuple):
    """One request: a chat or a completion, streamed or whole."""

    chat: bool
    stream: bool
    says: str

    @property
    def fields(self) -> dict[str, Any]:
        says = {"messages": [{"role": "user", "content": self.says}]} if self.chat else {"prompt": self.says}
        usage = {"stream_options": {"include_usage": True}} if self.stream else {}
        return {"model": "tiny", **says, "max_tokens": SOLID_TOKENS, "temperature": 0, "stream": self.stream, **usage}


class Got(NamedTuple):
    """What a client has of an answer in the end; ``facts`` are what a stream says of how it came about."""

    text: str
    roles: tuple[str, ...]
    finishes: tuple[str, ...]
    usage: tuple[tuple[int, int, int], ...]
    ids: int
    worker: str
    attempts: int
    #: After how much of the text a comment said that another worker goes on.
    continued_at: tuple[int, ...] = ()
    facts: dict[str, Any] = {}  # noqa: RUF012 - never changed

    @property
    def same(self) -> tuple[object, ...]:
        """What has to be the same whoever is killed."""
        return self.text, self.roles, self.finishes, self.usage, self.ids


def ask(chance: random.Random) -> Ask:
    """Draw a request."""
    chat = chance.random() < 0.6
    return Ask(chat, chance.random() < 0.75, chance.choice(SAYS[chat]))


def asks() -> list[Ask]:
    """Return every request that `ask` may draw."""
    return [Ask(chat, stream, says) for chat in (True, False) for stream in (True, False) for says in SAYS[chat]]


# -- the client ------------------------------------------------------------------------------------------------------


class Kept(httpx2.AsyncByteStream):
    """A response's bytes on their way to the SDK, which does not show comments."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream
        self.seen = bytearray()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self.seen += piece
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _keep(response: httpx2.Response) -> None:
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = Kept(response.stream)


@contextlib.asynccontextmanager
async def sdk(made: Town) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's SDK as anyone uses it, but for its retries: a client has one stream."""
    async with openai.DefaultAsyncHttpxClient(event_hooks={"response": [_keep]}) as http:
        yield openai.AsyncOpenAI(base_url=f"{made.url}/v1", api_key=made.key, max_retries=0, http_client=http)


class Cut(Exception):
    """A stream broke off: what its client has of the text, and all that was sent of it."""

    def __init__(self, text: str, wire: str) -> None:
        super().__init__(f"cut after {text!r}; its last words: {wire[-1000:]}")
        self.text, self.wire = text, wire


async def answer(
    client: openai.AsyncOpenAI, one: Ask, at_token: Callable[[int, str], None] = lambda *_: None, *, name: str = ""
) -> Got:
    """Make a request and return what came; ``at_token`` is told how many came so far, and which worker answers.

    A ``name`` goes with it as its Idempotency-Key. Raises openai.OpenAIError before a stream has begun, Cut in it.
    """
    calls: Any = client.chat.completions if one.chat else client.completions
    raw = await calls.with_raw_response.create(**one.fields, extra_headers={"Idempotency-Key": name} if name else {})
    if not one.stream:
        return _whole(raw.parse(), one, raw.headers)
    chunks, said = [], ""
    try:
        async for chunk in raw.parse():
            chunks.append(chunk)
            if piece := _said(chunk, one):
                said += piece
                at_token(len(said), raw.headers.get("x-rma-worker", ""))
    except (openai.OpenAIError, httpx2.HTTPError) as error:
        raise Cut(said, bytes(raw.http_response.stream.seen).decode()) from error
    return _streamed(chunks, one, bytes(raw.http_response.stream.seen).decode())


def _said(chunk: Any, one: Ask) -> str:
    return "".join((choice.delta.content if one.chat else choice.text) or "" for choice in chunk.choices)


def _whole(found: Any, one: Ask, headers: Mapping[str, str]) -> Got:
    (choice,) = found.choices
    text, roles = (choice.message.content, (choice.message.role,)) if one.chat else (choice.text, ())
    who, tries = headers["x-rma-worker"], int(headers["x-rma-attempts"])
    return Got(text, roles, (choice.finish_reason,), (_counts(found.usage),), 1, who, tries)


def _streamed(chunks: list[Any], one: Ask, wire: str) -> Got:
    blocks = [block for block in wire.split("\n\n") if block]
    comments = [re.findall(r"(?m)^: rma.*$", block) for block in blocks]
    events = [re.sub(r"(?m)^: rma.*\n", "", block) for block in blocks]
    assert wire.endswith("\n\ndata: [DONE]\n\n")
    assert all(re.fullmatch(r"data: [^\n]+", event) for event in events), "comments stand between whole events"
    assert len(chunks) == len(events) - 1, "the SDK has read every event but the end marker"
    said = [_said(chunk, one) for chunk in chunks]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    facts = chunks[-1].model_extra["x_rma"]
    return Got(
        "".join(said),
        tuple(choice.delta.role for choice in choices if one.chat and choice.delta.role),
        tuple(choice.finish_reason for choice in choices if choice.finish_reason),
        tuple(_counts(chunk.usage) for chunk in chunks if chunk.usage),
        len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}),
        facts["worker"],
        facts["attempts"],
        tuple(len("".join(said[:at])) for at, told in enumerate(comments) if ": rma continued" in told),
        facts,
    )


def _counts(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# -- the pool --------------------------------------------------------------------------------------------------------


class Pool:
    """Workers that are killed and come again."""

    def __init__(self, made: Town, servers: list[ModelServer], brake: Brake, client: openai.AsyncOpenAI) -> None:
        self.made, self.servers, self.brake, self.client = made, servers, brake, client
        self.numbers = {made.worker(name): number for number, name in enumerate(made.agents)}

    def kill(self, worker: str, victim: Victim) -> None:
        number = self.numbers[worker]
        if victim == "agent":
            self.made.agents[f"m{number}"].stop(signal.SIGKILL)
        elif victim == "engine":
            self.servers[number].kill_engine()
        else:
            self.servers[number].kill()

    def again(self, worker: str, victim: Victim) -> None:
        """Start a victim again."""
        number = self.numbers[worker]
        if victim == "agent":
            self.made.agent_again(f"m{number}")
        else:
            self.servers[number] = self.servers[number].again()

    async def working(self) -> str:
        """Return the worker of the one request that runs."""
        async with asyncio.timeout(crash_kit.PATIENCE_S):
            while True:
                if running := await self._running():
                    return running[0]
                await asyncio.sleep(0.05)

    async def idle(self) -> None:
        """Wait until nothing runs: a client may have all of an answer before its worker has closed it."""
        async with asyncio.timeout(crash_kit.PATIENCE_S):
            while True:
                if not await self._running():
                    return
                await asyncio.sleep(0.05)

    async def _running(self) -> list[str]:
        async with self.made.client() as client:
            tasks = (await client.get("/api/admin/tasks?limit=20")).json()["tasks"]
        return [task["attempts"][-1]["worker_id"] for task in tasks if task["status"] == "running"]

    async def all_serve(self) -> None:
        """Ask for as much as all but one cannot do alone, until all answer."""
        deadline = time.monotonic() + 3 * crash_kit.PATIENCE_S
        most = SLOTS * (len(self.servers) - 1) + 1
        while True:
            asked = [answer(self.client, Ask(chat=True, stream=True, says=SOLID[0])) for _ in range(most)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            # One whose victim has not come back yet may have been asked in vain.
            if unknown := [one for one in found if not isinstance(one, Got | openai.InternalServerError)]:
                raise AssertionError(f"{unknown}\n{self.made.words()}")
            if {one.worker for one in found if isinstance(one, Got)} == set(self.numbers):
                return
            assert time.monotonic() < deadline, f"{found}\n{self.made.words()}"
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def workers(
    folder: Path, count: int, /, *, slow: bool = False, works_s: float = 0.002, **settings: str
) -> AsyncIterator[Pool]:
    """A pool of so many workers with a model server each, and a copy of the slow service where ``slow``.

    ``works_s`` is for how long at once the brake lets engines work; ``settings`` are the coordinator's.
    """
    with (
        serving(folder / "m", count=count, env={"SLOTS": str(SLOTS)}, on=processors()) as servers,
        Brake(servers, works_s=works_s) as brake,
    ):
        alone = {"RMA_FIND_MODEL_SERVERS": "0"} if slow else {"RMA_FIND_MODEL_SERVERS": "0", "RMA_RUNTIMES": "docker"}
        agents = [{**alone, "RMA_ATTACH": server.endpoint} for server in servers]
        async with crash_kit.town(folder, [None] * count, agents, **settings) as made, sdk(made) as client:
            yield Pool(made, servers, brake, client)
