"""Heartbeats: what is new is told until it was read, whatever is lost or overtaken on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_core.agent.heart import Heart
from rma_core.agent.uplink import LinkLostError
from rma_core.errors import CoordinatorError
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import Heartbeat, HeartbeatAnswer

if TYPE_CHECKING:
    from rma_core.agent.client import CoordinatorClient

NEW = HardwareReport(capabilities=Capabilities(cpu_cores=4, ram="8.0GB"))
WORKER = "worker-00000000"


class Way:
    """Both ways to a coordinator, as a test says: which is there, and what is lost on it."""

    def __init__(self, *, up: bool) -> None:
        self.up, self.loses, self.unread = up, False, False
        self.sent: list[Heartbeat] = []
        self.known: HardwareReport | None = None

    async def beat(self, beat: Heartbeat) -> None:
        if self.loses:
            raise LinkLostError("the channel is down")
        self.sent.append(beat)

    async def reached(self) -> bool:
        return not self.unread

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatAnswer:
        self.sent.append(beat)
        if self.loses:
            raise CoordinatorError("it did not answer")
        return HeartbeatAnswer(heartbeat_interval_s=30, generation=0)

    def make(self) -> Heartbeat:
        return Heartbeat(worker_id=WORKER, report=None if self.known is NEW else NEW)

    def told(self, beat: Heartbeat) -> None:
        self.known = beat.report or self.known

    def heart(self) -> Heart:
        link: Any = self
        client: CoordinatorClient = link
        return Heart(
            client, link, make=self.make, bare=lambda: Heartbeat(worker_id=WORKER), told=self.told,
            answered=lambda _: None, forgotten=lambda: None, link=link,
        )  # fmt: skip

    def failed(self, error: CoordinatorError) -> None:
        """The link is told."""

    @property
    def news(self) -> list[bool]:
        return [beat.report is not None for beat in self.sent]


async def test_by_http_news_is_told_until_it_was_answered() -> None:
    way = Way(up=False)
    heart = way.heart()
    way.loses = True
    assert not await heart.beat()
    way.loses = False
    assert await heart.beat()
    assert await heart.beat()
    assert way.news == [True, True, False]


async def test_over_the_channel_news_is_told_until_it_was_read() -> None:
    way = Way(up=True)
    heart = way.heart()
    way.unread = True
    assert await heart.beat()
    way.unread = False
    assert await heart.beat()
    assert await heart.beat()
    assert way.news == [True, True, False]


async def test_a_sign_of_life_between_two_beats_neither_carries_news_nor_passes_for_them() -> None:
    way = Way(up=False)
    heart = way.heart()
    way.loses = True
    assert not await heart.beat()
    way.loses = False
    assert await heart.beat_by_http()
    assert way.known is None
    assert await heart.beat()
    assert way.news == [True, False, True]
