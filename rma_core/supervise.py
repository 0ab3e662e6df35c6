"""The supervisor: runs one program for the agent, and leaves nothing of it when either of them is gone.

``python -m rma_core.supervise`` reads an `Order` as its first line, then commands (``stop SECONDS``); the end of its
input means that the agent is gone, and everything is ended. It writes an `Event` a line. On POSIX it is two processes
that watch each other: the *guard*, which the agent started, and the *keeper*, which runs the program. Whichever is
killed, the other still ends the rest: on Linux both adopt what leaves its parents, elsewhere a mark in the
environment finds it. On Windows one process in a job object is enough.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import psutil

from rma_core import process_tree
from rma_core import service_platforms as platforms

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from rma_core.process_tree import Identity

#: How often the limits of a service as a whole are looked at.
WATCH_S = 2.0
#: Size of each of the two files that keep a service's output.
LOG_FILE_BYTES = 1024 * 1024
#: The most of one line of output that is passed on.
LINE_BYTES = 4096
#: What is left when a program ended by itself gets this long to follow.
AFTERMATH_S = 2.0
#: How long killing is tried; only a process stuck inside the kernel lasts longer, and dies when it comes out.
KILL_S = 10.0
#: A single process may address this many times what the whole service may really use (thread stacks are mostly air).
ADDRESS_FACTOR = 2
#: How long the end of a program waits for its last output to be written down.
LAST_WORDS_S = 0.5
READ_BYTES = 65_536
LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. ``env`` is all it gets; ``log`` and ``state`` are files, or empty for none.

    ``mark`` finds what it starts; ``echo`` passes its output on as events; a limit of ``None`` is none.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    mark: str
    log: str = ""
    state: str = ""
    echo: bool = False
    memory_bytes: int | None = None
    processes: int | None = None
    grace_s: float = 5.0


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the agent is told: ``started`` (with the keeper), ``output`` or ``ended``.

    ``code`` is an exit code, or a signal's number below zero; ``None`` when nobody knows.
    """

    kind: Literal["started", "output", "ended"]
    pid: int = 0
    keeper: int = 0
    keeper_created: float = 0.0
    text: str = ""
    code: int | None = None
    reason: str = ""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a later agent needs to clean up: the supervisor's processes and the program's, as (pid, created)."""

    mark: str
    supervisors: tuple[tuple[int, float], ...]
    program: tuple[int, float]


class _Stop(NamedTuple):
    """End everything, after ``grace_s`` of asking."""

    grace_s: float
    reason: str = ""


class _Ended(NamedTuple):
    """The program ended by itself: an exit code, or a signal's number below zero."""

    code: int


_speaking = threading.Lock()


def tell(event: Event) -> None:
    """Write one event to the agent, if there still is one."""
    data = msgspec.json.encode(event) + b"\n"
    with _speaking, contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


class RollingLog:
    """Keeps the last output in two files of bounded size; a full disk loses output and holds nobody up."""

    def __init__(self, path: Path) -> None:
        """Begin ``path``, which only its owner can read."""
        self._path = path
        self._file = -1
        self._begin()

    def _begin(self) -> None:
        self._size = 0
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, LOG_FLAGS, 0o600)

    def write(self, data: bytes) -> None:
        """Append ``data``; at the size limit the file becomes ``.1`` and a new one begins."""
        with contextlib.suppress(OSError):
            os.write(self._file, data)
        self._size += len(data)
        if self._size >= LOG_FILE_BYTES:
            # Forgotten before it is closed: when no new file can be had, its number may soon be another file's.
            full, self._file = self._file, -1
            with contextlib.suppress(OSError):
                os.close(full)
            with contextlib.suppress(OSError):
                self._path.replace(f"{self._path}.1")
            self._begin()


def main() -> None:
    """Read the order, then guard, keep, and end it all."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return
    order = msgspec.json.decode(line, type=Order)
    job = platforms.end_descendants_with_me()
    platforms.adopt_orphans()
    if sys.platform == "win32":
        _Keeper(order).keep(supervisors=[])
    else:
        _guard_and_keep(order)
    del job


if sys.platform != "win32":

    def _guard_and_keep(order: Order) -> None:
        """Fork: this process guards; the child keeps, and ends without returning."""
        me = psutil.Process()
        ours, theirs = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            status = 1
            try:
                os.close(theirs)
                platforms.adopt_orphans()
                keep = _Keeper(order)
                _on_ending_signals(lambda _, __: keep.inbox.put(_Stop(order.grace_s)))
                keep.keep(supervisors=[process_tree.identity(me)], guard=ours)
                status = 0
            finally:
                # Threads still wait in reads; an orderly exit would wait for their locks.
                os._exit(status)
        os.close(ours)
        # Passed on by closing the pipe and not as a signal: the keeper's number might by then be another's.
        _on_ending_signals(lambda _, __: os.dup2(0, theirs))
        _guard(order, keeper, me)

    def _on_ending_signals(handler: Callable[[int, FrameType | None], object]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, handler)

    def _guard(order: Order, keeper: int, me: psutil.Process) -> None:
        """Wait for the keeper; if it did not end as it should, end what it left."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = _status_of(keeper)

        def find() -> list[psutil.Process]:
            return process_tree.descendants(me, order.mark)

        process_tree.kill_until_gone(find, _reaped_all if platforms.ADOPTS_ORPHANS else None, within_s=KILL_S)
        if status != 0:
            tell(Event(kind="ended", reason="its supervisor was killed"))

    def _status_of(keeper: int) -> int:
        """Wait for the keeper, and meanwhile collect whatever else became this process's child."""
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == keeper:
                return status

    def _reaped_all() -> bool:
        """Collect what has ended; say whether there is no descendant left at all."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        return False


class _Keeper:
    """Runs the program until it ends, or is to end; then ends everything it started."""

    def __init__(self, order: Order) -> None:
        self.inbox: queue.SimpleQueue[_Stop | _Ended] = queue.SimpleQueue()
        self._order = order
        self._me = psutil.Process()

    def keep(self, *, supervisors: list[Identity], guard: int | None = None) -> None:
        """Start the program, and return when nothing of it is left."""
        try:
            self._program = self._launch()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            tell(Event(kind="ended", reason=f"it cannot be started: {error}"))
            return
        # Threads begin after the program's fork: it runs Python code between fork and exec.
        self._remember(supervisors)
        tell(Event(kind="started", pid=self._program.pid, keeper=self._me.pid, keeper_created=self._me.create_time()))
        self._pump = _thread(self._pass_output_on)
        self._reaper = _thread(self._reap)
        _thread(self._read_commands)
        if guard is not None:
            _thread(self._watch_guard, guard)
        self._end(self._wait())

    def _launch(self) -> subprocess.Popen[bytes]:
        """Start the program. Raises OSError, ValueError, subprocess.SubprocessError."""
        order = self._order
        most = order.memory_bytes * ADDRESS_FACTOR if order.memory_bytes is not None else None
        return subprocess.Popen(
            order.argv,
            env={**order.env, process_tree.MARK: order.mark},
            cwd=order.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            **platforms.service_options(memory_bytes=most),
        )

    def _remember(self, supervisors: list[Identity]) -> None:
        """Write down who runs here; a full disk is no reason not to run, because the mark finds it too."""
        if not self._order.state:
            return
        program = process_tree.Identity(0, 0.0)
        with contextlib.suppress(psutil.Error):
            program = process_tree.identity(psutil.Process(self._program.pid))
        known = (*supervisors, process_tree.identity(self._me))
        path = Path(self._order.state)
        with contextlib.suppress(OSError):
            new = path.with_name(f"{path.name}.new")
            new.write_bytes(msgspec.json.encode(State(mark=self._order.mark, supervisors=known, program=program)))
            new.replace(path)

    def _find(self) -> list[psutil.Process]:
        return process_tree.descendants(self._me, self._order.mark)

    def _gone(self) -> bool:
        """Say whether nothing is left: on Linux there is nothing to wait for, elsewhere nothing to be found."""
        return not self._reaper.is_alive() and (platforms.ADOPTS_ORPHANS or not self._find())

    def _wait(self) -> _Stop:
        """Return when everything is to end, with how much patience and why."""
        while True:
            try:
                word = self.inbox.get(timeout=WATCH_S)
            except queue.Empty:
                if reason := self._too_much():
                    return _Stop(0, reason)
                continue
            if isinstance(word, _Stop):
                return word
            self._tell_end(word.code, "")
            return _Stop(AFTERMATH_S)

    def _too_much(self) -> str:
        """Say what the service as a whole takes beyond its limits, if it does."""
        order = self._order
        if order.memory_bytes is None and order.processes is None:
            return ""
        found = self._find()
        if order.processes is not None and len(found) > order.processes:
            return f"it started {len(found)} processes, more than its limit of {order.processes}"
        used = process_tree.private_bytes(found)
        if order.memory_bytes is not None and used > order.memory_bytes:
            return f"it used {used >> 20} MiB of memory, more than its limit of {order.memory_bytes >> 20} MiB"
        return ""

    def _end(self, stop: _Stop) -> None:
        """Ask, wait, then kill until nothing is left, and say how the program ended if nobody has yet."""
        if stop.grace_s > 0:
            self._ask()
            process_tree.wait_until(self._gone, within_s=stop.grace_s)
        process_tree.kill_until_gone(self._find, self._gone, within_s=KILL_S)
        while not self.inbox.empty():
            word = self.inbox.get()
            if isinstance(word, _Ended):
                self._tell_end(word.code, stop.reason)

    def _ask(self) -> None:
        if sys.platform == "win32":
            with contextlib.suppress(OSError):
                self._program.send_signal(signal.CTRL_BREAK_EVENT)
        else:
            process_tree.ask_to_end(self._find())

    def _tell_end(self, code: int, reason: str) -> None:
        # Its last words first: they are what the agent will want to read.
        self._pump.join(timeout=LAST_WORDS_S)
        tell(Event(kind="ended", reason=reason, code=code))

    def _reap(self) -> None:
        """Collect what ends; on Linux that is every descendant, so that its end means there is none."""
        if sys.platform == "win32":
            self.inbox.put(_Ended(self._program.wait()))
        else:
            with contextlib.suppress(ChildProcessError):
                while True:
                    pid, status = os.waitpid(-1, 0)
                    if pid == self._program.pid:
                        self.inbox.put(_Ended(os.waitstatus_to_exitcode(status)))

    def _read_commands(self) -> None:
        """Take the agent's word; its silence for good means that it is gone."""
        for line in sys.stdin.buffer:
            word, _, seconds = line.decode().partition(" ")
            if word == "stop":
                self.inbox.put(_Stop(float(seconds)))
        self.inbox.put(_Stop(self._order.grace_s))

    def _watch_guard(self, guard: int) -> None:
        """Return, with the word to stop, when the guard's end of the pipe closes."""
        os.read(guard, 1)
        self.inbox.put(_Stop(self._order.grace_s))

    def _pass_output_on(self) -> None:
        """Keep the program's output, and pass it on where asked, until its last holder is gone."""
        assert self._program.stdout is not None  # noqa: S101 - it was asked for
        log = RollingLog(Path(self._order.log)) if self._order.log else None
        rest = b""
        while data := os.read(self._program.stdout.fileno(), READ_BYTES):
            if log is not None:
                log.write(data)
            if self._order.echo:
                *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
                rest = rest[-LINE_BYTES:]
                for line in filter(None, lines):
                    tell(Event(kind="output", text=line[:LINE_BYTES].decode(errors="replace")))


def _thread(target: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    main()
