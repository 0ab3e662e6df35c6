"""What the cgroup or container that this process runs in grants of the machine: v1, v2 and hybrid, every ancestor.

Everything is read below a root folder, so that a recorded machine reads like the real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rma_core import sysfs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Version 1 says "no limit" with the largest multiple of the page size; nothing real comes near it.
NO_LIMIT_BYTES = 2**60
#: More of a file is not read: where many containers run, the list of mounts is long.
MOST_BYTES = 8 * 1024 * 1024
#: Limits are 64-bit numbers.
MAX_DIGITS = 20
#: No machine has more; a longer list is not one of CPUs.
MAX_CPU = 65_535

Number = TypeVar("Number", int, float)

_V2 = "cgroup2"
_CONTROLLERS = ("cpu", "cpuset", "memory", "pids")


class CgroupLimits(NamedTuple):
    """The tightest limit on the way from this process's cgroup to the root; ``None`` where nothing limits.

    ``cpus`` is a quota in CPUs (2.5), ``cpuset`` the numbers of the CPUs it may run on, ``available_bytes`` what
    may still be allocated before some cgroup on the way is full.
    """

    cpus: float | None = None
    cpuset: frozenset[int] | None = None
    memory_bytes: int | None = None
    available_bytes: int | None = None
    pids: int | None = None


class _Mount(NamedTuple):
    """One mounted hierarchy: which controllers, which part of it (``root``), and where."""

    controllers: tuple[str, ...]
    root: str
    point: str


def read(root: Path = Path("/")) -> CgroupLimits:
    """Return the limits of the calling process; no cgroups, or none that can be read, are no limits."""
    mounts = list(_mounts(_text(root / "proc/self/mountinfo")))
    paths = _paths(_text(root / "proc/self/cgroup"))
    levels = {name: _levels(root, name, mounts, paths) for name in (*_CONTROLLERS, _V2)}
    memory = [found for folder in levels["memory"] + levels[_V2] if (found := _memory(folder))]
    return CgroupLimits(
        cpus=_least(map(_quota, levels["cpu"] + levels[_V2])),
        cpuset=_common(map(_cpuset, levels["cpuset"] + levels[_V2])),
        memory_bytes=_least(limit for limit, _ in memory),
        available_bytes=_least(available for _, available in memory),
        pids=_least(_number(folder / "pids.max") for folder in levels["pids"] + levels[_V2]),
    )


def cpu_list(text: str) -> frozenset[int]:
    """Return the CPUs in a list such as ``0-3,8``; what is not one gives an empty set."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        start, end = _int(first), _int(last or first)
        if start is None or end is None or end > MAX_CPU:
            return frozenset()
        cpus.update(range(start, end + 1))
    return frozenset(cpus)


def process_paths(root: Path = Path("/")) -> tuple[str, ...]:
    """Return the cgroup paths of the calling process; they often name what runs it (``/docker/8c2f…``)."""
    return tuple(sorted(set(_paths(_text(root / "proc/self/cgroup")).values())))


def _text(path: Path) -> str:
    """Return a file's text; one that is absent or may not be read says nothing."""
    return sysfs.read_text(path, most_bytes=MOST_BYTES)


def _paths(text: str) -> dict[str, str]:
    """Return controller → cgroup path from ``/proc/self/cgroup``; version 2 stands under ``cgroup2``."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon:
            paths.update(dict.fromkeys(controllers.split(",") if controllers else [_V2], path))
    return paths


def _mounts(text: str) -> Iterator[_Mount]:
    """Read the cgroup mounts of ``/proc/self/mountinfo``."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if len(place) < 5 or not kind or kind[0] not in {"cgroup", _V2}:  # noqa: PLR2004 - root and mount point are the 4th and 5th field
            continue
        controllers = (_V2,) if kind[0] == _V2 else tuple(kind[-1].split(","))
        yield _Mount(controllers, _unescape(place[3]), _unescape(place[4]))


def _unescape(path: str) -> str:
    """Mountinfo writes blanks and backslashes as three octal digits."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(octal, character)
    return path


def _levels(root: Path, controller: str, mounts: list[_Mount], paths: dict[str, str]) -> list[Path]:
    """Return the folders of one controller from the process's own cgroup up to what is mounted."""
    path = paths.get(controller)
    candidates = [mount for mount in mounts if controller in mount.controllers]
    if path is None or not candidates:
        return []
    mount, below = min(((m, _below(m.root, path)) for m in candidates), key=lambda found: found[1] is None)
    top = root / mount.point.lstrip("/")
    folder = top / (below or "")
    # A container may see its own path in the host's words, while only its own part is mounted: climb to what is there.
    return [level for level in (folder, *folder.parents) if level.is_relative_to(top) and _is_folder(level)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _below(mounted: str, path: str) -> str | None:
    """Return ``path`` relative to what is mounted; ``None`` when it lies elsewhere (another cgroup namespace)."""
    if ".." in path.split("/"):
        return None
    mounted = mounted.rstrip("/")
    inside = path == mounted or path.startswith(mounted + "/")
    return path[len(mounted) :].strip("/") if inside else None


def _number(path: Path) -> int | None:
    """Return the number in a limit file; ``max``, -1, an absent or a strange one is no limit."""
    number = _int(_text(path))
    return number if number is not None and number < NO_LIMIT_BYTES else None


def _int(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else None


def _quota(folder: Path) -> float | None:
    """Return a level's CPU quota in CPUs (v2 ``cpu.max``, else v1 ``cpu.cfs_quota_us``)."""
    words = _text(folder / "cpu.max").split() or [
        _text(folder / "cpu.cfs_quota_us").strip(),
        _text(folder / "cpu.cfs_period_us").strip(),
    ]
    quota, period = [*map(_int, words), None, None][:2]
    return quota / period if quota and period else None


def _cpuset(folder: Path) -> frozenset[int] | None:
    """Return the CPUs that a level may use; an empty list means "as above"."""
    names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
    return next((cpus for name in names if (cpus := cpu_list(_text(folder / name)))), None)


def _memory(folder: Path) -> tuple[int, int] | None:
    """Return a level's memory limit and what of it is still available, in bytes.

    ``memory.high`` counts as a limit: what grows beyond it is throttled until it stands still.
    """
    stat = _stat(folder / "memory.stat")
    files = ("memory.max", "memory.high", "memory.limit_in_bytes")
    # Version 1 knows here about ancestors that are not mounted in the container.
    above = stat.get("hierarchical_memory_limit", NO_LIMIT_BYTES)
    limit = _least([*(_number(folder / name) for name in files), above if above < NO_LIMIT_BYTES else None])
    if limit is None:
        return None
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    # The page cache that nobody used lately is given back before anything fails.
    reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return limit, min(limit, max(0, limit - max(0, used - reclaimable)))


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {words[0]: number for words in pairs if words and (number := _int(words[-1])) is not None}


def _least(values: Iterable[Number | None]) -> Number | None:
    return min((value for value in values if value is not None), default=None)


def _common(sets: Iterable[frozenset[int] | None]) -> frozenset[int] | None:
    """Return the CPUs that are in every set; sets that contradict each other say nothing."""
    known = [cpus for cpus in sets if cpus]
    return frozenset.intersection(*known) or None if known else None
