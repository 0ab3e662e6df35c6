"""Answers that are kept and delivered late: their bounds, their retries, their end; the coordinator is fickle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent import answers as answers_module
from rma_core.agent.answers import Answers, Copy, LinkLostError
from rma_core.agent.uplink import Upload
from rma_core.backoff import Backoff
from rma_core.errors import CoordinatorUnreachable, Forbidden, NotAuthenticated, NotFound, Refused, TryLater
from rma_core.models.worker import AttemptRef
from tests.agent_service import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from rma_core.errors import CoordinatorError

LATER = (CoordinatorUnreachable("away"), TryLater("full"), NotAuthenticated("old token"))
NEVER = (NotFound("outdated"), Refused("wrong"), Forbidden("not yours"))


class FickleCoordinator:
    """Answers a delivery with what it is told to, and notes what it took."""

    def __init__(self) -> None:
        self.mood: CoordinatorError | None = None
        self.unknown: CoordinatorError | None = None
        self.tries = 0
        self.took: list[tuple[str, bytes]] = []
        self.refused: list[str] = []
        self.hangs = False

    async def token(self, *, stale: str = "") -> str:
        if self.unknown is not None:
            raise self.unknown
        return stale + "t"

    async def result(
        self,
        ref: AttemptRef,
        status: int,
        headers: Iterable[tuple[str, str]],
        chunks: Callable[[], AsyncIterator[bytes]],
    ) -> None:
        self.tries += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.mood is not None:
            if isinstance(self.mood, NEVER_KINDS):
                self.refused.append(ref.lease_id)
            raise self.mood
        self.took.append((ref.lease_id, b"".join([chunk async for chunk in chunks()])))


NEVER_KINDS = (NotFound, Refused, Forbidden)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Answers whose coordinator and clock are in the test's hand."""

    def __init__(self) -> None:
        self.pool, self.clock = FickleCoordinator(), Clock()
        backoff = Backoff(base_s=1.0, cap_s=60.0, uniform=lambda _, high: high)
        self.answers = Answers(self.pool, backoff=backoff, clock=self.clock)  # type: ignore[arg-type]

    def copy(self, number: int, body: bytes = b"whole", length: int | None = None) -> Copy:
        copy = self.answers.copy(ref(number), 200, (), length)
        copy.add(body)
        return copy

    async def pause(self) -> None:
        """Let everything happen that is due now."""
        for _ in range(12):
            await asyncio.sleep(0)

    async def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.answers._news.set()
        await self.pause()


def ref(number: int) -> AttemptRef:
    return AttemptRef(task_id=f"task-{number:020d}", attempt=1, lease_id=f"{number:032x}")


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    running = asyncio.create_task(made.answers.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("failure", LATER)
async def test_an_answer_that_cannot_be_delivered_now_is_tried_less_and_less_often(
    desk: Desk, failure: CoordinatorError
) -> None:
    desk.pool.mood = failure
    desk.answers.keep(desk.copy(1))
    for wait_s, tries in ((0, 1), (0.9, 1), (0.1, 2), (1.9, 2), (0.1, 3), (3.9, 3), (0.1, 4)):
        await desk.later(wait_s)
        assert desk.pool.tries == tries
    desk.pool.mood = None
    desk.answers.kick()
    await desk.pause()
    assert (desk.pool.took, len(desk.answers)) == ([(ref(1).lease_id, b"whole")], 0)


@pytest.mark.parametrize(("failure", "tries"), [(LATER[0], 2), (LATER[1], 1)])
async def test_that_the_coordinator_was_heard_of_hurries_what_did_not_reach_it_and_not_what_it_put_off(
    desk: Desk, failure: CoordinatorError, tries: int
) -> None:
    desk.pool.mood = failure
    desk.answers.keep(desk.copy(1))
    await desk.pause()
    desk.answers.heard()
    await desk.pause()
    assert desk.pool.tries == tries


@pytest.mark.parametrize("failure", NEVER)
async def test_an_answer_that_is_refused_is_dropped_and_not_tried_again(desk: Desk, failure: CoordinatorError) -> None:
    desk.pool.mood = failure
    desk.answers.keep(desk.copy(1))
    desk.answers.kick()
    await desk.pause()
    assert (desk.pool.tries, len(desk.answers)) == (1, 0)


@pytest.mark.parametrize("failure", NEVER)
async def test_that_the_worker_is_not_known_says_nothing_about_its_answers(
    desk: Desk, failure: CoordinatorError
) -> None:
    desk.pool.unknown = failure
    desk.answers.keep(desk.copy(1))
    desk.answers.kick()
    await desk.pause()
    assert (desk.pool.tries, desk.answers.refs()) == (0, (ref(1),))
    desk.pool.unknown = None
    desk.answers.kick()
    await desk.pause()
    assert desk.pool.took


async def test_an_answer_that_nobody_takes_for_an_hour_is_dropped(desk: Desk) -> None:
    desk.pool.mood = LATER[0]
    desk.answers.keep(desk.copy(1))
    await desk.later(answers_module.KEEP_S)
    assert len(desk.answers) == 1
    await desk.later(61)
    assert len(desk.answers) == 0


async def test_one_delivery_that_hangs_does_not_hold_the_others(desk: Desk) -> None:
    desk.pool.hangs = True
    desk.answers.keep(desk.copy(1))
    await desk.later(1)
    desk.pool.hangs = False
    desk.answers.keep(desk.copy(2))
    desk.answers.kick()
    await desk.pause()
    assert desk.pool.took == [(ref(2).lease_id, b"whole")]


async def test_too_many_answers_cost_the_oldest_ones(desk: Desk) -> None:
    desk.pool.mood = LATER[0]
    for number in range(1, answers_module.MAX_KEPT + 4):
        desk.answers.keep(desk.copy(number, b""))
    assert len(desk.answers) == answers_module.MAX_KEPT
    assert ref(3) not in desk.answers.refs()
    assert ref(4) in desk.answers.refs()


async def test_an_answer_too_large_to_be_kept_is_lost_with_its_way(desk: Desk) -> None:
    copy = desk.copy(1, b"x" * answers_module.MAX_ANSWER_BYTES)
    kept = [copy.kept]
    copy.add(b"x")
    assert [*kept, copy.kept] == [True, False]
    with pytest.raises(LinkLostError, match="too large"):
        desk.answers.keep(copy)


async def test_a_sent_answer_is_let_go_once_it_was_read_and_kept_when_the_way_breaks_before(desk: Desk) -> None:
    desk.answers.sent(desk.copy(1))
    marks = desk.answers.marks()
    desk.answers.sent(desk.copy(2))
    desk.answers.confirm(marks)
    assert len(desk.answers) == 1
    assert desk.answers.refs() == ()
    desk.answers.broke()
    assert desk.answers.refs() == (ref(2),)


async def test_an_upload_whose_token_is_refused_begins_again_with_what_was_taken(desk: Desk) -> None:
    class SecondTry(FickleCoordinator):
        async def result(
            self,
            ref: AttemptRef,
            status: int,
            headers: Iterable[tuple[str, str]],
            chunks: Callable[[], AsyncIterator[bytes]],
        ) -> None:
            assert await anext(chunks()) == b"one"
            await super().result(ref, status, headers, chunks)

    pool = SecondTry()
    upload = Upload(pool, desk.answers, desk.answers.copy(ref(1), 200, (), None))  # type: ignore[arg-type]
    await upload.write(b"one")
    await desk.pause()
    await upload.write(b"two")
    await upload.finish()
    assert pool.took == [(ref(1).lease_id, b"onetwo")]


async def test_a_large_upload_whose_token_is_refused_in_the_middle_is_lost_with_the_reason(desk: Desk) -> None:
    class SecondTry(FickleCoordinator):
        async def result(
            self,
            ref: AttemptRef,
            status: int,
            headers: Iterable[tuple[str, str]],
            chunks: Callable[[], AsyncIterator[bytes]],
        ) -> None:
            assert await anext(chunks()) == b"one"
            await super().result(ref, status, headers, chunks)

    large = answers_module.MAX_ANSWER_BYTES + 1
    upload = Upload(SecondTry(), desk.answers, desk.answers.copy(ref(1), 200, (), large))  # type: ignore[arg-type]
    await upload.write(b"one")
    await desk.pause()
    with pytest.raises(LinkLostError, match="token was refused"):
        await upload.write(b"two")
    await upload.abort()


async def test_an_upload_that_breaks_goes_on_into_its_copy(desk: Desk) -> None:
    desk.pool.mood = LATER[0]
    upload = Upload(desk.pool, desk.answers, desk.answers.copy(ref(1), 200, (), None))  # type: ignore[arg-type]
    await desk.pause()
    await upload.write(b"one")
    await upload.write(b"two")
    await upload.finish()
    await upload.abort()  # the attempt is over: what is kept stays
    desk.pool.mood = None
    desk.answers.kick()
    await eventually(lambda: desk.pool.took)
    assert desk.pool.took == [(ref(1).lease_id, b"onetwo")]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 60)),
        st.tuples(st.just("whole"), st.integers(1, 100)),
        st.tuples(st.just("add"), st.integers(1, 60)),
        st.tuples(st.sampled_from(["send", "keep", "abandon", "confirm", "break", "kick"]), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 4000)),
        st.tuples(st.just("mood"), st.integers(0, len(LATER) + len(NEVER))),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_no_bound_is_passed_no_byte_is_lost_count_of_and_no_answer_is_delivered_in_part(
    steps: Sequence[tuple[str, int]],
) -> None:
    with mock.patch.multiple(
        answers_module, MAX_ANSWER_BYTES=100, MAX_COPIES_BYTES=300, MAX_SENT=4, MAX_KEPT=4, MAX_KEPT_BYTES=250
    ):
        asyncio.run(_live(steps))


async def _live(steps: Sequence[tuple[str, int]]) -> None:
    desk = Desk()
    desk.pool.mood = LATER[0]
    running = asyncio.create_task(desk.answers.run())
    open_copies: list[Copy] = []
    written: dict[str, bytes] = {}
    number = 0
    for what, value in steps:
        if what == "begin":
            number += 1
            open_copies.append(desk.answers.copy(ref(number), 200, (), value or None))
            written[ref(number).lease_id] = b""
        elif what == "whole":
            number += 1
            written[ref(number).lease_id] = b"w" * value
            copy = desk.copy(number, b"w" * value)
            if copy.kept:
                desk.answers.keep(copy)
        elif what == "mood":
            desk.pool.mood = (None, *LATER, *NEVER)[value]
        elif what == "wait":
            await desk.later(value)
        elif what in ("confirm", "break", "kick"):
            _about_all(desk.answers, what)
        elif open_copies:
            _about_one(desk.answers, open_copies, what, bytes([number]) * value, written)
        await desk.pause()
        _check(desk, open_copies, written)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def _about_all(answers: Answers, what: str) -> None:
    if what == "confirm":
        answers.confirm(answers.marks())
    elif what == "break":
        answers.broke()
    else:
        answers.kick()


def _about_one(answers: Answers, copies: list[Copy], what: str, data: bytes, written: dict[str, bytes]) -> None:
    copy = copies[0]
    if what == "add":
        copy.add(data)
        written[copy.ref.lease_id] += data
        return
    del copies[0]
    if what == "abandon":
        copy.drop()
    elif what == "send":
        answers.sent(copy)
    elif copy.kept:
        answers.keep(copy)
    else:
        with pytest.raises(LinkLostError):
            answers.keep(copy)


def _check(desk: Desk, open_copies: Sequence[Copy], written: dict[str, bytes]) -> None:
    answers: Any = desk.answers
    held = [*open_copies, *answers._sent.values()]
    assert answers._room.left + sum(copy._reserved for copy in held) == 300
    assert all(len(copy.body) <= copy._reserved <= 100 for copy in held)
    assert len(answers._sent) <= 4
    assert len(answers._late) <= 4
    assert sum(late.size for late in answers._late.values()) <= 250
    assert all(body == written[lease] for lease, body in desk.pool.took)
    took = [lease for lease, _ in desk.pool.took]
    assert len(took) == len(set(took))
    assert not {r.lease_id for r in answers.refs()} & {*took, *desk.pool.refused}
    assert answers._settled.is_set() == (len(answers) == 0)
