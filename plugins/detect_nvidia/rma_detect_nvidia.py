"""Finds NVIDIA GPUs through NVML, and says whether containers can use them.

Each GPU is one device ``gpu:GPU-…``. A GPU in MIG mode is not offered as a whole: each of its instances is a device of
its own, ``gpu:MIG-…``, with its own memory and its ``parent`` named. A GPU for which NVML does not support the question
about memory (Jetson, GB10) shares the system's: that is then its ``memory_bytes``, and ``unified_memory`` is true.

Attributes: ``index``, ``driver_version``, ``cuda_version`` (the newest this driver runs), ``compute_capability``,
``architecture``, ``memory_free_bytes``, ``pci_address``, ``power_limit_w``, ``ecc``, ``mig_mode``, ``unified_memory``,
for MIG also ``parent`` and ``mig_profile``; ``container_access`` (``cdi``, ``nvidia-container-toolkit``, ``none``) with
``container_access_reason``. What a GPU does not tell is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rma_core import ContainerAccess, Detection, Device, PluginConfig, hookimpl, sysfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import TypeVar

    T = TypeVar("T")

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: What the driver's library is called.
LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
#: Where it lies when the loader does not know: WSL, NixOS, GKE's nodes; below the root folder.
LIBRARY_FOLDERS = ("usr/lib/wsl/lib", "run/opengl-driver/lib", "usr/local/nvidia/lib64")
#: Where CDI specifications lie, as the CDI specification has it.
CDI_FOLDERS = ("etc/cdi", "var/run/cdi")
#: A CDI specification larger than this is none (one of a machine with eight GPUs in MIG mode is about 200 KiB).
MAX_SPEC_BYTES = 4 * 1024 * 1024
#: The kind of CDI device that is a GPU or a MIG instance.
CDI_KIND = "nvidia.com/gpu"
#: Folders of programs to look through beside PATH, which is short where the agent runs as a service.
PROGRAM_FOLDERS = ("usr/bin", "usr/local/bin", "usr/sbin")
#: What puts GPUs into Docker's and Podman's containers without CDI.
TOOLKIT_PROGRAMS = ("nvidia-container-runtime-hook", "nvidia-container-runtime")

PCI_VENDOR_NVIDIA = "0x10de"
PCI_CLASS_DISPLAY = "0x03"

INSTALL_DRIVER = (
    "install NVIDIA's driver (Ubuntu: `sudo ubuntu-drivers install`; others: https://www.nvidia.com/drivers)"
)
MAKE_CDI_SPEC = "`sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`"


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:  # noqa: ARG001 - the hook's signature; there is nothing to set
    """Return the NVIDIA GPUs and MIG instances of this machine."""
    return detect(Path("/"))


def detect(root: Path) -> Detection:
    """Return what NVML tells; ``root`` is where ``/sys``, ``/etc`` and ``/usr`` are looked for."""
    import pynvml as nvml

    try:
        _start(nvml, root)
    except nvml.NVMLError as error:
        return _not_started(nvml, error, root)
    try:
        return _look(nvml, root)
    except nvml.NVMLError as error:
        return Detection.unhealthy(f"NVML does not answer: {error}; {_advice(nvml, _code(error))}")
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _start(nvml: ModuleType, root: Path) -> None:
    """Initialize NVML, with a library out of the loader's sight if need be."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        if not _load_hidden(root):
            raise
        nvml.nvmlInit()


def _load_hidden(root: Path) -> bool:
    """Load NVML from one of LIBRARY_FOLDERS; the loader then finds it by its name, which is all that pynvml knows."""
    for folder in LIBRARY_FOLDERS:
        path = root / folder / LIBRARY
        if path.exists():
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return True
    return False


# Why NVML did not start


def _not_started(nvml: ModuleType, error: Exception, root: Path) -> Detection:
    code = _code(error)
    cards = pci_cards(root)
    if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return _without_library(cards, root)
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return _without_module(cards, root)
    if code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        module = " ".join(filter(None, ("kernel module", sysfs.read_text(root / "sys/module/nvidia/version"))))
        return Detection.unhealthy(
            f"driver/library version mismatch: the driver was updated while the old {module} stayed loaded; reboot, or "
            "stop what uses the GPU and reload the nvidia modules "
            "(`sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia`)"
        )
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return Detection.unhealthy(
            "this user may not use the NVIDIA driver: give it access to /dev/nvidiactl and /dev/nvidia0 … "
            "(`ls -l /dev/nvidia*` shows their group; `sudo usermod -aG GROUP USER`, then log in again)"
        )
    return Detection.unhealthy(f"NVML does not start: {error}; {_advice(nvml, code)}")


def _without_library(cards: list[str], root: Path) -> Detection:
    if problem := _load_problem():
        return Detection.unhealthy(f"{LIBRARY} is here but cannot be loaded: {problem}; reinstall NVIDIA's driver")
    if (root / "etc/nv_tegra_release").exists():
        return Detection.unhealthy(f"this Jetson's system has no {LIBRARY}: update it to JetPack 6 or newer")
    if not cards:
        return Detection.undetected(f"no NVIDIA driver on this machine ({LIBRARY} not found)")
    return Detection.unhealthy(
        f"NVIDIA GPU at {', '.join(cards)}, but no driver ({LIBRARY} not found): {INSTALL_DRIVER}; "
        "in a container, start it with the GPU (`--gpus all`)"
    )


def _without_module(cards: list[str], root: Path) -> Detection:
    if not cards and sys.platform == "linux":
        return Detection.undetected("the NVIDIA driver is installed, but this machine has no NVIDIA GPU")
    where = f" for the GPU at {', '.join(cards)}" if cards else ""
    if (root / "sys/module/nouveau").exists():
        return Detection.unhealthy(
            f"the NVIDIA driver is installed, but the kernel uses nouveau{where}: blacklist nouveau "
            "(`echo blacklist nouveau | sudo tee /etc/modprobe.d/nouveau.conf`, then rebuild the initramfs) and reboot"
        )
    return Detection.unhealthy(
        f"the NVIDIA kernel module is not loaded{where}: run `sudo modprobe nvidia`; if that fails, reinstall "
        "the driver for the running kernel, or with Secure Boot on, enrol the module's key"
    )


def _load_problem() -> str:
    """Say why a library that exists does not load; an empty string when there is none."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        words = str(error)
        absent = "No such file" in words or "image not found" in words or "no such file" in words
        return "" if absent or sys.platform == "win32" else words
    return ""


def pci_cards(root: Path) -> list[str]:
    """Return the PCI addresses of NVIDIA's display controllers, but not of those lent to a virtual machine (vfio)."""
    cards = [card for card in sysfs.pci_devices(root) if card.vendor == PCI_VENDOR_NVIDIA and card.driver != "vfio-pci"]
    return [card.address for card in cards if card.class_code.startswith(PCI_CLASS_DISPLAY)]


# What NVML tells


class Driver(NamedTuple):
    """What is the same for every GPU of the machine."""

    version: str | None
    cuda: str | None
    gpu_count: int
    toolkit: Toolkit


def _look(nvml: ModuleType, root: Path) -> Detection:
    count = nvml.nvmlDeviceGetCount()
    if not count:
        return _no_gpus(root)
    driver = Driver(_ask(nvml, nvml.nvmlSystemGetDriverVersion), _cuda_version(nvml), count, find_toolkit(root))
    devices: list[Device] = []
    problems: dict[str, list[str]] = {}
    for index in range(count):
        try:
            devices += _gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index, driver)
        except nvml.NVMLError as error:
            problems.setdefault(_trouble(nvml, error), []).append(str(index))
        except _Unusable as error:
            problems.setdefault(str(error), []).append(str(index))
    if problems:
        reason = "; ".join(f"GPU {', '.join(indexes)} {words}" for words, indexes in problems.items())
        return Detection.unhealthy(f"{reason} ({len(devices)} usable)", devices=devices)
    return Detection.healthy(devices)


class _Unusable(Exception):
    """A GPU answers, but there is nothing on it that could be used; says what to do."""


def _no_gpus(root: Path) -> Detection:
    if cards := pci_cards(root):
        return Detection.unhealthy(
            f"the NVIDIA driver runs but drives no GPU, though there is one at {', '.join(cards)}: "
            "`sudo dmesg | grep NVRM` says why (a card too old for this driver, or one in want of power)"
        )
    return Detection.undetected("the NVIDIA driver runs, but this machine has no NVIDIA GPU")


def _gpu(nvml: ModuleType, handle: object, index: int, driver: Driver) -> list[Device]:
    """Return one GPU, or its MIG instances."""
    facts = _facts(nvml, handle, index, driver)
    name = _ask(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"
    uuid = _ask(nvml, nvml.nvmlDeviceGetUUID, handle) or f"nvidia-{facts['pci_address'] or index}"
    if facts["mig_mode"]:
        return _instances(nvml, handle, {**facts, "parent": f"gpu:{uuid}"}, driver)
    memory, reason = _memory(nvml, handle, whole=True)
    names = (uuid, str(index), f"gpu{index}", *(("all",) if driver.gpu_count == 1 else ()))
    return [_device(uuid, name, {**facts, **memory}, names=names, driver=driver, reason=reason)]


def _instances(nvml: ModuleType, parent: object, facts: Facts, driver: Driver) -> list[Device]:
    devices = []
    for number in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, parent) or 0):
        handle = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, number)
        uuid = _ask(nvml, nvml.nvmlDeviceGetUUID, handle) if handle is not None else None
        if uuid is None:
            continue
        name = _ask(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA MIG instance"
        memory, reason = _memory(nvml, handle, whole=False)
        more: Facts = {"mig_profile": name.partition(" MIG ")[2] or None, **memory}
        names = (uuid, f"{facts['index']}:{number}", f"mig{facts['index']}:{number}")
        devices.append(_device(uuid, name, {**facts, **more}, names=names, driver=driver, reason=reason))
    if not devices:
        raise _Unusable(
            "is in MIG mode, but has no instance this user can see: make some (`sudo nvidia-smi mig -cgi 19 -C -i N`) "
            "or leave MIG mode (`sudo nvidia-smi -mig 0 -i N`)"
        )
    return devices


Facts = dict[str, bool | int | float | str | None]


def _facts(nvml: ModuleType, handle: object, index: int, driver: Driver) -> Facts:
    """Return the attributes of a GPU that its MIG instances share."""
    pci = _ask(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    mig = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    ecc = _ask(nvml, nvml.nvmlDeviceGetEccMode, handle)
    power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerManagementLimit, handle)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return {
        "index": index,
        "driver_version": driver.version,
        "cuda_version": driver.cuda,
        "compute_capability": capability and f"{capability[0]}.{capability[1]}",
        "architecture": _architecture(nvml, handle),
        "pci_address": pci and _pci_address(pci.busId),
        "power_limit_w": power_mw and power_mw / 1000,
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig_mode": None if mig is None else bool(mig[0]),
    }


def _memory(nvml: ModuleType, handle: object, *, whole: bool) -> tuple[Facts, str]:
    """Return ``memory_bytes`` and ``memory_free_bytes``, and why they are missing if they are.

    A whole GPU for which NVML does not support the question, or answers 0, has no memory of its own.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError as error:
        if _fatal(nvml, error):
            raise
        if not whole or _code(error) != nvml.NVML_ERROR_NOT_SUPPORTED:
            return {"unified_memory": False}, f"NVML does not tell its memory: {error}"
        total = 0
    if total:
        return {"memory_bytes": total, "memory_free_bytes": free, "unified_memory": False}, ""
    import psutil

    system = psutil.virtual_memory()
    return {"memory_bytes": system.total, "memory_free_bytes": system.available, "unified_memory": True}, ""


def _device(uuid: str, name: str, facts: Facts, *, names: tuple[str, ...], driver: Driver, reason: str) -> Device:
    """Return the record; ``names`` are what a CDI specification may call this device, best first."""
    access = driver.toolkit.access(names)
    memory = facts.pop("memory_bytes", None)
    told = {key: value for key, value in facts.items() if value is not None}
    return Device(
        id=f"gpu:{uuid}",
        kind="gpu",
        name=name,
        vendor="NVIDIA",
        api="cuda",
        memory_bytes=memory if isinstance(memory, int) else None,
        reason=reason,
        attributes={**told, "container_access": access.way, "container_access_reason": access.reason},
        access=ContainerAccess(cdi=access.cdi) if access.cdi else None,
    )


def _cuda_version(nvml: ModuleType) -> str | None:
    number = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    return number and f"{number // 1000}.{number % 1000 // 10}"


def _architecture(nvml: ModuleType, handle: object) -> str | None:
    number = _ask(nvml, nvml.nvmlDeviceGetArchitecture, handle)
    prefix = "NVML_DEVICE_ARCH_"
    found = (key for key, value in vars(nvml).items() if key.startswith(prefix) and value == number)
    name = next(found, f"{prefix}UNKNOWN").removeprefix(prefix)
    return None if name == "UNKNOWN" else name.capitalize()


def _pci_address(bus_id: str) -> str:
    """Turn NVML's ``00000000:01:00.0`` into the ``0000:01:00.0`` of ``/sys`` and ``lspci``."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


# Asking NVML


def _ask(nvml: ModuleType, question: Callable[..., T], *arguments: object) -> T | None:
    """Return the answer, or ``None`` where this GPU, driver or user cannot have it; a lost GPU is still an error."""
    try:
        return question(*arguments)
    except nvml.NVMLError as error:
        if _fatal(nvml, error):
            raise
    except UnicodeDecodeError:  # a name in the firmware's own encoding
        pass
    return None


def _code(error: Exception) -> int:
    return int(getattr(error, "value", 0))


def _fatal(nvml: ModuleType, error: Exception) -> bool:
    """Whether the error is about the whole GPU and not about one question."""
    return _code(error) in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)


def _trouble(nvml: ModuleType, error: Exception) -> str:
    """Say what is wrong with one GPU and what to do, to go on after "GPU 2"."""
    code = _code(error)
    lost = code == nvml.NVML_ERROR_GPU_IS_LOST
    return f"{'is lost: it has fallen off the bus' if lost else f'does not answer: {error}'}; {_advice(nvml, code)}"


def _advice(nvml: ModuleType, code: int) -> str:
    if code == nvml.NVML_ERROR_GPU_IS_LOST:
        return "reboot; if it happens again, check its power, its seat and its heat (`sudo dmesg | grep -i xid`)"
    if code == nvml.NVML_ERROR_RESET_REQUIRED:
        return "reset it (`sudo nvidia-smi --gpu-reset -i N`) or reboot"
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return "give this user access to /dev/nvidia*"
    if code == nvml.NVML_ERROR_INSUFFICIENT_POWER:
        return "connect its power cables"
    if code == nvml.NVML_ERROR_IRQ_ISSUE:
        return "its interrupt does not arrive: reboot, and update the firmware of the board"
    return "see what `nvidia-smi` and `sudo dmesg | grep NVRM` say"


# Whether containers can use it


class Access(NamedTuple):
    """How containers get one device: ``cdi``, ``nvidia-container-toolkit`` or ``none``, why, and its CDI names."""

    way: str
    reason: str
    cdi: tuple[str, ...] = ()


class Toolkit(NamedTuple):
    """What of NVIDIA's container support is installed: names in CDI specifications, and why there is no other way."""

    names: frozenset[str]
    specs: tuple[str, ...]
    way: str
    reason: str

    def access(self, names: tuple[str, ...]) -> Access:
        """Return the way to a device that a specification may call by one of ``names``, best first."""
        found = next((name for name in names if name in self.names), None)
        if found is not None:
            return Access("cdi", f"named in {', '.join(self.specs)}", (f"{CDI_KIND}={found}",))
        if self.specs:
            stale = f"{', '.join(self.specs)} does not name this device: renew it with {MAKE_CDI_SPEC}"
            return Access(self.way, f"{self.reason}; {stale}" if self.way != "none" else stale)
        return Access(self.way, self.reason)


def find_toolkit(root: Path) -> Toolkit:
    """Look for CDI specifications, and for the programs and Docker settings of the NVIDIA Container Toolkit."""
    names: set[str] = set()
    specs = []
    for path in _spec_files(root):
        found = cdi_names(sysfs.read_text(path, most_bytes=MAX_SPEC_BYTES))
        if found:
            specs.append(f"/{path.relative_to(root).as_posix()}")
            names.update(found)
    way, reason = _without_cdi(root)
    return Toolkit(frozenset(names), tuple(specs), way, reason)


def _spec_files(root: Path) -> Iterator[Path]:
    for folder in CDI_FOLDERS:
        for path in sorted((root / folder).glob("*")):
            if path.suffix in (".yaml", ".yml", ".json") and path.is_file() and path.stat().st_size <= MAX_SPEC_BYTES:
                yield path


def _without_cdi(root: Path) -> tuple[str, str]:
    """Return the way besides CDI and its reason."""
    program = next((name for name in TOOLKIT_PROGRAMS if _program(root, name)), None)
    if program:
        return "nvidia-container-toolkit", f"{program} is installed"
    settings = root / "etc/docker/daemon.json"
    if _docker_runtime(settings):
        return (
            "none",
            "Docker's daemon.json names the nvidia runtime, which is missing: install nvidia-container-toolkit",
        )
    if _program(root, "nvidia-ctk"):
        return "none", f"nvidia-ctk is installed, but there is no CDI specification: make one with {MAKE_CDI_SPEC}"
    return "none", f"install nvidia-container-toolkit and run {MAKE_CDI_SPEC}"


def _program(root: Path, name: str) -> str | None:
    folders = [str(root / folder) for folder in PROGRAM_FOLDERS]
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def _docker_runtime(settings: Path) -> bool:
    try:
        data = json.loads(sysfs.read_text(settings) or "{}")
    except ValueError:
        return False
    runtimes = data.get("runtimes") if isinstance(data, dict) else None
    return isinstance(runtimes, dict) and "nvidia" in runtimes


def cdi_names(text: str) -> list[str]:
    """Return the names of the GPUs in a CDI specification, JSON or YAML; none when it describes something else."""
    kind, names = _json_names(text) if text.startswith("{") else _yaml_names(text)
    return names if kind == CDI_KIND else []


def _json_names(text: str) -> tuple[str, list[str]]:
    try:
        data = json.loads(text)
        return data["kind"], [str(device["name"]) for device in data["devices"]]
    except (ValueError, KeyError, TypeError):
        return "", []


_LINE = re.compile(r"^(?P<indent> *)(?P<dash>- +)?(?P<key>[A-Za-z]+):(?: +(?P<value>.*?))? *$")


def _yaml_names(text: str) -> tuple[str, list[str]]:
    """Scan the block style that nvidia-ctk writes: ``kind:``, and each ``name:`` of an item of ``devices:`` itself.

    A name deeper in an item (of a network device, say) stands further to the right and is passed over.
    """
    kind, names, section, column = "", [], "", None
    for match in filter(None, map(_LINE.match, text.splitlines())):
        key, value = match["key"], (match["value"] or "").strip("\"'")
        at = len(match["indent"]) + len(match["dash"] or "")
        if at == 0:
            section, column = key, None
            kind = value if key == "kind" else kind
        elif section == "devices":
            column = at if column is None else column
            if at == column and key == "name":
                names.append(value)
    return kind, names
