"""Detectors without Python: an executable that prints JSON, or a JSON file, in a folder that the owner chose.

Every such file is a detector of its own, run like all others; `rma_core.detector_files` finds them. What they say is a
list of devices, or an object with ``devices`` and, where not all is well, ``state`` and ``reason``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec

from rma_core import Detection, DetectionError, hookimpl
from rma_core.detector_files import PATH
from rma_core.errors import ValidationProblem
from rma_core.models.strict import convert, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core import PluginConfig

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: Nothing longer is read: a report has less room.
MAX_BYTES = 512 * 1024
#: So much of what a failed program said is quoted, its end.
QUOTE_CHARACTERS = 300


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    """Return what a file says; an executable is given its configuration as JSON on stdin."""
    path = str(config.pop(PATH))
    data = _read(path) if path.lower().endswith(".json") else _run(path, config)
    return read(data, os.path.basename(path))  # noqa: PTH119 - a string, not a file


def read(data: bytes, name: str) -> Detection:
    """Return what JSON says that was printed or written. Raises DetectionError with everything wrong in it."""
    if len(data) > MAX_BYTES:
        raise DetectionError(f"{name} says more than {MAX_BYTES // 1024} KiB")
    try:
        said = parse(data, subject=name)
        if isinstance(said, list):
            said = {"devices": said}
        if isinstance(said, dict) and "state" not in said:
            nothing = {"state": "undetected", "reason": f"{name} lists no device"}
            said = {**({"state": "healthy"} if said.get("devices") else nothing), **said}
        return convert(said, Detection, subject=name)
    except ValidationProblem as error:
        raise DetectionError("; ".join([error.subject, *map(str, error.problems)])) from None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a string, not a file
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DetectionError(f"{path} cannot be read: {error.strerror}") from None


def _run(path: str, config: PluginConfig) -> bytes:
    try:
        done = subprocess.run(
            [path], input=msgspec.json.encode(config), capture_output=True, check=False, preexec_fn=_as_long_as_we()
        )
    except OSError as error:
        advice = ": does it begin with #! and the program that runs it?" if "format" in str(error).lower() else ""
        raise DetectionError(f"{path} cannot be run: {error.strerror or error}{advice}") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-QUOTE_CHARACTERS:]
        raise DetectionError(f"{path} ended with exit code {done.returncode}{f': {said}' if said else ''}")
    return done.stdout


def _as_long_as_we() -> Callable[[], None] | None:
    """Return what gives a program the kernel timer that ends this process, which it would not inherit."""
    if sys.platform == "win32":
        return None
    else:  # noqa: RET505 - what is unreachable on one system is what mypy checks on the other
        import signal

        left, _ = signal.getitimer(signal.ITIMER_REAL)

        def begin() -> None:
            signal.setitimer(signal.ITIMER_REAL, left)

        return begin
