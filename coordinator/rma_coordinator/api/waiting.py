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
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def _go(self, _: object = None) -> None:
        steps = self._steps
        if steps is None:
            return
        try:
            waits_for = next(steps)
        except StopIteration:
            self._steps = None
            self._then()
        except Exception as error:  # noqa: BLE001 - told, and over
            self._steps = None
            logger.debug("a wait ended: %r", error)
            self._then()
        else:
            # What asyncio's tasks say to a future that they have taken over from its awaiter.
            waits_for._asyncio_future_blocking = False  # noqa: SLF001 - no other word for it
            waits_for.add_done_callback(self._go)


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
