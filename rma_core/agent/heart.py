"""Heartbeats: at the interval the coordinator asks for, at once when something changed, never behind work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING

from rma_core.agent.uplink import LinkLostError
from rma_core.errors import CoordinatorError, NotAuthenticated, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.agent.channel import Channel
    from rma_core.agent.client import CoordinatorClient
    from rma_core.agent.membership import Link
    from rma_core.models.worker import Heartbeat, HeartbeatAnswer

logger = logging.getLogger(__name__)

#: Seconds between heartbeats until the coordinator says otherwise, and the limits of what it may say.
INTERVAL_S, LEAST_INTERVAL_S, MOST_INTERVAL_S = 30.0, 0.1, 3600.0
#: Changes within this go into one heartbeat, over the channel and by HTTP.
GATHER_CHANNEL_S, GATHER_HTTP_S = 0.05, 0.25


class Heart:
    """Sends heartbeats; ``make`` gives the next one with all news, ``bare`` one without, ``answered`` what came back.

    ``told`` is given each one that was read. Those with news go one after the other, so that none overtakes another.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        channel: Channel,
        *,
        make: Callable[[], Heartbeat],
        bare: Callable[[], Heartbeat],
        told: Callable[[Heartbeat], None],
        answered: Callable[[HeartbeatAnswer], None],
        forgotten: Callable[[], None],
        link: Link,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._client, self._channel, self._make, self._bare, self._told = client, channel, make, bare, told
        self._answered, self._forgotten, self._link = answered, forgotten, link
        self._clock, self._uniform = clock, uniform
        self._soon = asyncio.Event()
        self.interval_s = INTERVAL_S
        self.last_answer: float | None = None

    def pace(self, interval_s: float) -> None:
        """Beat at this interval from now on."""
        self.interval_s = min(MOST_INTERVAL_S, max(LEAST_INTERVAL_S, interval_s))

    def soon(self) -> None:
        """Something changed that the coordinator should know at once."""
        self._soon.set()

    def heard(self) -> None:
        """A heartbeat was answered."""
        self.last_answer = self._clock()
        self._link.up()

    async def run(self) -> None:
        """Beat until cancelled; the first time when the channel is open, or could not be opened."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.interval_s * self._uniform(0.8, 1.0)):
                    await self._soon.wait()
                # Changes seldom come alone, and a heartbeat tells of all of them.
                await asyncio.sleep(GATHER_CHANNEL_S if self._channel.up else GATHER_HTTP_S)
            self._soon.clear()
            await self.beat()

    async def beat(self) -> bool:
        """Send one heartbeat, over the channel when there is one; say whether it got through."""
        beat = self._make()
        if self._channel.up:
            try:
                await self._channel.beat(beat)
            except LinkLostError as error:
                logger.debug("no heartbeat over the channel: %s", error)
            else:
                if _has_news(beat) and await self._channel.reached():
                    self._told(beat)
                return True
        return await self._by_http(beat)

    async def beat_by_http(self) -> bool:
        """Send one heartbeat without news by HTTP, at any time; say whether it was answered."""
        return await self._by_http(self._bare())

    async def _by_http(self, beat: Heartbeat) -> bool:
        try:
            answer = await self._client.heartbeat(beat)
        except (NotAuthenticated, NotFound):
            self._forgotten()
            return False
        except CoordinatorError as error:
            self._link.failed(error)
            return False
        self._told(beat)
        self._answered(answer)
        return True


def _has_news(beat: Heartbeat) -> bool:
    return beat.report is not None or beat.runtimes is not None or beat.plugins is not None
