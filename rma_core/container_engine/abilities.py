"""What an engine can give containers and limit them by, from what it says about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What can be limited, and the name under which an engine says so. Without ``swap``, the limit of memory is none: what
#: goes beyond it goes to the owner's disk.
LIMITS = {"memory": "MemoryLimit", "swap": "SwapLimit", "cpu": "CpuCfsQuota", "pids": "PidsLimit"}


def unusable(info: dict[str, Any], title: str) -> str:
    """Say why an engine that answers cannot run services; an empty string when it can."""
    if info.get("OSType", "linux") != "linux":
        return f"{title} runs Windows containers here: switch it to Linux containers (in {title} Desktop's menu)"
    return ""


def cannot_limit(info: dict[str, Any]) -> tuple[str, ...]:
    """Return what the engine cannot limit of a container (``memory``, ``swap``, ``cpu``, ``pids``)."""
    return tuple(what for what, name in LIMITS.items() if not info.get(name))


def warnings(info: dict[str, Any], title: str) -> Iterator[str]:
    """Say what this engine cannot keep containers from, in sentences for the machine's owner."""
    missing = cannot_limit(info)
    if missing:
        yield f"{title} cannot limit {', '.join(missing)} of containers here{_advice(info, missing)}"
    if not has_security(info, "seccomp"):
        yield f"{title} runs containers without seccomp here"


def _advice(info: dict[str, Any], missing: tuple[str, ...]) -> str:
    if has_security(info, "rootless"):
        if str(info.get("CgroupVersion") or "1") != "2":
            return " (without root this takes cgroup v2: boot with systemd.unified_cgroup_hierarchy=1)"
        delegated = ", ".join(what for what in missing if what != "swap") or "memory"
        return f" (without root this takes systemd: loginctl enable-linger, and {delegated} delegated to user@.service)"
    if "memory" in missing:
        return " (the kernel may need cgroup_enable=memory on its command line)"
    return " (the kernel may need swapaccount=1 on its command line)" if missing == ("swap",) else ""


def features(info: dict[str, Any]) -> Iterator[str]:
    """Say what containers can be given, and are limited by, in the words of `RuntimeHealth.features`."""
    yield from (f"limit:{what}" for what, name in LIMITS.items() if info.get(name))
    yield f"cgroup:v{info.get('CgroupVersion') or '1'}"
    yield from (
        f"security:{name}"
        for name in ("seccomp", "apparmor", "selinux", "userns", "rootless")
        if has_security(info, name)
    )
    if has_cdi(info):
        yield "gpu:cdi"
    if "nvidia" in (info.get("Runtimes") or {}):
        yield "gpu:nvidia"


def has_security(info: dict[str, Any], name: str) -> bool:
    """Tell whether a security option is on (``name=seccomp,profile=default``); an unconfined one is not."""
    options = [
        dict(word.partition("=")[::2] for word in option.split(",")) for option in info.get("SecurityOptions") or ()
    ]
    return any(option.get("name") == name and option.get("profile") != "unconfined" for option in options)


def has_cdi(info: dict[str, Any]) -> bool:
    """Tell whether CDI names work: newer engines list the devices they found, older ones only where they look."""
    found = info.get("DiscoveredDevices")
    return bool(info.get("CDISpecDirs")) if found is None else any(d.get("Source") == "cdi" for d in found)
