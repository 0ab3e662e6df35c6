"""An agent, or its model server, is killed at a random token: whoever reads the answer cannot tell.

Everything is real: the coordinator, two agents with a llama.cpp server each, the same weights, OpenAI's SDK.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.losses import VICTIMS, Ask, Got, answer, ask, asks, workers
from tests.model_servers import SOLID_TOKENS
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.losses import Pool, Victim

#: Times that somebody is killed, in the suite and under `make soak`.
KILLS, MANY_KILLS = 6, 50
#: Answers that are on their way beside the one whose worker is killed.
BESIDE = 2
#: Times that the engines work, braked, at about which a whole answer is done: nobody sees how far one is.
WHOLE = 30
#: Of so many kills one at least must meet its answer, rather than come when nobody waits for it any more.
MISSES = 3


class Round(NamedTuple):
    """What chance decides of one kill."""

    victim: Victim
    ask: Ask
    beside: list[Ask]
    #: Tokens of the answer when it happens; 0: its request runs, and nothing has come of it.
    at: int
    #: Whether the victim stays away until all answers are there.
    stays: bool


def rounds(chance: random.Random) -> Iterator[Round]:
    """Give what happens, round by round: every kind of victim in turns, each time in another order."""
    while True:
        for victim in chance.sample(VICTIMS, len(VICTIMS)):
            at = 0 if chance.random() < 0.1 else chance.randrange(1, SOLID_TOKENS - 10)
            stays = chance.random() < 0.2
            yield Round(victim, ask(chance), [ask(chance) for _ in range(BESIDE)], at, stays)


class Outcome(NamedTuple):
    """What came of a round: who was killed, what its client got, and what those beside it."""

    lost: str
    got: Got
    beside: list[Got]


async def play(pool: Pool, one: Round) -> Outcome:
    """Let the worker of a request be killed in the middle of its answer."""
    unseen = one.at == 0 or not one.ask.stream
    struck: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def strike(worker: str) -> None:
        pool.kill(worker, one.victim)
        struck.set_result(worker)

    def at_token(count: int, worker: str) -> None:
        if not unseen and count >= one.at and not struck.done():
            strike(worker)

    if unseen:
        await pool.idle()
        pool.brake.hold()
    asked = pool.made.begin(answer(pool.client, one.ask, at_token))
    worker = await pool.working() if unseen else ""
    beside = [pool.made.begin(answer(pool.client, other)) for other in one.beside]
    if unseen:
        if times := one.at * WHOLE // SOLID_TOKENS:
            await asyncio.to_thread(pool.brake.work, times)
        strike(worker)
        pool.brake.let_go()
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
    if one.stays and got.attempts > 1:
        assert got.worker != outcome.lost, (one, got)
    if one.at == 0:
        assert got.continued_at == (), "before the first event a loss is not noticed"
    elif one.ask.stream and got.attempts > 1:
        assert got.continued_at[0] >= one.at, (one, got)
    return got.attempts > 1


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(KILLS, marks=pytest.mark.timeout(300)),
        pytest.param(MANY_KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
async def test_an_answer_whose_agent_or_model_server_is_killed_is_the_same_as_without(
    tmp_path_factory: pytest.TempPathFactory, kills: int
) -> None:
    """Temperature 0, the same weights on two machines, killed at a random token each time."""
    need("llama")
    seed = int(os.environ.get("RMA_SEED") or secrets.randbelow(2**31))
    print(f"seed {seed} (RMA_SEED)")  # noqa: T201 - pytest shows it with a failure
    counts: Counter[str] = Counter()
    async with workers(tmp_path_factory.mktemp("l"), 2) as pool:
        uncut = {one: await answer(pool.client, one) for one in asks()}
        assert {(len(got.text), got.attempts, got.ids) for got in uncut.values()} == {(SOLID_TOKENS, 1, 1)}
        for one in rounds(random.Random(seed)):
            await pool.all_serve()
            outcome = await play(pool, one)
            counts[f"{one.victim} killed" if check(one, outcome, uncut) else "too late"] += 1
            counts["answers"] += 1 + len(outcome.beside)
            counts["continued"] += sum(len(got.continued_at) for got in (outcome.got, *outcome.beside))
            met = sum(counts[f"{victim} killed"] for victim in set(VICTIMS))
            assert met + counts["too late"] < kills * MISSES, counts
            if met == kills:
                break
        print(dict(counts))  # noqa: T201 - what was killed
        assert "Traceback" not in pool.made.words()
