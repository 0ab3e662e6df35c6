"""What this process was granted of the machine, which is less than what the machine has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ROOT = Path("/")


def cpus(root: Path = ROOT) -> int:
    """Return the processors this process may use: by affinity, and by the quota of its container; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_quota(root) or allowed)))


def memory_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that is free for this process now, by the machine and its own limits; None if nobody says."""
    found = [value for value in (_available(root), _container_memory(root), _address_space()) if value is not None]
    return min(found, default=None)


def _quota(root: Path) -> float | None:
    """Return the container's processors, if it has a limit; its own cgroup is what it sees at the top."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = _text(root, "sys/fs/cgroup/cpu.max").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit = int(_text(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
        return limit / int(_text(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us")) if limit > 0 else None
    return None


def _available(root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _text(root, "proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _container_memory(root: Path) -> int | None:
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(_text(root, name))
    return None


def _address_space() -> int | None:
    with contextlib.suppress(ImportError, OSError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        return None if limit == resource.RLIM_INFINITY else limit
    return None


def _text(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="ascii")
