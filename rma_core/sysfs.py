"""What detectors read of Linux: small files, links and folders below ``/sys``, ``/proc`` and ``/dev``, and the PCI bus.

Nothing here raises, whatever a file holds and however suddenly it goes: what cannot be read says nothing. Nothing reads
without a bound. Every path is the caller's own, so that a detector sees another machine below another ``root``.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "MOST_BYTES",
    "MOST_ENTRIES",
    "PciDevice",
    "exists",
    "link_name",
    "list_names",
    "may_open",
    "pci_devices",
    "pci_name",
    "printable",
    "read_int",
    "read_text",
    "whole_number",
]

#: More of a file is not read, unless the caller says so: one below ``/sys`` has a page.
MOST_BYTES = 64 * 1024
#: More entries of a folder are not listed: a large server has some thousand PCI devices.
MOST_ENTRIES = 8192
#: Where names of cards are written down, and more of such a list is not read: the largest has 1.5 MB.
PCI_IDS = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids")
MOST_LIST_BYTES = 8 * 1024 * 1024
#: No card has more bytes, or more of anything: a number beyond is none.
MOST = 2**50
MOST_CHARACTERS = 100


#: Not there on Windows, where none of this is.
PASSING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class PciDevice(NamedTuple):
    """One device on the PCI bus; ids are as the kernel writes them, ``0x`` and hex digits."""

    folder: Path
    vendor: str
    device: str
    class_code: str
    #: The kernel's driver that has it, or nothing.
    driver: str
    #: Whether it is a share of another device, made for virtual machines.
    is_virtual: bool

    @property
    def address(self) -> str:
        """Its place, as ``lspci -D`` has it."""
        return self.folder.name

    @property
    def pci_id(self) -> str:
        """Vendor and device as ``lspci -nn`` has them: ``1002:744c``."""
        return f"{self.vendor.removeprefix('0x')}:{self.device.removeprefix('0x')}"


def pci_devices(root: Path) -> list[PciDevice]:
    """Return every device on the PCI bus, in the order of addresses; ``root`` is where ``/sys`` is looked for."""
    bus = root / "sys/bus/pci/devices"
    return [_pci_device(bus / name) for name in list_names(bus)]


def _pci_device(folder: Path) -> PciDevice:
    return PciDevice(
        folder=folder,
        vendor=printable(read_text(folder / "vendor")),
        device=printable(read_text(folder / "device")),
        class_code=printable(read_text(folder / "class")),
        driver=link_name(folder / "driver"),
        is_virtual=bool(link_name(folder / "physfn")),
    )


def pci_name(root: Path, vendor: str, device: str) -> str:
    """Return the name in this machine's list of PCI ids, of a chip its product's (in brackets there); else nothing.

    Ids are as in `PciDevice`; ``root`` is where ``/usr`` is looked for.
    """
    maker, model = (re.escape(text.removeprefix("0x")) for text in (vendor, device))
    wanted = rf"^{maker} .*\n(?:[\t#].*\n)*?\t{model}  (.*)$"
    for path in PCI_IDS:
        if found := re.search(wanted, read_text(root / path, most_bytes=MOST_LIST_BYTES), re.MULTILINE):
            product = re.search(r"\[(.+)\]", found[1])
            return printable(product[1] if product else found[1])
    return ""


def read_text(path: Path, *, most_bytes: int = MOST_BYTES) -> str:
    """Return the beginning of a file, without blanks around it; nothing when it cannot be read, or is no file."""
    try:
        # Whoever opens a pipe waits for somebody who writes into it.
        with open(os.open(path, os.O_RDONLY | PASSING), "rb") as file:  # noqa: PTH123 - of a descriptor
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return file.read(most_bytes).decode(errors="replace").strip() if regular else ""
    except (OSError, ValueError):
        return ""


def read_int(path: Path) -> int | None:
    """Return the whole number in a file, as `whole_number` does."""
    return whole_number(read_text(path))


def whole_number(text: str | None) -> int | None:
    """Return a decimal number in text, from 0 on; ``None`` for anything else, and for more than any card has."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text) and int(text) <= MOST else None


def list_names(folder: Path) -> list[str]:
    """Return the names in a folder, in order, at most MOST_ENTRIES; none when it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, MOST_ENTRIES))
    except (OSError, ValueError):
        return []


def link_name(path: Path) -> str:
    """Return the last part of what a link points to (a device's driver); nothing where there is no link."""
    try:
        return printable(os.path.basename(os.readlink(path)))  # noqa: PTH115, PTH119 - text, not a file
    except (OSError, ValueError):
        return ""


def exists(path: Path) -> bool:
    """Whether a file or folder is there and may be seen."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where a folder is closed


def may_open(node: Path) -> bool:
    """Whether this user may use a device node, to read and to write."""
    try:
        return os.access(node, os.R_OK | os.W_OK)
    except ValueError:
        return False


def printable(text: str) -> str:
    """Return text that can be shown, of a length that fits into a report."""
    return "".join(character for character in text if character.isprintable()).strip()[:MOST_CHARACTERS]
