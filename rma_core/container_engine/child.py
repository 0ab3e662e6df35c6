"""An engine's service as a child of the agent: started when needed, again when it ended, and never left behind.

On Linux the kernel ends it with the agent, however that ends (``PR_SET_PDEATHSIG``). `rma_core.supervise` is not for
this: it ends everything its program started, and containers are to go on while the agent is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rma_core.backoff import Backoff
from rma_core.container_engine.connection import NotInstalled
from rma_core.container_engine.sayings import last_words
from rma_core.errors import RuntimeAbsent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)

#: Seconds until a started service must listen; a third of one is usual.
START_S = 30.0
#: Seconds between two looks at one that is starting or ending.
LOOK_S = 0.02
#: Seconds a service gets to end before it is killed.
STOP_S = 10.0
#: Seconds before a service that ended is started again: none the first time, then from the first of these to the last.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
#: Bytes of what a service says that are kept.
LOG_BYTES = 1024**2
#: Bytes of it that its last words are taken from.
LAST_BYTES = 4096
#: The longest name of a socket, by the kernel.
SOCKET_BYTES = 107
SOCKET, LOG = "engine.sock", "engine.log"
#: Becomes the service, after asking the kernel to end it with its parent (PR_SET_PDEATHSIG, SIGTERM).
END_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildEngine:
    """One service that listens on a Unix socket in a folder that only this user can enter (Linux)."""

    def __init__(
        self, title: str, command: Callable[[str], Sequence[str]], *, folder: Path | None, env: Mapping[str, str]
    ) -> None:
        """Start nothing yet.

        ``command`` is given the socket's address and returns a program by its path with its arguments; it may take
        its time, and raise RuntimeAbsent. Without a ``folder``, or where that is too long for a socket or its parent is
        not there, the socket gets a folder of its own.
        """
        self._title, self._command, self._env = title, command, env
        self._wanted = folder
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._busy = asyncio.Lock()
        self._last = ""
        self._backoff, self._had_trouble = Backoff(base_s=FIRST_PAUSE_S, cap_s=LONGEST_PAUSE_S), False
        self._began, self._not_before = 0.0, 0.0

    @property
    def pid(self) -> int | None:
        """Its process while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def host(self) -> str:
        """Return where it listens, after starting it where it does not run. Raises RuntimeAbsent."""
        async with self._busy:
            if self.pid is None:
                await self._start()
            return self._address

    async def close(self) -> None:
        """End it, and take its socket away; its containers go on."""
        async with self._busy:
            await asyncio.to_thread(self._end)
            folder, self._folder = self._folder, None
            if folder is not None:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    @property
    def _place(self) -> Path:
        if self._folder is None:
            raise RuntimeAbsent(f"{self._title}'s service has no folder yet")
        return self._folder

    @property
    def _address(self) -> str:
        return f"unix://{self._place / SOCKET}"

    async def _start(self) -> None:
        self._wait_its_turn()
        try:
            await asyncio.to_thread(self._make_folder)
            command = await asyncio.to_thread(self._command, self._address)
            # In this thread: the kernel takes the end of the thread that started it for the end of its parent.
            self._spawn(command)
            await self._listening()
        except BaseException as error:
            await asyncio.to_thread(self._end)
            if isinstance(error, NotInstalled):
                # What is not there is no trouble, and looking for it costs nothing.
                raise
            self._last = error.message if isinstance(error, RuntimeAbsent) else f"{self._title}'s service: {error}"
            self._hold_off()
            if isinstance(error, OSError):
                raise RuntimeAbsent(self._last) from error
            raise
        self._began = time.monotonic()

    def _wait_its_turn(self) -> None:
        """Take note of one that ended, and refuse a start that comes too soon. Raises RuntimeAbsent."""
        if self._process is not None:
            self._last = f"{self._title}'s service ended ({self._said() or f'exit code {self._process.returncode}'})"
            self._process = None
            logger.debug("%s", self._last, extra={"action": "runtime"})
            if time.monotonic() - self._began >= LONGEST_PAUSE_S:
                self._backoff.reset()
                self._had_trouble = False
            self._hold_off()
        if (left_s := self._not_before - time.monotonic()) > 0:
            raise RuntimeAbsent(f"{self._last}; it is started again in {math.ceil(left_s)} s")

    def _hold_off(self) -> None:
        """Let the next start wait, each time longer; the first one not at all."""
        self._not_before = time.monotonic() + (self._backoff.next_s() if self._had_trouble else 0.0)
        self._had_trouble = True

    def _make_folder(self) -> None:
        """Make the folder, and take away what a killed agent's service left beside it. Raises OSError."""
        if self._folder is None:
            prefix = f"{os.getpid()}-"
            if self._wanted is None or not _fits(self._wanted / f"{prefix}12345678" / SOCKET):
                place = self._env.get("XDG_RUNTIME_DIR") or None
                self._folder = Path(tempfile.mkdtemp(prefix=f"rma-{prefix}", dir=place))
            else:
                self._wanted.mkdir(mode=0o700, exist_ok=True)
                _sweep(self._wanted)
                self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._wanted))
        (self._folder / SOCKET).unlink(missing_ok=True)

    def _spawn(self, command: Sequence[str]) -> None:
        guard = [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid())]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        log = os.open(self._place / LOG, flags, 0o600)
        try:
            self._process = subprocess.Popen(
                [*guard, *command],
                env=self._env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the whole terminal; the agent needs it while it stops.
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _listening(self) -> None:
        """Wait until it takes connections. Raises RuntimeAbsent."""
        deadline = time.monotonic() + START_S
        while not _takes_calls(self._place / SOCKET):
            if self.pid is None:
                raise RuntimeAbsent(f"{self._title}'s service does not start: {self._said() or 'it says nothing'}")
            if time.monotonic() > deadline:
                raise RuntimeAbsent(f"{self._title}'s service did not listen within {START_S:.0f} s")
            await asyncio.sleep(LOOK_S)
        (self._place / SOCKET).chmod(0o600)

    def keep_log_small(self) -> None:
        """Begin its log anew when it is too large; it is written at its end, wherever that is."""
        with contextlib.suppress(OSError, RuntimeAbsent):
            log = self._place / LOG
            if log.stat().st_size > LOG_BYTES:
                os.truncate(log, 0)

    def _said(self) -> str:
        """Return its last words."""
        try:
            with (self._place / LOG).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
                return last_words(log.read().decode(errors="replace"))
        except (OSError, RuntimeAbsent):
            return ""

    def _end(self) -> None:
        """End it if it runs, politely first."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            logger.warning("%s's service does not end; killing it", self._title)
            process.kill()
            process.wait(STOP_S)


def _fits(path: Path) -> bool:
    """Say whether a socket may be made there; where an agent has never run, there is no state folder yet."""
    return len(os.fsencode(path)) <= SOCKET_BYTES and path.parents[2].is_dir()


def _sweep(folder: Path) -> None:
    """Remove what agents left that are gone: each folder is named after its agent's process."""
    for left in folder.iterdir():
        pid, dash, _ = left.name.partition("-")
        if dash and pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


def _takes_calls(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    else:  # noqa: RET505 - without it, mypy calls the rest unreachable there
        with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(OSError):
            caller.settimeout(LOOK_S)
            caller.connect(str(path))
            return True
        return False
