"""`within` waits as `asyncio.timeout` does, and makes no timer for what need not wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.api.waiting import go_on, within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Waiter = Callable[[float, Awaitable[int]], Awaitable[int]]

#: Longer than any test.
LONG_S = 60.0


async def plainly(seconds: float, awaitable: Awaitable[int]) -> int:
    """What `within` must be like."""
    async with asyncio.timeout(seconds):
        return await awaitable


def turn_ahead() -> None:
    """Let LONG_S pass for the running loop, whatever the machine is busy with."""
    loop = asyncio.get_running_loop()
    later = loop.time() + 2 * LONG_S
    loop.time = lambda: later  # type: ignore[method-assign]  # it has no setting for this


async def steps(kinds: tuple[str, ...], seen: list[str], *, late: bool = True) -> int:
    """Wait in several ways, and note what comes of it; a wait that hangs lasts until it is ``late``."""
    value = 0
    for kind in kinds:
        try:
            if kind == "fail":
                raise ValueError(kind)
            if kind == "hang" and not seen:
                if late:
                    # Not at once: the time begins with the first wait.
                    asyncio.get_running_loop().call_soon(turn_ahead)
                await asyncio.Event().wait()
            elif kind == "task":
                value += await asyncio.create_task(asyncio.sleep(0, 1))
            elif kind == "yield":
                await asyncio.sleep(0)
            value += 1
        except asyncio.CancelledError:
            seen.append(f"cancelled in {kind}")
            if "deaf" not in kinds:
                raise
    seen.append("done")
    return value


def outcome(wait: Waiter, kinds: tuple[str, ...], *, cancel: bool) -> tuple[object, list[str]]:
    """Return what a waiter gave or raised, and what the awaited one saw."""
    seen: list[str] = []

    async def main() -> object:
        task = asyncio.ensure_future(wait(LONG_S, steps(kinds, seen, late=not cancel)))
        if cancel:
            for _ in range(20):
                await asyncio.sleep(0)
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        return type(result) if isinstance(result, BaseException) else result

    return asyncio.run(main()), seen


@given(
    kinds=st.lists(st.sampled_from(("go", "yield", "task", "hang", "fail", "deaf")), max_size=4).map(tuple),
    cancel=st.booleans(),
)
def test_whatever_is_awaited_comes_out_as_under_asyncio_timeout(kinds: tuple[str, ...], cancel: bool) -> None:
    assert outcome(within, kinds, cancel=cancel) == outcome(plainly, kinds, cancel=cancel)


async def test_what_need_not_wait_gets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_timer(_: float) -> None:
        pytest.fail("a timer was made")

    monkeypatch.setattr(asyncio, "timeout", no_timer)
    assert await within(LONG_S, steps(("go", "go"), [])) == 2
    with pytest.raises(ValueError, match="fail"):
        await within(LONG_S, steps(("fail",), []))


async def test_what_hangs_is_cancelled_where_it_waits() -> None:
    seen: list[str] = []
    with pytest.raises(TimeoutError):
        await within(LONG_S, steps(("yield", "hang"), seen))
    assert seen == ["cancelled in hang"]
    # The one who waited was not cancelled by that, and may wait again.
    assert await within(LONG_S, steps(("yield",), [])) == 1


async def test_a_cancellation_from_outside_is_no_timeout() -> None:
    seen: list[str] = []
    waiting = asyncio.ensure_future(within(LONG_S, steps(("hang",), seen, late=False)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert seen == ["cancelled in hang"]


async def test_a_future_can_be_waited_for() -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    assert await within(LONG_S, future) == 7


def test_who_is_thrown_away_after_what_it_waited_for_ends_quietly() -> None:
    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        waited = hang()
        began = waited.__await__()
        waits = go_on(began, next(began))
        next(waits)
        # What a collector of garbage does when nobody holds either of them.
        waited.close()
        waits.close()

    asyncio.run(main())
