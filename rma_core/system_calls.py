"""The system calls that a confined child may not make, as a filter for Linux's seccomp.

Landlock settles which files are opened and which TCP ports are reached. It does not settle who changes a file's mode or
times, other sockets, memory that outlives a process, and what one process may do to another of the same user.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names of calls, and their numbers on x86_64 and on machines with the kernel's generic table; ``None``: not there.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # Sockets; a pair of streams is left, for programs talk to their helpers by one.
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425),
    # Other processes, and the group that is killed with this one.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Keys, and files by handles.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "open_by_handle_at": (304, 265),
    # What belongs to files that it may not open.
    "truncate": (76, 45),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    # Memory and messages that others share, or that stay when nobody is there any more.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
}  # fmt: skip


class _Check(NamedTuple):
    """A call that is decided by one of its arguments: which end it has where its bits in ``mask`` are so, and else."""

    x86_64: int | None
    generic: int
    argument: int
    mask: int
    value: int
    so: str
    otherwise: str


_ANY, _ITSELF = 0xFFFFFFFF, 0
_STREAM, _TYPE = 1, 0xF
_TRUNCATE, _TRUNCATE_OR_WRITE = 0o1000, 0o1003
_CHECKS = (
    _Check(53, 199, 1, _TYPE, _STREAM, "allow", "refuse"),  # socketpair
    _Check(302, 261, 0, _ANY, _ITSELF, "allow", "refuse"),  # prlimit64
    # Libraries name their own threads here, of which no filter can know that they are: nothing is done, and no error.
    _Check(203, 122, 0, _ANY, _ITSELF, "allow", "ignore"),  # sched_setaffinity
    _Check(142, 118, 0, _ANY, _ITSELF, "allow", "ignore"),  # sched_setparam
    _Check(144, 119, 0, _ANY, _ITSELF, "allow", "ignore"),  # sched_setscheduler
    _Check(314, 274, 0, _ANY, _ITSELF, "allow", "ignore"),  # sched_setattr
)
#: Where Landlock does not settle that: files that are only read are not to be emptied as they are opened.
_OPENING = (
    _Check(2, -1, 1, _TRUNCATE_OR_WRITE, _TRUNCATE, "refuse", "allow"),  # open
    _Check(257, 56, 2, _TRUNCATE_OR_WRITE, _TRUNCATE, "refuse", "allow"),  # openat
)
_OPENAT2 = 437

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}
#: On x86_64 the same calls have other numbers from here on.
_X32 = 0x40000000
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
#: How a call may end: the kernel's own answer first, which is where the last step leads.
_ENDS = {"allow": _ALLOW, "refuse": _REFUSE | errno.EACCES, "absent": _REFUSE | errno.ENOSYS, "ignore": _REFUSE}
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_SET_SECCOMP, _SECCOMP_FILTER = 22, 2


class _Step(NamedTuple):
    """One instruction; where it jumps to is a number of steps, or the name of an end."""

    code: int
    value: int
    true: int | str = 0
    false: int | str = 0


def known() -> bool:
    """Whether there is a filter for this machine: programs of 32 bits number their calls another way."""
    return platform.machine() in _ARCHITECTURES and struct.calcsize("P") == 8  # noqa: PLR2004 - bytes of an address


def forbid(libc: ctypes.CDLL, *, truncation: bool) -> bool:
    """Let this thread, and all that it starts, make these calls no more; say whether that is done.

    ``truncation``: files that are opened to be read are not to be emptied by that. Raises OSError.
    """
    if not known():
        return False
    steps = _program(platform.machine(), truncation=truncation)
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    wanted = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    if libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, wanted, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no filter of system calls can be set: {os.strerror(number)}")
    return True


def _program(machine: str, *, truncation: bool) -> list[tuple[int, int, int, int]]:
    """Return the filter as the kernel takes it: code, two jumps, value."""
    steps = list(_steps(machine, truncation=truncation))
    ends = {name: len(steps) + number for number, name in enumerate(_ENDS)}
    steps += [_Step(_RETURN, answer) for answer in _ENDS.values()]

    def jump(at: int, to: int | str) -> int:
        return ends[to] - at - 1 if isinstance(to, str) else to

    return [(one.code, jump(at, one.true), jump(at, one.false), one.value) for at, one in enumerate(steps)]


def _steps(machine: str, *, truncation: bool) -> Iterator[_Step]:
    column = 0 if machine == "x86_64" else 1
    yield _Step(_LOAD, _ARCHITECTURE_AT)
    yield _Step(_JUMP_EQUAL, _ARCHITECTURES[machine], 0, "refuse")
    yield _Step(_LOAD, _NUMBER_AT)
    if column == 0:
        yield _Step(_JUMP_AT_LEAST, _X32, "refuse")
    for numbers in _NUMBERS.values():
        number = numbers[column]
        if number is not None:
            yield _Step(_JUMP_EQUAL, number, "refuse")
    for check in (*_CHECKS, *(_OPENING if truncation else ())):
        number = (check.x86_64, check.generic)[column]
        if number is not None and number >= 0:
            yield _Step(_JUMP_EQUAL, number, 0, 3)
            yield _Step(_LOAD, _ARGUMENTS_AT + 8 * check.argument)
            yield _Step(_AND, check.mask)
            yield _Step(_JUMP_EQUAL, check.value, check.so, check.otherwise)
    if truncation:
        # Its flags are where no filter can look; who asks learns that it is not there, and takes the older one.
        yield _Step(_JUMP_EQUAL, _OPENAT2, "absent")
