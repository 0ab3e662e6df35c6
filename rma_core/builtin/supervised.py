"""The agent's side of `rma_core.supervise`: programs that end with the agent, whatever either does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from typing import TYPE_CHECKING

import msgspec
import psutil

from rma_core import bare, platforms, process_tree
from rma_core.errors import StartFailed
from rma_core.process_tree import Identity
from rma_core.supervise import KILL_S, Event, Order, State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

#: How long a supervisor may take to say that it started its program, or could not: it is a Python that has to load.
START_S = 30.0
#: How much longer than its grace and its killing a supervisor may take before it is killed itself.
MARGIN_S = 5.0
#: The file in a program's folder that says who looks after it.
STATE = "state.json"
#: The longest line a supervisor writes: one event.
EVENT_BYTES = 65_536


class Supervised:
    """One program under a supervisor, from `launch` until nothing of it is left (`gone`)."""

    def __init__(self, order: Order, process: asyncio.subprocess.Process, on_output: Callable[[str], None]) -> None:
        """Follow a supervisor that was just started; use `launch`."""
        self.order = order
        self.started: Event | None = None
        self.ended: Event | None = None
        self.gone = asyncio.Event()
        self._process = process
        self._on_output = on_output
        self._news = asyncio.Event()
        self._following = asyncio.create_task(self._follow(), name=f"follow {order.mark}")

    @property
    def ended_or_gone(self) -> bool:
        """Whether the program itself does not run any more."""
        return self.ended is not None or self.gone.is_set()

    @property
    def keeper(self) -> Identity:
        """The process below which the program and all it started are found, once it is started."""
        return Identity(self.started.keeper, self.started.keeper_created) if self.started else Identity(0, 0.0)

    async def _follow(self) -> None:
        """Take the supervisor's events until both of its processes are gone."""
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        try:
            async for line in self._process.stdout:
                self._take(msgspec.json.decode(line, type=Event))
            code = await self._process.wait()
            if self.ended is None:
                self.ended = Event(kind="ended", reason=f"its supervisor {platforms.exit_words(code)}")
                await asyncio.to_thread(end_marked, self.order.mark)
        except (msgspec.MsgspecError, ValueError):
            logger.exception("a supervisor does not speak its language; ending it")
            self._process.kill()
            await asyncio.to_thread(end_marked, self.order.mark)
        finally:
            self.gone.set()
            self._news.set()

    def _take(self, event: Event) -> None:
        if event.kind == "started":
            self.started = event
        elif event.kind == "output":
            self._on_output(event.text)
        elif self.ended is None:
            self.ended = event
        self._news.set()

    async def wait_started(self) -> None:
        """Return once the program runs. Raises StartFailed when it cannot be started."""
        try:
            async with asyncio.timeout(START_S):
                while self.started is None and not self.ended_or_gone:
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError:
            await self.stop(grace_s=0)
            message = f"its supervisor did not start it within {START_S:.0f} s; the machine may be overloaded"
            raise StartFailed(message) from None
        if self.started is None:
            raise StartFailed(self.ended.reason if self.ended else "its supervisor said nothing")

    async def stop(self, *, grace_s: float) -> None:
        """End the program and all it started, and return when nothing is left."""
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(f"stop {grace_s}\n".encode())
        try:
            async with asyncio.timeout(grace_s + KILL_S + MARGIN_S):
                await self.gone.wait()
        except TimeoutError:
            logger.warning("a supervisor does not end (%s); killing it", self.order.mark)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await asyncio.to_thread(end_marked, self.order.mark)
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.close()


async def launch(order: Order, *, errors: Path, on_output: Callable[[str], None] = lambda _: None) -> Supervised:
    """Start ``order`` under a supervisor of its own, whose own complaints go to the file ``errors``.

    Raises StartFailed.
    """
    with errors.open("ab") as complaints:
        process = await asyncio.create_subprocess_exec(
            *bare.module("rma_core.supervise"),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=complaints,
            limit=EVENT_BYTES, **platforms.detached_popen_kwargs(),
        )  # fmt: skip
    supervised = Supervised(order, process, on_output)
    try:
        assert process.stdin is not None  # noqa: S101 - it was asked for
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        await supervised.wait_started()
    except asyncio.CancelledError:
        await asyncio.shield(supervised.stop(grace_s=0))
        raise
    return supervised


def claim(folder: Path) -> None:
    """Make the private folder of one program, which a `sweep` leaves alone while this process lives. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True)
    us = process_tree.identity(psutil.Process())
    (folder / STATE).write_bytes(msgspec.json.encode(State(mark=str(folder), supervisors=(us,), program=(0, 0.0))))


def end_marked(prefix: str) -> None:
    """Kill what carries a mark that begins with ``prefix``: what a dead supervisor could not."""
    process_tree.kill_until_gone(lambda: [p for p, _ in process_tree.marked(prefix)], within_s=KILL_S)


def sweep(folder: Path, *, keep: frozenset[str]) -> int:
    """End what earlier agents left under ``folder`` (one folder a program) and return how many programs that were.

    What a living supervisor looks after is left to it, and so are the folders named in ``keep``.
    """
    swept = 0
    for run in folder.iterdir() if folder.is_dir() else ():
        state = _read_state(run / STATE)
        supervisors = state.supervisors if state else ()
        if run.name in keep or any(process_tree.living(Identity(*known)) for known in supervisors):
            continue
        if state is not None:
            _end_program(Identity(*state.program))
        end_marked(str(run))
        shutil.rmtree(run, ignore_errors=True)
        swept += 1
    return swept


def _end_program(known: Identity) -> None:
    def find() -> list[psutil.Process]:
        program = process_tree.living(known)
        return [] if program is None else [*process_tree.descendants(program), program]

    process_tree.kill_until_gone(find, within_s=KILL_S)


def _read_state(path: Path) -> State | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError):
        return None
