"""Whether this is a whole machine: which hypervisor, which container, in the words of ``systemd-detect-virt``.

Everything is read below a root folder, so that a recorded machine reads like the real one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rma_core import sysfs
from rma_core.builtin import limits

if TYPE_CHECKING:
    from pathlib import Path

#: What makers of virtual machines write where a board's maker and model stand, and whose machines they are.
_BOARDS = (
    (r"kvm|ovirt|rhev|openstack|nutanix|droplet|hetzner|scaleway|vultr|linode|upcloud", "kvm"),
    (r"qemu|bochs", "qemu"),
    (r"vmware", "vmware"),
    (r"virtualbox|innotek", "oracle"),
    (r"parallels", "parallels"),
    (r"bhyve", "bhyve"),
    (r"apple virtualization|virtualmac", "apple"),
    (r"google compute engine", "google"),
    (r"amazon ec2(?!.*\.metal)", "amazon"),
    (r"alibaba cloud ecs", "kvm"),
    (r"microsoft corporation.*virtual machine", "microsoft"),
    (r"hvm domu|\bxen\b", "xen"),
    (r"linux,dummy-virt", "kvm"),
)
#: A guest's clock names its host where firmware is silent (microVMs have no DMI).
_CLOCKS = (("kvm-clock", "kvm"), ("hyperv", "microsoft"), ("xen", "xen"))
#: Words in cgroup paths of processes in containers.
_CGROUPS = (
    ("kubepods", "kubernetes"),
    ("libpod", "podman"),
    ("/docker", "docker"),
    ("docker-", "docker"),
    ("/lxc", "lxc"),
    ("lxc.payload", "lxc"),
    ("/machine.slice/machine-", "systemd-nspawn"),
    ("containerd", "containerd"),
)


def hypervisor(root: Path, *, flagged: bool) -> str:
    """Return the hypervisor below this machine, or an empty string on bare metal.

    ``flagged``: the processor says that there is one; then a nameless one is ``vm-other``.
    """
    if "control_d" in _read(root / "proc/xen/capabilities"):
        return ""
    named = from_board(board(root)) or ("xen" if _read(root / "sys/hypervisor/type").startswith("xen") else "")
    if named or not flagged:
        return named
    if wsl(root):
        return "microsoft"
    clocks = _read(root / "sys/devices/system/clocksource/clocksource0/available_clocksource")
    return next((name for word, name in _CLOCKS if word in clocks), "vm-other")


def board(root: Path) -> str:
    """Return who made the machine and what they call it (DMI or device tree), or an empty string."""
    dmi = root / "sys/class/dmi/id"
    words = [_read(dmi / name) for name in ("sys_vendor", "product_name")]
    words = [word for word in words if word and word.lower() not in {"to be filled by o.e.m.", "system product name"}]
    return " ".join(words) or _read(root / "proc/device-tree/model") or _read(root / "proc/device-tree/compatible")


def from_board(name: str) -> str:
    """Return the hypervisor that a board's maker and model betray, or an empty string."""
    return next((word for pattern, word in _BOARDS if re.search(pattern, name.lower())), "")


def container(root: Path) -> str:
    """Return what contains this process (``docker``, ``podman``, ``kubernetes``, ``lxc`` …), or an empty string."""
    if sysfs.exists(root / "var/run/secrets/kubernetes.io") or sysfs.exists(root / "run/secrets/kubernetes.io"):
        return "kubernetes"
    paths = " ".join(limits.process_paths(root))
    by_path = next((name for word, name in _CGROUPS if word in paths), "")
    if by_path == "kubernetes":
        return by_path
    if sysfs.exists(root / "run/.containerenv"):
        return "podman"
    if sysfs.exists(root / ".dockerenv"):
        return "docker"
    return by_path or _read(root / "run/systemd/container")


def wsl(root: Path) -> bool:
    """Whether this is Windows' subsystem for Linux."""
    release = _read(root / "proc/sys/kernel/osrelease").lower()
    return "microsoft" in release or "wsl" in release


def summary(*, hypervisor: str, container: str, wsl: bool) -> str:
    """Return one word for both, the innermost first: ``container:docker``, ``wsl``, ``kvm`` or an empty string."""
    return f"container:{container}" if container else "wsl" if wsl else hypervisor


def _read(path: Path) -> str:
    """Return a file's first 4 KiB without the NULs of the device tree; what cannot be read says nothing."""
    return sysfs.read_text(path, most_bytes=4096).replace("\0", " ").strip()
