"""Finds Intel's GPUs and NPUs by what Linux says of them below ``/sys``; no tool of Intel's is needed.

A GPU is ``gpu:`` and its PCI address, an NPU ``npu:`` and its own. ``level_zero`` is said of GPUs that Intel's compute
runtime still supports (Tiger Lake and newer); older ones have no ``api``.

Memory is a card's own: xe writes it down below ``/sys``, and so does the i915 of Intel's packages; the kernel's i915 is
asked through the card's render node, for it writes it nowhere. Graphics in the processor have none: they use the
system's, which ``unified_memory`` says, and as the kernel sets no share for them there is no ``memory_bytes``.

Attributes: ``pci_address``, ``pci_id``, ``driver``, for GPUs also ``unified_memory``. What the kernel does not tell is
left out.

``[plugins.intel]``: ``root`` is the folder where ``sys``, ``dev`` and ``usr`` are looked for (``/``).
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rma_core import ContainerAccess, Detection, Device, PluginConfig, hookimpl, sysfs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
VENDOR = "0x8086"
GPU_CLASS = "0x03"
NPUS = {
    "0x7d1d": "Intel NPU (Meteor Lake)",
    "0xad1d": "Intel NPU (Arrow Lake)",
    "0x643e": "Intel NPU (Lunar Lake)",
    "0xb03e": "Intel NPU (Panther Lake)",
}
DRIVERS = {"gpu": ("i915", "xe"), "npu": ("intel_vpu",)}
#: Drivers that hold a card for virtual machines.
LENDERS = frozenset({"vfio-pci", "pci-stub", "xen-pciback"})
#: How device ids of cards begin: DG1, Alchemist and Flex, Max, Battlemage.
CARDS = ("0x49", "0x56", "0x0bd", "0xe2")
#: How ids begin that i915 drives and the compute runtime supports: cards, Tiger, Rocket, Alder, Raptor and Meteor Lake.
#: What xe drives is all supported.
LEVEL_ZERO = (*CARDS, "0x9a", "0x4c", "0x46", "0xa7", "0x7d")
#: No answer of a driver has more.
MOST_BYTES = 64 * 1024
MOST_REASON = 480
#: So many addresses are named where many cards have one trouble.
MOST_NAMED = 8

NO_DRIVER = {
    "gpu": "no driver has it: `sudo dmesg | grep -E 'i915|xe '` says why; this kernel may be older than the GPU "
    "(install a newer one), or its modules are missing (`sudo modprobe i915`)",
    "npu": "no driver has it: run `sudo modprobe intel_vpu`; if there is none, install a newer kernel",
}
LENT = "it is given to virtual machines"
LENT_BY = LENT + " (driver {driver}): bind it to {own} to use it here"
OTHER_DRIVER = "its driver is {driver}, which cannot compute: load {own}, if the GPU is not too old for that"
NOT_STARTED = "{own} has it but did not start it: `sudo dmesg | grep {own}` says why (often missing firmware)"
NO_NODE = "{nodes} is not here: in a container, start that with `--device /dev/dri --device /dev/accel`"
NO_ACCESS = (
    "this user may not open {nodes}: run `sudo usermod -aG render USER` (`ls -l` shows the group; on some systems it "
    "is video), then log in again or restart the agent's service"
)
SILENT = "the driver does not tell its memory: a newer kernel may"
SHARED = "it uses the system's memory"
TOO_OLD = "it is older than what Intel's compute runtime supports"

# The kernel's interface (include/uapi/drm/i915_drm.h): a query for memory regions answers with a header that begins
# with their number, and 88 bytes for each: class (1: the card's own) and instance, 4 bytes of nothing, size in bytes …
I915_QUERY, MEMORY_REGIONS = 0xC010_6479, 4
QUERY, ITEM = struct.Struct("=IIQ"), struct.Struct("=QiIQ")
HEADER_BYTES, REGION, REGION_BYTES, OWN_REGION = 16, struct.Struct("=HHIQ"), 88, 1
#: No card has more: an answer that says so is none.
MOST_MEMORY_BYTES = 2**50

Facts = dict[str, bool | int | float | str | list[str] | None]


class Unusable(Exception):
    """A device is there and cannot be used; says why and what to do, to go on after "Intel GPU at 0000:03:00.0: "."""


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    """Return Intel's GPUs and NPUs of this machine."""
    return detect(Path(str(config.get("root", "/"))))


def ask_i915(node: Path) -> bytes:
    """Return what i915 says of a card's memory regions; nothing when it says nothing."""
    import ctypes
    import fcntl

    def query(device: int, room: int, place: int) -> int:
        """Ask for the regions; returns the bytes that the answer takes."""
        item = ctypes.create_string_buffer(ITEM.pack(MEMORY_REGIONS, room, 0, place), ITEM.size)
        fcntl.ioctl(device, I915_QUERY, QUERY.pack(1, 0, ctypes.addressof(item)))
        return int(ITEM.unpack(item.raw)[1])

    try:
        device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        room = query(device, 0, 0)
        if not 0 < room <= MOST_BYTES:
            return b""
        answer = ctypes.create_string_buffer(room)
        return answer.raw if query(device, room, ctypes.addressof(answer)) == room else b""
    except OSError:
        return b""
    finally:
        os.close(device)


def region_bytes(told: bytes) -> int:
    """Return the card's own memory in what `ask_i915` gave; 0 when there is none."""
    count = int.from_bytes(told[:4], "little")
    places = range(HEADER_BYTES, len(told) - REGION_BYTES + 1, REGION_BYTES)
    regions = [REGION.unpack_from(told, place) for place in places[:count]]
    own = sum(size for kind, _, _, size in regions if kind == OWN_REGION)
    return own if own <= MOST_MEMORY_BYTES else 0


def detect(
    root: Path, *, allowed: Callable[[Path], bool] = sysfs.may_open, ask: Callable[[Path], bytes] = ask_i915
) -> Detection:
    """Return what Linux tells; ``root`` is where ``/sys``, ``/dev`` and ``/usr`` are looked for."""
    slots = [slot for slot in sysfs.pci_devices(root) if kind_of(slot)]
    if not slots:
        return Detection.undetected("no Intel GPU or NPU on the PCI bus (/sys/bus/pci/devices)")
    devices: list[Device] = []
    troubles: dict[tuple[str, str], list[str]] = {}
    for slot in slots:
        try:
            devices.append(Machine(root, allowed, ask).device(slot))
        except Unusable as trouble:
            if sysfs.read_text(slot.folder / "vendor"):  # else it was pulled out while we looked
                troubles.setdefault((kind_of(slot), str(trouble)), []).append(slot.address)
    return answer(devices, troubles)


def answer(devices: list[Device], troubles: Mapping[tuple[str, str], list[str]]) -> Detection:
    """Return the detection; a card that works beside one that is lent away is all that its owner wants."""
    words = [
        f"Intel {kind.upper()} at {', '.join(where[:MOST_NAMED])}{' …' if len(where) > MOST_NAMED else ''}: {why}"
        for (kind, why), where in troubles.items()
    ]
    reason = "; ".join(words)[:MOST_REASON]
    if not devices and not reason:
        return Detection.undetected("the Intel GPU or NPU that was here is gone")
    lent = all(why.startswith(LENT) for _, why in troubles)
    if devices and lent:
        return Detection.healthy(devices, reason=reason)
    return Detection.unhealthy(f"{reason} ({len(devices)} usable)" if devices else reason, devices=devices)


def kind_of(slot: sysfs.PciDevice) -> str:
    """Return ``gpu`` or ``npu`` for one of Intel's; nothing for what else is on the bus, and for virtual functions."""
    if slot.vendor != VENDOR or slot.is_virtual:
        return ""
    return "gpu" if slot.class_code.startswith(GPU_CLASS) else "npu" if slot.device in NPUS else ""


class Machine(NamedTuple):
    """Where things are looked for, whether a device node may be opened, and what i915 says of a card's memory."""

    root: Path
    allowed: Callable[[Path], bool]
    ask: Callable[[Path], bytes]

    def device(self, slot: sysfs.PciDevice) -> Device:
        """Return the GPU or NPU in a slot. Raises Unusable."""
        drivers = DRIVERS[kind_of(slot)]
        if not slot.driver:
            raise Unusable(NO_DRIVER[kind_of(slot)])
        if slot.driver not in drivers:
            words = LENT_BY if slot.driver in LENDERS else OTHER_DRIVER
            raise Unusable(words.format(driver=slot.driver, own=" or ".join(drivers)))
        return self.npu(slot) if kind_of(slot) == "npu" else self.gpu(slot)

    def npu(self, slot: sysfs.PciDevice) -> Device:
        """Return an NPU. Raises Unusable."""
        _, access = self.access(slot, "accel", "accel")
        return Device(
            id=f"npu:{slot.address}",
            kind="npu",
            name=NPUS[slot.device],
            vendor="Intel",
            attributes=facts(slot),
            access=access,
        )

    def gpu(self, slot: sysfs.PciDevice) -> Device:
        """Return a GPU. Raises Unusable."""
        node, access = self.access(slot, "drm", "renderD")
        memory = self.memory(slot, node)
        shared = not memory and not slot.device.startswith(CARDS)
        able = slot.driver == "xe" or slot.device.startswith(LEVEL_ZERO)
        reasons = ["" if memory else SHARED if shared else SILENT, "" if able else TOO_OLD]
        return Device(
            id=f"gpu:{slot.address}",
            kind="gpu",
            name=self.name(slot),
            vendor="Intel",
            api="level_zero" if able else None,
            memory_bytes=memory or None,
            reason="; ".join(filter(None, reasons)),
            attributes={**facts(slot), "unified_memory": shared},
            access=access,
        )

    def access(self, slot: sysfs.PciDevice, folder: str, begin: str) -> tuple[Path, ContainerAccess]:
        """Return the device node and the way in for containers. Raises Unusable when there is none, or it is closed."""
        name = next((name for name in sysfs.list_names(slot.folder / folder) if name.startswith(begin)), "")
        if not name:
            raise Unusable(NOT_STARTED.format(own=slot.driver))
        place = f"dev/{'dri' if folder == 'drm' else folder}"
        node, named = self.root / place / name, f"/{place}/{begin}*"
        if not sysfs.exists(node):
            raise Unusable(NO_NODE.format(nodes=named))
        if not self.allowed(node):
            raise Unusable(NO_ACCESS.format(nodes=named))
        return node, ContainerAccess(device_nodes=(f"/{place}/{name}",))

    def memory(self, slot: sysfs.PciDevice, node: Path) -> int:
        """Return the bytes of a card's own memory, 0 where there is none or nobody tells."""
        tiles = [slot.folder / name for name in sysfs.list_names(slot.folder) if re.fullmatch(r"tile[0-9]+", name)]
        written = sum(sysfs.read_int(tile / "physical_vram_size_bytes") or 0 for tile in tiles)
        for card in sysfs.list_names(slot.folder / "drm"):
            written = written or sysfs.read_int(slot.folder / "drm" / card / "lmem_total_bytes") or 0
        return written or (region_bytes(self.ask(node)) if slot.driver == "i915" else 0)

    def name(self, slot: sysfs.PciDevice) -> str:
        """Return what the list of PCI ids calls it."""
        named = sysfs.pci_name(self.root, slot.vendor, slot.device)
        if not named:
            return f"Intel GPU {slot.device.removeprefix('0x')}"
        return named if named.startswith("Intel") else f"Intel {named}"


def facts(slot: sysfs.PciDevice) -> Facts:
    """Return what is told of every device."""
    return {"pci_address": slot.address, "pci_id": slot.pci_id, "driver": slot.driver}
