"""Finds AMD's GPUs and XDNA NPUs by what Linux says of them below ``/sys``; no tool of AMD's is needed.

A GPU is ``gpu:`` and its PCI address, an NPU ``npu:`` and its own. A GPU in compute partitions (CPX …) is not offered
as a whole: each partition is a device of its own, with ``-1``, ``-2`` … behind the address. ``rocm`` is said only of
GPUs that the kernel's compute driver (KFD) has, and that ROCm still supports; others have ``vulkan``.

Memory is what the card has, or what the firmware set aside for graphics in the processor. Where ROCm takes the system's
memory instead (SHARED_MEMORY), it is what the kernel lets it take, and ``unified_memory`` is true.

Attributes: ``pci_address``, ``pci_id``, ``driver``, ``driver_version``, for GPUs also ``gfx`` (the target that programs
are built for), ``compute_units``, ``unified_memory``, ``rocm_reason`` (why there is no ``rocm``) and for partitions
``parent``. What the kernel does not tell is left out; serial numbers (``unique_id``) are not even read.

``[plugins.amd]``: ``root`` is the folder where ``sys``, ``dev`` and ``usr`` are looked for (``/``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rma_core import ContainerAccess, Detection, Device, PluginConfig, hookimpl, sysfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
KFD_NODES = "sys/class/kfd/kfd/topology/nodes"
KFD = "dev/kfd"

GPU_VENDOR, NPU_VENDOR = "0x1002", "0x1022"
#: Display controllers, and what Instinct cards of the MI300 family call themselves: processing accelerators.
GPU_CLASSES = ("0x03", "0x12")
NPUS = {"0x1502": "AMD XDNA NPU", "0x17f0": "AMD XDNA 2 NPU"}
DRIVERS = {"gpu": "amdgpu", "npu": "amdxdna"}
#: Drivers that hold a card for virtual machines.
LENDERS = frozenset({"vfio-pci", "pci-stub", "xen-pciback", "gim"})
#: Targets whose ROCm takes system memory (AMD: "RDNA3.5 system optimization"). Elsewhere KFD offers it as well, since
#: Linux 6.10, but to processors with graphics that ROCm does not support: those have what the firmware set aside.
SHARED_MEMORY = frozenset({"gfx1150", "gfx1151", "gfx1152"})
#: Older ones (gfx803: RX 580) are in KFD, and ROCm has no libraries for them any more.
OLDEST_ROCM = 9
#: Kinds of KFD memory banks that are the GPU's own: visible to the processor, and not.
GPU_BANKS = ("1", "2")

#: Where names of cards are written down by device and revision.
AMDGPU_IDS = ("usr/share/libdrm/amdgpu.ids", "opt/amdgpu/share/libdrm/amdgpu.ids")
#: More of such a list is not read: the longest has some 50 KB.
MOST_LIST_BYTES = 1024 * 1024
MOST_REASON = 480
#: So many addresses are named where many cards have one trouble.
MOST_NAMED = 8

NO_DRIVER = {
    "gpu": "no driver has it: run `sudo modprobe amdgpu`; if `sudo dmesg | grep amdgpu` then complains, install "
    "linux-firmware and a newer kernel",
    "npu": "no driver has it: run `sudo modprobe amdxdna` (Linux 6.14 or newer)",
}
LENT = "it is given to virtual machines"
LENT_BY = LENT + " (driver {driver}): bind it to {own} to use it here"
GRAPHICS_ONLY = "radeon drives it, which is for graphics alone"
RADEON = GRAPHICS_ONLY + (
    "; cards from 2012 on can do with amdgpu (boot with radeon.si_support=0 radeon.cik_support=0 amdgpu.si_support=1 "
    "amdgpu.cik_support=1)"
)
OTHER_DRIVER = "its driver is {driver}, and only {own} makes it usable: blacklist the one and load the other"
NOT_STARTED = "{own} has it but did not start it: `sudo dmesg | grep {own}` says why (often missing firmware)"
NO_NODE = "{nodes} is not here: in a container, start that with `--device` for /dev/kfd, /dev/dri and /dev/accel"
NO_ACCESS = (
    "this user may not open {nodes}: run `sudo usermod -aG render USER` (`ls -l` shows the group; on some systems it "
    "is video), then log in again or restart the agent's service"
)
NO_MEMORY = "it reports no memory: power this machine off and on; `sudo dmesg | grep amdgpu` says more"
SILENT = "the driver does not tell its memory"
NOT_IN_KFD = (
    "the kernel's compute driver passes it over: `sudo dmesg | grep kfd` says why (often a slot without PCIe atomics)"
)
TOO_OLD = "ROCm no longer supports {gfx}"

Facts = dict[str, bool | int | float | str | list[str] | None]


class Unusable(Exception):
    """A device is there and cannot be used; says why and what to do, to go on after "AMD GPU at 0000:03:00.0: "."""


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    """Return AMD's GPUs and NPUs of this machine."""
    return detect(Path(str(config.get("root", "/"))))


def detect(root: Path, *, allowed: Callable[[Path], bool] = sysfs.may_open) -> Detection:
    """Return what Linux tells; ``root`` is where ``/sys``, ``/dev`` and ``/usr`` are looked for."""
    slots = [slot for slot in sysfs.pci_devices(root) if kind_of(slot)]
    if not slots:
        return Detection.undetected("no AMD GPU or NPU on the PCI bus (/sys/bus/pci/devices)")
    nodes = kfd_nodes(root, slots)
    devices: list[Device] = []
    troubles: dict[tuple[str, str], list[str]] = {}
    for slot in slots:
        try:
            devices += Machine(root, allowed).devices(slot, nodes.get(slot.address, []))
        except Unusable as trouble:
            if sysfs.read_text(slot.folder / "vendor"):  # else it was pulled out while we looked
                troubles.setdefault((kind_of(slot), str(trouble)), []).append(slot.address)
    return answer(devices, troubles)


def answer(devices: list[Device], troubles: Mapping[tuple[str, str], list[str]]) -> Detection:
    """Return the detection.

    An old card that shows the screen is no fault, and neither is one lent away beside one that works: that is meant.
    """
    words = [
        f"AMD {kind.upper()} at {', '.join(where[:MOST_NAMED])}{' …' if len(where) > MOST_NAMED else ''}: {why}"
        for (kind, why), where in troubles.items()
    ]
    reason = "; ".join(words)[:MOST_REASON]
    if not devices and not reason:
        return Detection.undetected("the AMD GPU or NPU that was here is gone")
    if devices and all(why.startswith((LENT, GRAPHICS_ONLY)) for _, why in troubles):
        return Detection.healthy(devices, reason=reason)
    if all(why.startswith(GRAPHICS_ONLY) for _, why in troubles):
        return Detection.undetected(reason)
    return Detection.unhealthy(f"{reason} ({len(devices)} usable)" if devices else reason, devices=devices)


def kind_of(slot: sysfs.PciDevice) -> str:
    """Return ``gpu`` or ``npu`` for one of AMD's; nothing for what else is on the bus, and for virtual functions."""
    if slot.vendor == GPU_VENDOR and slot.class_code.startswith(GPU_CLASSES):
        kind = "gpu"
    else:
        kind = "npu" if slot.vendor == NPU_VENDOR and slot.device in NPUS else ""
    return "" if slot.is_virtual else kind


# What KFD tells


class Node(NamedTuple):
    """One GPU, or partition of one, that the kernel's compute driver has."""

    gfx: str
    major: int
    compute_units: int | None
    memory_bytes: int
    render: str


def kfd_nodes(root: Path, slots: Iterable[sysfs.PciDevice]) -> dict[str, list[Node]]:
    """Return KFD's nodes by the PCI address of their GPU.

    A partition's number stands where the PCI function would be (or from bit 28 on, where it is passed over), so
    function 0 gets what no other GPU has.
    """
    known = {slot.address for slot in slots}
    found: dict[str, list[Node]] = {}
    for name in sorted(sysfs.list_names(root / KFD_NODES), key=lambda name: (len(name), name)):
        folder = root / KFD_NODES / name
        facts = properties(folder / "properties")
        place = sysfs.whole_number(facts.get("location_id"))
        version = sysfs.whole_number(facts.get("gfx_target_version"))
        if not version or place is None or not sysfs.whole_number(facts.get("simd_count")):
            continue
        slot = f"{sysfs.whole_number(facts.get('domain')) or 0:04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}"
        exact = f"{slot}.{place & 7}"
        found.setdefault(exact if exact in known else f"{slot}.0", []).append(node_of(folder, facts, version))
    return found


def node_of(folder: Path, facts: Mapping[str, str], version: int) -> Node:
    """Return a node of KFD's topology; ``version`` is its target in decimal, 90402 for gfx942."""
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    banks = [properties(folder / "mem_banks" / name / "properties") for name in sysfs.list_names(folder / "mem_banks")]
    own = [sysfs.whole_number(bank.get("size_in_bytes")) or 0 for bank in banks if bank.get("heap_type") in GPU_BANKS]
    simds, per_unit = sysfs.whole_number(facts.get("simd_count")), sysfs.whole_number(facts.get("simd_per_cu"))
    return Node(
        gfx=f"gfx{major}{minor:x}{step:x}",
        major=major,
        compute_units=simds // per_unit if simds and per_unit else None,
        memory_bytes=sum(own),
        render=f"renderD{sysfs.whole_number(facts.get('drm_render_minor')) or 0}",
    )


# What can be used, and how


class Machine(NamedTuple):
    """Where things are looked for, and whether a device node may be opened."""

    root: Path
    allowed: Callable[[Path], bool]

    def devices(self, slot: sysfs.PciDevice, nodes: list[Node]) -> list[Device]:
        """Return one device, or one for each partition. Raises Unusable."""
        own = DRIVERS[kind_of(slot)]
        if not slot.driver:
            raise Unusable(NO_DRIVER[kind_of(slot)])
        if slot.driver != own:
            words = LENT_BY if slot.driver in LENDERS else RADEON if slot.driver == "radeon" else OTHER_DRIVER
            raise Unusable(words.format(driver=slot.driver, own=own))
        if kind_of(slot) == "npu":
            return [self.npu(slot)]
        if len(nodes) > 1:
            return [self.gpu(slot, node, part=part) for part, node in enumerate(nodes, start=1)]
        return [self.gpu(slot, nodes[0] if nodes else None)]

    def npu(self, slot: sysfs.PciDevice) -> Device:
        """Return an NPU. Raises Unusable."""
        accel = next((name for name in sysfs.list_names(slot.folder / "accel") if name.startswith("accel")), "")
        return Device(
            id=f"npu:{slot.address}",
            kind="npu",
            name=NPUS[slot.device],
            vendor="AMD",
            attributes=self.facts(slot),
            access=self.access(slot, f"dev/accel/{accel}" if accel else ""),
        )

    def gpu(self, slot: sysfs.PciDevice, node: Node | None, *, part: int = 0) -> Device:
        """Return a GPU, or the ``part``-th partition of one. Raises Unusable."""
        rocm = node is not None and node.major >= OLDEST_ROCM
        render = node.render if node and part else next(iter(renders(slot.folder)), "")
        access = self.access(slot, *((KFD,) if rocm else ()), f"dev/dri/{render}" if render else "")
        memory, unified = memory_of(slot, node, part=part)
        if memory == 0:
            raise Unusable(NO_MEMORY)
        without = TOO_OLD.format(gfx=node.gfx) if node else NOT_IN_KFD
        facts = {
            "gfx": node and node.gfx,
            "compute_units": node and node.compute_units,
            "unified_memory": unified,
            "parent": f"gpu:{slot.address}" if part else None,
            "rocm_reason": None if rocm else without,
        }
        return Device(
            id=f"gpu:{slot.address}{f'-{part}' if part else ''}",
            kind="gpu",
            name=self.name(slot),
            vendor="AMD",
            api="rocm" if rocm else "vulkan",
            memory_bytes=memory,
            reason="" if memory else SILENT,
            attributes={**self.facts(slot), **{key: value for key, value in facts.items() if value is not None}},
            access=access,
        )

    def access(self, slot: sysfs.PciDevice, *nodes: str) -> ContainerAccess:
        """Return the way in, by device nodes. Raises Unusable when there is none, or it is closed."""
        if not all(nodes):
            raise Unusable(NOT_STARTED.format(own=slot.driver))
        # Named by kind, so that eight cards with one trouble make one sentence.
        kinds = {KFD: "/dev/kfd", "dev/dri": "/dev/dri/renderD*", "dev/accel": "/dev/accel/accel*"}

        def told(names: Iterable[str]) -> str:
            return " and ".join(kinds.get(name, kinds.get(name.rpartition("/")[0], name)) for name in names)

        if missing := [name for name in nodes if not sysfs.exists(self.root / name)]:
            raise Unusable(NO_NODE.format(nodes=told(missing)))
        if closed := [name for name in nodes if not self.allowed(self.root / name)]:
            raise Unusable(NO_ACCESS.format(nodes=told(closed)))
        return ContainerAccess(device_nodes=tuple(f"/{name}" for name in nodes))

    def facts(self, slot: sysfs.PciDevice) -> Facts:
        """Return what is told of every device."""
        version = sysfs.printable(sysfs.read_text(self.root / "sys/module" / slot.driver / "version"))
        return {
            "pci_address": slot.address,
            "pci_id": slot.pci_id,
            "driver": slot.driver,
            **({"driver_version": version} if version else {}),
        }

    def name(self, slot: sysfs.PciDevice) -> str:
        """Return what the card calls itself (servers do), or what libdrm's list or that of PCI ids calls it."""
        own = sysfs.printable(sysfs.read_text(slot.folder / "product_name"))
        revision = sysfs.read_text(slot.folder / "revision").removeprefix("0x")
        named = own or self.by_revision(slot.device.removeprefix("0x"), revision)
        named = named or sysfs.pci_name(self.root, slot.vendor, slot.device)
        if not named:
            return f"AMD GPU {slot.device.removeprefix('0x')}"
        return named if named.startswith("AMD") else f"AMD {named}"

    def by_revision(self, device: str, revision: str) -> str:
        """Return the name in libdrm's list: ``744C, C8, AMD Radeon RX 7900 XTX``."""
        sought = (device.lower(), revision.lower())
        for path in AMDGPU_IDS:
            for line in sysfs.read_text(self.root / path, most_bytes=MOST_LIST_BYTES).splitlines():
                parts = [part.strip() for part in line.split(",", 2)]
                if len(parts) == 3 and (parts[0].lower(), parts[1].lower()) == sought:  # noqa: PLR2004 - id, revision, name
                    return sysfs.printable(parts[2])
        return ""


def memory_of(slot: sysfs.PciDevice, node: Node | None, *, part: int) -> tuple[int | None, bool]:
    """Return the bytes that a GPU can use, ``None`` where nobody tells, and whether they are the system's."""
    own = sysfs.read_int(slot.folder / "mem_info_vram_total")
    offered = node.memory_bytes if node else 0
    if part:
        return offered or None, False
    if node and node.gfx in SHARED_MEMORY and offered > (own or 0):
        return offered, True
    return own, False


def renders(folder: Path) -> list[str]:
    """Return the render nodes of a PCI device."""
    return [name for name in sysfs.list_names(folder / "drm") if name.startswith("renderD")]


def properties(path: Path) -> dict[str, str]:
    """Return KFD's ``name value`` lines as a mapping."""
    pairs = (line.partition(" ") for line in sysfs.read_text(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}
