"""How many processors this process was granted, which is what threads are counted by; not what the machine has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_QUOTA_V2 = "/sys/fs/cgroup/cpu.max"
_QUOTA_V1 = "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"
_PERIOD_V1 = "/sys/fs/cgroup/cpu/cpu.cfs_period_us"
#: More threads than this make a page hardly faster.
MAX_THREADS = 4


def granted(root: Path = Path("/")) -> int:
    """Return the processors this process may use: by affinity, and by the quota of its container; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_quota(root) or allowed)))


def threads(slots: int) -> int:
    """Return the threads for one document, where ``slots`` of them are read at once."""
    return max(1, min(MAX_THREADS, granted() // slots))


def mine() -> int:
    """Return the threads this process was told to use, which reads one document."""
    told = os.environ.get("OMP_THREAD_LIMIT", "")
    return int(told) if told.isdecimal() and int(told) else threads(1)


def _quota(root: Path) -> float | None:
    """Return the container's processors, if it has a limit; its own cgroup is what it sees at the top."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (root / _QUOTA_V2[1:]).read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((root / name[1:]).read_text(encoding="ascii") for name in (_QUOTA_V1, _PERIOD_V1))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
