"""Finding and ending everything a program started, also what left its parents, group and session.

A process is known by its number and its time of creation: a number alone may by now belong to somebody else.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import psutil

from rma_core import service_platforms as platforms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: The variable that marks a service and, by inheritance, whatever it starts.
MARK = "RMA_SUPERVISED"
#: Two readings of one creation time differ by rounding at most.
SAME_TIME_S = 0.01
#: Rounds of stopping before killing: each catches what the last one's targets had started meanwhile.
FREEZE_ROUNDS = 5
#: Pauses between looks at a tree that should be going away.
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.01, 0.2


class Identity(NamedTuple):
    """What tells one process from every other, also from a later one with the same number."""

    pid: int
    created: float


def identity(process: psutil.Process) -> Identity:
    """Return what tells ``process`` from others. Raises psutil.NoSuchProcess."""
    return Identity(process.pid, process.create_time())


def living(known: Identity) -> psutil.Process | None:
    """Return the process if exactly that one still runs."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(known.pid)
        same = abs(process.create_time() - known.created) < SAME_TIME_S
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def descendants(root: psutil.Process, mark: str = "") -> list[psutil.Process]:
    """Return what ``root`` and its children started; where orphans are not adopted, also what carries ``mark``."""
    found: set[psutil.Process] = set()
    with contextlib.suppress(psutil.Error):
        found.update(root.children(recursive=True))
    if mark and not platforms.ADOPTS_ORPHANS:
        found.update(p for p, its in marked(mark) if its == mark)
    return [p for p in found - {root} if _alive(p)]


def marked(prefix: str) -> list[tuple[psutil.Process, str]]:
    """Return every process of this user whose mark begins with ``prefix``, with its mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK, "")
            if mark.startswith(prefix) and _alive(process):
                found.append((process, mark))
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def ask_to_end(processes: Iterable[psutil.Process]) -> None:
    """Ask each process to end (SIGTERM)."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()


def kill(find: Callable[[], Iterable[psutil.Process]]) -> None:
    """Kill all that ``find`` returns, after stopping it, so that nothing starts more while it is being killed."""
    stopped: set[psutil.Process] = set()
    for _ in range(FREEZE_ROUNDS):
        new = set(find()) - stopped
        if not new:
            break
        stopped |= new
        for process in new:
            with contextlib.suppress(psutil.Error):
                process.suspend()
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.kill()


def wait_until(gone: Callable[[], bool], *, within_s: float) -> bool:
    """Wait until ``gone`` says yes, looking less and less often; say whether it did."""
    deadline = time.monotonic() + within_s
    look_s = SHORTEST_LOOK_S
    while not gone():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(look_s, max(0.0, deadline - time.monotonic())))
        look_s = min(LONGEST_LOOK_S, look_s * 2)
    return True


def kill_until_gone(
    find: Callable[[], Iterable[psutil.Process]], gone: Callable[[], bool] | None = None, *, within_s: float
) -> bool:
    """Kill what ``find`` returns, again and again, until ``gone`` (else: it returns nothing); say whether it worked."""

    def nothing_left() -> bool:
        kill(find)
        return gone() if gone is not None else not list(find())

    return wait_until(nothing_left, within_s=within_s)


def private_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the memory that is these processes' own: what they share, files for example, is not counted."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
    return total
