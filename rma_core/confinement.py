"""What a plugin's child may see of a Linux machine: its hardware and its programs, no file of its owner, no network.

Landlock takes files, TCP and signals away, seccomp what Landlock leaves open (`rma_core.system_calls`), and root loses
its capabilities. A kernel that lacks one of these leaves that open, and `confine` says so; other systems have none of
it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple

from rma_core import system_calls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Where programs, libraries and what the kernel tells of the hardware are; of /proc see `_of_proc`.
SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt", "/nix/store", "/gnu/store", "/sys",
    "/run/opengl-driver", "/run/current-system", "/run/udev",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/os-release",
    "/etc/localtime", "/etc/nsswitch.conf", "/etc/OpenCL", "/etc/vulkan", "/etc/nvidia-container-runtime",
    "/etc/nv_tegra_release",
)  # fmt: skip
#: What a detector may open to talk to hardware, by how its path begins.
DEVICES = (
    "/dev/dri", "/dev/kfd", "/dev/accel", "/dev/nvidia", "/dev/nvhost", "/dev/nvmap", "/dev/dxg", "/dev/davinci",
    "/dev/apex_", "/dev/hailo", "/dev/mali", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom",
)  # fmt: skip
#: Entries of /proc that are the machine's memory or its log, or tell of what others share.
NOT_OF_PROC = frozenset(
    {"kcore", "kmsg", "kpagecount", "kpageflags", "kpagecgroup", "keys", "key-users", "sysvipc", "sysrq-trigger"}
)

#: A temporary file gets no larger.
MOST_FILE_BYTES = 16 * 1024 * 1024
#: Files that are open at one time.
MOST_OPEN = 128
#: Memory that one process can write to. Drivers map far more; what they only reserve, or share, does not count.
MOST_MEMORY_BYTES = 1024 * 1024 * 1024

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
#: Folders and plain files may be made, read, written and removed, but no devices.
_SCRATCH = ((1 << 14) - 1) & ~(1 << 6 | 1 << 11) | _TRUNCATE
_DEVICE = _WRITE_FILE | _READ_FILE | _READ_DIR | _IOCTL_DEV
#: Rights that a rule on a file, rather than a folder, may name.
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
#: Rights over files, by the version of Landlock that has them first.
_FIRST_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: _TRUNCATE, 5: _IOCTL_DEV}
_TCP, _SCOPES = 0b11, 0b11
_TRUNCATE_SINCE, _TCP_SINCE, _SCOPES_SINCE = 3, 4, 6
#: O_PATH, which Python knows on Linux only.
_O_PATH = 0o10000000
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_SET_NO_NEW_PRIVS = 38
#: CAP_DAC_READ_SEARCH: root may have its Python in a user's closed folder.
_CAPABILITY_VERSION_3, _MAY_READ_ALL = 0x20080522, 1 << 2


class Confined(NamedTuple):
    """What is kept from a child that was confined."""

    files: bool = False
    network: bool = False
    signals: bool = False

    def words(self) -> str:
        """Say what it is, and what is not."""
        names = {"files": self.files, "network": self.network, "signals": self.signals}
        kept = [name for name, kept in names.items() if kept]
        left = [name for name, kept in names.items() if not kept]
        if not kept:
            return "nothing is kept from a detector on this system: it could read your files and use the network"
        words = {
            "files": "your files",
            "network": "the network",
            "signals": "other programs",
        }
        said = f"a detector gets at its hardware only; kept from it: {', '.join(words[name] for name in kept)}"
        return f"{said}; this kernel cannot keep from it: {', '.join(words[name] for name in left)}" if left else said


def version() -> int:
    """Return the version of this kernel's Landlock; 0 where there is none."""
    if sys.platform == "linux":
        return max(0, int(_system().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))
    else:  # noqa: RET505 - mypy follows if/else, not returns, when it leaves a platform's code out
        return 0


def available() -> Confined:
    """Return what `confine` can keep from a child on this system."""
    found = version()
    if not found:
        return Confined()
    return Confined(files=True, network=system_calls.known(), signals=found >= _SCOPES_SINCE)


def confine(reads: Iterable[str], *, writes: Iterable[str], hidden: Iterable[str]) -> Confined:
    """Take from this process and all it will start whatever a detector does not need; there is no way back.

    ``reads`` are absolute paths to be read beside the system's own (below /dev: to be used), ``writes`` folders for
    temporary files, ``hidden`` those that must not be seen, whatever holds them. Raises OSError when the kernel refuses
    what it says it can.
    """
    found = version()
    if not found:
        return Confined()
    _limit()
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208 - strings
        raise OSError(errno.EBUSY, "this process cannot be confined: it has threads, which would not be")
    libc = _system()
    _checked(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    grants = [*_grants([*SYSTEM, *_of_proc(), *reads], list(hidden)), *((path, _SCRATCH) for path in writes)]
    signals = _restrict_files(libc, found, grants)
    network = system_calls.forbid(libc, truncation=found < _TRUNCATE_SINCE)
    _drop_capabilities(libc)
    return Confined(files=True, network=network, signals=signals)


def _limit() -> None:
    """Bound what this process can take: bytes of a file, open files, and memory."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
        # Files that have no name any more take room as long as they are open.
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_OPEN, MOST_OPEN))


def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"this process cannot be confined: {os.strerror(number)}")
    return result


def _of_proc() -> Iterator[str]:
    """Give what /proc tells of the machine and of this process; what others run, and with which words, is not told."""
    try:
        names = [entry.name for entry in os.scandir("/proc")]
    except OSError:
        return
    for name in names:
        if name not in NOT_OF_PROC and not name.isdecimal():
            yield f"/proc/{name}"
    yield f"/proc/{os.getpid()}"


def _grants(reads: list[str], hidden: list[str]) -> Iterator[tuple[str, int]]:
    """Give paths with the rights to them: what holds a hidden folder is granted without that."""
    for path in reads:
        if path.startswith("/dev/"):
            yield path, _DEVICE
        elif path.startswith("/") and os.path.realpath(path) != "/":
            yield from ((one, _READ) for one in _around(os.path.realpath(path), [os.path.realpath(h) for h in hidden]))
    yield from (("/dev", _READ_DIR), ("/proc", _READ_DIR))
    try:
        names = [entry.path for entry in os.scandir("/dev")]
    except OSError:
        return
    yield from ((path, _DEVICE) for path in names if path.startswith(DEVICES))


def _around(path: str, hidden: list[str]) -> Iterator[str]:
    """Give a path, or what is in it but for the hidden folders."""
    if not any(_holds(path, one) for one in hidden):
        yield path
    elif path not in hidden:
        try:
            # What a link leads to may be hidden, or hold what is.
            inside = [entry.path for entry in os.scandir(path) if not entry.is_symlink()]
        except OSError:
            return
        for one in inside:
            yield from _around(one, hidden)


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _restrict_files(libc: ctypes.CDLL, found: int, grants: list[tuple[str, int]]) -> bool:
    """Enter a Landlock domain that has these rights and no others; say whether it keeps signals in as well."""
    handled = sum(rights for since, rights in _FIRST_RIGHTS.items() if since <= found)
    network = _TCP if found >= _TCP_SINCE else 0
    scopes = _SCOPES if found >= _SCOPES_SINCE else 0
    ruleset = _ruleset(libc, handled, network, scopes)
    if ruleset < 0 and scopes:
        # Kernels of some vendors say version 6 and lack a part of it.
        scopes = 0
        ruleset = _ruleset(libc, handled, network, scopes)
    _checked(ruleset)
    try:
        for path, rights in grants:
            _grant(libc, ruleset, path, rights & handled)
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return bool(scopes)


def _ruleset(libc: ctypes.CDLL, handled: int, network: int, scopes: int) -> int:
    wanted = struct.pack("=QQQ", handled, network, scopes)
    # An older kernel takes no longer record than it knows.
    size = 24 if scopes else 16 if network else 8
    return int(libc.syscall(_CREATE_RULESET, wanted[:size], ctypes.c_size_t(size), 0))


def _grant(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Grant rights to a path; what is not there, or not this user's to see, needs none."""
    try:
        descriptor = os.open(path, _O_PATH)
    except OSError:
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 - what was opened, not what is there now
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Let root be a user like any other that may read: what it may read at all is settled by then."""
    header, now = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), ctypes.create_string_buffer(24)
    _checked(libc.capget(header, now))
    effective, permitted = struct.unpack_from("=II", now)
    kept = _MAY_READ_ALL & permitted
    _checked(libc.capset(header, struct.pack("=6I", kept & effective, kept, 0, 0, 0, 0)))
