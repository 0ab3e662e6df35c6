"""Where a running Python process spends its time: py-spy looks now and then who holds the GIL, functions are counted.

What the kernel does for a call that gave the GIL back is in nobody's share.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Looks a second: few enough that they cost little, and no multiple of what the process does by the clock.
RATE = 197
#: Functions that are on so large a share of the stacks are not shown.
ALWAYS = 0.99
#: Lines that are shown.
SHOWN = 45
#: Seconds beyond its own that it may take to write what it saw.
WRITE_S = 30.0
#: How py-spy names a function: ``name (path/to/file.py:LINE)``, or a library's.
_FRAME = re.compile(r"^(?P<name>.*) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")


class Profile:
    """A look at a process that has begun, and ends by itself after ``seconds``."""

    def __init__(self, pid: int, seconds: float, folder: Path) -> None:
        program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if program is None:
            sys.exit("a profile needs py-spy: pip install py-spy")
        self._file = folder / "profile"
        self._seconds = seconds
        command = [
            program, "record", "--pid", str(pid), "--duration", str(max(1, round(seconds))), "--rate", str(RATE),
            "--format", "raw", "--output", str(self._file), "--gil",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def result(self) -> Stacks:
        """Wait for its end and return what it saw."""
        _, said = self._process.communicate(timeout=self._seconds + WRITE_S)
        if self._process.returncode:
            sys.exit(f"py-spy failed: {said.strip()[-500:]}")
        return count(self._file.read_text(encoding="utf-8"))


class Stacks(NamedTuple):
    """How often a function was on the stack (``within``), how often on its top (``itself``), of how many looks."""

    looks: int
    itself: Counter[str]
    within: Counter[str]


def count(raw: str) -> Stacks:
    """Count stacks as py-spy writes them raw: frames from the outermost on, between semicolons, and a number."""
    itself, within = Counter[str](), Counter[str]()
    looks = 0
    for line in raw.splitlines():
        stack, _, number = line.rpartition(" ")
        if not number.isdecimal():
            continue
        frames = [_short(frame) for frame in stack.split(";")]
        looks += int(number)
        itself[frames[-1]] += int(number)
        # A function that calls itself is there once.
        for frame in set(frames):
            within[frame] += int(number)
    return Stacks(looks, itself, within)


def _short(frame: str) -> str:
    """Return a frame as its function and the end of its file's path; lines of one function are one."""
    found = _FRAME.match(frame)
    if found is None:
        return frame
    return f"{found['name']} ({'/'.join(found['file'].rsplit('/', 2)[-2:])})"


def lines(stacks: Stacks, *, each: float = 0.0) -> Iterator[str]:
    """Return the functions that cost most, by themselves and with what they call.

    Shares are of the CPU that the process used; with ``each`` (microseconds an answer or a token takes) also in those.
    """
    # What is nearly always there is only the way in.
    within = Counter({name: number for name, number in stacks.within.items() if number < ALWAYS * stacks.looks})
    for title, counted in (("by themselves", stacks.itself), ("with what they call", within)):
        yield f"{title}, {stacks.looks} looks:"
        for name, number in counted.most_common(SHOWN):
            share = number / stacks.looks
            cost = f"{share * each:7.1f} us" if each else ""
            yield f"    {share:6.1%} {cost}  {name}"
