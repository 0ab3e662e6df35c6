"""Waits with a bound, that cost nothing where there is nothing to wait for.

They are bounded with `asyncio.timeout`: before Python 3.12, `wait_for` can swallow a cancellation, and a handler that
was told to end would go on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import types
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

logger = logging.getLogger(__name__)

#: What seems to be silent is looked at once more after so many seconds.
LOOK_AGAIN_S = 0.5

T = TypeVar("T")


class Ahead:
    """A wait that goes on by itself, and calls ``then`` when it is over, however; a task of its own would cost more.

    What is awaited may wait for futures only, as servers' receives do, and nothing of it may ask for its task.
    """

    __slots__ = ("_steps", "_then")

    def __init__(self, awaitable: Awaitable[object], then: Callable[[], None]) -> None:
        self._steps: Generator[Any, Any, object] | None = awaitable.__await__()
        self._then = then
        self._go()

    def close(self) -> None:
        """Wait no more."""
        # Whoever is told may hold this: nothing of either is to live on for the other.
        steps, self._steps, self._then = self._steps, None, _nothing
        if steps is not None:
            steps.close()

    def _go(self, _: object = None) -> None:
        steps = self._steps
        if steps is None:
            return
        try:
            waits_for = next(steps)
        except StopIteration:
            self._over()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - told, and over
            logger.debug("a wait ended: %r", error)
            self._over()
        else:
            # What asyncio's tasks say to a future that they have taken over from its awaiter.
            waits_for._asyncio_future_blocking = False  # noqa: SLF001 - no other word for it
            waits_for.add_done_callback(self._go)

    def _over(self) -> None:
        then, self._steps, self._then = self._then, None, _nothing
        then()


def _nothing() -> None:
    """Nobody is to be told."""


class Silence:
    """Calls ``then`` when nothing was `heard` for ``limit_s``, unless that is ``excused``; `stop` it in the end.

    A timer for each wait would cost more than most of what comes. Where the coordinator itself stood still, what came
    meanwhile has not been read when the timer goes off: so it looks a second time, a moment later.
    """

    def __init__(self, limit_s: float, then: Callable[[], None], excused: Callable[[], bool] | None = None) -> None:
        self.clock = asyncio.get_running_loop().time
        self.limit_s = limit_s
        self._then, self._excused = then, excused
        self.heard_at = self.clock()
        self._overdue = False
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._look_in(limit_s)

    def heard(self) -> None:
        """Something has come."""
        self.heard_at = self.clock()

    def expect(self, limit_s: float) -> None:
        """From now on wait for so long."""
        self.limit_s = limit_s
        self._look_in(limit_s)

    def stop(self) -> None:
        """Nobody is interested any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._then, self._excused = _nothing, None

    def _look_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_at = self.clock() + seconds
        self._timer = asyncio.get_running_loop().call_at(self._due_at, self._look)

    def _look(self) -> None:
        now = self.clock()
        if self._excused is not None and self._excused():
            self.heard_at = now
        left_s = self.limit_s - (now - self.heard_at)
        if left_s > 0:
            self._overdue = False
            self._look_in(max(left_s, LOOK_AGAIN_S))
        elif not self._overdue or now - self._due_at > LOOK_AGAIN_S:
            self._overdue = True
            self._look_in(LOOK_AGAIN_S)
        else:
            self._then()


async def within(seconds: float, awaitable: Awaitable[T]) -> T:
    """Return what ``awaitable`` gives, as under `asyncio.timeout`. Raises TimeoutError.

    Most receives and sends need not wait at all; then no timer is made, which would cost more than they do.
    """
    steps = awaitable.__await__()
    try:
        waits_for = next(steps)
    except StopIteration as done:
        value: T = done.value
        return value
    async with asyncio.timeout(seconds):
        return await go_on(steps, waits_for)


@types.coroutine
def go_on(steps: Generator[Any, Any, T], waits_for: object) -> Generator[Any, Any, T]:
    """Go on with what was begun, as ``yield from`` would have from its first step."""
    while True:
        try:
            sent = yield waits_for
        except GeneratorExit:
            # Whoever is thrown away is closed, which what it waited for may have been before it.
            steps.close()
            raise
        except BaseException as error:  # noqa: BLE001 - handed on to what waits, which decides
            go_on = functools.partial(steps.throw, error)
        else:
            go_on = functools.partial(steps.send, sent)
        try:
            waits_for = go_on()
        except StopIteration as done:
            value: T = done.value
            return value
