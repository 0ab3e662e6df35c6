"""What waits on its way: request bodies and whole answers, small in memory, large on disk, bounded together."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
import threading
from typing import IO, TYPE_CHECKING, Any

from rma_core.errors import NotFound, OutOfSpace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine
    from pathlib import Path

logger = logging.getLogger(__name__)

#: Pieces in which what was stored is read again.
PIECE_BYTES = 64 * 1024
#: Large bodies that are whole in memory at once, because somebody has to read them.
WHOLE_AT_ONCE = 4


class Spools:
    """Makes `Body` objects in one folder and counts what they hold, in memory and on disk.

    ``memory_bytes`` is what one of them may keep in memory, ``total_memory_bytes`` what all of them may,
    ``disk_bytes`` what may wait on disk.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, total_memory_bytes: int, disk_bytes: int) -> None:
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.total_memory_bytes = total_memory_bytes
        self.disk_bytes = disk_bytes
        self.memory_used = 0
        self.disk_used = 0
        #: Taken by whoever has a large body whole in memory.
        self.whole = asyncio.Semaphore(WHOLE_AT_ONCE)
        self._closing: set[asyncio.Task[None]] = set()

    def make(self, name: str = "", *, memory_bytes: int | None = None) -> Body:
        """Return an empty body. With a ``name`` its file outlives the process, once `Body.sync` has returned."""
        limit = self.memory_bytes if memory_bytes is None else min(memory_bytes, self.memory_bytes)
        return Body(self, name=name, memory_bytes=limit)

    def open(self, name: str) -> Body:
        """Return a named body that was synced before. Raises NotFound."""
        body = Body(self, name=name, memory_bytes=0)
        try:
            body.reopen()
        except OSError as error:
            raise NotFound(f"what was kept as {name} cannot be read: {error.strerror}") from error
        return body

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Have some work done that nobody waits for."""
        task = asyncio.create_task(work, name="a body is closed")
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("what was put aside could not be closed: %s", error, extra={"action": "spool_close"})

    def sweep(self, keep: Collection[str]) -> int:
        """Remove named files that nobody knows any more; return how many."""
        gone = [path for path in self.folder.glob("*") if path.is_file() and path.name not in keep]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)


class Body:
    """Bytes that are written once and read from the start, by several readers one after the other or at once."""

    def __init__(self, spools: Spools, *, name: str, memory_bytes: int) -> None:
        self.size = 0
        self.name = name
        self._spools = spools
        self._memory_bytes = memory_bytes
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._closed = False
        #: What the spools count for it.
        self._in_memory = self._on_disk = 0
        # One file position for all readers, each of which reads in a thread.
        self._lock = threading.Lock()

    @property
    def on_disk(self) -> bool:
        """Whether it is in a file."""
        return self._file is not None

    async def write(self, data: bytes, *, counted: bool = True) -> None:
        """Add a piece; moves to disk once it is large. Raises OutOfSpace, by ``counted`` also for what all may take."""
        if self.hold(data):
            return
        added = len(data) + self._in_memory
        if counted and self._spools.disk_used + added > self._spools.disk_bytes:
            raise OutOfSpace(
                f"requests and answers that wait may take {self._spools.disk_bytes} bytes on disk, and do",
                hints=("try again later",),
            )
        self.size += len(data)
        self._count(memory=-self._in_memory, disk=added)
        await self._try(self._spill, data)

    def hold(self, data: bytes) -> bool:
        """Add a piece where that needs no disk, and say whether it is done."""
        spools, size = self._spools, len(data)
        if self._file is not None or self.size + size > self._memory_bytes:
            return False
        if spools.memory_used + size > spools.total_memory_bytes:
            return False
        self.size += size
        self._in_memory += size
        spools.memory_used += size
        self._memory += data
        return True

    def _count(self, *, memory: int = 0, disk: int = 0) -> None:
        self._in_memory += memory
        self._on_disk += disk
        self._spools.memory_used += memory
        self._spools.disk_used += disk

    async def _try(self, call: Callable[..., None], *arguments: bytes) -> None:
        try:
            await asyncio.to_thread(call, *arguments)
        except OSError as error:
            reason = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be used: {error.strerror}"
            raise OutOfSpace(
                f"the disk for request bodies {reason}", hints=("send a smaller body, or try again later",)
            ) from error

    def _spill(self, data: bytes) -> None:
        with self._lock:
            if self._file is None:
                self._file = self._make_file()
                self._file.write(self._memory)
                self._memory = bytearray()
            self._file.write(data)
            # What cannot be written must be known now, not when it is read or closed.
            self._file.flush()

    def _make_file(self) -> IO[bytes]:
        self._spools.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.name:
            return open(self._spools.folder / self.name, "w+b", opener=_private)
        # No name: the file is gone with the process, whatever ends it.
        return tempfile.TemporaryFile(dir=self._spools.folder)

    def reopen(self) -> None:
        """Take up the file that has this body's name. Raises OSError."""
        self._file = (self._spools.folder / self.name).open("rb")
        self.size = os.fstat(self._file.fileno()).st_size
        self._count(disk=self.size)

    async def sync(self) -> None:
        """Return once a named body's file, and its name, are on disk; nothing to do in memory. Raises OutOfSpace."""
        if self._file is not None and self.name:
            await self._try(self._sync)

    def _sync(self) -> None:
        with self._lock:
            if self._file is None:
                return
            os.fsync(self._file.fileno())
        if os.name == "posix":
            folder = os.open(self._spools.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def small(self) -> bytes | None:
        """Return all of it when it is in memory."""
        return bytes(self._memory) if self._file is None else None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield it from its start.

        Raises NotFound when it is closed before its end: nobody wants the task done any more.
        """
        position = 0
        while position < self.size:
            piece = self._cut(position) if self._file is None else await asyncio.to_thread(self._read, position)
            if self._closed or not piece:
                raise NotFound("the task has ended, and its body is gone")
            position += len(piece)
            yield piece

    def _cut(self, position: int) -> bytes:
        return bytes(self._memory[position : position + PIECE_BYTES])

    def _read(self, position: int) -> bytes:
        with self._lock:
            if self._file is None or self._closed:
                return b""
            self._file.seek(position)
            return self._file.read(PIECE_BYTES)

    async def close(self, *, keep: bool = False) -> None:
        """Let go of the memory or the file; ``keep`` leaves a named file where it is."""
        if not self._release():
            await asyncio.to_thread(self._close, keep=keep)

    def drop(self) -> None:
        """Let go of the memory now and of the file soon, for whoever cannot wait."""
        if not self._release():
            self._spools.later(asyncio.to_thread(self._close, keep=False))

    def _release(self) -> bool:
        """Let go of the memory, and say whether that was all: else the file is still to be closed."""
        if self._closed:
            return True
        self._closed = True
        self._count(memory=-self._in_memory, disk=-self._on_disk)
        self._memory = bytearray()
        return self._file is None

    def _close(self, *, keep: bool) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
        if self.name and not keep:
            with contextlib.suppress(OSError):
                (self._spools.folder / self.name).unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
