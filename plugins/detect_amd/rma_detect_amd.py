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

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rma_core import ContainerAccess, Detection, Device, PluginConfig, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
BUS = "sys/bus/pci/devices"
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

#: Where names of cards are written down, the first by device and revision.
AMDGPU_IDS = ("usr/share/libdrm/amdgpu.ids", "opt/amdgpu/share/libdrm/amdgpu.ids")
PCI_IDS = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids")
#: More of a file is not read: one below /sys has a page, the largest list of names 1.5 MB.
MOST_BYTES, MOST_LIST_BYTES = 64 * 1024, 8 * 1024 * 1024
MOST_CHARACTERS, MOST_REASON = 100, 480
#: No card has more bytes, or more of anything: a number beyond is none.
MOST = 2**50
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


class Slot(NamedTuple):
    """One AMD device on the PCI bus."""

    folder: Path
    kind: str
    device: str
    driver: str

    @property
    def address(self) -> str:
        """Its place, as `lspci -D` has it."""
        return self.folder.name


class Unusable(Exception):
    """A device is there and cannot be used; says why and what to do, to go on after "AMD GPU at 0000:03:00.0: "."""


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    """Return AMD's GPUs and NPUs of this machine."""
    return detect(Path(str(config.get("root", "/"))))


def may_open(node: Path) -> bool:
    """Whether this user may use a device node."""
    return os.access(node, os.R_OK | os.W_OK)


def detect(root: Path, *, allowed: Callable[[Path], bool] = may_open) -> Detection:
    """Return what Linux tells; ``root`` is where ``/sys``, ``/dev`` and ``/usr`` are looked for."""
    slots = [slot for name in listed(root / BUS) if (slot := slot_of(root / BUS / name))]
    if not slots:
        return Detection.undetected(f"no AMD GPU or NPU on the PCI bus (/{BUS})")
    nodes = kfd_nodes(root, slots)
    devices: list[Device] = []
    troubles: dict[tuple[str, str], list[str]] = {}
    for slot in slots:
        try:
            devices += Machine(root, allowed).devices(slot, nodes.get(slot.address, []))
        except Unusable as trouble:
            if read(slot.folder / "vendor"):  # else it was pulled out while we looked
                troubles.setdefault((slot.kind, str(trouble)), []).append(slot.address)
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


def slot_of(folder: Path) -> Slot | None:
    """Return the AMD GPU or NPU in a slot of the bus; nothing for what else is there, and for virtual functions."""
    vendor, device = read(folder / "vendor"), clean(read(folder / "device"))
    is_gpu = vendor == GPU_VENDOR and read(folder / "class").startswith(GPU_CLASSES)
    if not (is_gpu or (vendor == NPU_VENDOR and device in NPUS)) or link(folder / "physfn"):
        return None
    return Slot(folder, "gpu" if is_gpu else "npu", device, link(folder / "driver"))


# What KFD tells


class Node(NamedTuple):
    """One GPU, or partition of one, that the kernel's compute driver has."""

    gfx: str
    major: int
    compute_units: int | None
    memory_bytes: int
    render: str


def kfd_nodes(root: Path, slots: Iterable[Slot]) -> dict[str, list[Node]]:
    """Return KFD's nodes by the PCI address of their GPU.

    A partition's number stands where the PCI function would be (or from bit 28 on, where it is passed over), so
    function 0 gets what no other GPU has.
    """
    known = {slot.address for slot in slots}
    found: dict[str, list[Node]] = {}
    for name in sorted(listed(root / KFD_NODES), key=lambda name: (len(name), name)):
        folder = root / KFD_NODES / name
        facts = properties(folder / "properties")
        place, version = number(facts.get("location_id")), number(facts.get("gfx_target_version"))
        if not version or place is None or not number(facts.get("simd_count")):
            continue
        slot = f"{number(facts.get('domain')) or 0:04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}"
        exact = f"{slot}.{place & 7}"
        found.setdefault(exact if exact in known else f"{slot}.0", []).append(node_of(folder, facts, version))
    return found


def node_of(folder: Path, facts: Mapping[str, str], version: int) -> Node:
    """Return a node of KFD's topology; ``version`` is its target in decimal, 90402 for gfx942."""
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    banks = [properties(folder / "mem_banks" / name / "properties") for name in listed(folder / "mem_banks")]
    own = [number(bank.get("size_in_bytes")) or 0 for bank in banks if bank.get("heap_type") in GPU_BANKS]
    simds, per_unit = number(facts.get("simd_count")), number(facts.get("simd_per_cu"))
    return Node(
        gfx=f"gfx{major}{minor:x}{step:x}",
        major=major,
        compute_units=simds // per_unit if simds and per_unit else None,
        memory_bytes=sum(own),
        render=f"renderD{number(facts.get('drm_render_minor')) or 0}",
    )


# What can be used, and how


class Machine(NamedTuple):
    """Where things are looked for, and whether a device node may be opened."""

    root: Path
    allowed: Callable[[Path], bool]

    def devices(self, slot: Slot, nodes: list[Node]) -> list[Device]:
        """Return one device, or one for each partition. Raises Unusable."""
        own = DRIVERS[slot.kind]
        if not slot.driver:
            raise Unusable(NO_DRIVER[slot.kind])
        if slot.driver != own:
            words = LENT_BY if slot.driver in LENDERS else RADEON if slot.driver == "radeon" else OTHER_DRIVER
            raise Unusable(words.format(driver=slot.driver, own=own))
        if slot.kind == "npu":
            return [self.npu(slot)]
        if len(nodes) > 1:
            return [self.gpu(slot, node, part=part) for part, node in enumerate(nodes, start=1)]
        return [self.gpu(slot, nodes[0] if nodes else None)]

    def npu(self, slot: Slot) -> Device:
        """Return an NPU. Raises Unusable."""
        accel = next((name for name in listed(slot.folder / "accel") if name.startswith("accel")), "")
        return Device(
            id=f"npu:{slot.address}",
            kind="npu",
            name=NPUS[slot.device],
            vendor="AMD",
            attributes=self.facts(slot),
            access=self.access(slot, f"dev/accel/{accel}" if accel else ""),
        )

    def gpu(self, slot: Slot, node: Node | None, *, part: int = 0) -> Device:
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

    def access(self, slot: Slot, *nodes: str) -> ContainerAccess:
        """Return the way in, by device nodes. Raises Unusable when there is none, or it is closed."""
        if not all(nodes):
            raise Unusable(NOT_STARTED.format(own=slot.driver))
        # Named by kind, so that eight cards with one trouble make one sentence.
        kinds = {KFD: "/dev/kfd", "dev/dri": "/dev/dri/renderD*", "dev/accel": "/dev/accel/accel*"}

        def told(names: Iterable[str]) -> str:
            return " and ".join(kinds.get(name, kinds.get(name.rpartition("/")[0], name)) for name in names)

        if missing := [name for name in nodes if not there(self.root / name)]:
            raise Unusable(NO_NODE.format(nodes=told(missing)))
        if closed := [name for name in nodes if not self.allowed(self.root / name)]:
            raise Unusable(NO_ACCESS.format(nodes=told(closed)))
        return ContainerAccess(device_nodes=tuple(f"/{name}" for name in nodes))

    def facts(self, slot: Slot) -> Facts:
        """Return what is told of every device."""
        version = clean(read(self.root / "sys/module" / slot.driver / "version"))
        return {
            "pci_address": slot.address,
            "pci_id": f"{read(slot.folder / 'vendor').removeprefix('0x')}:{slot.device.removeprefix('0x')}",
            "driver": slot.driver,
            **({"driver_version": version} if version else {}),
        }

    def name(self, slot: Slot) -> str:
        """Return what the card calls itself (servers do), or what libdrm's list or that of PCI ids calls it."""
        own = clean(read(slot.folder / "product_name"))
        revision = read(slot.folder / "revision").removeprefix("0x")
        named = own or self.by_revision(slot.device.removeprefix("0x"), revision) or self.by_pci_id(slot)
        if not named:
            return f"AMD GPU {slot.device.removeprefix('0x')}"
        return named if named.startswith("AMD") else f"AMD {named}"

    def by_revision(self, device: str, revision: str) -> str:
        """Return the name in libdrm's list: ``744C, C8, AMD Radeon RX 7900 XTX``."""
        sought = (device.lower(), revision.lower())
        for path in AMDGPU_IDS:
            for line in read(self.root / path, most_bytes=MOST_LIST_BYTES).splitlines():
                parts = [part.strip() for part in line.split(",", 2)]
                if len(parts) == 3 and (parts[0].lower(), parts[1].lower()) == sought:  # noqa: PLR2004 - id, revision, name
                    return clean(parts[2])
        return ""

    def by_pci_id(self, slot: Slot) -> str:
        """Return the name in the list of PCI ids; a chip's products stand there in brackets."""
        wanted = rf"^1002 .*\n(?:[\t#].*\n)*?\t{re.escape(slot.device.removeprefix('0x'))}  (.*)$"
        for path in PCI_IDS:
            if found := re.search(wanted, read(self.root / path, most_bytes=MOST_LIST_BYTES), re.MULTILINE):
                products = re.search(r"\[(.+)\]", found[1])
                return clean(products[1] if products else found[1])
        return ""


def memory_of(slot: Slot, node: Node | None, *, part: int) -> tuple[int | None, bool]:
    """Return the bytes that a GPU can use, ``None`` where nobody tells, and whether they are the system's."""
    own = number(read(slot.folder / "mem_info_vram_total"))
    offered = node.memory_bytes if node else 0
    if part:
        return offered or None, False
    if node and node.gfx in SHARED_MEMORY and offered > (own or 0):
        return offered, True
    return own, False


def renders(folder: Path) -> list[str]:
    """Return the render nodes of a PCI device."""
    return [name for name in listed(folder / "drm") if name.startswith("renderD")]


# Reading: nothing here raises, whatever a file holds and however suddenly it goes


def read(path: Path, *, most_bytes: int = MOST_BYTES) -> str:
    """Return the beginning of a file, without blanks around it; nothing when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(most_bytes).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def there(path: Path) -> bool:
    """Whether a file or folder is there and may be seen."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where a folder is closed


def listed(folder: Path) -> list[str]:
    """Return the names in a folder, in order; none when it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def link(path: Path) -> str:
    """Return the last part of what a link points to; nothing where there is no link."""
    try:
        return clean(os.path.basename(os.readlink(path)))  # noqa: PTH115, PTH119 - text, not a file
    except OSError:
        return ""


def properties(path: Path) -> dict[str, str]:
    """Return KFD's ``name value`` lines as a mapping."""
    pairs = (line.partition(" ") for line in read(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def number(text: str | None) -> int | None:
    """Return a whole number in text, ``None`` for anything else and for more than MOST."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text) and int(text) <= MOST else None


def clean(text: str) -> str:
    """Return text that can be shown, of a length that fits."""
    return "".join(character for character in text if character.isprintable()).strip()[:MOST_CHARACTERS]
