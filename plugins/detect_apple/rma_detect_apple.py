"""Finds the GPUs of a Mac: the one in Apple's chip with the unified memory Metal may use, or an Intel Mac's cards.

Ids are made from names (``gpu:apple-m2-pro``, ``gpu:amd-radeon-pro-5500m``; a second card of one name ends in ``-2``).
Of what macOS tells about itself only the facts below are taken: no serial number, hardware UUID, user or host name.

Attributes: ``metal_family``, ``macos_version``, ``model``, ``unified_memory``, ``system_memory_bytes``; for Apple's
chips ``chip``, ``gpu_cores``, ``super_cores``, ``performance_cores``, ``efficiency_cores`` (of the CPU) and
``metal_memory_source`` (``metal``: asked; ``sysctl``: set by the owner; ``estimate``); for Intel Macs ``pci_device_id``
and ``removable`` (an eGPU). What macOS does not tell is left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from rma_core import Detection, Device, PluginConfig, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

Facts = dict[str, bool | int | float | str | None]
Table = dict[str, object]

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: What is asked; SPSoftwareDataType would add nothing but the user's and the machine's name to what sysctl knows.
PROFILER = ("/usr/sbin/system_profiler", "-json", "SPHardwareDataType", "SPDisplaysDataType")
#: Names that a macOS does not have are passed over by sysctl: `debug.iogpu…` is macOS 13's, `iogpu…` that of 14 and on.
SYSCTL = (
    "/usr/sbin/sysctl",
    "kern.osproductversion",
    "machdep.cpu.brand_string",
    "hw.model",
    "hw.memsize",
    "hw.optional.arm64",
    "hw.perflevel0.name",
    "hw.perflevel0.physicalcpu",
    "hw.perflevel1.name",
    "hw.perflevel1.physicalcpu",
    "hw.perflevel2.name",
    "hw.perflevel2.physicalcpu",
    "iogpu.wired_limit_mb",
    "debug.iogpu.wired_limit",
)
#: Prints Metal's recommendedMaxWorkingSetSize. In a process of its own: no mistake in here can cost the whole answer.
#: CoreGraphics is loaded because MTLCreateSystemDefaultDevice gives nothing without it in a program without windows.
METAL = """
from ctypes import CDLL, c_char_p, c_uint64, c_void_p
CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
metal = CDLL("/System/Library/Frameworks/Metal.framework/Metal")
objc = CDLL("/usr/lib/libobjc.A.dylib")
metal.MTLCreateSystemDefaultDevice.restype = c_void_p
metal.MTLCreateSystemDefaultDevice.argtypes = []
objc.sel_registerName.restype = c_void_p
objc.sel_registerName.argtypes = [c_char_p]
objc.objc_msgSend.restype = c_uint64
objc.objc_msgSend.argtypes = [c_void_p, c_void_p]
device = metal.MTLCreateSystemDefaultDevice()
print(objc.objc_msgSend(device, objc.sel_registerName(b"recommendedMaxWorkingSetSize")) if device else 0)
"""

#: Seconds for each question; together less than a detector's deadline of 10 s.
SYSCTL_S = 1.0
PROFILER_S = 6.0
METAL_S = 2.0

GIB = 2**30
#: From this much memory on Metal may use three quarters of it, below two thirds: seen up to macOS 15 in logs of
#: llama.cpp and Ollama (10922.67 MiB of 16 GB, 21845.34 MiB of 32 GB: ollama issue 434; 28991.03 MB of 36 GB; 49152 MiB
#: of 64 GB: llama.cpp issue 1870). Later systems give more (11.84 of 16 GiB, 107.52 of 128 GiB: AlexsJones/llmfit pull
#: request 754, antirez/ds4 pull request 893), so where Metal cannot be asked this is on the safe side.
#: Apple documents the property (MTLDevice.recommendedMaxWorkingSetSize), not how it comes about.
LARGE_MEMORY_BYTES = 36 * GIB

_VENDORS = {"apple": "Apple", "amd": "AMD", "ati": "AMD", "intel": "Intel", "nvidia": "NVIDIA"}
_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:  # noqa: ARG001 - the hook's signature; there is nothing to set
    """Return the GPUs of this Mac."""
    return detect(sys.platform)


def detect(platform: str) -> Detection:
    """Ask the system's own programs, each for a limited time."""
    if platform != "darwin":
        return Detection.undetected("not macOS")
    sysctl = parse_sysctl(_run(SYSCTL, timeout_s=SYSCTL_S).text)
    answer = _run(PROFILER, timeout_s=PROFILER_S)
    working_set = 0
    if _has_apple_chip(sysctl):
        # -I -S: neither the owner's environment nor installed packages run in there.
        working_set = _integer(_run((sys.executable, "-I", "-S", "-c", METAL), timeout_s=METAL_S).text)
    return describe(answer.text, sysctl, working_set, problem=answer.problem)


def describe(profile: str, sysctl: dict[str, str], working_set: int = 0, *, problem: str = "") -> Detection:
    """Turn what was answered into devices.

    ``profile`` is system_profiler's JSON, ``working_set`` Metal's own answer in bytes (0: none), ``problem`` says why
    ``profile`` is not there.
    """
    hardware, gpus, flaw = _read_profile(profile)
    problem = problem or flaw
    chip = _chip(hardware, gpus, sysctl)
    if _is_virtual(chip, hardware, gpus, sysctl):
        return Detection.undetected(
            "this Mac is a virtual machine, and its GPU is not fit for computing; run the agent on the Mac itself"
        )
    if chip:
        device = _apple_device(chip, hardware, gpus, sysctl, working_set)
        return _with_problem(problem, [device]) if problem else _healthy_apple(device, gpus)
    if problem:
        return _with_problem(problem, [])
    return _intel(gpus, _machine(hardware, sysctl))


def _healthy_apple(device: Device, gpus: Sequence[Table]) -> Detection:
    without = "" if gpus else "system_profiler lists no GPU, so its number of cores is not known"
    return Detection.healthy([device], reason=without)


def _with_problem(problem: str, devices: list[Device]) -> Detection:
    advice = "run `system_profiler SPDisplaysDataType` yourself; a restart of the Mac often helps"
    return Detection.unhealthy(f"{problem}: {advice}", devices=devices)


# Macs with Apple's chips


def _apple_device(
    chip: str, hardware: Table, gpus: Sequence[Table], sysctl: dict[str, str], working_set: int
) -> Device:
    gpu = next((g for g in gpus if _vendor(g) == "Apple"), gpus[0] if gpus else {})
    machine = _machine(hardware, sysctl)
    total = machine["system_memory_bytes"]
    memory, source = metal_memory(total, sysctl, working_set) if isinstance(total, int) else (None, None)
    facts: Facts = {
        **machine,
        **_cpu_cores(hardware, sysctl),
        "chip": chip,
        "gpu_cores": _integer(gpu.get("sppci_cores")) or None,
        "metal_family": _metal_family(gpu),
        "metal_memory_source": source,
        "unified_memory": True,
    }
    return _device(chip, "Apple", memory, facts)


def metal_memory(total_bytes: int, sysctl: dict[str, str], working_set: int) -> tuple[int, str]:
    """Return how much of the unified memory Metal may use, in bytes, and who says so.

    Metal's own answer has an owner's limit in it already; without it the limit counts, else an estimate.
    """
    if 0 < working_set <= total_bytes:
        return working_set, "metal"
    limit = _integer(sysctl.get("iogpu.wired_limit_mb")) * 2**20 or _integer(sysctl.get("debug.iogpu.wired_limit"))
    if limit > 0:
        return min(limit, total_bytes), "sysctl"
    share = (3, 4) if total_bytes >= LARGE_MEMORY_BYTES else (2, 3)
    return total_bytes * share[0] // share[1], "estimate"


def _cpu_cores(hardware: Table, sysctl: dict[str, str]) -> Facts:
    """Return the CPU's cores of each kind, by the names sysctl has for them.

    Without sysctl, ``proc 12:8:4`` means 12 cores, 8 of them performance, 4 efficiency. With four numbers (macOS 26
    and on) what the last three count depends on the chip, so nothing is made of them.
    """
    named = {
        f"{name.lower()}_cores": _integer(sysctl.get(f"hw.perflevel{level}.physicalcpu"))
        for level in range(3)
        if (name := sysctl.get(f"hw.perflevel{level}.name", "")) in ("Super", "Performance", "Efficiency")
    }
    if named:
        return {**named}
    three = re.fullmatch(r"proc \d+:(\d+):(\d+)", str(hardware.get("number_processors")))
    return {"performance_cores": int(three[1]), "efficiency_cores": int(three[2])} if three else {}


def _has_apple_chip(sysctl: dict[str, str]) -> bool:
    return sysctl.get("hw.optional.arm64") == "1"


def _chip(hardware: Table, gpus: Sequence[Table], sysctl: dict[str, str]) -> str:
    """Return the name of Apple's chip, an empty string on an Intel Mac.

    The CPU's brand comes last: a Python that runs translated sees ``VirtualApple`` there.
    """
    names = [hardware.get("chip_type"), *(g.get("sppci_model") for g in gpus), sysctl.get("machdep.cpu.brand_string")]
    found = (name for name in map(_text, names) if name and name.startswith("Apple "))
    return next(found, "Apple silicon" if _has_apple_chip(sysctl) else "")


def _is_virtual(chip: str, hardware: Table, gpus: Sequence[Table], sysctl: dict[str, str]) -> bool:
    model = str(hardware.get("machine_model") or sysctl.get("hw.model", ""))
    drawn = any("paravirt" in str(gpu.get("sppci_model", gpu.get("_name"))).lower() for gpu in gpus)
    return drawn or model.startswith("VirtualMac") or "(Virtual)" in chip


# Intel Macs


def _intel(gpus: Sequence[Table], machine: Facts) -> Detection:
    able = [gpu for gpu in gpus if _metal_family(gpu)]
    if not able:
        names = ", ".join(_gpu_name(gpu) for gpu in gpus)
        return Detection.undetected(f"no GPU that Metal supports (listed: {names})" if names else "no GPU is listed")
    seen: Counter[str] = Counter()
    devices = []
    for gpu in able:
        seen[_gpu_name(gpu)] += 1
        devices.append(_intel_device(gpu, machine, copy=seen[_gpu_name(gpu)]))
    return Detection.healthy(devices)


def _intel_device(gpu: Table, machine: Facts, *, copy: int) -> Device:
    keys = ("spdisplays_vram", "_spdisplays_vram", "spdisplays_vram_shared")
    memory = next((size for key in keys if (size := size_bytes(gpu.get(key)))), None)
    facts: Facts = {
        **machine,
        "metal_family": _metal_family(gpu),
        "pci_device_id": _text(gpu.get("spdisplays_device-id")),
        "removable": gpu.get("sppci_device_type") == "spdisplays_egpu"
        or gpu.get("spdisplays_gpu_removable") == "spdisplays_yes",
        "unified_memory": gpu.get("sppci_bus") == "spdisplays_builtin",
    }
    return _device(_gpu_name(gpu), _vendor(gpu), memory, facts, copy=copy)


# Reading what is answered


def parse_sysctl(text: str) -> dict[str, str]:
    """Return ``name: value`` lines as a dict."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs if value.strip()}


def size_bytes(text: object) -> int:
    """Return ``8 GB``, ``1536 MB`` or, on a French Mac, ``8 Go`` in bytes (they are binary sizes), else 0."""
    match = re.fullmatch(r"(\d{1,6})(?:[.,](\d{1,6}))?\s*([kmgt])\w{0,3}", str(text).strip().lower())
    if not match:
        return 0
    return int(float(f"{match[1]}.{match[2] or 0}") * _UNITS[match[3]])


def _read_profile(text: str) -> tuple[Table, list[Table], str]:
    """Return the hardware overview, the GPUs, and what is wrong with the text."""
    try:
        data = json.loads(text)
        hardware, gpus = data["SPHardwareDataType"], data["SPDisplaysDataType"]
    except (ValueError, RecursionError):
        return {}, [], "system_profiler's answer is not JSON"
    except (KeyError, TypeError):
        return {}, [], "system_profiler's answer lacks the hardware or the displays"
    return next(iter(_tables(hardware)), {}), _tables(gpus), ""


def _tables(value: object) -> list[Table]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _machine(hardware: Table, sysctl: dict[str, str]) -> Facts:
    """Return what is true of the whole Mac."""
    total = _integer(sysctl.get("hw.memsize")) or size_bytes(hardware.get("physical_memory"))
    return {
        "macos_version": sysctl.get("kern.osproductversion"),
        "model": _text(hardware.get("machine_model")) or sysctl.get("hw.model"),
        "system_memory_bytes": total or None,
    }


def _device(name: str, vendor: str, memory_bytes: int | None, facts: Facts, *, copy: int = 1) -> Device:
    """Return the record; the ``copy``-th card of one name has that number in its id."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100] or "unnamed"
    return Device(
        id=f"gpu:{slug}-{copy}" if copy > 1 else f"gpu:{slug}",
        kind="gpu",
        name=name,
        vendor=vendor,
        api="metal",
        memory_bytes=memory_bytes,
        attributes={key: value for key, value in facts.items() if value is not None},
    )


def _gpu_name(gpu: Table) -> str:
    return _text(gpu.get("sppci_model")) or _text(gpu.get("_name")) or "GPU"


def _vendor(gpu: Table) -> str:
    """Turn ``sppci_vendor_amd``, ``AMD (0x1002)`` and the like into a name."""
    words = re.findall(r"[a-z]+", str(gpu.get("spdisplays_vendor", "")).lower())
    return next((_VENDORS[word] for word in words if word in _VENDORS), "")


def _metal_family(gpu: Table) -> str | None:
    """Return ``metal3``, ``mtlgpufamilyapple7`` … (the key's name changed over the years); ``None`` without Metal."""
    keys = ("spdisplays_mtlgpufamilysupport", "spdisplays_metalfamily", "spdisplays_metal")
    told = next((value for key in keys if (value := _text(gpu.get(key)))), None)
    family = told and told.removeprefix("spdisplays_")
    return None if family in ("notsupported", "unsupported", "no", "") else family


def _text(value: object) -> str | None:
    return value.strip()[:200] or None if isinstance(value, str) else None


def _integer(value: object) -> int:
    """Return a whole number in text; 0 when there is none."""
    text = str(value).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0


# Asking


class Answer(NamedTuple):
    """What a program wrote, or why it wrote nothing."""

    text: str
    problem: str = ""


def _run(command: Sequence[str], *, timeout_s: float) -> Answer:
    """Run a program of the system. Its exit status is not looked at: sysctl fails for one unknown name among many."""
    name = command[0].rpartition("/")[2]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Answer("", f"{name} gave no answer within {timeout_s:g} s")
    except OSError as error:
        return Answer("", f"{name} cannot be run ({error.strerror})")
    return Answer(done.stdout) if done.stdout.strip() else Answer("", f"{name} gave no answer (exit {done.returncode})")
