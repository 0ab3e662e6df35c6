"""A disk that can be pulled: an SQLite VFS that knows what was synced, fails when told, and forgets the rest.

Everything passes through to real files, as through a page cache. ``cut_power`` leaves of each file what was synced and
a random part of what was not, torn at 512 bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import apsw

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

SECTOR = 512


class Write(NamedTuple):
    """Bytes at an offset; ``data`` None: the file was cut there."""

    offset: int
    data: bytes | None

    def onto(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
            return
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data

    def sectors(self) -> Iterator[Write]:
        if self.data is None:
            yield self
            return
        start = self.offset
        while start < self.offset + len(self.data):
            end = min((start // SECTOR + 1) * SECTOR, self.offset + len(self.data))
            yield Write(start, self.data[start - self.offset : end - self.offset])
            start = end


class Content:
    """What one file has on disk for sure, and what is on its way there."""

    def __init__(self, path: str) -> None:
        self.inode = os.stat(path).st_ino  # noqa: PTH116 - SQLite names files by text
        with open(path, "rb") as file:  # noqa: PTH123 - the same
            self.synced = bytearray(file.read())
        self.pending: list[Write] = []

    def sync(self) -> None:
        for write in self.pending:
            write.onto(self.synced)
        self.pending.clear()


class FaultyDisk(apsw.VFS):
    """A disk with a name of its own, which fails to order.

    ``fail[operation]`` is raised (a code of SQLite) at the next such call, ``failing[operation]`` at every one; an
    operation is ``sync`` or, for one kind of file, ``sync log``. ``hold`` keeps calls waiting while it is not set.

    ``operations`` counts down with every write and sync; at zero the power goes. ``lose_on_failed_sync``: a failed sync
    takes everything unsynced for written, as Linux does: it stays visible and never reaches the disk.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: dict[str, Content] = {}
        self.operations: int | None = None
        self.dead = False
        self.fail: dict[str, int] = {}
        self.failing: dict[str, int] = {}
        self.lose_on_failed_sync = True
        self.hold = threading.Event()
        self.hold.set()
        super().__init__(name, "")

    def excepthook(self, *_: Any) -> bool:
        """Failures are the purpose; SQLite is told of them, and nobody else."""
        return True

    def xOpen(self, name: Any, flags: list[int]) -> FaultyFile:  # noqa: N802 - the name SQLite gives it
        self.check("open")
        return FaultyFile(self, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802 - the name SQLite gives it
        self.check("delete")
        self.files.pop(name, None)
        super().xDelete(name, sync)

    def content(self, path: str) -> Content:
        """Return what is known of a file; a new file in its place is a new disk's worth."""
        known = self.files.get(path)
        if known is None or known.inode != os.stat(path).st_ino:  # noqa: PTH116 - SQLite names files by text
            known = self.files[path] = Content(path)
        return known

    def check(self, operation: str, path: str | None = None) -> None:
        """Raise what was ordered; SQLite gets it as the code of a failed call."""
        self.hold.wait(60)
        if self.operations is not None and operation in {"write", "sync"}:
            self.operations -= 1
            self.dead = self.dead or self.operations < 0
        if self.dead:
            raise apsw.exception_for(apsw.SQLITE_IOERR)
        for order in (operation, f"{operation} {'log' if path and path.endswith('-wal') else 'file'}"):
            code = self.fail.pop(order, None) or self.failing.get(order)
            if code is not None:
                raise apsw.exception_for(code)

    def cut_power(self, random: random.Random) -> None:
        """Leave on the real disk what a machine without power would find."""
        for path, file in self.files.items():
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino != file.inode:  # noqa: PTH116 - SQLite names files by text
                    continue
            content, share = bytearray(file.synced), random.random()
            for write in file.pending:
                for sector in write.sectors():
                    if random.random() < share:
                        sector.onto(content)
            with open(path, "wb") as real:  # noqa: PTH123 - the same
                real.write(content)


class FaultyFile(apsw.VFSFile):
    """One open file of a FaultyDisk."""

    def __init__(self, disk: FaultyDisk, name: Any, flags: list[int]) -> None:
        self.disk = disk
        super().__init__("", name, flags)
        self.path = name if isinstance(name, str) or name is None else name.filename()
        if self.path is not None:
            disk.content(self.path)

    def excepthook(self, *_: Any) -> bool:
        """As above."""
        return True

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802 - the name SQLite gives it
        self.disk.check("read", self.path)
        data: bytes = super().xRead(amount, offset)
        return data

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - the name SQLite gives it
        self.disk.check("write", self.path)
        super().xWrite(data, offset)
        self._note(Write(offset, bytes(data)))

    def xTruncate(self, size: int) -> None:  # noqa: N802 - the name SQLite gives it
        self.disk.check("truncate", self.path)
        super().xTruncate(size)
        self._note(Write(size, None))

    def xSync(self, flags: int) -> None:  # noqa: N802 - the name SQLite gives it
        try:
            self.disk.check("sync", self.path)
        except apsw.Error:
            if self.path is not None and self.disk.lose_on_failed_sync and not self.disk.dead:
                self.disk.content(self.path).pending.clear()
            raise
        super().xSync(flags)
        if self.path is not None:
            self.disk.content(self.path).sync()

    def _note(self, write: Write) -> None:
        if self.path is not None:
            self.disk.content(self.path).pending.append(write)
