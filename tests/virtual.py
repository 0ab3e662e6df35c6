"""An event loop on virtual time, whose inhabitants can be frozen, and killed without any goodbye.

Time jumps to the next timer, so hours pass in seconds and nothing depends on the machine. Whatever runs does so in a
``LIFE``, which its tasks and timers inherit: a process that can be killed on its own. Life 0 is the world outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

LIFE: contextvars.ContextVar[int] = contextvars.ContextVar("LIFE", default=0)


class Stuck(Exception):
    """Nothing can ever happen any more."""


class _Jump(selectors.SelectSelector):
    """Waits no time at all; the loop's clock jumps instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck
        self.now += max(0.0, timeout)
        return []


class PromptLoop(asyncio.SelectorEventLoop):
    """A loop on which whatever would run in a thread of its pool runs at once."""

    def run_in_executor(  # type: ignore[override] # any function
        self,
        executor: Any,
        func: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """Run a function at once."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            done.set_exception(error)
        return done


class VirtualLoop(PromptLoop):
    """The loop on virtual time."""

    _ready: Any
    _scheduled: list[Any]

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self._dead: set[int] = set()
        self._frozen: dict[int, list[Any]] = {}
        self._tasks: dict[int, list[asyncio.Task[Any]]] = {}
        self._lives = 0

    def time(self) -> float:
        """Return virtual seconds."""
        return self._jump.now

    # -- lives -------------------------------------------------------------------------------------------------

    def new_life(self) -> contextvars.Context:
        """Return the context of a new process."""
        self._lives += 1
        context = contextvars.Context()
        context.run(LIFE.set, self._lives)
        return context

    def spawn(self, life: contextvars.Context, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a coroutine in a process; each gets a copy of its context."""
        return self.create_task(work, name=name, context=life.copy())

    def run(self, life: contextvars.Context, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a coroutine in a process, whatever becomes of it."""
        self.spawn(life, work, name).add_done_callback(lambda task: task.cancelled() or task.result())

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        """Make a task, and remember whose it is."""
        task: asyncio.Task[Any] = super().create_task(coro, name=name, context=context)
        life = (context or contextvars.copy_context()).get(LIFE, 0)
        if life:
            mine = self._tasks.setdefault(life, [])
            mine.append(task)
            if len(mine) % 512 == 0:
                mine[:] = [one for one in mine if not one.done()]
        return task

    def kill(self, life: contextvars.Context) -> None:
        """Let nothing of a process ever run again: no handler, no finally, no goodbye."""
        number = life[LIFE]
        self._dead.add(number)
        self._frozen.pop(number, None)
        for handle in [*self._ready, *self._scheduled]:
            if handle._context.get(LIFE, 0) == number:
                handle.cancel()

    def freeze(self, life: contextvars.Context) -> None:
        """Stop a process where it is."""
        number = life[LIFE]
        held = self._frozen.setdefault(number, [])
        mine = [handle for handle in [*self._ready, *self._scheduled] if handle._context.get(LIFE, 0) == number]
        held += mine
        known = set(map(id, mine))
        ready = [handle for handle in self._ready if id(handle) not in known]
        self._ready.clear()
        self._ready.extend(ready)
        self._scheduled[:] = [handle for handle in self._scheduled if id(handle) not in known]
        heapq.heapify(self._scheduled)

    def thaw(self, life: contextvars.Context) -> None:
        """Let a process go on; its timers that ran out meanwhile are due."""
        for handle in self._frozen.pop(life[LIFE], []):
            if handle._cancelled:
                continue
            if isinstance(handle, asyncio.TimerHandle):
                heapq.heappush(self._scheduled, handle)
            else:
                self._ready.append(handle)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override] # any callback
        """Run soon, unless its process is dead or frozen."""
        handle = super().call_soon(callback, *args, context=context)
        if self._dead or self._frozen:
            self._sort_out(handle, self._ready)
        return handle

    def call_at(  # type: ignore[override] # any callback
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """Run at a time, unless its process is dead or frozen."""
        handle = super().call_at(when, callback, *args, context=context)
        if self._dead or self._frozen:
            self._sort_out(handle, self._scheduled)
        return handle

    def _sort_out(self, handle: Any, where: Any) -> None:
        life = handle._context.get(LIFE, 0)
        if life in self._dead:
            handle.cancel()
        elif life in self._frozen:
            # By identity: timers that are due at the same time are equal.
            del where[next(index for index in reversed(range(len(where))) if where[index] is handle)]
            if where is self._scheduled:
                heapq.heapify(where)
            self._frozen[life].append(handle)

    # -- the end -----------------------------------------------------------------------------------------------

    def bury(self) -> None:
        """Close the loop and what the dead left standing, which must not be taken for a leak."""
        self._frozen.clear()
        left = [task for tasks in self._tasks.values() for task in tasks if not task.done()]
        left += [task for task in asyncio.all_tasks(self) if task not in left]
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.close()
        for task in left:
            coroutine: Any = task.get_coro()
            for _ in range(20):
                try:
                    coroutine.close()
                except BaseException:  # noqa: BLE001 - a finally that awaits cannot: it is tried again until it has ended
                    continue
                break


def run_virtual(work: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a simulation to its end on a loop of its own."""
    loop = VirtualLoop()
    try:
        # Nothing in here asks for the current loop of the thread; what does finds the running one.
        return loop.run_until_complete(work(loop))
    finally:
        with contextlib.suppress(RuntimeError):
            loop.bury()
