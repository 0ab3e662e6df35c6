"""Looking at the hardware again: now and then, sooner while something is wrong, and at once when the owner asks.

What got worse is looked at once more before it is told, since it moves services; what got better is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING

from rma_core.changes import changes, has_trouble, worse
from rma_core.errors import RMAError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rma_core.models.hardware import HardwareReport

logger = logging.getLogger(__name__)

#: Seconds to the next look while something is wrong: doubled with each look that finds it so, up to the interval.
TROUBLE_S = 60.0
#: Seconds after which what got worse is looked at once more.
CONFIRM_S = 10.0


class Lookout:
    """Keeps the hardware report of a running agent; ``found`` is told of each one that differs from the last."""

    def __init__(
        self,
        report: HardwareReport,
        look: Callable[[], Awaitable[HardwareReport]],
        found: Callable[[HardwareReport], None],
        *,
        interval_s: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Start with what was seen; ``interval_s`` of 0 looks only when asked to."""
        self.report = report
        self._look, self._found = look, found
        self._interval_s, self._uniform = interval_s, uniform
        self._asked = asyncio.Event()
        #: Looks that have ended, and how many of the last ones found something wrong.
        self.rounds, self._troubles = 0, 0
        self._looking = False
        #: Why the last look gave nothing.
        self.error = ""

    def ask(self) -> int:
        """Look now; return how many looks will have ended before that one."""
        self._asked.set()
        return self.rounds + self._looking

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self._wait(self.delay_s())
            self._asked.clear()
            self._looking = True
            try:
                await self._round()
                self.error = ""
            except RMAError as error:
                # Settings that are wrong just now, say: what was seen before still holds.
                logger.warning("the hardware cannot be looked at now: %s", error, extra={"action": "hardware"})
                self.error = str(error)
            except Exception as error:
                logger.exception("a look at the hardware failed", extra={"action": "bug"})
                self.error = f"something went wrong in rma itself ({type(error).__name__}: {error})"
            self._looking = False
            self.rounds += 1

    def delay_s(self) -> float | None:
        """Return the seconds until the next look; ``None`` for never."""
        if not self._interval_s:
            return None
        self._troubles = self._troubles + 1 if has_trouble(self.report) else 0
        sooner = TROUBLE_S * 2.0 ** min(self._troubles - 1, 16) if self._troubles else self._interval_s
        return min(self._interval_s, sooner) * self._uniform(0.8, 1.0)

    async def _wait(self, delay_s: float | None) -> None:
        """Wait so long, or until somebody asks."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._asked.wait()

    async def _round(self) -> None:
        new = await self._look()
        if worse(self.report, new):
            # A driver that was busy for a moment is no reason to stop what runs.
            await self._pause(CONFIRM_S)
            new = await self._look()
        if found := changes(self.report, new):
            logger.info("the hardware has changed: %s", "; ".join(found), extra={"action": "hardware"})
            self.report = new
            self._found(new)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
