"""What differs between operating systems about processes, in one place; small functions, no state."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TypedDict

#: What drivers go by: where they are, and which devices are whose.
DEVICE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ROCM_PATH", "ZE_AFFINITY_MASK",
)  # fmt: skip
#: What a child may see of the environment: how to find programs, libraries, temporary files and its own language.
#: No RMA_*, no tokens, no proxies with passwords in them.
CHILD_ENVIRONMENT = (
    "PATH", "HOME", "USERPROFILE", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TEMP", "TMP",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "XDG_RUNTIME_DIR",
    "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "PROGRAMFILES", "PROGRAMDATA",
    *DEVICE_VARIABLES,
)  # fmt: skip

_CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")


class DetachedOptions(TypedDict, total=False):
    """Options of `subprocess.Popen` that differ between operating systems."""

    start_new_session: bool
    creationflags: int


def detached_popen_kwargs() -> DetachedOptions:
    """Return what makes a child leave our terminal and process group, so that `kill_tree` gets all of it."""
    if sys.platform == "win32":
        import subprocess

        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    else:  # noqa: RET505 - mypy follows if/else, not returns, when it leaves a platform's code out
        return {"start_new_session": True}


def kill_tree(pid: int) -> None:
    """Kill a child made with `detached_popen_kwargs`, at once, with what it started; one that is gone is no error.

    What moved to a session of its own on POSIX, or outlived its parent on Windows, is not found by this.
    """
    if sys.platform == "win32":
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            for process in [*parent.children(recursive=True), parent]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def child_environment(*, more: dict[str, str] | None = None) -> dict[str, str]:
    """Return the part of our environment that an untrusted child may see, and ``more``."""
    return {name: os.environ[name] for name in CHILD_ENVIRONMENT if name in os.environ} | (more or {})


def neutral_folder() -> str:
    """Return a folder to run a child in where it finds nothing of ours."""
    return os.path.abspath(os.sep)  # noqa: PTH100 - the root of the current drive on Windows, "/" elsewhere


def exit_words(code: int) -> str:
    """Say how a process ended: ``ended with exit code 3``, ``was killed by SIGKILL``."""
    crash = _crash(code)
    if crash:
        return f"crashed in native code ({crash})"
    return f"was killed by {_signal(code)}" if code < 0 else f"ended with exit code {code}"


def _crash(code: int) -> str:
    if sys.platform == "win32":
        return {0xC0000005: "access violation", 0xC00000FD: "stack overflow"}.get(code & 0xFFFFFFFF, "")
    else:  # noqa: RET505 - as above
        name = _signal(code) if code < 0 else ""
        return name if name in _CRASHES else ""


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
