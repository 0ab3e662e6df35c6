"""An agent, or its model server, is killed at a random token: whoever reads the answer cannot tell.

Everything is real: the coordinator, two agents with a llama.cpp server each, the same weights, OpenAI's SDK.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import secrets
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import httpx2
import openai
import pytest

from tests import crash_kit
from tests.model_servers import SOLID, SOLID_PROMPT, SOLID_TOKENS, Brake, serving
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    from tests.crash_kit import Town
    from tests.model_servers import ModelServer

#: Times that somebody is killed, in the suite and under `make soak`.
KILLS, MANY_KILLS = 4, 50
#: Who is killed: an agent; the process that holds the model, behind its service; that service with all it started.
Victim = Literal["agent", "engine", "server"]
VICTIMS: tuple[Victim, ...] = ("agent", "engine", "agent", "server")
#: What is asked for, by whether it is a chat.
SAYS: dict[bool, tuple[str, ...]] = {True: SOLID, False: (SOLID_PROMPT,)}
#: Answers that are on their way beside the one whose worker is killed.
BESIDE = 2
#: Kills that may come too late: when nobody waits for the answer any more.
MISSES = 0.3


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


class Round(NamedTuple):
    """What chance decides of one kill."""

    victim: Victim
    ask: Ask
    beside: list[Ask]
    #: Tokens of the answer when it happens; 0: its request runs, and nothing has come of it.
    at: int
    #: Whether the victim stays away until all answers are there.
    stays: bool


def ask(chance: random.Random) -> Ask:
    chat = chance.random() < 0.6
    return Ask(chat, chance.random() < 0.75, chance.choice(SAYS[chat]))


def rounds(chance: random.Random) -> Iterator[Round]:
    """Give what happens, round by round: every kind of victim in turns, each time in another order."""
    while True:
        for victim in chance.sample(VICTIMS, len(VICTIMS)):
            at = 0 if chance.random() < 0.1 else chance.randrange(1, SOLID_TOKENS - 10)
            stays = chance.random() < 0.2
            yield Round(victim, ask(chance), [ask(chance) for _ in range(BESIDE)], at, stays)


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


async def answer(client: openai.AsyncOpenAI, one: Ask, at_token: Callable[[int, str], None] = lambda *_: None) -> Got:
    """Make a request and return what came; ``at_token`` is told how many came so far, and which worker answers."""
    calls: Any = client.chat.completions if one.chat else client.completions
    raw = await calls.with_raw_response.create(**one.fields)
    if not one.stream:
        return _whole(raw.parse(), one, raw.headers)
    chunks, size = [], 0
    async for chunk in raw.parse():
        chunks.append(chunk)
        if said := _said(chunk, one):
            size += len(said)
            at_token(size, raw.headers["x-rma-worker"])
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
    """Two workers that are killed and come again."""

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
        async with self.made.client() as client, asyncio.timeout(crash_kit.PATIENCE_S):
            while True:
                tasks = (await client.get("/api/admin/tasks?limit=20")).json()["tasks"]
                if running := [task["attempts"][-1] for task in tasks if task["status"] == "running"]:
                    return str(running[0]["worker_id"])
                await asyncio.sleep(0.05)

    async def both_serve(self) -> None:
        """Ask for as much as one worker cannot do alone, until both answer."""
        deadline = time.monotonic() + 3 * crash_kit.PATIENCE_S
        while True:
            asked = [answer(self.client, Ask(chat=True, stream=True, says=SOLID[0])) for _ in range(3)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            # One whose victim has not come back yet may have been asked in vain.
            if unknown := [one for one in found if not isinstance(one, Got | openai.InternalServerError)]:
                raise AssertionError(f"{unknown}\n{self.made.words()}")
            if {one.worker for one in found if isinstance(one, Got)} == set(self.numbers):
                return
            assert time.monotonic() < deadline, f"{found}\n{self.made.words()}"
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def two_workers(folder: Path) -> AsyncIterator[Pool]:
    with serving(folder / "m", count=2) as servers, Brake(servers) as brake:
        alone = {"RMA_RUNTIMES": "docker", "RMA_FIND_MODEL_SERVERS": "0"}
        agents = [{**alone, "RMA_ATTACH": server.endpoint} for server in servers]
        async with crash_kit.town(folder, [None, None], agents) as made, sdk(made) as client:
            yield Pool(made, servers, brake, client)


class Outcome(NamedTuple):
    """What came of a round: who was killed, what its client got, and what those beside it."""

    lost: str
    got: Got
    beside: list[Got]


async def play(pool: Pool, one: Round) -> Outcome:
    """Let the worker of a request be killed in the middle of its answer."""
    early = one.at == 0 or not one.ask.stream
    struck: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def strike(worker: str) -> None:
        pool.kill(worker, one.victim)
        struck.set_result(worker)

    def at_token(count: int, worker: str) -> None:
        if not early and count >= one.at and not struck.done():
            strike(worker)

    if early:
        pool.brake.hold()
    asked = pool.made.begin(answer(pool.client, one.ask, at_token))
    if early:
        worker = await pool.working()
    beside = [pool.made.begin(answer(pool.client, other)) for other in one.beside]
    if early:
        pool.brake.let_go()
        # Nobody sees how far a whole answer is.
        await asyncio.sleep(one.at / SOLID_TOKENS / 2)
        strike(worker)
    lost = await struck
    if one.stays:
        await asyncio.wait([asked, *beside])
    pool.again(lost, one.victim)
    return Outcome(lost, await asked, [await other for other in beside])


# -- the test --------------------------------------------------------------------------------------------------------


def check(one: Round, outcome: Outcome, uncut: dict[Ask, Got]) -> bool:
    """Assert that nobody can tell, but by what is told; say whether the kill met the answer."""
    for asked, got in [(one.ask, outcome.got), *zip(one.beside, outcome.beside, strict=True)]:
        assert got.same == uncut[asked].same, (one, asked, got)
        assert len(got.continued_at) < got.attempts, (one, got)
        if got.continued_at:
            assert got.facts["continued_at_token"] == got.continued_at[-1], (one, got)
    got = outcome.got
    if got.attempts > 1:
        assert got.worker != outcome.lost, (one, got)
    if one.at == 0:
        assert got.continued_at == (), "before the first event a loss is not noticed"
    elif one.ask.stream and got.attempts > 1:
        assert got.continued_at[0] >= one.at, (one, got)
    return got.attempts > 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kills", [KILLS, pytest.param(MANY_KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
async def test_an_answer_whose_agent_or_model_server_is_killed_is_the_same_as_without(
    tmp_path_factory: pytest.TempPathFactory, kills: int
) -> None:
    """Temperature 0, the same weights on two machines, killed at a random token each time."""
    need("llama")
    seed = int(os.environ.get("RMA_SEED") or secrets.randbelow(2**31))
    print(f"seed {seed} (RMA_SEED)")  # noqa: T201 - pytest shows it with a failure
    counts: Counter[str] = Counter()
    async with two_workers(tmp_path_factory.mktemp("l")) as pool:
        asks = [Ask(chat, stream, says) for chat in (True, False) for stream in (True, False) for says in SAYS[chat]]
        uncut = {one: await answer(pool.client, one) for one in asks}
        assert {(len(got.text), got.attempts, got.ids) for got in uncut.values()} == {(SOLID_TOKENS, 1, 1)}
        for one in rounds(random.Random(seed)):
            await pool.both_serve()
            outcome = await play(pool, one)
            counts[f"{one.victim} killed" if check(one, outcome, uncut) else "too late"] += 1
            counts["answers"] += 1 + len(outcome.beside)
            counts["continued"] += sum(len(got.continued_at) for got in (outcome.got, *outcome.beside))
            met = counts.total() - counts["too late"] - counts["answers"] - counts["continued"]
            assert counts["too late"] <= 2 + kills * MISSES, counts
            if met == kills:
                break
        print(dict(counts))  # noqa: T201 - what was killed
        assert "Traceback" not in pool.made.words()
