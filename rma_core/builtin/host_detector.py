"""The machine itself: operating system, processor, memory, and the storage where containers would live.

What a container, a cgroup or a virtual machine grants is what counts, not what the hardware below has. A fact that
cannot be read is left out; only memory that cannot be read at all makes the answer unhealthy.
"""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rma_core import Detection, Device, hookimpl
from rma_core.builtin import cpu_facts, cpuid, host_storage, limits, virtual

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rma_core import PluginConfig

T = TypeVar("T")

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: macOS answers in milliseconds; a tool that hangs must not take the detector's deadline with it.
TOOL_TIMEOUT_S = 3.0
#: Names of architectures as kernels and Windows say them, and as container images do.
ARCHITECTURES = {
    "amd64": "x86_64",
    "x64": "x86_64",
    "aarch64": "arm64",
    "armv8l": "armv7l",
    "armv8b": "armv7l",
    "i386": "x86",
    "i586": "x86",
    "i686": "x86",
}
GIB = 2**30


class Readings(NamedTuple):
    """What Python and psutil say of this machine, before limits; ``None`` where they do not know."""

    system: str
    kernel: str
    machine: str
    os_version: str
    pointer_bytes: int = 8
    logical_cpus: int | None = None
    physical_cores: int | None = None
    affinity: frozenset[int] | None = None
    max_mhz: float | None = None
    memory_bytes: int | None = None
    available_bytes: int | None = None
    swap_bytes: int | None = None
    battery_percent: float | None = None
    on_battery: bool | None = None
    cpu: cpu_facts.CpuFacts = cpu_facts.CpuFacts()


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    """Describe this machine; ``storage_path`` in ``config`` names where containers live when no default is right."""
    return detect(read(), limits.read(), Path("/"), storage=host_storage.find(config.get("storage_path")))


def detect(
    found: Readings, granted: limits.CgroupLimits, root: Path, *, storage: host_storage.Storage | None
) -> Detection:
    """Return the devices of a machine of which everything is known: pure but for files below ``root``."""
    below = virtual.hypervisor(root, flagged=found.cpu.hypervisor) if found.system == "linux" else _foreign(found)
    cpu = _cpu(found, granted, in_vm=bool(below))
    memory = _memory(found, granted)
    sentence = _limited_by(found, cpu, memory)
    devices = [_host(found, granted, root, hypervisor=below, limited_by=sentence), cpu]
    devices += [memory] if memory else []
    devices += [_storage(storage)] if storage else []
    missing = [words for words, there in (("the memory size", memory), ("free storage", storage)) if not there]
    if missing:
        reason = f"this system did not say {' and '.join(missing)}: run `rma doctor`, and as a user who may read it"
        return Detection.unhealthy(reason, devices=devices)
    return Detection.healthy(devices)


def read(root: Path = Path("/")) -> Readings:
    """Ask this machine; every question that fails leaves its answer out."""
    import psutil

    system = platform.system().lower()
    tool = _sysctl() if system == "darwin" else {}
    memory = _ask(psutil.virtual_memory)
    battery = _ask(psutil.sensors_battery) if hasattr(psutil, "sensors_battery") else None
    swap = _ask(psutil.swap_memory)
    return Readings(
        system=system,
        kernel=platform.release(),
        machine="arm64" if tool.get("hw.optional.arm64") == "1" else platform.machine(),
        os_version=_os_version(system, root),
        pointer_bytes=struct.calcsize("P"),
        logical_cpus=_ask(psutil.cpu_count) or os.cpu_count(),
        physical_cores=_ask(lambda: psutil.cpu_count(logical=False)),
        affinity=_affinity(),
        max_mhz=_max_mhz(system, root),
        memory_bytes=memory.total if memory else None,
        available_bytes=memory.available if memory else None,
        swap_bytes=swap.total if swap else None,
        battery_percent=battery.percent if battery else None,
        on_battery=None if battery is None or battery.power_plugged is None else not battery.power_plugged,
        cpu=_cpu_facts(system, root, tool),
    )


def architecture(machine: str, *, pointer_bytes: int = 8) -> str:
    """Return the architecture whose programs run here: a 64-bit kernel may carry a 32-bit system (Raspberry Pi OS)."""
    name = ARCHITECTURES.get(machine.lower(), machine.lower()) or "unknown"
    narrow = {"arm64": "armv7l", "x86_64": "x86"}
    return narrow.get(name, name) if pointer_bytes == 4 else name  # noqa: PLR2004 - 32 bits


def _host(found: Readings, granted: limits.CgroupLimits, root: Path, *, hypervisor: str, limited_by: str) -> Device:
    linux = found.system == "linux"
    container = virtual.container(root) if linux else ""
    facts: dict[str, bool | int | float | str | list[str] | None] = {
        "os": found.system,
        "os_version": found.os_version,
        "kernel": found.kernel,
        "architecture": architecture(found.machine, pointer_bytes=found.pointer_bytes),
        "virtual": virtual.summary(hypervisor=hypervisor, container=container, wsl=linux and virtual.wsl(root)),
        "hypervisor": hypervisor,
        "on_battery": found.on_battery,
    }
    optional = {
        "battery_percent": found.battery_percent,
        "model": (found.cpu.board or (virtual.board(root) if linux else ""))[:200],
        "limited_by": limited_by,
        "pids_limit": granted.pids,
    }
    facts |= {name: value for name, value in optional.items() if value not in {None, ""}}
    return Device(id="host", kind="host", name=(found.os_version or found.system or "unknown")[:200], attributes=facts)


def _foreign(found: Readings) -> str:
    """Return the hypervisor below macOS or Windows.

    Windows with Hyper-V runs on it itself, so that there only the board tells a guest from its host.
    """
    return virtual.from_board(found.cpu.board) or (
        "vm-other" if found.cpu.hypervisor and found.system == "darwin" else ""
    )


def _cpu(found: Readings, granted: limits.CgroupLimits, *, in_vm: bool) -> Device:
    """Physical cores count; in a virtual machine or under a limit, the CPUs granted (2.5 are 2, but 0.5 is 1)."""
    logical = max(1, found.logical_cpus or 1)
    sets = [cpus for cpus in (found.affinity, granted.cpuset) if cpus]
    usable = len(frozenset.intersection(*sets)) if sets else 0
    share = float(min([logical, *([usable] if usable else []), *([granted.cpus] if granted.cpus else [])]))
    physical = logical if in_vm or not found.physical_cores else min(found.physical_cores, logical)
    name = architecture(found.machine, pointer_bytes=found.pointer_bytes)
    attributes: dict[str, bool | int | float | str | list[str] | None] = {
        "cores": max(1, min(physical, int(share))),
        "logical_cpus": logical,
        "granted_cpus": round(share, 2),
        "instruction_sets": list(found.cpu.instruction_sets),
    }
    if granted.cpus is not None and granted.cpus < logical:
        attributes["cpu_quota"] = round(granted.cpus, 2)
    if found.max_mhz:
        attributes["max_mhz"] = round(found.max_mhz)
    return Device(
        id="cpu",
        kind="cpu",
        name=found.cpu.name or name,
        vendor=found.cpu.vendor,
        api="cpu",
        attributes=attributes,
    )


def _memory(found: Readings, granted: limits.CgroupLimits) -> Device | None:
    if not found.memory_bytes:
        return None
    total = min(found.memory_bytes, granted.memory_bytes or found.memory_bytes)
    free = [size for size in (found.available_bytes, granted.available_bytes) if size is not None]
    return Device(
        id="memory",
        kind="memory",
        name="memory",
        memory_bytes=total,
        attributes={
            "available_bytes": max(0, min([total, *free])),
            "physical_bytes": found.memory_bytes,
            "swap_bytes": found.swap_bytes,
        },
    )


def _storage(storage: host_storage.Storage) -> Device:
    """The path is left out: it may carry its owner's name."""
    return Device(
        id="storage",
        kind="storage",
        name=f"storage of {storage.place}",
        memory_bytes=storage.free_bytes,
        attributes={"place": storage.place, "total_bytes": storage.total_bytes, "filesystem": storage.filesystem},
    )


def _limited_by(found: Readings, cpu: Device, memory: Device | None) -> str:
    """Say what is granted when it is less than what is there."""
    parts = []
    granted, logical = cpu.attributes["granted_cpus"], cpu.attributes["logical_cpus"]
    if granted != logical:
        parts.append(f"{granted:g} of {logical} CPUs")
    if memory and found.memory_bytes and (memory.memory_bytes or 0) < found.memory_bytes:
        parts.append(f"{(memory.memory_bytes or 0) / GIB:.1f} of {found.memory_bytes / GIB:.1f} GiB of memory")
    return f"the cgroup or container this runs in grants {' and '.join(parts)}" if parts else ""


def _ask(question: Callable[[], T]) -> T | None:
    """Return an answer, or ``None``: on odd machines psutil fails in whatever way the missing file makes it fail."""
    import psutil

    try:
        return question()
    except (OSError, RuntimeError, AttributeError, ValueError, LookupError, TypeError, psutil.Error):
        return None


def _affinity() -> frozenset[int] | None:
    if sys.platform == "linux":
        return _ask(lambda: frozenset(os.sched_getaffinity(0)))
    else:  # noqa: RET505 - mypy knows platforms by their branches
        return None


def _max_mhz(system: str, root: Path) -> float | None:
    """Linux' own files: psutil reads every core's current clock, which takes seconds on large machines."""
    import psutil

    if system == "linux":
        policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*/cpuinfo_max_freq"))
        khz = [value for policy in policies if (value := _ask(lambda path=policy: int(path.read_text())))]  # type: ignore[misc]
        return max(khz) / 1000 if khz else None
    frequency = _ask(psutil.cpu_freq)
    return frequency.max if frequency else None


def _cpu_facts(system: str, root: Path, tool: Mapping[str, str]) -> cpu_facts.CpuFacts:
    if system == "linux":
        text = _ask(lambda: (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        return cpu_facts.from_cpuinfo(text or "")
    return cpu_facts.from_sysctl(tool) if system == "darwin" else cpuid.read()._replace(board=cpuid.windows_board())


def _os_version(system: str, root: Path) -> str:
    if system == "linux":
        return os_release(_ask(lambda: (root / "etc/os-release").read_text(encoding="utf-8", errors="replace")) or "")
    if system == "darwin":
        return f"macOS {platform.mac_ver()[0]}".strip()
    return f"{platform.system()} {platform.release()} ({platform.version()})"


def os_release(text: str) -> str:
    """Return name and version from ``/etc/os-release``: ``Debian GNU/Linux 12``."""
    pairs = (line.partition("=") for line in text.splitlines())
    facts = {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}
    named = f"{facts.get('NAME', '')} {facts.get('VERSION_ID', '')}".strip()
    return (named or facts.get("PRETTY_NAME", "") or "Linux")[:200]


def _sysctl() -> dict[str, str]:
    """Ask macOS for all it says of the hardware, in one call."""
    command = ["sysctl", "hw", "machdep.cpu", "kern.hv_vmm_present"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    return sysctl(done.stdout)


def sysctl(text: str) -> dict[str, str]:
    """Return ``name: value`` lines as a mapping."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}
