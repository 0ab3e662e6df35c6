"""The processes that read documents: a fresh one for each, started ahead, a few at once, each under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_service.child import Head, Job
from rma_service.problems import Busy, CorruptDocument, TooComplex

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

logger = logging.getLogger(__name__)

#: An answer is at most this long; the text in it is cut far below.
MAX_ANSWER_BYTES = 96 * 1024 * 1024
#: Requests that wait for a slot with their body on disk; more wait with it still on the client's side.
WAITING_PER_SLOT = 1
#: And so many at most, for so many seconds.
MAX_QUEUE, QUEUE_S = 64, 30.0
_MAX_HEAD_BYTES = 4096
#: A process that has been told to end gets so long to be gone.
_REAP_S = 5.0
#: And one that has answered gets so long to end by itself.
_EXIT_S = 1.0
_CRASHES = frozenset(
    getattr(signal, name, 0) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS")
)


class Answer(NamedTuple):
    """An answer as it goes to the client."""

    status: int
    content_type: str
    body: bytes


class Processes:
    """Bounds how many documents are held and read at once, and keeps spare processes ready."""

    def __init__(
        self, child: str, *, slots: int, deadline_s: float, memory_bytes: int, threads: int = 1,
        queue_s: float = QUEUE_S,
    ) -> None:  # fmt: skip
        """Take the module that is the process (`rma_service.child`), and the limits; starts nothing yet.

        ``deadline_s`` is what a document may take, on ``threads`` processors; ``memory_bytes`` the address space of a
        process.
        """
        self.slots = slots
        self._child = child
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._threads = threads
        self._queue_s = queue_s
        self._admitted = asyncio.Semaphore(slots * (1 + WAITING_PER_SLOT))
        self._running = asyncio.Semaphore(slots)
        self._spare: list[asyncio.subprocess.Process] = []
        self._queued = self.busy = 0

    async def start(self) -> None:
        """Start a spare process for each slot."""
        while len(self._spare) < self.slots:
            self._spare.append(await _spawn(self._child, self._threads))

    async def aclose(self) -> None:
        """End the spare processes; those at work end with their requests."""
        while self._spare:
            await _end(self._spare.pop())

    @contextlib.asynccontextmanager
    async def admission(self) -> AsyncIterator[None]:
        """Wait for room for one more document; raises Busy where too many wait, or it takes too long."""
        if self._admitted.locked() and self._queued >= MAX_QUEUE:
            raise Busy(f"{self._queued} documents wait already; try again in a moment")
        self._queued += 1
        try:
            async with asyncio.timeout(self._queue_s):
                await self._admitted.acquire()
        except TimeoutError:
            raise Busy(f"no slot was free within {self._queue_s:g} s; try again in a moment") from None
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            self._admitted.release()

    async def read(self, body: Path, *, content_type: str, query: str) -> Answer:
        """Return what a process of its own answers about the request whose body is in ``body``.

        Raises TooComplex, CorruptDocument, Busy. Cancelled, it ends the process.
        """
        job = Job(
            body=str(body), content_type=content_type, query=query,
            cpu_s=int(self._deadline_s * self._threads) + 1, memory_bytes=self._memory_bytes,
        )  # fmt: skip
        async with self._running:
            process = await self._take()
            self.busy += 1
            answer = None
            try:
                answer = await self._answer(process, job)
                return answer
            finally:
                self.busy -= 1
                await _end(process, answered=answer is not None)
                await self._refill()

    async def _take(self) -> asyncio.subprocess.Process:
        while self._spare:
            process = self._spare.pop()
            if process.returncode is None:
                return process
        try:
            return await _spawn(self._child, self._threads)
        except OSError as error:
            raise Busy(f"no process could be started ({error}); try again in a moment") from error

    async def _refill(self) -> None:
        with contextlib.suppress(OSError):
            if len(self._spare) < self.slots:
                self._spare.append(await _spawn(self._child, self._threads))

    async def _answer(self, process: asyncio.subprocess.Process, job: Job) -> Answer:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await _exchange(process, job)
        except TimeoutError:
            raise TooComplex(f"the document was not read within {self._deadline_s:g} s") from None
        except (EOFError, OSError, ValueError, msgspec.DecodeError):
            raise await self._death(process) from None

    async def _death(self, process: asyncio.subprocess.Process) -> Exception:
        """Return the problem that tells how the process ended without an answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_S):
                await process.wait()
        code = process.returncode
        logger.info("a parser ended without an answer: %s", code)
        if code is not None and -code in _CRASHES:
            return CorruptDocument("the parser crashed on this document: it is damaged, or takes too much memory")
        if code == -getattr(signal, "SIGALRM", 0):
            return TooComplex("a part of the document (one page) took longer than one may take here")
        if code == -getattr(signal, "SIGXCPU", 0):
            return TooComplex(f"the document was not read within {self._deadline_s:g} s of processor time")
        return TooComplex("the parser was ended while it read this document, most likely because memory ran out")


async def _spawn(child: str, threads: int) -> asyncio.subprocess.Process:
    # Names that OpenMP gave them, and that numeric libraries honour as well.
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"), str(threads))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-m", child, env={**os.environ, **limits},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20,
    )  # fmt: skip


async def _exchange(process: asyncio.subprocess.Process, job: Job) -> Answer:
    if process.stdin is None or process.stdout is None:
        raise EOFError
    process.stdin.write(msgspec.json.encode(job) + b"\n")
    await process.stdin.drain()
    line = await process.stdout.readline()
    if not line or len(line) > _MAX_HEAD_BYTES:
        raise EOFError
    head = msgspec.json.decode(line, type=Head)
    if not 0 <= head.length <= MAX_ANSWER_BYTES:
        raise TooComplex("the answer would be too long: ask for fewer parts with `include`")
    return Answer(head.status, head.content_type, await process.stdout.readexactly(head.length))


async def _end(process: asyncio.subprocess.Process, *, answered: bool = False) -> None:
    """Kill the process if it lives, and wait until it is gone."""
    # One that has answered is ending by itself; to signal it just then would take its exit status from asyncio.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_EXIT_S if answered else 0):
            await asyncio.shield(process.wait())
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REAP_S):
            await asyncio.shield(process.wait())
    # The transport is only closed by the collector otherwise, which warns about it.
    transport = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
