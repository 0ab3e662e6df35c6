"""Where operating systems differ for supervised services: one small function each, as in `rma_core.platforms`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypedDict

if sys.platform == "win32":
    import subprocess

    from rma_core._windows_job import job_of_this_process
else:
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Whether what a descendant leaves behind becomes a child of the supervisor (Linux), and not of the system.
ADOPTS_ORPHANS = sys.platform == "linux"

#: The most bytes the path of a Unix socket may have (``sun_path`` without its final zero); 0: use a port instead.
SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 0 if sys.platform == "win32" else 103

#: What a program needs to find itself at home; nothing else of the agent's environment goes to a service.
COMMON_VARIABLES = ("LANG", "LC_ALL", "LC_CTYPE", "TZ")
WINDOWS_VARIABLES = ("COMSPEC", "NUMBER_OF_PROCESSORS", "PATHEXT", "SYSTEMDRIVE", "SYSTEMROOT", "WINDIR")

#: Open files of a service: more than the usual soft limit of 1024, far less than would hurt the machine.
SERVICE_OPEN_FILES = 4096
#: How much a service steps back behind what the owner does (nice levels).
SERVICE_NICENESS = 5
#: When memory runs out, the kernel ends a service before the owner's programs (from -1000 to 1000).
SERVICE_OOM_SCORE = 500

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGKILL = 9


class ServiceOptions(TypedDict, total=False):
    """Options of `subprocess.Popen` for a service."""

    start_new_session: bool
    umask: int
    preexec_fn: Callable[[], None]
    creationflags: int


def environment_of_a_service() -> dict[str, str]:
    """Return the few variables of this process that a service may see; paths of its own are added by its runtime."""
    names = COMMON_VARIABLES + (WINDOWS_VARIABLES if sys.platform == "win32" else ())
    return {name: os.environ[name] for name in names if name in os.environ}


def search_path() -> str:
    """Return where the system's own programs lie, as ``PATH`` has it."""
    return os.environ.get("PATH", "") if sys.platform == "win32" else "/usr/local/bin:/usr/bin:/bin"


def python_of(environment: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return environment / "Scripts" / "python.exe" if sys.platform == "win32" else environment / "bin" / "python"


def adopt_orphans() -> None:
    """Make this process the new parent of every descendant whose parent ends, where the system can do that."""
    if ADOPTS_ORPHANS:
        _prctl()(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants_with_me() -> object:
    """On Windows, put this process and all it starts into a job that ends with this process; elsewhere do nothing."""
    if sys.platform == "win32":
        job: object = job_of_this_process()
    else:
        job = None
    return job


def service_options(*, memory_bytes: int | None) -> ServiceOptions:
    """Return options of `subprocess.Popen` for a service: own session, private files, limits, death with its parent.

    ``memory_bytes`` bounds the private data of each single process (Linux); the bound of a whole service is watched
    by the supervisor.
    """
    options: ServiceOptions
    if sys.platform == "win32":
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS}
    else:
        options = {"start_new_session": True, "umask": 0o077, "preexec_fn": _confinement(memory_bytes)}
    return options


if sys.platform != "win32":

    def _confinement(memory_bytes: int | None) -> Callable[[], None]:
        """Return what a service's process does before it becomes the service; all is looked up before the fork."""
        parent = os.getpid()
        prctl = _prctl() if sys.platform == "linux" else None
        limits = [(resource.RLIMIT_NOFILE, _open_files()), (resource.RLIMIT_CORE, 0)]
        if memory_bytes is not None and sys.platform == "linux":
            limits.append((resource.RLIMIT_DATA, memory_bytes))

        def confine() -> None:
            if prctl is not None:
                prctl(_PR_SET_PDEATHSIG, _SIGKILL)
                if os.getppid() != parent:  # it died before the line above could count
                    os._exit(1)
                _be_first_when_memory_runs_out()
            for which, most in limits:
                resource.setrlimit(which, (most, most))
            os.nice(SERVICE_NICENESS)

        return confine

    def _open_files() -> int:
        """Return how many files a service may open: never more than this process could."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return SERVICE_OPEN_FILES if hard == resource.RLIM_INFINITY else min(SERVICE_OPEN_FILES, hard)


def _be_first_when_memory_runs_out() -> None:
    """Raise this process's score for the kernel's out-of-memory killer; a machine that forbids it stays as it is."""
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(descriptor, str(SERVICE_OOM_SCORE).encode())
    except OSError:
        return
    finally:
        os.close(descriptor)


def _prctl() -> Callable[[int, int], int]:
    """Return Linux's ``prctl``, which the standard library does not have."""
    import ctypes

    function = ctypes.CDLL(None).prctl
    function.argtypes = (ctypes.c_int, ctypes.c_ulong)
    function.restype = ctypes.c_int

    def call(option: int, value: int) -> int:
        return int(function(option, value))

    return call
