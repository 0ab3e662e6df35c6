"""One untrusted program under a deadline: a request in, one line of JSON out, bounded output, nothing left behind.

The program gets the request on stdin and answers on the pipe that is its stdout at the start; `rma_core.child` moves
that away before it runs anything of a plugin, so prints end on stderr, of which the last OUTPUT_BYTES are kept.
There is no limit on address space: NVML and CUDA map far more than they use, and such a limit would break just them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple, cast

from rma_core.platforms import child_environment, detached_popen_kwargs, kill_tree, neutral_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

logger = logging.getLogger(__name__)

#: What a program printed is kept up to here, its end rather than its beginning.
OUTPUT_BYTES = 4096
#: After a program has ended, what it wrote may take this long to arrive; a grandchild may hold the pipe for ever.
LAST_WORDS_S = 0.5
#: A killed program is waited for this long; one stuck in the kernel cannot be reaped, and is given up.
REAP_S = 5.0
#: What it left in its temporary folder is removed within this, or left to the system.
REMOVAL_S = 20.0
#: More than this in its temporary folder ends it; looked at so often.
MOST_SCRATCH_FILES, MOST_SCRATCH_BYTES, SCRATCH_LOOK_S = 5000, 64 * 1024 * 1024, 0.5


class Ended(NamedTuple):
    """How a run ended: ``answer`` is the line, or ``None``; ``code`` the exit code when it ended by itself.

    ``too_late`` and ``too_long`` say that it was killed for time or for the size of its answer; ``output`` is the end
    of what it printed.
    """

    answer: bytes | None
    code: int | None
    too_late: bool
    too_long: bool
    output: str
    seconds: float


async def run(
    arguments: Sequence[str],
    *,
    request: bytes,
    deadline_s: float,
    max_answer_bytes: int,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a program in a session of its own, with a minimal ``environment``, and kill all of it at the end.

    Raises OSError when it cannot be started. Cancelling kills it too.
    """
    started = time.perf_counter()
    loop = asyncio.get_running_loop()
    transport, talk = await loop.subprocess_exec(
        lambda: _Talk(loop, max_answer_bytes),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=neutral_folder(),
        env=child_environment(more=environment),
        **detached_popen_kwargs(),
    )
    try:
        stdin = cast("asyncio.WriteTransport", transport.get_pipe_transport(0))
        stdin.write(request)
        stdin.close()
        too_late = not await _finished(talk, deadline_s - (time.perf_counter() - started))
        code = transport.get_returncode()
        seconds = time.perf_counter() - started
    finally:
        await surely(_bury(transport, talk))
    answer = bytes(talk.line) if talk.answered.done() and not talk.too_long else None
    return Ended(answer, code, too_late, talk.too_long, talk.printed.decode(errors="replace"), seconds)


class Scratch:
    """A folder for one program's temporary files, which is removed with all that is in it."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    @contextlib.asynccontextmanager
    async def made(cls) -> AsyncIterator[Scratch]:
        """Make a new one. Raises OSError."""
        path = await asyncio.to_thread(tempfile.mkdtemp, prefix="rma-")
        try:
            yield cls(path)
        finally:
            await surely(asyncio.to_thread(_remove, path))

    async def full(self) -> None:
        """Return once there is too much in it."""
        while await asyncio.to_thread(_fits, self.path):  # noqa: ASYNC110 - a folder tells nobody
            await asyncio.sleep(SCRATCH_LOOK_S)


def _fits(folder: str) -> bool:
    """Whether a folder has few files and bytes; what cannot be looked at counts as nothing."""
    number = taken = 0
    try:
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                with contextlib.suppress(OSError):
                    taken += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - many of them
                number += 1
                if number > MOST_SCRATCH_FILES or taken > MOST_SCRATCH_BYTES:
                    return False
    except RecursionError:
        return False
    return True


def _remove(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106 - a name
        return
    # In programs of their own: a tree may be deeper than descriptors and Python's stack reach, and closed to its owner.
    steps = ([["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]]) if shutil.which("rm") else []
    for step in steps:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([*step, "--", folder], timeout=REMOVAL_S, check=False, stderr=subprocess.DEVNULL)
        if not os.path.lexists(folder):
            return
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        logger.warning("the temporary folder %s could not be removed", folder)


async def _finished(talk: _Talk, deadline_s: float) -> bool:
    """Wait until it has answered, or has ended or closed the pipe without; say whether that was in time."""
    first = {talk.answered, talk.closed, talk.exited}
    done, _ = await asyncio.wait(first, timeout=max(0.0, deadline_s), return_when=asyncio.FIRST_COMPLETED)
    if done and not talk.answered.done():
        rest = {talk.closed, talk.exited}
        await asyncio.wait(rest, timeout=LAST_WORDS_S)
    return bool(done)


async def surely(work: Coroutine[None, None, None]) -> None:
    """Wait for ``work``, which is bounded, to its end even when cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def _bury(transport: asyncio.SubprocessTransport, talk: _Talk) -> None:
    kill_tree(transport.get_pid())
    await asyncio.wait({talk.exited}, timeout=REAP_S)
    transport.close()
    await asyncio.wait({talk.gone}, timeout=LAST_WORDS_S)


class _Talk(asyncio.SubprocessProtocol):
    """Both pipes of one program, always read, so that it never waits for us."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_answer_bytes: int) -> None:
        self.max_answer_bytes = max_answer_bytes
        self.line, self.printed, self.too_long = bytearray(), bytearray(), False
        self.answered: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:  # noqa: PLR2004 - stderr
            self.printed += data
            del self.printed[:-OUTPUT_BYTES]
        elif not self.answered.done():
            self._take(data)

    def _take(self, data: bytes) -> None:
        line, newline, _ = data.partition(b"\n")
        self.line += line
        self.too_long = len(self.line) > self.max_answer_bytes
        if newline or self.too_long:
            self.answered.set_result(None)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        del exc
        if fd == 1:
            settle(self.closed)

    def process_exited(self) -> None:
        settle(self.exited)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        settle(self.gone)


def settle(future: asyncio.Future[None]) -> None:
    """Let nobody wait for it any more."""
    if not future.done():
        future.set_result(None)
