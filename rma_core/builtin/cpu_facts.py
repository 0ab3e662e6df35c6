"""What a processor is called and which instruction sets it has, read from what each system says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Instruction sets that decide how fast a model runs, in the words of Linux; ARM's ``asimd`` counts as ``neon``.
INSTRUCTION_SETS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)

#: The same instruction sets as macOS, Windows' flag names and py-cpuinfo spell them.
_SPELLINGS = {
    "asimd": "neon",
    "advsimd": "neon",
    "avx1.0": "avx",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "feat_dotprod": "asimddp",
    "feat_i8mm": "i8mm",
    "feat_bf16": "bf16",
}

_VENDORS = {
    "GenuineIntel": "Intel",
    "AuthenticAMD": "AMD",
    "HygonGenuine": "Hygon",
    "CentaurHauls": "VIA",
    "  Shanghai  ": "Zhaoxin",
    "Shanghai": "Zhaoxin",
}

#: Who made an ARM core (MIDR_EL1, "CPU implementer").
_IMPLEMENTERS = {
    0x41: "ARM",
    0x42: "Broadcom",
    0x43: "Cavium",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x50: "Applied Micro",
    0x51: "Qualcomm",
    0x53: "Samsung",
    0x56: "Marvell",
    0x61: "Apple",
    0x6D: "Microsoft",
    0xC0: "Ampere",
}

#: Names of ARM cores by implementer and part (MIDR_EL1, "CPU part"): those found in boards, laptops and servers.
_PARTS = {
    (0x41, 0xB76): "ARM1176",
    (0x41, 0xC07): "Cortex-A7",
    (0x41, 0xC08): "Cortex-A8",
    (0x41, 0xC09): "Cortex-A9",
    (0x41, 0xC0F): "Cortex-A15",
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD85): "Cortex-X925",
    (0x41, 0xD87): "Cortex-A725",
    (0x41, 0xD8E): "Neoverse-N3",
    (0x46, 0x001): "A64FX",
    (0x48, 0xD01): "Kunpeng-920",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
    (0x51, 0x001): "Oryon",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}


class CpuFacts(NamedTuple):
    """What a system says of its processor; empty where it says nothing."""

    name: str = ""
    vendor: str = ""
    instruction_sets: tuple[str, ...] = ()
    #: The machine as its maker calls it; some ARM boards say it here.
    board: str = ""
    #: Whether the processor itself says that a hypervisor stands between.
    hypervisor: bool = False


def instruction_sets(words: Iterable[str]) -> tuple[str, ...]:
    """Return those of INSTRUCTION_SETS that ``words`` name, however the system spells them."""
    lower = {word.lower() for word in words}
    known = lower | {_SPELLINGS[word] for word in lower & _SPELLINGS.keys()}
    return tuple(name for name in INSTRUCTION_SETS if name in known)


def from_cpuinfo(text: str) -> CpuFacts:
    """Read Linux' ``/proc/cpuinfo`` in the shapes that x86, ARM, POWER and RISC-V kernels give it."""
    pairs = [(key.strip(), value.strip()) for key, colon, value in (line.partition(":") for line in text.splitlines())]
    first: dict[str, str] = {}
    for key, value in pairs:
        first.setdefault(key, value)
    flags = f"{first.get('flags', '')} {first.get('Features', '')}".split()
    vendor, cores = _arm(pairs)
    names = (first.get("model name", ""), cores, first.get("cpu", ""), first.get("uarch", ""))
    made_by = first.get("vendor_id", "")
    return CpuFacts(
        name=next((name for name in names if name), "")[:200],
        vendor=_VENDORS.get(made_by, made_by) or vendor,
        instruction_sets=instruction_sets(flags),
        board=first.get("Model", "")[:200],
        hypervisor="hypervisor" in flags,
    )


def from_sysctl(facts: Mapping[str, str]) -> CpuFacts:
    """Read macOS' ``sysctl``: Apple silicon says ``hw.optional.arm.FEAT_…: 1``, Intel lists words."""
    words = [key.rpartition(".")[2] for key, value in facts.items() if key.startswith("hw.optional.") and value == "1"]
    for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
        words += facts.get(key, "").split()
    name = facts.get("machdep.cpu.brand_string", "")
    vendor = facts.get("machdep.cpu.vendor", "")
    return CpuFacts(
        name=name[:200],
        vendor=_VENDORS.get(vendor, vendor) or ("Apple" if name.startswith("Apple") else ""),
        instruction_sets=instruction_sets(words),
        board=facts.get("hw.model", "")[:200],
        hypervisor=facts.get("kern.hv_vmm_present") == "1",
    )


def _arm(pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """Return maker and names of the ARM cores, each kind once (``Cortex-X925 + Cortex-A725``)."""
    makers = [_hex(value) for key, value in pairs if key == "CPU implementer"]
    parts = [_hex(value) for key, value in pairs if key == "CPU part"]
    kinds = dict.fromkeys(zip(makers, parts, strict=False))
    names = [_PARTS.get(kind, f"{_IMPLEMENTERS.get(kind[0], 'ARM')} core 0x{kind[1]:x}") for kind in kinds]
    return (_IMPLEMENTERS.get(makers[0], "") if makers else "", " + ".join(names))


def _hex(value: str) -> int:
    try:
        return int(value, 16)
    except ValueError:
        return 0
